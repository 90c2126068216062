"""A user's mistake: one message that says what, where and how to mend it, exit code 2, and nothing done is lost."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl import checkpoint
from flowrl.checkpoint import RunLock
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def refused(told, *parts):
    """Exit code 2 and one message with all the parts."""
    code, out, err = told
    assert code == 2, out + err
    assert "Traceback" not in err + out
    for part in parts:
        assert re.search(part, err, re.DOTALL), f"{part!r} is not in {err!r}"


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test: the mistake must be found before."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for place in ("flowrl.media.load", "flowrl.models.pipeline.load", "flowrl.models.pipeline.load_pipeline"):
        monkeypatch.setattr(place, load)


# ------------------------------------------------------------------------------------------------ before a model


CONFIG_MISTAKES = {
    "unknown key": ("optimizer.lrr=1", [r"override 'optimizer.lrr=1'", "optimizer.lrr", "did you mean 'optimizer.lr'"]),
    "unknown section": ("optimzer.lr=1", ["optimzer", "did you mean 'optimizer'"]),
    "wrong type": ("iterations=many", [r"override 'iterations=many'", "iterations", "whole number"]),
    "not positive": ("optimizer.lr=0", ["optimizer.lr", "greater than 0"]),
    "impossible window": ("algorithm.window=9", ["algorithm", "window of 9 steps does not fit into num_steps=4"]),
    "group of one": ("data.samples_per_prompt=1", ["data.samples_per_prompt", "choose at least 2"]),
    "unknown algorithm": ("algorithm.name=mixgrpo", ["algorithm.name", "did you mean 'mix_grpo'"]),
    "unknown reward": ("rewards=[{use: brightnes}]", ["rewards.0", "brightnes"]),
    "unknown option": (
        "rewards=[{use: pixel.brightness, strenght: 1}]",
        ["rewards.0", "no option 'strenght'"],
    ),
    "no reward": ("rewards=[]", ["rewards", "nothing to train on"]),
    "missing prompts": ("data.prompts=promts.txt", ["data.prompts", "promts.txt", "there is no file"]),
    "empty prompt": ("data.prompts=['a cat', ' ']", ["data.prompts", "prompt 1 of the list", "empty"]),
    "unknown balance": ("data.balance=kind", ["data.prompts|data.balance", "no metadata 'kind'"]),
    "missing model": ("model.path=./no/such/model", ["model.path", "does not exist"]),
    "no override": ("seed", ["override 'seed'", "key=value"]),
}


@pytest.mark.parametrize(("override", "parts"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_a_config_mistake_is_found_before_anything_is_done(command, config_file, no_model, tmp_path, override, parts):
    refused(command("train", config_file(), override), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["plan", "config check", "config show"])
def test_every_command_says_the_same(command, config_file, no_model, what):
    told = command(*what.split(), config_file(), "optimizer.lrr=1")
    refused(told, "optimizer.lrr", "did you mean 'optimizer.lr'")


def test_all_mistakes_are_told_at_once(command, config_file, no_model):
    told = command("train", config_file(), "optimizer.lrr=1", "iterations=many", "model.hight=5")
    refused(told, "3 problems", "optimizer.lrr", "iterations", "model.hight.*did you mean 'model.height'")


def test_mistakes_in_files_have_lines(command, config_file, no_model, tmp_path):
    path = config_file()
    lines = path.read_text().splitlines()
    number = lines.index("iterations: 3") + 1
    path.write_text("\n".join(["iterations: three" if line == "iterations: 3" else line for line in lines]))
    refused(command("train", path), rf"config.yaml:{number}: iterations: .*whole number")
    refused(command("train", tmp_path / "confg.yaml"), "confg.yaml does not exist", "did you mean 'config.yaml'")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    refused(command("train", config_file({"data.prompts": str(prompts)})), r"prompts.txt:2: the prompt is empty")
    prompts.write_bytes(b"a cat\nd\xf6g\n")
    refused(command("train", config_file({"data.prompts": str(prompts)})), r"prompts.txt:2: not UTF-8")


def test_a_folder_in_use_is_refused(command, config_file, no_model, tmp_path):
    with RunLock(tmp_path / "run"):
        refused(command("train", config_file()), "output_dir .*run is in use by process .*set another output_dir")


def test_an_earlier_run_is_not_overwritten(command, config_file, no_model, tmp_path):
    checkpoint.save(tmp_path / "run" / "checkpoints", 5, {}, {})
    refused(
        command("train", config_file()), "holds the checkpoints of an earlier run", "--resume", "another output_dir"
    )


def test_a_folder_that_cannot_be_written(command, config_file, no_model, tmp_path):
    (tmp_path / "file").write_text("here first")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/flowrl")):
        told = command("train", config_file(), f"output_dir={folder}")
        refused(told, f"cannot write into output_dir {re.escape(str(folder))}", "errno")
    assert (tmp_path / "file").read_text() == "here first"


def test_nothing_to_resume(command, config_file, no_model):
    refused(command("train", config_file(), "--resume"), "no checkpoint in .*run.*start without --resume")


@pytest.mark.parametrize("name", ["eval", "export"])
def test_a_folder_that_is_no_run(command, tmp_path, name):
    arguments = ["--output", tmp_path / "out"] if name == "export" else []
    refused(command(name, tmp_path, *arguments), "is not a run folder: it has no config.yaml", "output_dir")


def test_a_config_mistake_takes_a_moment(config_file):
    """In a process of its own, in time on the processor: neither diffusers nor a model is imported for it."""
    code = (
        "import sys\nfrom flowrl import cli\ntry:\n    cli.main()\nfinally:\n"
        "    print(sorted({'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    torch_alone = seconds([sys.executable, "-c", "import torch"])[1]
    done, taken = seconds([sys.executable, "-c", code, "train", str(config_file()), "optimizer.lrr=1"])
    refused((done.returncode, done.stdout, done.stderr), "optimizer.lrr")
    assert done.stdout.strip() == "[]"
    assert len(done.stderr.strip().splitlines()) == 1
    assert taken - torch_alone < 1.5  # together less than 3 where nothing else runs


def seconds(command):
    """A process and the time that it took on the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ------------------------------------------------------------------------------------------------ rewards


def reward(tmp_path, body, **more):
    return {"rewards": [{"use": runs.reward_file(tmp_path, body), "name": "mine", **more}]}


def test_a_reward_that_always_raises_stops_before_the_first_iteration(command, config_file, tmp_path):
    told = command("train", config_file(reward(tmp_path, "raise ValueError('no weights')")))
    refused(told, "reward 'mine'", "ValueError: no weights")
    assert not checkpoint.entries(tmp_path / "run" / "checkpoints")


def test_a_reward_of_the_wrong_length_is_told_what_is_expected(command, config_file, tmp_path):
    told = command("train", config_file(reward(tmp_path, "return brightness(samples)[1:]")))
    refused(told, "RewardContractError", "'mine'", "2 samples|expected 2|length")


def test_a_reward_that_is_never_a_number_stops_the_run(command, config_file, tmp_path):
    told = command("train", config_file(reward(tmp_path, "return [math.nan] * len(samples)"), "run"), "iterations=9")
    refused(told, "reward 'mine' gives no verdict on 100% of the samples")
    assert len(runs.rows(tmp_path / "run")) < 5


def test_a_reward_without_verdict_on_some_samples_is_no_reason_to_stop(command, config_file, tmp_path):
    body = "return [math.nan if i % 4 == 0 else v for i, v in enumerate(brightness(samples))]"
    code, _, err = command("train", config_file(reward(tmp_path, body)))
    assert code == 0, err
    rows = runs.rows(tmp_path / "run")
    assert [row["no_verdict_frac"] for row in rows] == [0.25] * 3
    assert all(runs.finite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("on_error", ["nan", "raise"])
def test_a_sample_that_cannot_be_scored(command, config_file, tmp_path, on_error):
    """By default it is left out of training, and never scored 0; on request it stops the run."""
    body = "if any(s.prompt == 'a cat' for s in samples):\n    raise OSError('bad cat')\nreturn brightness(samples)"
    path = config_file(reward(tmp_path, body, on_error=on_error) | {"data.eval_prompts": ["two dogs"]})
    if on_error == "raise":
        refused(
            command("train", path), "reward 'mine' failed on sample", "'a cat'", "OSError: bad cat", "on_error: nan"
        )
        return
    with pytest.warns(UserWarning, match="bad cat.*No verdict there"):
        code, _, err = command("train", path)
    assert code == 0, err
    assert [row["no_verdict_frac"] for row in runs.rows(tmp_path / "run")] == pytest.approx([1 / 3] * 3)


def test_what_was_done_before_a_failure_is_there_and_goes_on(command, config_file, tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    body = f"if calls == 3 and os.path.exists({str(flag)!r}):\n    raise TypeError('gone')\nreturn brightness(samples)"
    path = config_file(reward(tmp_path, body) | {"iterations": 4, "checkpoint_every": 10})
    refused(command("train", path), "reward 'mine'", "TypeError: gone")
    folder = tmp_path / "run"
    rows = runs.rows(folder)
    assert [row["iteration"] for row in rows] == [0, 1]
    assert checkpoint.latest_valid(folder / "checkpoints").iteration == 2
    flag.unlink()
    code, _, err = command("train", folder / "config.yaml", "--resume")
    assert code == 0, err
    assert runs.rows(folder)[:2] == rows and [row["iteration"] for row in runs.rows(folder)] == [0, 1, 2, 3]


def test_a_bug_of_ours_keeps_its_traceback(command, config_file, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("flowrl.media.load", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        command("train", config_file())


def test_a_mistake_shows_its_traceback_on_request(command, config_file, monkeypatch):
    from flowrl.config import ConfigError

    monkeypatch.setenv("FLOWRL_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="lrr"):
        command("train", config_file(), "optimizer.lrr=1")
