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
from flowrl.types import Needs, Prompt, Tokens
from flowrl.vlm.augment import BEGIN, NoisyRollout
from flowrl.vlm.collate import Inputs
from flowrl.vlm.conversation import STOPS, converse, facts
from flowrl.vlm.data import messages, pictures
from flowrl.vlm.generate import Row, begin
from flowrl.vlm.policy import TextPolicy
from flowrl.vlm.tools import Picture, build_tools

SOLUTION = "solution"
"""Metadata: a worked answer, for supervised terms."""


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
    """Log-probabilities of the initial weights, fp32 [N,S]."""


class Writer:
    """Writes answers with a policy, in the way of a config's section `generation`."""

    def __init__(self, policy: TextPolicy, settings: GenerationConfig) -> None:
        self.policy, self.settings = policy, settings
        self.tools = build_tools(settings.tools.use) if settings.tools else {}
        self.noisy = NoisyRollout(**settings.noisy.model_dump()) if settings.noisy else None

    def __call__(
        self, prompts: Sequence[Prompt], slots: Sequence[int], *, members: int, seed: int, iteration: int,
        progress: float = 0.0, temperature: float | None = None, batch_size: int | None = None,
        needs: Needs | None = None,
    ) -> Written:  # fmt: skip
        """`members` answers to each prompt; `slots`, the prompts' places in the whole iteration, key the draws.

        `temperature` None is the policy's; 0 takes the likeliest token each time, for evaluations. Of `needs`, values
        and log-probs of the initial weights are kept, so that no update has to ask for them.
        """
        index = [p for p in range(len(prompts)) for _ in range(members)]
        noisy = self.noisy.members(members) if self.noisy and iteration >= 0 else [False] * members
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
        return self._written(prompts, index, rows, seen, temperature, batch_size, any(noisy), needs)

    def inputs(self, prompt: Prompt) -> Inputs:
        """A question as the model takes it."""
        return self._inputs(prompt, pictures(prompt))

    def picture(self, prompt: Prompt) -> Picture:
        """A question's first picture, for people; grey where it has none."""
        shown = pictures(prompt)
        return shown[0] if shown else _blank()

    def close(self) -> None:
        """Nothing is held."""

    # ------------------------------------------------------------------------------------ parts of it

    def _written(
        self, prompts: Sequence[Prompt], index: list[int], rows: list[Row], seen: list[Sequence[Picture]],
        temperature: float | None, batch_size: int | None, noisy: bool, needs: Needs | None,
    ) -> Written:  # fmt: skip
        tools = self.settings.tools
        options: dict[str, Any] = {"greedy": True} if temperature == 0 else {"temperature": temperature}
        options["batch"] = batch_size or self.settings.batch_size or len(rows)

        def write(going: list[Row]) -> list[Row]:
            done = self.policy.write(going, limit=self.settings.max_new_tokens, stops=STOPS if tools else (), **options)
            if (forced := self.settings.forced_answer) is None:
                return done
            return self.policy.force(done, limit=forced.tokens, text=forced.text, unless=forced.unless, **options)

        talks = converse(
            rows, seen, self.policy.model, write, self.tools, turns=tools.max_turns if tools else 1,
            seconds=tools.timeout if tools else 0.0, template=tools.response if tools else "",
        )  # fmt: skip
        tokens = self.policy.tokens([talk.row for talk in talks], index)
        if noisy:  # an update shows the clean picture, so the answers' log-probs are those after it (NoisyRollout)
            clean = [self._inputs(prompts[p], pictures(prompts[p])) for p in index]
            tokens = self.policy.rescored(_seen_clean(tokens, clean))
        lengths = tokens.lengths.double()
        known = facts(talks) | {
            "tokens": lengths,
            "forced": torch.tensor([talk.row.forced for talk in talks]).double(),
            # Each token's -log p is an unbiased estimate of the entropy of what it was drawn from.
            "entropy": -tokens.logprob.double().sum(1) / lengths.clamp(min=1),
        }
        return Written(
            tokens=tokens, texts=[talk.text for talk in talks], facts=known,
            values=self._asked(tokens, self.policy.values) if needs and needs.value else None,
            reference=self._reference(tokens) if needs and needs.reference else None,
        )  # fmt: skip

    def _inputs(self, prompt: Prompt, shown: Sequence[Picture], keep: bool = True) -> Inputs:
        """A prompt as the model takes it; kept, since the same prompts come again."""
        gold = prompt.metadata.get(SOLUTION)
        talk = messages(prompt, shown)
        return self.policy.prepare(
            talk, gold if isinstance(gold, str) else None, (prompt.text, id(prompt.metadata)) if keep else None
        )

    def _reference(self, tokens: Tokens) -> Tensor:
        with torch.no_grad(), self.policy.reference():
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
