"""Conversions against arithmetic and PIL, and the one check of pixel values."""

import math

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
