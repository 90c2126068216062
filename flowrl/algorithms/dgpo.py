"""DGPO (arXiv:2510.08425): direct preference optimisation of a whole group, weighted by advantages.

| symbol | here |
|---|---|
| d_i = mean (v - u)^2, d_ref | error of sample i at the group's time and noise; of the anchor's velocity |
| S_g = beta / G sum_i A_i (d_i - d_ref_i) | `surplus`, over the samples of a unit: a group at one time and noise |
| -log sigmoid(-S_g) | the loss; divided by beta, its gradient is mean sigmoid(S_g) A_i grad d_i |
| A_i | credit; they sum to 0 in a group, so that the partition function cancels |
| clip of rho_i = exp(d_old_i - d_i) | clip_range: the row stops moving outwards |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from flowrl.algorithms import fields
from flowrl.algorithms.forward_process import Decay, ForwardProcess, ShareDraws, TimeRange
from flowrl.algorithms.matching import mean_square, noised, unit_sum, velocities
from flowrl.types import Batch, Loss, Needs, Policy


class DGPO(ForwardProcess):
    """DGPO (arXiv:2510.08425): -log sigmoid(-S) / beta, S the advantage-weighted rise of the group's errors.

    Divided by beta a learning rate keeps its meaning: at S = 0 this is advantage-weighted matching, halved. Samples
    without a verdict leave the group. The defaults are those for SD3.5 with guidance in the rollout; without guidance
    the public code takes `clip_range` 1e-5 to 1e-4, and with `anchor: old` a beta of 2000 to 5000 (TDM-R1).
    Note: of a prompt's draws each has a noise of its own, where the public code repeats one at every time.
    Note: one old policy clips and draws the samples; the public code may draw with a second, slower one.
    Note: the distance to the initial weights is without guidance.
    """

    beta: Annotated[float, Field(description="How soon a group that is told apart is left alone.", gt=0)] = 10.0
    anchor: Annotated[
        Literal["reference", "old"],
        Field(description="Whose errors S counts from: the initial weights', or the old policy's (saves calls)."),
    ] = "reference"
    clip_range: fields.ClipRange = 5e-2
    time_range: TimeRange = (0.4, 1.0)
    share_draws: ShareDraws = True
    adv_std: fields.AdvStd = "global"
    kl_coef: fields.KLCoef = 1e-3
    decay: Decay = ((0, 0.0), (300, 0.3))

    @property
    def needs(self) -> Needs:
        """No log-probs; the old policy, and the initial weights as anchor or for a distance to them."""
        return super().needs._replace(reference=self.anchor == "reference" or self.kl_coef > 0)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss of each unit, given to each of its rows."""
        assert batch.advantages is not None and batch.draws is not None
        at = noised(batch)
        v = velocities(policy, at, old=True, reference=self.needs.reference)
        anchor = v.old if self.anchor == "old" else v.reference
        assert v.old is not None and anchor is not None
        error, old_error, from_error = (mean_square(x - at.target) for x in (v.current, v.old, anchor))
        beyond = outwards(old_error - error.detach(), batch.advantages, self.clip_range)
        kept = torch.where(beyond, error.detach(), error)
        s = surplus(kept - from_error, batch.advantages, batch.draws.unit, self.beta)
        found = self.total(softplus(s) / self.beta, v if self.kl_coef else v._replace(reference=None), batch)
        seen = {
            "error": error.detach().mean(), "clip_frac": beyond.float().mean(), "surplus": s.detach().mean(),
        }  # fmt: skip
        return Loss(found.value, found.metrics | seen)


def surplus(rise: Tensor, advantages: Tensor, unit: Tensor, beta: float) -> Tensor:
    """S = beta / G sum_i A_i rise_i of each row's unit [N], G its rows; below 0 where good samples came nearer."""
    return beta * unit_sum(advantages * rise, unit) / unit_sum(torch.ones_like(rise), unit)


def outwards(log_ratio: Tensor, advantages: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    """Rows [N] whose ratio has left [1 - low, 1 + high] in the direction of their advantage, bool."""
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    ratio = log_ratio.exp()
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
