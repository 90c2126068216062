"""How well scores agree with preferences: accuracy with and without ties, calibration, rank correlation, intervals.

Symbols: N pairs; `delta` [N] = score(a) - score(b); `label` [N] = 1 where a was preferred, -1 where b was, 0 for a tie;
`credit` [N] = what one pair earns, in [0, 1]: an accuracy is the mean of credits, and its interval a bootstrap of them.
Everything is fp64 and expects no NaN, except where it says so. A statistic of nothing is NaN.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Credit: TypeAlias = Callable[[Array, Array, float], Array]
"""(delta, label, threshold) -> credit [N]; |delta| <= threshold counts as a tie of the scores."""

NO_TIES = -1.0
"""A threshold that no |delta| reaches: even equal scores are no tie then, but right for neither."""
_STEEPEST = 10.0  # logit of a pair of mean |delta|, at most: labels that are all as predicted would ask for infinity
_RESAMPLED_AT_ONCE = 100


# ------------------------------------------------------------------------------------------------ credits


def order_credit(delta: Array, label: Array) -> Array:
    """1 = the preferred one scores higher, 0 = lower, 1/2 = equal scores; NaN where the label is a tie."""
    credit = (1 + np.sign(delta) * label) / 2
    return np.where(label == 0, math.nan, credit)


def half_credit(delta: Array, label: Array, threshold: float) -> Array:
    """PickScore's rule (arXiv:2305.01569): 1 for the same of a, b and tie, 1/2 where just one of the two is a tie."""
    said = _said(delta, threshold)
    one_sided = (said == 0) != (label == 0)
    return np.where(one_sided, 0.5, said == label)


def exact_credit(delta: Array, label: Array, threshold: float) -> Array:
    """Ties Matter (arXiv:2305.14324), eq. 3: 1 for the same of a, b and tie, 0 for anything else."""
    return (_said(delta, threshold) == label).astype(np.float64)


def _said(delta: Array, threshold: float) -> Array:
    """What the scores say: 1, -1, 0 within the threshold; NaN for equal scores that may not be a tie."""
    said = np.where(np.abs(delta) <= threshold, 0.0, np.sign(delta))
    return np.where((delta == 0) & (threshold < 0), math.nan, said)


def fit_threshold(delta: Array, label: Array, credit: Credit) -> float:
    """The threshold with the highest mean credit, the smallest of several; NO_TIES and every |delta| are tried.

    Algorithm 1 of Ties Matter, for either credit, in N log N: raising the threshold past a pair changes that pair only.
    """
    if not len(delta):
        return NO_TIES
    size = np.abs(delta)
    order = np.argsort(size, kind="stable")
    gain = (credit(delta, label, math.inf) - credit(delta, label, NO_TIES))[order]
    last = np.append(np.diff(size[order]) > 0, True)  # of pairs with the same |delta|: they become ties together
    totals = np.append(0.0, np.cumsum(gain)[last])
    return float(np.append(NO_TIES, size[order][last])[np.argmax(totals)])


# ------------------------------------------------------------------------------------------------ calibration


def fit_temperature(delta: Array, target: Array) -> float:
    """T > 0 that minimises the NLL of sigmoid(delta / T) against `target` [N], the probability that a is better.

    inf where the scores do not help (they are all equal, or point the wrong way), and a floor where they are always
    right: a pair of mean |delta| then gets the logit 10.
    """
    scale = np.abs(delta).mean() if len(delta) else 0.0
    if not scale > 0:
        return math.inf
    x = delta / scale

    def slope(beta: float) -> float:
        """Derivative of the mean NLL by beta, the inverse temperature; grows with it, as the NLL is convex."""
        return float(((sigmoid(beta * x) - target) * x).mean())

    low, high = 0.0, _STEEPEST
    if slope(low) >= 0:
        return math.inf
    if slope(high) <= 0:
        return float(scale / high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(scale / high)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def brier(chance: Array, target: Array) -> float:
    """Mean squared difference of predicted and actual probability; 1/4 for a coin. 0 needs targets of 0 and 1."""
    return _mean((chance - target) ** 2)


def nll(chance: Array, target: Array) -> float:
    """Mean cross-entropy in nats; log 2 for a coin. A chance is taken to be at least 1e-12 away from 0 and 1."""
    p = np.clip(chance, 1e-12, 1 - 1e-12)
    return _mean(-(target * np.log(p) + (1 - target) * np.log(1 - p)))


def ece(chance: Array, target: Array, bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599): mean over the pairs of |right - confidence| of their bin.

    Confidence is that in the side which the scores prefer, in [1/2, 1] in bins of equal width, so that it does not
    matter which of two is called a.
    """
    if not len(chance):
        return math.nan
    confidence = np.maximum(chance, 1 - chance)
    right = np.where(chance >= 0.5, target, 1 - target)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = np.bincount(place, right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(chance))


# ------------------------------------------------------------------------------------------------ ranks


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, equal values sharing their mean rank; NaN if one is flat."""
    a, b = _ranks(np.asarray(x, np.float64)), _ranks(np.asarray(y, np.float64))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / norm) if norm else math.nan


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: (concordant - discordant) / sqrt(pairs untied in x * pairs untied in y); NaN if one is flat."""
    a, b = _signs(x), _signs(y)
    norm = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / norm) if norm else math.nan


def rank_score(scores: Sequence[float], rank: Sequence[float]) -> float:
    """HPDv2's score of a ranking (arXiv:2306.09341): 1 - inversions / pairs, where rank 1 is the best.

    Equal ranks are never inverted.

    Note: equal scores are half an inversion here; upstream they count by the order in which the images are listed.
    """
    wanted, found = -_signs(rank), _signs(scores)
    pairs = len(wanted)
    return float(1 - (wanted**2 * (1 - wanted * found) / 2).sum() / pairs) if pairs else math.nan


def _ranks(x: Array) -> Array:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[place]


def _signs(x: Sequence[float]) -> Array:
    """sign(x[i] - x[j]) of all pairs i < j."""
    values = np.asarray(x, np.float64)
    i, j = np.triu_indices(len(values), 1)
    return np.sign(values[i] - values[j])


# ------------------------------------------------------------------------------------------------ intervals, splits


def interval(
    values: Array, clusters: Sequence[Any], *, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of `values` [N], by cluster: what shares a prompt is drawn together.

    NaN values are left out. (NaN, NaN) with fewer than two clusters, which say nothing about others.
    """
    number: dict[Any, int] = {}
    known = [row for row, value in enumerate(values.tolist()) if not math.isnan(value)]
    place = [number.setdefault(clusters[row], len(number)) for row in known]
    count = len(number)
    if count < 2:
        return math.nan, math.nan
    sums = np.bincount(place, values[known])
    sizes = np.bincount(place).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _RESAMPLED_AT_ONCE):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(_RESAMPLED_AT_ONCE, resamples - start))
        means.append((times @ sums) / (times @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def split(clusters: Sequence[Any], share: float, seed: int) -> NDArray[np.bool_]:
    """Which of N rows are for fitting: a `share` of the clusters, drawn by name, so that order does not matter."""
    names = sorted({str(c) for c in clusters}, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    chosen = set(names[: round(share * len(names))])
    return np.array([str(c) in chosen for c in clusters], dtype=bool)


def mean(values: Array) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    return _mean(values[~np.isnan(values)])


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan
