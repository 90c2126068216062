"""MeanFlowNFT (of MeanFlow, arXiv:2505.13447, and DiffusionNFT, arXiv:2509.16117): NFT for few-step generators.

| symbol | here |
|---|---|
| u(x, r, t), the average velocity between t and r | policy.velocity with the condition `t_next` = r |
| V = u + (t - r) sg[du/dt], the velocity at t that u implies | du/dt once, on the old policy, for V, V_old and V_ref |
| d = eps - x0, the direction in which x moves with t | `at.target` |
| du/dt = [u(x + e d, r, t + e) - u(x - e d, r, t - e)] / 2e | `drift`, e = probe |
| (t, r), the larger and the smaller of two uniform times | `draws`; of a share r = t, of another r = 0 |
| v+, v-, beta, r of DiffusionNFT; Z_c | `diffusion_nft.branches` on V; adv_clip |

With r = t everywhere (same_time 1) it is DiffusionNFT.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.diffusion_nft import branches
from flowrl.algorithms.forward_process import Decay, DrawsPerSample, GroupCredit
from flowrl.algorithms.matching import Noised, every_sample, mean_square, noised, velocities
from flowrl.schedules import value_at
from flowrl.types import T_NEXT, Batch, Draws, Loss, Needs, Policy
from samplers import rows, stable_seed

_SECOND = -8


class MeanFlowNFT(GroupCredit):
    """MeanFlowNFT (after arXiv:2505.13447, arXiv:2509.16117): DiffusionNFT's loss on V, for a model with two times.

    Note: the shares of rows with r = t and r = 0 hold for each sample on the average, where the public code takes the
    first half and the next quarter of the whole batch; with 4 draws a sample has exactly 2 and 1 of them.
    Note: the average in `optimizer.ema_decay` is 0.9 there, and the embedding of the second time learns as a whole
    beside LoRA; here it learns with the rest of the weights, or gets an adapter where model.lora.targets names it.
    """

    num_steps: fields.ODESteps = 4
    solver: Annotated[
        Literal["average"], Field(description="A step is the mean velocity's; refused for a model with one time.")
    ] = "average"
    draws_per_sample: DrawsPerSample = 4
    same_time: Annotated[
        float, Field(description="Share of the draws with r = t, which cost no derivative.", ge=0, le=1)
    ] = 0.5
    to_end: Annotated[float, Field(description="Share of the draws with r = 0.", ge=0, le=1)] = 0.25
    time_shift: Annotated[float, Field(description="Above 1 pushes both times to noise.", gt=0)] = 1.0
    probe: Annotated[
        float,
        Field(
            description="e, half the span of the central difference in t; in bfloat16 its rounding is as large as what "
            "it measures, so keep model.dtype=float32.",
            gt=0,
            le=0.1,
        ),
    ] = 0.005
    decay: Decay = ((0.0, 0.0), (500.0, 0.5))
    beta: Annotated[
        float, Field(description="Part of the step from V_old to V in v+; the smaller, the larger the moves.", gt=0)
    ] = 0.1

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.same_time + self.to_end > 1:
            raise ValueError(
                f"same_time={self.same_time:g} and to_end={self.to_end:g} are shares of the same draws and add up to "
                "more than 1; lower one of them."
            )
        return self

    @property
    def needs(self) -> Needs:
        """No log-probs; the old policy, and the initial weights for a distance to them."""
        return super().needs._replace(old=True, own_rollout=True)

    def old_decay(self, iteration: int) -> float:
        """`decay` after this iteration."""
        return value_at(self.decay, iteration)

    def draws(self, batch: Batch) -> Draws | None:
        """Each sample at `draws_per_sample` times t, each with its r <= t in `t_next`."""
        assert batch.times is not None
        count = self.draws_per_sample
        drawn = every_sample(batch, count, "uniform", low=0.0, high=1.0, times=batch.times)
        # The larger of two uniform times is the root of a uniform one, and the smaller uniform below it.
        t = drawn.t.sqrt()
        share, kind = _second_times(batch, drawn)
        r = torch.where(kind < self.same_time + self.to_end, 0.0, t * share)
        r = torch.where(kind < self.same_time, t, r)
        return replace(drawn, t=_shifted(t, self.time_shift), t_next=_shifted(r, self.time_shift))

    def probes(self, draws: Draws) -> int:
        """Two evaluations of the old policy for each row with r < t."""
        assert draws.t_next is not None
        return 2 * int((draws.t_next < draws.t).sum())

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss of the rows: `adv_clip` times the mean of the two branches over beta, of the implied velocities."""
        assert batch.advantages is not None and batch.draws is not None and batch.draws.t_next is not None
        at, r = noised(batch), batch.draws.t_next
        at = at._replace(cond={**at.cond, T_NEXT: r})
        implied = rows(at.t - r, at.x) * drift(policy, at, r, self.probe)  # V - u
        u = velocities(policy, at, old=True, reference=self.kl_coef > 0)
        assert u.old is not None
        share = (batch.advantages / (2 * self.adv_clip) + 0.5).clamp(0, 1)
        loss = self.adv_clip * branches(u.current + implied, u.old + implied, at.target, at.t, share, self.beta)
        found = self.total(loss, u, batch)
        return found._replace(metrics={**found.metrics, "implied": mean_square(implied).mean()})


@torch.no_grad()
def drift(policy: Policy, at: Noised, r: Tensor, probe: float) -> Tensor:
    """du/dt [N,*L] of the old policy along x_t with r fixed; 0 in rows with r = t, where it is not asked for."""
    found = torch.zeros_like(at.x)
    apart = torch.nonzero(r < at.t).flatten()
    if not len(apart):
        return found
    x, t, d = at.x[apart], at.t[apart], at.target[apart]
    cond = {name: tensor[apart.to(tensor.device)] for name, tensor in at.cond.items()}
    with policy.old():
        ahead, behind = (policy.velocity(x + e * d, t + e, cond) for e in (probe, -probe))
    found[apart] = ((ahead - behind) / (2 * probe)).to(found)
    return found


def _second_times(batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """Of each row a uniform number, and its place among the draws of its sample, both in [0, 1); [N] each."""
    keys = draws.key.cpu()
    samples, of_row = torch.unique(keys[:, :2], dim=0, return_inverse=True)
    count = len(keys) // len(samples)
    generators = [
        torch.Generator().manual_seed(stable_seed(batch.seed, batch.iteration, *sample, _SECOND))
        for sample in samples.tolist()
    ]
    drawn = torch.stack([torch.rand(count + 1, generator=generator) for generator in generators])
    number = keys[:, 2] - keys[:, 2].min()
    # One offset for all draws of a sample: their places are 1 / count apart, and each is uniform by itself.
    place = (number + drawn[of_row, 0]) / count
    return drawn[of_row, 1 + number].to(draws.t), place.to(draws.t)


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)
