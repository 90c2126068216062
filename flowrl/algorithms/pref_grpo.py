"""Pref-GRPO (arXiv:2508.20751): a sample's reward is the share of its group that it is preferred to.

| symbol | here |
|---|---|
| T; timestep fraction | num_steps; step_share |
| w_i, the win rate | `advantages.win_rates` of the rewards, or the reward `pairs` with a judge of its own |
| A_i, z-score of the win rates | credit |
| ratio normalisation, loss / dt | `objectives.guard` and the loss' weight |
| epsilon | clip_range |
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import win_rates
from flowrl.algorithms.filtering import random_steps
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import check_group_size, share_noise, training_times
from flowrl.types import Batch
from samplers import Plan, all_steps


class PrefGRPO(PolicyGradient):
    """Pref-GRPO (arXiv:2508.20751): win rates spread a group evenly, where z-scores of close rewards inflate noise.

    Rewards are compared pairwise here (a difference up to `margin` is a tie and counts half), each reward by itself
    unless `combine: sum`. With the reward `pairs` a judge that sees two samples does it, in both orders; then set
    `margin: null`.
    Note: the public code shows every pair in one order only, which favours early samples; see `rewards.pairs`.
    Note: a step's loss is divided by num_steps dt, not by dt, so that a learning rate keeps its meaning.
    """

    num_steps: fields.NumSteps = 25
    shift: fields.Shift = 3.0
    objective: fields.ObjectiveName = "guard"
    combine: fields.CombineHow = "per_reward"
    adv_eps: fields.AdvEps = 1e-8
    unbiased: fields.Unbiased = True
    step_share: fields.StepShare = 0.6
    margin: Annotated[
        float | None,
        Field(
            description="Difference of rewards up to which two samples tie; null: rewards are win rates.",
            ge=0,
            allow_inf_nan=False,
        ),
    ] = 0.0
    shared_noise: fields.SharedNoise = True

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last."""
        check_group_size(samples_per_prompt)
        plan = all_steps(training_times(times, self.num_steps, self.shift))
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan

    def credit(self, batch: Batch) -> Tensor:
        """z-score of the win rates, on a random part of each sample's steps."""
        if self.margin is not None and batch.rewards is not None:
            batch = _in_win_rates(batch, batch.rewards.cpu(), self.margin)
        credit = self.edge_credit(batch, self.sample_advantages(batch))
        return torch.where(random_steps(batch, self.step_share), credit, torch.nan)

    def weight(self, batch: Batch) -> Tensor | None:
        """1 / (num_steps dt), which belongs to the guarded ratio; other objectives have none."""
        if self.objective != "guard":
            return None
        return torch.reciprocal(self.num_steps * (batch.trajectory.t - batch.trajectory.t_next))


def _in_win_rates(batch: Batch, rewards: Tensor, margin: float) -> Batch:
    """The batch with win rates [B] for its rewards and for each score; only samples with a reward are compared."""

    def rate(values: Tensor) -> Tensor:
        known = torch.where(rewards.isfinite(), values.cpu(), torch.nan)
        return win_rates(known, batch.trajectory.group, margin).value

    return replace(batch, rewards=rate(rewards), scores={name: rate(score) for name, score in batch.scores.items()})
