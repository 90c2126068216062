"""Samples to judge: noise, flat colours and rendered text."""

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import Sample
from rewards.media import from_pil


def noise(seed: int = 0, size: int = 32, frames: int | None = None, **fields: Any) -> Sample:
    """A noise image, or a noise video of some frames."""
    shape = (3, size, size) if frames is None else (frames, 3, size, size)
    media = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return Sample(media=media, **{"prompt": f"prompt {seed}", **fields})


def batch(count: int, group_size: int = 2, **fields: Any) -> list[Sample]:
    """Noise images in groups of `group_size`."""
    return [noise(seed, group=seed // group_size, **fields) for seed in range(count)]


def flat(*rgb: float, size: int = 16) -> Sample:
    """One colour."""
    return Sample(media=torch.tensor(rgb, dtype=torch.float32)[:, None, None].expand(3, size, size).clone())


def text(words: str, size: int = 256, points: int = 36, **fields: Any) -> Sample:
    """Black words on white, one line per line."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).text((12, 24), words, fill="black", font=ImageFont.load_default(points))
    return Sample(media=from_pil(image), **fields)
