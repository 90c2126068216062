"""Flow-RWR: weights against softmax and brute force, never negative; its gradient, and SFT on the best."""

import math

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.flow_rwr import FlowRWR, best_of, exponential
from samplers import shifted_times
from tests.algorithms.toy import ToyPolicy, asked, collect, gradient, live, train

SMALL = {"num_steps": 6, "draws_per_sample": 3}
NAN = math.nan


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_weights_are_softmax_times_the_number_of_verdicts(tau):
    rewards = torch.tensor([-2.0, 0.3, NAN, 1.1, -700.0, -701.0, -703.0, NAN]).double()
    group = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5])
    found = exponential(rewards, group, tau)
    for rows in ([0, 1, 3], [4, 5, 6]):
        torch.testing.assert_close(found[rows], 3 * torch.softmax(rewards[rows] / tau, 0))
        assert found[rows].mean() == pytest.approx(1)
    assert found[[2, 7]].isnan().all()
    whole = exponential(rewards.clamp(min=-3), torch.zeros_like(group), tau)
    valid = ~rewards.isnan()
    torch.testing.assert_close(whole[valid], 6 * torch.softmax(rewards.clamp(min=-3)[valid] / tau, 0))


def test_weights_are_exp_of_the_reward_but_for_one_factor():
    rewards = torch.tensor([0.2, 0.9, 0.4]).double()
    found = exponential(rewards, torch.zeros(3), 1.0)
    torch.testing.assert_close(found / found[0], rewards.exp() / rewards.exp()[0])


@pytest.mark.parametrize("settings", [{"over": "batch"}, {"over": "group"}, {"weights": "best"}])
def test_no_weight_is_negative_however_bad_the_rewards(settings):
    batch = collect(FlowRWR(**SMALL, **settings), ToyPolicy(), reward=lambda x0: -1e4 - x0[:, 0].double())
    assert (live(batch).advantages >= 0).all() and (live(batch).advantages > 0).any()


def test_a_hard_prompt_weighs_less_over_the_batch_and_as_much_over_the_group():
    rewards = torch.tensor([[0.0, 0.2, 0.4], [2.0, 2.2, 2.4]]).double().flatten()
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    over_batch, over_group = (exponential(rewards, g, 1.0).view(2, 3).sum(1) for g in (torch.zeros(6), group))
    assert over_batch[1] / over_batch[0] == pytest.approx(math.exp(2))
    torch.testing.assert_close(over_group, torch.tensor([3.0, 3.0]).double())


def test_equal_rewards_teach_nothing():
    rewards, group = torch.tensor([0.5, 0.5, 0.1, 0.9]).double(), torch.tensor([0, 0, 1, 1])
    found = exponential(rewards, group, 0.4)
    assert found[:2].tolist() == [0, 0] and found[2:].sum() == pytest.approx(2)
    assert (exponential(torch.full((4,), 0.5).double(), torch.zeros(4), 0.4) == 0).all()
    assert best_of(rewards, group)[:2].isnan().all()


def test_the_best_are_brute_force_and_ties_are_all_of_them():
    rewards = torch.tensor([1.0, 3.0, 3.0 + 1e-7, 2.0, NAN, -1.0, -2.0, NAN, NAN, 4.0, 4.0]).double()
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    expected = [NAN, 1, 1, NAN, NAN, 1, NAN, NAN, NAN, NAN, NAN]
    torch.testing.assert_close(best_of(rewards, group), torch.tensor(expected).double(), equal_nan=True)


def test_only_the_best_are_trained_on():
    algorithm, policy = FlowRWR(**SMALL, weights="best"), ToyPolicy()
    batch = collect(algorithm, policy)
    rest = live(batch)
    best = batch.rewards.view(4, 8).argmax(1) + 8 * torch.arange(4)
    assert rest.draws.sample.unique().tolist() == best.tolist() and len(rest.rows) == 4 * 3
    before = policy.calls["current"]
    gradient(algorithm, policy, rest)
    assert policy.calls["current"] - before == 12


@pytest.mark.parametrize("settings", [{"temperature": 0.3}, {"over": "group"}, {"weights": "best"}])
def test_loss_and_gradient_by_hand(settings):
    algorithm, policy = FlowRWR(**SMALL, **settings), ToyPolicy(0.2)
    batch = live(collect(algorithm, policy))
    loss, grad = gradient(algorithm, policy, batch)
    at = asked(policy, batch)
    w = batch.advantages.double()
    expected = sum(w[i] * ((at.current[i] - at.target[i]) ** 2).mean() for i in range(len(w))) / len(w)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand.float(), rtol=1e-4, atol=1e-5)


def test_nobody_but_the_trained_policy_is_asked():
    algorithm, policy = FlowRWR(**SMALL), ToyPolicy()
    needs = algorithm.needs
    assert not (needs.old or needs.reference or needs.logprobs or needs.teachers)
    gradient(algorithm, policy, collect(algorithm, policy))
    assert policy.calls["old"] == policy.calls["reference"] == policy.calls["teacher"] == 0


def test_a_low_temperature_learns_faster():
    lasts = []
    for tau in (10.0, 0.3):
        _, records = train(FlowRWR(**SMALL, temperature=tau), iterations=20, lr=0.05)
        lasts.append(records[-1]["reward"])
    assert lasts[1] > lasts[0] + 0.3


@pytest.mark.parametrize("settings", [{"over": "group"}, {"weights": "best"}])
def test_groups_of_one_are_refused_where_they_are_compared(settings):
    times = shifted_times(10, 3.0)
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        FlowRWR(**settings).plan(times, 0, 1, 0)
    assert FlowRWR().plan(times, 0, 1, 0).num_stochastic == 0  # prompts are compared with each other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "greater than 0"),
        ({"weights": "raw"}, "'exp' or 'best'"),
        ({"over": "all"}, "'batch' or"),
    ],
)
def test_impossible_values_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        FlowRWR(**given)
