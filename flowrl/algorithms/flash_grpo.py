"""Flash-GRPO (arXiv:2605.15980): one stochastic step a group, its gradient rectified over time.

| symbol | here |
|---|---|
| pool of timesteps | steps; dealt to the groups in turn, so that an iteration with as many groups sees all of them |
| iso-temporal group | all samples of a prompt share the step, and their initial noise |
| g(t) = eta (s_min + (s_max - s_min) t) | `samplers.wan_sde`; s_max, the second time, as the plan's noise; s_min = 0 |
| lambda_k = 1 / (sqrt(h) / g + g sqrt(h) (1 - t) / (2 t)) | one over `policy_gradient.sensitivity` |
| epsilon | clip_range |
"""

import torch
from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient, over_plans, sensitivity
from flowrl.algorithms.schedule import check_group_size, early_steps, in_turn, training_times
from flowrl.types import Batch
from samplers import Plan, subset


class FlashGRPO(PolicyGradient):
    """Flash-GRPO (arXiv:2605.15980): a single SDE step per prompt, stratified over prompts, ODE elsewhere.

    The loss of a step is divided by how fast its log-prob moves with the velocity, so that all steps pull alike.
    Note: the factor is normalised by its mean over the pool, not over a minibatch.
    Note: the std of the advantages is that of the whole batch, as in the public code. A late step moves a sample less
    than an early one, and that of its group would blow its small differences up.
    """

    num_steps: fields.NumSteps = 20
    shift: fields.Shift = 3.0
    sde: fields.SDE = "wan_sde"
    eta: fields.Eta = 1.0
    clip_range: fields.ClipRange = 1e-3
    adv_std: fields.AdvStd = "global"
    steps: fields.Steps = None

    @model_validator(mode="after")
    def _possible(self) -> "FlashGRPO":
        early_steps(self.steps, self.num_steps)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> tuple[Plan, ...]:
        """One plan for each step of the pool."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        steps = early_steps(self.steps, self.num_steps)
        single = [subset(grid, [k]).with_fanout({k: samples_per_prompt}) for k in steps]
        if self.sde == "wan_sde":
            single = [plan.with_noise({k: float(grid[1])}) for plan, k in zip(single, steps, strict=True)]
        return in_turn(single, iteration)

    def weight(self, batch: Batch) -> Tensor:
        """lambda of the step over its mean over the pool."""
        edges = batch.trajectory
        own = sensitivity(self.kernel, edges.t, edges.t_next, edges.eta)
        pool = sensitivity(self.kernel, *over_plans(batch, self.eta))
        return torch.reciprocal(own) / torch.reciprocal(pool).mean()
