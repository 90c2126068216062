"""Is the gradient of a reward one? What `RewardHub.differentiate` gives, against what the scores themselves do.

    report = check_grad("shapes_clip")
    print(report.to_markdown())
    assert report.ok

With g the gradient of the scores' sum, d random directions of +-1 per value, and central differences

    D(d) = [f(x + h d) - f(x - h d)] / 2h

    finite       every value of g is
    non-zero     every sample has a g that is not 0
    cosine       between g . d and D(d), over all samples and directions: 1 if g points the right way
    slope        D(sign g) / |g|_1, the worst sample: 1 if g has the right length too
    zero pixels  share of the pixels without any gradient: what the reward does not look at, such as what it cuts off
    at bounds    of the pixels that are exactly 0 or 1, how many have a gradient, compared with the others (in some
                 versions torch's clamp lets none through); half will do: x^2 has none at 0 by right
    saturated    the same for pixels beyond 0 and 1, as decoders make them: behind a hard clamp they never come back

Scores are compared in fp64 where the reward answers fp64 media with fp64 scores (statistics of pixels do, networks
with `dtype: float64` in their entry), else in fp32, where rounding leaves less to be asked of the agreement. The step h
is as small as that allows: the score should move by 1e-5 (fp32: 3e-3) of max(|f|, 1), so h is that divided by the slope
that g predicts, |g|_2 or |g|_1; at most it is 1e-4 (fp32: 1e-2).

Pictures are squeezed into [0.2, 0.8] first. At 0 and 1 the house's clamp lets the gradient through on purpose
(`rewards.media.clamp`), as does resizing where it overshoots, so that differences could not agree there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rewards.entries import place, read_entries
from rewards.hub import RewardHub
from rewards.probes import listed
from rewards.scorer import Scorer
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["Check", "GradReport", "check_grad"]

_STEP = {torch.float64: 1e-4, torch.float32: 1e-2}  # largest h
_MOVE = {torch.float64: 1e-5, torch.float32: 3e-3}  # how far a score should move, of max(|score|, 1)
_COSINE = {torch.float64: 0.999, torch.float32: 0.98}  # least agreement of directions
_SLOPE = {torch.float64: 0.01, torch.float32: 0.1}  # largest distance of the slope from 1
_BEYOND = 0.02  # how far saturated pixels lie outside [0, 1]; the hub refuses 0.05
_KEPT = ("use", "name", "device", "dtype", "batch_size", "frames", "offload")  # keys of an entry for the hub
_CLIPPED = {"at bounds": (0.0, 0.4), "saturated": (_BEYOND, 0.9)}  # how far outside, least share with a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property of the gradient."""

    name: str
    value: float
    expected: str
    ok: bool
    mend: str = ""
    """What to do where it is not ok."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradReport:
    """What `check_grad` found."""

    reward: str
    samples: int
    directions: int
    device: str
    """Where the reward runs."""
    dtype: str
    """In which the scores were compared."""
    step: tuple[float, float]
    """Smallest h of the central differences: along random directions, and along sign g."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(check.ok for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """One check by its name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_json(self) -> str:
        """All of it; null = not known."""
        data = asdict(self)
        for check in data["checks"]:
            check["value"] = _plain(check["value"])
        data |= {"step": [_plain(h) for h in self.step], "ok": self.ok}
        return json.dumps(data, indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """A table for people, and how to mend what fails."""
        return "\n".join(_markdown(self)) + "\n"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _markdown(report: GradReport) -> Iterator[str]:
    yield f"Gradient of {report.reward} on {report.device}: {'ok' if report.ok else 'NOT ok'}"
    yield ""
    yield f"{report.samples} samples, {report.directions} directions, compared in {report.dtype};"
    yield f"h = {report.step[0]:.2g} along random directions and {report.step[1]:.2g} along the gradient's sign."
    yield ""
    yield "| check | value | expected | |"
    yield "|---|---|---|---|"
    for check in report.checks:
        yield f"| {check.name} | {check.value:.4g} | {check.expected} | {'ok' if check.ok else 'FAILS'} |"
    for check in report.checks:
        if not check.ok:
            yield from ("", f"{check.name}: {check.mend}")


# ------------------------------------------------------------------------------------------------ checking


def check_grad(
    entry: Any,
    samples: Sequence[Sample] | None = None,
    *,
    device: str | torch.device = "auto",
    directions: int = 8,
    seed: int = 0,
) -> GradReport:
    """Differentiate one reward and compare with differences of its scores.

    entry    as in a config: a name, `{use: ..., option: ...}`, a function or an object; its weight does not matter
    samples  None = two smooth pictures made up; with metadata if the reward needs some
    device   where the reward runs

    RewardError for a reward that is not differentiable, lacks metadata or has no verdict on one of the samples;
    RewardContractError if no gradient reaches the media at all.
    """
    entries = listed(entry)
    if len(entries) != 1:
        raise RewardError(f"check_grad is for one reward at a time; {len(entries)} are given")
    ((scorer, _),) = read_entries(entries, place(device))
    # the hub gets the very object, so that its scores can be asked for in fp64 too
    ready = {**entries[0], "use": scorer.reward, "name": scorer.name}
    if not scorer.traits.differentiable:
        raise RewardError(
            f"reward {scorer.name!r} is not differentiable: there is no gradient to check. "
            "`flowrl reward list` shows which are; one of your own declares differentiable = True."
        )
    with RewardHub({key: ready[key] for key in ready if key in _KEPT}, device=device, max_nan_frac=None) as hub:
        given = _samples(scorer, samples, seed)
        found = _Differences(hub, scorer, given, seed, directions)
        return GradReport(
            reward=scorer.name,
            samples=len(given),
            directions=directions,
            device=str(scorer.device),
            dtype=str(found.dtype).removeprefix("torch."),
            step=found.steps(),
            checks=(*found.agreement(), *found.clipped()),
        )


class _Differences:
    """Scores and gradients of one reward around some samples."""

    def __init__(self, hub: RewardHub, scorer: Scorer, samples: Sequence[Sample], seed: int, directions: int) -> None:
        self._hub, self._scorer, self._samples = hub, scorer, samples
        self._directions, self._generator = directions, Generator().manual_seed(seed)
        self._media = [sample.media.detach().double() for sample in samples]
        self._gradients = self._differentiate(self._media)
        exact = self._answers_in_fp64()
        self.dtype = torch.float64 if exact else torch.float32
        self._scores = self._exactly if exact else self._hub_scores
        self._level = self._scores(self._media).abs().clamp(min=1)

    def steps(self) -> tuple[float, float]:
        """Smallest h along random directions, and along sign g."""
        return self._step(2).min().item(), self._step(1).min().item()

    def agreement(self) -> Iterator[Check]:
        """What can be said of the gradient at the samples as they are."""
        finite = [gradient.isfinite().all().item() for gradient in self._gradients]
        yield Check(
            name="finite", value=sum(finite) / len(finite), expected="1", ok=all(finite),
            mend="NaN or infinity in the way back: look for sqrt, norm, log, division and acos at 0 or 1, and add a "
            "small number, or clamp before them.",
        )  # fmt: skip
        alive = [gradient.any().item() for gradient in self._gradients]
        yield Check(
            name="non-zero", value=sum(alive) / len(alive), expected="1", ok=all(alive),
            mend="the score does not change with the picture there: look for rounding, argmax, comparisons and "
            "saturated sigmoids.",
        )  # fmt: skip
        if not all(finite):
            return
        cosine = self._cosine()
        yield Check(
            name="cosine", value=cosine, expected=f">= {_COSINE[self.dtype]}", ok=cosine >= _COSINE[self.dtype],
            mend="the gradient points elsewhere than the scores move: look for .detach(), straight-through steps and "
            f"rounding inside.{self._more_exact()}",
        )  # fmt: skip
        slope = self._slope()
        yield Check(
            name="slope", value=slope, expected=f"1 +- {_SLOPE[self.dtype]}", ok=abs(slope - 1) <= _SLOPE[self.dtype],
            mend="the gradient has another length than the scores' slope: look for .detach() of a factor, and for "
            f"hooks that scale.{self._more_exact()}",
        )  # fmt: skip
        zero = 1 - _share(self._gradients, [torch.ones_like(each[..., :1, :, :]).bool() for each in self._media])
        yield Check(
            name="zero pixels", value=zero, expected="< 1", ok=zero < 1, mend="no pixel has a gradient: see non-zero."
        )

    def clipped(self) -> Iterator[Check]:
        """Whether pixels at 0 and 1, and beyond, have a gradient as the others do."""
        for name, (beyond, least) in _CLIPPED.items():
            drawn = [torch.rand(each[..., :1, :, :].shape, generator=self._generator) for each in self._media]
            media = [
                each.masked_fill((u < 0.15).to(each.device), -beyond).masked_fill(
                    (u > 0.85).to(each.device), 1 + beyond
                )
                for each, u in zip(self._media, drawn, strict=True)
            ]
            gradients = self._differentiate(media)
            others = _share(gradients, [(u >= 0.15) & (u <= 0.85) for u in drawn])
            reached = _share(gradients, [(u < 0.15) | (u > 0.85) for u in drawn]) / others if others else math.nan
            yield Check(
                name=name, value=reached, expected=f">= {least}", ok=reached >= least,
                mend="such pixels get no gradient, so they stay what they are: clamp with rewards.media.clamp, which "
                "lets it through.",
            )  # fmt: skip

    def _cosine(self) -> float:
        predicted, found = [], []
        for _ in range(self._directions):
            signs = [(torch.randint(2, each.shape, generator=self._generator) * 2 - 1).to(each) for each in self._media]
            predicted.append(_dots(self._gradients, signs))
            found.append(self._derivative(signs, self._step(2)))
        a, b = torch.cat(predicted), torch.cat(found)
        norms = a.norm() * b.norm()
        return (a @ b / norms).item() if norms > 0 else math.nan

    def _slope(self) -> float:
        """Of the sample where it is furthest from 1."""
        signs = [gradient.sign() for gradient in self._gradients]
        slopes = self._derivative(signs, self._step(1)) / _dots(self._gradients, signs)
        return slopes[(slopes - 1).abs().nan_to_num(math.inf).argmax()].item()

    def _step(self, norm: int) -> Tensor:
        """h [N] along directions in which the scores should have a slope of |g|_norm."""
        slope = torch.stack([gradient.norm(norm) for gradient in self._gradients]).cpu()
        return (_MOVE[self.dtype] * self._level / slope).clamp(max=_STEP[self.dtype])

    def _derivative(self, directions: Sequence[Tensor], step: Tensor) -> Tensor:
        """Central differences [N] of every sample along its own direction with its own step, fp64."""
        moves = [h.to(d.device) * d for h, d in zip(step, directions, strict=True)]
        ahead = self._scores([each + move for each, move in zip(self._media, moves, strict=True)])
        behind = self._scores([each - move for each, move in zip(self._media, moves, strict=True)])
        return (ahead - behind) / (2 * step)

    def _differentiate(self, media: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of every sample's score, as a training run gets it; fp64."""
        asking = [each.float().requires_grad_() for each in media]
        found = self._hub.differentiate(self._with(asking))
        for row, total in enumerate(found.total):
            if not total.isfinite():
                told = found.info[row][self._scorer.name].get("error", "it does not say why")
                raise RewardError(f"reward {self._scorer.name!r} has no verdict on sample {row}: {told}")
        return [each.double() for each in torch.autograd.grad(found.total.sum(), asking)]

    @torch.no_grad()
    def _hub_scores(self, media: Sequence[Tensor]) -> Tensor:
        """Scores [N] in fp32, as fp64."""
        return self._hub(self._with([each.float() for each in media])).total.double()

    @torch.no_grad()
    def _exactly(self, media: Sequence[Tensor]) -> Tensor:
        """Scores [N] of fp64 media, by the reward itself: the hub hands on fp32."""
        answer = self._scorer.reward.score(self._with([each.to(self._scorer.device) for each in media]))
        return torch.as_tensor(answer.value if isinstance(answer, Scores) else answer).cpu()

    def _answers_in_fp64(self) -> bool:
        """Whether the reward keeps to fp64 all the way: a step that fp32 cannot show moves the scores."""
        if any(sample.kind not in self._scorer.traits.media for sample in self._samples):
            return False  # the hub cuts videos into frames
        nudged = [each + 1e-10 * g.sign() for each, g in zip(self._media, self._gradients, strict=True)]
        try:
            before, after = self._exactly(self._media), self._exactly(nudged)
        except (RuntimeError, TypeError, ValueError):
            return False  # fp32 weights refuse it
        return before.dtype == after.dtype == torch.float64 and bool((before != after).all())

    def _with(self, media: Sequence[Tensor]) -> list[Sample]:
        return [replace(sample, media=each) for sample, each in zip(self._samples, media, strict=True)]

    def _more_exact(self) -> str:
        return "" if self.dtype == torch.float64 else " To rule out rounding, repeat it with `dtype: float64`."


def _samples(scorer: Scorer, given: Sequence[Sample] | None, seed: int) -> list[Sample]:
    """The samples with levels in [0.2, 0.8], given or made up."""
    if given is None:
        if scorer.traits.needs:
            raise RewardError(
                f"reward {scorer.name!r} needs {' and '.join(map(repr, scorer.traits.needs))} in the metadata, which "
                "cannot be made up. Mend: pass samples that have it (on the command line --data)."
            )
        given = smooth_samples("image" if "image" in scorer.traits.media else "video", seed=seed)
    if not given:
        raise RewardError("there is nothing to differentiate: no samples are given")
    return [replace(sample, media=0.2 + 0.6 * sample.media.detach().clamp(0, 1)) for sample in given]


def smooth_samples(kind: MediaKind, count: int = 2, side: int = 64, seed: int = 0) -> list[Sample]:
    """Soft random colours with a prompt: noise enlarged eight times, so that resizing it again overshoots little."""
    generator = Generator().manual_seed(seed)
    frames = 1 if kind == "image" else 4
    small = torch.rand(count, frames, 3, side // 8, side // 8, generator=generator)
    media = [F.interpolate(each, (side, side), mode="bilinear", align_corners=False) for each in small]
    if kind == "image":
        return [Sample(media=each[0], prompt="a red circle") for each in media]
    return [Sample(media=each, prompt="a red circle", fps=8.0) for each in media]


def _share(gradients: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Of the pixels that the masks [...,1,H,W] choose, the share that has a gradient in any channel."""
    hit = sum(int((g.any(-3, keepdim=True).cpu() & mask.cpu()).sum()) for g, mask in zip(gradients, masks, strict=True))
    return hit / max(1, sum(int(mask.sum()) for mask in masks))


def _dots(gradients: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Inner products [N], on the CPU."""
    return torch.stack([(g * d.to(g)).sum() for g, d in zip(gradients, directions, strict=True)]).cpu()
