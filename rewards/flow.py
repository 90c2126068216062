"""How much, and how evenly, a video moves: rewards made of optical flow, without weights by default.

    magnitude   how far pixels travel from one frame to the next
    spikes      jumps: frames that move much more than the clip does (the idea of Self-Forcing++, arXiv:2510.02283)

A clip is resized first, to `side` pixels on its shorter side, and speeds are in pixels per 1/`fps` of a second, so that
neither resolution nor frame rate of a model decides. A clip that does not know its fps is taken to have `fps`.

Who estimates the flow:

    dis         dense inverse search (arXiv:1603.03590) of OpenCV, on luma; 15 ms for two frames of 256 x 256
    farneback   OpenCV's polynomial expansion, on luma; finds too little movement in smooth pictures
    raft        RAFT (arXiv:2003.12039) of torchvision, with its published weights; the one with gradients to the pixels

Symbols: F frames; flow f [2,H,W] takes (x, y) of frame f to (x, y) + flow of frame f + 1, in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rewards.card import Card
from rewards.files import fill, read_tensors
from rewards.media import to_uint8
from rewards.preprocess import resize, shortest
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["magnitude", "spikes"]

CV2 = {"cv2": 'pip install -e ".[video]"'}
"""What the rewards here import, and who brings it."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_TOP = 0.05  # share of the pixels that `statistic: top5` looks at
_FEWEST = 4  # frames: among fewer than three steps nobody can say which one jumps


# ------------------------------------------------------------------------------------------------ flow


class OpticalFlow:
    """Flow between neighbouring frames of a resized clip, by one of three estimators."""

    def __init__(self, reward: str, estimator: str, side: int, weights: str | None) -> None:
        """`reward` is named in errors; `weights` is the file of RAFT's weights, and only RAFT's."""
        if estimator not in ("dis", "farneback", "raft"):
            raise RewardError(f"{reward}: estimator is {estimator!r}; expected dis, farneback or raft")
        if isinstance(side, bool) or not isinstance(side, int) or side < 128:
            raise RewardError(f"{reward}: side is {side!r}; expected a whole number of at least 128 (pixels)")
        if (weights is not None) != (estimator == "raft"):
            raise RewardError(
                f"{reward}: estimator {estimator} {'needs' if weights is None else 'has no'} weights. `weights` is the "
                "file of torchvision's raft_small or raft_large, such as raft_small_C_T_V2-01064c6d.pth from "
                "https://download.pytorch.org/models"
            )
        self._reward, self._estimator, self._weights = reward, estimator, weights
        self.side = side
        self._between: Callable[[Tensor, Tensor], Tensor] | None = None  # an object with its network, or a function

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the frames through the flow."""
        return self._estimator == "raft"

    @property
    def device(self) -> str | None:
        """Where the estimator runs: OpenCV's on the CPU, RAFT anywhere."""
        return None if self.differentiable else "cpu"

    def load(self, device: torch.device) -> None:
        """Import OpenCV, or read RAFT's weights."""
        if self._weights is not None:
            self._between = _Raft(self._reward, Path(self._weights).expanduser(), device)
        else:
            self._between = _opencv(self._reward, self._estimator)

    def unload(self) -> None:
        """Let the estimator go."""
        self._between = None

    def resized(self, video: Tensor) -> Tensor:
        """A clip [F,3,H,W] with `side` pixels on its shorter side."""
        height, width = video.shape[-2:]
        return resize(video, *shortest(height, width, self.side))

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Flows [N,2,H,W] in pixels, fp32, from frames [N,3,H,W] to others."""
        if self._between is None:
            raise RewardError(f"reward {self._reward!r} is not loaded; the hub does that, or call .load(device, dtype)")
        return self._between(first, second)


def _opencv(reward: str, estimator: str) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        import cv2
    except ImportError as error:
        raise RewardError(f"reward {reward!r} needs OpenCV: {CV2['cv2']} ({error})") from error

    def dis(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Any:
        return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)  # type: ignore[call-overload]

    def farneback(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Any:
        return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 5, 15, 3, 5, 1.1, 0)  # type: ignore[call-overload]

    estimate = dis if estimator == "dis" else farneback

    def between(first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(_luma(first), _luma(second), strict=True)
        return torch.stack([torch.from_numpy(estimate(a, b)).permute(2, 0, 1) for a, b in pairs]).to(first.device)

    return between


def _luma(frames: Tensor) -> NDArray[np.uint8]:
    """Frames [N,3,H,W] as bytes [N,H,W]."""
    grey: NDArray[np.uint8] = to_uint8(torch.einsum("nchw,c->nhw", frames, frames.new_tensor(_LUMA))).numpy()
    return grey


class _Raft:
    """RAFT in fp32: its correlations do not survive half precision."""

    def __init__(self, reward: str, file: Path, device: torch.device) -> None:
        from torchvision.models.optical_flow import raft_large, raft_small

        if not file.is_file():
            raise RewardError(f"reward {reward!r}: there is no file {file}; give `weights` the path of RAFT's weights")
        tensors = read_tensors(file)
        first_layer = tensors.get("feature_encoder.convnormrelu.0.weight")
        network = (raft_small if first_layer is not None and len(first_layer) == 32 else raft_large)(weights=None)
        fill(network, tensors, reward, file)
        self._network = network.requires_grad_(False).eval().to(device)  # an attribute, so that `offload` finds it

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        beyond = (0, -width % 8, 0, -height % 8)
        padded = (F.pad(2 * frames - 1, beyond, mode="replicate") for frames in (first, second))
        flows: Tensor = self._network(*padded)[-1]  # the last of its refinements
        return flows[..., :height, :width]


def magnitudes(flow: Tensor, statistic: str = "mean") -> Tensor:
    """How far pixels go [N], by flows [N,2,H,W]: the mean of all of them, or (top5) of the farthest 5 %."""
    length = (flow.square().sum(1) + 1e-12).sqrt().flatten(1)  # a still pixel has gradient 0, not NaN
    if statistic == "mean":
        return length.mean(1)
    return length.topk(max(1, round(_TOP * length.shape[1])), dim=1).values.mean(1)


# ------------------------------------------------------------------------------------------------ rewards


class _Moving:
    """What both rewards share: options, the estimator, and speeds."""

    media: frozenset[MediaKind] = frozenset({"video"})
    deterministic = True
    card = Card(
        source="DIS (arXiv:1603.03590) of OpenCV",
        licence="Apache-2.0 (OpenCV)",
        packages=CV2,
        note="estimator: raft needs `weights`, a file of torchvision's RAFT (see its card), and no OpenCV",
    )

    def __init__(self, name: str, estimator: str, side: int, fps: float, weights: str | None) -> None:
        if not fps > 0:
            raise RewardError(f"{name}: fps is {fps!r}; expected a number above 0")
        self.name, self._fps = name, float(fps)
        self._flow = OpticalFlow(name, estimator, side, weights)
        self.differentiable, self.device = self._flow.differentiable, self._flow.device

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Bring the estimator in; it works in fp32 whatever is asked for."""
        self._flow.load(device)

    def unload(self) -> None:
        """Let the estimator go."""
        self._flow.unload()

    def _speeds(self, sample: Sample, statistic: str) -> Tensor:
        """Speed [F-1] of each step of a clip, in pixels (of the resized clip) per 1/fps of a second."""
        clip = self._flow.resized(sample.media)
        return magnitudes(self._flow(clip[:-1], clip[1:]), statistic) * ((sample.fps or self._fps) / self._fps)


class Magnitude(_Moving):
    """How much a video moves: mean length of its optical flow, in pixels a frame; at least 0.

    To be used as a gate that stops a policy from freezing its videos, `{weight: 0, gate: {min: ...}}`: whoever
    maximises it gets shaking. The top5 are taken after the dynamic degree of VBench (arXiv:2311.17982).

    Note: VBench measures with RAFT, here an option, and then counts what is above a threshold: its numbers are others.
    """

    def __init__(
        self,
        statistic: str = "mean",
        estimator: str = "dis",
        side: int = 256,
        fps: float = 8.0,
        weights: str | None = None,
    ) -> None:
        """`statistic`: mean, or top5: only the 5 % of the pixels that move most, so that a small object counts.

        estimator   dis, farneback or raft
        side        pixels on the shorter side at which the flow is measured
        fps         the frame rate that speeds are converted to
        weights     file of torchvision's raft_small or raft_large, for raft
        """
        if statistic not in ("mean", "top5"):
            raise RewardError(f"flow.magnitude: statistic is {statistic!r}; expected mean or top5")
        self._statistic = statistic
        super().__init__("flow.magnitude", estimator, side, fps, weights)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Speeds [N]; NaN for a clip of one frame. Part: peak, the fastest step."""
        speeds = [self._speeds(s, self._statistic) if len(s.media) > 1 else None for s in samples]
        return _scores(speeds, {"value": Tensor.mean, "peak": Tensor.max}, "one frame does not move")


class Spikes(_Moving):
    """Does a video move without jumps, and at all? At most 0, which is steady movement (after Self-Forcing++).

        m_f     speed of step f, as in flow.magnitude
        limit   k max(median_f m_f, floor)
        spike   mean_f max(0, 1 - limit / m_f)          share of a step's movement that is above the limit, in [0, 1)
        still   max(0, 1 - median_f m_f / floor)        1 = frozen, 0 = moves at least as fast as the floor
        score   - spike - still                         in (-2, 0]

    Without `still` a frozen video would be perfect. Both use the median: neither one jump nor a slide show, which is
    frozen most of the time, can buy movement.

    Known pitfall: frames of nothing but noise score 0, the most there is, for they differ all to the same degree. Put a
    reward of how frames look beside it.

    Note: the paper's exact formula was not at hand. Ours is bounded: one cut costs at most 1 / (F - 1); and relative to
    the clip's own speed, so that fast videos may be fast. How fast a cut seems is the estimator's guess, for nothing
    matches there: 10 to 17 pixels of 256 with dis. In a clip that moves at half of that a cut is no spike any more;
    temporal_consistency sees it.
    """

    range = (-2.0, 0.0)

    def __init__(
        self,
        k: float = 2.0,
        floor: float = 0.5,
        estimator: str = "dis",
        side: int = 256,
        fps: float = 8.0,
        weights: str | None = None,
    ) -> None:
        """`k`: how many times the clip's own speed a step may have; above 1.

        floor       speed below which a video counts as still, in pixels a frame at `side` and `fps`
        estimator   dis, farneback or raft
        side        pixels on the shorter side at which the flow is measured
        fps         the frame rate that speeds are converted to
        weights     file of torchvision's raft_small or raft_large, for raft
        """
        if not k > 1:
            raise RewardError(f"flow.spikes: k is {k!r}; expected a number above 1: no step is below its own median")
        if not floor > 0:
            raise RewardError(f"flow.spikes: floor is {floor!r}; expected a speed above 0, or frozen videos win")
        self._k, self._floor = float(k), float(floor)
        super().__init__("flow.spikes", estimator, side, fps, weights)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Penalties [N]; NaN for a clip of fewer than four frames. Parts: spike, still, speed (median), peak."""
        speeds = [self._speeds(s, "mean") if len(s.media) >= _FEWEST else None for s in samples]
        statistics: dict[str, Callable[[Tensor], Tensor]] = {
            "value": lambda m: -self._spike(m) - self._still(m),
            "spike": self._spike,
            "still": self._still,
            "speed": _median,
            "peak": Tensor.max,
        }
        return _scores(speeds, statistics, f"fewer than {_FEWEST} frames: no step can be told to be a jump")

    def _spike(self, speeds: Tensor) -> Tensor:
        limit = self._k * _median(speeds).clamp(min=self._floor)
        return (1 - limit / speeds.clamp(min=1e-6)).clamp(min=0).mean()

    def _still(self, speeds: Tensor) -> Tensor:
        return (1 - _median(speeds) / self._floor).clamp(min=0)


magnitude, spikes = Magnitude, Spikes
"""As a config calls them."""


def _median(speeds: Tensor) -> Tensor:
    """Of an even number, the mean of the two in the middle (torch.median takes the lower)."""
    return speeds.quantile(0.5)


def _scores(speeds: Sequence[Tensor | None], statistics: dict[str, Callable[[Tensor], Tensor]], error: str) -> Scores:
    """Statistics of the speeds of N clips, `value` among them; NaN with an error for a clip that has none."""
    parts = {
        key: torch.stack([torch.tensor(math.nan) if each is None else statistic(each).cpu() for each in speeds])
        for key, statistic in statistics.items()
    }
    return Scores(value=parts.pop("value"), parts=parts, info=[{"error": error} if s is None else {} for s in speeds])
