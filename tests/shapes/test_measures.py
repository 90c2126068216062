"""Measures against arithmetic on small cases, and against pictures whose dirt and spread are known."""

import itertools
import math

import pytest
import torch

from flowrl.shapes.measures import (
    diversity,
    estimate,
    evaluate_images,
    fidelity,
    judge_images,
    paired_difference,
)
from flowrl.shapes.scenes import CELL, Scenes, draw, prompts, render
from rewards.shapes import BACKGROUND, CATEGORIES, COLORS, SHAPES, SIZE, Spec, Thing


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Two samples of each held-out prompt."""
    specs = [spec for spec in prompts("held_out") for _ in range(2)]
    group = torch.arange(len(specs)) // 2
    return render(draw(specs, 0)), [spec.prompt for spec in specs], group


def noisy(images: torch.Tensor, sd: float) -> torch.Tensor:
    return (images + sd * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def scene(shape: str, color: str, column: int, row: int) -> torch.Tensor:
    """One object in the middle of a cell, [3,96,96]."""
    place = torch.tensor([[[(column + 0.5) * CELL, (row + 0.5) * CELL]]])
    rgb = torch.tensor(COLORS[color])[None, None]
    return render(Scenes(torch.tensor([[SHAPES.index(shape)]]), place, torch.tensor([[10.0]]), rgb))[0]


# ------------------------------------------------------------------------------------------------ estimates


def test_the_error_of_a_proportion_is_the_binomial_one():
    mean, error, num = estimate(torch.tensor([1.0, 0, 0, math.nan, 1, 1]))
    assert (mean, num) == (0.6, 5) and error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_copies_of_a_sample_do_not_make_a_mean_more_certain():
    values = torch.tensor([1.0, 0, 0, 1, 1, 0, 1])
    alone = estimate(values)
    copies = estimate(values.repeat_interleave(4), torch.arange(7).repeat_interleave(4))
    assert copies.mean == pytest.approx(alone.mean) and copies.error == pytest.approx(alone.error)
    assert copies.num == 28 and estimate(values, torch.arange(7) + 5) == pytest.approx(alone)


def test_nothing_valid_has_no_estimate():
    mean, error, num = estimate(torch.full((3,), math.nan), torch.zeros(3))
    assert math.isnan(mean) and math.isnan(error) and num == 0


def test_pairs_cancel_what_they_share():
    """Differences 0, 1, 0, 1 (the pair with a NaN does not count): mean 1/2, error sqrt(1/4 / 4)."""
    luck = torch.tensor([10.0, 20, 30, 40, 50])
    gain = paired_difference(luck, luck + torch.tensor([0.0, 1, 0, 1, math.nan]))
    assert gain == pytest.approx((0.5, 0.25, 4))
    assert gain.error < estimate(luck).error / 10


# ------------------------------------------------------------------------------------------------ fidelity


def test_clean_pictures_are_explained_by_their_scene(pictures):
    clean = fidelity(pictures[0])
    assert clean.explained.min() > 0.95 and clean.explained.mean() > 0.99
    assert clean.background.max() < 0.002 and clean.fill.max() < 0.002


def test_noise_lowers_fidelity_and_raises_the_texture(pictures):
    rows = [fidelity(noisy(pictures[0][:30], sd)) for sd in (0, 0.02, 0.05, 0.1, 0.2)]
    for less, more in itertools.pairwise(rows):
        assert (more.explained < less.explained).all()
        assert (more.high_frequency > less.high_frequency).all()
        assert (more.background > less.background).all() and (more.fill > less.fill).all()


def test_noise_is_measured_in_its_own_units():
    image = scene("circle", "red", 1, 1)[None]
    image = image + 0.03 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    measured = fidelity(image)
    assert measured.background.item() == pytest.approx(0.03, rel=0.15)
    assert measured.fill.item() == pytest.approx(0.03, rel=0.2)
    flat = BACKGROUND + 0.03 * torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    # white noise minus its mean over 9 pixels keeps 8/9 of its variance
    assert fidelity(flat).high_frequency.item() == pytest.approx(0.03 * math.sqrt(8 / 9), rel=0.03)


def test_blank_and_broken_pictures():
    blank = torch.full((1, 3, SIZE, SIZE), BACKGROUND)
    measured = fidelity(torch.cat([blank, blank * math.nan]))
    assert measured.explained[0] == 0 and measured.high_frequency[0] < 1e-6
    assert all(column[1].isnan() and not column[0].isnan() for column in measured)


# ------------------------------------------------------------------------------------------------ diversity


def test_copies_of_one_picture_are_not_diverse():
    image = scene("star", "blue", 0, 2)
    group = torch.zeros(5, dtype=torch.long)
    spread = diversity(image.expand(5, -1, -1, -1), group)
    assert spread.placement == (0, 0, 1) and spread.color == (0, 0, 1)
    # texture is not diversity
    assert diversity(noisy(image.expand(5, -1, -1, -1), 0.05), group).placement.mean == 0


def test_distances_between_samples():
    """Three pictures: two share their cell, two their colour, so that two of three pairs differ in each."""
    images = torch.stack([scene("star", "blue", 0, 0), scene("star", "red", 0, 0), scene("star", "red", 2, 1)])
    spread = diversity(images, torch.zeros(3, dtype=torch.long))
    assert spread.placement.mean == pytest.approx(2 / 3) and spread.color.mean == pytest.approx(2 / 3)
    # compared are samples of one prompt only; a group of one says nothing
    assert diversity(images, torch.tensor([0, 0, 1])).placement == (0, 0, 1)
    assert diversity(images, torch.tensor([0, 1, 2])).placement.num == 0


def test_only_open_colors_count(pictures):
    images = torch.stack([scene("star", "red", 0, 0), scene("star", "blue", 0, 0)] * 2)
    spread = diversity(images, torch.tensor([0, 0, 1, 1]), ["a star", "a star", "a blue star", "a blue star"])
    assert spread.color == (1, 0, 1) and spread.placement.num == 2


def test_the_renderer_is_diverse_and_a_collapsed_model_is_not(pictures):
    images, asked, group = (part[:80] for part in pictures)
    spread = diversity(images, group, asked)
    assert spread.placement.mean > 0.6 and spread.color.mean > 0.5
    collapsed = images[group * 2]
    assert diversity(collapsed, group, asked).placement.mean == 0


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_of_the_truth(pictures):
    images, asked, group = pictures
    table = evaluate_images(images, asked, group)
    assert table["strict"] == (1, 0, len(images)) and table["stricter"].mean >= 0.95 and table["soft"].mean > 0.99
    assert {f"strict/{category}" for category in CATEGORIES} <= set(table)
    assert sum(table[f"strict/{category}"].num for category in CATEGORIES) == len(images)
    assert table["fidelity"].mean > 0.99 and table["background"].mean < 0.001
    assert table["diversity/placement"].num == len(images) // 2


def test_the_table_leaves_out_what_has_no_verdict(pictures):
    images, asked, group = (part[:8] for part in pictures)
    images, asked = images.clone(), list(asked)
    images[0] = math.nan
    asked[3] = "a dog"
    table = evaluate_images(images, asked, group)
    assert table["strict"].num == 6 and table["strict"].mean == 1
    assert table["fidelity"].num == 7 and math.isfinite(table["fidelity"].mean)
    assert table["diversity/placement"].num == 3


def test_a_drop_shows_where_it_is(pictures):
    images, asked, group = (part[:80] for part in pictures)
    blue = render(draw([Spec("colors", (Thing("star", "blue"),))] * len(images), 0))
    of_colors = torch.tensor([prompt.count(" ") == 2 and "and" not in prompt for prompt in asked])
    assert 0 < of_colors.sum() < len(images)
    mixed = torch.where(of_colors[:, None, None, None], blue, images)
    before, after = judge_images(images, asked), judge_images(mixed, asked)
    drop = paired_difference(before["strict"], after["strict"], group)
    table = evaluate_images(mixed, asked, group)
    assert drop.mean == pytest.approx(table["strict"].mean - 1) and drop.mean < 0 < drop.error
    assert table["strict/colors"].mean < 1 and table["strict/position"].mean == 1


def test_other_sizes_are_resized(pictures):
    images, asked, group = (part[:40] for part in pictures)
    large = torch.nn.functional.interpolate(images, (192, 192), mode="bilinear")
    assert evaluate_images(large, list(asked), group)["strict"].mean == 1
