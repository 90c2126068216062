"""Who meets whom, and what the results are worth: schedules and rankings of the samples of one group.

    all        everybody meets everybody: n (n - 1) / 2 pairs
    ring:k     everybody meets the next k of a circle, so 2 k others: n k pairs
    swiss:r    r rounds; in each, neighbours in the ranking so far that have not met: about n r / 2 pairs

    win_rate        mean of 1 (won), 1/2 (tied), 0 (lost) over the judged pairs of a sample
    bradley_terry   strengths s that make the results likeliest, P(a beats b) = 1 / (1 + exp(s_b - s_a)) (Bradley and
                    Terry, 1952); a sample is worth its mean probability to beat each of the others. It knows that a win
                    over a strong sample is worth more, which matters where not everybody meets everybody.

Pairs are of rows (i, j) with i < j. A result is 1 where i won, 0 where j won, 1/2 for a tie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rewards.types import RewardError

Pair: TypeAlias = tuple[int, int]
"""Rows of two samples of one group, in the order in which they came."""

RIDGE = 0.1
"""Prior of Bradley-Terry strengths, RIDGE / 2 s^2 each: keeps who won everything finite. About a tenth of a game."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who meets whom, as `all`, `ring:k` or `swiss:r` says."""

    kind: str
    number: int = 0

    @classmethod
    def parse(cls, text: object) -> Schedule:
        """From the config; RewardError for anything else."""
        found = re.fullmatch(r"(all)|(ring|swiss):([1-9][0-9]*)", str(text))
        if found is None:
            raise RewardError(
                f"pairs: schedule is {text!r}; expected all, ring:k (each meets the next k of a circle) or swiss:r "
                "(r rounds of neighbours in the ranking)"
            )
        return cls(found[1] or found[2], int(found[3] or 0))

    @property
    def rounds(self) -> int:
        """How often it asks, with what came out so far."""
        return self.number if self.kind == "swiss" else 1

    def pairs(self, rows: Sequence[int], key: str, results: Mapping[Pair, float]) -> list[Pair]:
        """The pairs of the next round among `rows`; `key` decides their order, `results` what is known by now."""
        circle = sorted(range(len(rows)), key=lambda i: hashlib.sha256(f"{key} {i}".encode()).digest())
        if self.kind == "swiss":
            return _neighbours([rows[i] for i in circle], results)
        half = len(rows) // 2  # beyond it the circle meets the same pairs from the other side
        reach = half if self.kind == "all" else min(self.number, half)
        met = {(i, circle[(at + step) % len(rows)]) for at, i in enumerate(circle) for step in range(1, reach + 1)}
        return [(rows[i], rows[j]) for i, j in sorted({(min(pair), max(pair)) for pair in met})]

    def count(self, size: int) -> int:
        """How many pairs a group of `size` has, at most."""
        if self.kind == "swiss":
            return min(self.number * (size // 2), size * (size - 1) // 2)
        return len(self.pairs(range(size), "", {}))


def _neighbours(rows: Sequence[int], results: Mapping[Pair, float]) -> list[Pair]:
    """Rows paired with the nearest in the ranking that they have not met; who finds nobody sits out."""
    points = {row: 0.0 for row in rows}
    for (i, j), won in results.items():
        if i in points:
            points[i] += won
            points[j] += 1 - won
    waiting = sorted(rows, key=lambda row: -points[row])  # stable: equals stay in the order of the circle
    pairs = []
    while waiting:
        one = waiting.pop(0)
        for other in waiting:
            pair = (min(one, other), max(one, other))
            if pair not in results:
                waiting.remove(other)
                pairs.append(pair)
                break
    return pairs


def bradley_terry(pairs: Sequence[Pair], won: Sequence[float], count: int, ridge: float = RIDGE) -> Tensor:
    """Strengths [count] of the rows 0 ... count - 1, mean 0, float64; `won` in [0,1] for each pair.

    The most likely ones under the prior, by Newton's method; the problem is strictly convex, so there is one answer.
    """
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    result = torch.tensor(won, dtype=torch.float64)
    strength = torch.zeros(count, dtype=torch.float64)
    for _ in range(100):
        chance = torch.sigmoid(strength[first] - strength[second])
        slope = -ridge * strength
        slope.index_add_(0, first, result - chance)
        slope.index_add_(0, second, chance - result)
        weight = chance * (1 - chance)
        curve = ridge * torch.eye(count, dtype=torch.float64)
        for a, b, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
            curve.index_put_((a, b), sign * weight, accumulate=True)
        step = torch.linalg.solve(curve, slope)
        strength = strength + step
        if step.abs().max() < 1e-10:
            break
    return strength - strength.mean()


def expected_wins(strength: Tensor) -> Tensor:
    """Mean probability [n] of each to beat each of the others, from strengths [n] of at least two."""
    chance = torch.sigmoid(strength[:, None] - strength[None, :])
    return (chance.sum(1) - 0.5) / (len(strength) - 1)


def play(
    schedule: Schedule,
    groups: Mapping[int, Sequence[int]],
    seed: int,
    ask: Callable[[list[Pair]], Sequence[float]],
) -> list[Pair]:
    """All pairs that were played, in order; `ask` judges a round of all groups and returns results in [0,1] or NaN."""
    results: dict[int, dict[Pair, float]] = {group: {} for group in groups}
    played: list[Pair] = []
    for _ in range(schedule.rounds):
        drawn = [(group, schedule.pairs(rows, f"{seed} {group}", results[group])) for group, rows in groups.items()]
        found = [(group, pair) for group, pairs in drawn for pair in pairs]
        if not found and played:
            break
        for (group, pair), won in zip(found, ask([pair for _, pair in found]), strict=True):
            results[group][pair] = 0.5 if won != won else won  # no verdict: met all the same
        played += [pair for _, pair in found]
    return played
