"""Conversions against the definition x = (1-t) x0 + t eps, and as round trips."""

import pytest
import torch

from samplers import (
    denoised,
    flow_state,
    flow_time,
    noise_estimate,
    v_prediction,
    velocity_from_eps,
    velocity_from_v_prediction,
    velocity_from_x0,
    vp_alpha,
    vp_state,
)


@pytest.fixture
def truth():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    s = t[:, None, None]
    return x0, eps, t, (1 - s) * x0 + s * eps


def close(a, b, tol=1e-12):
    return torch.allclose(a, b, atol=tol, rtol=0)


def test_the_true_velocity_gives_back_both_ends(truth):
    x0, eps, t, x = truth
    assert close(denoised(x, eps - x0, t), x0) and close(noise_estimate(x, eps - x0, t), eps)


def test_each_prediction_gives_the_same_velocity(truth):
    x0, eps, t, x = truth
    v = eps - x0
    alpha = vp_alpha(t)[:, None, None]
    v_vp = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
    assert close(velocity_from_x0(x, x0, t), v)
    assert close(velocity_from_eps(x, eps, t), v)
    assert close(velocity_from_v_prediction(x, v_vp, t), v)
    assert close(v_prediction(x, v, t), v_vp)


def test_round_trips(truth):
    _, _, t, x = truth
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert close(velocity_from_x0(x, denoised(x, v, t), t), v)
    assert close(velocity_from_eps(x, noise_estimate(x, v, t), t), v)
    assert close(velocity_from_v_prediction(x, v_prediction(x, v, t), t), v)
    assert close(vp_state(flow_state(x, t), t), x)
    assert close(flow_time(vp_alpha(t)), t)


def test_vp_state_is_the_vp_mixture(truth):
    x0, eps, t, x = truth
    alpha = vp_alpha(t)[:, None, None]
    assert close(vp_state(x, t), alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps)


def test_vp_ends_are_the_flow_ends():
    assert flow_time(torch.tensor([1.0, 0.0])).tolist() == [0, 1]
    assert vp_alpha(torch.tensor([0.0, 1.0])).tolist() == [1, 0]


def test_a_plain_number_works_as_time(truth):
    x0, eps, _, _ = truth
    assert close(denoised(0.75 * x0 + 0.25 * eps, eps - x0, 0.25), x0)
