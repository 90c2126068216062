"""Diffusion-ART: its direction against Bayes and closed forms, what it converges to, and what it keeps and asks."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from flowrl.algorithms.advantages import win_rates
from flowrl.algorithms.diffusion_art import DiffusionART, direction
from flowrl.algorithms.schedule import plans_of
from flowrl.costs import cost
from samplers import shifted_times
from tests.algorithms.toy import DIM, ToyPolicy, collect, gradient, live, scattered, train

SMALL = {"num_steps": 6, "draws_per_sample": 3}
ALL = {
    "one direction": DiffusionART(**SMALL),
    "weighted": DiffusionART(**SMALL, temperature=4.0),
    "pairwise": DiffusionART(**SMALL, feedback="pairwise"),
}
every = pytest.mark.parametrize("name", ALL)


def group(k=9, dims=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(k, dims, generator=generator).double()
    return x0, torch.randn(k, generator=generator).double(), torch.randn(k, dims, generator=generator).double()


def test_at_temperature_one_it_is_the_posterior_covariance_under_bayes():
    """The group as a discrete prior, each state's posterior over it from the density of the forward process."""
    x0, advantages, x = group()
    t = torch.linspace(0.2, 1, 9).double()
    found = direction(x, t, x0, advantages, 1.0)
    for i in range(9):
        posterior = Normal((1 - t[i]) * x0, t[i]).log_prob(x[i]).sum(1).softmax(0)
        mean, mean_a = (posterior[:, None] * x0).sum(0), (posterior * advantages).sum()
        expected = (posterior[:, None] * (advantages - mean_a)[:, None] * (x0 - mean)).sum(0)
        torch.testing.assert_close(found[i], expected)


def test_it_is_how_tilting_by_the_reward_moves_what_a_state_may_become():
    """d/ds E[x0 e^(s A) | x_t] / E[e^(s A) | x_t] at s = 0, by autograd."""
    x0, advantages, x = group(seed=1)
    t = torch.full((9,), 0.7).double()

    def tilted_mean(s):
        return (Normal(0.3 * x0, 0.7).log_prob(x[0]).sum(1) + s * advantages).softmax(0) @ x0

    expected = torch.autograd.functional.jacobian(tilted_mean, torch.zeros(()).double())
    torch.testing.assert_close(direction(x, t, x0, advantages, 1.0)[0], expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0, None])
@pytest.mark.parametrize("t", [1.0, 0.8, 0.4])
def test_of_gaussian_data_and_a_linear_reward_it_is_exact(temperature, t):
    """Cov(a x0, x0 | x_t) = a s^2 t^2 / ((1 - t)^2 s^2 + t^2), whatever x_t is."""
    generator = torch.Generator().manual_seed(0)
    s, a = 0.5, torch.tensor([1.0, -2.0]).double()
    x0 = 1.5 + s * torch.randn(100_000, 2, generator=generator).double()
    x = (1 - t) * x0[:5] + t * torch.randn(5, 2, generator=generator).double()
    found = direction(x, torch.full((5,), t).double(), x0, x0 @ a, temperature)
    variance = s**2 * t**2 / ((1 - t) ** 2 * s**2 + t**2)
    torch.testing.assert_close(found, (a * variance).expand(5, 2), rtol=0.08, atol=0.01)


def test_equal_weights_are_the_limit_of_a_high_temperature():
    x0, advantages, x = group()
    t = torch.linspace(0.2, 1, 9).double()
    torch.testing.assert_close(
        direction(x, t, x0, advantages, 1e9), direction(x, t, x0, advantages, None), rtol=1e-5, atol=0
    )
    one_time = direction(x, torch.full((9,), 0.6).double(), x0, advantages, None)
    torch.testing.assert_close(one_time, one_time[:1].expand(9, -1))  # one direction for all states of the prompt


def test_pairwise_feedback_is_a_sum_over_pairs():
    """sum_ij (f_ij - 1/2)(x_i - x_j), f = 1, 0 or a tie's 0.5, is 2 K (K - 1) times the covariance with win rates."""
    x0, _, x = group(k=7)
    rewards = torch.tensor([0.1, 0.7, 0.7, 0.2, 0.9, 0.1, 0.5]).double()
    rates = win_rates(rewards, torch.zeros(7).long()).value
    found = direction(x, torch.ones(7).double(), x0, rates, None)[0]
    total = torch.zeros(3).double()
    for i in range(7):
        for j in range(7):
            f = 0.5 if rewards[i] == rewards[j] else float(rewards[i] > rewards[j])
            total += (f - 0.5) * (x0[i] - x0[j])
    torch.testing.assert_close(found, total / (2 * 7 * 6))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_converges_to_the_tilted_distribution(strength):
    """N(c, s^2) e^(strength a x) is N(c + strength s^2 a, s^2): where the loss, quadratic in the bias, is lowest."""
    a = torch.tensor([0.8, -0.4]).double()
    algorithm = DiffusionART(
        num_steps=40, solver="heun", draws_per_sample=6, strength=strength, adv_std="none", adv_eps=1.0, adv_clip=100.0
    )
    policy = ToyPolicy()
    batch = collect(algorithm, policy, num_prompts=1, k=6_000, reward=lambda x0: x0.double() @ a)

    def slope(bias):
        with torch.no_grad():
            policy.bias.copy_(bias)
        return gradient(algorithm, policy, batch)[1][:2]

    here = slope(torch.zeros(2))
    curvature = torch.stack([slope(unit) - here for unit in torch.eye(2)], 1)
    lowest = -torch.linalg.solve(curvature, here)
    torch.testing.assert_close(lowest.double(), strength * 0.25 * a, rtol=0.1, atol=0.005)


@every
def test_the_loss_by_hand(name):
    """The states that the ODE came through, the velocities of the policy that drew them, one unit at a time."""
    algorithm, drawn_by = ALL[name].model_copy(update={"kl_coef": 0.5}), ToyPolicy()
    batch, policy = collect(algorithm, drawn_by), scattered()
    loss, grad = gradient(algorithm, policy, batch)
    step_of, terms = list(batch.plans[0].kept), []
    for place, step in enumerate(step_of):
        for prompt in range(4):
            mine = slice(8 * prompt, 8 * prompt + 8)
            x, v_old = batch.trajectory.visited[mine, place].unbind(1)
            t = batch.plans[0].grid()[step].expand(8)
            cond = {"offset": batch.cond["offset"][prompt].expand(8, -1)}
            with torch.no_grad():
                torch.testing.assert_close(v_old, drawn_by.velocity(x, t, cond), rtol=0, atol=1e-6)
            credit = batch.advantages[(batch.draws.t == t[0]) & (batch.leaf_prompt[batch.draws.sample] == prompt)]
            g = direction(x, t, batch.trajectory.x0[mine], credit, algorithm.temperature)
            v = policy.velocity(x, t, cond)
            with torch.no_grad(), policy.reference():
                initial = policy.velocity(x, t, cond)
            terms.append(((v - (v_old - g / t[:, None])) ** 2).mean(1) + 0.5 * ((v - initial) ** 2).mean(1))
    expected = torch.cat(terms).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-5)


@every
def test_the_first_step_leads_to_better_samples(name):
    algorithm, policy = ALL[name], ToyPolicy()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    assert (grad[:2] < 0).all(), "the best samples lie at (1, 1), and the policy's mean at (0, 0)"


@every
def test_it_learns(name):
    policy, records = train(ALL[name], iterations=40, lr=0.025, updates=4)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.4 and last > -0.6 and (policy.bias > 0.5).all()


@every
def test_two_latents_a_state_are_kept_and_no_stochastic_step(name):
    batch = collect(ALL[name], ToyPolicy())
    assert batch.trajectory.visited.shape == (32, 3, 2, DIM)
    assert len(batch.trajectory) == 0 and len(batch.rows) == len(batch.advantages) == 32 * 3
    assert not ALL[name].needs.old and ALL[name].needs.on_policy and not ALL[name].needs.logprobs


def test_steps_are_drawn_anew_and_are_the_same_for_everybody():
    algorithm, times = DiffusionART(**SMALL, time_range=(0.3, 0.95)), shifted_times(6, 3.0)
    kept = [plans_of(algorithm, times, iteration, 8, 0)[0].kept for iteration in range(40)]
    assert kept == [plans_of(algorithm, times, iteration, 16, 0)[0].kept for iteration in range(40)]
    counts = [sum(step in steps for steps in kept) for step in range(6)]
    assert all(len(steps) == 3 for steps in kept)
    assert counts[0] == 0 and min(counts[1:]) > 12  # t = 1 is out of range; 3 of 5 are 24 of 40 on the average


@every
def test_a_sample_without_a_verdict_is_as_if_never_drawn(name):
    algorithm, policy = ALL[name], scattered()
    batch = collect(algorithm, policy)
    gone, there = batch.draws.sample == 3, torch.arange(32) != 3
    batch.rewards[3] = batch.scores["reward"][3] = float("nan")
    batch.advantages = algorithm.credit(batch)
    assert torch.equal(batch.advantages.isnan(), gone)
    _, found = gradient(algorithm, policy, live(batch))
    without = replace(
        batch, trajectory=batch.trajectory.keep_leaves(there), leaf_prompt=batch.leaf_prompt[there],
        rewards=batch.rewards[there], scores={"reward": batch.rewards[there]}, place=torch.arange(31),
    )  # fmt: skip
    without.draws = algorithm.draws(without)
    without.advantages = algorithm.credit(without)
    torch.testing.assert_close(gradient(algorithm, policy, without)[1], found, rtol=1e-5, atol=1e-6)


@every
def test_groups_may_be_dealt_to_micro_batches(name):
    algorithm, policy = ALL[name], scattered()
    batch = collect(algorithm, policy)
    whole, grad = gradient(algorithm, policy, batch)
    units = batch.draws.unit.unique()
    assert len(units) == 4 * 3 and all((batch.draws.unit == unit).sum() == 8 for unit in units)
    parts = [batch.select(torch.isin(batch.draws.unit, part)) for part in units.flip(0).tensor_split(3)]
    found = sum(gradient(algorithm, policy, part)[1] * len(part.rows) for part in parts) / len(batch.rows)
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)
    assert whole.metrics["tilt"] > 0


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_calls_are_those_of_the_formula(kl_coef):
    """Rollout: samples x steps; train: once a kept state; the velocities of the old policy are the rollout's own."""
    algorithm, policy = DiffusionART(**SMALL, kl_coef=kl_coef), ToyPolicy()
    batch = collect(algorithm, policy)
    gradient(algorithm, policy, batch)
    plans = plans_of(algorithm, shifted_times(6, 3.0), 0, 8, 0)
    found = cost(algorithm, plans, prompts=4, samples_per_prompt=8, guided=False, updates=1)
    assert (found.rollout, found.train, found.old, found.stored) == (32 * 6, 32 * 3, 0, 0)
    assert found.reference == (32 * 3 if kl_coef else 0)
    assert policy.calls == {"current": 32 * 9, "old": 0, "reference": found.reference, "teacher": 0}


def test_impossible_values_are_refused_with_a_reason():
    with pytest.raises(
        ValueError, match=r"draws_per_sample=4, but only 3 of num_steps=3 begin in time_range=\[0.0, 1.0\]"
    ):
        plans_of(DiffusionART(num_steps=3), shifted_times(3, 3.0), 0, 8, 0)
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        plans_of(DiffusionART(), shifted_times(10, 3.0), 0, 1, 0)
    for wrong in ({"strength": 0.0}, {"temperature": 0.0}, {"feedback": "pairs"}):
        with pytest.raises(ValidationError):
            DiffusionART(**wrong)
