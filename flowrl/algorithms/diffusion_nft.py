"""DiffusionNFT (arXiv:2509.16117): good samples pull the velocity, bad ones push it, and the old policy is the brake.

| symbol | here |
|---|---|
| v_old, which draws the samples | policy.old(), moved by `decay` |
| r = clip(A / (2 Z_c) + 1/2, 0, 1) | share of the positive branch; Z_c = adv_clip |
| v+ = (1 - beta) v_old + beta v, v- = (1 + beta) v_old - beta v | `branches` |
| decay schedules of the official code | [[0, 0], [500, 0.5]], or [[75, 0], [208.2, 0.999]], or 0 |
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from flowrl.algorithms.forward_process import ForwardProcess
from flowrl.algorithms.matching import noised, scaled_square, velocities
from flowrl.types import Batch, Loss, Policy


class DiffusionNFT(ForwardProcess):
    """DiffusionNFT (arXiv:2509.16117): Z_c mean[r l+ / beta + (1 - r) l- / beta], l the error of x0 under v+ and v-.

    With equal normalisers this is advantage-weighted regression with a quadratic brake of strength beta on v - v_old:
    (t^2/w) [|e|^2 / beta + 2 (2r - 1) <e, d> + beta |d|^2], e = v_old - u, d = v - v_old.
    """

    beta: Annotated[
        float, Field(description="Part of the step from v_old to v in v+; the smaller, the larger the moves.", gt=0)
    ] = 0.1
    kl_coef: Annotated[
        float, Field(description="Weight of mean (v - v_ref)^2; the official 1e-4 goes with adv_clip 5.", ge=0)
    ] = 0.0

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss of the rows; `adv_clip` times the mean of the two branches over beta."""
        assert batch.advantages is not None
        at = noised(batch)
        v = velocities(policy, at, old=True, reference=self.kl_coef > 0)
        assert v.old is not None
        share = (batch.advantages / (2 * self.adv_clip) + 0.5).clamp(0, 1)
        loss = self.adv_clip * branches(v.current, v.old, at.target, at.t, share, self.beta)
        return self.total(loss, v, batch)


def branches(v: Tensor, v_old: Tensor, target: Tensor, t: Tensor, share: Tensor, beta: float) -> Tensor:
    """r l+ / beta + (1 - r) l- / beta [N] of velocities [N,*L]; `share` r [N], times t [N]."""
    time = t.view(-1, *[1] * (v.dim() - 1))
    move = beta * (v - v_old)
    # The error of x0 = x_t - t v is -t times that of v.
    positive = scaled_square(time * (v_old + move - target))
    negative = scaled_square(time * (v_old - move - target))
    return (share * positive + (1 - share) * negative) / beta
