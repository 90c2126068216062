"""Answers that another policy wrote: an engine of other precision, older weights, another program altogether.

w = pi_old / mu is how much likelier an answer's tokens were under the policy that is trained, as it was when the answer
came, than under the engine mu that wrote them. Weights multiply the loss and are cut from the graph. A token or answer
that is masked gets the weight 0 and stays in the denominator of the mean; otherwise those that are left would count for
more than they are.

Shapes: N answers, S places; `mask` [N,S] tells the places that count. Log-ratios are cut to [-20, 20].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowrl.algorithms.objectives import MAX_LOG_RATIO

Mode = Literal["tis", "mis", "icepop"]
Level = Literal["token", "sequence", "geometric"]
Rejection = Literal[
    "sum_k1", "sum_k2", "sum_k3", "mean_k1", "mean_k2", "mean_k3", "max_k1", "max_k2", "max_k3",
]  # fmt: skip


@torch.no_grad()
def importance_weights(log_weight: Tensor, mask: Tensor, mode: Mode, level: Level, low: float, high: float) -> Tensor:
    """Weights [N,S] of the tokens from log w [N,S]; 0 off the mask.

        tis      min(w, high)                      truncated importance sampling (Ionides 2008)
        mis      w where w <= high, else 0
        icepop   w where low <= w <= high, else 0  (arXiv:2510.18855)

    w is a token's own (`token`), the product over its answer (`sequence`), or the answer's geometric mean
    (`geometric`). The lower bound is read by icepop alone.
    Raises ValueError for an unknown mode or level, or bounds that leave nothing.
    """
    if not 0 <= low < high:
        raise ValueError(f"weights from {low:g} to {high:g} are none; give 0 <= low < high, such as 0.5 and 5.")
    weight = _at(log_weight, mask, level).exp()
    if mode == "tis":
        kept = weight.clamp(max=high)
    elif mode == "mis":
        kept = weight.where(weight <= high, 0.0)
    elif mode == "icepop":
        kept = weight.where((weight >= low) & (weight <= high), 0.0)
    else:
        raise ValueError(f"unknown correction {mode!r}; choose tis, mis or icepop.")
    return kept.where(mask, 0.0)


@torch.no_grad()
def rejected(log_weight: Tensor, mask: Tensor, how: Rejection, low: float, high: float) -> Tensor:
    """Answers [N] whose distance from the engine that wrote them is outside [low, high].

    The distance is a statistic (sum, mean or largest) over an answer's tokens of k1 = log w, k2 = (log w)^2 / 2 or
    k3 = w - 1 - log w. w is pi_old / mu: k1 above `high` is an answer that the engine gave too rarely.
    Note: other code bounds mu / pi_old under the same names; its bounds there are those of -k1.
    """
    statistic, _, form = how.partition("_")
    distance = _DISTANCES[form](_bounded(log_weight))
    found = _STATISTICS[statistic](distance, mask)
    return ((found < low) | (found > high)) & mask.any(1)


@torch.no_grad()
def off_policy_sequences(log_ratio: Tensor, mask: Tensor, advantages: Tensor, delta: float) -> Tensor:
    """Answers [N] that are to be left out as bad and far away (OPSM of DeepSeek-V3.2, arXiv:2512.02556).

    Bad: the mean of their advantages [N,S] is negative. Far: the mean of -log_ratio = log(mu / pi), mu being who wrote
    the answers and pi today's policy, is above `delta`.
    Learning from a mistake that the policy would not make any more drives it off; good answers stay.
    """
    far = -_mean(_bounded(log_ratio), mask) > delta
    return far & (_mean(advantages, mask) < 0)


def proximal_logprob(behaviour: Tensor, current: Tensor, version: int, behaved: int, now: int) -> Tensor:
    """log pi of a version between the one that wrote the answers and today's, without asking either (AReaL).

    Log-linear: (1 - alpha) log mu + alpha log pi, alpha = (version - behaved) / (now - behaved). It stands for pi_old
    in decoupled PPO (arXiv:2505.24298): ratio pi / pi_old, weight pi_old / mu by `importance_weights`. Detached.
    """
    alpha = (version - behaved) / max(now - behaved, 1)
    return behaviour.lerp(current.detach(), alpha)


@torch.no_grad()
def weight_metrics(log_weight: Tensor, mask: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """How far pi_old is from the engine, of tokens and before any cut, and how many weights the correction made 0.

    All are means over tokens, but for the largest and the smallest weight, so that the metrics of parts merge into
    those of the whole (`merge_metrics`). chi2 is E w^2 - 1; the KL of the engine from pi_old is the k3 estimate; the
    difference of log-perplexities, pi_old's less the engine's, is E log(mu / pi_old) and estimates the same KL, with a
    sign; the share that was masked is that of weights 0.
    Note: ESS = 1 / mean((w / mean w)^2) = is_weight_mean^2 / (1 + is_chi2) is no mean, and left to the reader.
    """
    log_weight = _bounded(log_weight)[mask]
    weight = log_weight.exp()
    return {
        "is_weight_mean": weight.mean(),
        "is_weight_max": weight.max(),
        "is_weight_min": weight.min(),
        "is_kl": _DISTANCES["k3"](log_weight).mean(),
        "is_log_ppl_diff": -log_weight.mean(),
        "is_chi2": weight.square().mean() - 1,
        "is_masked_frac": (weights[mask] == 0).float().mean(),
    }


def _at(log_weight: Tensor, mask: Tensor, level: Level) -> Tensor:
    """log w [N,S] at that level."""
    if level == "token":
        return _bounded(log_weight)
    if level == "sequence":
        return _bounded(log_weight.where(mask, 0.0).sum(1, keepdim=True)).expand_as(log_weight)
    if level == "geometric":
        return _bounded(_mean(log_weight, mask)[:, None]).expand_as(log_weight)
    raise ValueError(f"unknown level {level!r}; choose token, sequence or geometric.")


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return _sum(values, mask) / mask.sum(1).clamp(min=1)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask, 0.0).sum(1)


def _max(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask, -torch.inf).amax(1)


def _bounded(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


_STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": _sum, "mean": _mean, "max": _max}
_DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_weight: log_weight,
    "k2": lambda log_weight: 0.5 * log_weight.square(),
    "k3": lambda log_weight: log_weight.expm1() - log_weight,
}
