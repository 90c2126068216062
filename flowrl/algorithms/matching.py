"""The forward process: finished samples are noised to a time, and the velocity there is compared with the one that was.

In flow coordinates x_t = (1 - t) x0 + t eps and the velocity to match is u = eps - x0 (arXiv:2210.02747). No log-prob
is needed, so that samples may come from any ODE solver, from disk, or from another model.

Errors are means over the latent dimensions: what a coefficient multiplies does not grow with resolution. A sum over D
dimensions, as some papers write it, is D times as large.

Symbols: N rows (draws), B samples, P prompts, K samples of a prompt, *L latent dimensions.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowrl.types import Batch, Cond, Draws, Policy
from samplers import keyed_noise, rows, stable_seed

TimeSampling = Literal["grid", "uniform", "logit_normal"]
_TIMES = -3
_FIRST = 1 << 16
"""Number of the first draw's noise: steps of a rollout, whose noise has the same kind of key, have smaller ones."""


class Noised(NamedTuple):
    """Rows taken to their times."""

    x: Tensor
    """x_t [N,*L]."""
    t: Tensor
    """[N]"""
    x0: Tensor
    """[N,*L]"""
    noise: Tensor
    """eps [N,*L]."""
    cond: Cond

    @property
    def target(self) -> Tensor:
        """u = eps - x0, the velocity that leads to this x0, [N,*L]."""
        return self.noise - self.x0


class Velocities(NamedTuple):
    """What the policies say of the same states, [N,*L] each."""

    current: Tensor
    """With its graph."""
    old: Tensor | None = None
    reference: Tensor | None = None


def noised(batch: Batch) -> Noised:
    """The rows of a batch at their times, with the noise that their keys name."""
    draws = batch.draws
    assert draws is not None
    x0 = batch.trajectory.x0[draws.sample].float()
    noise = noise_of(batch, draws).to(x0)
    t = rows(draws.t, x0)
    return Noised((1 - t) * x0 + t * noise, draws.t, x0, noise, batch.cond_at(batch.leaf_prompt[draws.sample]))


def noise_of(batch: Batch, draws: Draws) -> Tensor:
    """Noise [N,*L] of the rows, on the CPU; each key is drawn once."""
    shape = batch.trajectory.x0.shape[1:]
    keys, of_row = torch.unique(draws.key.cpu(), dim=0, return_inverse=True)
    drawn = [
        keyed_noise(shape, seed=batch.seed, iteration=batch.iteration, prompt=place, member=member, step=number)
        for place, member, number in keys.tolist()
    ]
    return torch.stack(drawn)[of_row] if drawn else torch.zeros(0, *shape)


def velocities(policy: Policy, at: Noised, *, old: bool = False, reference: bool = False) -> Velocities:
    """The trained policy's velocity with its graph, and those of the old and the initial weights without.

    While the old policy is the trained one, its velocity is not asked for a second time.
    """
    initial = before = None
    with torch.no_grad():
        if old and not policy.old_is_current:
            with policy.old():
                before = policy.velocity(at.x, at.t, at.cond).float()
        if reference:
            with policy.reference():
                initial = policy.velocity(at.x, at.t, at.cond).float()
    current = policy.velocity(at.x, at.t, at.cond).float()
    if old and before is None:
        before = current.detach()
    return Velocities(current, before, initial)


def mean_square(difference: Tensor) -> Tensor:
    """Mean over the latent dimensions of a squared difference [N,*L] -> [N]."""
    return difference.square().flatten(1).mean(1)


def scaled_square(difference: Tensor) -> Tensor:
    """Mean square [N] divided by the mean size, which is cut from the graph: DiffusionNFT's self-normalised error.

    Distribution matching distillation (arXiv:2311.18828) weighs its gradient in the same way.
    """
    size = difference.detach().abs().double().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(difference) / size.to(difference)


def samples_of_rows(batch: Batch) -> Tensor:
    """Where the sample of each draw [N] stands in `batch.rewards`, while credit is given."""
    assert batch.draws is not None and batch.place is not None
    return batch.place[batch.draws.sample.to(batch.place.device)]


def every_sample(
    batch: Batch, count: int, sampling: TimeSampling, *, low: float, high: float, times: Tensor, shift: float = 1.0,
    share: bool = False,
) -> Draws:  # fmt: skip
    """`count` draws of each sample; with `share` those of a prompt have times and noises in common, and are one unit.

    The times of a sample are stratified, so that a few of them cover [low, high]: `grid` takes different times of
    `times` [T+1] that lie in it (0 left out), `uniform` and `logit_normal` one of each of `count` equal shares of the
    distribution, pushed towards noise by `shift` s: s t / (1 + (s - 1) t).
    """
    group, member = batch.trajectory.group.cpu(), member_of(batch)
    number = torch.arange(count)
    sample = torch.arange(len(group)).repeat_interleave(count)
    named = torch.zeros_like(member) if share else member
    key = torch.stack([group[sample], named[sample], _FIRST + number.repeat(len(group))], 1)
    drawn = {
        k: _times(count, sampling, low, high, times, shift, stable_seed(batch.seed, batch.iteration, *k, _TIMES))
        for k in dict.fromkeys(zip(group.tolist(), named.tolist(), strict=True))
    }
    t = torch.cat([drawn[k] for k in zip(group.tolist(), named.tolist(), strict=True)])
    unit = torch.unique(key, dim=0, return_inverse=True)[1]
    device = batch.trajectory.x0.device
    return Draws(sample=sample.to(device), t=t.float().to(device), key=key.to(device), unit=unit.to(device))


def every_pair(
    batch: Batch, pairs: Tensor, count: int, sampling: TimeSampling, *, low: float, high: float, times: Tensor,
    shift: float = 1.0, share: bool = False,
) -> Draws:  # fmt: skip
    """`count` draws of each pair [M,2] of samples of a group: two rows a draw, one unit, with one time and one noise.

    The times of a pair are stratified as those of a sample in `every_sample`; with `share` all pairs of a prompt have
    times and noises in common.
    """
    pairs, member = pairs.cpu(), member_of(batch)
    place = batch.trajectory.group.cpu()[pairs[:, 0]]
    first, second = (torch.zeros_like(place) if share else member[side] for side in pairs.T)
    number = _FIRST + second[:, None] * count + torch.arange(count)
    name = torch.stack([place[:, None].expand_as(number), first[:, None].expand_as(number), number], -1)
    t = [
        _times(count, sampling, low, high, times, shift, stable_seed(batch.seed, batch.iteration, *k, _TIMES))
        for k in zip(place.tolist(), first.tolist(), second.tolist(), strict=True)
    ]
    device = batch.trajectory.x0.device
    return Draws(
        sample=pairs[:, None].expand(-1, count, 2).flatten().to(device),
        t=torch.cat([torch.zeros(0), *t]).float().repeat_interleave(2).to(device),
        key=name.flatten(0, 1).repeat_interleave(2, 0).to(device),
        unit=torch.arange(len(pairs) * count).repeat_interleave(2).to(device),
    )


def grid_times(times: Tensor, low: float, high: float) -> Tensor:
    """The times of a grid [T+1] in [low, high] that a sample can be taken to, float64; 0 is the sample itself."""
    return times.double()[(times > 0) & (times >= low) & (times <= high)]


def member_of(batch: Batch) -> Tensor:
    """Number of each sample [B] within its group; groups stand together."""
    group = batch.trajectory.group.cpu()
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    index = torch.arange(len(group))
    return index - torch.cummax(torch.where(first, index, 0), 0).values


def unit_sum(values: Tensor, unit: Tensor) -> Tensor:
    """Sum of `values` [N] over the rows of each unit, given back to each of its rows [N]."""
    names, of_row = torch.unique(unit, return_inverse=True)
    return values.new_zeros(len(names)).index_add(0, of_row, values)[of_row]


def unit_mean(values: Tensor, unit: Tensor) -> Tensor:
    """Mean of `values` [N] over the rows of each unit, given back to each of its rows [N]."""
    return unit_sum(values, unit) / unit_sum(torch.ones_like(values), unit)


def _times(
    count: int, sampling: TimeSampling, low: float, high: float, times: Tensor, shift: float, seed: int
) -> Tensor:
    """`count` times in random order, float64."""
    generator = torch.Generator().manual_seed(seed)
    if sampling == "grid":
        inside = grid_times(times, low, high)
        return inside[torch.randperm(len(inside), generator=generator)[:count]]
    share = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator).double()) / count
    if sampling == "logit_normal":
        share = torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)).sigmoid()
    t = low + (high - low) * share
    return shift * t / (1 + (shift - 1) * t)
