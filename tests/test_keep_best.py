"""Stopping early and keeping the best weights: what is exported, when a run ends, and that a resumed one agrees."""

import json

import pytest
from safetensors.torch import load_file

from flowrl import checkpoint
from flowrl.config import check
from flowrl.standalone import export_run
from flowrl.train import Trainer
from tests import runs
from tests.test_resume import assert_equal_folders

pytestmark = pytest.mark.slow

EVALUATED = 4
"""Samples of an evaluation of `runs.tree`."""
SCORES = """
import json
told = json.loads(open({path!r}).read())

def score(samples):
    if len(samples) != {evaluated}:  # training, and the warm-up
        return [s.media.mean().item() for s in samples]
    number = len(open({count!r}).read())
    open({count!r}, "a").write("x")
    return [told[number] for _ in samples]
"""


def reward(folder, values):
    """A reward that gives these values in turn, one an evaluation; in training it is the brightness."""
    folder.mkdir(exist_ok=True)
    (folder / "told.json").write_text(json.dumps(values))
    (folder / "count").write_text("")
    text = SCORES.format(path=str(folder / "told.json"), count=str(folder / "count"), evaluated=EVALUATED)
    (folder / "scores.py").write_text(text)
    return [{"use": f"{folder}/scores.py:score", "name": "mine"}]


def options(folder, values, **changes):
    return {
        "rewards": reward(folder, values), "iterations": len(values) - 1, "evaluate_every": 1, "checkpoint_every": 1,
        "optimizer.lr": 1e-2, **{f"data.evaluation.{key}": value for key, value in changes.items()},
    }  # fmt: skip


def exported(folder):
    return load_file(next((folder / "weights").rglob("*_*.safetensors")))


def test_the_weights_of_the_best_evaluation_are_exported(tiny_model, tmp_path):
    runs_ = {}
    for name, keep, values in (("best", "best", [0.1, 0.2, 0.9, 0.3, 0.9]), ("last", "last", [0.1, 0.2, 0.9, 0.3, 0.9]),
                               ("short", "last", [0.1, 0.2, 0.9])):  # fmt: skip
        given = options(tmp_path / f"r-{name}", values, keep=keep)
        summary = Trainer(runs.config(tiny_model, tmp_path / name, given)).run()
        runs_[name] = exported(tmp_path / name), summary
    best, summary = runs_["best"]
    assert runs.same(best, runs_["short"][0]), "the first of equals, after 2 iterations"
    assert not runs.same(best, runs_["last"][0])
    assert summary["exported"] == 2 and summary["final"]["scores"]["mine"]["mean"] == pytest.approx(0.9)
    assert summary["iterations"] == 4 and runs_["last"][1]["exported"] == 4
    table = json.loads((tmp_path / "best" / "summary.json").read_text())
    assert table["exported"] == 2


def test_the_report_compares_with_the_exported_weights(tiny_model, tmp_path):
    from flowrl.report import comparison

    given = options(tmp_path / "r", [0.1, 0.7, 0.2], keep="best")
    Trainer(runs.config(tiny_model, tmp_path / "run", given)).run()
    (row,) = [row for row in comparison(tmp_path / "run") if row[0] == "mine"]
    assert row[1:4] == pytest.approx((0.1, 0.7, 0.6))


def test_training_that_only_hurt_exports_the_base_model(tiny_model, tmp_path):
    given = options(tmp_path / "r", [0.5, 0.2, 0.1], keep="best") | {"model.lora": runs.LORA}
    summary = Trainer(runs.config(tiny_model, tmp_path / "run", given)).run()
    assert summary["exported"] == 0 and summary["final"] == summary["base"]
    assert all(not v.any() for k, v in exported(tmp_path / "run").items() if "lora_B" in k)


@pytest.mark.parametrize(
    ("values", "patience", "ended"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9, 0.9], 2, 3),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.2], 2, 5),
        ([0.1, 0.05, 0.2, 0.1, 0.1, 0.1], 1, 1),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 5),
        ([None, None, 0.3, None, 0.2, 0.1], 2, 4),  # no verdict is no score, but it is not better either
    ],
)
def test_when_patience_ends(trainer, values, patience, ended):
    run = trainer({"iterations": 5, "evaluate_every": 1, "data.evaluation.patience": patience})
    for run.iteration, value in enumerate(values):
        run.evaluations[str(run.iteration)] = {"scores": {"pixel.brightness": {"mean": value}}}
        if run._done():
            break
    assert run.iteration == ended


def test_a_run_that_does_not_improve_ends_as_a_finished_one(tiny_model, tmp_path):
    given = options(tmp_path / "r", [0.1, 0.2, 0.1, 0.9], patience=1)
    summary = Trainer(runs.config(tiny_model, tmp_path / "run", given | {"checkpoint_every": 50})).run()
    assert summary["iterations"] == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "finished", "iteration": 2}
    assert checkpoint.latest_valid(tmp_path / "run" / "checkpoints").iteration == 2
    assert len(runs.rows(tmp_path / "run")) == 2 and (tmp_path / "run" / "weights").is_dir()


def brightness(**changes):
    """Real scores, so that a repeated evaluation says the same; a step so large that not every one helps."""
    return {
        "iterations": 6, "evaluate_every": 1, "checkpoint_every": 4, "optimizer.lr": 3e-2,
        "data.evaluation.keep": "best", **changes,
    }  # fmt: skip


def test_a_resumed_run_keeps_the_same_weights(tiny_model, tmp_path):
    Trainer(runs.config(tiny_model, tmp_path / "whole", brightness())).run()
    Trainer(runs.config(tiny_model, tmp_path / "stopped", brightness(iterations=3))).run()
    run = Trainer(runs.config(tiny_model, tmp_path / "stopped", brightness()), resume=True)
    assert run.best
    run.run()
    assert_equal_folders(tmp_path / "whole", tmp_path / "stopped")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped")]
    assert summaries[0]["exported"] == summaries[1]["exported"]


def test_a_run_that_ended_early_stays_ended_unless_patience_is_raised(tiny_model, tmp_path):
    values = [0.5, 0.2, 0.1, 0.1, 0.1]
    given = options(tmp_path / "r", values, patience=2, keep="best")
    first = Trainer(runs.config(tiny_model, tmp_path / "run", given)).run()
    again = Trainer(runs.config(tiny_model, tmp_path / "run", given), resume=True).run()
    assert first == again and first["iterations"] == 2
    patient = given | {"data.evaluation.patience": 3}
    assert Trainer(runs.config(tiny_model, tmp_path / "run", patient), resume=True).run()["iterations"] == 3


def test_an_export_of_a_run_that_keeps_the_best_is_the_best(tiny_model, tmp_path):
    given = options(tmp_path / "r", [0.1, 0.9, 0.2], keep="best")
    given["algorithm"] = {"name": "flow_dpo", "num_steps": 3, "refresh_every": 1}
    Trainer(runs.config(tiny_model, tmp_path / "run", given)).run()
    export_run(tmp_path / "run", tmp_path / "out", averaged=True)
    found = load_file(next((tmp_path / "out").rglob("*_*.safetensors")))
    assert runs.same(found, exported(tmp_path / "run"))


def test_the_settings_are_checked(config_file):
    (problem,) = check(config_file({"data.evaluation.keep": "first"}))
    assert "data.evaluation.keep" in problem and "last" in problem and "best" in problem
    (problem,) = check(config_file({"data.evaluation.patience": 0}))
    assert "data.evaluation.patience" in problem
