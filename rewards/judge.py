"""A chat model that sees pictures as the judge: asked in words, read from probabilities or from what it writes.

    yes_prob             P(Yes) / (P(Yes) + P(No)) to "is all of it there?"    as VQAScore (arXiv:2404.01291) asks
    level_expectation    sum_k k p(k) / sum_k p(k) over the levels 1..5        as Q-Align (arXiv:2312.17090) reads them
    text                 a written score from 1 to 5
    pair                 P(1) / (P(1) + P(2)) to "which is better?"            for the reward `pairs`
    pair_text            the same, from a written verdict

Written scores are mostly whole numbers, so that a group's are often equal and teach nothing; the first two modes and
pairs are finer. A template of your own (`template: ./mine.yaml`) replaces words, parser or both: see the files in
rewards/templates, and docs/judges.md for their keys.

The judge is a server with OpenAI's API (`url: http://host:8000/v1`, with `model` its name there) or a local model
(`model` alone: folder or hub id). Both are asked greedily. An answer that cannot be read, a refusal, one that is cut
off, and whatever a server fails at until the deadline is over, is no verdict; `info` says why, and has the answer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards import folder
from rewards._answers import Levels, Unreadable
from rewards._chat import Chat, LocalChat, Outcome, Question, RemoteChat
from rewards._template import Template, read_template
from rewards.card import Card
from rewards.http import RemoteError
from rewards.media import frame
from rewards.types import MediaKind, RewardContractError, RewardError, Sample, Scores

__all__ = ["Judge"]

_KEPT = 4000
"""Characters of an answer that stay in `info`, which is kept with every sample of a run."""


@dataclass(frozen=True, slots=True)
class _Opinion:
    """What came of one question."""

    value: float
    """Score, NaN = no verdict."""
    parts: dict[str, float] = field(default_factory=dict)
    info: dict[str, object] = field(default_factory=dict)


class Judge:
    """The score that a chat model gives, by a server with OpenAI's API or by a local one; also a judge for `pairs`.

    Modes: yes_prob, level_expectation, text, and for the reward `pairs` pair and pair_text: `{use: pairs, judge: judge,
    judge_options: {mode: pair, ...}}`, which shows both orders. In any other mode `pairs` gets the difference of two
    scores. A video is shown as `num_frames` pictures, evenly spread. Parts: what the mode's parser finds, such as mass,
    the probability that the answer is one of the expected words at all (`rewards._answers`).
    """

    name = "judge"
    default_mode = "yes_prob"
    card = Card(
        source="VQAScore (arXiv:2404.01291), Q-Align (arXiv:2312.17090) and free templates",
        licence="that of your model",
        options=("model",),
        note="With `url` a server with OpenAI's API is asked for `model`; without, `model` is loaded here.",
    )

    def __init__(
        self,
        mode: str | None = None,
        template: str | None = None,
        url: str | Sequence[str] | None = None,
        model: str | None = None,
        revision: str = "main",
        num_frames: int = 8,
        max_tokens: int | None = None,
        token: str | None = None,
        seed: int = 0,
        timeout: float = 60.0,
        deadline: float = 180.0,
        retries: int = 4,
        max_concurrency: int = 8,
    ) -> None:
        """`mode`: how it is asked and read, None = `default_mode`; `template`: a file whose keys replace the mode's.

        url               address(es) up to /v1 of a server; None: the model is loaded here
        model             its name there (may be left out where the server has one only); or folder or hub id
        revision          of a local model, on the hub
        num_frames        pictures of a video
        max_tokens        of an answer; None: the template's. One that is cut off gets twice as many, once
        token             env:NAME, the environment variable with the server's token
        seed              sent to the server; answers are greedy all the same
        timeout           seconds for one try of a request
        deadline          seconds for one call, of all its samples
        retries           of a request, if the server is unreachable or busy
        max_concurrency   requests at the same time
        """
        for key, value in (("num_frames", num_frames), ("max_tokens", 1 if max_tokens is None else max_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RewardError(f"{self.name}: {key} is {value!r}; expected a whole number of at least 1")
        if token is not None and not str(token).startswith("env:"):
            raise RewardError(
                f"{self.name}: a token must not stand in a config, which is kept with every run. "
                "Mend: export NAME=..., and token: env:NAME"
            )
        self._mode, self._num_frames = mode or self.default_mode, num_frames
        self._template: Template = read_template(self.name, self._mode, template)
        self._max_tokens = max_tokens or self._template.max_tokens
        self._chat: Chat | None = None
        if url is not None:
            self._chat = RemoteChat(
                self.name, url, model, seed=seed, token=token, timeout=timeout, deadline=deadline, retries=retries,
                max_concurrency=max_concurrency,
            )  # fmt: skip
            self.lane = f"remote-{url}"  # it waits for a server, not for a device
        elif model is not None:
            self._chat = LocalChat(self.name, model, revision)
        self.compares = self._template.shows == "pair"  # it has verdicts on pairs, and no scores
        self.media: frozenset[MediaKind] = self._template.media
        self.range = self._template.range
        self.needs = ("source",) if self._template.shows == "edit" else ()
        self.deterministic = url is None  # a server's batches, and so its last bits, depend on who else asks
        self._warned = False

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Look whether the server answers, or read the weights."""
        parser = self._template.parser
        if isinstance(self._chat, LocalChat) and isinstance(parser, Levels) and "" not in parser.after:
            raise RewardError(
                f"{self.name}: a local model's answer is read from its first token, but the template looks for it "
                f"behind {parser.after[0]!r}. Mend: ask for the word alone, with '' in `after`, or serve the model"
            )
        self._judge().load(device, dtype)

    def unload(self) -> None:
        """Close the connections, or let the weights go."""
        if self._chat is not None:
            self._chat.unload()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores [N] in the template's range; NaN where the judge failed or its answer cannot be read."""
        if self.compares:
            raise RewardContractError(
                f"{self.name}: mode {self._mode!r} compares two pictures. Mend: use it as the judge of pairs: "
                f"{{use: pairs, judge: {self.name}, judge_options: {{mode: {self._mode}, ...}}}}"
            )
        opinions = self._opinions([self._about(sample) for sample in samples])
        names = {name: None for opinion in opinions for name in opinion.parts}
        parts = {name: _vector([each.parts.get(name, math.nan) for each in opinions]) for name in names}
        value = _vector([opinion.value for opinion in opinions])
        return Scores(value=value, parts=parts, info=[dict(opinion.info) for opinion in opinions])

    def prefers(self, first: Sample, second: Sample) -> float:
        """Probability that the first is better; NaN = no verdict."""
        return self.prefers_batch([(first, second)])[0]

    def prefers_batch(self, pairs: Sequence[tuple[Sample, Sample]]) -> list[float]:
        """A probability for each pair, all asked for at once.

        Of a mode that scores, 1/2 + (score(first) - score(second)) / (2 * width of its range), each sample scored once.
        """
        if self.compares:
            opinions = self._opinions([self._between(first, second) for first, second in pairs])
            self._tell([str(opinion.info["error"]) for opinion in opinions if "error" in opinion.info], len(pairs))
            return [opinion.value for opinion in opinions]
        samples = {id(sample): sample for pair in pairs for sample in pair}
        scores = self.score(list(samples.values()))
        self._tell([info["error"] for info in scores.info if "error" in info], len(samples))
        score = dict(zip(samples, scores.value.tolist(), strict=True))
        width = self.range[1] - self.range[0]
        return [0.5 + (score[id(first)] - score[id(second)]) / (2 * width) for first, second in pairs]

    # -------------------------------------------------------------------------------------------- asking

    def _judge(self) -> Chat:
        if self._chat is None:
            raise RewardError(
                f"{self.name}: no judge is given. Mend: give `url`, the address of a server with OpenAI's API (such as "
                "http://127.0.0.1:8000/v1), and `model`, its name there; or `model` alone, the folder or hub id of a "
                "chat model that sees pictures"
            )
        return self._chat

    def _opinions(self, questions: Sequence[Question | RewardError]) -> list[_Opinion]:
        """What comes of the questions, in order."""
        asked = [question for question in questions if isinstance(question, Question)]
        outcomes = iter(self._judge().ask(asked, self._max_tokens, self._template.wants_logprobs))
        return [self._opinion(next(outcomes) if isinstance(q, Question) else q) for q in questions]

    def _opinion(self, outcome: Outcome) -> _Opinion:
        if isinstance(outcome, RewardError):
            told: dict[str, object] = {"error": str(outcome)}
            if isinstance(outcome, RemoteError):  # the server's fault, not the sample's
                told["failed"] = True
            return _Opinion(math.nan, info=told)
        info: dict[str, object] = {"answer": _shortened(outcome.text)}
        if not outcome.finished and not self._template.wants_logprobs:
            error = f"the answer did not end within {2 * self._max_tokens} tokens; raise max_tokens"
            return _Opinion(math.nan, info={**info, "error": error})
        try:
            verdict = self._template.parser(outcome)
        except Unreadable as error:
            return _Opinion(math.nan, info={**info, "error": f"the judge's answer cannot be read: {error}"})
        low, high = self.range
        return _Opinion(low + (high - low) * verdict.fraction, verdict.parts, info)

    def _about(self, sample: Sample) -> Question | RewardError:
        if self._template.shows == "sample":
            return self._question([self._pictures(sample)], sample)
        try:
            return self._question([[folder.reference(sample.meta["source"], "source")], self._pictures(sample)], sample)
        except RewardError as error:
            return error

    def _between(self, first: Sample, second: Sample) -> Question:
        return self._question([self._pictures(first), self._pictures(second)], first)

    def _question(self, shown: Sequence[Sequence[Tensor]], sample: Sample) -> Question:
        """The media, numbered where there are two, and the words."""
        content: list[str | Tensor] = []
        labelled = self._template.labels and len(shown) > 1
        for number, pictures in enumerate(shown, 1):
            content += [f"{sample.kind.capitalize()} {number}:"] if labelled else []
            content += pictures
        return Question((*content, self._template.ask(sample.kind, sample.prompt)), self._template.system)

    def _pictures(self, sample: Sample) -> list[Tensor]:
        """The image, or frames of the video."""
        count = 1 if sample.kind == "image" else min(self._num_frames, len(sample.media))
        return [frame(sample, index, count).media for index in range(count)]

    def _tell(self, errors: Sequence[str], count: int) -> None:
        """`pairs` has no place for a judge's reasons, so the first is told once."""
        if errors and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: {len(errors)} of {count} questions have no verdict; the first: {errors[0]} "
                "Further failures only show in `unjudged`.",
                stacklevel=3,
            )


def _shortened(text: str) -> str:
    """A text that is no longer than it may be in `info`: its verdict is at one of its ends."""
    left_out = len(text) - _KEPT
    return text if left_out <= 0 else f"{text[: _KEPT // 2]} [{left_out} characters] {text[-_KEPT // 2 :]}"


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
