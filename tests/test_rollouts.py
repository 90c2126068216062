"""The record of single samples: what every reward said about each, and its thumbnail."""

import json

import torch
from PIL import Image

from flowrl.rollouts import CELL, TEXT, forget_after, write_rollout
from flowrl.train import Trainer
from flowrl.types import Batch, Prompt
from rewards import HubResult
from samplers import all_steps, flow_sde, noise_source, rollout
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


def test_whatever_a_reward_says_is_kept_within_limits(tiny_model, tmp_path):
    (tmp_path / "chatty.py").write_text(
        "import torch\nfrom rewards import Scores\n\n"
        "def chatty(samples):\n"
        "    deep = []\n    for _ in range(5000):\n        deep = [deep]\n"
        "    said = {'deep': deep, 'long': 'x' * 10**6, 'nan': float('nan'), 'odd': torch.zeros(2)}\n"
        "    info = [said for _ in samples]\n"
        "    return Scores(value=torch.rand(len(samples)), info=info)\n"
    )
    options = {"rewards": [{"use": f"{tmp_path}/chatty.py:chatty"}], "iterations": 1}
    Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    first = json.loads((tmp_path / "run" / "rollouts" / "000000.jsonl").read_text().splitlines()[0])
    said = first["info"]["chatty"]
    assert len(said["long"]) == TEXT and said["nan"] is None and "tensor" in said["odd"]
    assert len(json.dumps(said["deep"])) < 100


def test_of_many_samples_the_first_twelve_groups_and_sixteen_of_each_are_written(tmp_path):
    groups, size = 13, 17
    slot = torch.arange(groups).repeat_interleave(size)
    root, member = torch.arange(len(slot)), torch.arange(size).repeat(groups)
    noise = noise_source((2,), seed=0, iteration=0, prompt=slot, member=member)
    trajectory = rollout(
        lambda x, t, i: 0.5 * x, noise(root, torch.zeros_like(root), -1), all_steps(torch.linspace(1, 0, 3)), flow_sde,
        eta=0.7, prompt=slot, group=slot, noise=noise,
    )  # fmt: skip
    batch = Batch(
        prompts=[Prompt(id=i, text=f"prompt {i}") for i in range(groups)], cond={}, trajectory=trajectory,
        leaf_prompt=trajectory.leaf_prompt, media=torch.rand(len(slot), 1, 3, 8, 8),
    )  # fmt: skip
    said = HubResult(
        total=root.float(), scores={"a": root.float()}, parts={}, info=[{} for _ in root], seconds={"a": 0.0}
    )  # fmt: skip
    write_rollout(tmp_path, 3, batch, said)
    lines = [json.loads(line) for line in (tmp_path / "000003.jsonl").read_text().splitlines()]
    assert [line["total"] for line in lines] == [i * size + j for i in range(12) for j in range(16)]
    assert [line["cell"] for line in lines] == [[i, j] for i in range(12) for j in range(16)]
    with Image.open(tmp_path / "000003.jpg") as sheet:
        assert sheet.size == (16 * (CELL + 4) + 4, 12 * (CELL + 4) + 4)


def test_zero_means_never(tiny_model, tmp_path):
    options = {"iterations": 1, "log": {"rollouts_every": 0}}
    Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    assert not (tmp_path / "run" / "rollouts").exists()


def test_records_that_will_be_repeated_are_removed(tmp_path):
    for name in ("000000.jsonl", "000010.jsonl", "000010.jpg", "000020.jpg", "notes.txt"):
        (tmp_path / name).write_text("")
    forget_after(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.jsonl", "notes.txt"]
