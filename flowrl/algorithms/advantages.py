"""From rewards to credit: group-relative advantages of the samples, then of the edges that led to them.

Symbols: B samples (leaves), G groups, E edges; r reward, A advantage. NaN (or infinite) reward = no verdict: the sample
leaves its group's statistics and gets A = 0. All statistics are float64, on the CPU, and summed in sorted order: they
depend, to the last bit, neither on the order of the samples nor on how processes share them.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

StdMode = Literal["group", "global", "none"]

# Rewards come out of fp32 networks and differ by 1e-7 where they mean the same. Divided by their own std, such
# differences become advantages of size 1, i.e. pure noise (reliability row R8).
STD_FLOOR = 1e-6


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
) -> Advantages:
    """A = (r - mean of the group) / (std + eps) for rewards and group numbers [B] (GRPO, arXiv:2402.03300).

    `std` is taken over the group, over all samples around their common mean ("global"), or left out ("none", Dr.GRPO,
    arXiv:2503.20783). A group is dead, with A = 0, when it has fewer than two verdicts or when its own std is at most
    1e-6 max(1, max |r|), whichever std is divided by.
    Note: rewards on a scale below 1e-6 are therefore all dead (zero_std_frac = 1): scale them up.
    """
    rewards = rewards.detach().cpu().double()
    valid = rewards.isfinite()
    names, member = torch.unique(group.to(rewards.device), return_inverse=True)
    num_groups = len(names)
    r, g = rewards[valid], member[valid]
    mean, spread, count = _statistics(r, g, num_groups, unbiased)
    largest = r.new_ones(num_groups).scatter_reduce(0, g, r.abs(), "amax")
    live = (count >= 2) & (spread > STD_FLOOR * largest)
    centred = torch.where(live[g], r - mean[g], 0.0)
    value = torch.zeros_like(rewards)
    value[valid] = centred / _scale(std, eps, r, spread[g], unbiased)
    if clip is not None:
        value = value.clamp(-clip, clip)
    return Advantages(value, valid, live)


def to_edges(advantages: Tensor, leaves: Tensor, valid: Tensor | None = None) -> Tensor:
    """Credit of each edge: the mean advantage of the samples [B] that descend from it, `leaves` [E, B] -> float64 [E].

    On a linear rollout this is the sample's own advantage (GRPO). Samples that are not `valid` [B] do not count, and
    an edge that leads to no valid one gets 0, as if they had never been drawn.
    """
    below = leaves.to(advantages.device)
    if valid is not None:
        below = below & valid
    below = below.double()
    return (below @ advantages.double()) / below.sum(1).clamp(min=1)


def _statistics(r: Tensor, g: Tensor, num_groups: int, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std and count [G] of rewards r in groups g < G; 0 where a group has none."""
    order = r.argsort()
    r, g = r[order], g[order]
    zeros = r.new_zeros(num_groups)
    count = zeros.index_add(0, g, torch.ones_like(r))
    mean = zeros.index_add(0, g, r) / count.clamp(min=1)
    squares = zeros.index_add(0, g, (r - mean[g]).square())
    return mean, (squares / (count - int(unbiased)).clamp(min=1)).sqrt(), count


def _scale(std: StdMode, eps: float, r: Tensor, group_std: Tensor, unbiased: bool) -> Tensor:
    """What a centred reward is divided by, [] or one a sample."""
    if std == "none":
        return r.new_ones(())
    if std == "group":
        scale = group_std + eps
    elif std == "global":
        scale = _statistics(r, torch.zeros_like(r, dtype=torch.long), 1, unbiased)[1] + eps
    else:
        raise ValueError(f"unknown std mode {std!r}; choose group, global or none.")
    # Where eps = 0 meets a std of 0 the group is dead, but 0 / 0 would be NaN.
    return torch.where(scale > 0, scale, 1.0)
