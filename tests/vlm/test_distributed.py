"""Two processes write the answers of one, and end at its weights up to rounding.

All jobs go through one launch, since the imports of two processes take longer than the jobs:

    torchrun --standalone --nproc_per_node 2 -m tests.vlm.test_distributed JOBS.json      what each of them does
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowrl.config import make_config
from flowrl.engine import EngineError
from flowrl.train import Trainer
from rewards import RewardError
from tests import runs, threaded
from tests.matrices import thinned
from tests.vlm.conftest import LORA, STEADY
from tests.vlm.test_train import METHODS, method

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORLD = 2
ITERATIONS = 2
INFORMATIVE = {"data.filters": [{"use": "informative"}], "data.max_tries": 3}
JOBS = {
    **{name: {"algorithm": method(name), "optimizer.updates_per_iteration": 2} for name in METHODS},
    "filters and refill": {"algorithm": method("grpo", kl_coef=0.01), **INFORMATIVE},
    "filters and refill, whitened": {"algorithm": method("reinforce_pp", kl_in_reward=0.05), **INFORMATIVE},
    "pruned": {"data.filters": [{"use": "largest_advantage", "prune": 0.5}], "optimizer.micro_batch": 1},
    "drawn anew": {"data.filters": [{"use": "pf_ppo"}], "optimizer.updates_per_iteration": 2},
    "curriculum": {"data.curriculum": "learnable", **INFORMATIVE},
    "replay": {"data.replay": {"size": 64, "max_age": 3}, "optimizer.updates_per_iteration": 2},
    "kl in the reward": {"algorithm": method("grpo", kl_in_reward=0.1), "model.lora": LORA},
    "length-weighted": {"algorithm": method("opo"), "data.prompts_per_iteration": 4},
    "perception": {"algorithm": method("grpo", perception_coef=0.01, sft_coef=0.3)},
    "all answers of one process unjudged": {"rewards": "some"},
}
"""Changes of the config; three prompts make one process write twice as much as the other, unless they say more."""


def tree_of(vlm_tree, folder, verifier, changes, engine):
    rewards = [verifier(changes.get("rewards", "rare"))]
    return vlm_tree(folder, {**STEADY, **changes, "rewards": rewards, "engine": {"name": engine, "device": "cpu"}})


def trained(trainer):
    rows = [trainer.step(iteration) for iteration in range(ITERATIONS)]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k} for row in rows]


def one_process(path):
    """Every job of the file, one after the other; the main process writes down what came out."""
    trainer = None
    for job in json.loads(path.read_text()):
        trainer = Trainer(make_config(job["config"]))
        assert trainer.engine.world == WORLD and torch.distributed.get_world_size() == WORLD
        assert torch.distributed.get_backend() == "gloo"
        rows = trained(trainer)
        if trainer.main:
            Path(job["result"] + ".json").write_text(json.dumps(rows))
            save_file({"weights": runs.weights(trainer)}, job["result"] + ".safetensors")
        trainer._let_go()
    trainer.engine.close()


EVERY_OTHER = list(METHODS)[::2]
by_job = pytest.mark.parametrize("name", thinned(list(JOBS), lambda name: name not in METHODS or name in EVERY_OTHER))


@pytest.fixture(scope="module")
def two(request, vlm_tree, verifier, tmp_path_factory):
    """`two(name)`: metrics and weights of a job in two processes; all that are asked for were done in one launch."""
    home = tmp_path_factory.mktemp("two")
    mine = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    names = dict.fromkeys(["filters and refill", *(params["name"] for params in mine if "name" in params)])
    jobs = [
        {"config": tree_of(vlm_tree, home / str(i), verifier, JOBS[name], "accelerate"), "result": str(home / f"r{i}")}
        for i, name in enumerate(names)
    ]
    (home / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    command += ["-m", "tests.vlm.test_distributed", str(home / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    places = {name: home / f"r{i}" for i, name in enumerate(names)}
    return lambda name: (
        json.loads(Path(f"{places[name]}.json").read_text()), load_file(f"{places[name]}.safetensors")["weights"]
    )  # fmt: skip


@by_job
def test_two_processes_do_what_one_does(vlm_tree, verifier, tmp_path, two, name):
    trainer = Trainer(make_config(tree_of(vlm_tree, tmp_path / "run", verifier, JOBS[name], "local")))
    start = runs.weights(trainer)
    rows = trained(trainer)
    trainer._let_go()
    told, weights = two(name)
    assert runs.distance(runs.weights(trainer), start) > 1e-3
    assert (weights - runs.weights(trainer)).abs().max() < 1e-5
    for mine, theirs in zip(rows, told, strict=True):
        assert theirs.keys() == mine.keys()
        # A prompt that stands in two parts of the work is read twice.
        names = [key for key in mine if not key.startswith(("ratio_", "calls/"))]
        assert {k: theirs[k] for k in names} == pytest.approx({k: mine[k] for k in names}, rel=1e-4, abs=1e-5)
        assert theirs.get("ratio_first_update", 0.0) < 1e-4
        exact = [k for k in names if k.startswith(("score/", "text/tokens/", "refill", "kept"))]
        assert [theirs[k] for k in exact] == pytest.approx([mine[k] for k in exact], rel=1e-12)


def test_the_refill_was_at_work(two):
    tries = [row["refill_tries"] for row in two("filters and refill")[0]]
    assert max(tries) > 1


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def ranks(text_run, monkeypatch):
    """`ranks(changes)`: two trainers in threads of this process."""

    def make(changes):
        monkeypatch.setenv("WORLD_SIZE", "2")
        made = [
            threaded.on_rank(rank, 2, lambda: text_run({**changes, "engine": {"name": threaded.NAME}}))
            for rank in range(2)
        ]
        monkeypatch.delenv("WORLD_SIZE")
        return made

    return make


FAILS = '''
def score(response, meta):
    """Fails on one question."""
    if meta["answer"] == {answer!r}:
        raise TypeError("no such answer")
    return len(response) % 3 / 2
'''


def test_a_verifier_that_stops_the_run_stops_all_processes(ranks, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS.format(answer="4"))
    two = ranks({
        "rewards": [{"use": f"{tmp_path}/fails.py:score", "on_error": "raise"}], "data.prompts_per_iteration": 6,
    })  # fmt: skip
    errors = threaded.together([lambda t=t: t.step(0) for t in two])
    (rank,) = [r for r, error in enumerate(errors) if isinstance(error, RewardError)]
    assert isinstance(errors[1 - rank], EngineError) and f"process {rank} failed: RewardError" in str(errors[1 - rank])
    assert all("no such answer" in str(error) for error in errors)


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
