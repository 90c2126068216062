"""Flow-RWR (VideoAlign, arXiv:2501.13918): matching one's own samples, weighted by exp(reward), and SFT on the best.

| symbol | here |
|---|---|
| exp(r / tau) | credit of `weights: exp`, divided by its mean over the batch or the group |
| 1[r = max in the group] | credit of `weights: best`; all others leave |
| norm of u - v, squared | mean (v - u)^2 |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.advantages import STD_FLOOR, group_advantages
from flowrl.algorithms.forward_process import Matching, TimeSamplingName
from flowrl.algorithms.matching import mean_square, noised, samples_of_rows, velocities
from flowrl.algorithms.schedule import check_group_size
from flowrl.types import Batch, Loss, Policy
from samplers import Plan


class FlowRWR(Matching):
    """Flow-RWR (VideoAlign, arXiv:2501.13918): mean w (v - u)^2 on the policy's own samples, w = exp(r / tau) > 0.

    There is no pushing away, so that no brake is needed; with the mean weight at 1 a learning rate keeps its meaning.
    Note: a public code weighs by the raw reward, which for a negative one makes the samples less likely without end.
    Note: rewards that are all equal (over what weights are normalised over) get no credit: they teach nothing.
    """

    weights: Annotated[
        Literal["exp", "best"],
        Field(description="exp(reward / temperature), or 1 for the best of each group, alone trained on (SFT)."),
    ] = "exp"
    temperature: Annotated[
        float, Field(description="Difference of rewards that is a factor e of the weight.", gt=0)
    ] = 1.0
    over: Annotated[
        Literal["batch", "group"],
        Field(description="Where the mean weight is 1: a hard prompt's samples together weigh less (batch), or not."),
    ] = "batch"
    time_sampling: TimeSamplingName = "logit_normal"

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE; a group that is compared within itself needs two samples."""
        if self.weights == "best" or self.over == "group":
            check_group_size(samples_per_prompt)
        return super().plan(times, iteration, samples_per_prompt, seed)

    def credit(self, batch: Batch) -> Tensor:
        """Each row gets its sample's weight, fp32 [N]; NaN without a verdict, or where others are the best."""
        assert batch.rewards is not None
        rewards, group = batch.rewards.cpu().double(), batch.trajectory.group.cpu()
        if self.weights == "best":
            weight = best_of(rewards, group)
        else:
            weight = exponential(rewards, group if self.over == "group" else torch.zeros_like(group), self.temperature)
        return weight[samples_of_rows(batch)].to(batch.trajectory.x0.device, torch.float32)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The weighted matching error of the rows."""
        assert batch.advantages is not None
        at = noised(batch)
        error = mean_square(velocities(policy, at).current - at.target)
        loss = batch.advantages * error
        metrics = {
            "policy_loss": loss.detach().mean(), "error": error.detach().mean(), "weight_max": batch.advantages.max(),
        }  # fmt: skip
        return Loss(loss.mean(), metrics)


def exponential(rewards: Tensor, group: Tensor, temperature: float) -> Tensor:
    """exp(r / tau) over its mean in the group, float64 [B]; 0 in a group whose rewards agree, NaN without a verdict."""
    names, member = torch.unique(group, return_inverse=True)
    valid = rewards.isfinite()
    known = rewards.where(valid, -torch.inf)
    top = known.new_full((len(names),), -torch.inf).scatter_reduce(0, member, known, "amax")
    # Of the difference to the largest: exp() of a reward itself may overflow.
    power = torch.where(valid, ((known - top[member]) / temperature).exp(), 0.0)
    total, count = (power.new_zeros(len(names)).index_add(0, member, x) for x in (power, valid.double()))
    live = group_advantages(rewards, group).live
    return torch.where(valid, live[member] * power * count[member] / total[member], torch.nan)


def best_of(rewards: Tensor, group: Tensor) -> Tensor:
    """1 for the best of each group, float64 [B], NaN for all others, and for all where the rewards agree.

    Rewards that differ by rounding (1e-6 of their size, at least 1e-6) are equally good.
    """
    names, member = torch.unique(group, return_inverse=True)
    known = rewards.where(rewards.isfinite(), -torch.inf)
    top = known.new_full((len(names),), -torch.inf).scatter_reduce(0, member, known, "amax")
    live = group_advantages(rewards, group).live
    best = (top[member] - known) <= STD_FLOOR * top[member].abs().clamp(min=1)
    return torch.where(best & live[member] & rewards.isfinite(), 1.0, torch.nan).double()
