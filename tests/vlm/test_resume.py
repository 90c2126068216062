"""A run of a model that writes, stopped and gone on with, ends at the same bits as one that was left alone."""

import json
import shutil

import pytest

from flowrl import checkpoint
from flowrl.checkpoint import CheckpointError
from flowrl.train import Interrupted
from tests import runs
from tests.test_resume import assert_equal_folders
from tests.vlm.conftest import LORA

pytestmark = pytest.mark.slow

EVERY = {"iterations": 4, "checkpoint_every": 10, "evaluate_every": 2}
MUCH = {
    "algorithm": {"name": "grpo", "kl_coef": 0.01},
    "data.filters": [{"use": "informative"}, {"use": "largest_advantage", "prune": 0.25}], "data.max_tries": 3,
    "data.history": 8, "data.curriculum": "learnable", "optimizer.ema_decay": 0.9,
}  # fmt: skip
KINDS = {
    "filters, refill, curriculum, average, schedule": {**MUCH, "optimizer.schedule": "cosine"},
    "a critic, lora, two updates": {
        "algorithm": {"name": "ppo"}, "model.lora": LORA, "optimizer.updates_per_iteration": 2,
        "optimizer.micro_batch": 5,
    },
    "another curriculum, whitened": {
        "algorithm": {"name": "reinforce_pp", "kl_in_reward": 0.01}, "data.curriculum": "greso",
        "optimizer.updates_per_iteration": 2,
    },
    "pairs, hints": {
        "algorithm": {"name": "token_dpo"}, "data.filters": [{"use": "informative"}], "data.max_tries": 2,
        "data.on_dead_group": "hint",
    },
    "replay": {"data.replay": {"size": 64, "max_age": 3}},
    "noisy pictures, forced answers": {
        "generation": {
            "max_new_tokens": 6, "temperature": 0.7, "noisy": {"share": 0.5, "strength": 0.3},
            "forced_answer": {"text": " so", "unless": "never", "tokens": 3},
        },
    },
}  # fmt: skip
STOP = '''
"""Right for two answers in five; where a flag lies, the run is told to stop when this was asked so often."""

import os
import signal


class Right:
    def __init__(self):
        self.calls = 0

    def score(self, answers):
        self.calls += 1
        if self.calls == {at} and os.path.exists({flag!r}):
            os.remove({flag!r})
            os.kill(os.getpid(), signal.SIGTERM)
        return [float(sum(map(ord, answer.response)) % 5 < 2) for answer in answers]
'''


@pytest.fixture
def right(tmp_path):
    """`right(5)`: a reward that stops the run at its fifth call, once; 0 = never."""

    def make(at=0):
        path, flag = tmp_path / f"stop{at}.py", tmp_path / f"flag{at}"
        path.write_text(STOP.format(at=at, flag=str(flag)))
        flag.touch()
        return {"rewards": [{"use": f"{path}:Right", "name": "right"}]}

    return make


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(text_run, right, tmp_path, kind):
    text_run({**EVERY, **kind, **right()}, "whole").run()
    options = {**EVERY, **kind, **right(4)}  # the first call is an evaluation's
    with pytest.raises(Interrupted) as left:
        text_run(options).run()
    assert left.value.code == 143
    folder = tmp_path / "run"
    (saved,) = checkpoint.entries(folder / "checkpoints")
    status = json.loads((folder / "status.json").read_text())
    assert (
        status["state"] == "interrupted" and 0 < status["iteration"] < 4 and saved.name == f"{status['iteration']:06d}"
    )
    text_run(options, resume=True).run()
    assert_equal_folders(tmp_path / "whole", folder)


def test_filters_and_refill_were_at_work(text_run, right, tmp_path):
    """In the run above that claims so."""
    text_run({**EVERY, **MUCH, **right()}).run()
    rows = runs.rows(tmp_path / "run")
    assert {row["refill_tries"] for row in rows} & {2.0, 3.0}
    assert any(0 < row["kept_samples"] < row["kept_groups"] for row in rows)
    assert checkpoint.latest_valid(tmp_path / "run" / "checkpoints").tensors["history.outcomes"].sum() > 0


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_goes_on_from_any_checkpoint(text_run, right, tmp_path, after):
    options = {**EVERY, **MUCH, **right(), "checkpoint_every": 1}
    text_run(options).run()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for later in range(after + 1, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{later:06d}")
    run = text_run(options, resume=True)
    assert run.iteration == after
    run.run()
    assert_equal_folders(tmp_path / "whole", tmp_path / "run")


def test_what_changes_the_run_is_refused_and_what_only_costs_memory_is_not(text_run, tmp_path, home):
    """The number of iterations changes it too: verifiers and noise are told how far the run is."""
    shutil.copytree(home, tmp_path / "home")
    options = {"iterations": 2, "checkpoint_every": 1, "data.prompts": f"{tmp_path}/home/questions.jsonl"}
    text_run(options).run()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000002")
    changed = {
        "generation.temperature": 0.8, "generation.max_new_tokens": 5, "data.max_tries": 3, "data.system": "think",
        "iterations": 3, "data.filters": [{"use": "informative"}],
    }  # fmt: skip
    with pytest.raises(CheckpointError) as refused:
        text_run({**options, **changed}, resume=True)
    assert all(key in str(refused.value) for key in changed)
    free = {"generation.batch_size": 2, "optimizer.micro_batch": 1}
    resumed = text_run({**options, **free}, resume=True)
    assert resumed.iteration == 1
    resumed._let_go()
    shutil.copy(home / "3-0.png", tmp_path / "home" / "1-0.png")
    with pytest.raises(CheckpointError, match=r"data.prompts \(contents\): '\w+' then, '\w+' now"):
        text_run(options, resume=True)
