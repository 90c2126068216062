"""From questions to answers: what the model is shown, how it writes, tools, forced endings, and what is known of each.

Symbols: P prompts of this process, K answers each, N = P K answers, S places of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.config import GenerationConfig
from flowrl.data import IMAGES, VIDEOS
from flowrl.types import Needs, Prompt, Tokens, held_to
from flowrl.vlm.augment import BEGIN, CORRECTED, SHUFFLED, SOLUTION, NoisyRollout, corrections
from flowrl.vlm.collate import Inputs
from flowrl.vlm.conversation import STOPS, Talk, converse, facts
from flowrl.vlm.data import SYSTEM, clips, messages, pictures
from flowrl.vlm.generate import Row, begin
from flowrl.vlm.policy import TextPolicy
from flowrl.vlm.server import Server, tokens_of
from flowrl.vlm.tools import Picture, build_tools


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """N answers, prompt by prompt."""

    tokens: Tokens
    texts: list[str]
    """What the model wrote, as verifiers see it: a tool's words are none of it."""
    facts: dict[str, Tensor]
    """float64 [N] each: tokens, truncated, forced, entropy, calls, failed_calls, over_turns, tool_position."""
    values: Tensor | None = None
    """What the value head expected before each token, fp32 [N,S]."""
    reference: Tensor | None = None
    """Log-probabilities of the reference, fp32 [N,S]."""


Judge = Callable[[Written], Sequence[bool]]
"""Whether each of N answers is wrong."""


class Writer:
    """Writes answers with a policy, in the way of a config's section `generation`."""

    def __init__(self, policy: TextPolicy, settings: GenerationConfig, server: Server | None = None) -> None:
        """With a `server`, which is closed with the writer, that one writes what is trained on; not evaluations."""
        self.policy, self.settings, self.server = policy, settings, server
        self.tools = build_tools(settings.tools.use) if settings.tools else {}
        self.noisy = NoisyRollout(**settings.noisy.model_dump()) if settings.noisy else None

    def __call__(
        self, prompts: Sequence[Prompt], slots: Sequence[int], *, members: int, seed: int, iteration: int,
        progress: float = 0.0, temperature: float | None = None, batch_size: int | None = None,
        needs: Needs | None = None, judge: Judge | None = None,
    ) -> Written:  # fmt: skip
        """`members` answers to each prompt; `slots`, the prompts' places in the whole iteration, key the draws.

        `temperature` None is the policy's; 0 takes the likeliest token each time, for evaluations. Of `needs`, values
        and log-probs of the reference are kept, so that no update has to ask for them. Iterations from 0 on are
        trained on. `judge` is asked where worked answers may stand in for wrong ones (`flowrl.vlm.augment.correct`).
        """
        index = [p for p in range(len(prompts)) for _ in range(members)]
        training = iteration >= 0
        noisy = self.noisy.members(members) if self.noisy and training else [False] * members
        rows: list[Row] = []
        seen: list[Sequence[Picture]] = []
        for prompt, slot in zip(prompts, slots, strict=True):
            shown = pictures(prompt)
            clean = self._inputs(prompt, shown)
            distorted = shown
            if any(noisy):
                assert self.noisy is not None
                distorted = self.noisy.pictures(shown, progress, seed=seed, iteration=iteration, prompt=slot)
            other = self._inputs(prompt, distorted, keep=False) if any(noisy) else clean
            for member in range(members):
                row = begin(other if noisy[member] else clean, (seed, iteration, slot, member))
                if prompt.metadata.get(BEGIN):
                    row = row.append(self.policy.model.foreign(template=prompt.metadata[BEGIN]))
                rows.append(row)
                seen.append(distorted if noisy[member] else shown)
        server = self.server if training else None
        talks = self._talks(rows, seen, temperature, batch_size, server)
        shown_later = [self.inputs(prompts[p]) for p in index] if any(noisy) else None
        written = self._written(talks, index, shown_later, server is not None)
        if judge is not None and any(CORRECTED in prompt.metadata for prompt in prompts):
            wrong = torch.tensor(judge(written)).view(len(prompts), members).tolist()
            for place, (prompt, is_wrong) in enumerate(zip(prompts, wrong, strict=True)):
                for member in corrections(prompt, is_wrong, seed=seed, iteration=iteration):
                    talks[place * members + member] = self._solved(talks[place * members + member])
            written = self._written(talks, index, shown_later, server is not None)
        return replace(
            written,
            values=self._asked(written.tokens, self.policy.values) if needs and needs.value else None,
            reference=self._reference(written.tokens, needs) if needs else None,
        )

    def inputs(self, prompt: Prompt) -> Inputs:
        """A question as the model takes it."""
        return self._inputs(prompt, pictures(prompt))

    def picture(self, prompt: Prompt) -> Picture:
        """A question's first picture or frame, for people; grey where it has none."""
        shown = pictures(prompt) or [frame for clip in clips(prompt)[:1] for frame in clip.frames]
        return shown[0] if shown else _blank()

    def close(self) -> None:
        """Close the connections to a server."""
        if self.server is not None:
            self.server.close()

    # ------------------------------------------------------------------------------------ parts of it

    def _talks(
        self, rows: list[Row], seen: list[Sequence[Picture]], temperature: float | None, batch_size: int | None,
        server: Server | None,
    ) -> list[Talk[Row]]:  # fmt: skip
        """Rows with their answers, turns of tools and forced endings included."""
        tools, limit = self.settings.tools, self.settings.max_new_tokens
        options: dict[str, Any] = {"greedy": True} if temperature == 0 else {"temperature": temperature}
        options["batch"] = batch_size or self.settings.batch_size or len(rows)

        def write(going: list[Row]) -> list[Row]:
            if server is None or any(len(row.ids) for row in going):  # a server cannot go on with what was begun
                done = self.policy.write(going, limit=limit, stops=STOPS if tools else (), **options)
            else:
                done = server.write(going, limit=limit, temperature=self.policy.temperature)
            if (forced := self.settings.forced_answer) is None:
                return done
            return self.policy.force(done, limit=forced.tokens, text=forced.text, unless=forced.unless, **options)

        return converse(
            rows, seen, self.policy.model, write, self.tools, turns=tools.max_turns if tools else 1,
            seconds=tools.timeout if tools else 0.0, template=tools.response if tools else "",
        )  # fmt: skip

    def _written(
        self, talks: Sequence[Talk[Row]], index: Sequence[int], clean: Sequence[Inputs] | None, foreign: bool
    ) -> Written:
        """The table of N answers; `clean` are their prompts where some saw distorted pictures."""
        rows = [talk.row for talk in talks]
        tokens = tokens_of(self.policy, rows, index) if foreign else self.policy.tokens(rows, index)
        if clean is not None:  # an update shows the clean picture: the answers' log-probs are those after it
            tokens = self.policy.rescored(_seen_clean(tokens, clean))
        lengths = tokens.lengths.double()
        known = facts(talks) | {
            "tokens": lengths,
            "forced": torch.tensor([talk.row.forced for talk in talks]).double(),
            # Each token's -log p is an unbiased estimate of the entropy of what it was drawn from.
            "entropy": -tokens.logprob.double().sum(1) / lengths.clamp(min=1),
        }
        return Written(tokens=tokens, texts=[talk.text for talk in talks], facts=known)

    def _solved(self, talk: Talk[Row]) -> Talk[Row]:
        """The worked answer in the place of another one, as if the policy had chosen it, with its log-probs."""
        inputs = replace(talk.row.inputs, later=())
        assert inputs.solution is not None  # `correct` treats no prompt without one
        row = begin(inputs, talk.row.key).wrote(inputs.solution, torch.zeros(len(inputs.solution)), "eos")
        logprob = self.policy.rescored(self.policy.tokens([row], [0])).logprob[0].cpu()
        row = begin(inputs, talk.row.key).wrote(inputs.solution, logprob, "eos")
        return Talk(row=row, pictures=talk.pictures, turns=(self.policy.text(row),))

    def _inputs(self, prompt: Prompt, shown: Sequence[Picture], keep: bool = True) -> Inputs:
        """A prompt as the model takes it; kept, since the same prompts come again."""
        gold = prompt.metadata.get(SOLUTION)
        gold = gold if isinstance(gold, str) else None
        # Pictures in memory live as long as the run's questions; a helped question's metadata do not.
        shown_of = [prompt.metadata.get(IMAGES, ()), *([video] if isinstance(video, str) else video
                    for video in prompt.metadata.get(VIDEOS, ()))]  # fmt: skip
        media = (tuple(one if isinstance(one, str) else id(one) for one in part) for part in shown_of)
        keep = keep and SHUFFLED not in prompt.metadata
        key = (prompt.text, prompt.metadata.get(SYSTEM), gold, *media) if keep else None
        return self.policy.prepare(messages(prompt, shown), gold, key)

    def _reference(self, tokens: Tokens, needs: Needs) -> Tensor | None:
        if not (needs.reference or needs.moving_reference):
            return None
        with torch.no_grad(), held_to(self.policy, needs):
            return self._asked(tokens, lambda part: self.policy.evaluate(part).logprob)

    def _asked(self, tokens: Tokens, of: Callable[[Tokens], Tensor], rows: int = 64) -> Tensor:
        """A number of each place [N,S], asked `rows` answers at a time; on the CPU."""
        width = tokens.ids.shape[1]
        parts = [of(tokens.select(part)) for part in torch.split(torch.arange(len(tokens)), rows)]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]).cpu()


def _seen_clean(tokens: Tokens, clean: Sequence[Inputs]) -> Tokens:
    """The same answers, as if they had been written to the clean pictures; pictures of tools stay."""
    inputs = tuple(replace(after, later=before.later) for after, before in zip(clean, tokens.inputs, strict=True))
    return replace(tokens, inputs=inputs)


def _blank() -> Picture:
    from PIL import Image

    return Image.new("RGB", (64, 64), "lightgrey")
