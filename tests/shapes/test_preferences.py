"""Preferences of the built-in world: the better picture is true and the other one is not, and a seed repeats them."""

import hashlib
import json
import random
from collections import Counter

import pytest

from flowrl.data import DataError
from flowrl.shapes.preferences import SLICES, misspelt, write_preferences
from flowrl.shapes.scenes import prompts
from rewards import RewardHub
from rewards.preferences import read_preferences
from rewards.shapes import parse

COUNT = 5 * len(SLICES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("preferences") / "set"
    write_preferences(output, COUNT, seed=3)
    return output


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_slices_have_equal_shares_and_sides_are_drawn(folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(SLICES, 5)
    labels = Counter(row["label"] for row in rows)
    assert labels[0] == 5 and min(labels[1], labels[-1]) >= 8
    assert {row["dim"] for row in rows if row["category"] in ("blur", "noise")} == {"quality"}


def test_prompts_are_held_out(folder):
    held_out = {spec.prompt for spec in prompts("held_out")}
    data = read_preferences(folder)
    assert {pair.prompt for pair in data.pairs if pair.category != "text"} <= held_out


def test_the_better_picture_is_true_and_the_other_breaks_the_prompt(folder):
    data = read_preferences(folder)
    known = [pair for pair in data.pairs if parse(pair.prompt) is not None]
    items = [item for pair in known for item in (pair.a, pair.b)]
    with RewardHub(["shapes"], device="cpu") as hub:
        parts = hub([item.sample() for item in items]).parts["shapes"]
    strict, soft = parts["strict"].view(-1, 2).tolist(), parts["soft"].view(-1, 2).tolist()
    for pair, (a, b), (soft_a, soft_b) in zip(known, strict, soft, strict=True):
        better, other = (a, b) if pair.label >= 0 else (b, a)
        assert better == 1, pair
        assert other == (1 if pair.category == "tie" else 0) or pair.dim == "quality", pair
        assert pair.label == 0 or (soft_a - soft_b) * pair.label > 0, pair


def test_only_one_thing_is_wrong(folder):
    """A recoloured, moved or missing object leaves most of the picture as it was."""
    for pair in read_preferences(folder).pairs:
        if pair.category in ("color", "position", "missing"):
            changed = (pair.a.sample().media - pair.b.sample().media).abs().amax(0) > 0.02
            assert 0.01 < changed.float().mean() < 0.2, pair


def test_a_misspelt_word_is_one_edit_away():
    rng = random.Random(0)
    for word in ("apple", "yellow", "coffee"):
        wrong = {misspelt(word, rng) for _ in range(300)}
        assert word not in wrong and {len(w) - len(word) for w in wrong} == {-1, 0, 1}


def test_a_seed_repeats_and_a_count_is_a_beginning(folder, tmp_path):
    write_preferences(tmp_path / "again", COUNT, seed=3)
    assert digest(tmp_path / "again") == digest(folder)
    write_preferences(tmp_path / "other", 8, seed=4)
    write_preferences(tmp_path / "fewer", 8, seed=3)
    lines = [
        (each / "pairs.jsonl").read_text().splitlines() for each in (folder, tmp_path / "fewer", tmp_path / "other")
    ]
    assert lines[0][:8] == lines[1] != lines[2]


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="holds pairs already"):
        write_preferences(folder, 1)
    with pytest.raises(DataError, match="at least 1"):
        write_preferences(tmp_path / "none", 0)
