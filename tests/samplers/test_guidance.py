"""Reward guidance reaches the tilted distribution where that is known, and touches nothing it should not."""

import pytest
import torch

from samplers import deterministic, flow_sde, linear_times, noise_source, reward_guided, rollout, rows
from samplers import window as window_plan
from tests.samplers.toys import ToyNet, gaussian_velocity

pytestmark = pytest.mark.slow

MEAN, STD = 2.0, 0.5
STEPS = 1000


def exact(x, t, prompt):
    """The denoiser of N(MEAN, STD^2)."""
    return gaussian_velocity(x, t, MEAN, STD)


def posterior(x, t):
    """Mean [N, D] and variance [N, 1] of x0 given x_t = x, by the rule for two Gaussians."""
    t = rows(t, x)
    variance = ((1 - t) * STD) ** 2 + t**2
    return MEAN + (1 - t) * STD**2 / variance * (x - (1 - t) * MEAN), STD**2 * t**2 / variance


def linear(slope, weight):
    """log E[exp(w b x0) | x_t] / w = b m + w b^2 V / 2, with the posterior N(m, V)."""

    def guide(x, t, prompt):
        mean, variance = posterior(x, t)
        return (slope * mean + weight * slope**2 * variance / 2).sum(1)

    return guide


def quadratic(target, width, weight):
    """log E[exp(-w (x0 - a)^2 / 2c) | x_t] / w = -(m - a)^2 / 2 (c + w V) + a function of t."""

    def guide(x, t, prompt):
        mean, variance = posterior(x, t)
        return -((mean - target) ** 2 / (2 * (width + weight * variance))).sum(1)

    return guide


def spread():
    """Quantiles of the standard normal distribution, [2000, 1]: their images have no sampling error."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(2000) + 0.5) / 2000)[:, None]


def walk(velocity, x=None, steps=STEPS, **options):
    x = spread() if x is None else x
    roots = torch.arange(len(x))
    return rollout(velocity, x, deterministic(linear_times(steps)), prompt=roots % 3, group=roots, **options)


def moments(velocity):
    x0 = walk(velocity).x0.double()
    return x0.mean().item(), x0.var().item()


LINEAR = (MEAN + 1.5 * 0.8 * STD**2, STD**2)
"""exp(1.5 * 0.8 x0) moves the mean by w b s^2 and leaves the variance."""
PRECISION = 1 / STD**2 + 1.5 / 0.3
QUADRATIC = ((MEAN / STD**2 + 1.5 * 1.0 / 0.3) / PRECISION, 1 / PRECISION)
"""A product of two Gaussians: precisions add, means by precision."""


@pytest.mark.parametrize(
    ("guide", "expected"), [(linear(0.8, 1.5), LINEAR), (quadratic(1.0, 0.3, 1.5), QUADRATIC)], ids=["lin", "quad"]
)
def test_the_guided_ode_reaches_the_tilted_gaussian(guide, expected):
    """Mean and variance; the ODE's own error at these steps is seen on the model without a guide."""
    assert moments(exact) == pytest.approx((MEAN, STD**2), rel=1e-2)
    found = moments(reward_guided(exact, [(guide, 1.5)], max_factor=1e6))
    assert found == pytest.approx(expected, rel=1e-2)
    assert moments(reward_guided(exact, [(guide, -1.5)], max_factor=1e6)) != pytest.approx(expected, rel=0.05)


def test_the_velocity_is_that_of_the_tilted_data():
    """Pointwise, against the exact velocity of N(m', s'^2), without any integration."""
    t = torch.linspace(0.05, 0.95, 2000)
    for guide, (mean, variance) in ((linear(0.8, 1.5), LINEAR), (quadratic(1.0, 0.3, 1.5), QUADRATIC)):
        found = reward_guided(exact, [(guide, 1.5)], max_factor=1e6)(spread(), t, torch.zeros(2000, dtype=torch.long))
        torch.testing.assert_close(found, gaussian_velocity(spread(), t, mean, variance**0.5), rtol=1e-3, atol=1e-4)


def test_two_guides_add():
    pair = [(linear(0.8, 1.5), 1.5), (linear(-0.5, 0.7), 0.7)]
    mean, variance = moments(reward_guided(exact, pair, max_factor=1e6))
    assert mean == pytest.approx(MEAN + (1.5 * 0.8 - 0.7 * 0.5) * STD**2, rel=1e-2)
    assert variance == pytest.approx(STD**2, rel=1e-2)


# ------------------------------------------------------------------------------------------------ what stays as it was

NET = ToyNet((2, 3))
STATES = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
PROMPTS = torch.tensor([0, 1, 2, 0, 1, 2])


def bright(x, t, prompt):
    return x.square().flatten(1).sum(1) * (1 + prompt)


def flat(x, t, prompt):
    return 0 * x.flatten(1).sum(1)


def test_weight_zero_leaves_every_bit_and_asks_nothing():
    def forbidden(x, t, prompt):
        raise AssertionError("a guide of weight 0 was asked")

    guided = reward_guided(NET, [(forbidden, 0.0)])
    assert torch.equal(walk(guided, STATES, 5).x0, walk(NET, STATES, 5).x0)
    one, both = reward_guided(NET, [(bright, 0.1)]), reward_guided(NET, [(forbidden, 0.0), (bright, 0.1)])
    assert torch.equal(one(STATES, TIMES, PROMPTS), both(STATES, TIMES, PROMPTS))


def test_the_correction_is_the_formula_cut_at_max_factor():
    found = NET(STATES, TIMES, PROMPTS) - reward_guided(NET, [(bright, 0.1)], max_factor=4.0)(STATES, TIMES, PROMPTS)
    factor = torch.tensor([0.0, 0.25, 1.0, 4.0, 4.0, 4.0])  # 0.95 / 0.05 = 19 and infinity are cut
    expected = factor[:, None, None] * 0.1 * 2 * STATES * (1 + PROMPTS)[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_outside_of_the_range_of_times_nothing_happens():
    v, guided = (f(STATES, TIMES, PROMPTS) for f in (NET, reward_guided(NET, [(bright, 0.1)], t_range=(0.2, 0.8))))
    changed = (v != guided).flatten(1).any(1)
    assert changed.tolist() == [False, True, True, True, False, False]
    assert torch.equal(v[~changed], guided[~changed])


def test_the_correction_s_norm_is_capped_for_each_sample():
    v = NET(STATES, TIMES, PROMPTS)
    free, capped = (v - reward_guided(NET, [(bright, 0.3)], max_ratio=r)(STATES, TIMES, PROMPTS) for r in (None, 0.5))
    norms, size = capped.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1)
    long = free.flatten(1).norm(dim=1) > 0.5 * size
    assert 0 < long.sum() < len(long)
    torch.testing.assert_close(norms[long], 0.5 * size[long], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capped[~long], free[~long], rtol=1e-4, atol=1e-5)
    aligned = torch.cosine_similarity(capped.flatten(1), free.flatten(1))[1:]  # the first is 0: t = 0
    torch.testing.assert_close(aligned, torch.ones(5), rtol=1e-4, atol=1e-4)
    assert torch.equal(reward_guided(NET, [(flat, 1.0)], max_ratio=0.5)(STATES, TIMES, PROMPTS), v)


def test_the_denoiser_is_called_as_often_and_no_graph_is_left():
    calls = []

    def counted(x, t, prompt):
        calls.append(len(x))
        return NET(x, t, prompt)

    weight = torch.nn.Parameter(torch.tensor(0.1))
    guided = reward_guided(counted, [(lambda x, t, p: weight * bright(x, t, p), 1.0)], t_range=(0.0, 0.9))
    noise = noise_source((2, 3), seed=0, iteration=0, prompt=torch.arange(6))
    plan = window_plan(linear_times(5), 1, 2)
    done = rollout(
        guided, STATES, plan, flow_sde, eta=0.5, prompt=PROMPTS, group=torch.arange(6), noise=noise, micro_batch=4
    )
    assert done.calls == 6 * 5 == sum(calls)
    assert not done.x0.requires_grad and weight.grad is None
    assert (done.x0 - walk(NET, STATES, 5).x0).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "limits",
    [{"t_range": (0.5, 0.2)}, {"t_range": (0, 1.5)}, {"max_factor": 0}, {"max_factor": float("inf")}, {"max_ratio": 0}],
)
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        reward_guided(NET, [(bright, 1.0)], **limits)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda x, t, p: bright(x, t, p).sum(), "one number each"),
        (lambda x, t, p: bright(x.detach(), t, p), "does not depend on x"),
        (lambda x, t, p: torch.ones(len(x), requires_grad=True) * 2, "does not depend on x"),
        (lambda x, t, p: x.flatten(1).norm(dim=1).log() * torch.nan, "not finite"),
    ],
)
def test_guides_that_cannot_guide_are_refused(guide, message):
    with pytest.raises(ValueError, match=message):
        reward_guided(NET, [(guide, 1.0)])(STATES, TIMES, PROMPTS)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        reward_guided(NET, [(bright, float("nan"))])
