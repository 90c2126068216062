"""Variance-preserving diffusion in flow coordinates: what Stable Diffusion, SDXL and CogVideoX share.

Such a network sees z = sqrt(A) x0 + sqrt(1-A) eps at one of the levels A of a table, and says eps, x0 or the
v-prediction. Rays through (x0, eps) are the same in both coordinates (`samplers.prediction`), so that a step of DDIM
with eta = 0, and one of Euler in sigma = sqrt((1-A)/A) = t/(1-t), is exactly an Euler step of the velocity between
the same two levels.

Shapes: N samples of latents *L.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from flowrl.models.base import PipelineModel
from flowrl.models.pipeline import ModelError
from flowrl.types import Cond
from samplers import (
    flow_state,
    flow_time,
    velocity_from_eps,
    velocity_from_v_prediction,
    velocity_from_x0,
    vp_state,
)

_VELOCITIES = {
    "epsilon": velocity_from_eps,
    "sample": velocity_from_x0,
    "v_prediction": velocity_from_v_prediction,
}
_LEAST_ALPHA = 2**-24
"""Where the signal of a table's last level is zero, timesteps near it are told apart as if it were this."""
_ROUNDING = 1e-3
"""A fraction of a timestep that the float32 of a time cannot resolve: whole timesteps come out whole."""


class VariancePreserving(PipelineModel):
    """A pipeline whose scheduler has a table of levels A (`alphas_cumprod`), as a velocity.

    Note: the grid ends at t = 0. Schedulers with set_alpha_to_one=False or final_sigmas_type="sigma_min" stop at the
    table's first level instead (t = 0.028 for SD1.5) and hand the VAE a little noise.
    Note: no grid starts above the table's last level (t = 0.936 for SD1.5), where the network knows nothing: a state
    of such a time, which a method may draw, is read as one of that level.
    Note: every step here ends at the level where the next begins. Two schedulers of diffusers do not do so: DDIM with
    spacing "trailing" goes to level tau - 1000 // T, which is not the next tau where T does not divide 1000 (latents
    differ by up to 4%, at T = 6); DPM-Solver with Karras or exponential sigmas rounds the timestep that it tells the
    network (4e-4 and 4e-3).
    """

    @abstractmethod
    def output(self, z: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """What the network says, of the kind that the scheduler's `prediction_type` names, [N,*L].

        z [N,*L] is the variance-preserving state; timestep [N] float32 counts from 0, and may be a fraction.
        """

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] of what the network says at the level of t."""
        known = t.clamp(max=float(flow_time(self._alphas[-1])))
        z = vp_state(x, t)
        said = self.output(z, self.timestep(known), cond).float()
        return _VELOCITIES[self.pipe.scheduler.config.prediction_type](flow_state(z, known), said, known)

    def timestep(self, t: Tensor) -> Tensor:
        """Place in the table of the flow times t [N], float32: whole on the table, linear in sigma between its rows."""
        sigmas = ((1 - self._alphas) / self._alphas.clamp(min=_LEAST_ALPHA)).sqrt().to(t)
        sigma = (t / (1 - t)).clamp(sigmas[0], sigmas[-1])
        above = torch.searchsorted(sigmas, sigma).clamp(1, len(sigmas) - 1)
        low, high = sigmas[above - 1], sigmas[above]
        place = above - 1 + (sigma - low) / (high - low)
        whole = place.round()
        return torch.where((place - whole).abs() < _ROUNDING, whole, place)

    def times(self, num_steps: int, height: int, width: int, frames: int = 1) -> Tensor:
        """Flow times [T+1] float32 of the levels that the scheduler visits, then 0.

        Note: solvers that visit a level twice (PNDM, Heun) visit it once here, and ours are first-order steps: their
        grid, but not their path.
        """
        if self.grid != "scheduler":
            raise ModelError(
                f"model.grid is {self.grid!r}, but {type(self.pipe).__name__} is no flow model: its times come from "
                "the table of its scheduler. Leave model.grid out."
            )
        alphas = self._alphas
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes it
        scheduler.set_timesteps(num_steps)
        if hasattr(scheduler, "sigmas"):
            sigmas = torch.as_tensor(scheduler.sigmas)[:-1].cpu().double()
            times = sigmas / (1 + sigmas)
        else:
            times = flow_time(alphas[scheduler.timesteps.cpu().long()])
        times = times.unique().flip(0)
        if len(times) != num_steps:
            raise ModelError(
                f"model {self.path!r}: asked for {num_steps} steps, its {type(scheduler).__name__} visits {len(times)} "
                "levels, which make no grid. In scheduler/scheduler_config.json of a copy of the folder, set "
                "skip_prk_steps to true for a PNDMScheduler, or name another scheduler."
            )
        return torch.cat([times, times.new_zeros(1)]).float()

    def start(self, noise: Tensor, t: float) -> Tensor:
        """Noise [N,*L] read as the VP state at t: n(t) noise.

        Note: schedulers whose state is x0 + sigma eps may begin at sigma noise, with an x0 of zero (Euler's spacings
        "linspace" and "trailing"), which is t noise.
        """
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "sigmas") and math.isclose(
            float(scheduler.init_noise_sigma), float(scheduler.sigmas.max()), rel_tol=1e-6
        ):
            return t * noise
        return flow_state(noise, t)

    def check_guidance(self, guidance: float) -> None:
        """ModelError where the pipeline would rescale the guided prediction, which is not done here."""
        if guidance > 1 and self.inference.get("guidance_rescale"):
            raise ModelError(
                f"guidance_rescale is {self.inference['guidance_rescale']:g} in this model's inference.json, which "
                "flowrl does not do. Remove it there, or set model.guidance: 1."
            )

    @cached_property
    def _alphas(self) -> Tensor:
        """The table's levels A in float64; ModelError for a scheduler that does more than walk them."""
        scheduler = self.pipe.scheduler
        config, name = scheduler.config, type(scheduler).__name__
        reasons = {
            "has no alphas_cumprod": not hasattr(scheduler, "alphas_cumprod"),
            "clips its estimate of x0": config.get("clip_sample") or config.get("thresholding"),
            "has timesteps that are no places in its table": config.get("timestep_type", "discrete") != "discrete",
            f"predicts {config.get('prediction_type')!r}": config.get("prediction_type") not in _VELOCITIES,
        }
        for reason in (reason for reason, so_it_is in reasons.items() if so_it_is):
            raise ModelError(
                f"model {self.path!r}: its {name} {reason}, and so has no velocity in flow coordinates. Name another "
                "in scheduler/scheduler_config.json of a copy of the folder: DDIMScheduler with clip_sample false."
            )
        return scheduler.alphas_cumprod.double().cpu()
