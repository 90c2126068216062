"""GRPO-Guard: the normalised ratio against its closed form, the weights of the steps, and the method on the toy."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.grpo_guard import GRPOGuard
from flowrl.algorithms.objectives import objective
from flowrl.algorithms.policy_gradient import current_step, edges_seen
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

WIDE = {"num_steps": 6, "shift": 3.0, "clip_range": 0.9}


def moved(algorithm, by=0.05, **settings):
    """A batch, and the policy some way from the one that made it."""
    policy = ToyPolicy()
    batch = collect(algorithm, policy, **settings)
    with torch.no_grad():
        policy.bias += by * torch.tensor([1.0, -0.5])
        policy.gain += by
    return policy, batch


def exact_step(policy, batch, eta):
    """Mean in float64 of Flow-GRPO's published step, and its std; at t = 1 the next time stands in for t."""
    edges = batch.trajectory
    t, t_next, x = edges.t.double()[:, None], edges.t_next.double()[:, None], edges.x.double()
    v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)).double()
    h = t - t_next
    g = eta * (t / (1 - torch.where(t == 1, t_next, t))).sqrt()
    return x - h * (v + g**2 / (2 * t) * (x + (1 - t) * v)), g * h.sqrt()


def test_defaults_are_the_published_recipes():
    record = GRPOGuard().model_dump()
    expected = {"num_steps": 10, "clip_range": 2e-6, "objective": "guard", "adv_std": "global", "kl_coef": 0.0}
    assert {name: record[name] for name in expected} == expected
    assert GRPOGuard().needs.means


@pytest.mark.parametrize("eta", [0.3, 1.2])
def test_the_exponent_is_the_mean_of_the_shift_times_the_noise(eta):
    algorithm = GRPOGuard(eta=eta, **WIDE)
    policy, batch = moved(algorithm)
    old, std = exact_step(ToyPolicy(), batch, eta)
    new, _ = exact_step(policy, batch, eta)
    noise = (batch.trajectory.x_next.double() - old) / std
    expected = ((new - old) * noise).mean(1).detach()
    seen = edges_seen(batch, current_step(policy, batch, algorithm.kernel))
    # With A = -1 and nothing clipped the loss is the ratio itself.
    seen = seen._replace(advantages=-torch.ones(len(batch.trajectory)))
    loss, _ = objective("guard", seen, algorithm._limits)
    torch.testing.assert_close(loss.log().double(), expected, rtol=1e-3, atol=2e-6)
    assert expected.abs().max() > 1e-2


def test_the_plain_ratio_lies_below_one_on_average_and_the_normalised_does_not():
    algorithm = GRPOGuard(eta=0.02, **WIDE)
    policy, batch = moved(algorithm, by=0.1, num_prompts=32)
    seen = edges_seen(batch, current_step(policy, batch, algorithm.kernel))
    plain = seen.log_ratio.detach()
    guarded = (plain + seen.divergence.detach()) * seen.std
    assert plain.mean() < -0.1 * plain.std()
    assert guarded.mean().abs() < 4 * guarded.std() / len(guarded) ** 0.5
    torch.testing.assert_close(plain.mean(), -seen.divergence.mean().detach(), rtol=0.5, atol=0)


def test_each_edge_is_normalised_by_its_own_step():
    """Steps of different noise in one call give what each gives alone (a mean over the call would not)."""
    algorithm = GRPOGuard(**WIDE)
    policy, batch = moved(algorithm)
    edges = edges_seen(batch, current_step(policy, batch, algorithm.kernel))
    assert len(edges.std.unique()) == 5
    whole, _ = objective("guard", edges, algorithm._limits)
    for edge in (0, 40, 150):
        alone = type(edges)(*(None if value is None else value[edge : edge + 1] for value in edges))
        torch.testing.assert_close(objective("guard", alone, algorithm._limits)[0], whole[edge : edge + 1])


def test_the_weight_is_one_over_steps_times_length():
    algorithm = GRPOGuard(num_steps=6, shift=3.0)
    batch = collect(algorithm, ToyPolicy())
    times = batch.plans[0].times
    expected = torch.tensor([1 / (6 * (times[k] - times[k + 1])) for k in batch.trajectory.step.tolist()])
    torch.testing.assert_close(algorithm.weight(batch), expected)
    even = GRPOGuard(num_steps=6, shift=1.0)
    torch.testing.assert_close(even.weight(collect(even, ToyPolicy())), torch.ones(len(expected)))


def test_the_loss_is_the_weighted_mean():
    algorithm = GRPOGuard(**WIDE)
    policy, batch = moved(algorithm)
    loss, _ = gradient(algorithm, policy, batch)
    seen = edges_seen(batch, current_step(policy, batch, algorithm.kernel))
    parts, _ = objective("guard", seen, algorithm._limits)
    times = batch.plans[0].times
    by_hand = [
        part / (6 * (times[k] - times[k + 1]))
        for part, k in zip(parts.tolist(), batch.trajectory.step.tolist(), strict=True)
    ]
    assert float(loss.value.detach()) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-7)


class Watched(ToyPolicy):
    """Keeps the velocity that a loss asked for, so that its gradient can be read."""

    def velocity(self, x, t, cond):
        self.seen = super().velocity(x, t, cond).detach().requires_grad_()
        return self.seen


def test_all_steps_pull_alike():
    """The gradient in the velocity is A eps (1 + eta^2 / 2) / (T D E), whatever t and dt; at t = 1 A eps / (T D E)."""
    algorithm = GRPOGuard(num_steps=6, shift=3.0, eta=0.7)
    batch = collect(algorithm, ToyPolicy())
    policy = Watched()
    algorithm.loss(policy, batch).value.backward()
    mean, std = exact_step(ToyPolicy(), batch, 0.7)
    eps = (batch.trajectory.x_next.double() - mean) / std
    first = (batch.trajectory.t == 1)[:, None]
    factor = torch.where(first, 1.0, 1 + 0.7**2 / 2) / (6 * 2 * len(batch.trajectory))
    expected = (batch.advantages.double()[:, None] * eps * factor).detach()
    torch.testing.assert_close(policy.seen.grad.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("eta", [1e-2, 1e-4, 1e-6])
def test_almost_no_noise_gives_finite_numbers(eta):
    algorithm = GRPOGuard(num_steps=6, shift=3.0, eta=eta)
    policy, batch = moved(algorithm)
    loss, grad = gradient(algorithm, policy, batch)
    assert loss.value.isfinite() and grad.isfinite().all()
    assert all(value.isfinite() for value in loss.metrics.values())
    assert float(loss.metrics["clamp_frac"]) == 0


def test_the_first_update_is_on_policy():
    algorithm = GRPOGuard(num_steps=6, window=2, shared_noise=True)
    loss, _ = gradient(algorithm, policy := ToyPolicy(), collect(algorithm, policy))
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6
    assert float(loss.metrics["clip_frac"]) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, r"window=6 does not fit steps \[0, 5\) of 10.*smaller"),
        ({"window_range": (0, 4)}, "set window"),
        ({"clip_range": 0.0}, "clips every ratio"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        GRPOGuard(**fields)


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        GRPOGuard().plan(linear_times(10), 0, 1, 0)


@pytest.mark.parametrize("changes", [{}, {"window": 2, "shared_noise": True}], ids=["all", "window"])
def test_it_learns(changes):
    algorithm = GRPOGuard(num_steps=6, **changes)
    _, records = train(algorithm, iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
