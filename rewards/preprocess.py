"""From pictures of any size to the input of a network, in torch and differentiable: one place for all rewards.

    shortest   the shorter side becomes S, then the centre S x S is cut out                 CLIP, PickScore, ImageReward
    pad        the longer side becomes S, black is added around it                          HPSv2
    squash     both sides become S                                                          BLIP
    smart      sides become multiples of `factor`, their product stays within bounds        Qwen2-VL

The reference of all these networks is PIL's bicubic on bytes, which filters before it shrinks. A tensor's bicubic does
so only with antialias=True; without, an image of 1024 pixels is off by 34 times as much as rounding to bytes makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.media import clamp

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and std of SigLIP."""

_SLIVER = 16
"""Longer side by shorter: beyond it `shortest` cuts before it resizes, or 1 x 2000 pixels become 224 x 448000."""

Mode = Literal["shortest", "pad", "squash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resize, crop or pad, and normalise; gradients reach the pixels."""

    size: int
    mode: Mode = "shortest"
    resized: int | None = None
    """For `shortest`: the shorter side before the cut; None = `size` (DINOv2: 256 before a cut of 224)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3,H,W] of any sizes, in [0,1], to one batch [N,3,S,S], fp32."""
        batch = torch.stack(
            [self._framed(clamp(image.to(torch.promote_types(image.dtype, torch.float32)))) for image in images]
        )
        mean, std = (batch.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (batch - mean) / std

    def _framed(self, image: Tensor) -> Tensor:
        if self.mode == "squash":
            return resize(image, self.size, self.size, self.interpolation)
        if self.mode == "shortest":
            image = without_ends(image)
            height, width = image.shape[-2:]
            short = self.resized or self.size
            return centre_crop(resize(image, *shortest(height, width, short), self.interpolation), self.size)
        height, width = image.shape[-2:]
        return pad_to_square(resize(image, *longest(height, width, self.size), self.interpolation), self.size)


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """[3,H,W] or [N,3,H,W] resized as PIL does it: rows first, then columns, each time back in [0,1].

    Bicubic overshoots at edges. With a single cut at the end, black text on white would be off by 14 of 255 levels;
    with two it is by one. The gradient passes through the cuts.
    """
    batch = image if image.ndim == 4 else image[None]
    for size in ((batch.shape[-2], width), (height, width)):
        if batch.shape[-2:] != size:
            batch = clamp(F.interpolate(batch, size, mode=interpolation, antialias=True, align_corners=False))
    return batch if image.ndim == 4 else batch[0]


def shortest(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width with the shorter of them `side`, the other rounded down as torchvision and transformers do."""
    return (side, side * width // height) if height <= width else (side * height // width, side)


def longest(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width with the longer of them `side`."""
    most = max(height, width)
    return max(1, round(side * height / most)), max(1, round(side * width / most))


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The centre [.., size, size] of an image whose sides are at least that.

    Of an odd rest the larger half is cut off below and on the right, as transformers does.
    Note: torchvision rounds half to even: its cut (LAION's and ImageReward's own code) can lie one pixel further.
    """
    top, left = (image.shape[-2] - size) // 2, (image.shape[-1] - size) // 2
    return image[..., top : top + size, left : left + size]


def without_ends(image: Tensor) -> Tensor:
    """The centre of a sliver [.., H, W], 16 times as long as wide; any other image as it is.

    A square in the centre is resized from pixels far from the cut, so that nothing in it changes but for rounding.
    """
    height, width = image.shape[-2:]
    axis, spare = (-1, width - _SLIVER * height) if height <= width else (-2, height - _SLIVER * width)
    ends = max(0, spare) // 2  # the same at both, so that the centre stays where it is
    return image.narrow(axis, ends, image.shape[axis] - 2 * ends)


def pad_to_square(image: Tensor, size: int, value: float = 0.0) -> Tensor:
    """An image within [.., size, size], centred; the rest is `value`."""
    height, width = size - image.shape[-2], size - image.shape[-1]
    left, top = width // 2, height // 2
    return F.pad(image, (left, width - left, top, height - top), value=value)


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that Qwen2-VL gives a picture: multiples of `factor`, their product within the bounds.

    Sides are rounded to the nearest multiple; if that is out of bounds both are scaled by the same number, and rounded
    down (too large) or up (too small).
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"a picture of {height} x {width} is too narrow: the sides differ by more than a factor of 200"
        )
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns
