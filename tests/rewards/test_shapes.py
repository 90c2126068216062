"""The checker of the built-in world against scenes whose truth is known, judged a second time by brute force.

The other judge below never looks at a picture: it reads the numbers that the scene was drawn from, and tries all
assignments.
"""

import itertools
import math
import random
from functools import cache

import pytest
import torch
from torch import Tensor

from flowrl.shapes.scenes import CELL, SLOTS, Scenes, compositions, draw, render
from rewards import RewardError, Sample, build
from rewards.shapes import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    LEVELS,
    MAX_BLOBS,
    RELATIONS,
    SHAPES,
    SIZE,
    Detections,
    Shapes,
    Spec,
    Thing,
    _connect,
    detect,
    judge,
    parse,
    resize,
)

PER_CATEGORY = 300
TOWARD = {"left of": 180.0, "right of": 0.0, "above": 90.0, "below": 270.0}  # degrees, counter-clockwise, y upwards


# ------------------------------------------------------------------------------------------------ a second opinion


def nearest_color(rgb: list[float]) -> str:
    return min(COLORS, key=lambda name: math.dist(COLORS[name], rgb))


def objects_of(scenes: Scenes, index: int) -> list[tuple[str, str, tuple[float, float]]]:
    """What stands in one scene: (shape, colour, (x, y)) of every filled slot."""
    found = []
    for k in range(scenes.shape.shape[1]):
        kind = int(scenes.shape[index, k])
        if kind >= 0:
            x, y = scenes.xy[index, k].tolist()
            found.append((SHAPES[kind], nearest_color(scenes.rgb[index, k].tolist()), (x, y)))
    return found


def is_true(spec: Spec, objects: list[tuple[str, str, tuple[float, float]]]) -> bool:
    """Whether a scene is exactly what a spec asks, tried over every assignment of objects to words."""
    words = [thing for thing in spec.things for _ in range(thing.count)]
    if len(words) != len(objects):
        return False
    for order in itertools.permutations(objects):
        same = all(o[0] == w.shape and w.color in (None, o[1]) for o, w in zip(order, words, strict=True))
        if same and (spec.relation is None or on_side(spec.relation, order[0][2], order[1][2])):
            return True
    return False


def on_side(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    angle = math.degrees(math.atan2(second[1] - first[1], first[0] - second[0]))
    off = (angle - TOWARD[relation] + 180) % 360 - 180
    return abs(off) <= 45


# ------------------------------------------------------------------------------------------------ pictures


@cache
def cases(category: str) -> tuple[list[Spec], Scenes, Tensor]:
    """Every prompt of a category in turn, a scene of each, its picture."""
    everything = [spec for wordings in compositions(category) for spec in wordings]
    specs = [everything[i % len(everything)] for i in range(PER_CATEGORY)]
    random.Random(category).shuffle(specs)
    scenes = draw(specs, seed=len(category))
    return specs, scenes, render(scenes)


@cache
def found_in(category: str) -> Detections:
    return detect(cases(category)[2])


def blurred(images: Tensor, sigma: float = 1.0) -> Tensor:
    taps = torch.exp(-(torch.arange(-4, 5.0) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, 9)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    across = torch.nn.functional.conv2d(padded, taps, groups=3)
    return torch.nn.functional.conv2d(across, taps.transpose(2, 3), groups=3)


def noisy(images: Tensor, sd: float = 0.05) -> Tensor:
    return (images + sd * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def one(*objects: tuple[str, str, float, float], radius: float = 10.0) -> Tensor:
    """The picture [1,3,96,96] of objects (shape, colour, x, y)."""
    shape, xy = torch.full((1, MAX_BLOBS + 2), -1), torch.zeros(1, MAX_BLOBS + 2, 2)
    rgb = torch.zeros(1, MAX_BLOBS + 2, 3)
    for k, (kind, color, x, y) in enumerate(objects):
        shape[0, k], xy[0, k], rgb[0, k] = SHAPES.index(kind), torch.tensor([x, y]), torch.tensor(COLORS[color])
    return render(Scenes(shape, xy, torch.full((1, MAX_BLOBS + 2), radius), rgb))


def soft(image: Tensor, prompt: str) -> float:
    return float(judge(detect(image), [asked(prompt)]).soft)


def strict(image: Tensor, prompt: str, level: str = "default") -> float:
    return float(judge(detect(image), [asked(prompt)], level).strict)


def asked(prompt: str) -> Spec:
    spec = parse(prompt)
    assert spec is not None, prompt
    return spec


# ------------------------------------------------------------------------------------------------ grammar


def test_every_prompt_is_parsed_back():
    specs = [spec for category in CATEGORIES for wordings in compositions(category) for spec in wordings]
    assert [parse(spec.prompt) for spec in specs] == specs
    assert len({spec.prompt for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dog",
        "a red",
        "five circles",
        "two red circles",
        "a circle near a star",
        "a circle and a star and a square",
    ],
)
def test_other_sentences_are_none_of_this_world(prompt):
    assert parse(prompt) is None


def test_small_differences_of_writing_do_not_matter():
    assert parse("  A Red  circle. ") == Spec("colors", (Thing("circle", "red"),))


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_checker_agrees_with_the_truth(category):
    """Right and wrong prompts on clean, blurred and noisy pictures: 98 % in every category.

    The stricter checker does so unless there is noise, which it is there to reject.
    """
    specs, scenes, images = cases(category)
    others = specs[1:] + specs[:1]
    truth = [
        torch.tensor([is_true(s, objects_of(scenes, i)) for i, s in enumerate(which)]) for which in (specs, others)
    ]
    assert truth[0].all() and truth[1].float().mean() < 0.5
    finds = {"clean": found_in(category), "blur": detect(blurred(images)), "noise": detect(noisy(images))}
    for kind, found in finds.items():
        for which, right in zip((specs, others), truth, strict=True):
            assert (judge(found, which).strict == right).float().mean() >= 0.98, kind
            stricter = judge(found, which, "stricter").strict
            assert stricter.sum() == 0 if kind == "noise" else (stricter == right).float().mean() >= 0.98, kind


@pytest.mark.parametrize("category", CATEGORIES)
def test_soft_is_one_exactly_where_strict_is(category):
    specs, _, _ = cases(category)
    found = found_in(category)
    for which in (specs, specs[1:] + specs[:1], specs[7:] + specs[:7]):
        verdict = judge(found, which)
        assert torch.equal(verdict.strict == 1, verdict.soft == 1)
        assert ((verdict.soft >= 0) & (verdict.soft <= 1)).all()


def test_detections_are_the_objects_that_were_drawn():
    _, scenes, _ = cases("counting")
    found = found_in("counting")
    for i in range(100):
        drawn = objects_of(scenes, i)
        assert int(found.num[i]) == int(found.valid[i].sum()) == len(drawn)
        for k in range(len(drawn)):
            distance = [math.dist(found.xy[i, k].tolist(), o[2]) for o in drawn]
            kind, color, _ = drawn[distance.index(min(distance))]
            at = distance.index(min(distance))
            assert min(distance) < 0.1
            assert abs(float(found.radius[i, k]) - float(scenes.radius[i, at])) < 0.05
            assert (SHAPES[int(found.shape[i, k])], list(COLORS)[int(found.color[i, k])]) == (kind, color)


def test_prompts_shuffled_over_all_categories_are_rejected():
    specs = [spec for category in CATEGORIES for spec in cases(category)[0][:50]]
    parts = [[field[:50] for field in found_in(category)] for category in CATEGORIES]
    random.Random(1).shuffle(specs)
    found = Detections(*(torch.cat(field) for field in zip(*parts, strict=True)))
    assert judge(found, specs).strict.mean() < 0.05


def test_every_color_may_drift_as_far_as_the_renderer_lets_it():
    drifts = torch.tensor(list(itertools.product((-0.03, 0.03), repeat=3)))
    for name, rgb in COLORS.items():
        n = len(drifts) * len(SHAPES)
        scenes = Scenes(
            torch.arange(len(SHAPES)).repeat_interleave(len(drifts))[:, None],
            torch.full((n, 1, 2), CELL * 1.5),
            torch.full((n, 1), 9.0),
            (torch.tensor(rgb) + drifts).clamp(0, 1).repeat(len(SHAPES), 1)[:, None],
        )
        specs = [asked(f"a {name} {shape}") for shape in SHAPES for _ in drifts]
        verdict = judge(detect(render(scenes)), specs, "stricter")
        assert verdict.strict.all() and verdict.clean.min() == 1


def test_colors_that_touch_are_two_objects():
    image = one(("square", "red", 40, 48), ("square", "blue", 57, 48))
    assert strict(image, "a red square and a blue square", "stricter") == 1


def test_pictures_do_not_depend_on_their_batch():
    specs, _, images = cases("two")
    images = noisy(images[:66])  # more than are looked at in one go
    alone = [judge(detect(image[None]), [spec]).soft for image, spec in zip(images, specs, strict=False)]
    assert torch.allclose(torch.cat(alone), judge(detect(images), specs[:66]).soft, atol=1e-6)


# ------------------------------------------------------------------------------------------------ judging


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_side_ends_at_45_degrees(relation):
    softs = []
    for off in (180, 135, 90, 60, 46, 44, 20, 0):
        angle = math.radians(TOWARD[relation] + off)
        image = one(("circle", "red", 48 + 28 * math.cos(angle), 48 - 28 * math.sin(angle)), ("star", "blue", 48, 48))
        assert strict(image, f"a circle {relation} a star") == (abs(off) < 45), off
        softs.append(soft(image, f"a circle {relation} a star"))
    assert softs == sorted(softs) and softs[4] < 1 and softs[5:] == [1, 1, 1]
    assert softs[0] == pytest.approx(0.5)


def test_a_relation_is_seen_from_the_second_thing():
    image = one(("circle", "red", 20, 48), ("circle", "blue", 76, 48))
    assert strict(image, "a red circle left of a blue circle") == 1
    assert strict(image, "a blue circle left of a red circle") == 0
    assert strict(image, "a circle left of a circle") == 1  # one of the two is


def test_partial_credit_for_counts():
    """Asked for three: 1 - |n - 3| / 3 for missing ones, 3 / n for too many."""
    places = [("star", "red", x, y) for x, y in ((16, 16), (80, 16), (16, 80), (80, 80), (48, 48))]
    credit = [soft(one(*places[:n]), "three stars") for n in range(6)]
    assert credit == pytest.approx([0, 1 / 3, 2 / 3, 1, 3 / 4, 3 / 5])


def test_closer_to_right_is_worth_more():
    def circle(*more: tuple[str, str, float, float]) -> Tensor:
        return one(("circle", "red", 48, 48), *more)

    prompt = "a red circle"
    nothing, neither = soft(one(), prompt), soft(one(("star", "blue", 48, 48)), prompt)
    shape, right = soft(one(("circle", "blue", 48, 48)), prompt), soft(circle(), prompt)
    extra, extras = (
        soft(circle(("star", "blue", 16, 16)), prompt),
        soft(circle(("star", "blue", 16, 16), ("star", "blue", 80, 16)), prompt),
    )
    assert 0 == nothing < neither < shape < right == 1
    assert extras < extra < right


def test_attributes_must_be_bound_to_their_own_shape():
    image = one(("circle", "red", 20, 20), ("star", "blue", 70, 70))
    assert strict(image, "a red circle and a blue star") == strict(image, "a blue star and a red circle") == 1
    assert strict(image, "a blue circle and a red star") == 0
    assert 0.4 < soft(image, "a blue circle and a red star") < 0.8
    assert strict(image, "a circle and a star") == 1 and strict(image, "a circle") == 0


def test_more_objects_than_slots_are_counted_all_the_same():
    assert SLOTS <= MAX_BLOBS
    grid = [("square", "green", 12 + 24 * (i % 4), 12 + 24 * (i // 4)) for i in range(MAX_BLOBS + 2)]
    found = detect(one(*grid, radius=7.0))
    assert int(found.num) == MAX_BLOBS + 2 and found.valid.all()
    assert judge(found, [asked("four squares")]).strict == 0


def test_components_are_those_of_a_flood_fill():
    generator = torch.Generator().manual_seed(0)
    for count, edges in ((1, 0), (30, 20), (200, 190)):
        a, b = torch.randint(count, (2, edges), generator=generator)
        parent = list(range(count))
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            old, new = parent[i], parent[j]
            parent = [new if p == old else p for p in parent]
        label = _connect(count, a, b).tolist()
        assert len(set(zip(label, parent, strict=True))) == len(set(label)) == len(set(parent))


# ------------------------------------------------------------------------------------------------ exploits


def test_speckle_inside_of_the_shapes_costs():
    """Texture in shapes that hue and outline alone would recognise: what a reward blind to it was seen to breed."""
    image = one(("circle", "red", 30, 30), ("square", "blue", 66, 66))
    inside = (image - BACKGROUND).abs().amax(1, keepdim=True) > 0.3
    speckle = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * inside
    prompt = "a circle and a square"
    softs = [soft((image + sd * speckle).clamp(0, 1), prompt) for sd in (0, 0.05, 0.1, 0.15, 0.2)]
    assert softs[0] == 1 and all(a > b for a, b in itertools.pairwise(softs)) and softs[-1] < 0.8
    dirty = (image + 0.15 * speckle).clamp(0, 1)
    assert strict(dirty, prompt, "stricter") == 0
    assert float(detect(dirty).fill) > 5 * float(detect(dirty).background)


def test_a_faint_background_pattern_costs():
    image = one(("circle", "red", 30, 30), ("square", "blue", 66, 66))
    wave = torch.sin(torch.arange(SIZE) * 0.7)
    pattern = (wave[:, None] * wave) * ((image - BACKGROUND).abs().amax(1, keepdim=True) < 0.01)
    prompt = "a circle and a square"
    softs = [soft((image - height * pattern).clamp(0, 1), prompt) for height in (0, 0.1, 0.15, 0.2, 0.3)]
    assert softs[0] == 1 and all(a > b for a, b in itertools.pairwise(softs)) and softs[-1] < 0.85
    assert strict((image - 0.15 * pattern).clamp(0, 1), prompt, "stricter") == 0


def test_a_tinted_background_and_a_faded_object_cost():
    image = one(("circle", "red", 48, 48))
    tinted = (image - torch.tensor([0.0, 0.08, 0.08])[:, None, None]).clamp(0, 1)
    faded = BACKGROUND + 0.75 * (image - BACKGROUND)
    for dirty in (tinted, faded):
        assert soft(dirty, "a red circle") < 0.85 and strict(dirty, "a red circle", "stricter") == 0


def test_dirt_too_small_to_be_an_object_is_dirt():
    image = one(("circle", "red", 48, 48))
    for x, y in itertools.product(range(4, 92, 11), (8, 84)):
        image[:, 0, y : y + 3, x : x + 3] = 0.1
    found = detect(image)
    assert int(found.num) == 1 and float(found.residual) > LEVELS["stricter"].residual


def test_one_colored_pictures_are_no_object_of_any_kind():
    everything = torch.tensor(list(COLORS.values()))[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for prompt in ("a square", "a red square", "two circles"):
        verdict = judge(detect(everything), [asked(prompt)] * len(everything))
        assert verdict.strict.sum() == 0 and verdict.soft.max() < 0.5


def test_empty_black_and_random_pictures_are_wrong_but_judged():
    empty = torch.full((1, 3, SIZE, SIZE), BACKGROUND)
    images = torch.cat([empty, torch.zeros_like(empty), torch.ones_like(empty), noisy(empty, 1.0)])
    for category in CATEGORIES:
        verdict = judge(detect(images), cases(category)[0][: len(images)])
        assert verdict.strict.sum() == 0 and verdict.soft.max() < 0.2
        assert not any(part.isnan().any() for part in verdict)
    assert judge(detect(empty), [asked("a circle")]).soft == 0


# ------------------------------------------------------------------------------------------------ the reward


def samples_of(category: str, count: int) -> list[Sample]:
    specs, _, images = cases(category)
    return [Sample(media=image, prompt=spec.prompt) for image, spec in zip(images[:count], specs, strict=False)]


def test_the_reward_reports_all_parts():
    scores = Shapes().score([sample for category in CATEGORIES for sample in samples_of(category, 5)])
    assert set(scores.parts) == {"strict", "soft", "residual", "stricter"}
    assert (scores.value == 1).all() and (scores.parts["stricter"] == 1).all()
    assert scores.parts["residual"].max() < 0.01


def test_what_cannot_be_judged_has_no_verdict():
    good, bad = samples_of("single", 2)
    broken = bad.media.clone()
    broken[1, 5, 5] = math.nan
    endless = bad.media.clone()
    endless[0, 0, 0] = math.inf
    scores = Shapes().score(
        [
            good,
            Sample(media=bad.media, prompt="a dog on a sofa"),
            Sample(media=broken, prompt=bad.prompt),
            Sample(media=endless, prompt=bad.prompt),
        ]
    )
    assert scores.value.isnan().tolist() == [False, True, True, True]
    assert all(part.isnan().tolist() == [False, True, True, True] for part in scores.parts.values())
    assert "error" not in scores.info[0]
    assert scores.info[1]["error"] == "not a sentence of the built-in world: 'a dog on a sofa'"
    assert "NaN" in scores.info[2]["error"] and "NaN" in scores.info[3]["error"]


def test_no_sample_can_be_judged():
    scores = Shapes().score([Sample(media=torch.rand(3, SIZE, SIZE), prompt="a dog")])
    assert scores.value.isnan().all() and len(scores.value) == 1


def test_options():
    (sample,) = samples_of("colors", 1)
    dirty = Sample(media=noisy(sample.media[None], 0.08)[0], prompt=sample.prompt)
    value = {
        key: float(build("shapes", options).score([dirty]).value)
        for key, options in {
            "soft": {},
            "all clean": {"clean": 1.0},
            "blind": {"clean": 0.0},
            "strict": {"score": "strict"},
            "stricter": {"score": "strict", "level": "stricter"},
        }.items()
    }
    assert 0 < value["all clean"] < value["soft"] < value["blind"] == 1
    assert value["strict"] == 1 and value["stricter"] == 0
    for wrong in ({"score": "hard"}, {"level": "strictest"}, {"clean": 2.0}):
        with pytest.raises(RewardError, match="shapes: "):
            Shapes(**wrong)


def test_pictures_of_another_size_are_resized():
    specs, scenes, _ = cases("attribution")
    big = Scenes(scenes.shape, scenes.xy * 2, scenes.radius * 2, scenes.rgb)
    big = Scenes(*(field[:30] for field in big))
    images = render(big, 2 * SIZE)
    assert resize(images).shape == (30, 3, SIZE, SIZE) and resize(images[0]).shape == (3, SIZE, SIZE)
    scores = Shapes().score([Sample(media=m, prompt=s.prompt) for m, s in zip(images, specs, strict=False)])
    assert scores.parts["stricter"].mean() > 0.95 and scores.value.mean() > 0.99
    with pytest.raises(ValueError, match="resize"):
        detect(images)


def test_gradients_stop_at_the_reward():
    (sample,) = samples_of("colors", 1)
    wet = Sample(media=sample.media.clone().requires_grad_(), prompt=sample.prompt)
    assert not Shapes().score([wet]).value.requires_grad
