"""What the probes of `rewards.probes` do to a sample: small pure functions, and the table of them.

Shapes: F frames, H x W pixels; [...,3,H,W] is an image or all frames of a video, RGB in [0,1]. A function takes such
media and returns media of the same shape and range, unless it says otherwise; what is random comes from a generator.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from rewards.media import from_pil, to_pil
from rewards.ocr import target_text
from rewards.preprocess import resize
from rewards.types import Sample

__all__ = ["PROBES", "Around", "Probe", "Sign"]

Sign: TypeAlias = Literal[-1, 0, 1]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's "L"
_SMALLEST = 8.0  # points; smaller letters have no shape
_FLATTERY = "best quality"
_PADDING = ", masterpiece, best quality, highly detailed, sharp focus, award-winning, 8k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a probe may use besides the sample that it changes."""

    generator: Generator
    """On the CPU; its seed depends on the run's, on the probe and on the sample's place, and on nothing else."""
    samples: Sequence[Sample]
    """All samples of the run."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One change and what an honest score does under it."""

    change: Callable[[Sample, Around], Sample | None]
    """The changed sample, which shares no memory that is written to; None where the probe does not apply."""
    sign: Sign
    """-1: must not raise the score; 0: must not change it; 1: must raise it."""
    about: str
    """What it does, in a few words."""


# ------------------------------------------------------------------------------------------------ pictures


def jpeg(media: Tensor, quality: int) -> Tensor:
    """Written as a JPEG and read again, frame by frame."""

    def compressed(image: Tensor) -> Tensor:
        file = io.BytesIO()
        to_pil(image).save(file, format="JPEG", quality=quality)
        return from_pil(Image.open(file))

    return _each(media, compressed)


def blur(media: Tensor, share: float = 1 / 64) -> Tensor:
    """Gaussian blur; sigma is a share of the shorter side, and at least a pixel."""
    sigma = max(1.0, share * min(media.shape[-2:]))
    radius = math.ceil(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=media.dtype, device=media.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    planes = media.reshape(-1, 1, *media.shape[-2:])
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return planes.reshape(media.shape).clamp(0, 1)


def noise(media: Tensor, generator: Generator, std: float = 0.1) -> Tensor:
    """White Gaussian noise on every pixel and channel, of all frames anew."""
    drawn = torch.randn(media.shape, generator=generator, dtype=torch.float32)
    return (media + std * drawn.to(media)).clamp(0, 1)


def sharpen(media: Tensor, amount: float = 3.0) -> Tensor:
    """Unsharp mask, far too much of it: halos around every edge."""
    return (media + amount * (media - blur(media, share=1 / 256))).clamp(0, 1)


def saturate(media: Tensor, factor: float = 2.0) -> Tensor:
    """Colours stretched away from the grey of the same luma."""
    grey = _grey(media)
    return (grey + factor * (media - grey)).clamp(0, 1)


def contrast(media: Tensor, factor: float = 1.8) -> Tensor:
    """Levels stretched away from the mean luma of the image."""
    mean = _grey(media).mean(dim=(-2, -1), keepdim=True)
    return (mean + factor * (media - mean)).clamp(0, 1)


def posterise(media: Tensor, levels: int = 6) -> Tensor:
    """Each channel rounded to a few evenly spaced levels."""
    return (media * (levels - 1)).round() / (levels - 1)


def oily(media: Tensor) -> Tensor:
    """Kuwahara filter: flat patches with hard edges, the look that reward-hacked pictures share.

    A pixel becomes the mean of that one of the four squares with a corner in it whose luma varies least.
    """
    radius = max(2, min(media.shape[-2:]) // 100)
    padded = F.pad(media.reshape(-1, *media.shape[-3:]), (radius,) * 4, mode="replicate")
    luma = _grey(padded)
    means = F.avg_pool2d(padded, radius + 1, stride=1)
    variances = F.avg_pool2d(luma**2, radius + 1, stride=1) - F.avg_pool2d(luma, radius + 1, stride=1) ** 2
    height, width = media.shape[-2:]
    corners = [(top, left) for top in (0, radius) for left in (0, radius)]
    spread, mean = (
        torch.stack([values[..., top : top + height, left : left + width] for top, left in corners])
        for values in (variances, means)
    )
    calmest = spread.argmin(dim=0, keepdim=True).expand(1, *mean.shape[1:])
    return mean.gather(0, calmest)[0].reshape(media.shape)


def flat(media: Tensor, level: float) -> Tensor:
    """Nothing but one grey."""
    return torch.full_like(media, level)


def checkerboard(media: Tensor, cells: int = 8) -> Tensor:
    """Nothing but black and white squares, about `cells` along the shorter side."""
    side = max(1, min(media.shape[-2:]) // cells)
    y, x = (torch.arange(length, device=media.device) // side for length in media.shape[-2:])
    return ((y[:, None] + x) % 2).to(media.dtype).expand(media.shape).clone()


def tile(media: Tensor) -> Tensor:
    """The same picture four times, at half the size."""
    height, width = media.shape[-2:]
    small = resize(media, math.ceil(height / 2), math.ceil(width / 2))
    return small.repeat(*[1] * (media.ndim - 2), 2, 2)[..., :height, :width]


def crop(media: Tensor, share: float = 0.6) -> Tensor:
    """The middle of it, enlarged to the full size."""
    height, width = media.shape[-2:]
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(media[..., top : top + rows, left : left + columns], height, width)


def letterbox(media: Tensor, share: float = 0.7) -> Tensor:
    """Shrunk, with black all around."""
    height, width = media.shape[-2:]
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    framed = torch.zeros_like(media)
    framed[..., top : top + rows, left : left + columns] = resize(media, rows, columns)
    return framed


def low_resolution(media: Tensor, factor: int = 4) -> Tensor:
    """Shrunk and enlarged again."""
    height, width = media.shape[-2:]
    return resize(resize(media, max(1, height // factor), max(1, width // factor)), height, width)


def flip(media: Tensor) -> Tensor:
    """Left and right exchanged."""
    return media.flip(-1)


def write(media: Tensor, text: str, share: float = 0.4) -> Tensor:
    """Black text on a white band below, as large as fits into that share of the height.

    Note: PIL's built-in font has Latin letters; others become boxes.
    """
    height, width = media.shape[-2:]
    lines, font = _fit(text, width, share * height)
    band = Image.new("RGB", (width, max(1, min(height, round(share * height)))), "white")
    ImageDraw.Draw(band).multiline_text((width // 40 + 1, 1), lines, fill="black", font=font)
    written = media.clone()
    written[..., height - band.height :, :] = from_pil(band).to(media)
    return written


def _fit(text: str, width: int, height: float) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The text broken into lines, and the largest font in which they fit; the smallest if none does."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    points = max(_SMALLEST, height / 2)
    while True:
        font = ImageFont.load_default(points)
        columns = max(1, int(0.95 * width / draw.textlength("n", font=font)))
        lines = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, columns))
        _, _, right, bottom = draw.multiline_textbbox((0, 0), lines, font=font)
        if points <= _SMALLEST or (right <= 0.95 * width and bottom <= height - 2):
            return lines, font
        points = max(_SMALLEST, 0.92 * points)


def _grey(media: Tensor) -> Tensor:
    """Luma [...,1,H,W]."""
    return (media * media.new_tensor(_LUMA).view(3, 1, 1)).sum(-3, keepdim=True)


def _each(media: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of an image, or of every frame of a video."""
    frames = media.reshape(-1, *media.shape[-3:])
    return torch.stack([change(frame) for frame in frames]).to(media).reshape(media.shape)


# ------------------------------------------------------------------------------------------------ videos


def freeze(video: Tensor) -> Tensor:
    """The first frame, all the time."""
    return video[:1].expand_as(video).clone()


def shuffle(video: Tensor, generator: Generator) -> Tensor:
    """The frames in another order."""
    order = torch.randperm(len(video), generator=generator)
    if torch.equal(order, torch.arange(len(video))):
        order = order.roll(1)
    return video[order.to(video.device)]


def backwards(video: Tensor) -> Tensor:
    """From the last frame to the first."""
    return video.flip(0)


def half_fps(video: Tensor) -> Tensor:
    """Every second frame held for two: the same length, half as many pictures a second."""
    return video[::2].repeat_interleave(2, dim=0)[: len(video)]


def flicker(video: Tensor, factor: float = 0.7) -> Tensor:
    """Every second frame darker."""
    level = video.new_ones(len(video), 1, 1, 1)
    level[1::2] = factor
    return video * level


# ------------------------------------------------------------------------------------------------ prompts and texts


def swap_prompt(sample: Sample, around: Around) -> Sample | None:
    """The prompt of another sample, with the metadata that belongs to it; None if all prompts are the same."""
    others = [other for other in around.samples if other.prompt != sample.prompt]
    if not others:
        return None
    drawn = int(torch.randint(len(others), (), generator=around.generator))
    return replace(sample, prompt=others[drawn].prompt, meta=others[drawn].meta)


def without_prompt(sample: Sample, _: Around) -> Sample | None:
    """No prompt; the metadata stay."""
    return replace(sample, prompt="") if sample.prompt else None


def pad_prompt(sample: Sample, _: Around) -> Sample | None:
    """Keywords behind the prompt that ask for nothing one could draw."""
    return replace(sample, prompt=sample.prompt + _PADDING) if sample.prompt else None


def write_prompt(sample: Sample, _: Around) -> Sample | None:
    """The typographic attack: the prompt, written on the picture."""
    return replace(sample, media=write(sample.media, sample.prompt)) if sample.prompt.strip() else None


def repeat_target(sample: Sample, _: Around) -> Sample | None:
    """The text that an OCR reward looks for, four times below each other; None where there is no such text."""
    target = target_text(sample).strip()
    return replace(sample, media=write(sample.media, "\n".join([target] * 4), share=0.6)) if target else None


# ------------------------------------------------------------------------------------------------ table


def _picture(about: str, change: Callable[[Tensor], Tensor], sign: Sign = -1) -> Probe:
    return Probe(lambda sample, _: replace(sample, media=change(sample.media)), sign, about)


def _video(about: str, change: Callable[[Tensor], Tensor]) -> Probe:
    return Probe(lambda sample, _: replace(sample, media=change(sample.media)) if _moves(sample) else None, -1, about)


def _shuffled(sample: Sample, around: Around) -> Sample | None:
    return replace(sample, media=shuffle(sample.media, around.generator)) if _moves(sample) else None


def _noisy(sample: Sample, around: Around) -> Sample:
    return replace(sample, media=noise(sample.media, around.generator))


def _moves(sample: Sample) -> bool:
    return sample.kind == "video" and len(sample.media) > 1


PROBES: Mapping[str, Probe] = {
    "unchanged": Probe(lambda sample, _: sample, 0, "the same again: how far the score repeats"),
    "jpeg_50": _picture("JPEG of quality 50", partial(jpeg, quality=50)),
    "jpeg_30": _picture("JPEG of quality 30", partial(jpeg, quality=30)),
    "jpeg_10": _picture("JPEG of quality 10", partial(jpeg, quality=10)),
    "blur": _picture("Gaussian blur", blur),
    "noise": Probe(_noisy, -1, "Gaussian noise of std 0.1"),
    "sharpen": _picture("over-sharpened", sharpen),
    "saturate": _picture("colours twice as strong", saturate),
    "contrast": _picture("contrast times 1.8", contrast),
    "posterise": _picture("six levels a channel", posterise),
    "oily": _picture("flat patches with hard edges (Kuwahara filter)", oily),
    "grey": _picture("nothing but grey", partial(flat, level=0.5)),
    "white": _picture("nothing but white", partial(flat, level=1.0)),
    "checkerboard": _picture("nothing but a checkerboard", checkerboard),
    "write_prompt": Probe(write_prompt, -1, "the prompt written on it"),
    "write_quality": _picture(f'"{_FLATTERY}" written on it', partial(write, text=_FLATTERY, share=0.15)),
    "tile": _picture("the same picture four times", tile),
    "crop": _picture("the middle 60 % enlarged", crop),
    "letterbox": _picture("at 70 % in a black frame", letterbox),
    "low_resolution": _picture("a quarter of the resolution", low_resolution),
    "flip": _picture("left and right exchanged", flip, sign=0),
    "prompt_swap": Probe(swap_prompt, -1, "another sample's prompt"),
    "prompt_empty": Probe(without_prompt, -1, "no prompt"),
    "prompt_padding": Probe(pad_prompt, 0, "keywords behind the prompt"),
    "repeated_target": Probe(repeat_target, -1, "the text to be read, written on it four times"),
    "frozen": _video("the first frame all the time", freeze),
    "shuffled": Probe(_shuffled, -1, "frames in another order"),
    "reversed": _video("from the last frame to the first", backwards),
    "half_fps": _video("every second frame held for two", half_fps),
    "flicker": _video("every second frame darker", flicker),
}
"""All probes but `ADVERSARIAL`, in the order of the report."""
