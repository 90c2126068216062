"""From rewards to credit: advantages of the samples against their group, then of what led to them, edges or tokens.

Symbols: B samples (leaves), G groups, E edges; N answers with S places, of which a mask tells the policy's tokens; r
reward, A advantage. NaN (or infinite) reward = no verdict: the sample leaves its group's statistics and gets A = 0. An
edge that leads to no verdict gets NaN, and NaN credit means that the edge leaves the table: it is not trained on and
does not count in a mean. All statistics are float64, on the CPU, and summed in sorted order: they depend, to the
last bit, neither on the order of the samples nor on how processes share them (`whiten`: up to rounding).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MeanMode = Literal["group", "batch", "none"]
StdMode = Literal["group", "global", "none"]
BaselineMode = Literal["mean", "leave_one_out"]
Combine = Literal["sum", "per_reward", "gdpo"]

# Rewards that sum up to 1 may miss it by rounding.
ROUNDING = 1e-6

# Rewards come out of fp32 networks and differ by 1e-7 where they mean the same. Divided by their own std, such
# differences become advantages of size 1, i.e. pure noise (reliability row R8).
STD_FLOOR = 1e-6

# No answer counts for more than this many of itself, however sure it was.
_SUREST = 5.0


class Advantages(NamedTuple):
    """Advantages of B samples and what became of their groups."""

    value: Tensor
    """float64 [B]; exactly 0 without a verdict and in a dead group."""
    valid: Tensor
    """bool [B]: samples with a verdict."""
    live: Tensor
    """bool [G]: groups with at least two verdicts that differ."""

    @property
    def zero_std_frac(self) -> Tensor:
        """Share of groups that teach nothing; 1 means that this iteration has no policy gradient (row R11)."""
        return 1 - self.live.double().mean() if len(self.live) else torch.ones((), dtype=torch.float64)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log."""
        return {
            "zero_std_frac": self.zero_std_frac,
            "no_verdict_frac": 1 - self.valid.double().mean(),
            "live_groups": self.live.sum(),
        }


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    std: StdMode = "group",
    eps: float = 1e-4,
    unbiased: bool = False,
    clip: float | None = None,
    baseline: BaselineMode = "mean",
    std_floor: float = 0.0,
    mean: MeanMode = "group",
) -> Advantages:
    """A = (r - mean of the group) / (std + eps) for rewards and group numbers [B] (GRPO, arXiv:2402.03300).

    `mean` may be that of the whole batch instead, or none. `std` is taken over the group, over all samples around their
    common mean ("global"), or left out ("none", Dr.GRPO, arXiv:2503.20783); a std below `std_floor` counts as that. The
    baseline "leave_one_out" subtracts the mean of the other members (RLOO, arXiv:2402.14740). `clip` cuts A to
    [-clip, clip]. A group is dead, with A = 0, when it has fewer than two verdicts or when its own std is at most
    1e-6 max(1, max |r|), whichever std is divided by; where its mean is not subtracted, only if that std is divided by,
    or all rewards of the batch agree (and their mean is subtracted, or their std divided by).
    Raises ValueError for an unknown mean, std or baseline.
    Note: rewards on a scale below 1e-6 are therefore all dead (zero_std_frac = 1): scale them up.
    """
    rewards, valid, num_groups, member = _prepared(rewards, group)
    r, g = rewards[valid], member[valid]
    own, spread, count = _statistics(r, g, num_groups, unbiased)
    differs = (count >= 2) & _differ(r, g, spread)
    if mean == "group":
        live, centred = differs, (r - own[g]) * _stretch(baseline, count)[g]
    else:
        centred = _off_batch(r, mean, baseline, std, unbiased)
        live = differs if std == "group" else torch.zeros_like(differs).index_fill(0, g[centred != 0], True)
    centred = torch.where(live[g], centred, 0.0)
    value = torch.zeros_like(rewards)
    value[valid] = centred / _scale(std, eps, r, spread[g], unbiased, std_floor)
    return Advantages(_cut(value, clip), valid, live)


def combined_advantages(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    how: Combine,
    *,
    std: StdMode = "group",
    eps: float = 1e-4,
    unbiased: bool = False,
    baseline: BaselineMode = "mean",
    std_floor: float = 0.0,
    clip: float | None = None,
    mean: MeanMode = "group",
) -> Advantages:
    """One advantage a sample out of several rewards, scores[name] [B]; the other arguments as in `group_advantages`.

        sum          group advantages of sum_k w_k r_k; the reward with the largest spread leads
        per_reward   sum_k w_k A_k / sum_k |w_k|, A_k the group advantages of reward k (MixGRPO's advantage_aggr,
                     arXiv:2507.21802; DanceGRPO's sum of losses)
        gdpo         sum_k w_k A_k, then minus its mean and divided by its std + eps over the whole batch (GDPO,
                     arXiv:2601.05242)

    Scores of weight 0, or without one, are ignored. A sample has a verdict where all the others are finite. For
    per_reward and gdpo a group is live if any of its rewards differs within the group; a dead one has A = 0.
    Raises ValueError where no weight is left or a weighted score is missing.
    Note: DanceGRPO clips the ratio in each reward's loss; that equals per_reward where the advantages agree in sign.
    """
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise ValueError(f"no reward has a weight other than 0 (weights: {dict(weights)}); give at least one.")
    if missing := used.keys() - scores.keys():
        raise ValueError(
            f"weights name {', '.join(sorted(missing))}, but only {', '.join(scores) or 'nothing'} was scored; "
            "correct the name or set its weight to 0."
        )
    judged = {name: scores[name].detach().cpu().double() for name in used}
    valid = torch.stack([score.isfinite() for score in judged.values()]).all(0)
    judged = {name: score.where(valid, torch.nan) for name, score in judged.items()}
    if how == "sum":
        total = reduce(torch.add, (weight * judged[name] for name, weight in used.items()))
        return group_advantages(total, group, std, eps, unbiased, clip, baseline, std_floor, mean)
    if how not in ("per_reward", "gdpo"):
        raise ValueError(f"unknown way to combine rewards {how!r}; choose sum, per_reward or gdpo.")
    parts = {
        name: group_advantages(score, group, std, eps, unbiased, None, baseline, std_floor, mean)
        for name, score in judged.items()
    }
    norm = sum(abs(weight) for weight in used.values())
    value = reduce(torch.add, (weight / norm * parts[name].value for name, weight in used.items()))
    live = torch.stack([part.live for part in parts.values()]).any(0)
    if how == "gdpo":
        # eps belongs to the sum before it is divided by norm.
        value = _standardised(value, valid & of_live_group(group, live), valid, eps / norm, unbiased)
    return Advantages(_cut(value, clip), valid, live)


def batch_advantages(
    rewards: Tensor, scores: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor, how: Combine,
    **settings: Any,
) -> Advantages:  # fmt: skip
    """Advantages [B] of a batch's total reward, or of each reward by itself; `settings` as in `group_advantages`.

    A sample has a verdict in all parts or in none, which the total knows.
    """
    if how == "sum":
        return group_advantages(rewards, group, **settings)
    if len(weights) <= 1:  # the total is this one reward, or only gates, and knows what gates do
        scores, weights = {"total": rewards}, {"total": 1.0}
    known = {name: score.where(rewards.isfinite().to(score.device), torch.nan) for name, score in scores.items()}
    return combined_advantages(known, weights, group, how, **settings)


def best_only(
    rewards: Tensor, group: Tensor, *, std: bool = True, eps: float = 1e-6, unbiased: bool = True
) -> Advantages:
    """Only the best sample of a group has an advantage, its lead over the second, (r_1 - r_2) / (std + eps), [B].

    The estimator of pass@k with k = group size (arXiv:2503.19595). Where two are best, nobody leads.
    """
    rewards, valid, num_groups, member = _prepared(rewards, group)
    r, g = rewards[valid], member[valid]
    _, spread, count = _statistics(r, g, num_groups, unbiased)
    live = (count >= 2) & _differ(r, g, spread)
    value = torch.zeros_like(rewards)
    for number in torch.nonzero(live).flatten().tolist():
        first, second = rewards.where(valid & (member == number), -torch.inf).topk(2).indices
        value[first] = (rewards[first] - rewards[second]) / (spread[number] + eps if std else 1.0)
    return Advantages(value, valid, live)


def pass_at_k(rewards: Tensor, group: Tensor, k: int, threshold: float = 0.5) -> Advantages:
    """Advantages of samples [B] for the reward "one of k is right", over all k of the group's n (arXiv:2508.10751).

    Right is a reward of at least `threshold`; m of the n are wrong. R = 1 - C(m, k) / C(n, k) is the mean over all sets
    of k, s = sqrt(R (1 - R)) their std. A right sample has (1 - R) / s, a wrong one
    (1 - R - C(m - 1, k - 1) / C(n - 1, k - 1)) / s: their sum is 0, and for k = 1 this is GRPO with the biased std.
    Groups in which s = 0, or with fewer than k verdicts, are dead.
    """
    rewards, valid, num_groups, member = _prepared(rewards, group)
    right = rewards >= threshold
    value, live = torch.zeros_like(rewards), torch.zeros(num_groups, dtype=torch.bool)
    for number in range(num_groups):
        mine = valid & (member == number)
        n, wrong = int(mine.sum()), int((mine & ~right).sum())
        if n < k:
            continue
        missed = math.comb(wrong, k) / math.comb(n, k)
        spread = math.sqrt(missed * (1 - missed))
        if spread == 0:
            continue
        live[number] = True
        value[mine & right] = missed / spread
        if wrong:
            value[mine & ~right] = (missed - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / spread
    return Advantages(value, valid, live)


def length_weighted(rewards: Tensor, group: Tensor, lengths: Tensor) -> Advantages:
    """r - sum(l r) / sum(l) over the group, l the lengths [B] (OPO, arXiv:2505.23585): the baseline of least variance.

    It is that where the squared gradient of an answer's log-prob grows with its length. Dead groups as in
    `group_advantages`.
    """
    rewards, valid, num_groups, member = _prepared(rewards, group)
    r, g, length = rewards[valid], member[valid], lengths.detach().cpu().double()[valid].clamp(min=1e-9)
    mean, spread, count = _statistics(r, g, num_groups, unbiased=False)
    live = (count >= 2) & _differ(r, g, spread)
    order = r.argsort()
    r_, g_, l_ = (r - mean[g])[order], g[order], length[order]
    zeros = r.new_zeros(num_groups)
    lean = zeros.index_add(0, g_, l_ * r_) / zeros.index_add(0, g_, l_).clamp(min=1e-9)
    value = torch.zeros_like(rewards)
    value[valid] = torch.where(live[g], r - mean[g] - lean[g], 0.0)
    return Advantages(value, valid, live)


def less_baseline(rewards: Tensor, group: Tensor, baseline: Tensor) -> Advantages:
    """r - b for rewards and baselines [B], which do not depend on the answer (ReMax, arXiv:2310.10505).

    A sample without a verdict, or without a baseline, has none; a group is dead where nothing differs from it.
    """
    rewards, _, num_groups, member = _prepared(rewards, group)
    lead = rewards - baseline.detach().cpu().double()
    valid = lead.isfinite()
    live = torch.zeros(num_groups, dtype=torch.bool).index_fill(0, member[valid & (lead != 0)], True)
    return Advantages(lead.where(valid, 0.0), valid, live)


def right_in_order(rewards: Tensor, group: Tensor, shuffled: Tensor, *, right: float, margin: float) -> Tensor:
    """Which right answers [B] are of groups that the order of a video's frames helps (T-GRPO, arXiv:2503.21776).

    Right is a reward [B] of at least `right`. Order helps where the group's mean reward is at least `margin` times
    that of answers to shuffled frames, `shuffled` [B]; not where that is NaN.
    """
    rewards, verdict, num_groups, member = _prepared(rewards, group)
    total = rewards.new_zeros(num_groups).index_add(0, member, rewards.where(verdict, 0.0))
    count = rewards.new_zeros(num_groups).index_add(0, member, verdict.double())
    helps = (total / count.clamp(min=1))[member] >= margin * shuffled.detach().cpu().double()
    return verdict & (rewards >= right - ROUNDING) & helps


def undiluted(found: Advantages, group: Tensor) -> Advantages:
    """Advantages times (samples with a verdict) / (those of live groups): GPG's alpha (arXiv:2504.02546).

    Dead groups then do not shrink the mean over the batch.
    """
    counted = found.valid & of_live_group(group, found.live)
    return found._replace(value=found.value * (found.valid.sum() / counted.sum().clamp(min=1)).double())


def running_advantages(
    rewards: Tensor,
    group: Tensor,
    buffers: Sequence[Tensor],
    *,
    min_count: int,
    eps: float = 1e-6,
    clip: float | None = None,
) -> Advantages:
    """A = (r - mean) / (std + eps) over the recent rewards of the sample's prompt (DDPO, arXiv:2305.13301).

    rewards and group are [B]. buffers[g] [n] holds the recent rewards of the g-th group in the order of the group
    numbers, those of this iteration included; values that are not finite do not count. A group with fewer than
    `min_count` of them takes the statistics of this whole batch. The std divides by n. A group is live where the values
    in use differ by more than rounding (as in `group_advantages`) and a sample of this iteration has a verdict; one
    sample is enough. Raises ValueError where there is not one buffer a group.
    """
    rewards, valid, num_groups, member = _prepared(rewards, group)
    if len(buffers) != num_groups:
        raise ValueError(
            f"running_advantages got {len(buffers)} buffers for {num_groups} groups; give one tensor of recent rewards "
            "a group, this iteration's included."
        )
    recent = [buffer.detach().cpu().double() for buffer in buffers]
    recent = [buffer[buffer.isfinite()] for buffer in recent]
    in_use = [buffer if len(buffer) >= min_count else rewards[valid] for buffer in recent]
    r = torch.cat([*in_use, rewards.new_zeros(0)])
    g = torch.arange(len(in_use)).repeat_interleave(torch.tensor([len(values) for values in in_use], dtype=torch.long))
    mean, spread, _ = _statistics(r, g, num_groups, unbiased=False)
    live = _differ(r, g, spread) & torch.zeros(num_groups, dtype=torch.bool).index_fill(0, member[valid], True)
    value = torch.where(valid & live[member], (rewards - mean[member]) / (spread[member] + eps), 0.0)
    return Advantages(_cut(value, clip), valid, live)


class WinRates(NamedTuple):
    """Win rates of B samples, and how often the judge saw no difference."""

    value: Tensor
    """float64 [B] in [0, 1]; NaN without a verdict and without another one in the group."""
    tie_frac: Tensor
    """Share of tied pairs among all pairs, []; NaN where there is no pair."""


def win_rates(rewards: Tensor, group: Tensor, margin: float = 0.0) -> WinRates:
    """Share of its group's other members that a sample beats (Pref-GRPO, arXiv:2508.20751); rewards, group [B].

    A tie, |difference| <= margin (and at least 1e-6 max(1, max |r|), within which rewards mean the same), counts one
    half. Only members with a verdict are compared.
    Note: the paper asks a judge about each pair; this compares the scores of a pointwise reward.
    """
    rewards = rewards.detach().cpu().double()
    value = torch.full_like(rewards, torch.nan)
    group = group.to(rewards.device)
    tied = pairs = 0
    for name in torch.unique(group):
        members = ((group == name) & rewards.isfinite()).nonzero().squeeze(1)
        ahead = rewards[members, None] - rewards[members]
        least = max(margin, STD_FLOOR * max(1.0, float(rewards[members].abs().max()))) if len(members) else margin
        ties = ahead.abs() <= least
        others = len(members) - 1
        # Every sample ties with itself, which is taken off again; alone, 0 / 0 is the NaN of no verdict.
        value[members] = ((ahead > least).double() + 0.5 * ties).sum(1).sub(0.5) / others
        tied += int(ties.sum()) - len(members)
        pairs += len(members) * others
    return WinRates(value, torch.tensor(float(tied), dtype=torch.float64) / pairs)


def to_edges(advantages: Tensor, leaves: Tensor, valid: Tensor | None = None) -> Tensor:
    """Credit of each edge: the mean advantage of the samples [B] that descend from it, `leaves` [E, B] -> float64 [E].

    On a linear rollout this is the sample's own advantage (GRPO). Samples that are not `valid` [B] do not count, and
    an edge that leads to no valid one gets NaN credit: it leaves the table, as if it had never been drawn.
    """
    below = leaves.to(advantages.device)
    if valid is not None:
        below = below & valid
    below = below.double()
    return (below @ advantages.double()) / below.sum(1)


def leaf_mean(rewards: Tensor, leaves: Tensor) -> Tensor:
    """Mean reward [B] of the samples that descend from an edge, `leaves` [E, B] -> float64 [E].

    Samples without a verdict do not count; an edge that leads to no other has NaN.
    """
    rewards = rewards.detach().cpu().double()
    valid = rewards.isfinite()
    return to_edges(rewards.where(valid, 0.0), leaves, valid)


def edge_advantages(
    values: Tensor,
    group: Tensor,
    step: Tensor,
    *,
    std: Literal["group", "none"] = "group",
    eps: float = 1e-4,
    std_floor: float = 0.0,
    unbiased: bool = False,
) -> Tensor:
    """Credit of edges that have a value each: `group_advantages` among the edges of one group at one step, float64 [E].

    values, group and step are [E]. NaN leaves the statistics and stays NaN; an edge alone at its step gets 0, and so do
    edges whose values do not differ. With `leaf_mean` as value, unbiased=True and eps=1e-8 this is BranchGRPO's
    depth-wise advantage (arXiv:2509.06040).
    Note: two edges are then +-0.7071 however close their values are; a `std_floor` keeps small differences small.
    """
    _, cell = torch.unique(torch.stack([group, step.to(group)]), dim=1, return_inverse=True)
    found = group_advantages(values, cell, std, eps, unbiased, std_floor=std_floor)
    return found.value.where(found.valid, torch.nan)


def earlier_tools(
    advantages: Tensor, group: Tensor, position: Tensor, lengths: Tensor, coef: float, cap: float
) -> Tensor:
    """A + clip(coef (p - mean p) / mean l, -cap |A|, cap |A|) of answers [B] (ASPO, arXiv:2508.19201).

    p is the place of an answer's first tool call, NaN where there is none: such an answer keeps its A, and is in no
    mean of p. l are the lengths; means are over the group.
    """
    _, member = torch.unique(group.to(advantages.device), return_inverse=True)
    called = position.isfinite()
    early = position.where(called, 0.0) - _group_mean(position, member, called)[member]
    length = _group_mean(lengths.double(), member, torch.ones_like(called))[member].clamp(min=1)
    bonus = (coef * early / length).where(called, 0.0)
    most = cap * advantages.abs()
    return advantages + bonus.clamp(-most, most)


def sure_first(advantages: Tensor, group: Tensor, entropy: Tensor) -> Tensor:
    """A / (H / mean of H over the group) of answers [B] (EDGE-GRPO, arXiv:2507.21848), H their mean entropies.

    An answer whose H is unknown (NaN) or 0 keeps its A.
    Note: what a run knows of H is the mean of -log p of the drawn tokens, an estimate without a pass over all words.
    Note: the factor is at most 5. The paper has no bound, but H of a short, sure answer is as small as one likes.
    """
    _, member = torch.unique(group.to(advantages.device), return_inverse=True)
    known = entropy > 0
    mean = _group_mean(entropy, member, known)[member]
    factor = (mean / entropy.where(known, 1.0)).clamp(max=_SUREST)
    return torch.where(known, advantages * factor, advantages)


def discounted(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Returns G_t = r_t + gamma G_{t+1} of token rewards [N,S] (REINFORCE++, arXiv:2501.03262), 0 off the mask.

    Places off the mask are as if they were not there: they add nothing and do not discount.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalised advantages of tokens (arXiv:1506.02438, eq. 16), [N,S] each, `lam` one number or [N]; 0 off the mask.

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next place on the
    mask; beyond the last V and A are 0. A plus `values` is the critic's target; VC-PPO (arXiv:2503.01491) takes another
    lam for it.
    """
    found = torch.zeros_like(rewards)
    following = torch.zeros(2, len(rewards), dtype=rewards.dtype, device=rewards.device)
    for place in reversed(range(rewards.shape[1])):
        delta = rewards[:, place] + gamma * following[0] - values[:, place]
        here = torch.stack([values[:, place], delta + gamma * lam * following[1]])
        following = torch.where(mask[:, place], here, following)
        found[:, place] = following[1]
    return found.where(mask, 0.0)


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """lam = 1 - 1 / (alpha l) of answers with l tokens [N], at least 0 (VAPO, arXiv:2504.05118)."""
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0)


def monte_carlo_values(returns: Tensor) -> Tensor:
    """Values of states from the rewards [...,k] of k answers that went on from each (VinePPO, arXiv:2410.01679).

    Continuations without a verdict do not count; NaN where none has one. `stretch_advantages` has that method's
    advantages.
    """
    return returns.detach().cpu().double().nan_to_num(torch.nan, torch.nan, torch.nan).nanmean(-1)


def stretch_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Advantages [N,S] of tokens between states, by rewards [N,S] and the states' values [N,S] (arXiv:2410.01679).

    A state stands before each token where `values` is not NaN. All tokens from it to the next one share
    V(next) - V(state) + the rewards in between, where V beyond the last token is 0; 0 off the `mask` and before the
    first state.
    """
    state = mask & values.isfinite()
    stretch = state.long().cumsum(1)  # of each token, from 1; 0 before the first state
    table = rewards.new_zeros(len(rewards), int(stretch.max()) + 2)
    value = table.scatter_add(1, stretch, values.to(table).where(state, 0.0))
    earned = table.scatter_add(1, stretch, rewards.where(mask, 0.0))
    rise = earned[:, :-1] + value[:, 1:] - value[:, :-1]
    return rise.gather(1, stretch).where(mask & (stretch > 0), 0.0)


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the tokens of all processes where `mask` [N,S] is True; 0 elsewhere.

    `total` adds a tensor up over the processes, which must all ask. The variance divides by n - 1.
    """
    x = values.detach().cpu().double()
    known = mask.cpu()
    count, first = total(torch.stack([known.sum().double(), x.where(known, 0.0).sum()])).tolist()
    centred = (x - first / max(count, 1.0)).where(known, 0.0)
    variance = total(centred.square().sum()) / max(count - 1, 1.0)
    return centred * (variance + 1e-8).rsqrt()


def keep_nonzero(credit: Tensor) -> Tensor:
    """Credit [E] with NaN for 0, so that edges without an advantage leave the table (Flow-GRPO's filter).

    Each edge by itself, so that nothing depends on which process holds it; an update without edges is left out.
    Note: Flow-GRPO tops the batch up with some of the dropped samples to keep its size; here no size has to be kept.
    """
    return credit.where(credit != 0, torch.nan)


def _statistics(r: Tensor, g: Tensor, num_groups: int, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std and count [G] of rewards r in groups g < G; 0 where a group has none."""
    order = r.argsort()
    r, g = r[order], g[order]
    zeros = r.new_zeros(num_groups)
    count = zeros.index_add(0, g, torch.ones_like(r))
    mean = zeros.index_add(0, g, r) / count.clamp(min=1)
    squares = zeros.index_add(0, g, (r - mean[g]).square())
    return mean, (squares / (count - int(unbiased)).clamp(min=1)).sqrt(), count


def _prepared(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
    """Rewards in float64 on the CPU, which of them are verdicts, how many groups there are, the group of each [B]."""
    rewards = rewards.detach().cpu().double()
    names, member = torch.unique(group.to(rewards.device), return_inverse=True)
    return rewards, rewards.isfinite(), len(names), member


def _group_mean(values: Tensor, member: Tensor, known: Tensor) -> Tensor:
    """Mean [G] of the known values [B] of each group; 0 where there is none."""
    return _statistics(values[known].double(), member[known], int(member.max()) + 1, unbiased=False)[0]


def _off_batch(r: Tensor, mean: MeanMode, baseline: BaselineMode, std: StdMode, unbiased: bool) -> Tensor:
    """Rewards r minus the mean of all, or as they are; 0 where all agree, if that mean or std is made use of."""
    if mean not in ("batch", "none"):
        raise ValueError(f"unknown mean {mean!r}; choose group, batch or none.")
    if mean == "none" and baseline != "mean":
        raise ValueError("baseline=leave_one_out leaves a sample out of a mean, but mean=none has none.")
    if mean == "none" and std != "global":
        return r
    centre, spread = _whole(r, unbiased)
    value = r if mean == "none" else (r - centre) * _stretch(baseline, r.new_full((1,), len(r)))
    return torch.where(_differ(r, torch.zeros_like(r, dtype=torch.long), spread), value, 0.0)


def _differ(r: Tensor, g: Tensor, spread: Tensor) -> Tensor:
    """Groups [G] of rewards r in groups g whose std is more than rounding."""
    return spread > STD_FLOOR * torch.ones_like(spread).scatter_reduce(0, g, r.abs(), "amax")


def _stretch(baseline: BaselineMode, count: Tensor) -> Tensor:
    """What r - mean is multiplied by [G], so that the baseline is the one asked for."""
    if baseline == "mean":
        return torch.ones_like(count)
    if baseline == "leave_one_out":
        # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
        return count / (count - 1).clamp(min=1)
    raise ValueError(f"unknown baseline {baseline!r}; choose mean or leave_one_out.")


def _scale(std: StdMode, eps: float, r: Tensor, group_std: Tensor, unbiased: bool, floor: float) -> Tensor:
    """What a centred reward is divided by, [] or one a sample."""
    if std == "none":
        return r.new_ones(())
    if std == "group":
        found = group_std
    elif std == "global":
        found = _whole(r, unbiased)[1]
    else:
        raise ValueError(f"unknown std mode {std!r}; choose group, global or none.")
    scale = found.clamp(min=floor) + eps
    # Where eps = 0 meets a std of 0 the group is dead, but 0 / 0 would be NaN.
    return torch.where(scale > 0, scale, 1.0)


def _whole(r: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and std [1] of all rewards r."""
    mean, spread, _ = _statistics(r, torch.zeros_like(r, dtype=torch.long), 1, unbiased)
    return mean, spread


def _standardised(value: Tensor, kept: Tensor, valid: Tensor, eps: float, unbiased: bool) -> Tensor:
    """(value - mean) / (std + eps) over the valid samples; 0 where a sample is not kept, or where all but agree."""
    known = value[valid]
    mean, spread = _whole(known, unbiased)
    differ = _differ(known, torch.zeros_like(known, dtype=torch.long), spread)
    return torch.where(kept & differ, (value - mean) / (spread + eps), 0.0)


def of_live_group(group: Tensor, live: Tensor) -> Tensor:
    """Samples [B] whose group is live [G]."""
    return live[torch.unique(group.to(live.device), return_inverse=True)[1]]


def _cut(value: Tensor, clip: float | None) -> Tensor:
    return value if clip is None else value.clamp(-clip, clip)
