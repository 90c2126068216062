"""From the rewards of a group to pairs of a chosen and a rejected sample, for methods that learn from preferences.

Symbols: B samples, N pairs; r reward. NaN (or infinite) reward = no verdict: the sample is in no pair.
"""

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.types import Hyperparameters, Loss

How = Literal["best_worst", "all", "margin"]

# Rewards come out of fp32 networks: a smaller difference than this share of their size says nothing.
TIE = 1e-6


def choose(rewards: Tensor, group: Tensor, how: How, min_margin: float = 0.0) -> Tensor:
    """Indices (chosen, rejected) [N,2] of the pairs in rewards [B] of the groups [B], group by group in rising order.

    best_worst    the first best and the first worst of each group: at most one pair
    margin        every two samples of a group whose rewards differ by more than `min_margin`, in rising order
    all           the same with a margin of 0

    A tie is no pair: a difference of at most max(min_margin, 1e-6 max(1, max |r| of the group)). N may be 0. ValueError
    for shapes that differ, another `how`, a negative margin, and a margin with "all".

    Example: rewards [1, 3, nan, 2] of one group give [[1, 0]], and with "all" [[1, 0], [1, 3], [3, 0]].

    Note: the code of Flow-DPO (arXiv:2501.13918, as in Flow-GRPO's scripts) makes a pair of two arbitrary samples where
    all rewards are equal.
    """
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards {list(rewards.shape)} and group {list(group.shape)}: expected [B] and [B].")
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin is {min_margin}; rewards of a pair differ by a finite number from 0 upwards.")
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; choose one of {', '.join(get_args(How))}.")
    if how == "all" and min_margin:
        raise ValueError(f'min_margin={min_margin} has no effect on "all"; choose "margin", or leave it out.')
    value, group = rewards.detach().double(), group.to(rewards.device)
    judged = value.isfinite()
    found = [torch.zeros(0, 2, dtype=torch.long, device=rewards.device)]
    for one in sorted(set(group.tolist())):
        index = torch.nonzero(judged & (group == one)).flatten()
        if len(index) < 2:
            continue
        mine = value[index]
        least = max(min_margin, TIE * max(1.0, mine.abs().max().item()))
        if how == "best_worst":
            best, worst = mine.argmax(), mine.argmin()
            pairs = torch.stack([best, worst])[None] if mine[best] - mine[worst] > least else index.new_zeros(0, 2)
        else:
            pairs = torch.nonzero(mine[:, None] - mine[None, :] > least)
        found.append(index[pairs])
    return torch.cat(found)


class PairsOfGroups(Hyperparameters):
    """Hyperparameters of methods that pair the samples of a group by their rewards, and the pairs."""

    pairing: Annotated[
        How,
        Field(
            description="Pairs of a group: its best and worst sample, all that differ, or all by more than min_margin."
        ),
    ] = "best_worst"
    min_margin: Annotated[float, Field(description="Rewards of a pair differ by more than this.", ge=0)] = 0.0

    @model_validator(mode="after")
    def _margin_counts(self) -> Self:
        if self.min_margin and self.pairing == "all":
            raise ValueError(f"min_margin={self.min_margin:g} has no effect on pairing=all; set pairing=margin.")
        return self

    @abstractmethod
    def loss(self, policy: Any, batch: Any) -> Loss:
        """Loss of a part of an update; see `flowrl.types.Algorithm`."""

    def pairs(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Indices (chosen, rejected) [N,2], on the CPU."""
        return choose(rewards.cpu(), group.cpu(), self.pairing, self.min_margin)
