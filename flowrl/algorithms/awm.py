"""AWM, advantage weighted matching (arXiv:2509.25050): the matching error stands in for the log-probability in GRPO.

| symbol | here |
|---|---|
| l, log-likelihood of a sample | `pseudo_logprob`: minus a weight of mean (v - u)^2, at one time and noise |
| w(t), or a robust form of the error | weighting |
| rho = exp(l - l_old) | same time, same noise; l_old by policy.old(), which draws the samples |
| A_i | credit |
| epsilon; beta | clip_range; kl_coef |
| EMA regulariser of the SD3.5 recipe | old_coef |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.forward_process import Decay, DrawsPerSample, ForwardProcess, TimeRange
from flowrl.algorithms.matching import mean_square, noised, velocities
from flowrl.algorithms.objectives import MAX_LOG_RATIO
from flowrl.types import Batch, Loss, Policy

Weighting = Literal["uniform", "time", "time_squared", "huber", "ghuber"]
_ROUND, _POWER = 1e-10, 0.25


class AWM(ForwardProcess):
    """AWM (arXiv:2509.25050): mean max(-A rho, -A clip(rho)) with rho from matching errors, and two distances.

    The first update is -A grad l, advantage-weighted matching. A bad sample is pushed away until its error has grown by
    about 1, so that a brake is needed: `old_coef` or a small `clip_range`. The defaults are the authors' for SD3.5 at
    512 px, where `clip_range` 1 hardly clips and `old_coef` brakes.
    Note: the policy whose average `old_coef` holds on to also draws the samples and gives l_old; the public code has
    the average beside the policy of the iteration's start.
    """

    num_steps: fields.ODESteps = 14
    draws_per_sample: DrawsPerSample = 6
    time_range: TimeRange = (0.1, 1.0)
    weighting: Annotated[
        Weighting, Field(description="What becomes of the error e: e, t e, t^2 e, t sqrt(e), or t 4 e^(1/4) (ghuber).")
    ] = "ghuber"
    clip_range: fields.ClipRange = 1.0
    adv_clip: fields.AdvClip = 1.0
    kl_coef: fields.KLCoef = 1e-4
    old_coef: Annotated[float, Field(description="Weight of mean (v - v_old)^2, the brake.", ge=0)] = 1.0
    decay: Decay = ((0, 0.0), (300, 0.3))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The clipped loss of the rows, and the distances to the old policy and to the initial weights."""
        assert batch.advantages is not None
        at = noised(batch)
        v = velocities(policy, at, old=True, reference=self.kl_coef > 0)
        assert v.old is not None
        error = mean_square(v.current - at.target)
        old_error = mean_square(v.old - at.target)
        change = pseudo_logprob(error, at.t, self.weighting) - pseudo_logprob(old_error, at.t, self.weighting)
        ratio = change.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        low, high = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)
        free, clipped = -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - low, 1 + high)
        loss = torch.maximum(free, clipped) + self.old_coef * mean_square(v.current - v.old)
        found = self.total(loss, v, batch)
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        seen = {
            "error": error.detach().mean(),
            "ratio_mean": ratio.detach().mean(),
            "clip_frac": outside.float().mean(),
        }
        return Loss(found.value, found.metrics | seen)


def pseudo_logprob(error: Tensor, t: Tensor, weighting: Weighting) -> Tensor:
    """What stands in for log p(x0) [N], from mean (v - u)^2 [N] at times t [N]; 0 where the velocity is exact.

    uniform       -e
    time          -t e
    time_squared  -t^2 e, the error of x0
    huber         -t (sqrt(e + 1e-10) - 1e-5)
    ghuber        -t ((e + 1e-10)^p - 1e-10^p) / p, p = 1/4
    """
    if weighting == "uniform":
        return -error
    if weighting == "time":
        return -t * error
    if weighting == "time_squared":
        return -(t**2) * error
    power = 0.5 if weighting == "huber" else _POWER
    scale = 1.0 if weighting == "huber" else 1 / power
    return -t * scale * ((error + _ROUND) ** power - _ROUND**power)
