"""Conversions against arithmetic and PIL, and the one check of pixel values."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardContractError, Sample
from rewards.media import broken_media, clamp, frame, from_pil, to_array, to_pil, to_uint8
from tests.rewards.makers import noise


def test_bytes_are_rounded_to_nearest_and_clamped():
    media = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.5]).reshape(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(media)[0, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_pil_round_trip_is_exact_on_bytes():
    image = noise(size=9).media
    assert torch.equal(from_pil(to_pil(image)), to_uint8(image).float() / 255)
    assert to_array(image).shape == (9, 9, 3)


def test_from_pil_takes_any_mode():
    assert from_pil(Image.new("L", (4, 5), 255)).shape == (3, 5, 4)


def reopened(image, **how):
    """As a PNG file gives it."""
    file = io.BytesIO()
    image.save(file, format="PNG", **how)
    return Image.open(file)


def test_grey_of_16_bits_keeps_its_levels():
    levels = np.linspace(0, 65535, 48).round().reshape(6, 8)
    expected = (torch.from_numpy(levels).float() / 65535).expand(3, 6, 8)
    made = Image.fromarray(levels.astype(np.uint16))
    wide = Image.fromarray(levels.astype(np.int32))
    assert (made.mode, reopened(made).mode, wide.mode) == ("I;16", "I;16", "I")
    for image in (made, reopened(made), wide, Image.fromarray(levels.astype(">u2"))):
        torch.testing.assert_close(from_pil(image), expected, rtol=0, atol=1e-6)
    assert from_pil(made).is_contiguous()


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90),
    ],
)  # fmt: skip
def test_a_picture_is_turned_as_its_exif_says(orientation, shown):
    array = to_array(noise(size=9).media[:, :5])
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = from_pil(reopened(Image.fromarray(array), exif=exif))
    assert np.array_equal(to_array(seen), shown(array))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA", "L", "P", "RGB"])
def test_what_is_transparent_lies_on_white(mode):
    """By an alpha channel, or by one colour that counts as transparent."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    array[:4, :, 3], array[4:8, :, 3] = 0, 255
    image = Image.fromarray(array)
    if mode in ("LA", "RGBa"):
        image = image.convert(mode)
    elif mode != "RGBA":
        image = image.convert("RGB").quantize(4) if mode in ("P", "PA") else image.convert("RGB").convert(mode)
        if mode == "PA":
            image = image.convert("PA")
            image.putalpha(Image.fromarray(array[..., 3]))
        else:
            image.info["transparency"] = image.getpixel((0, 0))
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64) / 255
    alpha = rgba[..., 3:]
    assert alpha.min() == 0 and alpha.max() == 1
    expected = torch.from_numpy(alpha * rgba[..., :3] + 1 - alpha).permute(2, 0, 1).float()
    torch.testing.assert_close(from_pil(image), expected, rtol=0, atol=1.01 / 255)


def test_an_opaque_alpha_changes_no_byte():
    image = to_pil(noise(size=9).media)
    assert torch.equal(from_pil(image.convert("RGBA")), from_pil(image))


def test_clamp_lets_the_gradient_through():
    media = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    clamped = clamp(media)
    clamped.sum().backward()
    assert clamped.tolist() == [0.0, 0.5, 1.0]
    assert media.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("length", "count", "positions"), [(16, 4, [2, 6, 10, 14]), (5, 1, [2]), (4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0])]
)
def test_frames_are_the_middles_of_equal_pieces(length, count, positions):
    video = torch.arange(length).float().div(100)[:, None, None, None].expand(length, 3, 2, 2)
    sample = Sample(media=video, prompt="p", group=3, fps=8.0, meta={"a": 1})
    picked = [frame(sample, index, count) for index in range(count)]
    assert [round(one.media[0, 0, 0].item() * 100) for one in picked] == positions
    assert all((one.prompt, one.group, one.fps, one.meta) == ("p", 3, None, {"a": 1}) for one in picked)


def test_an_image_is_its_own_frame():
    sample = noise()
    assert frame(sample, 1, 4) is sample


def test_broken_pixels_are_told_apart_from_good_ones():
    good, nan, inf = noise(0), noise(1), noise(2, frames=3)
    nan.media[1, 2, 3] = math.nan
    inf.media[2, 0, 0, 0] = -math.inf
    assert list(broken_media([good, nan, inf])) == [1, 2]
    assert broken_media([]) == {}


@pytest.mark.parametrize(
    ("scale", "shift", "mend"), [(2, -1, r"\(media \+ 1\) / 2"), (255, 0, "media / 255"), (1.4, -0.2, r"clamp\(0, 1\)")]
)
def test_media_in_another_range_raises_with_the_conversion(scale, shift, mend):
    with pytest.raises(
        RewardContractError,
        match=rf"sample 1: media spans .*expect \[0, 1\]. Mend: pass {mend}"
        if scale != 1.4
        else rf"pass media\.{mend}",
    ):
        broken_media([noise(), Sample(media=noise().media * scale + shift)])


def test_a_slight_overshoot_is_a_decoder_and_no_mistake():
    assert broken_media([Sample(media=noise().media * 1.04 - 0.02)]) == {}
