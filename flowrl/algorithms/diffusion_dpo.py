"""Diffusion-DPO (arXiv:2311.12908): the preference loss on errors of the noise, for models that predict it.

| symbol | here |
|---|---|
| |eps - eps_theta(x_t, t)|^2 | (1 - t)^2 mean (u - v)^2: eps = x + (1 - t) v, with v in flow coordinates |
| beta T omega(lambda_t), a constant in practice | beta |
| x_t^w, x_t^l | the rows of a pair with credit +1 and -1, at one t with one eps |
| ref | the initial weights |
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from flowrl.algorithms.preference import Preference, TimeSamplingName


class DiffusionDPO(Preference):
    """Diffusion-DPO (arXiv:2311.12908): -log sigmoid(-(beta / 2) [(m_w - r_w) - (m_l - r_l)]), m and r mean eps errors.

    beta 5000 is the official code's, with a learning rate of 2e-5 (1e-8 scaled by a batch of 2048), AdamW and 2000
    steps on Pick-a-Pic; it multiplies a mean over the latent dimensions, so a sum needs beta / D.

    Note: times are uniform in t; the paper's are uniform in the timesteps of a variance-preserving schedule, which lie
    closer to noise in t. Raise time_shift to have them there.
    Note: latents are encoded once for both sides; the official code draws each from the encoder's posterior.
    """

    time_sampling: TimeSamplingName = "uniform"
    beta: Annotated[float, Field(description="Strength of a pair, on the mean squared error of the noise.", gt=0)] = (
        5000.0
    )

    def strength(self, t: Tensor) -> Tensor:
        """`beta` (1 - t)^2 [N]: the error of eps is 1 - t times that of the velocity."""
        return self.beta * (1 - t) ** 2
