"""How far from 1 the ratio of an untouched policy is on this machine: by precision, and by how the batch is cut.

A policy that has not moved must give the log-probability again that its rollout stored. In bfloat16 a matrix product
may round otherwise in a batch of another size; then the ratio is off before anything was learnt, and a tight clip
range clips noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from flowrl.models import load
from flowrl.types import take
from samplers import Trajectory, all_steps, flow_sde, gaussian_logprob, noise_source, rollout

ETA = 0.7


class Deviation(NamedTuple):
    """The largest |ratio - 1| over the steps of a rollout that is evaluated again."""

    dtype: str
    same_batch: float
    one_by_one: float


def deviations(
    path: str = "shapes", device: str | torch.device = "cpu", *, samples: int = 8, num_steps: int = 4, seed: int = 0
) -> Iterator[Deviation]:
    """float32 and bfloat16 on a device: `samples` of the model drawn together, evaluated again together and singly."""
    for dtype in (torch.float32, torch.bfloat16):
        model = load(path, device=device, dtype=dtype)
        cond = model.encode(["a red circle and a blue star"], stand_ins(model))
        roots, zero = torch.arange(samples), torch.zeros(samples, dtype=torch.long)
        frames = getattr(model, "frames", 1)
        shape = model.noise_shape(model.height, model.width, frames)
        noise = noise_source(shape, seed=seed, iteration=0, prompt=roots, device=device)
        plan = all_steps(model.times(num_steps, model.height, model.width, frames))
        with torch.no_grad():
            walked = rollout(
                lambda x, t, i, model=model, cond=cond: model.velocity(x, t, take(cond, torch.zeros_like(i))),
                model.start(noise(roots, zero, -1), plan.times[0]), plan, flow_sde, eta=ETA,
                prompt=roots, group=roots, noise=noise,
            )  # fmt: skip
            apart = [
                max(_apart(model, cond, walked, list(part)) for part in torch.arange(len(walked.t)).split(size))
                for size in (samples, 1)
            ]
        yield Deviation(str(dtype).removeprefix("torch."), *apart)


def stand_ins(model: Any, height: int | None = None, width: int | None = None) -> list[tuple[torch.Tensor, ...]]:
    """Black source pictures of one prompt, as few as the model must have, each [3,H,W]; [] where it needs none."""
    needed = getattr(model, "num_sources", (0, 0))[0]
    sides = (height or model.height, width or model.width)
    return [tuple(torch.zeros(3, *sides) for _ in range(needed))] if needed else []


def _apart(model: object, cond: dict[str, torch.Tensor], walked: Trajectory, rows: list[int]) -> float:
    some = walked.select(torch.tensor(rows))
    v = model.velocity(some.x, some.t, take(cond, torch.zeros(len(rows), dtype=torch.long)))  # type: ignore[attr-defined]
    again = gaussian_logprob(some.x_next, flow_sde(some.x, v, some.t, some.t_next, ETA))
    return float(((again - some.logprob).exp() - 1).abs().max())
