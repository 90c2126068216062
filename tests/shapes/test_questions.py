"""Questions about the built-in world: splits, balance, boxes against the outlines they are of, and their verifiers."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

from flowrl.shapes.questions import (
    CELL,
    KINDS,
    QUADRANTS,
    SIZE,
    SPLITS,
    VERIFIERS,
    Digit,
    Scene,
    about,
    draw,
    make,
    questions,
    rows,
    thought,
)
from rewards.shapes import SHAPES, coverage
from rewards.verifiers import Answer
from rewards.verifiers.adapter import Verifiers


@pytest.fixture(scope="module")
def held_out():
    return questions("held_out")


@pytest.fixture(scope="module")
def train():
    return questions("train", count=1200)


def cases(kind, count=200, split="train"):
    rng = random.Random(kind)
    return [make(kind, turn, rng, split) for turn in range(count)]


# ------------------------------------------------------------------------------------------------ rows


def test_the_same_questions_every_time_and_fewer_are_the_first(held_out):
    for again in (questions("held_out"), questions("held_out", count=50)):
        for one, other in zip(again, held_out, strict=False):
            assert (one.text, one.metadata) == (other.text, other.metadata)
            assert one.picture.tobytes() == other.picture.tobytes()
    assert len(questions("held_out", count=50)) == 50 and len(held_out) == SPLITS["held_out"] == 720


def test_a_kind_asked_alone_is_the_same_as_among_all(held_out):
    alone = questions("held_out", kinds=["box"])
    among = [question for question in held_out if question.metadata["category"] == "box"]
    assert [q.picture.tobytes() for q in alone] == [q.picture.tobytes() for q in among]
    assert len(alone) == 120


def test_no_composition_and_no_picture_is_in_both_splits(held_out, train):
    assert not {q.picture.tobytes() for q in held_out} & {q.picture.tobytes() for q in train}

    def compositions(split):
        scenes = [case.scene for kind in KINDS for case in cases(kind, 150, split)]
        return {(*sorted(t.name for t in scene.things), scene.digit and scene.digit.value) for scene in scenes}

    ours, theirs = compositions("train"), compositions("held_out")
    assert not ours & theirs and min(len(ours), len(theirs)) > 300


def test_kinds_and_answers_are_balanced_so_that_no_constant_answer_is_good(train, held_out):
    for asked in (train, held_out):
        assert set(Counter(q.metadata["category"] for q in asked).values()) == {len(asked) // 6}
        for kind, best in {"count": 4, "color": 5, "yes_no": 2, "relation": 4, "digits": 10}.items():
            answers = Counter(q.metadata["answer"] for q in asked if q.metadata["category"] == kind)
            assert len(answers) == best and max(answers.values()) == min(answers.values())
        boxes = Counter(tuple(q.metadata["answer"]) for q in asked if q.metadata["category"] == "box")
        assert max(boxes.values()) < 0.05 * sum(boxes.values())


def test_rows_carry_the_picture_and_what_a_verifier_needs():
    text, metadata = rows("held_out", kinds=["relation"])[0]
    assert metadata["images"][0].size == (SIZE, SIZE) and metadata["images"][0].mode == "RGB"
    assert metadata["options"] == ["left", "right", "above", "below"] and metadata["data_source"] == "relation"
    assert text.startswith("is the ")
    json.dumps({key: value for key, value in metadata.items() if key != "images"})


@pytest.mark.parametrize(
    "wrong", [{"split": "test"}, {"split": "train", "kinds": ["size"]}, {"split": "train", "kinds": []}]
)
def test_what_is_unknown_is_refused(wrong):
    with pytest.raises(ValueError, match="unknown"):
        questions(**wrong)


# ------------------------------------------------------------------------------------------------ pictures


def test_a_box_is_that_of_the_pixels_which_the_outline_covers():
    for case in cases("box"):
        thing = case.asked[0]
        xy = torch.tensor([CELL * c + o for c, o in zip(thing.cell, thing.offset, strict=True)])
        inside = coverage(torch.tensor(SHAPES.index(thing.shape)), xy, torch.tensor(thing.radius), SIZE) >= 0.5
        y, x = inside.nonzero(as_tuple=True)
        assert case.answer == (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        assert case.scene.things.count(thing) == 1 and case.text == f"where is the {thing.name} ?"


def test_a_picture_shows_its_things_and_each_stays_within_its_cell():
    for case in cases("count", 50):
        picture = draw(case.scene, random.Random(0)).astype(int)
        taken = np.abs(picture - 237).max(-1) > 8
        full = {thing.cell for thing in case.scene.things}
        for x in range(4):
            for y in range(4):
                assert taken[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].any() == ((x, y) in full)


def is_right(case):
    things, words = case.scene.things, case.text.split()
    if case.kind == "count":
        return case.answer == sum(words[2] in (f"{t.shape}s", t.color) for t in things)
    if case.kind == "color":
        return [t.color for t in things if t.shape == words[-2]] == [case.answer]
    if case.kind == "yes_no":
        return case.answer == ("yes" if " ".join(words[3:5]) in [t.name for t in things] else "no")
    named = [t for t in things if t.name in case.text]
    if len(named) != len(case.asked):
        return False
    if case.kind == "box":
        return case.answer == named[0].box
    (ax, ay), (bx, by) = (thing.cell for thing in case.asked)
    along = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}
    return max(along, key=along.get) == case.answer and list(along.values()).count(along[case.answer]) == 1


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_right_answers_are_right(kind):
    assert all(is_right(case) for case in cases(kind))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_right_answers_about_a_given_scene_are_right(kind):
    rng = random.Random(1)
    asked = [about(case.scene, kind, rng) for case in cases("count") + cases("relation")]
    given = [case for case in asked if case is not None]
    assert len(given) > 200 and all(case.kind == kind and is_right(case) for case in given)
    assert len({str(case.answer) for case in given}) >= 2


def test_a_no_is_not_told_by_what_is_missing():
    """In most pictures the colour and the shape that are asked for are both there, though in different things."""
    asked = [case for case in cases("yes_no") if case.answer == "no"]
    both = 0
    for case in asked:
        color, shape = case.text.split()[3:5]
        things = case.scene.things
        both += color in [t.color for t in things] and shape in [t.shape for t in things]
    assert both / len(asked) > 0.5


def test_a_digit_is_lost_at_half_resolution_and_not_at_full():
    halves, wholes = set(), set()
    for value in range(10):
        picture = draw(Scene((), Digit(value, (24, 4))), random.Random(0)).astype(int)
        halves.add(picture.reshape(32, 2, 32, 2, 3).sum((1, 3)).tobytes())
        wholes.add(picture.tobytes())
    assert len(halves) == 1 and len(wholes) == 10


def test_a_digit_lies_whole_in_the_quarter_that_is_said():
    for case in cases("digits"):
        x1, y1, x2, y2 = case.scene.digit.box
        a, b, c, d = case.scene.digit.quadrant
        assert (a, b, c, d) in QUADRANTS and a < x1 < x2 < c and b < y1 < y2 < d
        assert x1 % 2 == y1 % 2 == 0


# ------------------------------------------------------------------------------------------------ verifiers


def answered(asked, write):
    with Verifiers(VERIFIERS) as verifiers:
        return verifiers([Answer(write(q), meta=q.metadata) for q in asked])


def test_the_solution_of_every_question_is_graded_right(held_out):
    verdict = answered(held_out, lambda q: q.metadata["solution"])
    assert verdict.total.tolist() == [1.0] * len(held_out)
    assert {name: int(asked.sum()) for name, asked in verdict.asked.items()} == dict.fromkeys(KINDS, 120)


def wrong(question):
    answer, options = question.metadata["answer"], question.metadata.get("options", ["yes", "no", "red", "blue"])
    if isinstance(answer, int):
        return str(answer + 1)
    if isinstance(answer, list):
        return str([answer[0], answer[1], answer[2] + 4, answer[3]])
    return next(option for option in options if option != answer)


@pytest.mark.parametrize(
    "write",
    [
        lambda q: f"<answer> {wrong(q)} </answer>",
        lambda q: q.metadata["solution"].partition("<answer>")[0],
        lambda q: q.metadata["solution"] + f" <answer> {wrong(q)} </answer>",
        lambda _: "",
    ],
    ids=["wrong", "only a thought", "changed its mind", "nothing"],
)
def test_other_responses_are_graded_wrong(write, held_out):
    assert answered(held_out, write).total.tolist() == [0.0] * len(held_out)


def test_without_its_tags_an_answer_counts_for_boxes_alone(held_out):
    verdict = answered(held_out, lambda q: str(q.metadata["answer"]))
    kinds = [q.metadata["category"] for q in held_out]
    assert verdict.total.tolist() == [float(kind == "box") for kind in kinds]


def test_the_thought_of_a_solution_names_what_is_there():
    for kind in ("count", "color", "yes_no"):
        for case in cases(kind, 20):
            assert thought(case) == " , ".join(thing.name for thing in case.scene.things)
    for case in cases("relation", 20):
        a, b = case.asked
        assert thought(case) == f"{a.name} at {a.place} , {b.name} at {b.place}"
