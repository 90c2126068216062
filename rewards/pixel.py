"""Rewards that need no model: file size and simple statistics of the pixels. Cheap, exact, and learnable in minutes.

The JPEG rewards are those of DDPO (arXiv:2305.13301): compressibility is minus the size, incompressibility is the size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.card import Card
from rewards.media import to_pil
from rewards.types import RewardError, Sample, declare

__all__ = ["brightness", "contrast", "jpeg_compressibility", "jpeg_size", "redness"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG itself
_DDPO = Card(source="DDPO, arXiv:2305.13301; Pillow writes the file")
_PIXELS = Card(
    source="this project: statistics of the pixels", note="for tests and first steps: all of them are hacked"
)


@declare(deterministic=True, device="cpu", card=_DDPO)
def jpeg_size(samples: Sequence[Sample], quality: int = 95, unit: str = "kb") -> list[float]:
    """Size as a JPEG: "kb" = bytes / 1000, or "bpp" = bits per pixel, which does not depend on the resolution."""
    if unit not in ("kb", "bpp"):
        raise RewardError(f'jpeg unit {unit!r}; expected "kb" (bytes / 1000) or "bpp" (bits per pixel)')
    return [_jpeg_size(sample.media, quality, unit) for sample in samples]


@declare(deterministic=True, device="cpu", card=_DDPO)
def jpeg_compressibility(samples: Sequence[Sample], quality: int = 95, unit: str = "kb") -> list[float]:
    """Minus the JPEG size: smooth images win."""
    return [-size for size in jpeg_size(samples, quality, unit)]


@declare(deterministic=True, differentiable=True, range=(0.0, 1.0), card=_PIXELS)
def brightness(samples: Sequence[Sample]) -> Tensor:
    """Mean luma."""
    return torch.stack([_luma(sample.media).mean() for sample in samples])


@declare(deterministic=True, differentiable=True, range=(0.0, 0.5), card=_PIXELS)
def contrast(samples: Sequence[Sample]) -> Tensor:
    """Standard deviation of luma over the pixels."""
    return torch.stack([_luma(sample.media).var(correction=0).clamp(min=1e-12).sqrt() for sample in samples])


@declare(deterministic=True, differentiable=True, range=(-1.0, 1.0), card=_PIXELS)
def redness(samples: Sequence[Sample]) -> Tensor:
    """Mean of red minus the mean of green and blue: 1 = pure red, 0 = grey, -1 = cyan."""
    images = [_exact(sample.media) for sample in samples]
    return torch.stack([(image[0] - (image[1] + image[2]) / 2).mean() for image in images])


def _luma(image: Tensor) -> Tensor:
    exact = _exact(image)
    return torch.einsum("chw,c->hw", exact, exact.new_tensor(_LUMA))


def _exact(image: Tensor) -> Tensor:
    """At least fp32; fp64 stays, so that gradients can be checked."""
    return image.to(torch.promote_types(image.dtype, torch.float32))


def _jpeg_size(image: Tensor, quality: int, unit: str) -> float:
    file = io.BytesIO()
    to_pil(image).save(file, format="JPEG", quality=quality)
    size = file.tell()
    return size / 1000 if unit == "kb" else 8 * size / (image.shape[1] * image.shape[2])
