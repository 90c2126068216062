"""Flow-GRPO (arXiv:2505.05470), its fast variant and its CPS variant (arXiv:2509.05952): GRPO on a flow model's SDE.

| symbol | here |
|---|---|
| T; T' of evaluation | num_steps; the config's evaluation.num_steps (denoising reduction: 10 against 40) |
| a, noise level | eta |
| sigma_t sqrt(dt) | std of `samplers.flow_sde` |
| G group size | data.samples_per_prompt |
| A_i | credit |
| epsilon | clip_range |
| beta | kl_coef |
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import clipped_policy_gradient, group_credit
from flowrl.algorithms.schedule import check_group_size, share_noise, training_times
from flowrl.types import Batch, Hyperparameters, Loss, Needs, Policy
from samplers import Kernel, Plan, all_steps, random_window


class FlowGRPO(Hyperparameters):
    """Flow-GRPO (arXiv:2505.05470): every step but the last is an SDE step, and PPO is done on all of them.

    With a window, Flow-GRPO-Fast: SDE and training in a few steps at random, the ODE elsewhere.
    Note: the last step follows the ODE, as in the authors' later code; at first its noise stayed in the image.
    Note: the paper divides by the std of the group, its code (and this default) by that of the whole batch.
    """

    num_steps: fields.NumSteps = 10
    shift: fields.Shift = None
    sde: fields.SDE = "flow_sde"
    eta: fields.Eta = 0.7
    window: Annotated[int | None, Field(description="Stochastic steps of Flow-GRPO-Fast; null: all but last.")] = None
    window_range: Annotated[
        tuple[int, int] | None,
        Field(description="Steps [low, high) in which the window lies; null: the first half of the steps."),
    ] = None
    shared_noise: fields.SharedNoise = False
    clip_range: fields.ClipRange = 1e-4
    adv_std: fields.AdvStd = "global"
    adv_eps: fields.AdvEps = 1e-4
    adv_clip: fields.AdvClip = 5.0
    unbiased: fields.Unbiased = False
    kl_coef: fields.KLCoef = 0.04
    kl_form: fields.KLForm = "flow_grpo"

    @model_validator(mode="after")
    def _possible(self) -> "FlowGRPO":
        fields.check_eta(self.sde, self.eta)
        if self.window is None:
            if self.window_range is not None:
                raise ValueError("window_range says where a window may lie, but window is null; set window, say 2.")
            return self
        low, high = self._range
        if not (self.window >= 1 and low >= 0 and low + self.window <= high <= self.num_steps - 1):
            raise ValueError(
                f"a window of {self.window} steps does not fit steps [{low}, {high}) of {self.num_steps}: it holds "
                "at least one, and the last step always follows the ODE; make the window smaller, "
                f"window_range wider (at most [0, {self.num_steps - 1}]) or num_steps larger."
            )
        return self

    @property
    def _range(self) -> tuple[int, int]:
        return self.window_range or (0, self.num_steps // 2)

    @property
    def needs(self) -> Needs:
        """Log-probs; the initial weights only for the KL."""
        return Needs(reference=self.kl_coef > 0)

    @property
    def kernel(self) -> Kernel:
        """The step named by `sde`."""
        return fields.resolve_kernel(self.sde)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last, or a random window that is the same for everyone in this iteration."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        low, high = self._range
        plan = (
            all_steps(grid)
            if self.window is None
            else random_window(grid, iteration, self.window, low=low, high=high, seed=seed)
        )
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan

    def credit(self, batch: Batch) -> Tensor:
        """Every edge of a sample gets the sample's advantage."""
        return group_credit(batch, std=self.adv_std, eps=self.adv_eps, unbiased=self.unbiased, clip=self.adv_clip)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Clipped ratio of the stored steps plus beta times the KL to the initial weights."""
        return clipped_policy_gradient(
            policy,
            batch,
            self.kernel,
            self.eta,
            clip_range=self.clip_range,
            kl_coef=self.kl_coef,
            kl_form=self.kl_form,
        )
