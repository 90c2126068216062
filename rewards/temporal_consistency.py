"""Do neighbouring frames of a video show the same things? One is warped onto the other along their optical flow.

For every step from frame a to frame b, with the flows f: a -> b and g: b -> a (see `rewards.flow`):

    b'(x)     = b(x + f(x))                                                          b, moved back to where a has it
    inside    = x + f(x) lies in the picture                                         what leaves it cannot be compared
    visible   = inside and |f(x) + g(x + f(x))|^2 < 0.01 (|f|^2 + |g|^2) + 0.5       there and back again: Sundaram et
                                                                                     al., ECCV 2010
    agreement = sum over visible of (1 - |a - b'|) / max(#inside, half of all)

The score is the mean of the agreements, in [0, 1]. What is not visible counts as disagreement, which it mostly is
where a model lets things melt or pop up; a true occlusion costs a little too.

Note: the warping error of Lai et al. (arXiv:1808.00449) is averaged over visible pixels alone. Here a policy would
learn to make few pixels visible; the 1/2 keeps it from sending them out of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.card import Card
from rewards.flow import CV2, OpticalFlow, magnitudes
from rewards.media import clamp
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["TemporalConsistency"]


class Agreement(NamedTuple):
    """How well N frames agree with N others; all [N]."""

    score: Tensor
    error: Tensor
    """Mean L1 distance over what is visible; NaN where nothing is."""
    visible: Tensor
    """Share of the pixels."""


class TemporalConsistency:
    """How well neighbouring frames of a video agree along their optical flow, in [0, 1].

    A frozen video agrees with itself perfectly: use it together with flow.magnitude as a gate, and watch the part
    `speed`. Parts: speed (as flow.magnitude gives it), error (mean L1 over visible pixels) and visible (their share).
    Gradients reach the pixels; flow and visibility count as constants there.
    """

    name = "temporal_consistency"
    media: frozenset[MediaKind] = frozenset({"video"})
    deterministic = True
    range = (0.0, 1.0)
    card = Card(
        source="warping error after Lai et al. (arXiv:1808.00449); DIS (arXiv:1603.03590) of OpenCV",
        licence="Apache-2.0 (OpenCV)",
        packages=CV2,
        note="a frozen video gets 1: gate it with flow.magnitude",
    )

    def __init__(self, estimator: str = "dis", side: int = 256, fps: float = 8.0, weights: str | None = None) -> None:
        """`estimator`: dis, farneback or raft, as in `rewards.flow`.

        side      pixels on the shorter side at which frames are compared
        fps       the frame rate that the part `speed` is converted to
        weights   file of torchvision's raft_small or raft_large, for raft
        """
        if not fps > 0:
            raise RewardError(f"temporal_consistency: fps is {fps!r}; expected a number above 0")
        self._fps = float(fps)
        self._flow = OpticalFlow(self.name, estimator, side, weights)
        self.device = self._flow.device

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Bring the estimator in; it works in fp32 whatever is asked for."""
        self._flow.load(device)

    def unload(self) -> None:
        """Let the estimator go."""
        self._flow.unload()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Agreements [N]; NaN for a clip of one frame."""
        rows = [self._judge(sample) if len(sample.media) > 1 else None for sample in samples]
        keys = ("value", "error", "visible", "speed")
        columns = {
            key: torch.stack([torch.tensor(math.nan) if row is None else row[i].cpu() for row in rows])
            for i, key in enumerate(keys)
        }
        info = [{"error": "one frame has no neighbour"} if row is None else {} for row in rows]
        return Scores(value=columns.pop("value"), parts=columns, info=info)

    def _judge(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score, error, visible share and speed of one clip, each a number."""
        clip = clamp(self._flow.resized(sample.media))
        first, second = clip[:-1], clip[1:]
        with torch.no_grad():
            forward, backward = self._flow(first, second), self._flow(second, first)
        found = agreement(first, second, forward, backward)
        speed = magnitudes(forward).mean() * ((sample.fps or self._fps) / self._fps)
        return found.score.mean(), found.error.nanmean().detach(), found.visible.mean(), speed


def agreement(first: Tensor, second: Tensor, forward: Tensor, backward: Tensor) -> Agreement:
    """The head's formula for frames [N,3,H,W] and the flows [N,2,H,W] between them, in both directions."""
    moved, inside = warp(second, forward)
    back, _ = warp(backward, forward)
    squared = forward.square().sum(1) + back.square().sum(1)
    visible = inside & ((forward + back).square().sum(1) < 0.01 * squared + 0.5)
    distance = (first - moved).abs().mean(1)
    count, pixels = visible.flatten(1).sum(1), visible[0].numel()
    alike = torch.where(visible, 1 - distance, 0).flatten(1).sum(1)
    score = alike / inside.flatten(1).sum(1).clamp(min=pixels / 2)
    error = torch.where(visible, distance, 0).flatten(1).sum(1) / count
    return Agreement(score=score, error=error, visible=count / pixels)


def warp(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [N,C,H,W] read bilinearly at x + flow(x), and where that lies in the picture (bool [N,H,W])."""
    height, width = frames.shape[-2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True), inside
