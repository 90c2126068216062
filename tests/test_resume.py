"""A run that was stopped, killed or damaged goes on as if nothing had happened, to the last bit, or says why not."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl import checkpoint
from flowrl.checkpoint import CheckpointError
from flowrl.train import Interrupted, Trainer
from rewards import RewardError
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KINDS = {
    "lora, flow_grpo, kl, average": {
        "algorithm": {**runs.FLOW, "window": 2, "window_range": (0, 3)},
        "model.lora": runs.LORA,
        "optimizer.lr": 1e-2,
    },
    "full, mix_grpo, schedule": {
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 2,
        "optimizer.updates_per_iteration": 2,
        "optimizer.ema_decay": None,
        "optimizer.weight_decay": 0.01,
    },
    "ddpo, curriculum, single pass": {
        "algorithm": {"name": "ddpo", "num_steps": 4, "clip_range": 1e-2, "min_count": 8},
        "data.history": 12,
        "data.curriculum": "learnable",
        "data.prompts": [*runs.PROMPTS, "a tree", "a boat"],
        "optimizer.update": "single_pass",
    },
    "diffusion_nft, policy that follows": {
        "algorithm": {"name": "diffusion_nft", "num_steps": 4, "draws_per_sample": 3, "decay": [[0, 0.2], [3, 0.9]]},
        "model.lora": runs.LORA,
        "optimizer.updates_per_iteration": 2,
        "optimizer.lr": 1e-2,
    },
}
SOMETIMES = """
if calls == {at} and {when} and os.path.exists({flag!r}):
    {what}
return brightness(samples)
"""


class Mood:
    """Makes rewards that misbehave once, and keeps them from doing it again."""

    def __init__(self, folder):
        self.folder, self.flag, self.made = folder, folder / "flag", 0
        self.flag.touch()

    def __call__(self, at=-1, what="pass", when="training"):
        """A reward that does `what` at its training call number `at`, or right after it; by default never."""
        self.made += 1
        body = SOMETIMES.format(at=at, when=when, flag=str(self.flag), what=what)
        return {"rewards": [{"use": runs.reward_file(self.folder, body, f"r{self.made}.py"), "name": "mine"}]}

    def kill(self, name):
        return f"os.remove({str(self.flag)!r}); os.kill(os.getpid(), signal.{name})"

    def calm(self):
        self.flag.unlink()


@pytest.fixture
def mood(tmp_path):
    return Mood(tmp_path)


EVERY = {"iterations": 4, "checkpoint_every": 10, "evaluate_every": 2}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    """`uninterrupted(kind)`: the folder of a run of that kind to which nothing happened."""
    made = {}

    def make(kind=()):
        key = json.dumps(kind)
        if key not in made:
            home = tmp_path_factory.mktemp("uninterrupted")
            Trainer(runs.config(tiny_model, home / "run", {**EVERY, **dict(kind), **Mood(home)()})).run()
            made[key] = home / "run"
        return made[key]

    return make


def hashes(folder):
    """{file: sha256} of the exported weights."""
    return {p.relative_to(folder).as_posix(): runs.digest(p) for p in sorted(folder.glob("weights/**/*.safetensors"))}


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "train_seconds"} for line in lines]


def assert_equal_folders(one, other):
    """Weights, last checkpoint, metrics and evaluations of two finished runs, to the last bit."""
    assert hashes(one) == hashes(other) and hashes(one)
    assert runs.rows(one) == runs.rows(other)
    assert evaluations(one) == evaluations(other)
    last = [checkpoint.latest_valid(folder / "checkpoints") for folder in (one, other)]
    assert last[0].iteration == last[1].iteration and runs.same(last[0].tensors, last[1].tensors)
    assert last[0].meta["optimizer"] == last[1].meta["optimizer"]
    for side in ("base", "final"):
        scores = [json.loads((folder / "summary.json").read_text())[side]["scores"] for folder in (one, other)]
        assert scores[0] == scores[1]
    assert json.loads((other / "status.json").read_text())["state"] == "finished"
    assert not [path for path in other.rglob("*") if ".tmp" in path.name or ".old" in path.name]


# ------------------------------------------------------------------------------------------------ stop and go on


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("at", "name", "code"), [(1, "SIGTERM", 143), (2, "SIGINT", 130)])
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(
    trainer, uninterrupted, mood, tmp_path, capfd, kind, at, name, code
):
    """Also where an evaluation was due: it is not waited for, but made up for."""
    options = {**EVERY, **kind, **mood(at, mood.kill(name))}
    with pytest.raises(Interrupted) as left:
        trainer(options).run()
    assert left.value.code == code
    folder = tmp_path / "run"
    assert json.loads((folder / "status.json").read_text()) == {"state": "interrupted", "iteration": at}
    assert [path.name for path in checkpoint.entries(folder / "checkpoints")] == [f"{at:06d}"]
    out, err = capfd.readouterr()
    assert f"{name}: finishing this iteration" in err and f"flowrl train {folder}/config.yaml --resume" in out
    assert len(runs.rows(folder)) == at and not (folder / "weights").exists()
    assert [line["iteration"] for line in evaluations(folder)] == [0]
    trainer(options, resume=True).run()
    assert_equal_folders(uninterrupted(tuple(kind.items())), folder)


def test_a_run_that_failed_goes_on_to_the_same_bits(trainer, uninterrupted, mood, tmp_path):
    """The iterations since the last checkpoint are saved before a reward's failure ends the run."""
    options = EVERY | mood(4, "raise TypeError('no more')", when="True")  # also when it is asked again, one by one
    with pytest.raises(RewardError, match="TypeError: no more"):
        trainer(options).run()
    mood.calm()
    folder = tmp_path / "run"
    assert [path.name for path in checkpoint.entries(folder / "checkpoints")] == ["000003"]
    assert len(runs.rows(folder)) == 3
    trainer(options, resume=True).run()
    assert_equal_folders(uninterrupted(), folder)


@pytest.mark.parametrize("at", [2, 4])
def test_a_failed_evaluation_is_made_up_for(trainer, uninterrupted, mood, tmp_path, at):
    options = EVERY | mood(at, "raise TypeError('not now')", when="not training")
    with pytest.raises(RewardError, match="not now"):
        trainer(options).run()
    mood.calm()
    folder = tmp_path / "run"
    assert checkpoint.latest_valid(folder / "checkpoints").iteration == at
    assert len(runs.rows(folder)) == at
    trainer(options, resume=True).run()
    assert_equal_folders(uninterrupted(), folder)


def test_a_run_that_fails_at_once_can_be_started_anew(trainer, mood, tmp_path):
    options = {"iterations": 1, **mood(1, "raise TypeError('no')", when="True")}
    with pytest.raises(RewardError, match="TypeError: no"):
        trainer(options).run()
    assert not checkpoint.entries(tmp_path / "run" / "checkpoints")
    assert trainer({**options, **mood()}).run()["iterations"] == 1


def test_a_finished_run_stays_as_it_is(trainer, tmp_path):
    options = {"iterations": 2, "evaluate_every": 1}
    summary = trainer(options).run()
    folder = tmp_path / "run"
    before = hashes(folder), runs.rows(folder), evaluations(folder)
    assert trainer(options, resume=True).run() == summary
    assert (hashes(folder), runs.rows(folder), evaluations(folder)) == before


def test_a_finished_run_can_be_made_longer(trainer, uninterrupted, mood, tmp_path):
    options = {**EVERY, **mood()}
    trainer({**options, "iterations": 2}).run()
    trainer(options, resume=True).run()
    assert_equal_folders(uninterrupted(), tmp_path / "run")


def test_the_count_of_skipped_updates_goes_on(trainer):
    run = trainer({"iterations": 2})
    run.log.write(0, run.step(0))
    run.iteration, run.updater.skipped = 1, 2
    run._save()
    run.lock.release()
    assert trainer({"iterations": 2}, resume=True).updater.skipped == 2


# ------------------------------------------------------------------------------------------------ damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def template(tiny_model, tmp_path_factory):
    """(options, folder) of a run that failed after 3 of 4 iterations, with a checkpoint of each."""
    home = tmp_path_factory.mktemp("stopped")
    mood = Mood(home)
    options = {**EVERY, "checkpoint_every": 1, **mood(4, "raise TypeError('no more')", when="True")}
    with pytest.raises(RewardError, match="no more"):
        Trainer(runs.config(tiny_model, home / "run", options)).run()
    mood.calm()
    return options, home / "run"


@pytest.fixture
def stopped(template, tmp_path):
    """The options of such a run; a copy of it lies in the folder `run`."""
    shutil.copytree(template[1], tmp_path / "run")
    return template[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(trainer, uninterrupted, stopped, tmp_path, damage):
    newest = tmp_path / "run" / "checkpoints" / "000003" / "state.safetensors"
    if damage == "flip":
        flip(newest)
    elif damage == "cut":
        newest.write_bytes(newest.read_bytes()[:1000])
    else:
        newest.unlink()
    with pytest.warns(UserWarning, match=r"skipped a damaged checkpoint: .*000003.*Going on from .*000002"):
        run = trainer(stopped, resume=True)
    assert run.iteration == 2
    run.run()
    assert_equal_folders(uninterrupted(), tmp_path / "run")


def test_nothing_to_resume_is_an_error_and_not_a_new_start(trainer, stopped, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in .*nothing.*start without --resume"):
        trainer(stopped, "nothing", resume=True)
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.safetensors"):
        flip(path)
    with pytest.raises(CheckpointError, match="(?s)is valid.*000003.*000002.*000001.*start anew in another output_dir"):
        trainer(stopped, resume=True)


def test_an_earlier_run_is_not_overwritten(trainer, stopped):
    with pytest.raises(CheckpointError, match="holds the checkpoints of an earlier run. Go on with it: --resume"):
        trainer(stopped)


# ------------------------------------------------------------------------------------------------ another config


def test_a_changed_config_is_refused_with_its_keys(trainer, stopped):
    changed = {"optimizer.lr": 0.5, "data.samples_per_prompt": 3, "model.lora": runs.LORA, "seed": 7}
    with pytest.raises(CheckpointError) as refused:
        trainer({**stopped, **changed}, resume=True)
    text = str(refused.value)
    assert "optimizer.lr: 0.001 then, 0.5 now" in text and "data.samples_per_prompt: 4 then, 3 now" in text
    assert "model.lora" in text and "seed: 0 then, 7 now" in text and "000003" in text
    assert "Put the old values back" in text and "iterations" not in text


def test_what_only_says_how_fast_or_how_often_may_change(trainer, stopped):
    free = {"checkpoint_every": 2, "evaluate_every": 3, "optimizer.micro_batch": 3, "model.decode_micro_batch": 4}
    assert trainer({**stopped, **free, "iterations": 6}, resume=True).iteration == 3


def test_iterations_belong_to_a_schedule(trainer):
    options = {"iterations": 2, "optimizer.schedule": "linear"}
    trainer(options).run()
    with pytest.raises(CheckpointError, match="iterations: 2 then, 4 now"):
        trainer({**options, "iterations": 4}, resume=True)


@pytest.mark.parametrize("key", ["data.prompts", "data.eval_prompts"])
def test_prompts_that_changed_under_the_same_name_are_noticed(trainer, tmp_path, key):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\na tree\n")
    options = {"iterations": 1, key: str(path)}
    trainer(options).run()
    path.write_text("a cat\na dog\na bee\n")
    with pytest.raises(CheckpointError, match=rf"{key} \(contents\): '\w+' then, '\w+' now"):
        trainer({**options, "iterations": 2}, resume=True)


# ------------------------------------------------------------------------------------------------ kill -9

POINTS = ["train.scored:2", "ckpt.after_tensors:1", "train.updated:1", "ckpt.before_rename:2", "ckpt.after_rename:1"]


def forked(tmp_path, jobs):
    """Exit codes of every launch of every job."""
    asked, told = tmp_path / "jobs.json", tmp_path / "told.json"
    asked.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked", str(asked), str(told)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=230,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text()), done.stderr


@pytest.mark.slow
def test_kill_9_anywhere_changes_no_bit(tiny_model, tmp_path):
    options = {"iterations": 5, "checkpoint_every": 2, "evaluate_every": 2, **KINDS["lora, flow_grpo, kl, average"]}
    draw = random.Random(0)
    moments = [[{"kill_after": draw.uniform(0, 1.8)} for _ in range(6)] for _ in range(2)]
    plans = {
        "reference": [],
        "points": [{"fault": point} for point in POINTS],
        "random": moments[0],
        "mixed": [moments[1][0], {"fault": "ckpt.after_rename:2"}, *moments[1][1:], {"fault": "train.updated:1"}],
    }
    configs = {name: runs.tree(tiny_model, tmp_path / name, options) for name in plans}
    jobs = [{"config": configs[name], "launches": plan} for name, plan in plans.items()]
    codes, errors = forked(tmp_path, jobs)
    codes = dict(zip(plans, codes, strict=True))
    assert codes["reference"] == [0] and all(code[-1] == 0 for code in codes.values()), errors
    assert codes["points"] == [-9] * len(POINTS) + [0]
    assert sum(code.count(-9) for code in codes.values()) >= 10
    for name in ("points", "random", "mixed"):
        assert_equal_folders(tmp_path / "reference", tmp_path / name)


@pytest.mark.slow
def test_exit_codes_of_real_processes(tiny_model, tmp_path):
    def job(name, what):
        folder = tmp_path / f"mood-{name}"
        folder.mkdir()
        mood = Mood(folder)
        options = {"iterations": 3, "checkpoint_every": 10, **mood(2, what(mood))}
        return {"config": runs.tree(tiny_model, tmp_path / name, options), "launches": []}

    def twice(mood):
        return f"{mood.kill('SIGTERM')}; time.sleep(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"

    jobs = [job("term", lambda m: m.kill("SIGTERM")), job("int", lambda m: m.kill("SIGINT")), job("twice", twice)]
    codes, errors = forked(tmp_path, jobs)
    assert codes == [[143], [130], [143]], errors
    for name in ("term", "int"):
        assert json.loads((tmp_path / name / "status.json").read_text()) == {"state": "interrupted", "iteration": 2}
        assert checkpoint.latest_valid(tmp_path / name / "checkpoints").iteration == 2
    assert not (tmp_path / "twice" / "checkpoints").exists() and len(runs.rows(tmp_path / "twice")) == 1
