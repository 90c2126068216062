"""GenEval's rules: specs, what counts as found, where things are, and what that is worth; every case by hand."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from rewards._geneval import (
    BACKGROUND,
    RELATIONS,
    Exclude,
    Found,
    Include,
    Spec,
    crop,
    judge,
    keep,
    overlap,
    read_spec,
    relations,
)
from rewards.media import from_pil, to_pil


def at(x, y, w=10, h=10):
    """A box by its centre."""
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def found(name, count, color=None, x=50, y=50):
    return [Found(name=name, score=1 - i / 100, box=at(x, y), color=color) for i in range(count)]


def asked(tag, include, exclude=()):
    return read_spec({"tag": tag, "include": include, "exclude": list(exclude)})


# ------------------------------------------------------------------------------------------------ specs


def test_a_row_of_the_benchmark_is_read_from_meta_or_from_its_own_key():
    row = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 2, "color": "red", "position": ["above", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}],
        "prompt": "not read",
    }
    spec = Spec(
        tag="position",
        include=(
            Include(name="dog", count=1),
            Include(name="cat", count=2, color="red", position=("above", 0)),
        ),
        exclude=(Exclude(name="dog", count=2),),
    )
    assert read_spec(row) == read_spec({"geneval": row, "include": "something else"}) == spec
    assert spec.names == ("dog", "cat")


CAT = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    "meta, told",
    [
        ({}, "no objects to look for"),
        ({"geneval": "a cat"}, "is a str"),
        ({"geneval": {"tag": "counting"}}, "no objects"),
        ({"include": "cat"}, "list of mappings"),
        ({"include": ["cat"]}, "list of mappings"),
        ({"include": [{"class": "cat"}]}, "class and count"),
        ({"include": [{**CAT, "colour": "red"}]}, "nothing but"),
        ({"exclude": [{**CAT, "color": "red"}]}, "nothing but"),
        ({"include": [{**CAT, "count": 0}]}, "count of 'cat' is 0"),
        ({"include": [{**CAT, "count": 1.5}]}, "1.5"),
        ({"include": [{**CAT, "count": True}]}, "True"),
        ({"include": [{**CAT, "class": " "}]}, "name of a class"),
        ({"include": [{**CAT, "color": "mauve"}]}, "mauve"),
        ({"include": [CAT, {**CAT, "position": ["near", 0]}]}, "near"),
        ({"include": [CAT, {**CAT, "position": ["above", 1]}]}, "earlier clause"),
        ({"include": [CAT, {**CAT, "position": ["above", -1]}]}, "earlier clause"),
        ({"include": [CAT, {**CAT, "position": "above"}]}, "'above'"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(meta, told):
    with pytest.raises(ValueError, match=told):
        read_spec(meta)


# ------------------------------------------------------------------------------------------------ what counts


def test_of_a_class_the_surest_above_the_threshold_count_and_no_more_than_allowed():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(40)] + [0.3]
    objects = [Found(name="cat", score=score, box=at(50, 50)) for score in scores]
    assert [each.score for each in keep(objects, 0.3, 16, 1.0)] == sorted(s for s in scores if s > 0.3)[::-1][:16]
    assert [each.score for each in keep(objects, 0.9, 16, 1.0)] == sorted(s for s in scores if s > 0.9)[::-1]
    assert keep(objects[-1:], 0.3, 16, 1.0) == [], "at the threshold is not above it"


def test_overlap_is_the_share_of_common_pixels():
    rng = random.Random(1)
    for _ in range(50):
        boxes = [sorted(rng.sample(range(12), 2)) + sorted(rng.sample(range(12), 2)) for _ in range(2)]
        boxes = [(x0, y0, x1, y1) for x0, x1, y0, y1 in boxes]
        pixels = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes]
        assert overlap(*boxes) == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))
    assert overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_weaker_finds_of_the_same_thing_are_dropped_where_that_is_asked_for():
    objects = [
        Found(name="cat", score=0.9, box=(0, 0, 10, 10)),
        Found(name="cat", score=0.8, box=(0, 0, 10, 9)),  # overlap 0.9 with the first
        Found(name="cat", score=0.7, box=(0, 0, 10, 5)),  # 0.5 with the first
        Found(name="cat", score=0.6, box=(20, 0, 30, 10)),
    ]
    assert [each.score for each in keep(objects, 0.3, 16, 1.0)] == [0.9, 0.8, 0.7, 0.6]
    assert [each.score for each in keep(objects, 0.3, 16, 0.9)] == [0.9, 0.7, 0.6]
    assert [each.score for each in keep(objects, 0.3, 16, 0.5)] == [0.9, 0.6]
    assert len(keep(objects[:1] * 3, 0.3, 16, 1.0)) == 3, "1 drops nothing, not even the same box"
    assert [each.score for each in keep(objects, 0.3, 2, 0.9)] == [0.9], "cut to max_objects first, as GenEval does"


# ------------------------------------------------------------------------------------------------ where


@pytest.mark.parametrize(
    "x, y, seen",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (30, 12, {"right of"}),
        (0, 0, set()),
        (2, 0, set()),  # exactly the margin of 0.1 (10 + 10)
        (2.5, 0, set()),  # beyond it, but 0.5 / 2.5 of the way only
        (4, 0, set()),  # 2 / 4 is not more than a half
        (4.1, 0, {"right of"}),
        (0, -4.1, {"above"}),
    ],
)
def test_relations_by_hand_for_boxes_of_10_by_10(x, y, seen):
    assert relations(at(100 + x, 100 + y), at(100, 100)) == seen


def test_relations_are_those_of_the_formula_written_with_arrays():
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(RELATIONS, 0)
    for _ in range(500):
        corners = rng.uniform(0, 100, (2, 2, 2))
        low, high = corners.min(1), corners.max(1)
        offset = ((low + high) / 2)[0] - ((low + high) / 2)[1]
        shrunk = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * (high - low).sum(0), 0, None)
        part = shrunk / np.linalg.norm(offset)
        expected = {
            name
            for axis, names in enumerate((("left of", "right of"), ("above", "below")))
            for name, sign in zip(names, (-1, 1), strict=True)
            if sign * part[axis] > 0.5
        }
        boxes = [(*low[i], *high[i]) for i in range(2)]
        assert relations(*boxes) == expected
        for name in expected:
            counts[name] += 1
    assert min(counts.values()) > 20


def test_relations_turn_round_with_their_boxes():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    rng = random.Random(2)
    for _ in range(200):
        a, b = (at(rng.uniform(0, 99), rng.uniform(0, 99), rng.uniform(1, 50), rng.uniform(1, 50)) for _ in range(2))
        assert relations(b, a) == {opposite[each] for each in relations(a, b)}
        assert relations(a, b, 1.0) <= relations(a, b, 0.1) <= relations(a, b, 0.0)


# ------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("box", [(3, 4, 20, 17), (3.4, 4.6, 20.5, 16.5), (0, 0, 24, 20), (-3, -2, 40, 50)])
def test_a_crop_is_what_pil_composes_on_grey_999(box):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    mask = rng.random((20, 24)) > 0.5
    expected = Image.composite(picture, Image.new("RGB", picture.size, "#999"), Image.fromarray(mask))
    inside = [max(box[0], 0), max(box[1], 0), min(box[2], 24), min(box[3], 20)]  # PIL would add black beyond it
    seen = crop(from_pil(picture), Found(name="cat", score=1, box=box, mask=torch.from_numpy(mask)))
    assert np.array_equal(np.array(to_pil(seen)), np.array(expected.crop(inside)))
    bare = crop(from_pil(picture), Found(name="cat", score=1, box=box))
    assert np.array_equal(np.array(to_pil(bare)), np.array(picture.crop(inside)))


def test_a_crop_has_at_least_a_pixel_and_no_sliver_is_longer_than_16_times_its_width():
    image = torch.arange(3.0)[:, None, None] + torch.linspace(0, 1, 100)[None, :, None].expand(3, 100, 50)
    assert crop(image, Found(name="cat", score=1, box=(7, 7, 7, 7))).shape == (3, 1, 1)
    assert crop(image, Found(name="cat", score=1, box=(80, 200, 90, 300))).shape == (3, 1, 1)
    sliver = crop(image, Found(name="cat", score=1, box=(3, 0, 5, 100)))
    assert sliver.shape == (3, 32, 2)
    assert torch.equal(sliver, image[:, 34:66, 3:5]), "its middle"
    assert BACKGROUND == 153 / 255


# ------------------------------------------------------------------------------------------------ verdicts


def credits(verdict):
    return [[value for key, value in each.items() if key != "class"] for each in verdict.credits]


@pytest.mark.parametrize("number, strict, exact, dense", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 1, 0, 0), (16, 1, 0, 0)])
def test_single_object(number, strict, exact, dense):
    verdict = judge(asked("single_object", [CAT]), {"cat": found("cat", number)})
    assert (verdict.strict, verdict.exact, verdict.dense) == (strict, exact, dense)


@pytest.mark.parametrize(
    "cats, dogs, strict, exact, dense",
    [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0.5), (0, 1, 0, 0, 0.5), (0, 0, 0, 0, 0), (1, 2, 1, 0, 0.5)],
)
def test_two_object(cats, dogs, strict, exact, dense):
    spec = asked("two_object", [CAT, {"class": "dog", "count": 1}])
    verdict = judge(spec, {"cat": found("cat", cats), "dog": found("dog", dogs)})
    assert (verdict.strict, verdict.exact, verdict.dense) == (strict, exact, dense)


@pytest.mark.parametrize("number", range(9))
def test_counting(number):
    spec = asked("counting", [{"class": "cat", "count": 3}], [{"class": "cat", "count": 4}])
    verdict = judge(spec, {"cat": found("cat", number)})
    assert verdict.strict == verdict.exact == (number == 3)
    assert verdict.dense == pytest.approx({0: 0, 1: 1 / 3, 2: 2 / 3, 3: 1, 4: 2 / 3, 5: 1 / 3}.get(number, 0))
    assert len(verdict.credits) == 1, "what is excluded follows from what is included"


@pytest.mark.parametrize(
    "colors, strict, exact, dense",
    [
        (["red"], 1, 1, 1),
        (["blue"], 0, 0, 0.5),
        ([], 0, 0, 0),
        (["red", None], 1, 0, 0),  # a second car: enough for GenEval, which looks at the surest
        (["blue", "red"], 0, 0, 0),
    ],
)
def test_colors(colors, strict, exact, dense):
    spec = asked("colors", [{"class": "car", "count": 1, "color": "red"}])
    verdict = judge(spec, {"car": [found("car", 1, color)[0] for color in colors]})
    assert (verdict.strict, verdict.exact, verdict.dense) == (strict, exact, dense)


def test_the_share_of_objects_with_the_colour_counts():
    spec = asked("", [{"class": "car", "count": 4, "color": "red"}])
    cars = found("car", 1, "blue") + found("car", 3, "red")
    verdict = judge(spec, {"car": cars})
    assert credits(verdict) == [[1, 0.75]]
    assert verdict.strict_reasons == ["expected red car>=4, found 3 red (blue, red, red, red)"]


POSITION = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]


@pytest.mark.parametrize(
    "objects, strict, exact, dense, told",
    [
        ({"dog": (50, 50), "cat": (10, 50)}, 1, 1, 1, ""),
        ({"dog": (50, 50), "cat": (90, 50)}, 0, 0, 2 / 3, "expected cat left of target, found right of target"),
        ({"dog": (50, 50), "cat": (50, 10)}, 0, 0, 2 / 3, "expected cat left of target, found above target"),
        ({"dog": (50, 50), "cat": (51, 50)}, 0, 0, 2 / 3, "found in none of the four directions from target"),
        ({"cat": (10, 50)}, 0, 0, 1 / 3, "no target for cat to be left of"),
        ({"dog": (50, 50)}, 0, 0, 1 / 3, "expected cat>=1, found 0"),
    ],
)
def test_position(objects, strict, exact, dense, told):
    finds = {name: found(name, 1, x=x, y=y) for name, (x, y) in objects.items()}
    verdict = judge(asked("position", POSITION), finds)
    assert (verdict.strict, verdict.exact, verdict.dense) == (strict, exact, pytest.approx(dense))
    assert told in "; ".join(verdict.strict_reasons)
    assert bool(verdict.strict_reasons) == (not strict)


def test_every_object_must_be_in_the_relation_to_every_target():
    spec = asked("", [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["left of", 0]}])
    for places in itertools.product((10, 90), repeat=4):
        one, two, three, four = places
        finds = {
            "dog": found("dog", 1, x=one) + found("dog", 1, x=two),
            "cat": found("cat", 1, x=three) + found("cat", 1, x=four),
        }
        expected = max(three, four) < min(one, two)
        assert judge(spec, finds).strict == judge(spec, finds).exact == expected


def test_a_target_that_failed_is_none_though_it_was_found():
    spec = asked("", [{"class": "dog", "count": 1, "color": "red"}, POSITION[1]])
    verdict = judge(spec, {"dog": found("dog", 1, "blue"), "cat": found("cat", 1, x=10)})
    assert credits(verdict) == [[1, 0], [1, 0]]
    assert "no target for cat to be left of" in verdict.strict_reasons


@pytest.mark.parametrize("cat, dog", list(itertools.product(("red", "blue"), repeat=2)))
def test_color_attr(cat, dog):
    spec = asked("color_attr", [{**CAT, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}])
    verdict = judge(spec, {"cat": found("cat", 1, cat), "dog": found("dog", 1, dog)})
    right = (cat == "red") + (dog == "blue")
    assert verdict.strict == verdict.exact == (right == 2)
    assert verdict.dense == (2 + right) / 4


def test_what_is_excluded_beside_what_is_included_has_a_credit_of_its_own():
    spec = asked("", [CAT], [{"class": "dog", "count": 1}, {"class": "cat", "count": 2}])
    clean = judge(spec, {"cat": found("cat", 1)})
    assert (clean.strict, clean.exact, clean.dense, credits(clean)) == (True, True, 1, [[1], [1]])
    spoilt = judge(spec, {"cat": found("cat", 1), "dog": found("dog", 3)})
    assert (spoilt.strict, spoilt.exact, spoilt.dense) == (False, False, 0.5)
    assert spoilt.strict_reasons == ["expected dog<1, found 3"]
    assert judge(asked("", [], [{"class": "dog", "count": 1}]), {}).dense == 1


def random_case(rng):
    """A spec that may contradict itself, and finds that may meet it."""
    names = ("cat", "dog", "car")
    include = []
    for index in range(rng.randint(0, 3)):
        clause = {"class": rng.choice(names), "count": rng.choice((1, 1, 1, 2, 3))}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(("red", "blue"))
        if index and rng.random() < 0.5:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(index)]
        include.append(clause)
    exclude = [{"class": rng.choice(names), "count": rng.randint(1, 4)} for _ in range(rng.randint(0, 2))]
    if not include and not exclude:
        include = [dict(CAT)]
    places = {name: (rng.choice((20, 50, 80)), rng.choice((20, 50, 80))) for name in names}
    finds = {
        name: [
            found(name, 1, rng.choice(("red", "red", "blue")), *places[name])[0]
            for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))
        ]
        for name in names
    }
    return asked("", include, exclude), finds


def brute(spec, finds, exact):
    """The protocol once more, by what must be true of the picture."""
    met = []
    for clause in spec.include:
        have = finds[clause.name]
        fine = len(have) == clause.count if exact else len(have) >= clause.count
        best = have[: clause.count]
        fine = fine and all(clause.color in (None, each.color) for each in best)
        if clause.position:
            relation, index = clause.position
            others = finds[spec.include[index].name][: spec.include[index].count]
            fine = fine and met[index] and all(relation in relations(a.box, b.box) for a in best for b in others)
        met.append(fine)
    return all(met) and all(len(finds[each.name]) < each.count for each in spec.exclude)


def test_verdicts_are_those_of_a_brute_force_check_and_dense_is_1_where_exact_is():
    rng = random.Random(0)
    counts = {"strict": 0, "exact": 0, "partial": 0}
    for _ in range(4000):
        spec, finds = random_case(rng)
        verdict = judge(spec, finds)
        assert verdict.strict == brute(spec, finds, exact=False)
        assert verdict.exact == brute(spec, finds, exact=True)
        assert (verdict.dense == 1) == verdict.exact
        assert verdict.strict or not verdict.exact
        assert 0 <= verdict.dense <= 1 and math.isfinite(verdict.dense)
        assert all(0 <= value <= 1 for row in credits(verdict) for value in row)
        assert bool(verdict.exact_reasons) == (not verdict.exact)
        counts["strict"] += verdict.strict
        counts["exact"] += verdict.exact
        counts["partial"] += 0 < verdict.dense < 1
    assert min(counts.values()) > 200


def flow_grpo(spec, finds):
    """The published credits, but for a 1 that it adds behind the 0 of a wrong position; may be below 0."""
    earned = []
    met = []
    for clause in spec.include:
        have, ref = finds[clause.name], clause.count
        earned.append(1 - abs(ref - len(have)) / ref)
        fine = len(have) == ref
        if clause.color:
            right = sum(each.color == clause.color for each in have) if fine else 0
            earned.append(1 - abs(ref - right) / ref)
            fine = fine and right == ref
        if clause.position:
            others = met[clause.position[1]]
            fine = (
                fine
                and bool(others)
                and all(clause.position[0] in relations(a.box, b.box) for a in have for b in others)
            )
            earned.append(float(fine))
        met.append(have if fine else [])
    return sum(earned) / len(earned)


def test_dense_is_the_published_score_where_no_count_is_more_than_twice_what_was_asked():
    rng = random.Random(1)
    compared = 0
    for _ in range(2000):
        spec, finds = random_case(rng)
        single = all(not (clause.color and clause.position) for clause in spec.include)
        if not spec.exclude and single and all(len(finds[c.name]) <= 2 * c.count for c in spec.include):
            assert judge(spec, finds).dense == pytest.approx(flow_grpo(spec, finds))
            compared += 1
    assert compared > 200
