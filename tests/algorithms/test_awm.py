"""AWM: the loss by hand from float64 errors, its weightings, its first gradient, and what holds a bad sample back."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.awm import AWM, pseudo_logprob
from tests.algorithms.toy import ToyPolicy, asked, collect, gradient, scattered, train

SMALL = {"num_steps": 6, "draws_per_sample": 3, "time_range": (0.0, 1.0), "kl_coef": 0.0}
E, T = torch.tensor([0.0, 0.02, 0.7, 3.0]).double(), torch.tensor([0.5, 0.1, 1.0, 0.8]).double()


def test_defaults_are_the_published_recipe():
    record = AWM().model_dump()
    expected = {
        "num_steps": 14, "draws_per_sample": 6, "weighting": "ghuber", "clip_range": 1.0, "adv_clip": 1.0,
        "kl_coef": 1e-4, "old_coef": 1.0, "time_range": (0.1, 1.0),
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert [AWM().old_decay(i) for i in (0, 150, 300, 900)] == pytest.approx([0, 0.15, 0.3, 0.3])


@pytest.mark.parametrize(
    ("weighting", "by_hand"),
    [
        ("uniform", E),
        ("time", T * E),
        ("time_squared", T * T * E),
        ("huber", T * ((E + 1e-10).sqrt() - 1e-5)),
        ("ghuber", 4 * T * ((E + 1e-10).sqrt().sqrt() - 1e-10**0.25)),
    ],
)
def test_weightings(weighting, by_hand):
    found = pseudo_logprob(E, T, weighting)
    torch.testing.assert_close(found, -by_hand, rtol=1e-10, atol=1e-12)
    assert found[0] == 0, "an exact velocity leaves nothing to explain"


def test_time_squared_is_the_error_of_the_clean_estimate():
    batch = collect(AWM(**SMALL), ToyPolicy())
    at = asked(scattered(), batch)
    t = batch.draws.t.double()
    x0 = batch.trajectory.x0[batch.draws.sample].double()
    x = x0 + t[:, None] * at.target
    error = (x - t[:, None] * at.current - x0).square().mean(1)
    found = pseudo_logprob((at.current - at.target).square().mean(1), t, "time_squared")
    torch.testing.assert_close(found, -error, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip_range", [1e-3, 0.05, (0.1, 0.02), 1.0])
@pytest.mark.parametrize("weighting", ["uniform", "ghuber"])
def test_loss_is_ppo_on_errors_row_by_row(clip_range, weighting):
    algorithm = AWM(**{**SMALL, "kl_coef": 0.3}, clip_range=clip_range, weighting=weighting, old_coef=0.7)
    policy = scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    at = asked(policy, batch)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    parts, outside = [], 0
    for i, (a, t) in enumerate(zip(batch.advantages.tolist(), batch.draws.t.tolist(), strict=True)):
        new, old = (((v[i] - at.target[i]) ** 2).mean() for v in (at.current, at.old))
        if weighting == "uniform":
            ratio = (old - new).exp()
        else:
            ratio = (4 * t * ((old + 1e-10) ** 0.25 - (new + 1e-10) ** 0.25)).exp()
        clipped = min(max(ratio.detach(), 1 - low), 1 + high)
        outside += int(clipped != ratio.detach())
        ppo = -a * ratio if -a * ratio >= -a * clipped else torch.as_tensor(-a * clipped)
        brake, kl = ((at.current[i] - v[i]).square().mean() for v in (at.old, at.initial))
        parts.append(ppo + 0.7 * brake + 0.3 * kl)
    expected = torch.stack(parts).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand.float(), rtol=1e-3, atol=1e-4)
    assert float(loss.metrics["clip_frac"]) == pytest.approx(outside / len(batch.rows))
    assert clip_range == 1.0 or outside > 0


def test_first_gradient_is_advantage_weighted_matching():
    """At rho = 1 neither the clip nor the brake has a gradient: what is left is mean A grad w (v - u)^2."""
    algorithm, policy = AWM(**SMALL, weighting="time", clip_range=1e-6, old_coef=5.0), ToyPolicy()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    at = asked(policy, batch)
    error = (at.current - at.target).square().mean(1)
    expected = torch.autograd.grad((batch.advantages * batch.draws.t * error).mean(), (policy.bias, policy.gain))
    torch.testing.assert_close(grad, torch.cat([g.flatten() for g in expected]).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "held"),
    [({"old_coef": 0.0}, False), ({"old_coef": 5.0}, True), ({"old_coef": 0.0, "clip_range": 0.01}, True)],
)
def test_without_a_brake_bad_samples_are_pushed_far_away(settings, held):
    """Many steps on one batch, all of it bad: only the distance or the clip stops the policy near the old one."""
    algorithm, policy = AWM(**SMALL, weighting="uniform", **settings), ToyPolicy()
    batch = collect(algorithm, policy)
    batch.advantages = torch.full_like(batch.advantages, -1.0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = algorithm.loss(policy, batch)
        loss.value.backward()
        optimizer.step()
    moved = float(loss.metrics["old_distance"])
    assert moved < 0.1 if held else moved > 1.0


def test_several_updates_are_clipped():
    _, records = train(AWM(**SMALL, clip_range=0.05), iterations=5, lr=0.02, updates=4)
    assert all(0 < record["clip_frac"] < 1 for record in records)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_range": 0.0}, "clips every ratio or none"),
        ({"weighting": "t"}, "'uniform', 'time'"),
        ({"draws_per_sample": 15}, "different times of a grid of num_steps=14 do not exist"),
        ({"time_range": (0.9, 0.1)}, "must be rising"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(given, message):
    with pytest.raises(ValidationError, match=message):
        AWM(**given)
