"""All rewards of a run: samples in, one total and every score out, while the caller goes on with something else.

    with RewardHub([{"use": "ocr", "weight": 0.5}, "pixel.brightness"]) as hub:
        ticket = hub.submit(samples)          # returns at once
        ...                                   # the next rollout
        result = hub.result(ticket)           # waits for what is not done yet

Every device has one lane: a thread that takes jobs in the order in which they came. Rewards on different devices run at
the same time, those on one device after each other, so that they do not fight for its memory. A reward that runs
elsewhere has a lane of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewards.combine import Rule, combine
from rewards.entries import place, read_entries
from rewards.gradient import EMBEDS, Embedder
from rewards.media import broken_media
from rewards.resolve import available, resolve
from rewards.scorer import NanWatch, Scorer
from rewards.types import RewardContractError, RewardError, Sample, Scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HubResult:
    """What the rewards said about N samples; all tensors are fp32 on the CPU."""

    total: Tensor
    """[N] the weighted sum that is trained on; NaN = no verdict."""
    scores: dict[str, Tensor]
    """{reward: [N]} raw scores, in the order of the config."""
    parts: dict[str, dict[str, Tensor]]
    """{reward: {part: [N]}}"""
    info: list[dict[str, dict[str, Any]]]
    """Per sample {reward: info}; `error` says why there is no verdict."""
    seconds: dict[str, float]
    """{reward: time it took, waiting excluded}"""

    @property
    def nan_frac(self) -> dict[str, float]:
        """{reward: share of the samples without a verdict}"""
        return {name: value.isnan().float().mean().item() for name, value in self.scores.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Differentiated:
    """What the weighted rewards said about N samples, with a gradient; all tensors fp32, on the media's device."""

    total: Tensor
    """[N] the weighted sum, with its graph to the media; NaN = no verdict: leave the row out of a loss."""
    scores: dict[str, Tensor]
    """{reward: [N]} raw scores, detached."""
    parts: dict[str, dict[str, Tensor]]
    """{reward: {part: [N]}}, detached."""
    info: list[dict[str, dict[str, Any]]]
    """Per sample {reward: info}; `error` says why there is no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ticket:
    """A claim on scores that are being made; `RewardHub.result` redeems it, once."""

    group: Tensor
    futures: dict[str, Future[tuple[Scores, float]]]


class RewardHub:
    """The rewards of a config, loaded when first needed, on one lane per device."""

    def __init__(
        self,
        entries: Any,
        *,
        device: str | torch.device = "auto",
        renormalise: bool = False,
        max_nan_frac: float | None = 0.5,
    ) -> None:
        """`entries` as in `rewards.entries`; `device` "auto" is the current GPU where there is one.

        `renormalise` lets the rewards that answered stand in for those that did not. A run stops when the share of
        samples without a verdict from one reward stays above `max_nan_frac`.
        """
        self._renormalise = renormalise
        read = read_entries(entries, place(device))
        self._scorers: dict[str, Scorer] = {scorer.name: scorer for scorer, _ in read}
        self.rules: dict[str, Rule] = {scorer.name: rule for scorer, rule in read}
        self._watches = {
            name: NanWatch(name=name, max_nan_frac=max_nan_frac)
            for name, rule in self.rules.items()
            if rule.counts and max_nan_frac is not None
        }
        self._lanes = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"reward-{lane}")
            for lane in {scorer.lane for scorer in self._scorers.values()}
        }

    def submit(self, samples: Sequence[Sample]) -> Ticket:
        """Have all rewards score the samples; returns without waiting for them."""
        batch = _checked(samples)
        broken = broken_media(batch)
        ready = _mark(batch)

        def job(scorer: Scorer) -> Callable[[], tuple[Scores, float]]:
            def score() -> tuple[Scores, float]:
                for device, event in ready.items():
                    event.wait(torch.cuda.current_stream(device))
                return scorer.run(batch, broken)

            return score

        futures = {name: self._lanes[scorer.lane].submit(job(scorer)) for name, scorer in self._scorers.items()}
        return Ticket(group=torch.tensor([sample.group for sample in batch]), futures=futures)

    def result(self, ticket: Ticket) -> HubResult:
        """Wait for a ticket's scores; raises what a reward raised."""
        done = {name: future.result() for name, future in ticket.futures.items()}
        for name, watch in self._watches.items():
            answer = done[name][0]
            watch.see(answer.value, [entry["error"] for entry in answer.info if "error" in entry])
        scores = {name: answer.value for name, (answer, _) in done.items()}
        return HubResult(
            total=self.combine(scores, ticket.group),
            scores=scores,
            parts={name: answer.parts for name, (answer, _) in done.items()},
            info=[{name: done[name][0].info[row] for name in done} for row in range(len(ticket.group))],
            seconds={name: seconds for name, (_, seconds) in done.items()},
        )

    def __call__(self, samples: Sequence[Sample]) -> HubResult:
        """Score now and wait."""
        return self.result(self.submit(samples))

    def combine(self, scores: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """Total [N] of raw scores {name: [N]}, for callers that gather scores from several processes first."""
        return combine(scores, self.rules, group, renormalise=self._renormalise)

    def differentiate(self, samples: Sequence[Sample]) -> Differentiated:
        """Total with a gradient that reaches `Sample.media`, in the caller's thread; rewards of weight 0 take no part.

        The rewards' weights are frozen. A sample without a verdict gets total NaN, sends gradient 0 to its media, and
        does not count towards `max_nan_frac`: batches are small here, so the caller has to count. All graphs are kept
        until the backward pass, so a smaller `batch_size` saves no memory. Not to be called while a lane scores: a
        reward object is not for two threads. Raises what `check_differentiable` and the rewards raise.
        """
        self.check_differentiable()
        batch = _checked(samples)
        broken = broken_media(batch)
        device = batch[0].media.device if batch else torch.device("cpu")
        rules = {name: rule for name, rule in self.rules.items() if rule.weight != 0}
        answers = {name: self._scorers[name].differentiate(batch, broken) for name in rules}
        group = torch.tensor([sample.group for sample in batch])
        total = combine({n: a.value for n, a in answers.items()}, rules, group, renormalise=self._renormalise)
        return Differentiated(
            total=total.to(device),
            scores={name: answer.value.detach().to(device) for name, answer in answers.items()},
            parts={n: {key: part.to(device) for key, part in a.parts.items()} for n, a in answers.items()},
            info=[{name: answers[name].info[row] for name in answers} for row in range(len(batch))],
        )

    def check_differentiable(self) -> None:
        """RewardError, with every obstacle and its mend, unless the total has a useful gradient; loads nothing."""
        found = [
            f"reward {name!r}: {obstacle}"
            for name, rule in self.rules.items()
            for obstacle in rule.without_gradient(self._scorers[name].traits.differentiable)
        ]
        if found:
            others = [name for name in available() if getattr(resolve(name), "differentiable", False) is True]
            raise RewardError(
                f"a gradient cannot go through the total of these rewards. {' '.join(found)} "
                f"Differentiable rewards of this package: {', '.join(others)}."
            )

    def embedder(self) -> Embedder:
        """Features of images and texts (`rewards.types.Embeds`) from the one weighted reward that offers them.

        Loads nothing yet. RewardError if no weighted reward offers them, or several do.
        """
        weighted = [scorer for name, scorer in self._scorers.items() if self.rules[name].weight != 0]
        methods = EMBEDS[:2]  # the scale may become known in `load`
        lacking = {s.name: [m for m in methods if not callable(getattr(s.reward, m, None))] for s in weighted}
        offering = [scorer for scorer in weighted if not lacking[scorer.name]]
        if len(offering) == 1:
            return Embedder(offering[0])
        if offering:
            names = ", ".join(repr(scorer.name) for scorer in offering)
            raise RewardError(f"several rewards offer image and text features: {names}. Give all but one weight: 0.")
        told = "; ".join(f"{name!r} has no {' and no '.join(missing)}" for name, missing in lacking.items())
        raise RewardError(
            f"no weighted reward offers image and text features: {told or 'none has a weight'}. "
            f"Mend: give a weight to a reward that has {', '.join(EMBEDS)}, as rewards.types.Embeds says."
        )

    def warmup(self, samples: Sequence[Sample] | None = None, *, gradient: bool = False) -> dict[str, float]:
        """Load every reward and let it score two samples (made up, or yours); seconds by reward.

        `gradient`: the weighted ones are differentiated too, as `differentiate` will do it.

        Here every exception raises, whatever `on_error` says: a reward that fails before the first iteration is not a
        reward with an unlucky sample. A reward that needs `meta` is only loaded, unless your samples have it.
        """
        given = None if samples is None else _checked(samples)
        futures = {
            name: self._lanes[s.lane].submit(s.warm, given, gradient and self.rules[name].weight != 0)
            for name, s in self._scorers.items()
        }
        return {name: future.result() for name, future in futures.items()}

    def close(self) -> None:
        """Drop what has not started, wait for what has, and let the weights go."""
        for lane in self._lanes.values():
            lane.shutdown(wait=True, cancel_futures=True)
        for scorer in self._scorers.values():
            scorer.unload()

    def __enter__(self) -> Self:
        """The hub itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _checked(samples: Sequence[Sample]) -> list[Sample]:
    for index, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise RewardContractError(
                f"item {index} is a {type(sample).__name__}; the hub takes rewards.Sample(media=..., prompt=...)"
            )
    return list(samples)


def _mark(samples: Sequence[Sample]) -> dict[torch.device, torch.cuda.Event]:
    """Per GPU, an event after which the media that it may still be making is complete."""
    marks = {}
    for device in {sample.media.device for sample in samples if sample.media.is_cuda}:
        marks[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        marks[device].record(torch.cuda.current_stream(device))
    return marks
