"""Deterministic steps of the ODE dx/dt = v. They have no log-prob. Shapes: x, v [N, *L]; t, t_next [N]."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers.prediction import denoised, rows

__all__ = ["SOLVERS", "Solver", "dpmpp_2m", "euler", "heun"]

Solver = Literal["euler", "heun", "dpmpp_2m", "average"]
"""`average` is an Euler step along the mean velocity of the step, which only a model with two times can tell."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)


def euler(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Euler step x - (t - t_next) v, [N, *L]; first order, one velocity call."""
    return x - rows(t - t_next, x) * v


def heun(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, velocity_next: Callable[[Tensor], Tensor]) -> Tensor:
    """Heun step (arXiv:2206.00364, algorithm 1), [N, *L]; second order, two velocity calls.

    ``velocity_next(x)`` is the velocity at t_next. A step that ends at 0 should be an Euler step: networks are not
    trained at t = 0.
    """
    return euler(x, (v + velocity_next(euler(x, v, t, t_next))) / 2, t, t_next)


def dpmpp_2m(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
    """DPM-Solver++(2M) step (arXiv:2211.01095, algorithm 2, midpoint), [N, *L]; second order, one velocity call.

    ``previous`` is the (x0, t) of the step before, or None for a first-order step. Holds no state. In flow coordinates
    the paper's coefficient alpha' (1 - e^-h) is 1 - t_next/t, which is regular at both ends of the grid.
    A step that ends at 0 is first order: its log-SNR step is infinite.
    """
    x0 = denoised(x, v, t)
    target = x0
    if previous is not None:
        x0_before, t_before = previous
        ratio = (_log_snr(t_next) - _log_snr(t)) / (_log_snr(t) - _log_snr(t_before))
        ratio = torch.where(t_next > 0, ratio, torch.zeros_like(ratio))
        target = x0 + 0.5 * rows(ratio, x) * (x0 - x0_before)
    kept = rows(t_next / t, x)
    return kept * x + (1 - kept) * target


def _log_snr(t: Tensor) -> Tensor:
    return torch.log((1 - t) / t)
