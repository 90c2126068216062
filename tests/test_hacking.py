"""Held-out rewards: scored at evaluations alone, and an alarm where one falls while the trained reward rises."""

import json
import math

import pytest
import torch

from flowrl.config import check, make_config
from flowrl.hacking import TOTAL, alarms, look, scores_of
from flowrl.train import Trainer
from rewards import RewardError
from tests import runs


def noisy(mean, seed, spread=0.1, count=50):
    return mean + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_an_alarm_needs_both_a_rise_and_a_fall():
    flat, up, down = noisy(0.5, 0), noisy(0.8, 1), noisy(0.2, 2)
    before = {TOTAL: flat, "judge": flat}
    (alarm,) = alarms(before, {TOTAL: up, "judge": down}, 10, ["judge"])
    assert (alarm.name, alarm.since) == ("judge", 10)
    assert alarm.trained == pytest.approx((up - flat).mean().item())
    assert alarm.held_out == pytest.approx((down - flat).mean().item())
    assert alarms(before, {TOTAL: up, "judge": up}, 10, ["judge"]) == []
    assert alarms(before, {TOTAL: down, "judge": down}, 10, ["judge"]) == []
    assert alarms(before, {TOTAL: flat, "judge": down}, 10, ["judge"]) == []


def test_a_fall_within_two_standard_errors_is_none():
    """Paired by hand: differences -d and -3d have mean -2d and a standard error of d, so the fall is exactly two."""
    before = {TOTAL: torch.zeros(2), "judge": torch.zeros(2)}
    rise = torch.tensor([1.0, 1.1])
    assert alarms(before, {TOTAL: rise, "judge": torch.tensor([-1.0, -3.0])}, 0, ["judge"]) == []
    assert len(alarms(before, {TOTAL: rise, "judge": torch.tensor([-1.0, -2.9])}, 0, ["judge"])) == 1


def test_a_rise_within_two_standard_errors_is_none():
    """Differences 1 and 3 have mean 2 and a standard error of 1, so the rise is exactly two."""
    before = {TOTAL: torch.zeros(2), "judge": torch.zeros(2)}
    fall = torch.tensor([-1.0, -1.1])
    assert alarms(before, {TOTAL: torch.tensor([1.0, 3.0]), "judge": fall}, 0, ["judge"]) == []
    assert len(alarms(before, {TOTAL: torch.tensor([1.0, 2.9]), "judge": fall}, 0, ["judge"])) == 1


def test_without_verdicts_there_is_no_alarm():
    nothing = torch.full((4,), math.nan)
    before, after = {TOTAL: torch.zeros(4), "judge": torch.zeros(4)}, {TOTAL: noisy(1, 0, count=4), "judge": nothing}
    assert alarms(before, after, 0, ["judge", "unknown"]) == []


def test_the_comparison_reaches_two_evaluations_back(tmp_path):
    (tmp_path / "samples").mkdir()
    for k, (total, judge) in {0: (0.0, 9.0), 5: (1.0, 5.0), 10: (2.0, 4.0), 15: (3.0, 3.0)}.items():
        rows = {"scores": {"judge": [judge, judge + 0.1, None]}, TOTAL: [total, total + 0.1, total]}
        (tmp_path / "samples" / f"{k:06d}.json").write_text(json.dumps(rows))
    (alarm,) = look(tmp_path, [0, 5, 10, 15], ["judge"])
    assert (alarm.since, alarm.trained, alarm.held_out) == (5, pytest.approx(2), pytest.approx(-2))
    assert look(tmp_path, [0], ["judge"]) == []
    assert look(tmp_path, [0, 99], ["judge"]) == []
    assert scores_of(tmp_path, 0)["judge"].isnan().tolist() == [False, False, True]


HELD = [{"use": "pixel.contrast"}, {"use": "pixel.brightness", "name": "dark", "norm": "none", "weight": -1}]


def test_a_run_scores_held_out_rewards_at_evaluations_alone(tiny_model, tmp_path):
    options = {"eval_rewards": HELD, "evaluate_every": 1, "iterations": 1}
    with_held = Trainer(runs.config(tiny_model, tmp_path / "a", options)).run()
    without = Trainer(runs.config(tiny_model, tmp_path / "b", options | {"eval_rewards": []})).run()
    assert {"pixel.contrast", "dark"} <= set(with_held["final"]["scores"])
    assert with_held["final"]["scores"]["pixel.brightness"] == without["final"]["scores"]["pixel.brightness"]
    assert runs.rows(tmp_path / "a")[0]["reward/mean"] == runs.rows(tmp_path / "b")[0]["reward/mean"]
    assert "score/dark" not in runs.rows(tmp_path / "a")[0]


TWO_FACED = """
def up(samples):
    return [s.media.mean().item() + len(open({count!r}).read()) for s in samples]

def down(samples):
    open({count!r}, "a").write("x")
    return [-1.0 * len(open({count!r}).read()) + 0.01 * i for i, s in enumerate(samples)]
"""


def test_a_run_says_that_it_is_hacked(tiny_model, tmp_path, capsys):
    """The held-out reward is scored once an evaluation (and twice in the warm-up), and each time it is lower."""
    (tmp_path / "count").write_text("")
    (tmp_path / "faces.py").write_text(TWO_FACED.format(count=str(tmp_path / "count")))
    options = {
        "rewards": [{"use": f"{tmp_path}/faces.py:up"}], "eval_rewards": [{"use": f"{tmp_path}/faces.py:down"}],
        "evaluate_every": 1, "iterations": 1,
    }  # fmt: skip
    Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: reward hacking? Since iteration 0" in said and "'down' fell by -1" in said
    last = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert "'down' fell by -1" in last["alarms"][0]
    assert "fell by -1" in (tmp_path / "run" / "report.html").read_text()


def test_a_held_out_reward_that_fails_stops_nothing(tiny_model, tmp_path):
    (tmp_path / "gone.py").write_text(
        "def gone(samples):\n    return [0.5 if len(samples) == 2 else None for _ in samples]\n"  # fine in the warm-up
    )
    options = {"eval_rewards": [{"use": f"{tmp_path}/gone.py:gone"}], "evaluate_every": 1, "iterations": 4}
    summary = Trainer(runs.config(tiny_model, tmp_path / "run", options)).run()
    assert summary["iterations"] == 4 and summary["final"]["scores"]["gone"]["mean"] is None


def test_two_rewards_that_call_themselves_the_same_are_refused(tiny_model, tmp_path):
    (tmp_path / "same.py").write_text(
        "from rewards import declare\n\n@declare(name='pixel.brightness')\n"
        "def other(samples):\n    return [-100.0] * len(samples)\n"
    )
    options = {"eval_rewards": [{"use": f"{tmp_path}/same.py:other"}]}
    with pytest.raises(RewardError, match="both have scores called pixel.brightness"):
        Trainer(runs.config(tiny_model, tmp_path / "run", options))


def test_held_out_rewards_are_checked_like_the_others(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "name: a\nmodel: {path: shapes}\nalgorithm: {name: flow_grpo}\nrewards: [shapes]\n"
        "eval_rewards: [shapes, {use: nonsense}]\ndata: {prompts: shapes}\n"
    )
    said = check(tmp_path / "c.yaml", [])
    assert any("rewards.0 and eval_rewards.0 are both called 'shapes'" in text for text in said)
    (tmp_path / "c.yaml").write_text((tmp_path / "c.yaml").read_text().replace("[shapes, {use", "[{use"))
    (problem,) = check(tmp_path / "c.yaml", [])
    assert "eval_rewards" in problem and "no reward 'nonsense'" in problem


def test_held_out_rewards_may_change_on_resume(tiny_model, tmp_path):
    from flowrl.config import diff

    tree = runs.tree(tiny_model, tmp_path)
    assert diff(make_config(tree), make_config(tree | {"eval_rewards": HELD})) == {}
