"""Policy-gradient objectives, per edge: log-ratio and advantage in, loss and what to log out."""

import torch
from torch import Tensor

# exp() of a larger log-ratio tells nothing and may overflow; the clamp's share is logged (reliability row N2).
MAX_LOG_RATIO = 20.0


def clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: float | tuple[float, float],
    max_log_ratio: float = MAX_LOG_RATIO,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective (arXiv:1707.06347, eq. 7): max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(log_ratio).

    log_ratio and advantages are [E]; so is the loss. `clip_range` is one number for both sides, or (low, high). The
    objective has no gradient where it is clipped, where A = 0 and where the log-ratio is clamped.
    """
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    advantages = advantages.to(log_ratio)
    bounded = log_ratio.clamp(-max_log_ratio, max_log_ratio)
    ratio = bounded.exp()
    kept = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-advantages * ratio, -advantages * kept), _watch(
        log_ratio.detach(), ratio.detach(), low, high, max_log_ratio
    )


def _watch(log_ratio: Tensor, ratio: Tensor, low: float, high: float, max_log_ratio: float) -> dict[str, Tensor]:
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "clip_frac": outside.float().mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
        "clamp_frac": (log_ratio.abs() > max_log_ratio).float().mean(),
    }
