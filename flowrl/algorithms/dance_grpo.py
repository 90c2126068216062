"""DanceGRPO (arXiv:2505.07818): GRPO on an SDE of constant noise, trained on a random part of its steps.

| symbol | here |
|---|---|
| T | num_steps |
| epsilon_t, noise of the SDE | eta; its square is constant over time |
| tau, timesteps optimised | step_share |
| G group size; best-of-N | data.samples_per_prompt; best + worst |
| A_i, summed over rewards | credit, with combine: per_reward |
| epsilon | clip_range |
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.filtering import random_steps
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import check_group_size, share_noise, training_times
from flowrl.types import Batch
from samplers import Plan, all_steps, best_and_worst

Chosen = Annotated[int | None, Field(description="Samples of a group, by advantage, to train on; null: all.", ge=0)]


class DanceGRPO(PolicyGradient):
    """DanceGRPO (arXiv:2505.07818): all steps but the last are SDE steps; each sample trains on a random share of them.

    Its recipe for Stable Diffusion 1.x is `sde: ddim, eta: 1.0, num_steps: 50, shift: null, step_share: 1.0`.
    Note: the official rewards see the clean estimate of the last step; that is where its ODE step ends here.
    Note: the official best-of-n ranks all prompts of a process together; here every group is ranked by itself.
    Note: the official initial noise is one for all prompts of a process; here one for each group.
    """

    num_steps: fields.NumSteps = 16
    shift: fields.Shift = 3.0
    sde: fields.SDE = "dance_sde"
    eta: fields.Eta = 0.3
    combine: fields.CombineHow = "per_reward"
    adv_eps: fields.AdvEps = 1e-8
    unbiased: fields.Unbiased = True
    step_share: fields.StepShare = 0.6
    best: Chosen = None
    worst: Chosen = None
    shared_noise: fields.SharedNoise = True

    @model_validator(mode="after")
    def _possible(self) -> "DanceGRPO":
        if (self.best is None) != (self.worst is None) or (self.best == 0 and self.worst == 0):
            raise ValueError(
                f"best={self.best} and worst={self.worst} say together which samples are trained on; set both, at "
                "least one of them above 0 (the paper keeps 4 and 4 of 24), or neither."
            )
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last."""
        check_group_size(samples_per_prompt)
        if self.best is not None and self.worst is not None and self.best + self.worst > samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt={samples_per_prompt} is fewer than best + worst = {self.best + self.worst}; "
                "make the group larger, or choose fewer."
            )
        plan = all_steps(training_times(times, self.num_steps, self.shift))
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan

    def credit(self, batch: Batch) -> Tensor:
        """Advantages over the whole group; then only the best and worst by them, and a random part of the steps."""
        found = self.sample_advantages(batch)
        if self.best is not None and self.worst is not None:
            # Not by batch.rewards: in their sum the reward with the largest spread would choose alone.
            ranked = found.value.where(found.valid, torch.nan)
            chosen = best_and_worst(ranked, batch.trajectory.group.cpu(), self.best, self.worst)
            found = found._replace(valid=found.valid & chosen)
        credit = self.edge_credit(batch, found)
        return torch.where(random_steps(batch, self.step_share), credit, torch.nan)
