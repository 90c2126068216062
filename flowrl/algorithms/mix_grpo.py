"""MixGRPO (arXiv:2507.21802): SDE steps inside a window that slides from noise to data, ODE steps outside.

| symbol | here |
|---|---|
| T | num_steps |
| S, the interval of SDE steps; w; s; tau | the plan's stochastic steps; window; stride; shift_every |
| l, left end of the window | `samplers.window_start` |
| G group size | data.samples_per_prompt |
| A_i | credit |
| epsilon | clip_range |
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import clipped_policy_gradient, group_credit
from flowrl.algorithms.schedule import check_group_size, share_noise, training_times
from flowrl.types import Batch, Hyperparameters, Loss, Needs, Policy
from samplers import Kernel, Plan, Solver, Strategy, sliding_window


class MixGRPO(Hyperparameters):
    """MixGRPO (arXiv:2507.21802): SDE inside a sliding window, ODE outside; only the window's steps are optimised.

    Note: the public code's window shrinks and vanishes at the clean end; here it keeps its width (see `samplers`).
    Note: the paper's grid is `shift: 3` over equal steps; by default the model's own grid is taken.
    Note: exp_decay starts at step 13 of 25 in the public code; here at the same share of any num_steps.
    """

    num_steps: fields.NumSteps = 25
    shift: fields.Shift = None
    sde: fields.SDE = "flow_sde"
    eta: fields.Eta = 0.7
    window: Annotated[fields.Count, Field(description="Stochastic, trained steps w of an iteration.")] = 4
    stride: Annotated[fields.Count, Field(description="Steps s by which the window moves on.")] = 1
    shift_every: Annotated[fields.Count, Field(description="Iterations tau at one place (decay: the first).")] = 25
    strategy: Annotated[Strategy, Field(description="How it moves; decay leaves late steps sooner.")] = "progressive"
    roll_back: Annotated[bool, Field(description="From the last place go back to the first; else stay there.")] = True
    solver: Annotated[Solver, Field(description="Solver of the ODE steps.")] = "euler"
    shared_noise: fields.SharedNoise = True
    clip_range: fields.ClipRange = 1e-4
    adv_std: fields.AdvStd = "group"
    adv_eps: fields.AdvEps = 1e-8
    adv_clip: fields.AdvClip = 5.0
    unbiased: fields.Unbiased = True
    kl_coef: fields.KLCoef = 0.0
    kl_form: fields.KLForm = "exact"

    @model_validator(mode="after")
    def _possible(self) -> "MixGRPO":
        fields.check_eta(self.sde, self.eta)
        if self.window > self.num_steps - 1:
            raise ValueError(
                f"a window of {self.window} steps does not fit into num_steps={self.num_steps}, whose last step always "
                f"follows the ODE; choose window <= {self.num_steps - 1}, or more steps."
            )
        return self

    @property
    def needs(self) -> Needs:
        """Log-probs; the initial weights only for the KL."""
        return Needs(reference=self.kl_coef > 0)

    @property
    def kernel(self) -> Kernel:
        """The step named by `sde`."""
        return fields.resolve_kernel(self.sde)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The window's place is a function of the iteration."""
        check_group_size(samples_per_prompt)
        plan = sliding_window(
            training_times(times, self.num_steps, self.shift),
            iteration,
            self.window,
            self.stride,
            self.shift_every,
            self.strategy,
            roll_back=self.roll_back,
            seed=seed,
            threshold=13 * (self.num_steps - 2) // 23,
            solver=self.solver,
        )
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan

    def credit(self, batch: Batch) -> Tensor:
        """Every edge of a sample gets the sample's advantage."""
        return group_credit(batch, std=self.adv_std, eps=self.adv_eps, unbiased=self.unbiased, clip=self.adv_clip)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Clipped ratio of the window's steps plus a KL to the initial weights where kl_coef asks for one."""
        return clipped_policy_gradient(
            policy,
            batch,
            self.kernel,
            self.eta,
            clip_range=self.clip_range,
            kl_coef=self.kl_coef,
            kl_form=self.kl_form,
        )
