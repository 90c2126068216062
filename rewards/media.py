"""Media as rewards handle it: bytes and PIL images, frames of a video, and the one check of the pixel values.

Everything a reward sees is RGB, float, in [0, 1], channels first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from rewards.types import RewardContractError, Sample

RANGE_TOLERANCE = 0.05
"""A decoder overshoots a little; [-1, 1] or [0, 255] overshoots by far more than this."""


def clamp(media: Tensor) -> Tensor:
    """Clamp to [0, 1] with a straight-through gradient: a saturated pixel still learns which way is better."""
    return media + (media.clamp(0, 1) - media).detach()


def to_uint8(media: Tensor) -> Tensor:
    """[..., 3, H, W] float in [0, 1] -> uint8 on the CPU, rounded to nearest."""
    return (media.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_array(image: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] float in [0, 1] -> uint8 array [H, W, 3], which PIL and OpenCV read."""
    array: NDArray[np.uint8] = to_uint8(image).permute(1, 2, 0).contiguous().numpy()
    return array


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] float in [0, 1] -> RGB PIL image."""
    return Image.fromarray(to_array(image))


def from_pil(image: Image.Image) -> Tensor:
    """Any PIL image -> RGB [3, H, W] float in [0, 1], as a viewer shows it.

    Turned as its EXIF data say, laid on white where it is transparent; 16-bit grey keeps its 65536 levels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion to RGB cuts at 255
        grey = torch.from_numpy(np.array(image, dtype=np.float32)).clamp(0, 65535) / 65535
        return grey.expand(3, -1, -1).clone()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def frame(sample: Sample, index: int, count: int) -> Sample:
    """Frame `index` of `count` spread evenly over a video, as an image sample; an image stays what it is.

    The clip is cut into `count` equal pieces and the middle of each is taken: 4 of 16 frames are 2, 6, 10, 14.
    """
    if sample.kind == "image":
        return sample
    position = int((index + 0.5) * sample.media.shape[0] / count)
    return replace(sample, media=sample.media[position], fps=None)


def broken_media(samples: Sequence[Sample]) -> dict[int, str]:
    """Which samples have pixels that are not finite; media outside [0, 1] is a bug of the caller and raises.

    One reduction per sample and one transfer in all, so that a GPU is waited for once.
    """
    if not samples:
        return {}
    device = samples[0].media.device
    extremes = [torch.stack(torch.aminmax(sample.media.detach())).to(device, torch.float32) for sample in samples]
    broken = {}
    for index, (low, high) in enumerate(torch.stack(extremes).tolist()):
        if not (math.isfinite(low) and math.isfinite(high)):
            broken[index] = "media has pixels that are NaN or infinite"
        elif low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            mend = "media / 255" if low >= 0 and high > 2 else "(media + 1) / 2" if low < -0.5 else "media.clamp(0, 1)"
            raise RewardContractError(
                f"sample {index}: media spans [{low:.3g}, {high:.3g}]; rewards expect [0, 1]. Mend: pass {mend}."
            )
    return broken
