"""G2RPO: tails of several strides on exact grids, advantages added up over them, and what that costs."""

import math

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.granular_grpo import GranularGRPO
from samplers import euler, linear_times, shifted_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

NAN = float("nan")


def small(**changes):
    """8 steps, 4 noises (with 12 samples) at step 2, judged after 3 tails."""
    return GranularGRPO(**{"num_steps": 8, "steps": (2,), "adv_floor": 0.0, **changes})


def test_defaults_are_the_papers():
    record = GranularGRPO().model_dump()
    expected = {"num_steps": 16, "shift": 3.0, "eta": 0.7, "strides": (1, 2, 3), "kl_coef": 0.0}
    assert {name: record[name] for name in expected} == expected
    plans = GranularGRPO().plan(linear_times(16), 0, 12, 0)
    assert [plan.stochastic_steps for plan in plans] == [(k,) for k in range(8)]
    assert all(plan.leaves_per_root == 12 and plan.fanout[k] == 4 for k, plan in enumerate(plans))


def test_tails_take_every_stride_th_time_and_end_at_zero():
    grid = shifted_times(16, 3.0).tolist()
    for k, plan in enumerate(GranularGRPO().plan(linear_times(16), 0, 12, 0)):
        for stride, tail in zip((1, 2, 3), plan.tails, strict=True):
            expected = [grid[i] for i in range(k + 1, 17) if (i - k - 1) % stride == 0 and i < 16] + [0.0]
            assert tail == pytest.approx(expected, abs=0)


def test_all_tails_start_from_the_same_noise_and_are_walked_by_euler():
    policy, algorithm = ToyPolicy(), small()
    batch = collect(algorithm, policy, num_prompts=3, k=12)
    grid = shifted_times(8, 3.0)
    for edge in range(len(batch.trajectory)):
        below = batch.trajectory.leaves[edge].nonzero().flatten()
        assert len(below) == 3
        cond = batch.cond_at(batch.trajectory.prompt[edge : edge + 1])
        for stride, leaf in zip((1, 2, 3), below, strict=True):
            x = batch.trajectory.x_next[edge : edge + 1]
            times = [*grid[3:8:stride], grid[8]]
            for t, t_next in zip(times, times[1:], strict=False):
                x = euler(x, policy.velocity(x, t[None], cond).detach(), t[None], t_next[None])
            torch.testing.assert_close(batch.trajectory.x0[leaf], x[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 2, 4])
def test_calls_are_prefix_plus_tails(k):
    policy = ToyPolicy()
    batch = collect(small(steps=(k,)), policy, num_prompts=2, k=12)
    tails = sum(math.ceil((8 - k - 1) / stride) for stride in (1, 2, 3))
    assert policy.calls["current"] == batch.trajectory.calls == 2 * (k + 1 + 4 * tails)
    assert len(batch.trajectory) == 2 * 4
    before = policy.calls["current"]
    gradient(small(steps=(k,)), policy, batch)
    assert policy.calls["current"] - before == 2, "more tails do not make an update dearer"


def z_scores(rewards):
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)


def test_credit_is_the_sum_over_strides_of_z_scores():
    batch = collect(small(), ToyPolicy(), num_prompts=3, k=12)
    expected = []
    for prompt in range(3):
        table = batch.rewards[12 * prompt : 12 * prompt + 12].view(4, 3)  # noise, stride
        expected += [sum(z_scores(table[:, stride])[noise] for stride in range(3)) for noise in range(4)]
    torch.testing.assert_close(batch.advantages, torch.stack(expected).float())


def test_a_strides_scale_does_not_matter():
    algorithm = small()
    batch = collect(algorithm, ToyPolicy(), num_prompts=3, k=12)
    before = batch.advantages
    batch.rewards = (
        batch.rewards.view(-1, 3) * torch.tensor([1.0, 50.0, 0.02]) + torch.tensor([0.0, 5.0, -3.0])
    ).ravel()
    torch.testing.assert_close(algorithm.credit(batch), before, rtol=1e-4, atol=1e-5)


def test_missing_verdicts_leave_the_other_strides():
    """A noise judged after two of three tails has 3 / 2 of their sum; one that was not judged leaves."""
    algorithm = small()
    batch = collect(algorithm, ToyPolicy(), num_prompts=1, k=12)
    table = batch.rewards.view(4, 3)
    table[0, 1] = NAN
    table[2] = NAN
    credit = algorithm.credit(batch)
    assert credit[2].isnan() and credit[[0, 1, 3]].isfinite().all()
    first, third = (z_scores(table[[0, 1, 3], stride]) for stride in (0, 2))
    assert float(credit[0]) == pytest.approx(1.5 * float(first[0] + third[0]), rel=1e-5)
    second = z_scores(table[[1, 3], 1])
    assert float(credit[3]) == pytest.approx(float(first[2] + second[1] + third[2]), rel=1e-5)


def test_credit_is_cut_after_adding_up():
    batch = collect(small(adv_clip=1.5), ToyPolicy(), num_prompts=3, k=12)
    assert float(batch.advantages.abs().max()) == 1.5


def test_one_stride_is_grpo_on_one_step():
    algorithm = small(strides=(1,), adv_eps=1e-4)
    batch = collect(algorithm, ToyPolicy())
    rewards = batch.rewards.view(4, 8)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages, expected.flatten().float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": (15,)}, r"steps=\[15\] must name different steps from 0 to 14"),
        ({"strides": ()}, "at least 1"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        GranularGRPO(**fields)


@pytest.mark.parametrize(
    ("fields", "k", "message"),
    [
        ({}, 1, "at least 2"),
        ({}, 3, "at least 2 noises x 3 strides"),
        ({}, 16, "samples_per_prompt=16.*multiple of the strides.*Choose 12"),
        ({"strides": (1, 1)}, 8, "different whole numbers"),
        ({"strides": (0, 1)}, 8, "at least 1"),
        ({"num_steps": 4}, 12, "equal tails of the 2 steps.*leave out strides above 2, or put the stochastic step ear"),
    ],
)
def test_tails_that_cannot_be_compared_are_refused(fields, k, message):
    algorithm = GranularGRPO(**fields)
    with pytest.raises(ValueError, match=message):
        algorithm.plan(linear_times(algorithm.num_steps), 0, k, 0)


def test_it_learns():
    _, records = train(GranularGRPO(num_steps=8), iterations=40, lr=0.05, k=12)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
