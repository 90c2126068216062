"""The renderer against geometry written down another way, the splits against the meaning of their sentences."""

import math
import random

import pytest
import torch

from flowrl.shapes.scenes import GRID, JITTER, RADIUS, SLOTS, TINT, Scenes, compositions, draw, prompts, render
from rewards.shapes import BACKGROUND, CATEGORIES, COLORS, RELATIONS, SHAPES, SIZE, Spec, coverage


def corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The outline of a shape of straight edges as a polygon, clockwise from the top."""
    outer = {"square": 1.2, "triangle": 1.3, "star": 1.3}[shape] * radius
    tips, turn = {"square": (4, 45.0), "triangle": (3, 0.0), "star": (5, 0.0)}[shape]
    points = []
    for i in range(tips):
        angle = math.radians(turn + i * 360 / tips)
        points.append((x + outer * math.sin(angle), y - outer * math.cos(angle)))
        if shape == "star":
            angle += math.pi / tips
            points.append((x + 0.62 * radius * math.sin(angle), y - 0.62 * radius * math.cos(angle)))
    return points


def is_inside(x: float, y: float, polygon: list[tuple[float, float]]) -> bool:
    """Even-odd rule."""
    odd = False
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if (ay > y) != (by > y) and x < ax + (y - ay) * (bx - ax) / (by - ay):
            odd = not odd
    return odd


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_covered_as_much_as_the_outline_covers_them(shape):
    """Coverage of every pixel against 8 x 8 points in it."""
    x, y, radius, fine = 20.3, 18.8, 10.4, 8
    points = [(i + 0.5) / fine for i in range(40 * fine)]
    if shape == "circle":
        rows = [[math.hypot(px - x, py - y) < radius for px in points] for py in points]
    else:
        polygon = corners(shape, x, y, radius)
        rows = [[is_inside(px, py, polygon) for px in points] for py in points]
    truth = torch.nn.functional.avg_pool2d(torch.tensor(rows).float()[None, None], fine)[0, 0]
    cover = coverage(torch.tensor(SHAPES.index(shape)), torch.tensor([x, y]), torch.tensor(radius), 40)
    assert (cover - truth).abs().mean() < 0.002
    assert (cover - truth).abs().max() < 0.35  # at the tips, where one pixel holds two edges
    assert cover.sum().item() == pytest.approx(truth.sum().item(), rel=0.01)


def test_later_objects_cover_earlier_ones_and_empty_slots_nothing():
    red, blue = torch.tensor(COLORS["red"]), torch.tensor(COLORS["blue"])
    scene = Scenes(
        torch.tensor([[0, 1, -1]]),
        torch.tensor([[[30.0, 30.0], [36.0, 30.0], [70.0, 70.0]]]),
        torch.full((1, 3), 10.0),
        torch.stack([red, blue, blue])[None],
    )
    image = render(scene)[0]
    assert torch.allclose(image[:, 30, 36], blue) and torch.allclose(image[:, 30, 22], red)
    assert torch.allclose(image[:, 70, 70], torch.full((3,), BACKGROUND))
    assert image.shape == (3, SIZE, SIZE) and render(scene, 48).shape == (1, 3, 48, 48)


def test_scenes_are_what_their_spec_asks():
    everything = [spec for category in CATEGORIES for wordings in compositions(category) for spec in wordings]
    scenes = draw(everything, seed=3)
    for i, spec in enumerate(everything):
        words = [thing for thing in spec.things for _ in range(thing.count)]
        assert int((scenes.shape[i] >= 0).sum()) == len(words) <= SLOTS
        for k, thing in enumerate(words):
            assert SHAPES[int(scenes.shape[i, k])] == thing.shape
            off = [(scenes.rgb[i, k] - torch.tensor(rgb)).abs().max().item() for rgb in COLORS.values()]
            assert min(off) <= TINT + 1e-6
            assert thing.color in (None, list(COLORS)[off.index(min(off))])
            assert RADIUS[0] <= float(scenes.radius[i, k]) <= RADIUS[1]
        if spec.relation:
            along = (scenes.xy[i, 0] - scenes.xy[i, 1]) @ torch.tensor(RELATIONS[spec.relation], dtype=torch.float32)
            assert along / (scenes.xy[i, 0] - scenes.xy[i, 1]).norm() > math.cos(math.radians(33))


def test_objects_stand_in_cells_of_their_own():
    specs = [spec for wordings in compositions("counting") for spec in wordings] * 10
    scenes = draw(specs, seed=4)
    cell = SIZE / GRID
    seen = set()
    for i, spec in enumerate(specs):
        count = spec.things[0].count
        cells = [tuple((scenes.xy[i, k] // cell).long().tolist()) for k in range(count)]
        assert len(set(cells)) == count
        seen.update(cells)
        middle = (scenes.xy[i, :count] // cell + 0.5) * cell
        assert (scenes.xy[i, :count] - middle).abs().max() <= JITTER + 1e-5
    assert len(seen) == GRID**2


def test_a_seed_draws_the_same_scene_again():
    specs = prompts("train")[:20]
    assert all(torch.equal(a, b) for a, b in zip(draw(specs, 5), draw(specs, 5), strict=True))
    assert not torch.equal(draw(specs, 5).xy, draw(specs, 6).xy)


# ------------------------------------------------------------------------------------------------ splits


def meaning(spec: Spec) -> tuple[object, ...]:
    """The same for all sentences that ask for the same scenes: "left of" the other way round is "right of"."""
    things = [(t.shape, t.color, t.count) for t in spec.things]
    if spec.relation in ("right of", "below"):
        things = things[::-1]
        return (*things, {"right of": "left of", "below": "above"}[spec.relation])
    return (*things, spec.relation) if spec.relation else (*sorted(things, key=str), None)


def test_no_composition_is_in_both_splits_in_whichever_wording():
    train, held_out = prompts("train"), prompts("held_out")
    assert not {meaning(s) for s in train} & {meaning(s) for s in held_out}
    for split in (train, held_out):
        two = [s for s in split if len(s.things) == 2]
        wordings = [sum(meaning(other) == meaning(s) for other in two) for s in two]
        assert set(wordings) == {2}  # both sentences of a pair are in the same split


def test_the_splits_are_all_prompts_once_and_a_quarter_is_held_out():
    train, held_out = prompts("train"), prompts("held_out")
    everything = {spec for category in CATEGORIES for wordings in compositions(category) for spec in wordings}
    assert set(train) | set(held_out) == everything and len(train) + len(held_out) == len(everything)
    for category in CATEGORIES:
        held = sum(spec.category == category for spec in held_out)
        whole = sum(spec.category == category for spec in everything)
        assert 0 < held and held / whole == pytest.approx(0.25, abs=0.1)


def test_every_word_is_trained_on():
    """Held out are compositions, not words: each shape, colour, number and relation occurs in training."""
    train = prompts("train")
    assert {t.shape for s in train for t in s.things} == set(SHAPES)
    assert {t.color for s in train for t in s.things} - {None} == set(COLORS)
    assert {s.relation for s in train} - {None} == set(RELATIONS)
    assert {t.count for s in train for t in s.things} == {1, 2, 3, 4}


def test_splits_do_not_depend_on_the_random_state():
    before = prompts("held_out")
    random.seed(123)
    assert prompts("held_out") == before


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown split"):
        prompts("test")
    with pytest.raises(ValueError, match="unknown category"):
        compositions("three")
