"""Kernels: how one stochastic step moves x from t to t_next, as a Gaussian.

Every published step is one of two formulas with one scalar per sample. With x0 = x - t v and eps = x + (1-t) v:

    euler_maruyama   mean = x - (t - t_next) [v + g^2/(2t) eps]               std = g sqrt(t - t_next)
    interpolant      mean = (1-t_next) x0 + sqrt(t_next^2 - std^2) eps        std given

Shapes: x, v [N, *L]; t, t_next [N] with t > t_next; eta a float or [N]. The maths is fp32 (fp64 stays fp64): bf16 loses
the log-ratio. At eta = 0 every kernel is the Euler step of the ODE and its std is 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.prediction import denoised, noise_estimate, rows

__all__ = [
    "Kernel",
    "Transition",
    "cps",
    "dance_sde",
    "ddim",
    "diffusion",
    "euler_maruyama",
    "flow_sde",
    "interpolant",
    "wan_sde",
]

# A step that starts nearer to t = 1 than this share of its own length is a first step; see flow_sde.
_FIRST_STEP = 0.05


class Transition(NamedTuple):
    """Gaussian of the next state: x_next = mean + std * noise.

    mean [N, *L] fp32; std [N, 1, ...] fp32, the full standard deviation of the step (never g alone).
    """

    mean: Tensor
    std: Tensor


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], Transition]


def flow_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor) -> Transition:
    """Flow-GRPO's SDE (arXiv:2505.05470, eq. 9): g = eta sqrt(t / (1 - t)).

    Note: g is infinite at t = 1, so a first step takes 1 - t_next for 1 - t and its std is exactly eta. Grids may
    start a little below 1 (0.9997 in some schedulers), where an equality test fails and g explodes; a first step is
    therefore one with 1 - t < 0.05 (t - t_next). From three steps on, no second step of any shifted grid is that close.
    """
    x, v, t, t_next, eta = _prepare(x, v, t, t_next, eta)
    first = 1 - t < _FIRST_STEP * (t - t_next)
    return euler_maruyama(x, v, t, t_next, eta * (t / torch.where(first, 1 - t_next, 1 - t)).sqrt())


def dance_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor) -> Transition:
    """DanceGRPO's SDE (arXiv:2505.07818): g = eta, the same at every time."""
    x, v, t, t_next, eta = _prepare(x, v, t, t_next, eta)
    return euler_maruyama(x, v, t, t_next, eta)


def wan_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor) -> Transition:
    """SDE with g = eta t, as Flow-GRPO's Wan2.1 recipe and Flash-GRPO use it.

    Note: the recipe has no free eta; it is this kernel at eta = times[1], the second time of the grid.
    """
    x, v, t, t_next, eta = _prepare(x, v, t, t_next, eta)
    return euler_maruyama(x, v, t, t_next, eta * t)


def cps(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor) -> Transition:
    """Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952): std = t_next sin(eta pi / 2), eta in [0, 1].

    Note: a sampler for few steps. Its noise is per step, not per time, so its marginals stay too narrow as T grows.
    The public code leaves out 1/(2 std^2) in the log-prob: its log-ratio is 2 std^2 times the true one.
    """
    x, v, t, t_next, eta = _prepare(x, v, t, t_next, _unit(eta, "cps"))
    return interpolant(x, v, t, t_next, t_next * torch.sin(eta * (math.pi / 2)))


def ddim(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor) -> Transition:
    """DDIM (arXiv:2010.02502, eq. 12 and 16) in flow coordinates, eta in [0, 1]; eta = 1 is ancestral sampling.

    The paper's std for the VP state, eta sqrt((1-A')/(1-A)) sqrt(1 - A/A'), times n(t_next) reduces to the closed form
    below, in which nothing cancels and nothing is infinite at t = 1.
    """
    x, v, t, t_next, eta = _prepare(x, v, t, t_next, _unit(eta, "ddim"))
    spread = ((t - t_next) * (t + t_next - 2 * t * t_next)).sqrt()
    return interpolant(x, v, t, t_next, eta * (t_next / t) * spread / (1 - t_next))


def euler_maruyama(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, g: Tensor) -> Transition:
    """Euler-Maruyama step of the SDE that has the ODE's marginals (arXiv:2011.13456); t, t_next, g [N, 1, ...].

    The score is -eps / t, so diffusion g needs the extra drift g^2/(2t) eps.
    """
    h = t - t_next
    return Transition(x - h * (v + g.square() / (2 * t) * noise_estimate(x, v, t)), g * h.sqrt())


def interpolant(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, std: Tensor) -> Transition:
    """Re-mix both estimates at t_next and replace part of the old noise by new; t, t_next, std [N, 1, ...]."""
    kept = (t_next.square() - std.square()).clamp(min=0).sqrt()
    return Transition((1 - t_next) * denoised(x, v, t) + kept * noise_estimate(x, v, t), std)


def diffusion(transition: Transition, t: Tensor, t_next: Tensor) -> Tensor:
    """Diffusion coefficient g = std / sqrt(t - t_next) of a transition, [N, 1, ...].

    Some published KL terms divide by g^2, not by std^2: ``gaussian_kl(p._replace(std=g), q._replace(std=g))``.
    """
    return transition.std / rows(t - t_next, transition.mean).sqrt()


def _prepare(
    x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, v = x.to(dtype), v.to(dtype)
    return x, v, rows(t, x), rows(t_next, x), rows(eta, x)


def _unit(eta: float | Tensor, name: str) -> float | Tensor:
    inside = bool(((eta >= 0) & (eta <= 1)).all()) if isinstance(eta, Tensor) else 0 <= eta <= 1
    if not inside:
        raise ValueError(f"{name} replaces a share of the noise, so eta must lie in [0, 1], got {eta}.")
    return eta
