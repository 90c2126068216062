"""MeanFlowNFT: the MeanFlow identity, DiffusionNFT at r = t, the law of (t, r), and how many times it asks whom."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.diffusion_nft import DiffusionNFT
from flowrl.algorithms.matching import Noised, noised
from flowrl.algorithms.meanflow_nft import MeanFlowNFT, drift
from flowrl.algorithms.schedule import plans_of
from flowrl.costs import cost
from flowrl.types import T_NEXT
from samplers import shifted_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, scattered, train

PLAIN = {"decay": 0.0}


class Gaussian:
    """Exact mean velocities of data N(0, 0.6^2), in float64."""

    def old(self):
        return nullcontext()

    def velocity(self, x, t, cond):
        r = cond[T_NEXT]
        width, width_next = (((1 - s) ** 2 * 0.36 + s**2).sqrt() for s in (t, r))
        return (x - (width_next / width)[:, None] * x) / (t - r)[:, None]


def moment_velocity(x, t):
    return (t - (1 - t) * 0.36) / ((1 - t) ** 2 * 0.36 + t**2) * x


def test_the_identity_gives_the_velocity_of_the_moment_back():
    """v = u + (t - r) du/dt; the numbers were worked out apart from this code (u .7739146, v 1.4462103)."""
    z, t, r = torch.tensor([[1.3]]).double(), torch.tensor([0.8]).double(), torch.tensor([0.2]).double()
    v = moment_velocity(z, t)
    x0 = z - t * v
    at = Noised(z, t, x0, x0 + v, {T_NEXT: r})
    u = Gaussian().velocity(z, t, at.cond)
    assert float(u) == pytest.approx(0.7739146, abs=1e-7) and float(v) == pytest.approx(1.4462103, abs=1e-7)
    found = {e: u + (t - r) * drift(Gaussian(), at, r, e) for e in (0.005, 0.001)}
    assert float(found[0.005]) == pytest.approx(1.4462228, abs=1e-7)
    errors = {e: float((value - v).abs()) for e, value in found.items()}
    assert errors[0.005] / errors[0.001] == pytest.approx(25, rel=0.02), "of second order in e"


def test_along_noise_minus_data_the_identity_holds_on_the_average():
    """The paper's direction eps - x0 has the velocity as its mean given x_t, and u is smooth in x."""
    generator = torch.Generator().manual_seed(0)
    n, t, r = 200_000, 0.7, 0.1
    x0 = 0.6 * torch.randn(n, 1, generator=generator).double()
    noise = torch.randn(n, 1, generator=generator).double()
    x, times, ends = (1 - t) * x0 + t * noise, torch.full((n,), t).double(), torch.full((n,), r).double()
    policy = Gaussian()
    implied = policy.velocity(x, times, {T_NEXT: ends}) + (t - r) * drift(
        policy, Noised(x, times, x0, noise, {T_NEXT: ends}), ends, 0.005
    )
    slope = (implied * x).sum() / (x * x).sum()  # both are linear in x, but for noise of mean 0
    assert float(slope) == pytest.approx(float(moment_velocity(torch.ones(()), torch.tensor(t))), abs=0.01)


def test_with_equal_times_it_is_exactly_diffusion_nft():
    """The same rows, loss and gradient, to the last bit, and not one call more."""
    two, one = MeanFlowNFT(same_time=1.0, to_end=0.0, **PLAIN), DiffusionNFT(num_steps=4, beta=0.1)
    policy = scattered()
    batch = collect(two, policy)
    assert torch.equal(batch.draws.t_next, batch.draws.t)
    before = dict(policy.calls)
    found, grad = gradient(two, policy, batch)
    calls = {role: policy.calls[role] - before[role] for role in before}
    assert calls == {"current": 128, "old": 128, "reference": 0, "teacher": 0}
    expected, by_nft = gradient(one, policy, batch)
    assert torch.equal(found.value, expected.value) and torch.equal(grad, by_nft)
    assert found.metrics["implied"] == 0


def test_the_loss_by_hand():
    """V = u + (t - r) du/dt of the old policy for all three; the branches of NFT, row by row, in float64."""
    algorithm, policy = MeanFlowNFT(**PLAIN, beta=0.6, adv_clip=2.0, kl_coef=0.5), scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    at, r, e = noised(batch), batch.draws.t_next.double(), 0.005
    x, t, target, cond = at.x.double(), at.t.double(), at.target.double(), {**at.cond, T_NEXT: r}
    with torch.no_grad(), policy.old():
        slope = (policy.velocity(x + e * target, t + e, cond) - policy.velocity(x - e * target, t - e, cond)) / (2 * e)
        shift = torch.where(r < t, t - r, 0.0)[:, None] * slope
        old = policy.velocity(x, t, cond)
    with torch.no_grad(), policy.reference():
        initial = policy.velocity(x, t, cond)
    u = policy.velocity(x, t, cond)
    share = (batch.advantages.double() / 4 + 0.5).clamp(0, 1)
    terms = []
    for i in range(len(t)):
        sides = []
        for sign in (1, -1):
            v = old[i] + shift[i] + sign * 0.6 * (u[i] - old[i])
            miss = t[i] * (v - target[i])
            sides.append(miss.square().mean() / miss.detach().abs().mean())
        distance = (u[i] - initial[i]).square().mean()
        terms.append(2 * (share[i] * sides[0] + (1 - share[i]) * sides[1]) / 0.6 + 0.5 * distance)
    expected = torch.stack(terms).mean()
    # u is a difference divided by t - r, so that rounding shows where they are close.
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand.float(), rtol=5e-3, atol=1e-3)


def test_the_derivative_is_the_old_policy_s_and_carries_no_gradient():
    algorithm, policy = MeanFlowNFT(**PLAIN, same_time=0.0), scattered()
    at = noised(collect(algorithm, policy))
    r = at.t / 2
    at = at._replace(cond={**at.cond, T_NEXT: r})
    found = drift(policy, at, r, 0.005)
    with torch.no_grad():
        policy.bias += 1.0
    assert torch.equal(drift(policy, at, r, 0.005), found) and not found.requires_grad
    policy.follow(0.0)
    assert not torch.allclose(drift(policy, at, r, 0.005), found, atol=1e-2)


def test_times_are_the_larger_and_the_smaller_of_two_uniform_ones():
    draws = collect(MeanFlowNFT(**PLAIN, same_time=0.0, to_end=0.0), ToyPolicy(), num_prompts=100, k=16).draws
    t, r = draws.t.double(), draws.t_next.double()
    pair = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    high, low = pair.amax(1), pair.amin(1)
    assert (r < t).all()
    for f in (
        lambda t, r: t,
        lambda t, r: r,
        lambda t, r: t * r,
        lambda t, r: (t - r) ** 2,
        lambda t, r: (r < 0.25).double(),
    ):
        assert float(f(t, r).mean()) == pytest.approx(float(f(high, low).mean()), abs=0.012)
    shifted = collect(MeanFlowNFT(**PLAIN, same_time=0.0, to_end=0.0, time_shift=3.0), ToyPolicy()).draws
    plain = collect(MeanFlowNFT(**PLAIN, same_time=0.0, to_end=0.0), ToyPolicy()).draws
    for found, from_ in ((shifted.t, plain.t), (shifted.t_next, plain.t_next)):
        torch.testing.assert_close(found, 3 * from_ / (1 + 2 * from_))


@pytest.mark.parametrize("count", [3, 4])
def test_kinds_of_draws_have_their_shares(count):
    """Of four draws two have r = t and one has r = 0 in every sample; of three as many on the average."""
    draws = collect(MeanFlowNFT(**PLAIN, draws_per_sample=count), ToyPolicy(), num_prompts=40, k=8).draws
    same = (draws.t_next == draws.t).view(-1, count).sum(1)
    end = (draws.t_next == 0).view(-1, count).sum(1)
    if count == 4:
        assert (same == 2).all() and (end == 1).all()
    else:
        error = 4 * 0.5 / math.sqrt(320)
        assert float(same.double().mean()) == pytest.approx(1.5, abs=error)
        assert float(end.double().mean()) == pytest.approx(0.75, abs=error)
        assert set(same.tolist()) == {1, 2} and set(end.tolist()) == {0, 1}


def test_draws_of_a_sample_do_not_depend_on_the_others():
    algorithm = MeanFlowNFT(**PLAIN)
    batch = collect(algorithm, ToyPolicy())
    second = torch.arange(8, 16)
    trajectory = batch.trajectory.keep_leaves(torch.isin(torch.arange(32), second))
    alone = algorithm.draws(replace(batch, trajectory=trajectory))
    mine = batch.draws.select(torch.isin(batch.draws.sample, second))
    for name in ("t", "t_next", "key"):
        assert torch.equal(getattr(alone, name), getattr(mine, name))
    again = algorithm.draws(replace(batch, iteration=1))
    assert not torch.allclose(again.t_next, batch.draws.t_next)


@pytest.mark.parametrize("iteration", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_calls_are_those_of_the_formula(iteration, decay):
    """Two probes for each row with r < t, always of the old policy; besides them DiffusionNFT's calls."""
    algorithm, policy = MeanFlowNFT(decay=decay, kl_coef=0.1), ToyPolicy()
    batch = collect(algorithm, policy, iteration)
    moved = iteration > 0 and decay > 0
    policy.old_is_current = not moved
    gradient(algorithm, policy, batch)
    plans = plans_of(algorithm, shifted_times(4, 3.0), iteration, 8, 0)
    found = cost(algorithm, plans, prompts=4, samples_per_prompt=8, guided=False, updates=1, iteration=iteration)
    rows = 32 * 4
    assert (found.rollout, found.train, found.reference) == (32 * 4, rows, rows)
    assert found.old == 2 * rows // 2 + rows * moved
    assert policy.calls == {"current": found.rollout + found.train, "old": found.old, "reference": rows, "teacher": 0}


def test_only_finished_samples_are_stored_and_lone_rows_are_units():
    batch = collect(MeanFlowNFT(**PLAIN), ToyPolicy())
    assert len(batch.trajectory) == 0 and batch.trajectory.visited is None
    assert len(batch.draws.unit.unique()) == len(batch.draws) == 128
    assert {plan.solver for plan in batch.plans} == {"average"}


def test_a_sample_without_a_verdict_leaves():
    algorithm, policy = MeanFlowNFT(**PLAIN), scattered()
    batch = collect(algorithm, policy)
    batch.rewards[3] = float("nan")
    batch.advantages = algorithm.credit(batch)
    assert torch.equal(batch.advantages.isnan(), batch.draws.sample == 3)
    loss, grad = gradient(algorithm, policy, live(batch))
    assert loss.value.isfinite() and grad.isfinite().all() and grad.abs().min() > 0
    assert all(not value.requires_grad and value.isfinite() for value in loss.metrics.values())


@pytest.mark.parametrize("settings", [PLAIN, {"decay": 0.3}, {**PLAIN, "same_time": 0.0}])
def test_it_learns(settings):
    policy, records = train(MeanFlowNFT(**settings), iterations=40, lr=0.025, updates=4)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.4 and last > -0.6 and (policy.bias > 0.5).all()


def test_impossible_values_are_refused_with_a_reason():
    with pytest.raises(ValidationError, match="same_time=0.8 and to_end=0.3 are shares of the same draws"):
        MeanFlowNFT(same_time=0.8, to_end=0.3)
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        plans_of(MeanFlowNFT(), shifted_times(4, 3.0), 0, 1, 0)
    for wrong in ({"beta": 0.0}, {"probe": 0.0}, {"time_shift": 0.0}, {"decay": 1.5}):
        with pytest.raises(ValidationError):
            MeanFlowNFT(**wrong)
