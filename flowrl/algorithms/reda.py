"""Reward-distribution alignment, experimental, inspired by the ReDA stage of HunyuanImage 3.0 (arXiv:2509.23951).

| symbol | here |
|---|---|
| rewards of curated pictures, F_ref^-1(q) | reference: their quantiles at equal shares of q from 0 to 1 |
| r_(i), the rewards of a micro-batch in order | sorted; place (i - 1/2) / n of the reference is its partner |
| W1 = mean |r_(i) - F_ref^-1((i - 1/2) / n)| | the loss |
| how samples get their graph | mode, last_steps, as in reward_gradient |
"""

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from flowrl.algorithms.last_steps import LastSteps


def _rising(reference: tuple[float, ...]) -> tuple[float, ...]:
    if any(not low <= high for low, high in pairwise(reference)) or not all(abs(q) < float("inf") for q in reference):
        raise ValueError(
            f"reference={list(reference)} must be finite and rise: quantiles of the curated pictures' rewards, the "
            "lowest first."
        )
    return reference


class ReDA(LastSteps):
    """Experimental, inspired by ReDA (HunyuanImage 3.0, arXiv:2509.23951): rewards as those of curated pictures, in W1.

    A reward above its partner is pulled down: past what good pictures get there is nothing to gain, so less to hack.
    Note: that report names the divergence but gives no formula; the Wasserstein-1 distance of the weighted total's
    distribution in each micro-batch, and its gradient, are ours. A small micro-batch overestimates it: take 32 samples
    or more in one.
    """

    reference: Annotated[
        tuple[float, ...],
        AfterValidator(_rising),
        Field(
            description="Quantiles of curated pictures' rewards at equal shares from 0 to 1; one number: all are it.",
            min_length=1,
        ),
    ] = (1.0,)

    def shortfall(self, reward: Tensor) -> Tensor:
        """|r - partner| [N]; NaN stays NaN and takes nobody's place."""
        known = torch.nonzero(~reward.isnan()).flatten()
        order = known[reward.detach()[known].argsort()]
        partner = torch.full_like(reward, torch.nan)
        partner[order] = quantiles(self.reference, len(order)).to(reward)
        return (reward - partner).abs()


def quantiles(reference: tuple[float, ...], count: int) -> Tensor:
    """The reference at the `count` places (i - 1/2) / count, linear between the quantiles given, float64 [count]."""
    given = torch.tensor(reference, dtype=torch.float64)
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1) * (len(given) - 1)
    low = place.floor().long().clamp(max=max(len(given) - 2, 0))
    high = (low + 1).clamp(max=len(given) - 1)
    return given[low] + (place - low) * (given[high] - given[low])
