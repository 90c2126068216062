"""The record of single samples: what every reward said about each, and its thumbnail."""

import json

from PIL import Image

from flowrl.rollouts import CELL, forget_after
from flowrl.train import Trainer
from tests import runs

REWARDS = """
import torch
from rewards import Scores

def judge(samples):
    value = torch.tensor([s.media.mean() for s in samples])
    value[0] = float("nan")
    return Scores(value=value, parts={"half": value / 2}, info=[{"said": f"sample {i}"} for i in range(len(samples))])
"""


def test_a_line_a_sample_with_scores_parts_and_reasons(tiny_model, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    options = {
        "rewards": [{"use": f"{tmp_path}/mine.py:judge"}], "iterations": 3, "log": {"rollouts_every": 2},
    }  # fmt: skip
    Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    folder = tmp_path / "run" / "rollouts"
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000.jpg",
        "000000.jsonl",
        "000002.jpg",
        "000002.jsonl",
    ]
    lines = [json.loads(line) for line in (folder / "000002.jsonl").read_text().splitlines()]
    assert len(lines) == len(runs.PROMPTS) * runs.SAMPLES
    assert [line["cell"] for line in lines[:5]] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    assert {line["prompt"] for line in lines} == set(runs.PROMPTS)
    first, second = lines[:2]
    assert first["total"] is None and first["scores"] == {"judge": None} and "error" in first["info"]["judge"]
    assert second["total"] == second["scores"]["judge"] == 2 * second["parts"]["judge"]["half"]
    assert second["info"]["judge"]["said"] == "sample 1"
    mean = runs.rows(tmp_path / "run")[2]["reward/mean"]
    known = [line["total"] for line in lines if line["total"] is not None]
    assert abs(sum(known) / len(known) - mean) < 1e-6
    with Image.open(folder / "000002.jpg") as sheet:
        assert sheet.size == (4 * (CELL + 4) + 4, 3 * (CELL + 4) + 4)


def test_zero_means_never(tiny_model, tmp_path):
    options = {"iterations": 1, "log": {"rollouts_every": 0}}
    Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    assert not (tmp_path / "run" / "rollouts").exists()


def test_records_that_will_be_repeated_are_removed(tmp_path):
    for name in ("000000.jsonl", "000010.jsonl", "000010.jpg", "000020.jpg", "notes.txt"):
        (tmp_path / name).write_text("")
    forget_after(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.jsonl", "notes.txt"]
