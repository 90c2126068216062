"""Several processes do what one would have done: the same samples, and the same weights up to rounding.

The quick tests run the ranks in threads (`tests.threaded`), the slow ones launch processes with torchrun.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl.checkpoint import CheckpointError, latest_valid
from flowrl.engine import EngineError
from flowrl.memory import OutOfMemory
from rewards import RewardError
from tests import runs, threaded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WIDE = {"clip_range": 0.5}
METHODS = {
    "flow_grpo": {**runs.FLOW, **WIDE},
    "mix_grpo, shared noise": {**runs.MIX, **WIDE, "shared_noise": True},
    "mix_grpo": {**runs.MIX, **WIDE, "shared_noise": False},
    "branch_grpo": {"name": "branch_grpo", "num_steps": 4, "splits": [0, 1], "split_noise": 1.0, "prune_steps": [2]},
    "tempflow_grpo": {"name": "tempflow_grpo", "num_steps": 4, "branches": 2, **WIDE},
    "granular_grpo": {"name": "granular_grpo", "num_steps": 4, "strides": [1, 2], "steps": [0, 1], "adv_eps": 1e-4},
    "dance_grpo": {"name": "dance_grpo", "num_steps": 4, "step_share": 0.67, "adv_eps": 1e-4, **WIDE},
    "flow_grpo, zeros dropped": {**runs.FLOW, **WIDE, "drop_zero": True, "adv_std": "group"},
    "diffusion_nft": {
        "name": "diffusion_nft",
        "num_steps": 4,
        "draws_per_sample": 3,
        "decay": 0.5,
        "adv_std": "global",
    },
    "diffusion_nft, groups": {"name": "diffusion_nft", "num_steps": 4, "draws_per_sample": 2, "share_draws": True},
    "flow_dpo, refreshed": {"name": "flow_dpo", "num_steps": 4, "draws_per_sample": 2, "refresh_every": 1},
    "crd": {"name": "crd", "num_steps": 4, "draws_per_sample": 2, "adv_std": "global"},
    "diffusion_art": {"name": "diffusion_art", "num_steps": 4, "draws_per_sample": 2},
    "draft, distance": {"name": "reward_gradient", "num_steps": 4, "last_steps": 2, "kl_coef": 0.1},
    "flow_grpo, whole samples": {**runs.FLOW, **WIDE, "objective": "gspo"},
}
PROMPTS = ["a cat", "two dogs", "a red house", "a tree"]


def changes(prompts=3, **more):
    """Adam's first step is the sign of the gradient, noise included, unless eps is large beside the noise."""
    return {
        "data.prompts": PROMPTS[:prompts],
        "data.prompts_per_iteration": prompts,
        "optimizer.eps": 1e-3,
        "optimizer.updates_per_iteration": 2,
        "model.guidance": 2.0,
        **more,
    }


@pytest.fixture
def ranks(trainer, monkeypatch):
    """`ranks(2, changes)`: one trainer a rank, all in one folder."""

    def make(world, options, folder="ranks", resume=False):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        options = {**options, "engine": {"name": threaded.NAME}}
        made = [threaded.on_rank(r, world, lambda: trainer(options, folder, resume)) for r in range(world)]
        monkeypatch.delenv("WORLD_SIZE")
        return made

    return make


def assert_equal_runs(start, one, many, told_one, told_many):
    """Weights up to rounding, metrics likewise; counts, and the ranks among themselves, exactly."""
    moved = runs.distance(runs.weights(one), start)
    assert moved > 0
    for rank in many:
        assert torch.equal(runs.weights(rank), runs.weights(many[0]))
        assert runs.distance(runs.weights(rank), runs.weights(one)) < 1e-3 * moved
        assert torch.allclose(runs.weights(rank), runs.weights(one), rtol=1e-5, atol=1e-6)
    names = [name for name in told_one if not name.startswith(("time/", "ratio_"))]
    for told in told_many:
        assert told.keys() == told_one.keys()
        assert {n: told[n] for n in names} == pytest.approx({n: told_one[n] for n in names}, rel=1e-4, abs=5e-6)
        exact = [n for n in names if n.startswith("calls/")]
        assert [told[n] for n in exact] == [told_one[n] for n in exact]
        assert told.get("ratio_first_update", 0.0) < 1e-5


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("method", "prompts"), [*((name, 3) for name in METHODS), ("flow_grpo", 4)])
def test_two_ranks_do_what_one_does(trainer, ranks, method, prompts):
    options = changes(prompts, algorithm=METHODS[method])
    one, two = trainer(options, "one"), ranks(2, options)
    start = runs.weights(one)
    for iteration in range(2):
        told = one.step(iteration)
        told_two = threaded.together([lambda t=t, i=iteration: t.step(i) for t in two])
        assert_equal_runs(start, one, two, told, told_two)


def test_three_ranks_of_which_some_get_no_edges(trainer, ranks, tmp_path):
    """Only the first prompt's samples get verdicts, so two of three ranks have nothing to train on."""
    body = "return [v if s.prompt == 'a cat' or not calls else math.nan for s, v in zip(samples, brightness(samples))]"
    reward = runs.reward_file(tmp_path, body.replace("or not calls ", ""))
    options = changes(3, rewards=[{"use": reward}], **{"data.samples_per_prompt": 4})
    one, three = trainer(options, "one"), ranks(3, options)
    start = runs.weights(one)
    told = one.step(0)
    assert_equal_runs(start, one, three, told, threaded.together([lambda t=t: t.step(0) for t in three]))


def test_ranks_that_have_no_verdict_at_all_change_nothing(ranks, tmp_path):
    reward = runs.reward_file(tmp_path, "return [math.nan] * len(samples)")
    two = ranks(2, changes(3, rewards=[{"use": reward}]))
    before = runs.state(two[0])
    rows = threaded.together([lambda t=t: t.step(0) for t in two])
    assert [row["grad_norm"] for row in rows] == [0.0, 0.0]
    assert runs.same(runs.state(two[0]), before)


def test_a_whole_run_of_two_ranks_and_its_resume_by_one(trainer, ranks, tmp_path):
    options = changes(3, iterations=4, evaluate_every=2)
    reference = trainer(options, "one").run()
    half = ranks(2, {**options, "iterations": 2})
    summaries = threaded.together([t.run for t in half])
    assert summaries[0]["iterations"] == summaries[1]["iterations"] == 2
    assert [row["iteration"] for row in runs.rows(tmp_path / "ranks")] == [0, 1]
    resumed = trainer(options, "ranks", resume=True)
    assert resumed.iteration == 2
    summary = resumed.run()
    rewards = [[row["reward/mean"] for row in runs.rows(tmp_path / name)] for name in ("one", "ranks")]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-5)
    final = [s["final"]["scores"]["pixel.brightness"]["mean"] for s in (reference, summary)]
    assert final[1] == pytest.approx(final[0], rel=1e-5)


def test_a_reward_that_fails_on_one_rank_stops_all_with_its_message(ranks, tmp_path):
    body = """
if any(s.prompt == 'a red house' for s in samples) and os.path.exists({flag!r}):
    raise TypeError("no house today")
return brightness(samples)
"""
    flag = tmp_path / "fail"
    reward = runs.reward_file(tmp_path, body.format(flag=str(flag)))
    options = changes(3, rewards=[{"use": reward}], checkpoint_every=100)
    two = ranks(2, options)
    assert all(isinstance(row, dict) for row in threaded.together([lambda t=t: t.step(0) for t in two]))
    for one in two:
        one.iteration = 1
    flag.touch()
    before = runs.state(two[0])
    errors = threaded.together([lambda t=t: t.step(1) for t in two])
    (rank,) = [r for r, error in enumerate(errors) if isinstance(error, RewardError)]
    other = errors[1 - rank]
    assert isinstance(other, EngineError) and f"process {rank} failed: RewardError" in str(other)
    assert all("no house today" in str(error) for error in errors)
    saved = latest_valid(tmp_path / "ranks" / "checkpoints")  # what was done until then is kept
    assert saved.iteration == 1
    weights = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("policy.weights")}
    assert all(torch.equal(weights[f"policy.{name}"], before[name]) for name in before if name.startswith("weights."))


class Instead:
    """An algorithm but for what a test changes."""

    def __init__(self, algorithm):
        self.algorithm = algorithm

    def __getattr__(self, name):
        return getattr(self.algorithm, name)


@pytest.mark.parametrize("method", ["loss", "mass"])
def test_what_fails_in_an_update_of_one_rank_stops_all(ranks, method):
    two = ranks(2, changes(3))

    def broken(*arguments):
        raise ValueError("no more")

    two[1].updater.algorithm = Instead(two[1].algorithm)
    setattr(two[1].updater.algorithm, method, broken)
    first, second = threaded.together([lambda t=t: t.step(0) for t in two])
    assert isinstance(first, EngineError) and "process 1 failed: ValueError: no more" in str(first)
    assert isinstance(second, ValueError)


def test_a_loss_that_fails_on_one_rank_stops_all(ranks):
    two = ranks(2, changes(3))

    class Broken(Instead):
        def loss(self, policy, batch):
            raise torch.OutOfMemoryError("out of memory")

    two[1].updater.algorithm = Broken(two[1].algorithm)
    first, second = threaded.together([lambda t=t: t.step(0) for t in two])
    assert isinstance(first, EngineError) and "process 1 failed: OutOfMemoryError: out of memory" in str(first)
    assert isinstance(second, OutOfMemory) and "Next cheaper" in str(second)
    assert isinstance(second.__cause__, torch.OutOfMemoryError)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks):
    two = ranks(2, changes(3, **{"optimizer.updates_per_iteration": 1}))

    class Poisoned(Instead):
        def loss(self, policy, batch):
            loss = self.algorithm.loss(policy, batch)
            return loss._replace(value=loss.value * float("inf"))

    two[1].updater.algorithm = Poisoned(two[1].algorithm)
    before = runs.state(two[0])
    rows = threaded.together([lambda t=t: t.step(0) for t in two])
    assert [row["skipped_updates"] for row in rows] == [1, 1]
    assert runs.same(runs.state(two[0]), before) and runs.same(runs.state(two[1]), before)


def test_ranks_that_do_not_see_the_same_folder_are_refused(ranks):
    two = ranks(2, changes(3))
    two[1].iteration = 1
    errors = threaded.together([t.run for t in two])
    assert all(
        isinstance(error, EngineError) and "checkpoints of different iterations (0, 1)" in str(error)
        for error in errors
    )


def test_a_checkpoint_that_the_main_rank_cannot_write_stops_all(ranks, tmp_path):
    two = ranks(2, changes(3, iterations=2))
    (tmp_path / "ranks" / "checkpoints").write_text("in the way")
    first, second = threaded.together([t.run for t in two])
    assert isinstance(first, CheckpointError) and "cannot write the checkpoint" in str(first)
    assert isinstance(second, EngineError) and "process 0 failed: CheckpointError" in str(second)


def test_more_ranks_than_prompts_are_refused(ranks, monkeypatch):
    with pytest.raises(EngineError, match="4 processes.*only 3.*raise data.prompts_per_iteration"):
        ranks(4, changes(3))


def test_only_the_main_rank_takes_the_folder(ranks, trainer):
    two = ranks(2, changes(3))
    assert two[0].lock is not None and two[1].lock is None
    with pytest.raises(CheckpointError, match="is in use by process"):
        trainer(changes(3), "ranks")


# ------------------------------------------------------------------------------------------------ torchrun


def torchrun(config, *overrides, world=2, timeout=280):
    """`flowrl train` in several processes, as a user launches it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "flowrl", "train", str(config), "engine.device=cpu", *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


SPY = """
with open(os.path.join({folder!r}, f"{{os.getpid()}}.jsonl"), "a") as file:
    for sample, value in zip(samples, brightness(samples)):
        file.write(__import__("json").dumps([sample.prompt, value]) + "\\n")
return brightness(samples)
"""


def spied(folder):
    return sorted(json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "method"),
    [(4, "mix_grpo, shared noise"), pytest.param(3, "flow_grpo", marks=pytest.mark.exhaustive)],
)
def test_two_processes_give_the_samples_and_weights_of_one(trainer, config_file, tmp_path, prompts, method):
    options, seen = {}, {}
    for name in ("one", "two"):
        seen[name] = tmp_path / f"seen-{name}"
        seen[name].mkdir()
        reward = runs.reward_file(tmp_path, SPY.format(folder=str(seen[name])), name=f"{name}.py")
        rewards = [{"use": reward, "name": "mine"}]
        options[name] = changes(prompts, algorithm=METHODS[method], iterations=2, rewards=rewards)
    one = trainer(options["one"], "one")
    start = runs.weights(one)
    one.run()
    done = torchrun(config_file(options["two"], folder="two"), "engine.name=accelerate")
    assert done.returncode == 0, done.stderr
    ours, theirs = spied(seen["one"]), spied(seen["two"])
    training = 2 * prompts * runs.SAMPLES
    assert len(ours) == training + 2 * 4 + 2 and len(theirs) == len(ours) + 2  # each process warms up its own reward
    theirs = [row for row in theirs if not row[0].startswith("a sign")]
    ours = [row for row in ours if not row[0].startswith("a sign")]
    assert [text for text, _ in theirs] == [text for text, _ in ours]
    assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-5)
    rows = [runs.rows(tmp_path / name) for name in ("one", "two")]
    for mine, other in zip(*rows, strict=True):
        assert mine.keys() == other.keys()
        exact = [name for name in mine if name.startswith("calls/") or name == "iteration"]
        assert [mine[name] for name in exact] == [other[name] for name in exact]
        assert other["reward/mean"] == pytest.approx(mine["reward/mean"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    saved = latest_valid(tmp_path / "two" / "checkpoints")
    weights = torch.cat([saved.tensors[f"policy.weights.{n}"].flatten() for n in one.policy._parameters])
    assert runs.distance(weights, runs.weights(one)) < 1e-3 * runs.distance(runs.weights(one), start)
    assert torch.allclose(weights, runs.weights(one), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "two" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_ends_both(config_file, tmp_path):
    body = "if any(s.prompt == 'a red house' for s in samples):\n    raise TypeError('no house')\n"
    reward = runs.reward_file(tmp_path, body + "return brightness(samples)")
    options = changes(3, rewards=[{"use": reward}], **{"data.eval_prompts": ["a cat"]})
    done = torchrun(config_file(options), "engine.name=accelerate")
    assert done.returncode != 0
    # The launcher stops the other as soon as one has ended, so either of the two may be the one that could tell it.
    assert re.search(r"(EngineError: process [01] failed: )?RewardError: .*no house", done.stderr, re.DOTALL)
    assert "flowrl/train.py" not in done.stderr  # no traceback of ours


@pytest.mark.slow
def test_processes_that_would_not_be_joined_are_refused(config_file, tmp_path):
    done = torchrun(config_file(changes(3)), "engine.name=local")
    assert done.returncode != 0
    assert "2 processes were launched" in done.stderr and "engine.name=accelerate" in done.stderr
    assert not list((tmp_path / "run").glob("*.jsonl"))
