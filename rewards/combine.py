"""From several scores to the one number that is trained on: normalise, weigh, sum, gate.

    total = sum_r weight_r * norm_r(score_r)     and   total = min(total, floor) where a gate's score is below its min

A group whose scores spread less than `min_std` are worth their mean, all of them: what differs there is the reward's
own noise, and an advantage divided by its spread would make a lesson of it (Pref-GRPO's "illusory advantage",
arXiv:2508.20751).

NaN is no verdict, and stays one: a sample is scored by all weighted rewards or by none. With `renormalise` the rewards
that did answer stand in for those that did not; then totals of one group are means of different things, which is why it
is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.types import RewardError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition instead of a summand: where the raw score is below `min`, the total is at most `floor`."""

    min: float
    floor: float = 0.0
    """A gate never raises a total, so with negative totals choose a floor below them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one reward enters the total. Weight 0 only logs it."""

    weight: float = 1.0
    affine: tuple[float, float] = (0.0, 1.0)
    """(shift, scale): the score enters as (score - shift) / scale."""
    rank: bool = False
    """The score enters as its rank within the group, 0 = worst to 1 = best, ties at their mean."""
    gate: Gate | None = None
    min_std: float = 0.0
    """Spread (std) of raw scores below which the samples of a group count as equal; what repeats of one sample give."""

    @property
    def counts(self) -> bool:
        """Whether the total depends on this reward at all."""
        return self.weight != 0 or self.gate is not None

    def without_gradient(self, differentiable: bool) -> list[str]:
        """Why the total has no useful gradient by way of this reward, in sentences with the mend; [] where it has."""
        found = []
        if self.weight != 0 and not differentiable:
            found.append(
                f"it is not differentiable and has weight {self.weight:g}. "
                "Mend: weight: 0, which only logs it, or a differentiable reward instead."
            )
        if self.weight != 0 and self.rank:
            found.append("norm: rank is flat between its jumps. Mend: norm: none, unit or affine.")
        if self.weight != 0 and self.min_std:
            found.append("min_std compares groups, which have no gradient here. Mend: min_std: 0.")
        if self.gate is not None:
            found.append("a gate is a step, whose gradient is 0. Mend: remove `gate`, or add a weighted reward for it.")
        return found


def make_rule(
    name: str, weight: Any, norm: Any, gate: Any, score_range: tuple[float, float] | None, min_std: Any = 0.0
) -> Rule:
    """A `Rule` from config values.

    norm    none | rank | unit (the reward's declared range -> [0, 1]) | {unit: [low, high]} | {affine: [shift, scale]}
    gate    {min: 0.3} or {min: 0.3, floor: -1}
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RewardError(f"reward {name!r}: weight is {weight!r}; expected a number")
    if isinstance(min_std, bool) or not isinstance(min_std, int | float) or not min_std >= 0:
        raise RewardError(f"reward {name!r}: min_std is {min_std!r}; expected a number of at least 0")
    return Rule(
        weight=float(weight),
        affine=_affine(name, norm, score_range),
        rank=norm == "rank",
        gate=_gate(name, gate),
        min_std=float(min_std),
    )


def _affine(name: str, norm: Any, score_range: tuple[float, float] | None) -> tuple[float, float]:
    if norm in (None, "none", "rank"):
        return 0.0, 1.0
    if norm == "unit":
        if score_range is None:
            raise RewardError(f"reward {name!r} declares no range; give it: `norm: {{unit: [low, high]}}`")
        norm = {"unit": score_range}
    kind, pair = next(iter(norm.items())) if isinstance(norm, Mapping) and len(norm) == 1 else (None, None)
    if kind in ("unit", "affine") and isinstance(pair, Sequence) and len(pair) == 2:
        shift, scale = float(pair[0]), float(pair[1]) - (float(pair[0]) if kind == "unit" else 0.0)
        if scale > 0:
            return shift, scale
    raise RewardError(
        f"reward {name!r}: norm is {norm!r}; expected none, rank, unit, {{unit: [low, high]}} with low < high, "
        "or {affine: [shift, scale]} with scale > 0"
    )


def _gate(name: str, gate: Any) -> Gate | None:
    if gate is None:
        return None
    if not isinstance(gate, Mapping) or "min" not in gate or set(gate) - {"min", "floor"}:
        raise RewardError(f"reward {name!r}: gate is {gate!r}; expected {{min: 0.3}} or {{min: 0.3, floor: -1}}")
    return Gate(**{key: float(value) for key, value in gate.items()})


def combine(
    scores: Mapping[str, Tensor], rules: Mapping[str, Rule], group: Tensor, *, renormalise: bool = False
) -> Tensor:
    """Total [N] of `scores` {name: [N]}; `group` int [N] matters to `norm: rank` and `min_std`."""
    counted = {name: rule for name, rule in rules.items() if rule.counts}
    if not counted:
        raise RewardError("every reward has weight 0, so there is nothing to train on; give one a weight")
    weighted = {name: rule for name, rule in counted.items() if rule.weight != 0}
    total = torch.zeros(len(group))
    answered = torch.zeros(len(group))
    for name, rule in weighted.items():
        value = normalised(scores[name], rule, group)
        seen = ~value.isnan()
        total = total + rule.weight * (torch.where(seen, value, 0.0) if renormalise else value)
        answered = answered + seen * abs(rule.weight)
    if weighted and renormalise:
        total = total * sum(abs(rule.weight) for rule in weighted.values()) / answered  # 0 / 0 = NaN: nobody answered
    for name, rule in counted.items():
        if rule.gate is not None:
            total = _gated(total, scores[name], rule.gate)
    return total


def normalised(score: Tensor, rule: Rule, group: Tensor) -> Tensor:
    """A reward's score [N] as it enters the sum, before its weight."""
    if rule.min_std:
        score = levelled(score, group, rule.min_std)
    if rule.rank:
        return ranks(score, group)
    shift, scale = rule.affine
    return (score - shift) / scale


def ranks(score: Tensor, group: Tensor) -> Tensor:
    """Rank of each score [N] among its group's verdicts, 0 (worst) to 1 (best); ties share their mean, NaN stays NaN.

    A sample beats b of n and ties with e (itself too): rank = (b + (e - 1) / 2) / (n - 1). One verdict alone is 0.5.
    """
    peers = (group[:, None] == group[None, :]) & ~score.isnan()[None, :]
    below = (peers & (score[None, :] < score[:, None])).sum(1)
    equal = (peers & (score[None, :] == score[:, None])).sum(1)
    rank = (below + (equal - 1) / 2) / (peers.sum(1) - 1)
    return torch.where(score.isnan(), score, torch.where(peers.sum(1) > 1, rank, 0.5))


def levelled(score: Tensor, group: Tensor, min_std: float) -> Tensor:
    """Scores [N] with those of a group whose std (of its verdicts, population) is below `min_std` set to their mean."""
    level = score.clone()
    for each in torch.unique(group):
        rows = (group == each) & ~score.isnan()
        if rows.any() and score[rows].std(correction=0) < min_std:
            level[rows] = score[rows].mean()
    return level


def _gated(total: Tensor, score: Tensor, gate: Gate) -> Tensor:
    """No verdict on a condition is no verdict on the sample."""
    lowered = torch.where(score < gate.min, total.clamp(max=gate.floor), total)
    return torch.where(score.isnan(), score, lowered)
