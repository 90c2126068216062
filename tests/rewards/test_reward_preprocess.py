"""The one shared preprocessing against PIL, open_clip, transformers and torchvision, which all work on bytes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from rewards.media import from_pil, to_pil
from rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    centre_crop,
    longest,
    resize,
    shortest,
    smart_size,
    without_ends,
)
from tests.rewards.clips import photo
from tests.rewards.makers import text

BICUBIC = Image.Resampling.BICUBIC

SIZES = [(1024, 1024), (512, 768), (768, 512), (300, 211), (100, 64), (224, 224), (831, 1216)]


def differ(ours, theirs):
    """Mean and largest difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    gap = (ours - theirs).abs()
    return gap.mean().item(), gap.max().item()


def assert_rounding(ours, theirs):
    """References round to bytes twice, after the rows and after the columns: at most one level of 255, in their std."""
    mean, largest = differ(ours, theirs)
    assert mean < 0.006
    assert largest < 1.1 / 255 / 0.22


def normalised(image, mean=CLIP_MEAN, std=CLIP_STD):
    """A PIL image as the input of a network."""
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy((array - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shortest_is_transformers_clip_processor(height, width):
    from transformers import CLIPImageProcessor

    image = photo(height, width)
    theirs = CLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    assert_rounding(Preprocess(size=224)([from_pil(image)])[0], theirs)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shortest_is_pil(height, width):
    image = photo(height, width)
    rows, columns = (224, 224 * width // height) if height < width else (224 * height // width, 224)
    left, top = (columns - 224) // 2, (rows - 224) // 2
    theirs = image.resize((columns, rows), BICUBIC).crop((left, top, left + 224, top + 224))
    assert_rounding(Preprocess(size=224)([from_pil(image)])[0], normalised(theirs))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pad_is_open_clips_longest_mode(height, width):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image = photo(height, width)
    theirs = image_transform_v2(PreprocessCfg(size=224, resize_mode="longest", fill_color=0), is_train=False)(image)
    assert_rounding(Preprocess(size=224, mode="pad")([from_pil(image)])[0], theirs)


class Largest(TorchFunctionMode):
    """Of the tensors that are made within: how many values the largest has."""

    values = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.values = max(self.values, made.numel())
        return made


@pytest.mark.parametrize(("height", "width"), [(1, 2000), (1, 2001), (2000, 1), (7, 500), (501, 3)])
def test_a_sliver_is_cut_before_it_grows(height, width):
    """It looks as PIL makes it, and never takes more than 20 squares of memory: whole, 1 x 2000 would be 2000."""
    image, size = photo(height, width), 24
    rows, columns = shortest(height, width, size)
    left, top = (columns - size) // 2, (rows - size) // 2
    theirs = image.resize((columns, rows), BICUBIC).crop((left, top, left + size, top + size))
    pixels = from_pil(image)
    with Largest() as largest:
        ours = Preprocess(size=size)([pixels])[0]
    assert_rounding(ours, normalised(theirs))
    assert largest.values < 20 * ours.numel()


def test_only_a_sliver_loses_its_ends():
    for height, width, *kept in [(2, 32, 2, 32), (2, 33, 2, 33), (2, 34, 2, 32), (90, 3, 48, 3), (91, 3, 49, 3)]:
        image = torch.rand(3, height, width)
        seen = without_ends(image)
        assert list(seen.shape[1:]) == kept
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        assert torch.equal(seen, image[:, top : top + kept[0], left : left + kept[1]])


def test_pad_is_black_before_it_is_normalised():
    out = Preprocess(size=32, mode="pad")([torch.ones(3, 10, 40)])[0]
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert torch.equal(out[:, :12], black[:, None, None].expand(3, 12, 32))
    assert torch.equal(out[:, 20:], black[:, None, None].expand(3, 12, 32))
    assert (out[:, 12:20] > 1).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash_is_transformers_siglip_processor(height, width, interpolation):
    from transformers import SiglipImageProcessor

    image, resample = photo(height, width), {"bilinear": 2, "bicubic": 3}[interpolation]
    theirs = SiglipImageProcessor(size={"height": 224, "width": 224}, resample=resample)(image, return_tensors="pt")
    ours = Preprocess(size=224, mode="squash", interpolation=interpolation, mean=HALF, std=HALF)([from_pil(image)])
    assert_rounding(ours[0], theirs["pixel_values"][0])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resized_before_the_cut_is_dinov2s_processor(height, width):
    from transformers import BitImageProcessor

    image = photo(height, width)
    processor = BitImageProcessor(size={"shortest_edge": 256}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    ours = Preprocess(size=224, resized=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)([from_pil(image)])
    assert_rounding(ours[0], processor(image, return_tensors="pt")["pixel_values"][0])


def test_antialias_is_what_makes_the_difference():
    """The figures of the spec: 0.004 with, 0.13 without, 0.02 for bilinear, on a 1/f picture of 1024 pixels."""
    image = photo(1024, 1024)
    theirs, pixels = normalised(image.resize((224, 224), BICUBIC)), from_pil(image)[None]

    def gap(mode, antialias):
        small = torch.nn.functional.interpolate(pixels, (224, 224), mode=mode, antialias=antialias).clamp(0, 1)[0]
        return differ((small - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None], theirs)[
            0
        ]

    ours = differ(Preprocess(size=224)([pixels[0]])[0], theirs)[0]
    assert ours < 0.006
    assert gap("bicubic", False) > 10 * ours
    assert gap("bilinear", True) > 2 * ours


def test_pictures_of_several_sizes_make_one_batch_and_do_not_mix():
    pictures = [
        torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in [(40, 64), (33, 33), (90, 31)]
    ]
    for mode in ("shortest", "pad", "squash"):
        prepare = Preprocess(size=32, mode=mode)
        together = prepare(pictures)
        assert together.shape == (3, 3, 32, 32)
        for row, picture in zip(together, pictures, strict=True):
            assert torch.equal(row, prepare([picture])[0])


@pytest.mark.parametrize("mode", ["shortest", "pad", "squash"])
@pytest.mark.parametrize("side", [24, 48])
def test_the_gradient_reaches_saturated_pixels(mode, side):
    """Black, white and, from a decoder that overshoots, beyond: all still learn which way is better."""
    picture = torch.full((3, side, side), 1.02)
    picture[:, : side // 2] = -0.02
    picture.requires_grad_()
    out = Preprocess(size=24, mode=mode)([picture])
    (out * torch.rand(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert picture.grad.isfinite().all()
    assert (picture.grad.abs() > 0).all()


def test_what_a_decoder_overshoots_is_cut_as_bytes_would_be():
    picture = torch.linspace(-0.05, 1.05, 32 * 32).reshape(1, 32, 32).expand(3, 32, 32)
    ours = Preprocess(size=32)([picture])
    torch.testing.assert_close(ours, Preprocess(size=32)([picture.clamp(0, 1)]), rtol=0, atol=1e-6)


def test_dtypes():
    picture = torch.rand(3, 40, 40)
    assert Preprocess(size=32)([picture.bfloat16()]).dtype == torch.float32
    assert Preprocess(size=32)([picture.double()]).dtype == torch.float64


def test_resize_of_a_batch_is_that_of_each():
    batch = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(batch, 20, 30)[1], resize(batch[1], 20, 30))


def test_sides_are_those_of_the_references():
    """Transformers' shorter side, and the longer side as HPSv2's own code computes it."""
    from transformers.image_transforms import get_resize_output_image_size

    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 2000, (3000, 2)).tolist():
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        theirs = get_resize_output_image_size(image, 224, default_to_square=False, input_data_format="channels_last")
        assert shortest(height, width, 224) == tuple(theirs)
        scale = 224 / max(height, width)
        assert longest(height, width, 224) == (round(height * scale), round(width * scale))


def test_the_cut_is_the_centre():
    from torchvision.transforms.functional import center_crop

    for height, width in [(32, 36), (40, 32), (32, 34)]:
        picture = torch.rand(3, height, width)
        assert torch.equal(centre_crop(picture, 32), center_crop(picture, 32))
    odd = torch.arange(35.0).expand(3, 32, 35)
    assert centre_crop(odd, 32)[0, 0, 0] == 1  # 1.5: torchvision says 2, transformers 1
    assert center_crop(odd, 32)[0, 0, 0] == 2


@pytest.mark.parametrize(
    ("factor", "low", "high"),
    [(28, 56 * 56, 14 * 14 * 4 * 1280), (28, 256 * 28 * 28, 256 * 28 * 28), (28, 3136, 200704)],
)
def test_smart_size_is_qwens(factor, low, high):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    sizes = np.random.default_rng(0).integers(15, 2000, (3000, 2)).tolist()  # below, transformers starts from 0 columns
    compared = 0
    for height, width in sizes:
        if max(height, width) <= 200 * min(height, width):
            assert smart_size(height, width, factor, low, high) == smart_resize(height, width, factor, low, high)
            compared += 1
    assert compared > 2500
    assert smart_size(1024, 1024, 28, 256 * 28 * 28, 256 * 28 * 28) == (448, 448)


def test_smart_size_refuses_a_line():
    with pytest.raises(ValueError, match="too narrow"):
        smart_size(10, 2001, 28, 3136, 200704)


@pytest.mark.parametrize("words", ["hello world", "This is\nfine print"])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 300), (300, 100), (700, 600)])
def test_text_is_sharp_as_pil_leaves_it(words, height, width):
    """Overshoot beside black letters on white: PIL cuts it after each of two passes, rows first."""
    image = to_pil(text(words, 512, 40).media)
    theirs = from_pil(image.resize((width, 512), BICUBIC).resize((width, height), BICUBIC))
    ours = resize(from_pil(image), height, width)
    assert differ(ours, theirs)[1] < 1.1 / 255
    once = torch.nn.functional.interpolate(from_pil(image)[None], (height, width), mode="bicubic", antialias=True)[0]
    assert differ(once.clamp(0, 1), theirs)[1] > 5 / 255
