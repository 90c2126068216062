"""Policy-gradient objectives, per edge: what an objective sees of E stored steps in, loss and what to log out.

Symbols: A advantage; lr log-ratio, the new log-prob minus the rollout's, each a mean over the D latent dims;
r = exp(lr); sg() stops the gradient. At lr = 0 every loss is -A with gradient -A in lr (guard: -A std). A = 0 gives
exactly no loss and no gradient.

    clip        max(-A r, -A clip(r, 1 - low, 1 + high))
    dual_clip   the same; for A < 0 at most -A dual
    gspo        clip, with one ratio for a whole sample
    cispo       -sg(clip(r, 1 - low, 1 + high)) A lr, shifted so that its value is -A clip(r)
    spo         -A r + |A| (r - 1)^2 / (2 trust)
    drpo        -A r + |A| mu (r - 1)^2 / (2 trust)          mu the rollout's density of the step
    guard       clip, with lr + divergence, times std, for lr
    dppo        -A r, without gradient where divergence >= trust and the update moves on outwards
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Objective = Literal["clip", "dual_clip", "gspo", "cispo", "spo", "drpo", "guard", "dppo"]

NEEDS_MEANS: tuple[Objective, ...] = ("guard", "dppo")
"""Objectives that read `Edges.divergence`."""
NEEDS_SEGMENTS: tuple[Objective, ...] = ("gspo",)
"""Objectives that read `Edges.segment`; the edges of a segment must reach the objective in one call."""

# exp() of a larger log-ratio tells nothing and may overflow; the clamp's share is logged (reliability row N2).
MAX_LOG_RATIO = 20.0


class Edges(NamedTuple):
    """What an objective sees of E stored steps."""

    log_ratio: Tensor
    """[E], with gradient; mean over the latent dims."""
    advantages: Tensor
    """[E], finite: edges with NaN credit have left the table."""
    logprob: Tensor
    """[E] of the rollout policy, mean over the latent dims, with all constants."""
    std: Tensor
    """[E], the full standard deviation of the step."""
    h: Tensor
    """[E], t - t_next."""
    divergence: Tensor | None
    """[E], with gradient: mean_d (mu - mu_old)^2 / (2 std^2), the exact KL of the two steps divided by D; None where it
    is not needed (`NEEDS_MEANS`)."""
    segment: Tensor
    """int [E], the sample that an edge belongs to."""


class Limits(NamedTuple):
    """How far the policy may move in one iteration. Each objective reads its own part."""

    low: float
    """The ratio is kept above 1 - low; all clipped objectives."""
    high: float
    """The ratio is kept below 1 + high; all clipped objectives."""
    trust: float
    """Width of the trust region: |r - 1| for spo, the change of a density for drpo, KL / D for dppo (paper: 1e-5)."""
    dual: float = 3.0
    """The loss of a negative advantage is at most -A dual, dual > 1; dual_clip."""


class Surrogate(NamedTuple):
    """What one objective makes of E edges."""

    loss: Tensor
    """[E]."""
    exponent: Tensor
    """[E], the log-ratio whose exp() it bounds, before the clamp."""
    outside: Tensor
    """bool [E]: edges beyond the trust region."""


def objective(name: Objective, edges: Edges, limits: Limits) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [E] of the edges under the objective of that name, and detached scalars to log.

    ratio_mean, ratio_max_dev and clamp_frac are about the ratio that the objective bounds (gspo: the sample's, guard:
    the normalised one), so that they compare with its limits; approx_kl is about the plain log-ratio. clip_frac is the
    share of edges outside the trust region: r outside [1 - low, 1 + high] whatever the sign of A (dual_clip: or
    capped), |r - 1| > trust for spo and drpo, the masked ones for dppo.
    Raises ValueError for an unknown name, a missing divergence, or dual <= 1.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose {', '.join(_OBJECTIVES)}.")
    found = _OBJECTIVES[name](edges._replace(advantages=edges.advantages.to(edges.log_ratio)), limits)
    return found.loss, _watch(edges.log_ratio.detach(), found.exponent.detach(), found.outside)


def clip(edges: Edges, limits: Limits) -> Surrogate:
    """PPO's clipped objective (arXiv:1707.06347, eq. 7), with two sides as in DAPO (arXiv:2503.14476).

    It has no gradient where it is clipped, where A = 0 and where the log-ratio is clamped.
    """
    return _clipped(edges.log_ratio, edges.advantages, limits)


def dual_clip(edges: Edges, limits: Limits) -> Surrogate:
    """Dual-clip PPO (arXiv:1912.09729): for A < 0 the clipped loss is at most -A dual, however large r.

    Without it a ratio that exploded dominates the mean whenever its advantage is negative.
    """
    if not limits.dual > 1:
        raise ValueError(
            f"dual={limits.dual:g} cuts off negative advantages at ratio 1 already; choose more than 1, 3 is usual."
        )
    found, advantages = clip(edges, limits), edges.advantages
    cap = -advantages * limits.dual
    capped = (advantages < 0) & (found.loss > cap)
    return found._replace(loss=torch.where(capped, cap, found.loss), outside=found.outside | capped)


def gspo(edges: Edges, limits: Limits) -> Surrogate:
    """GSPO (arXiv:2507.18071): all edges of a sample are clipped by one ratio, exp(mean of their lr).

    Note: it is the paper's GSPO-token: an edge carries the sample's ratio, but the gradient of its own lr times its
    own A. Where A is the same along a sample this is the sequence form in value and gradient; where it is not (trees),
    an edge without advantage stays without gradient.
    Note: the mean is over the edges of this call. Cut a minibatch between samples, not within one.
    """
    samples, member = torch.unique(edges.segment, return_inverse=True)
    lr = edges.log_ratio.detach()
    mean = lr.new_zeros(len(samples)).scatter_reduce(0, member, lr, "mean", include_self=False)
    own = edges.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _clipped(mean[member] + (own - own.detach()), edges.advantages, limits)


def cispo(edges: Edges, limits: Limits) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, the gradient never is.

    The loss is -w A (1 + lr - sg(lr)) with w = sg(clip(r, 1 - low, 1 + high)): lr has the gradient of the new log-prob,
    and the value is -A w.
    Note: the paper bounds w only from above, which is clip_range: [1.0, high].
    """
    ratio = _ratio(edges.log_ratio).detach()
    weight = ratio.clamp(1 - limits.low, 1 + limits.high)
    bounded = edges.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss = -weight * edges.advantages * (1 + bounded - bounded.detach())
    return Surrogate(loss, edges.log_ratio, _beyond(ratio, limits))


def spo(edges: Edges, limits: Limits) -> Surrogate:
    """SPO (arXiv:2401.16025): -A r + |A| (r - 1)^2 / (2 trust).

    Instead of a cut, the gradient of -A r gets the weight 1 - sign(A (r - 1)) |r - 1| / trust: it fades as r moves
    outwards, is 0 at |r - 1| = trust and turns back beyond.
    """
    return _penalised(edges, limits, torch.ones_like(edges.advantages))


def drpo(edges: Edges, limits: Limits) -> Surrogate:
    """DRPO (arXiv:2606.09821): -A r + |A| mu (r - 1)^2 / (2 trust), mu = exp(logprob) of the rollout policy.

    The weight of the gradient is 1 - sign(A (r - 1)) |pi - mu| / trust with pi = mu r: the trust region is in the
    change of probability, not in its ratio.
    Note: the paper's mu is a token's probability, at most 1. Here it is the geometric mean over the latent dims of the
    step's density, about 0.24 / std: it has no upper bound, and `trust` must grow as std falls.
    """
    return _penalised(edges, limits, edges.logprob.to(edges.log_ratio).exp())


def guard(edges: Edges, limits: Limits) -> Surrogate:
    """GRPO-Guard's regulated clipping (arXiv:2510.22319): PPO's clip on exp((lr + divergence) std).

    With x_next = mu_old + std eps and dmu = mu - mu_old the exponent is exactly mean_d(dmu eps). The plain lr has the
    mean -divergence and a spread that goes with 1 / std; this one has mean 0, and the same spread for the same |dmu|.
    Note: std is each edge's own; the public code takes the means of g and sqrt(h) over the batch.
    Note: the paper's weight 1 / h of a step's loss is not applied here.
    """
    log_ratio = (edges.log_ratio + _divergence("guard", edges)) * edges.std.to(edges.log_ratio)
    return _clipped(log_ratio, edges.advantages, limits)


def dppo(edges: Edges, limits: Limits) -> Surrogate:
    """Flow-DPPO (arXiv:2606.11025): -A r, masked where divergence >= trust and the update moves on outwards.

    Outwards is A > 0 with r > 1, or A < 0 with r < 1. A masked edge has loss 0 and no gradient, and counts in a mean.
    """
    ratio = _ratio(edges.log_ratio)
    outwards = edges.advantages * (ratio.detach() - 1) > 0
    masked = outwards & (_divergence("dppo", edges).detach() >= limits.trust)
    return Surrogate(torch.where(masked, 0.0, -edges.advantages * ratio), edges.log_ratio, masked)


_OBJECTIVES: dict[Objective, Callable[[Edges, Limits], Surrogate]] = {
    "clip": clip,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "cispo": cispo,
    "spo": spo,
    "drpo": drpo,
    "guard": guard,
    "dppo": dppo,
}


def _clipped(log_ratio: Tensor, advantages: Tensor, limits: Limits) -> Surrogate:
    ratio = _ratio(log_ratio)
    kept = ratio.clamp(1 - limits.low, 1 + limits.high)
    loss = torch.maximum(-advantages * ratio, -advantages * kept)
    return Surrogate(loss, log_ratio, _beyond(ratio.detach(), limits))


def _penalised(edges: Edges, limits: Limits, mu: Tensor) -> Surrogate:
    """-A r + |A| mu (r - 1)^2 / (2 trust)."""
    ratio = _ratio(edges.log_ratio)
    penalty = edges.advantages.abs() * mu * (ratio - 1).square() / (2 * limits.trust)
    outside = (ratio.detach() - 1).abs() > limits.trust
    return Surrogate(-edges.advantages * ratio + penalty, edges.log_ratio, outside)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _beyond(ratio: Tensor, limits: Limits) -> Tensor:
    return (ratio < 1 - limits.low) | (ratio > 1 + limits.high)


def _divergence(name: Objective, edges: Edges) -> Tensor:
    if edges.divergence is None:
        raise ValueError(
            f"objective {name!r} needs edges.divergence [E], mean_d (mu - mu_old)^2 / (2 std^2), and got None; compute "
            "it from the rollout's means for every objective in NEEDS_MEANS."
        )
    return edges.divergence.to(edges.log_ratio)


def _watch(log_ratio: Tensor, exponent: Tensor, outside: Tensor) -> dict[str, Tensor]:
    ratio = _ratio(exponent)
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "clip_frac": outside.float().mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
        "clamp_frac": (exponent.abs() > MAX_LOG_RATIO).float().mean(),
    }
