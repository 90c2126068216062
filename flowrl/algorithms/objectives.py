"""Policy-gradient objectives, per edge: what an objective sees of E choices in, loss and what to log out.

An edge is a choice of the policy: a stored step of a rollout, or a token of an answer. Its segment is what it belongs
to: the sample, or the answer.

Symbols: A advantage; lr log-ratio, the new log-prob minus the rollout's, of a step each a mean over the D latent dims;
r = exp(lr); mu = exp(logprob) the rollout's probability (density), pi = mu r; sg() stops the gradient. Losses are
shifted by constants so that at lr = 0 every loss is -A with gradient -A in lr (guard: -A std; clip_cov: or 0). A = 0
gives exactly no loss and no gradient, but for the penalties of dro and kl_cov.

    clip        max(-A r, -A clip(r, 1 - low, 1 + high))
    dual_clip   the same; for A < 0 at most -A dual
    gspo        clip, with one ratio for a whole segment
    gmpo        -A g, g = exp(mean of the segment's lr, each cut to [-low, high] on the side where it moves on outwards)
    sapo        -A (1 + 4 / tau (sigmoid(tau (r - 1)) - 1 / 2))
    cispo       -sg(clip(r, 1 - low, 1 + high)) A lr, shifted so that its value is -A clip(r)
    reinforce   -A (1 + lr)
    dro         -A (1 + lr) + lr^2 / (2 trust)
    spo         -A r + |A| (r - 1)^2 / (2 trust)
    drpo        -A r + |A| mu (r - 1)^2 / (2 trust)
    guard       clip, with lr + divergence, times std, for lr
    dppo        -A r, without gradient where divergence >= trust and the update moves on outwards
    dppo_tv     -A r, without gradient where |pi - mu| > trust and the update moves on outwards
    cppo_tv     the same, where a discounted |pi - mu| is beyond what the segment's earlier tokens have left of a budget
    clip_cov    clip, without a few of the edges whose cov is high
    kl_cov      -A r, plus |lr| where cov is highest; cov = (log pi - its mean)(A - its mean)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from samplers import stable_seed

Objective = Literal[
    "clip", "dual_clip", "gspo", "gmpo", "sapo", "cispo", "reinforce", "dro", "spo", "drpo", "guard", "dppo",
    "dppo_tv", "cppo_tv", "clip_cov", "kl_cov",
]  # fmt: skip

NEEDS_MEANS: tuple[Objective, ...] = ("guard", "dppo")
"""Objectives that read `Edges.divergence`: for steps alone."""
NEEDS_SEGMENTS: tuple[Objective, ...] = ("gspo", "gmpo", "cppo_tv")
"""Objectives that read `Edges.segment`; the edges of a segment must reach the objective in one call."""
NEEDS_PROBABILITIES: tuple[Objective, ...] = ("dppo_tv", "cppo_tv")
"""Objectives for tokens alone: they bound a change of probability, and a step has a density only."""
SEQUENCE_MEANS: tuple[Objective, ...] = ("gspo", "gmpo", "sapo")
"""Objectives whose loss of an answer is the mean over its tokens, whatever its length."""
NEEDS_TRUST: tuple[Objective, ...] = ("dro", "spo", "drpo")
"""Objectives whose `Limits.trust` has no usual value."""

# exp() of a larger log-ratio tells nothing and may overflow; the clamp's share is logged (reliability row N2).
MAX_LOG_RATIO = 20.0


class Edges(NamedTuple):
    """What an objective sees of E choices."""

    log_ratio: Tensor
    """[E], with gradient; of a step the mean over the latent dims."""
    advantages: Tensor
    """[E], finite: edges with NaN credit have left the table."""
    logprob: Tensor
    """[E] of the rollout policy; of a step the mean over the latent dims, with all constants."""
    segment: Tensor
    """int [E], the sample or answer that an edge belongs to."""
    position: Tensor | None = None
    """int [E], of tokens: place among those of its segment, 0 the first, without gaps; None for steps."""
    std: Tensor | None = None
    """[E], of steps: the full standard deviation."""
    h: Tensor | None = None
    """[E], of steps: t - t_next."""
    divergence: Tensor | None = None
    """[E], of steps, with gradient: mean_d (mu - mu_old)^2 / (2 std^2), the exact KL of the two steps divided by D;
    None where it is not needed (`NEEDS_MEANS`)."""


class Limits(NamedTuple):
    """How far the policy may move in one iteration. Each objective reads its own part."""

    low: float
    """The ratio is kept above 1 - low; all clipped objectives (gmpo: the log-ratio above -low)."""
    high: float
    """The ratio is kept below 1 + high; all clipped objectives (gmpo: the log-ratio below high)."""
    trust: float
    """Width of the trust region: |r - 1| for spo, the change of a density for drpo, KL / D for dppo (paper: 1e-5), the
    change of a probability for dppo_tv and cppo_tv (paper: 0.2), 1 / beta for dro."""
    dual: float = 3.0
    """The loss of a negative advantage is at most -A dual, dual > 1; dual_clip."""
    tau_pos: float = 1.0
    """How fast sapo's gate closes where A > 0."""
    tau_neg: float = 1.05
    """The same where A < 0."""
    cov_share: float = 2e-4
    """Of the edges, how many clip_cov and kl_cov touch; at least one."""
    cov_range: tuple[float, float] = (1.0, 5.0)
    """Where the cov of those lies that clip_cov may leave out."""
    early: float = 0.8
    """What the last token of an answer weighs in cppo_tv, the first one weighing 1."""
    budget: float = 0.02
    """Least change of probability that cppo_tv grants each token before the one at hand; twice that at most."""


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
    the normalised one), so that they compare with its limits. clip_frac is the share of edges outside the trust
    region: r outside [1 - low, 1 + high] whatever the sign of A (dual_clip: or capped), |r - 1| > trust for spo and
    drpo, the masked ones for dppo, dppo_tv and cppo_tv, the chosen ones besides for clip_cov and kl_cov.
    clip_frac_low and clip_frac_high are those among them that moved on outwards: r < 1 with A < 0, r > 1 with A > 0.
    About the plain log-ratio are three estimates of KL(rollout || policy): approx_kl, k2 = lr^2 / 2, and approx_kl_k1
    (-lr) and approx_kl_k3 (r - 1 - lr).
    Raises ValueError for an unknown name, a missing divergence, or dual <= 1.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose {', '.join(_OBJECTIVES)}.")
    found = _OBJECTIVES[name](edges._replace(advantages=edges.advantages.to(edges.log_ratio)), limits)
    return found.loss, _watch(edges, found)


def clip(edges: Edges, limits: Limits) -> Surrogate:
    """PPO's clipped objective (arXiv:1707.06347, eq. 7), with two sides as in DAPO (arXiv:2503.14476).

    It has no gradient where it is clipped, where A = 0 and where the log-ratio is clamped.
    """
    return _clipped(edges.log_ratio, edges.advantages, limits)


def dual_clip(edges: Edges, limits: Limits) -> Surrogate:
    """Dual-clip PPO (arXiv:1912.09729): for A < 0 the clipped loss is at most -A dual, however large r.

    Without it a ratio that exploded dominates the mean whenever its advantage is negative.
    Note: for dual >= 1 + high it is INTELLECT-2's two-sided clipping (arXiv:2505.07291) with delta = dual.
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
    """GSPO (arXiv:2507.18071): all edges of a segment are clipped by one ratio, exp(mean of their lr).

    Note: it is the paper's GSPO-token: an edge carries the segment's ratio, but the gradient of its own lr times its
    own A. Where A is the same along a segment this is the sequence form in value and gradient, for a mean over the
    segment; where it is not (trees), an edge without advantage stays without gradient.
    Note: the mean is over the edges of this call. Cut a minibatch between segments, not within one.
    """
    return _clipped(_segment_mean(edges.log_ratio, edges.segment), edges.advantages, limits)


def gmpo(edges: Edges, limits: Limits) -> Surrogate:
    """GMPO (arXiv:2507.20673): the geometric mean of a segment's ratios, each clipped where it moves on outwards.

    The clip is of log-ratios: with s = sign(A), lr becomes s min(s lr, s clip(lr, -low, high)). Each edge carries the
    segment's number, so that their mean is it, and the gradient of its own lr times its own A, as in `gspo`.
    """
    lr, sign = _bounded(edges.log_ratio), edges.advantages.sign()
    kept = sign * torch.minimum(sign * lr, sign * lr.clamp(-limits.low, limits.high))
    loss = -edges.advantages * _segment_mean(kept, edges.segment).exp()
    outside = (lr.detach() < -limits.low) | (lr.detach() > limits.high)
    return Surrogate(loss, edges.log_ratio, outside)


def sapo(edges: Edges, limits: Limits) -> Surrogate:
    """SAPO (arXiv:2511.20347): a soft gate instead of a clip, -A 4 / tau sigmoid(tau (r - 1)), shifted.

    tau is tau_pos where A > 0, else tau_neg: closing faster there keeps unlikely tokens from being pushed up.
    """
    tau = torch.full_like(edges.advantages, limits.tau_neg).masked_fill(edges.advantages > 0, limits.tau_pos)
    ratio = _ratio(edges.log_ratio)
    # sigmoid(x) - 1 / 2 = tanh(x / 2) / 2, which is exactly 0 at r = 1.
    gate = 2 / tau * (tau * (ratio - 1) / 2).tanh()
    return Surrogate(-edges.advantages * (1 + gate), edges.log_ratio, _beyond(ratio.detach(), limits))


def cispo(edges: Edges, limits: Limits) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, the gradient never is.

    The loss is -w A (1 + lr - sg(lr)) with w = sg(clip(r, 1 - low, 1 + high)): lr has the gradient of the new log-prob,
    and the value is -A w.
    Note: the paper bounds w only from above, which is clip_range: [1.0, high].
    """
    ratio = _ratio(edges.log_ratio).detach()
    weight = ratio.clamp(1 - limits.low, 1 + limits.high)
    bounded = _bounded(edges.log_ratio)
    loss = -weight * edges.advantages * (1 + bounded - bounded.detach())
    return Surrogate(loss, edges.log_ratio, _beyond(ratio, limits))


def reinforce(edges: Edges, limits: Limits) -> Surrogate:
    """REINFORCE (Williams 1992): -A log pi, shifted; nothing is corrected where the rollout policy was another.

    It is the loss of GPG (arXiv:2504.02546), of RLOO (arXiv:2402.14740), and of OPMD up to a factor.
    """
    return Surrogate(-edges.advantages * (1 + _bounded(edges.log_ratio)), edges.log_ratio, _nowhere(edges))


def dro(edges: Edges, limits: Limits) -> Surrogate:
    """DRO (arXiv:2405.19107): -A log pi + beta / 2 (log pi - log mu)^2 with beta = 1 / trust, shifted."""
    lr = _bounded(edges.log_ratio)
    loss = -edges.advantages * (1 + lr) + lr.square() / (2 * limits.trust)
    return Surrogate(loss, edges.log_ratio, _nowhere(edges))


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
    Note: the paper's mu is a token's probability, at most 1. A step's is the geometric mean of its density over the
    latent dims, about 0.24 / std: it has no upper bound, and `trust` must grow as std falls.
    """
    return _penalised(edges, limits, edges.logprob.to(edges.log_ratio).exp())


def guard(edges: Edges, limits: Limits) -> Surrogate:
    """GRPO-Guard's regulated clipping (arXiv:2510.22319): PPO's clip on exp((lr + divergence) std).

    With x_next = mu_old + std eps and dmu = mu - mu_old the exponent is exactly mean_d(dmu eps). The plain lr has the
    mean -divergence and a spread that goes with 1 / std; this one has mean 0, and the same spread for the same |dmu|.
    Note: std is each edge's own; the public code takes the means of g and sqrt(h) over the batch.
    Note: the paper's weight 1 / h of a step's loss is not applied here.
    """
    divergence = _divergence("guard", edges)
    assert edges.std is not None
    log_ratio = (edges.log_ratio + divergence) * edges.std.to(edges.log_ratio)
    return _clipped(log_ratio, edges.advantages, limits)


def dppo(edges: Edges, limits: Limits) -> Surrogate:
    """Flow-DPPO (arXiv:2606.11025): -A r, masked where divergence >= trust and the update moves on outwards.

    Outwards is A > 0 with r > 1, or A < 0 with r < 1. A masked edge has loss 0 and no gradient, and counts in a mean.
    """
    return _masked(edges, _divergence("dppo", edges).detach() >= limits.trust)


def dppo_tv(edges: Edges, limits: Limits) -> Surrogate:
    """DPPO with total variation: -A r, masked where |pi - mu| > trust and the update moves on outwards."""
    return _masked(edges, _change(edges) > limits.trust)


def cppo_tv(edges: Edges, limits: Limits) -> Surrogate:
    """CPPO-TV (arXiv:2606.10968): as `dppo_tv`, with a budget for the change of the answer so far.

    With D_t = |pi_t - mu_t|, weights w_t that fall from 1 to `early` along the answer, Z_t = w_t D_t and b the 0.9
    quantile of the answer's D cut to [budget, 2 budget], token t is beyond where
    Z_t > min(trust, trust + sum_{j<t} (b w_j - Z_j)).
    Note: one early change far above trust can use up the budget of all tokens after it.
    Raises ValueError without `edges.position`.
    """
    if edges.position is None:
        raise ValueError("objective 'cppo_tv' needs edges.position [E], the place of each token in its answer.")
    answers, row = torch.unique(edges.segment, return_inverse=True)
    length = torch.bincount(row, minlength=len(answers)).to(edges.log_ratio)[:, None]
    size = (len(answers), int(edges.position.max()) + 1)
    change = edges.log_ratio.new_full(size, torch.nan).index_put((row, edges.position), _change(edges))
    each = change.nanquantile(0.9, dim=1, keepdim=True).clamp(limits.budget, 2 * limits.budget)
    along = torch.arange(size[1], device=change.device) / (length - 1).clamp(min=1)
    weight = 1 - (1 - limits.early) * along
    spent = weight * change.nan_to_num()
    left = each * weight - spent
    before = left.cumsum(1) - left
    beyond = spent > limits.trust + before.clamp(max=0)
    return _masked(edges, beyond[row, edges.position])


def clip_cov(edges: Edges, limits: Limits) -> Surrogate:
    """Clip-Cov (arXiv:2505.22617): clip, where some edges whose cov lies in `cov_range` have no gradient.

    They are a `cov_share` of all, drawn from those that the clip leaves alone, by a generator keyed with their number.
    Note: means and draws are over the edges of this call: cutting an update into micro-batches changes them.
    """
    found, (low, high) = clip(edges, limits), limits.cov_range
    cov = _covariance(edges)
    open_ = torch.nonzero((cov > low) & (cov < high) & ~found.outside).flatten()
    draw = torch.Generator().manual_seed(stable_seed(len(cov), len(open_)))
    chosen = open_[torch.randperm(len(open_), generator=draw)[: _count(edges, limits)].to(open_.device)]
    drawn = torch.zeros_like(found.outside).index_fill(0, chosen, True)
    return found._replace(loss=torch.where(drawn, 0.0, found.loss), outside=found.outside | drawn)


def kl_cov(edges: Edges, limits: Limits) -> Surrogate:
    """KL-Cov (arXiv:2505.22617): -A r without a clip, plus |lr| on the `cov_share` of the edges with the highest cov.

    Note: the highest are those of this call: cutting an update into micro-batches changes them.
    """
    chosen = _covariance(edges).topk(_count(edges, limits)).indices
    high = torch.zeros_like(edges.log_ratio, dtype=torch.bool).index_fill(0, chosen, True)
    loss = -edges.advantages * _ratio(edges.log_ratio)
    return Surrogate(torch.where(high, loss + _bounded(edges.log_ratio).abs(), loss), edges.log_ratio, high)


_OBJECTIVES: dict[Objective, Callable[[Edges, Limits], Surrogate]] = {
    "clip": clip,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "gmpo": gmpo,
    "sapo": sapo,
    "cispo": cispo,
    "reinforce": reinforce,
    "dro": dro,
    "spo": spo,
    "drpo": drpo,
    "guard": guard,
    "dppo": dppo,
    "dppo_tv": dppo_tv,
    "cppo_tv": cppo_tv,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
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


def _masked(edges: Edges, beyond: Tensor) -> Surrogate:
    """-A r, and exactly 0 where an edge is `beyond` [E] and the update moves on outwards."""
    ratio = _ratio(edges.log_ratio)
    masked = beyond & (edges.advantages * (ratio.detach() - 1) > 0)
    return Surrogate(torch.where(masked, 0.0, -edges.advantages * ratio), edges.log_ratio, masked)


def _segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """Mean of `values` [E] over each segment, on its edges [E]; the gradient of an edge's is that of its own value."""
    names, member = torch.unique(segment, return_inverse=True)
    fixed = values.detach()
    mean = fixed.new_zeros(len(names)).scatter_reduce(0, member, fixed, "mean", include_self=False)
    own = _bounded(values)
    return mean[member] + (own - own.detach())


def _change(edges: Edges) -> Tensor:
    """|pi - mu| [E], without gradient."""
    mu = edges.logprob.to(edges.log_ratio).exp()
    return mu * (_ratio(edges.log_ratio.detach()) - 1).abs()


def _covariance(edges: Edges) -> Tensor:
    """(log pi - its mean)(A - its mean) [E], without gradient."""
    logprob = edges.logprob.to(edges.log_ratio) + _bounded(edges.log_ratio.detach())
    return (logprob - logprob.mean()) * (edges.advantages - edges.advantages.mean())


def _count(edges: Edges, limits: Limits) -> int:
    return max(1, int(limits.cov_share * len(edges.log_ratio)))


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _ratio(log_ratio: Tensor) -> Tensor:
    return _bounded(log_ratio).exp()


def _nowhere(edges: Edges) -> Tensor:
    return torch.zeros_like(edges.log_ratio, dtype=torch.bool)


def _beyond(ratio: Tensor, limits: Limits) -> Tensor:
    return (ratio < 1 - limits.low) | (ratio > 1 + limits.high)


def _divergence(name: Objective, edges: Edges) -> Tensor:
    if edges.divergence is None:
        raise ValueError(
            f"objective {name!r} needs edges.divergence [E], mean_d (mu - mu_old)^2 / (2 std^2), and got None; compute "
            "it from the rollout's means for every objective in NEEDS_MEANS."
        )
    return edges.divergence.to(edges.log_ratio)


@torch.no_grad()
def _watch(edges: Edges, found: Surrogate) -> dict[str, Tensor]:
    ratio, lr = _ratio(found.exponent), _bounded(edges.log_ratio)
    outside, outwards = found.outside, edges.advantages * found.exponent > 0
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "clip_frac": outside.float().mean(),
        "clip_frac_low": (outside & outwards & (edges.advantages < 0)).float().mean(),
        "clip_frac_high": (outside & outwards & (edges.advantages > 0)).float().mean(),
        "approx_kl": 0.5 * edges.log_ratio.square().mean(),
        "approx_kl_k1": -lr.mean(),
        "approx_kl_k3": (lr.exp() - 1 - lr).mean(),
        "clamp_frac": (found.exponent.abs() > MAX_LOG_RATIO).float().mean(),
    }
