"""SRPO (arXiv:2509.06942): one known noise, one step, and a reward that is the difference of two wordings.

| symbol | here |
|---|---|
| z, the noise that made x0, the known prior | drawn again by its key: the rollout's initial noise is not stored |
| x = (1 - sigma_in) x0 + sigma_in z | the row's state at `draws.t`; denoise comes from above, inversion from below |
| x' = x + (sigma_out - sigma_in) v | to `draws.t_next`, the same time from both sides |
| x0_hat = (x' - sigma_out z) / (1 - sigma_out), Direct-Align | `recovered`: exact where v is, whatever sigma_out |
| sigma in [g_b, g_a] | time_range |
| kappa = (1 - groundtruth_ratio) L | interval, as a share of that range |
| d+, d-, discounts | discount_positive, discount_negative at the lower of the two times |
| s(p, n; k) = <f, (1 + k) c_p - c_n>, semantic relative preference | batch.critic.relative |
| control words | positive, negative: one of each an iteration, in turn |

Denoise ascends s(positive, negative), inversion s(negative, positive). The gain dx0_hat/dv = (sigma_out - sigma_in) /
(1 - sigma_out) is negative in the first and positive in the second, and a generated x0 moves against v: both turn it to
the positive words, and what the reward likes whatever the words cancels out.
"""

from dataclasses import replace
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.direct_gradient import DirectGradient, Margin, below
from flowrl.algorithms.matching import every_sample, noised
from flowrl.types import Batch, Draws, Loss, Needs, Policy
from samplers import rows

_INITIAL = -1
"""Number of a rollout's initial noise among the noises of its sample."""

Ends = tuple[float, float]


class SRPO(DirectGradient):
    """SRPO (arXiv:2509.06942): mean of -s over a denoise and an inversion row for each time of each sample.

    Samples from disk (`data.samples: stored`) serve as well: their noise is then fresh in every iteration.
    Note: margin is null where the official code has ReLU(0.7 - s), which does not bind at its rewards of about 0.05,
    but would at those of a reward with a larger scale.
    Note: times lie a whole interval inside the range; the official step shrinks at its ends. Times are not rounded to
    whole timesteps, and each sample has a time of its own. Guidance is that of the run, in rollout and training.
    """

    num_steps: fields.ODESteps = 25
    shift: fields.Shift = 3.0
    solver: fields.SolverName = "euler"
    margin: Margin = None
    draws_per_sample: Annotated[
        fields.Count, Field(description="Times at which each sample is recovered; each is two rows with both branches.")
    ] = 1
    time_range: Annotated[
        Ends,
        Field(description="Lowest and highest time of a row; high ones bend layout, low ones invite colour hacking."),
    ] = (0.75, 0.9643)
    interval: Annotated[float, Field(description="Length of a row's step, a share of time_range.", gt=0, lt=0.5)] = 0.1
    inversion: Annotated[
        bool, Field(description="The branch that meets the denoising one from below; without it expect hacking.")
    ] = True
    positive: Annotated[
        tuple[str, ...],
        Field(description="Words put before a prompt, one an iteration in turn, that the reward knows.", min_length=1),
    ] = ("Natural-lighting", "Detail", "Detailed", "Real")
    negative: Annotated[
        tuple[str, ...],
        Field(description="The same for what is unwanted; an empty word leaves the prompt alone.", min_length=1),
    ] = ("Concept art", "Painting", "Anime", "Flat", "Oil")
    discount_positive: Annotated[
        Ends, Field(description="k of the denoise branch at the low and the high end of time_range; linear between.")
    ] = (0.1, 0.25)
    discount_negative: Annotated[Ends, Field(description="k of the inversion branch, likewise.")] = (0.3, 0.01)

    @model_validator(mode="after")
    def _times_exist(self) -> Self:
        low, high = self.time_range
        if not 0 < low < high < 1:
            raise ValueError(
                f"time_range={list(self.time_range)} must be rising and lie inside (0, 1): at 1 nothing of the sample "
                "is left to recover, at 0 nothing of the noise."
            )
        return self

    @property
    def needs(self) -> Needs:
        """Rewards with a gradient in the loss, one of them with features of pictures and texts."""
        return super().needs._replace(features=True)

    def draws(self, batch: Batch) -> Draws:
        """Two rows for each time of each sample: from above (t > t_next) and, with `inversion`, from below."""
        assert batch.times is not None
        step = self.interval * (self.time_range[1] - self.time_range[0])
        low, high = self.time_range[0] + step, self.time_range[1] - step
        out = every_sample(batch, self.draws_per_sample, "uniform", low=low, high=high, times=batch.times)
        key = out.key.clone()
        key[:, 2] = _INITIAL
        denoise = replace(out, t=out.t + step, key=key, unit=torch.arange(len(out), device=key.device), t_next=out.t)
        return denoise if not self.inversion else _interleaved(denoise, replace(denoise, t=out.t - step))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Minus the preference of each row's own branch, mean over the rows."""
        assert batch.draws is not None and batch.draws.t_next is not None and batch.critic is not None
        at, out = noised(batch), batch.draws.t_next
        v = policy.velocity(at.x, at.t, at.cond).float()
        preference = self.preference(batch, recovered(at.x, v, at.noise, at.t, out), at.t, out)
        loss = self.total(preference, self.distance(policy, v, at.x, at.t, at.cond))
        told, denoise = preference.detach(), at.t > out
        loss.metrics["reward/mean"] = told[denoise].nanmean()
        if self.inversion:
            loss.metrics["reward/inversion"] = told[~denoise].nanmean()
        return loss

    def shortfall(self, reward: Tensor) -> Tensor:
        """-s, or ReLU(margin - s) [N]."""
        return below(self.margin, reward)

    def preference(self, batch: Batch, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """s [N] of recovered x0 [N,*L], with its graph: denoise rows want the positive words, others the negative."""
        assert batch.draws is not None and batch.critic is not None
        words = [words[batch.iteration % len(words)] for words in (self.positive, self.negative)]
        low, high = self.time_range
        along = (torch.minimum(t, t_next) - low) / (high - low)
        prompt = batch.leaf_prompt[batch.draws.sample].tolist()
        found = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
        branches = ((t > t_next, words, self.discount_positive), (t < t_next, words[::-1], self.discount_negative))
        for mine, (wanted, unwanted), (first, last) in branches:
            index = torch.nonzero(mine).flatten()
            if len(index):
                prompts = [batch.prompts[prompt[i]] for i in index.tolist()]
                k = torch.lerp(torch.full_like(along, first), torch.full_like(along, last), along)[index]
                found = found.index_put((index,), batch.critic.relative(x0[index], prompts, wanted, unwanted, k))
        return found


def recovered(x: Tensor, v: Tensor, noise: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Direct-Align: x0 [N,*L] by one step t -> t_next [N] along v and the noise in x; exact if v = noise - x0."""
    out = rows(t_next, x)
    return (x + (out - rows(t, x)) * v - out * noise) / (1 - out)


def _interleaved(first: Draws, second: Draws) -> Draws:
    """Row by row of two that have equally many, each pair of them one unit."""
    index = torch.arange(len(first), device=first.t.device)
    order = torch.stack([index, index + len(first)], 1).flatten()
    names = ("sample", "t", "key", "unit", "t_next")
    return Draws(**{name: torch.cat([getattr(first, name), getattr(second, name)])[order] for name in names})
