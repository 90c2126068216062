"""The example questions of configs/prompts/questions are the built-in world's own, pixel by pixel."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowrl.shapes.questions import KINDS, VERIFIERS, questions, written
from flowrl.vlm.data import clips, load_questions, pictures
from flowrl.vlm.tools import Zoom
from rewards.motion import DIRECTIONS
from rewards.verifiers import Answer
from rewards.verifiers.adapter import Verifiers

FILE = Path(__file__).parents[2] / "configs/prompts/questions/questions.jsonl"


@pytest.fixture(scope="module")
def pairs():
    """(row, question of the world) of each example; the rows are written as people write, with capitals."""
    asked = [(row, row.metadata["data_source"]) for row in load_questions(FILE)]
    worlds = {kind: iter(questions("train", [kind], 2)) for kind in KINDS}
    return [(row, next(worlds[kind])) for row, kind in asked]


def test_there_are_two_of_each_kind_with_the_worlds_pictures_and_answers(pairs):
    assert Counter(row.metadata["data_source"] for row, _ in pairs) == dict.fromkeys(KINDS, 2)
    for row, question in pairs:
        assert row.text.lower().split() == question.text.replace(" ?", "?").replace(" ,", ",").split()
        assert row.metadata["answer"] == question.metadata["answer"]
        assert row.metadata.get("options") == question.metadata.get("options")
        (picture,) = pictures(row)
        assert np.array_equal(picture, question.picture), "pixel by pixel: shapes_vlm's coordinates are of these"


def test_their_answers_are_graded_right_and_others_wrong(pairs):
    gold = [row.metadata["answer"] for row, _ in pairs]
    gold = [written(tuple(answer) if isinstance(answer, list) else answer) for answer in gold]
    gold = [Answer(f"<answer> {text} </answer>", meta=row.metadata) for text, (row, _) in zip(gold, pairs, strict=True)]
    with Verifiers(VERIFIERS) as verifiers:
        assert verifiers(gold).total.tolist() == [1.0] * len(gold)
        swapped = [replace(answer, response=gold[i ^ 1].response) for i, answer in enumerate(gold)]
        assert verifiers(swapped).total.tolist() == [0.0] * len(gold)


def test_the_digits_can_be_read_where_the_model_zooms(pairs):
    """Of the quarter that holds a digit, the crop has single light and dark pixels; half the resolution has none."""
    for row, question in pairs:
        if row.metadata["data_source"] == "digits":
            (picture,) = pictures(row)
            (crop,) = Zoom()({"bbox_2d": question.metadata["region"]}, [picture]).pictures
            assert crop.size == (32, 32)
            grey = np.asarray(crop)[..., 0].astype(int)
            ink = {26, 230}  # 128 - 102 and 128 + 102
            assert ink <= set(np.unique(grey).tolist())
            halved = grey.reshape(16, 2, 16, 2).mean((1, 3)).round()
            assert not ink & set(np.unique(halved).tolist())


def test_the_examples_about_videos_show_what_their_answers_say():
    """Where the shape is in each frame, by the pixels that are not the background's, goes the way of the answer."""
    rows = load_questions(FILE.with_name("videos.jsonl"), video_frames=8)
    assert len({row.metadata["answer"] for row in rows}) == len(rows) == 3
    for row in rows:
        (clip,) = clips(row)
        frames = np.stack([np.asarray(frame, dtype=int) for frame in clip.frames])
        where = [np.argwhere(np.abs(frame - frame[0, 0]).max(-1) > 60).mean(0)[::-1] for frame in frames]
        steps, way = np.diff(where, axis=0), np.array(DIRECTIONS[row.metadata["answer"]])
        assert (steps @ way > 2).all() and np.abs(steps @ way[::-1]).max() < 1
