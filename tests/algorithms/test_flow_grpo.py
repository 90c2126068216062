"""Flow-GRPO: the paper's defaults, its plans, and what it refuses."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.flow_grpo import FlowGRPO
from samplers import linear_times, shifted_times
from tests.algorithms.toy import ToyPolicy, collect, gradient

TIMES = linear_times(10)


def test_defaults_are_the_papers():
    record = FlowGRPO().model_dump()
    expected = {"num_steps": 10, "eta": 0.7, "clip_range": 1e-4, "adv_clip": 5.0, "adv_eps": 1e-4, "kl_coef": 0.04}
    assert {name: record[name] for name in expected} == expected


def test_every_step_but_the_last_is_stochastic():
    plan = FlowGRPO().plan(TIMES, iteration=3, samples_per_prompt=8, seed=0)
    assert plan.stochastic_steps == tuple(range(9))
    assert plan.leaves_per_root == 1
    assert plan.times == tuple(TIMES.tolist())


def test_windows_are_random_within_their_range_and_cover_it():
    algorithm = FlowGRPO(window=2, window_range=(1, 5))
    plans = [algorithm.plan(TIMES, iteration, 8, seed=0) for iteration in range(60)]
    assert all(plan.num_stochastic == 2 for plan in plans)
    assert {plan.stochastic_steps for plan in plans} == {(1, 2), (2, 3), (3, 4)}
    assert plans != [algorithm.plan(TIMES, iteration, 8, seed=1) for iteration in range(60)]


def test_window_lies_in_the_first_half_by_default():
    plans = [FlowGRPO(window=3).plan(TIMES, iteration, 8, seed=0) for iteration in range(60)]
    assert {plan.stochastic_steps[0] for plan in plans} == {0, 1, 2}


@pytest.mark.parametrize("window", [None, 2])
def test_shared_noise_branches_once_at_the_first_stochastic_step(window):
    algorithm = FlowGRPO(window=window, shared_noise=True)
    for iteration in range(10):
        plan = algorithm.plan(TIMES, iteration, 6, seed=0)
        first = plan.stochastic_steps[0]
        assert plan.fanout == tuple(6 if step == first else 1 for step in range(10))


def test_a_group_that_shares_noise_runs_its_prefix_once():
    algorithm, policy = FlowGRPO(num_steps=6, window=1, window_range=(2, 3), shared_noise=True), ToyPolicy()
    batch = collect(algorithm, policy, num_prompts=3, k=4)
    assert policy.calls["current"] == batch.trajectory.calls == 3 * (3 + 4 * 3)
    assert torch.equal(batch.trajectory.group, torch.arange(3).repeat_interleave(4))
    starts = batch.trajectory.x.reshape(3, 4, 2)
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert batch.trajectory.x0.unique(dim=0).shape == (12, 2)


def test_shift_replaces_the_models_grid():
    plan = FlowGRPO(shift=3.0).plan(TIMES, 0, 8, 0)
    assert plan.times == tuple(shifted_times(10, 3.0).tolist())


def test_global_std_is_that_of_the_whole_batch():
    policy = ToyPolicy()
    batch = collect(FlowGRPO(num_steps=4), policy)
    assert batch.rewards is not None
    rewards = batch.rewards.reshape(4, 8)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(batch.advantages, expected.flatten().repeat(3).float())


def test_reference_is_asked_for_only_when_there_is_a_kl():
    for coefficient in (0.0, 0.04):
        algorithm, policy = FlowGRPO(num_steps=4, kl_coef=coefficient), ToyPolicy()
        batch = collect(algorithm, policy)
        loss, _ = gradient(algorithm, policy, batch)
        assert algorithm.needs.reference == (coefficient > 0)
        assert policy.calls["reference"] == (len(batch.trajectory) if coefficient else 0)
        assert ("kl" in loss.metrics) == (coefficient > 0)


def test_kl_gradient_pulls_back_to_the_initial_weights():
    algorithm, policy = FlowGRPO(num_steps=4, kl_coef=10.0), ToyPolicy()
    batch = collect(algorithm, policy)
    batch.advantages = torch.zeros(len(batch.trajectory))
    _, at_start = gradient(algorithm, policy, batch)
    assert (at_start == 0).all()
    with torch.no_grad():
        policy.bias += 0.3
    loss, moved = gradient(algorithm, policy, batch)
    assert loss.metrics["kl"] > 0
    assert (moved[:2] > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, r"window=6 does not fit steps \[0, 5\) of 10.*smaller"),
        ({"window": 0}, "at least one"),
        ({"window": 2, "window_range": (8, 10)}, "last step always follows the ODE"),
        ({"window": 2, "window_range": (-1, 4)}, "does not fit"),
        ({"window_range": (0, 4)}, "there is none; set window"),
        ({"num_steps": 1}, "choose at least 2"),
        ({"eta": 0.0}, "adds no noise"),
        ({"eta": float("nan")}, "adds no noise"),
        ({"sde": "cps", "eta": 1.2}, r"eta in \(0, 1\]"),
        ({"sde": "ddim", "eta": 1.2}, r"eta in \(0, 1\]"),
        ({"sde": "euler"}, "flow_sde"),
        ({"clip_range": 0.0}, "clips every ratio"),
        ({"clip_range": (0.1, -0.1)}, "both are positive"),
        ({"clip_range": (float("inf"), 0.1)}, "clips every ratio"),
        ({"objective": "spo"}, "needs algorithm.trust"),
        ({"adv_clip": 0.0}, "erase every advantage"),
        ({"adv_std": "batch"}, "global"),
        ({"adv_eps": -1e-4}, "at least 0"),
        ({"kl_coef": -0.1}, "at least 0"),
        ({"kl_form": "k3"}, "velocity_mse"),
        ({"shift": 0.0}, "falling time grid"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        FlowGRPO(**fields)


def test_values_from_yaml_are_taken():
    record = FlowGRPO.model_validate({"clip_range": [1e-4, 2e-4], "eta": 1, "window": 2, "window_range": [0, 3]})
    assert record.clip_range == (1e-4, 2e-4)
    assert record.window_range == (0, 3)
    assert FlowGRPO.model_validate(record.model_dump()) == record


def test_a_grid_of_another_length_is_refused():
    with pytest.raises(ValueError, match="num_steps=10 needs a grid of 11 times, got 21"):
        FlowGRPO().plan(linear_times(20), 0, 8, 0)


def test_credit_and_loss_say_what_is_missing():
    algorithm, policy = FlowGRPO(num_steps=4), ToyPolicy()
    batch = collect(algorithm, policy)
    batch.rewards = batch.advantages = None
    with pytest.raises(ValueError, match="score the samples first"):
        algorithm.credit(batch)
    with pytest.raises(ValueError, match="credit"):
        algorithm.loss(policy, batch)
