"""What a network predicts, in one coordinate system: x_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is noise.

Shapes: x, x0, eps, v [N, *L]; t [N]. Variance-preserving (VP) models keep z = sqrt(A) x0 + sqrt(1-A) eps instead.
Both describe the same rays through (x0, eps): z = x / n(t) with n(t) = sqrt((1-t)^2 + t^2), and A = (1-t)^2 / n^2.
"""

import torch
from torch import Tensor

__all__ = [
    "denoised",
    "flow_state",
    "flow_time",
    "noise_estimate",
    "rows",
    "v_prediction",
    "velocity_from_eps",
    "velocity_from_v_prediction",
    "velocity_from_x0",
    "vp_alpha",
    "vp_state",
]


def rows(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or one number per sample, shaped [N, 1, ...] so that it multiplies ``like`` [N, *L]."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.ndim == like.ndim and value.ndim > 1:
        return value
    return value.expand(len(like)).reshape(-1, *[1] * (like.ndim - 1))


def denoised(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Clean estimate x0 = x - t v, [N, *L]."""
    return x - rows(t, x) * v


def noise_estimate(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Noise estimate eps = x + (1 - t) v, [N, *L]."""
    return x + (1 - rows(t, x)) * v


def velocity_from_x0(x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
    """Velocity of a clean estimate, v = (x - x0) / t, [N, *L]. Needs t > 0."""
    return (x - x0) / rows(t, x)


def velocity_from_eps(x: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """Velocity of a noise estimate, v = (eps - x) / (1 - t), [N, *L]. Needs t < 1: pure noise does not show x0."""
    return (eps - x) / (1 - rows(t, x))


def velocity_from_v_prediction(x: Tensor, v_vp: Tensor, t: float | Tensor) -> Tensor:
    """Velocity of a VP v-prediction (arXiv:2202.00512, appendix D) at the *flow* state x: v = v_vp/n + (2t-1) x/n^2."""
    t = rows(t, x)
    n = _norm(t)
    return v_vp / n + (2 * t - 1) * x / n.square()


def v_prediction(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """VP v-prediction sqrt(A) eps - sqrt(1-A) x0 of a velocity; inverse of ``velocity_from_v_prediction``."""
    t = rows(t, x)
    n = _norm(t)
    return n * v - (2 * t - 1) * x / n


def flow_time(alpha: Tensor) -> Tensor:
    """Flow time of a VP level A = alphas_cumprod: t = sqrt(1-A) / (sqrt(A) + sqrt(1-A)); any shape."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    return noise / (signal + noise)


def vp_alpha(t: Tensor) -> Tensor:
    """VP level A = (1-t)^2 / ((1-t)^2 + t^2) of a flow time; any shape. Inverse of ``flow_time``."""
    return (1 - t).square() / _norm(t).square()


def flow_state(z: Tensor, t: float | Tensor) -> Tensor:
    """Flow state x = n(t) z of a VP state z [N, *L]."""
    return _norm(rows(t, z)) * z


def vp_state(x: Tensor, t: float | Tensor) -> Tensor:
    """VP state z = x / n(t) of a flow state x [N, *L]; what an SD1.5 or SDXL network wants to see."""
    return x / _norm(rows(t, x))


def _norm(t: Tensor) -> Tensor:
    return ((1 - t).square() + t.square()).sqrt()
