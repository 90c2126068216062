"""The record of a run: strict rows, no duplicate and no gap after a resume, and trackers that may fail."""

import io
import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console

from flowrl.config import LogConfig
from flowrl.log import RunLog, drop_rows, plain, read_rows, write_atomic
from flowrl.metrics import PhaseTimer, RunningMean, duration, summarize


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=40)


def iterations(path):
    return [row["iteration"] for row in read_rows(path)]


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path, screen):
    log = RunLog(tmp_path, console=screen)
    log.write(
        0, {"loss": torch.tensor(0.5), "nan": math.nan, "inf": np.float32("inf"), "list": (1, math.nan), "s": "x"}
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=pytest.fail)
    assert row == {"iteration": 0, "loss": 0.5, "nan": None, "inf": None, "list": [1, None], "s": "x"}
    log.evaluation(0, {"by": {"a": 0.5}})
    assert read_rows(tmp_path / "evaluations.jsonl") == [{"iteration": 0, "by": {"a": 0.5}}]
    log.close()
    log.close()


def test_a_resumed_log_has_every_row_once(tmp_path, screen):
    with RunLog(tmp_path, console=screen) as log:
        log.evaluation(0, {"score": 0.0})
        for i in range(5):
            log.write(i, {"value": i})
        log.evaluation(3, {"score": 1.0})
        log.evaluation(5, {"score": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "va')  # killed while writing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RunLog(tmp_path, resume_at=3, console=screen) as log:
            assert iterations(tmp_path / "metrics.jsonl") == [0, 1, 2]
            assert iterations(tmp_path / "evaluations.jsonl") == [
                0,
                3,
            ]  # that of iteration 3 came before its checkpoint
            for i in range(3, 6):
                log.write(i, {"value": -i})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["iteration"], row["value"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, -3), (4, -4), (5, -5)]


def test_a_fresh_start_drops_what_was_never_checkpointed(tmp_path, screen):
    for _ in range(2):
        with RunLog(tmp_path, console=screen) as log:
            log.evaluation(0, {})
            log.write(0, {})
    assert iterations(tmp_path / "metrics.jsonl") == iterations(tmp_path / "evaluations.jsonl") == [0]


def test_a_lost_newline_does_not_glue_rows_together(tmp_path, screen):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1}')
    with RunLog(tmp_path, resume_at=2, console=screen) as log:
        log.write(2, {})
    assert iterations(tmp_path / "metrics.jsonl") == [0, 1, 2]


def test_missing_rows_are_told(tmp_path, screen):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\nbroken\n{"iteration": 2}\n')
    with pytest.warns(UserWarning, match="lacks 1 earlier iterations, the first is 1"):
        RunLog(tmp_path, resume_at=3, console=screen).close()


def test_dropping_rows_rewrites_as_a_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"iteration": 0, "x": 1}\n{"iteration": 0, "x": 2}\n[]\n{"x": 1}\n{"iteration": 1, "x": NaN}\n')
    assert drop_rows(path, 9) == [0, 1]
    assert path.read_text() == '{"iteration": 0, "x": 2}\n{"iteration": 1, "x": null}\n'
    assert drop_rows(tmp_path / "absent.jsonl", 3) == []
    write_atomic(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_only_the_main_process_writes(tmp_path, screen):
    with RunLog(tmp_path / "run", LogConfig(tensorboard=True), main=False, console=screen) as log:
        log.write(0, {"loss": 1.0})
        log.evaluation(0, {})
        log.say("hello")
    assert not (tmp_path / "run").exists() and screen.file.getvalue() == ""


def test_plain_values():
    assert plain({1: (np.int64(2), torch.tensor([1.0, math.inf])), "p": object}) == {
        "1": [2, [1.0, None]],
        "p": str(object),
    }


# ------------------------------------------------------------------------------------------------ console


def test_one_line_an_iteration_with_the_time_left(tmp_path, screen):
    with RunLog(tmp_path, total=10, console=screen) as log:
        log.write(0, {"reward/mean": 0.25, "loss": math.nan, "unknown": 3.0})
        log.write(1, {"reward/mean": 0.5})
    first, second = screen.file.getvalue().splitlines()
    assert first.startswith(" 1/10  reward 0.25  ") and "eta" in first and "loss" not in first
    assert second.startswith(" 2/10  reward 0.5  ")


def test_text_is_not_markup(tmp_path, screen):
    with RunLog(tmp_path, console=screen) as log:
        log.say("a [bold]prompt[/bold] with [/] in it, and longer than the forty columns of this screen")
    assert screen.file.getvalue().splitlines() == [
        "a [bold]prompt[/bold] with [/] in it, and longer than the forty columns of this screen",
    ]


# ------------------------------------------------------------------------------------------------ trackers


def test_a_failing_tracker_warns_once_and_training_goes_on(tmp_path, screen, monkeypatch):
    class Flaky:
        requires_logging_directory = False
        calls = 0

        def __init__(self, run):
            self.run = run

        def start(self): ...

        def log(self, values, step):
            Flaky.calls += 1
            raise ConnectionError("no network")

        def finish(self):
            raise AssertionError("a tracker that is off is left alone")

    import accelerate.tracking

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "flaky", Flaky)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with RunLog(tmp_path, LogConfig(trackers=["flaky", "nonsense"]), console=screen) as log:
            for i in range(3):
                log.write(i, {"loss": 1.0})
    told = [str(w.message) for w in caught if "tracker" in str(w.message)]
    assert len(told) == 2 and Flaky.calls == 1
    assert "'nonsense' failed" in told[0] and "accelerate has" in told[0] and "wandb" in told[0]
    assert "'flaky' failed" in told[1] and "no network" in told[1] and "metrics.jsonl" in told[1]
    assert iterations(tmp_path / "metrics.jsonl") == [0, 1, 2]


def test_a_tracker_gets_the_numbers(tmp_path, screen, monkeypatch):
    seen = []

    class Good:
        requires_logging_directory = True

        def __init__(self, run, logging_dir):
            seen.append((run, logging_dir))

        def start(self): ...

        def log(self, values, step):
            seen.append((values, step))

        def finish(self):
            seen.append("finished")

    import accelerate.tracking

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "good", Good)
    with RunLog(tmp_path, LogConfig(trackers=["good"]), name="demo", console=screen) as log:
        log.write(0, {"loss": 1.0, "nan": math.nan, "text": "x", "by": {"a": 2}})
        log.evaluation(1, {"score": 0.5})
    assert seen == [
        ("demo", str(tmp_path)), ({"loss": 1.0, "by/a": 2}, 0), ({"evaluation/score": 0.5}, 1), "finished",
    ]  # fmt: skip


def test_tensorboard_writes_events(tmp_path, screen):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, LogConfig(tensorboard=True), console=screen) as log:
        log.write(0, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_may_be_missing(tmp_path, screen, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="'tensorboard' failed and is off"):
        RunLog(tmp_path, LogConfig(tensorboard=True), console=screen).close()


# ------------------------------------------------------------------------------------------------ metrics


def test_phases_add_up_also_when_they_raise():
    synced = []
    phase = PhaseTimer(lambda: synced.append(1))
    for _ in range(2):
        with phase("collect"):
            time.sleep(0.01)
    with pytest.raises(ValueError), phase("score"):
        raise ValueError
    assert phase.seconds.keys() == {"collect", "score"} and phase.seconds["collect"] >= 0.02
    assert phase.total == sum(phase.seconds.values()) and len(synced) == 6


def test_running_means_weigh_parts_and_skip_nan():
    mean = RunningMean()
    mean.add({"loss": 1.0, "kl": math.nan}, weight=3)
    mean.add({"loss": torch.tensor(5.0), "late": 2})
    found = mean.means()
    assert (found["loss"], found["late"]) == (2.0, 2.0) and math.isnan(found["kl"])


def test_summaries():
    found = summarize([1.0, 3.0, math.nan, math.nan], "reward")
    assert found == {"reward/mean": 2, "reward/std": 1, "reward/min": 1, "reward/max": 3, "reward/nan_frac": 0.5}
    assert summarize([math.nan], "x") == {"x/nan_frac": 1.0} and summarize([], "x") == {"x/nan_frac": 0.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2s"), (59.9, "59.9s"), (200, "3m 20s"), (3599.9, "1h 00m"), (3720, "1h 02m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
