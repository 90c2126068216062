"""How near a picture is to a reference picture, pixel by pixel; differentiable, and without weights.

    ssim   structural similarity (Wang et al., IEEE TIP 2004), mean over colours and windows        -1 .. 1
    psnr   10 log10(1 / mean squared difference), in dB                                               0 .. 60
    l1     minus the mean absolute difference                                                        -1 .. 0

The reference is `meta["reference"]`: a tensor [3,H,W] in [0, 1], or the path of an image file (a relative one starts at
the working directory). One of another size is resized to the sample's; one of another shape has no verdict, for to
squash it would compare other pictures. The frames of a video are all compared with the same reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import folder
from rewards.card import Card
from rewards.media import clamp
from rewards.preprocess import resize
from rewards.types import RewardError, Sample, Scores, declare

__all__ = ["l1", "psnr", "ssim"]

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]
_MOST_DB = 60.0  # two pictures that differ by the rounding to bytes alone have 59
_SQUASH = 0.02  # sides are rounded to multiples of 8 or 16: so much may aspect ratios differ

_SSIM = Card(source="Wang et al., Image quality assessment: from error visibility to structural similarity, 2004")
_OURS = Card(source="this project: differences of pixels")


@declare(needs=("reference",), deterministic=True, differentiable=True, range=(-1.0, 1.0), card=_SSIM)
def ssim(samples: Sequence[Sample]) -> Scores:
    """Structural similarity to the reference (Wang et al., 2004): Gaussian window of 11 pixels, sigma 1.5."""
    return _compared(samples, structural_similarity, smallest=_WINDOW)


@declare(needs=("reference",), deterministic=True, differentiable=True, range=(0.0, _MOST_DB), card=_OURS)
def psnr(samples: Sequence[Sample]) -> Scores:
    """Peak signal-to-noise ratio to the reference in dB; 60 for an equal picture, where it would be infinite."""
    return _compared(samples, lambda a, b: -10 * (a - b).square().mean().clamp(min=10 ** (-_MOST_DB / 10)).log10())


@declare(needs=("reference",), deterministic=True, differentiable=True, range=(-1.0, 0.0), card=_OURS)
def l1(samples: Sequence[Sample]) -> Scores:
    """Minus the mean absolute difference to the reference."""
    return _compared(samples, lambda a, b: -(a - b).abs().mean())


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of pictures [3,H,W] in [0, 1], over colours and all windows that lie within the picture.

    Wang et al. (2004), eq. 13, with K1 = 0.01 and K2 = 0.03; means, variances and the covariance are those under the
    window's weights.
    """
    at = torch.arange(_WINDOW, dtype=a.dtype, device=a.device) - _WINDOW // 2
    weights = torch.exp(-at.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blurred(image: Tensor) -> Tensor:
        columns = F.conv2d(image[:, None], weights.view(1, 1, -1, 1))
        return F.conv2d(columns, weights.view(1, 1, 1, -1))[:, 0]

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a.square(), blurred(b * b) - mean_b.square()
    cov = blurred(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return (light * (2 * cov + _C2) / (var_a + var_b + _C2)).mean()


def _compared(samples: Sequence[Sample], measure: Callable[[Tensor, Tensor], Tensor], smallest: int = 1) -> Scores:
    """A measure of samples and their references [N]; NaN, with the reason, where they cannot be compared."""
    rows: list[Tensor] = []
    info: list[dict[str, Any]] = []
    for sample in samples:
        image = clamp(sample.media.to(torch.promote_types(sample.media.dtype, torch.float32)))
        try:
            rows.append(measure(image, _reference(sample.meta["reference"], image, smallest)))
            info.append({})
        except _Incomparable as error:
            rows.append(image.new_tensor(float("nan")))
            info.append({"error": str(error)})
    return Scores(value=torch.stack(rows), info=info)


class _Incomparable(Exception):
    """There is no telling how near a sample is to its reference."""


def _reference(given: Any, image: Tensor, smallest: int) -> Tensor:
    """The reference at the size, precision and place of an image [3,H,W]."""
    height, width = image.shape[-2:]
    if min(height, width) < smallest:
        raise _Incomparable(f"a picture of {height} x {width} is smaller than the window of {smallest} pixels")
    try:
        reference = folder.reference(given)
    except RewardError as error:
        raise _Incomparable(str(error)) from error
    if abs(reference.shape[-1] * height / (reference.shape[-2] * width) - 1) > _SQUASH:
        raise _Incomparable(
            f"the reference is {reference.shape[-2]} x {reference.shape[-1]}, the picture {height} x {width}: crop the "
            "reference to the picture's aspect ratio"
        )
    return clamp(resize(reference.detach().to(image), height, width))
