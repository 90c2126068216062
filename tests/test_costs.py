"""The counted denoiser calls of a run are those of the formula (reliability_and_scale, section 5), to the last one.

Symbols: P prompts, K samples each, N = P K, T steps, E trained steps of a sample, g = 2 with guidance, else 1.
"""

import json
from pathlib import Path

import pytest
import torch

from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.algorithms.mix_grpo import MixGRPO
from flowrl.algorithms.schedule import plans_of
from flowrl.configfile import parse_yaml
from flowrl.costs import cost, describe, expected_cost
from samplers import branch_at
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
P, K, T = len(runs.PROMPTS), runs.SAMPLES, 4
N = P * K


def formula(algorithm, g, start):
    """(rollout, train, reference) written out by hand for an iteration whose window starts at step `start`."""
    kl = algorithm.get("kl_coef", 0) > 0
    if algorithm["name"] == "flow_grpo" and not algorithm.get("shared_noise"):
        trained = algorithm.get("window") or T - 1
        return g * N * T, g * N * trained, g * N * trained * kl
    if algorithm.get("shared_noise", True):
        # One walk a prompt up to the first stochastic step, which K siblings leave from one evaluated state.
        w = algorithm.get("window") or T - 1
        trained = P + N * (w - 1)
        return g * (P * (start + 1) + N * (T - start - 1)), g * trained, g * trained * kl
    return g * N * T, g * N * algorithm["window"], g * N * algorithm["window"] * kl


CASES = {
    "flow_grpo with kl": {**runs.FLOW, "kl_coef": 0.04},
    "flow_grpo without kl": {**runs.FLOW, "kl_coef": 0.0},
    "flow_grpo with a window": {**runs.FLOW, "window": 1, "window_range": (0, 3)},
    "flow_grpo with shared noise": {**runs.FLOW, "shared_noise": True},
    "mix_grpo with shared noise": {**runs.MIX, "shared_noise": True},
    "mix_grpo without": {**runs.MIX, "shared_noise": False},
    "mix_grpo with kl": {**runs.MIX, "kl_coef": 0.1},
}


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("case", CASES)
def test_the_counted_calls_are_those_of_the_formula(trainer, case, guidance):
    algorithm, g = CASES[case], 2 if guidance > 1 else 1
    run = trainer({"algorithm": algorithm, "model.guidance": guidance, "model.lora": runs.LORA})
    times = run.policy.model.times(T, 32, 32)
    starts = set()
    for iteration in (0, 1):
        plan = run.algorithm.plan(times, iteration, K, run.config.seed)
        expected = cost(run.algorithm, [plan], prompts=P, samples_per_prompt=K, guided=guidance > 1, updates=1)
        row = run.step(iteration)
        counted = tuple(row[f"calls/{role}"] for role in ("rollout", "train", "reference"))
        assert counted == (expected.rollout, expected.train, expected.reference)
        assert counted == formula(algorithm, g, plan.stochastic_steps[0])
        starts.add(plan.stochastic_steps)
    if case.startswith("mix"):
        assert len(starts) == 2  # the window has moved, and the numbers with it


@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_neither_updates_nor_micro_batches_change_the_calls(trainer, micro_batch):
    run = trainer({"optimizer.updates_per_iteration": 3, "optimizer.micro_batch": micro_batch})
    row = run.step(0)
    assert (row["calls/rollout"], row["calls/train"]) == formula(runs.MIX, 1, 0)[:2]


def test_evaluations_and_warm_up_are_not_counted_as_training(trainer, tmp_path):
    run = trainer({"iterations": 1, "evaluate_every": 1})
    run.run()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["calls/rollout"], row["calls/train"]) == formula(runs.MIX, 1, 0)[:2]
    assert run.policy.calls["eval"] == 2 * 4 * 3  # two evaluations of 4 samples and 3 steps


def test_samples_without_a_verdict_are_not_trained_on(trainer, tmp_path):
    body = "return [math.nan if calls and i < 4 else v for i, v in enumerate(brightness(samples))]"
    run = trainer({"rewards": [{"use": runs.reward_file(tmp_path, body)}], "algorithm": {**runs.FLOW, "kl_coef": 0}})
    row = run.step(0)
    assert row["calls/rollout"] == N * T
    assert row["calls/train"] == (N - 4) * (T - 1)


def test_a_tree_counts_its_states_and_edges():
    """Steps 0 and 1 split in 2: states 1 and 2, edges 2 and 4; step 2 is stochastic on 4; the last follows the ODE."""
    plan = branch_at(torch.linspace(1, 0, 5), (0, 1), 2)
    c = cost(FlowGRPO(kl_coef=0.1), [plan], prompts=3, samples_per_prompt=8, guided=True, updates=2)
    roots = 3 * 2
    assert (c.samples, c.roots, c.rows, c.states) == (24, roots, roots * (2 + 4 + 4), roots * (1 + 2 + 4))
    assert c.rollout == 2 * roots * (1 + 2 + 4 + 4)
    assert c.train == c.reference == 2 * c.states


def test_the_plan_of_a_run_tells_people_its_numbers(make_config):
    config = make_config({"model.guidance": 4.5, "algorithm": {**runs.MIX, "kl_coef": 0.1}})
    algorithm = config.algorithm.build()
    assert isinstance(algorithm, MixGRPO)
    plan = algorithm.plan(torch.linspace(1, 0, T + 1), 0, K, 0)
    told = dict(describe(config, algorithm, [plan], trainable=1234, world=2))
    rollout, train, reference = formula(config.algorithm.model_dump(), 2, 0)
    assert told["denoiser calls"].startswith(f"{rollout} rollout + {train} train + {reference} reference")
    assert told["samples"].startswith("3 prompts x 4 = 12 an iteration, 3 starts")
    assert "SS.." in told["steps"] and told["trainable"] == "1,234 parameters"
    assert told["length"] == "3 iterations on 2 processes" and "guidance 4.5, full weights" in told["model"]


SHAPES = sorted(path for path in (ROOT / "configs" / "shapes").glob("*.yaml") if path.stem != "base")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_every_method_costs_what_is_announced(trainer, path):
    check_costs(trainer, path, update="auto")


@pytest.mark.one_in(6)
@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_so_does_every_method_that_computes_anew(trainer, path):
    check_costs(trainer, path, update="recompute")


def check_costs(trainer, path, update):
    """In the second iteration, where windows have moved; two prompts of sixteen samples suit every tree and tail."""
    algorithm = {**parse_yaml((ROOT / "configs/shapes/base.yaml").read_text(), "base").values["algorithm"]}
    child = parse_yaml(path.read_text(), path.name).values
    given, family = child["algorithm"], child.get("model", {}).get("family")
    section = {**algorithm, **given} if given["name"] == algorithm["name"] else given
    section.pop(
        "inject", None
    )  # these prompts have no stored pictures; tests/algorithms/test_injection.py counts those
    run = trainer({
        "algorithm": section, "data.prompts_per_iteration": 2, "data.samples_per_prompt": 16,
        "optimizer.update": update, "model.family": family,
        "rewards": [{"use": "shapes_clip" if given["name"] == "srpo" else "pixel.brightness"}],
    })  # fmt: skip
    plans = plans_of(run.algorithm, run.actor.times, 1, 16, run.config.seed)
    expected = expected_cost(run.config, run.algorithm, plans, 1)
    run.step(0)
    row = run.step(1)
    roles = ("rollout", "train", "old", "reference", "teacher")
    assert [row[f"calls/{role}"] for role in roles] == [getattr(expected, role) for role in roles]
    assert expected.train == 0 if expected.single_pass else expected.train > 0
    assert row["single_pass"] == expected.single_pass
