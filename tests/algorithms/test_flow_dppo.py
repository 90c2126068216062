"""Flow-DPPO: the mask against brute force after updates, the anchor, and the method on the toy."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.flow_dppo import FlowDPPO
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

SMALL = {"num_steps": 6, "shift": 3.0, "window": None, "eta": 0.7}


def moved(algorithm, by=0.05, **settings):
    """A batch, and the policy some way from the one that made it."""
    policy = ToyPolicy()
    batch = collect(algorithm, policy, **settings)
    with torch.no_grad():
        policy.bias += by * torch.tensor([1.0, -0.5])
        policy.gain += by
    return policy, batch


def step(policy, batch, eta):
    """torch's Normal, in float64, of Flow-GRPO's published step; at t = 1 the next time stands in for t."""
    edges = batch.trajectory
    t, t_next, x = edges.t.double()[:, None], edges.t_next.double()[:, None], edges.x.double()
    v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)).double()
    h = t - t_next
    g = eta * (t / (1 - torch.where(t == 1, t_next, t))).sqrt()
    return torch.distributions.Normal(x - h * (v + g**2 / (2 * t) * (x + (1 - t) * v)), g * h.sqrt())


def brute_force(algorithm, policy, batch):
    """Loss and the number of masked edges, edge by edge, with the divergence from torch.distributions."""
    old, new = step(ToyPolicy(), batch, algorithm.eta), step(policy, batch, algorithm.eta)
    divergence = torch.distributions.kl_divergence(new, old).mean(1)
    x_next = batch.trajectory.x_next.double()
    ratio = (new.log_prob(x_next) - old.log_prob(x_next)).mean(1).exp()
    parts, masked = [], 0
    for d, r, a in zip(divergence, ratio, batch.advantages.double(), strict=True):
        outwards = (a > 0 and r > 1) or (a < 0 and r < 1)
        masked += int(d >= algorithm.trust and outwards)
        parts.append(0 * r if d >= algorithm.trust and outwards else -a * r)
    return torch.stack(parts).mean(), masked


def test_defaults_are_the_published_recipes():
    record = FlowDPPO().model_dump()
    expected = {"num_steps": 10, "window": 2, "eta": 1.2, "trust": 1e-5, "objective": "dppo", "adv_std": "global"}
    assert {name: record[name] for name in expected} == expected
    assert FlowDPPO().needs.means
    starts = {FlowDPPO().plan(linear_times(10), i, 8, 0).stochastic_steps for i in range(60)}
    assert starts == {(0, 1), (1, 2), (2, 3), (3, 4)}


@pytest.mark.parametrize("trust", [1e-6, 3e-4, 1.0])
def test_mask_loss_and_gradient_are_the_brute_force(trust):
    algorithm = FlowDPPO(trust=trust, **SMALL)
    policy, batch = moved(algorithm)
    loss, grad = gradient(algorithm, policy, batch)
    expected, masked = brute_force(algorithm, policy, batch)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(loss.metrics["clip_frac"]) == pytest.approx(masked / len(batch.trajectory))
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand, rtol=1e-3, atol=1e-6)
    if trust < 1:
        assert 0 < masked < len(batch.trajectory)
    else:
        assert masked == 0


def test_the_mask_binds_after_a_real_update_and_not_before():
    """At the first update every divergence is exactly 0, so no edge is masked however small the region is."""
    algorithm, policy = FlowDPPO(trust=1e-12, **SMALL), ToyPolicy()
    batch = collect(algorithm, policy)
    edges = batch.trajectory
    v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt))
    assert torch.equal(edges.mean, algorithm.kernel(edges.x, v, edges.t, edges.t_next, edges.eta).mean)
    loss, grad = gradient(algorithm, policy, batch)
    assert float(loss.metrics["clip_frac"]) == 0
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6
    with torch.no_grad():
        policy.bias -= 0.01 * grad[:2].sign()
    after, stopped = gradient(algorithm, policy, batch)
    assert 0 < float(after.metrics["clip_frac"]) < 1
    # What is left pulls back: the update along the gradient went outwards.
    assert float(stopped[:2] @ grad[:2]) < 0


def test_shared_noise_has_one_anchor_for_siblings():
    algorithm = FlowDPPO(num_steps=6, window=2, shared_noise=True, trust=1e-12)
    policy, batch = moved(algorithm, by=0.0)
    loss, _ = gradient(algorithm, policy, batch)
    assert float(loss.metrics["clip_frac"]) == 0
    edges = batch.trajectory
    top = edges.step == edges.step.min()
    means = edges.mean[top].view(4, 8, 2)
    assert torch.equal(means, means[:, :1].expand_as(means))


def test_advantages_are_not_cut_in_practice():
    """One sample among n reaches sqrt(n - 1) of the std at most, far below adv_clip."""
    algorithm = FlowDPPO(**SMALL)
    batch = collect(algorithm, ToyPolicy(), num_prompts=1, k=64)
    batch.rewards = torch.zeros(64).double().index_fill(0, torch.tensor([0]), 1.0)
    top = algorithm.credit(batch)[batch.trajectory.leaves[:, 0]]
    torch.testing.assert_close(top, torch.full_like(top, 63**0.5), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, r"window=6 does not fit steps \[0, 5\) of 10"),
        ({"window": None, "window_range": (0, 4)}, "set window"),
        ({"trust": 0.0}, "positive number"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        FlowDPPO(**fields)


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        FlowDPPO().plan(linear_times(10), 0, 1, 0)


@pytest.mark.parametrize("updates", [1, 4])
def test_it_learns(updates):
    algorithm = FlowDPPO(num_steps=6, trust=1e-2)
    _, records = train(algorithm, iterations=40, lr=0.05 / updates, updates=updates)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
