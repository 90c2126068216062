"""Log-probabilities and KL divergences of Gaussian steps, with the reduction over latent dims always explicit."""

import math
from typing import Literal

from torch import Tensor

from samplers.kernels import Transition

__all__ = ["Reduction", "gaussian_kl", "gaussian_logprob"]

Reduction = Literal["mean", "sum"]


def gaussian_logprob(x_next: Tensor, transition: Transition, reduction: Reduction = "mean") -> Tensor:
    """log N(x_next; mean, std^2) with all constants, reduced over every non-batch dim: [N] fp32.

    ``"sum"`` is the log-density. ``"mean"`` divides it by the number of latent dims D, which is this field's habit:
    a clip range of 1e-4 on the mean allows 1e-4 * D nats. Raises ValueError when std is 0.
    """
    mean, std = transition
    _check_std(std)
    z = (x_next.to(mean.dtype) - mean) / std
    return _reduce(-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def gaussian_kl(p: Transition, q: Transition, reduction: Reduction = "mean") -> Tensor:
    """Exact KL(p || q) of two Gaussian steps, reduced over every non-batch dim: [N] fp32.

    With equal std it is (mean_p - mean_q)^2 / (2 std^2). Raises ValueError when a std is 0.
    """
    _check_std(p.std)
    _check_std(q.std)
    scale = p.std / q.std
    distance = ((p.mean - q.mean) / q.std).square()
    return _reduce(0.5 * (distance + scale.square() - 1) - scale.log(), reduction)


def _reduce(value: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return value.flatten(1).mean(1)
    if reduction == "sum":
        return value.flatten(1).sum(1)
    raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}.')


def _check_std(std: Tensor) -> None:
    if not bool((std > 0).all()):
        raise ValueError(
            "this step adds no noise (std is 0), so it has no log-prob. Make it an ODE step in the plan, or raise eta; "
            "cps and ddim never add noise in a step that ends at t = 0."
        )
