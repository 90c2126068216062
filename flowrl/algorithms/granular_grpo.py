"""Granular-GRPO, G2RPO (arXiv:2510.01982): one stochastic step at a time, judged after tails of several granularities.

| symbol | here |
|---|---|
| k, the singular stochastic step | steps, in turn |
| Lambda, granularities | strides |
| G, noises of one step | data.samples_per_prompt / number of strides: every sample that is judged counts |
| A^i = sum over lambda of (R - mean) / std | credit |
| epsilon | clip_range |
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import check_group_size, early_steps, in_turn, training_times
from flowrl.types import Batch
from samplers import Plan, subset


class GranularGRPO(PolicyGradient):
    """G2RPO (arXiv:2510.01982): a shared ODE prefix, one stochastic step, and an ODE tail for each stride.

    The same G noises are judged several times, after tails that take every time of the grid, every second, ...; each
    tail ends at 0. Advantages are normalised for each stride by itself and added up.
    Note: the paper visits all k with each prompt in an iteration; here prompts take turns.
    """

    num_steps: fields.NumSteps = 16
    shift: fields.Shift = 3.0
    adv_eps: fields.AdvEps = 1e-8
    adv_floor: fields.AdvFloor = 1e-3
    steps: fields.Steps = None
    strides: Annotated[
        tuple[int, ...], Field(description="One tail a stride: every stride-th time of the grid, and 0.", min_length=1)
    ] = (1, 2, 3)

    @model_validator(mode="after")
    def _possible(self) -> "GranularGRPO":
        early_steps(self.steps, self.num_steps)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> tuple[Plan, ...]:
        """One plan for each stochastic step."""
        check_group_size(samples_per_prompt)
        noises, rest = divmod(samples_per_prompt, len(self.strides))
        if rest or noises < 2:
            raise ValueError(
                f"samples_per_prompt={samples_per_prompt} must be at least 2 noises x {len(self.strides)} strides, and "
                f"a multiple of the strides: every noise is judged after each. Choose {4 * len(self.strides)}, say."
            )
        grid = training_times(times, self.num_steps, self.shift)
        steps = early_steps(self.steps, self.num_steps)
        singular = [subset(grid, [k]).with_fanout({k: noises}).with_strides(self.strides) for k in steps]
        return in_turn(singular, iteration)

    def credit(self, batch: Batch) -> Tensor:
        """Sum over the strides of the advantage among the samples of the same prompt and stride."""
        group, num = batch.trajectory.group, len(self.strides)
        stride = torch.arange(len(group), device=group.device) % num
        found = self.sample_advantages(batch, group * num + stride)
        return (self.edge_credit(batch, found) * num).clamp(-self.adv_clip, self.adv_clip)
