"""GRPO-Guard (arXiv:2510.22319): ratios of the same spread at every step, and a loss of the same scale.

| symbol | here |
|---|---|
| sigma_t sqrt(dt), mu | std and mean of the step |
| log r^, the normalised log-ratio | `objectives.guard` |
| 1 / dt, the gradient's reweighting | the loss' weight |
| epsilon | clip_range, on the normalised ratio |
"""

import torch
from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import all_or_window, check_group_size, check_window, share_noise, training_times
from flowrl.types import Batch
from samplers import Plan


class GRPOGuard(PolicyGradient):
    """GRPO-Guard (arXiv:2510.22319): without it ratios lie below 1 on average and clipping stops to bind.

    Note: the paper divides a step's loss by dt; here by num_steps dt, whose mean over the grid is 1, so that a learning
    rate keeps its meaning.
    Note: std and dt are those of each step; a public code takes means over the batch.
    """

    objective: fields.ObjectiveName = "guard"
    clip_range: fields.ClipRange = 2e-6
    adv_std: fields.AdvStd = "global"
    window: fields.Window = None
    window_range: fields.WindowRange = None
    shared_noise: fields.SharedNoise = False

    @model_validator(mode="after")
    def _possible(self) -> "GRPOGuard":
        check_window(self.num_steps, self.window, self.window_range)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last, or a random window."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        plan = all_or_window(grid, iteration, self.window, self.window_range, seed)
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan

    def weight(self, batch: Batch) -> Tensor | None:
        """1 / (num_steps dt): undoes the factor dt that the normalised ratio leaves in the gradient."""
        if self.objective != "guard":
            return None
        return torch.reciprocal(self.num_steps * (batch.trajectory.t - batch.trajectory.t_next))
