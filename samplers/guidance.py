"""Reward guidance at inference: Flow-NRG (arXiv:2501.13918).

Weighing the data by exp(w r(x0)) adds w grad r_t to the score of every noised density, with the reward as a state shows
it, r_t(x) = log E[exp(w r(x0)) | x_t = x] / w. The score is -(x + (1 - t) v) / t, so the velocity changes by
-w t / (1 - t) grad r_t. A network trained on noised states stands for r_t.

Symbols: N states, *L latent dims; x [N, *L], t [N], 1 = noise; a guide r with its weight w.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.prediction import rows
from samplers.rollout import Velocity

__all__ = ["Guide", "reward_guided"]

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""guide(x [N, *L] fp32, t [N] fp32, prompt [N] int64) -> reward [N], each row from that row of x, t and prompt."""


def reward_guided(
    velocity: Velocity,
    guides: Sequence[tuple[Guide, float]],
    *,
    max_factor: float = 10.0,
    t_range: tuple[float, float] = (0.0, 1.0),
    max_ratio: float | None = None,
) -> Velocity:
    """The velocity v - sum_k w_k t / (1 - t) grad_x r_k(x, t, prompt), [N, *L] (Flow-NRG, arXiv:2501.13918).

    ``guides`` are pairs (r_k, w_k); a positive weight asks for more reward. t / (1 - t) is cut at ``max_factor``, as it
    is infinite at t = 1. States whose t is outside ``t_range`` (ends included) keep v to the last bit, and cost
    nothing. ``max_ratio`` shortens a correction whose norm is more than so many times that of its sample's v; None
    leaves it. Works under ``no_grad``, as in ``rollout``. The denoiser is called as often as without guides.

    ValueError for limits that make no sense, and, when called, for a guide whose reward is not [N], does not depend on
    x, or has a gradient that is not finite.
    """
    low, high = t_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"t_range is ({low:g}, {high:g}); give 0 <= low < high <= 1, where 1 is pure noise.")
    if not 0 < max_factor < math.inf:
        raise ValueError(f"max_factor is {max_factor:g}; give a positive number: t / (1 - t) is cut at it.")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio is {max_ratio:g}; give a positive number, or None for no limit.")
    if not all(math.isfinite(weight) for _, weight in guides):
        raise ValueError(f"the guides' weights are {[weight for _, weight in guides]}; each must be finite.")
    pulling = [(guide, weight) for guide, weight in guides if weight != 0]
    if not pulling:
        return velocity

    def guided(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        v = velocity(x, t, prompt)
        inside = torch.nonzero((low <= t) & (t <= high)).flatten()
        if not len(inside):
            return v
        x, t, prompt = x[inside], t[inside].float(), prompt[inside]
        correction = rows((t / (1 - t)).clamp(max=max_factor), x) * _gradient(pulling, x, t, prompt)
        if max_ratio is not None:
            limit = max_ratio * v[inside].float().flatten(1).norm(dim=1)
            # The smallest normal number keeps 0 / 0 out where a guide is flat.
            length = correction.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            correction = rows((limit / length).clamp(max=1), x) * correction
        return v.index_add(0, inside, correction.to(v.dtype), alpha=-1)

    return guided


def _gradient(guides: Sequence[tuple[Guide, float]], x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """sum_k w_k grad_x r_k, [N, *L] fp32."""
    total = torch.zeros_like(x, dtype=torch.float32)
    for number, (guide, weight) in enumerate(guides):
        with torch.enable_grad():
            state = x.detach().float().requires_grad_()
            reward = guide(state, t, prompt)
            if reward.shape != t.shape:
                raise ValueError(f"guide {number} returned {tuple(reward.shape)} for {len(t)} states; one number each.")
            gradient = torch.autograd.grad(reward.sum(), state, allow_unused=True)[0] if reward.requires_grad else None
        if gradient is None:
            raise ValueError(
                f"the reward of guide {number} does not depend on x, so it has no direction to guide in. Let it "
                "compute with x itself: no .detach(), no no_grad, no numpy."
            )
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"the gradient of guide {number} is not finite at t = {t[0].item():.3g}: one such state spoils its "
                "sample. Check the guide there, or leave these times out with t_range."
            )
        total += weight * gradient
    return total
