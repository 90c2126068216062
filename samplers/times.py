"""Time grids: [T+1] float32 tensors that fall from 1 (noise) to 0 (data).

A grid is data, not an object: cut it, stretch it or write your own list of numbers, and hand it to a plan.
"""

import math

import torch
from torch import Tensor

from samplers.prediction import flow_time

__all__ = [
    "dynamic_shift",
    "dynamic_times",
    "linear_times",
    "scheduler_times",
    "shifted_times",
    "trailing_vp_times",
]


def linear_times(num_steps: int) -> Tensor:
    """Equal steps from 1 to 0: [T+1] float32."""
    return shifted_times(num_steps, shift=1.0)


def shifted_times(num_steps: int, shift: float = 1.0) -> Tensor:
    """Shifted grid of SD3 (arXiv:2403.03206, section 5.3.2): t = s u / (1 + (s - 1) u) over equal u, [T+1] float32.

    A shift above 1 spends more steps near the noise. This is the grid of DanceGRPO and MixGRPO.
    Raises ValueError when ``num_steps`` < 1 or ``shift`` <= 0.
    """
    _check_steps(num_steps)
    return _shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def scheduler_times(num_steps: int, shift: float = 3.0, num_train_steps: int = 1000) -> Tensor:
    """The grid that diffusers' FlowMatchEulerDiscreteScheduler walks with a static shift, [T+1] float32.

    Note: that scheduler shifts its smallest training time once when it is built and the whole grid again when it is
    asked for steps, so the last step before 0 is tiny (0.0089 for SD3 with 10 steps). Flow-GRPO's figures use it.
    """
    _check_steps(num_steps)
    smallest = float(_shift(torch.tensor(1 / num_train_steps, dtype=torch.float64), shift))
    times = _shift(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift)
    return torch.cat([times, times.new_zeros(1)]).float()


def dynamic_shift(
    seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX's resolution-dependent mu: a straight line through (base_seq_len, base_shift) and (max_seq_len, max_shift).

    ``seq_len`` is the number of latent tokens. Larger images need more noise for the same loss of information.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return base_shift + slope * (seq_len - base_seq_len)


def dynamic_times(num_steps: int, mu: float, terminal: float | None = None) -> Tensor:
    """FLUX's exponential time shift e^mu / (e^mu + 1/u - 1), which is the plain shift by e^mu: [T+1] float32.

    ``terminal`` stretches the grid so that its last time before 0 has this value (Qwen-Image: 0.02).
    """
    times = shifted_times(num_steps, shift=math.exp(mu)).double()
    if terminal is not None:
        times[:-1] = 1 - (1 - times[:-1]) * (1 - terminal) / (1 - times[-2])
    return times.float()


def trailing_vp_times(num_steps: int, alphas_cumprod: Tensor) -> Tensor:
    """DDIM's "trailing" steps (arXiv:2305.08891, table 2) of a VP model as flow times, [T+1] float32 ending at 0.

    ``alphas_cumprod`` [S] is the model's table. With A the table's value, t = sqrt(1-A) / (sqrt(A) + sqrt(1-A)).
    Note: the grid starts below 1 (0.936 for SD1.5), where the VP model's own noise level ends.
    """
    _check_steps(num_steps)
    size = len(alphas_cumprod)
    if num_steps > size:
        raise ValueError(f"{num_steps} steps do not fit a table of {size} training steps; ask for at most {size}.")
    index = torch.arange(size, 0, -size / num_steps, dtype=torch.float64)[:num_steps].round().long() - 1
    times = flow_time(alphas_cumprod.double().cpu()[index])
    return torch.cat([times, times.new_zeros(1)]).float()


def _shift(u: Tensor, shift: float) -> Tensor:
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}; 1 leaves the grid as it is, SD3 uses 3.")
    return shift * u / (1 + (shift - 1) * u)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
