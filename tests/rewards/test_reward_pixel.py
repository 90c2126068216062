"""File sizes against PIL itself, statistics against arithmetic."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardHub, Sample, traits_of
from rewards.pixel import brightness, contrast, jpeg_compressibility, jpeg_size, redness
from tests.rewards.makers import flat, noise


def pil_bytes(media: torch.Tensor, quality: int) -> int:
    """The same file by another road: numpy rounding, a file of its own."""
    array = np.rint(media.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(array, "RGB").save(file, "jpeg", quality=quality)
    return len(file.getvalue())


@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_size_is_the_size_of_the_file(quality):
    samples = [noise(size=48), flat(0.2, 0.4, 0.6), noise(1, size=31)]
    sizes = [pil_bytes(sample.media, quality) for sample in samples]
    assert jpeg_size(samples, quality) == [size / 1000 for size in sizes]
    assert jpeg_compressibility(samples, quality) == [-size / 1000 for size in sizes]
    pixels = [48 * 48, 16 * 16, 31 * 31]
    assert jpeg_size(samples, quality, "bpp") == [8 * size / n for size, n in zip(sizes, pixels, strict=True)]


def test_noise_is_large_and_flat_is_small():
    """Published by measurement: 307.5 kB for noise and 4.7 kB for one colour, at 512 x 512."""
    large, small = jpeg_size([noise(size=512), flat(0.5, 0.5, 0.5, size=512)])
    assert large == pytest.approx(307.5, rel=0.02)
    assert small == pytest.approx(4.7, rel=0.1)


def test_an_unknown_unit_stops_at_the_warm_up():
    with RewardHub({"use": "pixel.jpeg_size", "unit": "mb"}) as hub, pytest.raises(Exception, match='"kb".*"bpp"'):
        hub.warmup()


def test_statistics_of_plain_colours():
    samples = [flat(1, 0, 0), flat(0, 1, 1), flat(0.5, 0.5, 0.5), flat(1, 1, 1)]
    assert brightness(samples).tolist() == pytest.approx([0.299, 0.701, 0.5, 1.0])
    assert redness(samples).tolist() == pytest.approx([1, -1, 0, 0])
    assert contrast(samples).tolist() == pytest.approx([0] * 4, abs=1e-5)


@pytest.mark.parametrize("reward", [brightness, contrast, redness])
def test_gradients_are_those_of_finite_differences(reward):
    """In float64, on noise and on a picture with saturated pixels."""
    media = torch.stack([noise(size=6).media, (3 * noise(1, size=6).media - 1).clamp(0, 1)]).double().requires_grad_()

    def scores(images):
        return reward([Sample(media=image) for image in images])

    assert traits_of(reward).differentiable
    assert torch.autograd.gradcheck(scores, (media,))


def test_a_flat_picture_has_no_contrast_and_gradient_zero_instead_of_infinity():
    sample = flat(0.5, 0.5, 0.5)
    sample.media.requires_grad_()
    contrast([sample]).sum().backward()
    assert sample.media.grad.count_nonzero() == 0


@pytest.mark.parametrize("reward", [jpeg_size, jpeg_compressibility])
def test_the_size_of_a_file_has_no_gradient_and_says_so(reward):
    assert not traits_of(reward).differentiable


def test_contrast_of_half_black_half_white_is_one_half():
    sample = flat(1, 1, 1)
    sample.media[:, :8] = 0
    assert contrast([sample]).tolist() == pytest.approx([0.5])
