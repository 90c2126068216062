"""Flash-GRPO: who gets which step, how much noise it takes, and gradients of one scale at all of them."""

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from flowrl.algorithms.flash_grpo import FlashGRPO
from flowrl.algorithms.policy_gradient import sensitivity, std_of
from flowrl.update import deal
from samplers import gaussian_logprob, linear_times, shifted_times, wan_sde
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

SDES = {"wan_sde": 1.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.6, "ddim": 0.8}
POOL = (0, 1, 2, 3)
SMALL = FlashGRPO(num_steps=8, steps=POOL)


def step_of_group(batch):
    """The step of each group; every member has it, once."""
    found = {}
    for leaf, group in enumerate(batch.trajectory.group.tolist()):
        (step,) = batch.trajectory.step[batch.trajectory.leaves[:, leaf]].tolist()
        assert found.setdefault(group, step) == step
    return list(found.values())


def test_defaults_are_the_published_ones():
    record = FlashGRPO().model_dump()
    expected = {
        "num_steps": 20, "shift": 3.0, "sde": "wan_sde", "eta": 1.0, "clip_range": 1e-3, "adv_clip": 5.0,
        "adv_std": "global", "kl_coef": 0.0, "objective": "clip",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected


def test_sensitivity_gives_the_published_factors():
    """The grid is UniPC's: 21 even times from 0.999 to 0, then shifted by 3; the factors are not normalised."""
    u = torch.linspace(0.999, 0, 21, dtype=torch.float64)
    t = 3 * u / (1 + 2 * u)
    assert (1000 * t[:10]).int().tolist() == [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
    found = 1 / sensitivity(wan_sde, t[:-1], t[1:], t[1].expand(20))
    published = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    assert found[:10].tolist() == pytest.approx(published, abs=5e-5)


def test_the_pool_is_the_first_half_and_each_plan_has_one_step_of_it():
    grid = shifted_times(20, 3.0).tolist()
    plans = FlashGRPO().plan(linear_times(20), 0, 8, 0)
    assert [plan.stochastic_steps for plan in plans] == [(k,) for k in range(10)]
    for k, plan in enumerate(plans):
        assert plan.times == tuple(grid)
        assert plan.fanout == tuple(8 if step == k else 1 for step in range(20))
        assert plan.noise == tuple(grid[1] if step == k else 1.0 for step in range(20))
    assert all(set(plan.noise) == {1.0} for plan in FlashGRPO(sde="flow_sde").plan(linear_times(20), 0, 8, 0))


def test_the_prefix_is_walked_once_and_all_members_leave_one_state():
    policy = ToyPolicy()
    batch = collect(SMALL, policy, num_prompts=4, k=6)
    edges = batch.trajectory
    assert len(edges) == 4 * 6
    assert policy.calls["current"] == edges.calls == sum(k + 1 + 6 * (7 - k) for k in POOL)
    for group in range(4):
        own = edges.prompt == group
        assert len(edges.x[own].unique(dim=0)) == len(edges.state[own].unique()) == 1
        assert len(edges.x_next[own].unique(dim=0)) == 6


@pytest.mark.parametrize("num_prompts", [3, 4, 8, 10])
def test_an_iteration_covers_the_pool_evenly_and_a_prompt_meets_all_of_it(num_prompts):
    met = [step_of_group(collect(SMALL, ToyPolicy(), i, num_prompts, 2)) for i in range(len(POOL))]
    for steps in met:
        counts = Counter(steps)
        assert max(counts.values()) - min(counts[step] for step in POOL) <= 1
    for prompt in zip(*met, strict=True):
        assert sorted(prompt) == list(POOL)


def test_every_optimiser_step_sees_the_whole_pool():
    batch = collect(SMALL, ToyPolicy(), num_prompts=8, k=3)
    update_of = deal(batch, range(8), 8, 3, 2, 123)
    for update in range(2):
        assert Counter(batch.trajectory.step[update_of == update].tolist()) == dict.fromkeys(POOL, 3)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_the_noise_is_the_papers(eta):
    """g = eta (s_min + (s_max - s_min) t) with s_max = times[1], s_min = 0, in log-probs of torch.distributions."""
    algorithm, policy = FlashGRPO(num_steps=8, steps=POOL, eta=eta), ToyPolicy()
    batch = collect(algorithm, policy, num_prompts=4, k=3)
    edges, s_max = batch.trajectory, batch.plans[0].times[1]
    t, h = edges.t[:, None], (edges.t - edges.t_next)[:, None]
    g = eta * (0 + (s_max - 0) * t)
    with torch.no_grad():
        v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt))
    mean = edges.x - h * (v + g**2 / (2 * t) * (edges.x + (1 - t) * v))
    torch.testing.assert_close(std_of(wan_sde, edges.t, edges.t_next, edges.eta), (g * h.sqrt()).flatten())
    expected = Normal(mean, g * h.sqrt()).log_prob(edges.x_next).mean(1)
    torch.testing.assert_close(edges.logprob, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_prompts", [4, 6])
def test_the_weight_is_the_papers_over_its_mean_over_the_pool(num_prompts):
    """Whatever the minibatch, and however unevenly the prompts cover the pool."""
    batch = collect(SMALL, ToyPolicy(), num_prompts=num_prompts, k=2)
    times = shifted_times(8, 3.0).double().tolist()
    factor = []
    for k in POOL:
        t, h, g = times[k], times[k] - times[k + 1], times[1] * times[k]
        factor.append(1 / (math.sqrt(h) / g + g * math.sqrt(h) * (1 - t) / (2 * t)))
    expected = torch.tensor(factor) / (sum(factor) / len(POOL))
    found = SMALL.weight(batch)
    torch.testing.assert_close(found, expected[batch.trajectory.step], rtol=1e-4, atol=0)
    part = batch.select(torch.tensor([0, 3, 5]))
    assert torch.equal(SMALL.weight(part), found[[0, 3, 5]])


@pytest.mark.parametrize("sde", SDES)
def test_weighted_gradients_have_one_scale_at_all_steps(sde):
    """Brute force: the norm of autograd's d logprob / d velocity, for one and the same noise at every step."""
    algorithm = FlashGRPO(num_steps=8, steps=tuple(range(7)), sde=sde, eta=SDES[sde])
    batch = collect(algorithm, ToyPolicy(), num_prompts=7, k=2)
    edges = batch.trajectory
    z = torch.randn(5, generator=torch.Generator().manual_seed(0)).expand(len(edges), 5)
    x, v = torch.randn(2, len(edges), 5, generator=torch.Generator().manual_seed(1))
    v.requires_grad_()
    step = algorithm.kernel(x, v, edges.t, edges.t_next, edges.eta)
    x_next = (step.mean + step.std * z).detach()
    (grad,) = torch.autograd.grad(gaussian_logprob(x_next, step).sum(), v)
    norm = grad.norm(dim=1)
    weighted = norm * algorithm.weight(batch)
    assert norm.max() / norm.min() > 1.2
    torch.testing.assert_close(weighted, weighted[:1].expand_as(weighted), rtol=1e-3, atol=0)


def test_the_loss_is_weighted():
    """At the first update the loss is -mean(A weight)."""
    policy = ToyPolicy()
    batch = collect(SMALL, policy, num_prompts=6)
    loss, _ = gradient(SMALL, policy, batch)
    expected = -(batch.advantages * SMALL.weight(batch)).mean()
    plain = -batch.advantages.mean()
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(expected - plain) < 1e-6 < (batch.advantages * (SMALL.weight(batch) - 1)).abs().max()


def test_it_learns():
    policy, records = train(FlashGRPO(num_steps=6), iterations=40, lr=0.05, num_prompts=6)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5 and last > -0.8
    assert (policy.bias > 0.5).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": (0, 19)}, r"steps=\[0, 19\] must name different steps from 0 to 18.*num_steps=20 the last"),
        ({"steps": (3, 3)}, "different steps"),
        ({"steps": ()}, "at least one"),
        ({"steps": (-1,)}, "from 0 to 18"),
        ({"sde": "cps", "eta": 1.5}, r"eta in \(0, 1\]"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        FlashGRPO(**fields)
