"""TempFlow-GRPO (arXiv:2508.04324): branch one ODE trajectory at a single step, so that its credit is exact.

| symbol | here |
|---|---|
| k, the branching step; K their set | steps; each prompt meets one of them in an iteration, all of them in turn |
| G, branches of one trajectory | branches |
| Norm(sigma_k sqrt(dt_k)) | the loss' weight: std over its mean over the steps |
| A_k^i | credit: against the branches of the same initial noise |
| epsilon | clip_range |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient, over_plans, std_of
from flowrl.algorithms.schedule import check_group_size, early_steps, in_turn, training_times
from flowrl.types import Batch
from samplers import Plan, subset


class TempFlowGRPO(PolicyGradient):
    """TempFlow-GRPO (arXiv:2508.04324): ODE up to step k, one stochastic step with G noises, ODE to the end.

    The spread of the G rewards is due to that step alone, whose loss is weighted by its noise: a log-prob moves with
    1 / std, so that without the weight the least noisy steps would have the largest gradients.
    Note: the paper branches every prompt at every k in an iteration; here prompts (or, with fewer `branches` than
    samples, the initial noises of a prompt) take turns.
    Note: late branches hardly differ; `adv_floor` keeps them from being blown up to advantages of size 1.
    """

    adv_floor: fields.AdvFloor = 1e-3
    steps: fields.Steps = None
    branches: Annotated[
        int | None, Field(description="Samples that branch from one initial noise; null: the whole group.", ge=2)
    ] = None
    compare: Annotated[
        Literal["branches", "prompt"],
        Field(description="Advantages against the branches of one initial noise, or all samples of the prompt."),
    ] = "branches"
    noise_weight: Annotated[bool, Field(description="Weight a step's loss by its std over the mean std.")] = True

    @model_validator(mode="after")
    def _possible(self) -> "TempFlowGRPO":
        early_steps(self.steps, self.num_steps)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> tuple[Plan, ...]:
        """One plan for each branching step."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        branches = self.branches or samples_per_prompt
        if samples_per_prompt % branches:
            raise ValueError(
                f"samples_per_prompt={samples_per_prompt} is no multiple of branches={branches}, the samples that grow "
                "from one initial noise; change one of them, or set branches to null for the whole group."
            )
        steps = early_steps(self.steps, self.num_steps)
        return in_turn([subset(grid, [k]).with_fanout({k: branches}) for k in steps], iteration)

    def credit(self, batch: Batch) -> Tensor:
        """The advantage of the branch that a step opened."""
        group = batch.trajectory.group
        if self.compare == "branches":
            group = torch.arange(len(group), device=group.device) // batch.plans[0].leaves_per_root
        return self.edge_credit(batch, self.sample_advantages(batch, group))

    def weight(self, batch: Batch) -> Tensor | None:
        """std of the step over the mean std of the iteration's steps."""
        if not self.noise_weight:
            return None
        edges = batch.trajectory
        own = std_of(self.kernel, edges.t, edges.t_next, edges.eta)
        return own / std_of(self.kernel, *over_plans(batch, self.eta)).mean()
