"""Probes do what they say, and the suite tells a reward that is fooled from one that is not; the figures by hand."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from flowrl.shapes.scenes import draw, prompts, render
from rewards import RewardError, RewardHub, Sample, available, declare
from rewards import _changes as changes
from rewards.media import from_pil, to_pil
from rewards.preprocess import resize
from rewards.probes import ADVERSARIAL, EFFECT, PROBES, SENSITIVE, Probe, attack, decide, natural_unit, probe
from tests.rewards.clips import photo
from tests.rewards.makers import noise, text

pytestmark = pytest.mark.slow

SIZES = ((37, 50), (64, 64))


def picture(height=64, width=64, seed=0):
    return from_pil(photo(height, width, seed))


def video(frames=5, height=24, width=32):
    return torch.stack([picture(height, width, seed) for seed in range(frames)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def edges(media):
    """Energy of the Laplacian."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(media.reshape(-1, 1, *media.shape[-2:]), kernel).square().mean().item()


def around(samples, seed=0):
    return changes.Around(generator=generator(seed), samples=samples)


# ------------------------------------------------------------------------------------------------ every probe


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("media", [picture(37, 50), picture(9, 9), video()], ids=["picture", "tiny picture", "video"])
def test_every_probe_keeps_shape_and_range_repeats_itself_and_leaves_the_sample_alone(name, media):
    samples = [
        Sample(media=media, prompt='a sign that says "open"', fps=8.0 if media.ndim == 4 else None),
        Sample(media=media, prompt="a dog", meta={"text": "dog"}),
    ]
    untouched = media.clone()
    first, again = (PROBES[name].change(samples[0], around(samples)) for _ in range(2))
    assert torch.equal(media, untouched)
    if first is None:
        assert media.ndim == 3 and name in ("frozen", "shuffled", "reversed", "half_fps", "flicker")
        return
    assert first.media.shape == media.shape and first.media.dtype == torch.float32 and first.fps == samples[0].fps
    assert 0 <= first.media.min() and first.media.max() <= 1
    assert torch.equal(first.media, again.media) and (first.prompt, first.meta) == (again.prompt, again.meta)
    changed = not torch.equal(first.media, media) or first.prompt != samples[0].prompt
    assert changed == (name != "unchanged")


# ------------------------------------------------------------------------------------------------ pictures


def test_jpeg_is_pillows_and_worse_with_less_quality():
    image = picture(40, 56)
    file = io.BytesIO()
    to_pil(image).save(file, format="JPEG", quality=30)
    assert torch.equal(changes.jpeg(image, 30), from_pil(Image.open(file)))
    errors = [(changes.jpeg(image, quality) - image).square().mean() for quality in (50, 30, 10)]
    assert errors == sorted(errors)
    clip = video()
    assert torch.equal(changes.jpeg(clip, 10)[3], changes.jpeg(clip[3], 10))


def test_blur_is_a_gaussian():
    """A point becomes a spot of weight 1 whose variance is sigma^2 in both directions."""
    point = torch.zeros(3, 129, 129)
    point[:, 64, 64] = 1
    spot = changes.blur(point, share=3 / 129)[0].double()
    x = torch.arange(129).double() - 64
    assert spot.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spot.sum(0) * x**2).sum().item() == pytest.approx(9, rel=0.03)  # cut off at 3 sigma
    assert (spot.sum(1) * x**2).sum().item() == pytest.approx(9, rel=0.03)
    assert edges(changes.blur(picture())) < 0.1 * edges(picture())
    torch.testing.assert_close(changes.blur(torch.full((3, 20, 30), 0.3)), torch.full((3, 20, 30), 0.3))


def test_noise_has_the_std_that_it_says_and_is_another_one_in_every_frame():
    noisy = changes.noise(torch.full((2, 3, 128, 128), 0.5), generator())
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02) and noisy.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert not torch.equal(noisy[0], noisy[1])


def test_sharpening_strengthens_edges_and_leaves_areas_alone():
    assert edges(changes.sharpen(picture())) > 2 * edges(picture())
    torch.testing.assert_close(changes.sharpen(torch.full((3, 20, 30), 0.3)), torch.full((3, 20, 30), 0.3))


@pytest.mark.parametrize("size", SIZES)
def test_saturation_and_contrast_are_pillows(size):
    """Pillow rounds luma and its mean to bytes, which the factor enlarges."""
    image = picture(*size)
    enhanced = {
        changes.saturate: ImageEnhance.Color(to_pil(image)).enhance(2.0),
        changes.contrast: ImageEnhance.Contrast(to_pil(image)).enhance(1.8),
    }
    for change, expected in enhanced.items():
        assert (change(image) - from_pil(expected)).abs().max() < 2.5 / 255
    clip = video()
    torch.testing.assert_close(changes.contrast(clip)[2], changes.contrast(clip[2]))


def test_posterising_leaves_six_levels_each_within_half_a_step():
    levels = changes.posterise(picture())
    assert len(levels.unique()) <= 6 and (levels - picture()).abs().max() <= 0.1 + 1e-6


def test_oily_is_the_kuwahara_filter():
    """Pixel by pixel: the mean of the calmest of the four squares that have it in a corner."""
    image, radius = picture(14, 17), 2
    padded = F.pad(image[None], (radius,) * 4, mode="replicate")[0].double()
    luma = torch.einsum("chw,c->hw", padded, torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))
    expected = torch.empty_like(image)
    for y in range(14):
        for x in range(17):
            squares = [(slice(y + j, y + j + 3), slice(x + i, x + i + 3)) for j in (0, 2) for i in (0, 2)]
            calm = min(squares, key=lambda square: luma[square].var(correction=0).item())
            expected[:, y, x] = padded[:, calm[0], calm[1]].mean((1, 2))
    torch.testing.assert_close(changes.oily(image), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(changes.oily(torch.stack([image, image]))[1], expected, atol=1e-5, rtol=0)


def test_an_oily_picture_keeps_a_hard_edge():
    half = torch.zeros(3, 32, 32)
    half[..., 16:] = 1
    torch.testing.assert_close(changes.oily(half), half)
    assert not torch.allclose(changes.blur(half), half, atol=0.1)


def test_the_empty_pictures():
    image = picture(48, 64)
    assert PROBES["grey"].change(Sample(media=image), around([])).media.unique().tolist() == [0.5]
    assert PROBES["white"].change(Sample(media=image), around([])).media.unique().tolist() == [1.0]
    board = changes.checkerboard(image)
    assert board[0, :6, :6].unique().tolist() == [0.0] and board[0, :6, 6:12].unique().tolist() == [1.0]
    assert torch.equal(board[..., 6:], 1 - board[..., :-6]) and torch.equal(board[:, 6:], 1 - board[:, :-6])


def test_a_tiled_picture_is_four_small_ones():
    image = picture(40, 64)
    tiled, small = changes.tile(image), resize(image, 20, 32)
    for quarter in (tiled[:, :20, :32], tiled[:, 20:, :32], tiled[:, :20, 32:], tiled[:, 20:, 32:]):
        assert torch.equal(quarter, small)


def test_crop_shows_the_middle_and_nothing_else():
    image = torch.zeros(3, 50, 100)
    image[:, 10:40, 20:80] = picture(30, 60)
    expected = to_pil(picture(30, 60)).resize((100, 50), Image.Resampling.BICUBIC)
    assert (changes.crop(image) - from_pil(expected)).abs().max() < 2 / 255


def test_a_letterbox_is_the_small_picture_in_black():
    image = picture(40, 80)
    framed = changes.letterbox(image)
    assert torch.equal(framed[:, 6:34, 12:68], resize(image, 28, 56))
    framed[:, 6:34, 12:68] = 0
    assert not framed.any()


def test_low_resolution_is_pillows_way_down_and_up():
    image = picture(64, 96)
    small = to_pil(image).resize((24, 16), Image.Resampling.BICUBIC).resize((96, 64), Image.Resampling.BICUBIC)
    assert (changes.low_resolution(image) - from_pil(small)).abs().max() < 2 / 255


def test_flip_twice_is_nothing():
    image = picture(20, 31)
    assert torch.equal(changes.flip(changes.flip(image)), image) and torch.equal(
        changes.flip(image)[..., 0], image[..., -1]
    )


@pytest.mark.parametrize("words", ["open", "a very long prompt about many things, " * 6, "x" * 80])
def test_writing_puts_dark_letters_on_a_white_band_below(words):
    image = torch.full((3, 200, 160), 0.5)
    written = changes.write(image, words)
    assert torch.equal(written[:, :120], image[:, :120])
    band = written[:, 120:]
    dark = (band < 0.5).float().mean()
    assert 0.01 < dark < 0.5 and band.max() == 1
    assert (band[:, :, -4:] == 1).all() and (band[:, -1] == 1).all()  # it fits


def test_a_short_text_is_written_larger_than_a_long_one():
    def letter_height(words):
        dark = (changes.write(torch.ones(3, 200, 200), words)[0, 120:] < 0.5).any(1).tolist()
        return dark.index(False, dark.index(True)) - dark.index(True)

    assert letter_height("hi") > 1.5 * letter_height("hill, " * 20) > 0


# ------------------------------------------------------------------------------------------------ videos


def test_the_videos():
    clip = video()
    frozen, shuffled, half, dim = (
        changes.freeze(clip), changes.shuffle(clip, generator()), changes.half_fps(clip), changes.flicker(clip),
    )  # fmt: skip
    assert all(torch.equal(frame, clip[0]) for frame in frozen)
    places = [[torch.equal(frame, other) for other in clip].index(True) for frame in shuffled]
    assert sorted(places) == list(range(5)) and places != list(range(5))
    assert torch.equal(changes.backwards(clip), torch.stack(list(reversed(clip.unbind()))))
    assert torch.equal(half, clip[[0, 0, 2, 2, 4]])
    assert torch.equal(dim[::2], clip[::2]) and torch.equal(dim[1::2], 0.7 * clip[1::2])


def test_two_frames_are_always_shuffled():
    clip = video(2)
    assert all(torch.equal(changes.shuffle(clip, generator(seed)), clip.flip(0)) for seed in range(8))


def test_a_video_of_one_frame_has_nothing_to_shuffle_or_freeze():
    clip = Sample(media=video(1))
    assert all(
        PROBES[name].change(clip, around([])) is None
        for name in ("frozen", "shuffled", "reversed", "half_fps", "flicker")
    )


# ------------------------------------------------------------------------------------------------ prompts


def test_a_swapped_prompt_brings_its_metadata_and_is_never_the_own():
    samples = [noise(i, prompt=f"prompt {i % 3}", meta={"text": str(i % 3)}) for i in range(9)]
    found = [changes.swap_prompt(samples[0], around(samples, seed)) for seed in range(20)]
    assert {(each.prompt, each.meta["text"]) for each in found} == {("prompt 1", "1"), ("prompt 2", "2")}
    assert all(each.media is samples[0].media for each in found)
    assert changes.swap_prompt(samples[0], around(samples[::3])) is None


def test_prompts_are_emptied_and_padded():
    sample = noise(prompt="a dog", meta={"text": "dog"})
    assert changes.without_prompt(sample, around([])).prompt == ""
    padded = changes.pad_prompt(sample, around([])).prompt
    assert padded.startswith("a dog, ") and "best quality" in padded
    nothing = noise(prompt="")
    for change in (changes.without_prompt, changes.pad_prompt, changes.write_prompt, changes.repeat_target):
        assert change(nothing, around([])) is None


# ------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("sign", "delta", "low", "high", "verdict"),
    [
        (-1, 0.5, 0.2, 0.8, "fooled"),
        (-1, 0.5, -0.1, 1.1, "not moved"),
        (-1, EFFECT / 2, 0.01, 0.09, "not moved"),
        (-1, -0.5, -0.8, -0.2, "ok"),
        (1, 0.5, 0.2, 0.8, "ok"),
        (1, -0.5, -0.8, -0.2, "fooled"),
        (1, 0.0, 0.0, 0.0, "not moved"),
        (0, 0.0, -9.0, 9.0, "sensitive"),
        (-1, 0.5, math.nan, math.nan, "no verdict"),
        (0, 0.5, math.nan, math.nan, "no verdict"),
    ],
)
def test_the_decision_rule(sign, delta, low, high, verdict):
    assert decide(sign, delta, low, high, size=2 * SENSITIVE) == verdict
    assert decide(0, 0.0, 0.0, 0.0, size=SENSITIVE) == "ok"


def test_the_natural_unit_by_hand():
    """A: 0.2, 0.4 and B: 0.5, 0.9: squares 0.02 + 0.08 with 4 - 2 degrees of freedom."""
    scores = np.array([0.2, 0.5, 0.4, 0.9, math.nan])
    within = natural_unit(scores, list("ABABA"))
    assert within.over == "prompt" and within.size == pytest.approx(math.sqrt(0.10 / 2))
    alone = natural_unit(scores, list("ABCDE"))
    assert alone.over == "all" and alone.size == pytest.approx(np.std([0.2, 0.5, 0.4, 0.9], ddof=1))
    equal_within = natural_unit(np.array([1.0, 1, 3, 3]), list("AABB"))
    assert equal_within.over == "all" and equal_within.size == pytest.approx(math.sqrt(4 / 3))
    for nothing in (np.array([1.0, 1, 1]), np.array([math.nan]), np.array([5.0, 5 + 1e-7])):
        unit = natural_unit(nothing, ["A"] * len(nothing))
        assert (unit.over, unit.size) == ("score", 1.0)


def levels(*values, size=16):
    """Flat pictures, two a prompt."""
    return [
        Sample(media=torch.full((3, size, size), level), prompt=f"prompt {i // 2}", group=i // 2)
        for i, level in enumerate(values)
    ]


def test_deltas_by_hand():
    """White on 0.2, 0.4 | 0.5, 0.9 adds 0.8, 0.6 | 0.5, 0.1; the prompts' means, 0.7 and 0.3, are the interval."""
    report = probe("pixel.brightness", levels(0.2, 0.4, 0.5, 0.9), names=["white", "grey", "unchanged"])
    unit = math.sqrt(0.05)
    assert report.units["pixel.brightness"].size == pytest.approx(unit, rel=1e-5)
    white = report.row("pixel.brightness", "white")
    assert (white.delta, white.low, white.high) == pytest.approx((0.5 / unit, 0.3 / unit, 0.7 / unit), rel=1e-4)
    assert (white.rose, white.n, white.by, white.verdict) == (1.0, 4, "prompt", "fooled")
    grey = report.row("pixel.brightness", "grey")
    assert grey.delta == pytest.approx(0, abs=1e-5) and grey.size == pytest.approx(0.2 / unit, rel=1e-4)
    assert (grey.rose, grey.verdict) == (0.5, "not moved")
    assert report.row("pixel.brightness", "unchanged").verdict == "ok"


def test_one_prompt_is_resampled_by_sample_and_one_sample_has_no_interval():
    samples = [replace(sample, prompt="same", group=0) for sample in levels(0.2, 0.4, 0.5, 0.9)]
    row = probe("pixel.brightness", samples, names=["white"]).row("pixel.brightness", "white")
    assert row.by == "sample" and row.low < row.delta < row.high and row.verdict == "fooled"
    assert "(by sample)" in probe("pixel.brightness", samples, names=["white"]).to_markdown()
    alone = probe("pixel.brightness", samples[:1], names=["white"])
    assert alone.rows[0].verdict == "no verdict" and alone.rows[0].delta == pytest.approx(0.8)
    assert alone.units["pixel.brightness"].over == "score"


def test_a_missing_verdict_is_left_out_and_its_reason_told():
    def picky(samples):
        return [None if sample.media.mean() > 0.95 else sample.media.mean().item() for sample in samples]

    report = probe({"use": picky}, levels(0.2, 0.4, 0.99, 0.9), names=["flip", "white"])
    assert (report.row("picky", "flip").n, report.row("picky", "flip").applied) == (3, 4)
    white = report.row("picky", "white")
    assert (white.n, white.verdict) == (0, "no verdict") and math.isnan(white.delta)
    text_aware = probe("shapes", [replace(s, prompt="a red circle") for s in levels(0.2, 0.4)], names=["prompt_empty"])
    assert "not a sentence of the built-in world" in text_aware.rows[0].error
    assert "not a sentence of the built-in world" in text_aware.to_markdown()


def test_own_probes_and_improvements():
    def brighter(sample):
        return replace(sample, media=(sample.media + 0.3).clamp(max=1))

    own = {
        "bad": (brighter, -1),
        "good": (brighter, 1),
        "same": (brighter, 0),
        "never": (lambda sample: None, -1),
    }
    report = probe("pixel.brightness", levels(0.2, 0.4, 0.5, 0.6), names=list(own), own=own)
    verdicts = {row.probe: row.verdict for row in report.rows}
    assert verdicts == {"bad": "fooled", "good": "ok", "same": "sensitive"} and report.skipped == ("never",)


def test_the_same_seed_gives_the_same_report_whatever_else_is_probed():
    samples = [noise(seed, prompt=f"p{seed % 2}", group=seed % 2) for seed in range(4)]
    alone = probe("pixel.contrast", samples, names=["noise"])
    beside = probe(["pixel.redness", "pixel.contrast"], samples, names=["noise", "blur"])
    assert alone.row("pixel.contrast", "noise") == beside.row("pixel.contrast", "noise")
    other = probe("pixel.contrast", samples, names=["noise"], seed=1)
    assert other.row("pixel.contrast", "noise").delta != alone.row("pixel.contrast", "noise").delta


def test_weights_and_norms_do_not_matter():
    samples = levels(0.2, 0.4, 0.5, 0.9)
    plain = probe("pixel.brightness", samples, names=["white", ADVERSARIAL])
    entry = {"use": "pixel.brightness", "weight": 0, "norm": "rank", "gate": {"min": 0.5, "floor": 0}}
    assert probe([entry], samples, names=["white", ADVERSARIAL]).rows == plain.rows
    assert probe({"pixel.brightness": 3.0}, samples, names=["white", ADVERSARIAL]).rows == plain.rows


def test_what_cannot_be_probed_is_refused():
    samples = levels(0.2, 0.4)
    with pytest.raises(RewardError, match="no probe 'blurr'.*blur"):
        probe("pixel.contrast", samples, names=["blurr"])
    with pytest.raises(RewardError, match="already"):
        probe("pixel.contrast", samples, own={"blur": (lambda sample: sample, -1)})
    with pytest.raises(RewardError, match="expected -1, 0 or 1"):
        probe("pixel.contrast", samples, own={"mine": (lambda sample: sample, 2)})
    with pytest.raises(RewardError, match="no samples"):
        probe("pixel.contrast", [])
    with pytest.raises(RewardError, match="compares the samples of a group.*probe its judge"):
        probe({"use": "pairs", "judge": "pixel.contrast"}, samples)


# ------------------------------------------------------------------------------------------------ fooled or not


@pytest.fixture(scope="module")
def scenes():
    """Pictures of the built-in world that show what is asked, and for every prompt one that does not."""
    specs = prompts("train")[:: len(prompts("train")) // 5][:5]
    pictures = render(draw([spec for spec in specs for _ in range(3)], seed=0))
    shown = [Sample(media=image, prompt=specs[i // 3].prompt, group=i // 3) for i, image in enumerate(pictures)]
    wrong = [replace(shown[3 * i], prompt=spec.prompt, group=i) for i, spec in enumerate(specs[1:] + specs[:1])]
    return [replace(s, group=[spec.prompt for spec in specs].index(s.prompt)) for s in [*shown, *wrong]]


@pytest.fixture(scope="module")
def report(scenes):
    return probe(["pixel.contrast", "pixel.jpeg_compressibility", {"use": "shapes", "score": "strict"}], scenes)


def test_contrast_is_fooled_by_noise_and_contrast(report):
    assert {"noise", "contrast", "sharpen", "checkerboard"} <= set(report.with_verdict("pixel.contrast", "fooled"))
    assert {"grey", "white"} <= set(report.with_verdict("pixel.contrast", "ok"))


def test_compressibility_is_fooled_by_blur_and_grey(report):
    assert {"grey", "white", "blur"} <= set(report.with_verdict("pixel.jpeg_compressibility", "fooled"))
    assert "noise" in report.with_verdict("pixel.jpeg_compressibility", "ok")


def test_compressibility_is_fooled_by_oil_where_there_is_texture():
    samples = [Sample(media=picture(seed=seed), prompt=f"p{seed % 2}", group=seed % 2) for seed in range(4)]
    assert probe("pixel.jpeg_compressibility", samples, names=["oily"]).rows[0].verdict == "fooled"


def test_the_checker_of_shapes_is_fooled_by_none_of_the_pictures(report):
    assert report.units["shapes"].over == "prompt"
    assert report.with_verdict("shapes", "fooled") == []
    assert {"grey", "white", "checkerboard", "tile", "prompt_swap"} <= set(report.with_verdict("shapes", "ok"))
    assert report.row("shapes", "prompt_empty").verdict == "no verdict"


def test_a_reward_blind_to_the_prompt_is_not_moved_by_another(report):
    for blind in ("pixel.contrast", "pixel.jpeg_compressibility"):
        assert {"prompt_swap", "prompt_empty"} <= set(report.with_verdict(blind, "not moved"))
        assert report.row(blind, "prompt_padding").verdict == "ok"


def test_a_flip_matters_to_a_reward_that_has_sides(scenes):
    @declare(deterministic=True)
    def left_is_dark(samples):
        return [(s.media[..., s.media.shape[-1] // 2 :].mean() - s.media.mean()).item() for s in samples]

    found = probe(["pixel.contrast", {"use": left_is_dark}], scenes, names=["flip"])
    assert {row.reward: row.verdict for row in found.rows} == {"pixel.contrast": "ok", "left_is_dark": "sensitive"}


def test_steadiness_is_fooled_by_a_frozen_video():
    @declare(media={"video"}, deterministic=True)
    def steady(samples):
        return [-(s.media[1:] - s.media[:-1]).abs().mean().item() for s in samples]

    def moving(seed):
        base = picture(24, 40, seed)
        return torch.stack([base.roll((1 + seed % 3) * shift, dims=-1) for shift in range(6)])

    samples = [Sample(media=moving(seed), prompt=f"p{seed % 2}", group=seed % 2, fps=8.0) for seed in range(6)]
    report = probe(steady, samples, names=["frozen", "shuffled", "half_fps", "flicker", "reversed"])
    verdicts = {row.probe: row.verdict for row in report.rows}
    assert verdicts["frozen"] == verdicts["half_fps"] == "fooled"
    assert verdicts["shuffled"] == verdicts["flicker"] == "ok" and verdicts["reversed"] == "not moved"


def test_a_reward_for_images_is_probed_on_videos():
    samples = [Sample(media=video(4) * (1 - i / 10), prompt=f"p{i % 2}", group=i % 2) for i in range(4)]
    report = probe("pixel.contrast", samples, names=["contrast", "flicker"])
    assert report.row("pixel.contrast", "contrast").verdict == "fooled" and not report.skipped
    dimmed = [
        torch.stack([pixel_contrast(f) * (1 - 0.3 * (i % 2)) for i, f in enumerate(s.media)]).mean() for s in samples
    ]
    natural = [torch.stack([pixel_contrast(f) for f in s.media]).mean() for s in samples]
    expected = torch.stack(dimmed).sub(torch.stack(natural)).mean() / report.units["pixel.contrast"].size
    assert report.row("pixel.contrast", "flicker").delta == pytest.approx(expected.item(), rel=1e-4)


def pixel_contrast(image):
    return torch.einsum("chw,c->hw", image, torch.tensor([0.299, 0.587, 0.114])).std(correction=0)


def test_repeating_the_target_fools_contain_and_not_ned():
    pytest.importorskip("rapidocr")
    pairs = [("HELO", "HELLO"), ("HELLO", "HELLO"), ("OPEM", "OPEN"), ("OPEN", "OPEN")]
    samples = [text(shown, prompt=f'a sign: "{asked}"', group=ord(asked[0])) for shown, asked in pairs]
    entries = [{"use": "ocr", "mode": mode, "name": mode} for mode in ("contain", "ned")]
    report = probe(entries, samples, names=["repeated_target"])
    assert report.row("contain", "repeated_target").verdict == "fooled"
    assert report.row("ned", "repeated_target").verdict == "ok"
    assert report.row("contain", "repeated_target").rose == 0.5  # those that were wrong


# ------------------------------------------------------------------------------------------------ the gradient


def test_the_headroom_of_brightness_is_in_closed_form():
    """Each pixel rises by 8/255, or up to 1."""
    samples = levels(0.2, 0.4, 0.5, 0.99)
    with RewardHub("pixel.brightness") as hub:
        attacked = attack(hub, samples)
    for sample, found in zip(samples, attacked, strict=True):
        torch.testing.assert_close(found.media, (sample.media + 8 / 255).clamp(max=1))
        assert found.prompt == sample.prompt and not found.media.requires_grad
    report = probe("pixel.brightness", samples, names=[ADVERSARIAL])
    gain = (3 * 8 / 255 + 0.01) / 4
    unit = report.units["pixel.brightness"].size
    assert report.rows[0].delta * unit == pytest.approx(gain, rel=1e-4)
    assert probe("pixel.brightness", levels(0.48, 0.5, 0.52, 0.54), names=[ADVERSARIAL]).rows[0].verdict == "fooled"


def test_the_attack_stays_in_its_box_and_skips_samples_without_a_verdict():
    @declare(differentiable=True)
    def odd(samples):
        values = [s.media.var() if s.prompt else s.media.mean() * math.nan for s in samples]
        return torch.stack(values)

    samples = [noise(0), noise(1, prompt=""), noise(2)]
    with RewardHub({"use": odd}, max_nan_frac=None) as hub:
        found = attack(hub, samples)
    for before, after in zip(samples, found, strict=True):
        assert (after.media - before.media).abs().max() <= 8 / 255 + 1e-6
        assert 0 <= after.media.min() and after.media.max() <= 1
    assert torch.equal(found[1].media, samples[1].media)
    assert found[0].media.var() > samples[0].media.var()


def test_the_attack_is_for_differentiable_rewards_only():
    report = probe(["pixel.jpeg_size", "pixel.redness"], levels(0.2, 0.4, 0.5, 0.9), names=[ADVERSARIAL])
    assert [row.reward for row in report.rows] == ["pixel.redness"]
    assert probe("pixel.jpeg_size", levels(0.2, 0.4), names=[ADVERSARIAL]).skipped == (ADVERSARIAL,)


# ------------------------------------------------------------------------------------------------ the report


def test_json_and_markdown_have_every_row(report):
    data = json.loads(report.to_json())
    assert len(data["rows"]) == len(report.rows) == 3 * (len(PROBES) - 6) + 1  # videos, targets; one has a gradient
    assert data["units"]["shapes"]["over"] == "prompt" and "frozen" in data["skipped"]
    row = next(row for row in data["rows"] if row["verdict"] == "no verdict")
    assert row["delta"] is None and row["error"]
    lines = report.to_markdown().splitlines()
    assert sum(line.startswith("| shapes | ") for line in lines) == len(PROBES) - 6 + 1
    assert any(
        line.startswith("| pixel.contrast | noise | must not rise | +") and line.endswith("| fooled |")
        for line in lines
    )
    with pytest.raises(KeyError):
        report.row("shapes", "frozen")


def test_a_name_with_a_bar_does_not_break_the_table():
    report = probe({"use": "pixel.contrast", "name": "a|b"}, levels(0.2, 0.4), names=["flip"])
    assert "| a\\|b | flip |" in report.to_markdown()


def test_thumbnails_show_before_and_after(tmp_path):
    samples = [
        Sample(media=torch.rand(3, 192, 128, generator=generator(i)), prompt=f"p{i % 3}", group=i % 3) for i in range(6)
    ]
    report = probe(["pixel.contrast", "pixel.jpeg_size"], samples)
    files = report.thumbnails(tmp_path / "sheets")
    tried = {row.probe for row in report.rows}
    assert {file.stem for file in files} == tried and not tried & set(report.skipped)
    assert sum(file.stat().st_size for file in files) < 1_000_000
    with Image.open(tmp_path / "sheets" / "white.png") as sheet:
        pixels = from_pil(sheet)
        assert sheet.width > 2 * 96
    left = pixels[:, 28:124, 8:72]  # the first sample, 64 x 96
    right = pixels[:, 28:124, 112:176]
    assert left.std() > 0.05 and (right > 0.97).all()


def test_a_videos_thumbnail_has_four_frames(tmp_path):
    clip = torch.zeros(8, 3, 48, 48)
    clip[4:] = 1
    samples = [Sample(media=clip, prompt=p, fps=8.0) for p in "ab"]
    (file,) = probe("pixel.brightness", samples, names=["reversed"]).thumbnails(tmp_path)
    pixels = from_pil(Image.open(file))[0, 28:124]
    before, after = pixels[:, 8:104], pixels[:, 112:208]
    assert before[10, 10] < 0.1 and before[60, 60] > 0.9 and after[10, 10] > 0.9 and after[60, 60] < 0.1


def test_the_module_offers_no_reward_and_every_probe_says_what_it_does():
    assert not [name for name in available() if "probes" in name or "check_grad" in name or "changes" in name]
    assert all(isinstance(each, Probe) and each.about and each.sign in (-1, 0, 1) for each in PROBES.values())
