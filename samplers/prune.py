"""Masks for pruning; apply them with ``Trajectory.keep_leaves`` (leaves) or ``Trajectory.select`` (edges)."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["at_steps", "best_and_worst"]


def best_and_worst(rewards: Tensor, group: Tensor, best: int, worst: int = 0) -> Tensor:
    """The ``best`` highest and ``worst`` lowest rewards of every group, as a bool mask [B] (best-of-n, DanceGRPO).

    ``rewards`` and ``group`` are [B]. NaN is no verdict and is never kept; ties fall to the earlier leaf.
    A group with fewer verdicts than ``best + worst`` is kept whole.
    """
    keep = torch.zeros_like(group, dtype=torch.bool)
    for name in torch.unique(group):
        members = ((group == name) & ~rewards.isnan()).nonzero().squeeze(1)
        falling = members[rewards[members].argsort(descending=True, stable=True)]
        rising = members[rewards[members].argsort(stable=True)]
        keep[falling[:best]] = True
        # Taken from what is left, so that ties cannot be counted as best and as worst.
        keep[rising[~keep[rising]][:worst]] = True
    return keep


def at_steps(step: Tensor, steps: Sequence[int]) -> Tensor:
    """Edges whose step is one of ``steps``, as a bool mask [E]; ``~at_steps(...)`` prunes depths (BranchGRPO)."""
    return torch.isin(step, torch.tensor(list(steps), dtype=step.dtype, device=step.device))
