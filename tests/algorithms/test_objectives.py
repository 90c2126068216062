"""The clipped objective against its cases, and its gradient against the closed form."""

import math

import pytest
import torch

from flowrl.algorithms.objectives import clipped


def by_cases(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))


@pytest.mark.parametrize("clip_range", [1e-4, 0.2, (0.1, 0.3)])
def test_equals_the_cases(clip_range):
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.3 * torch.randn(200, generator=generator, dtype=torch.float64)
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    loss, metrics = clipped(log_ratio, advantages, clip_range)
    expected = [by_cases(r, a, low, high) for r, a in zip(log_ratio.tolist(), advantages.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    ratio = log_ratio.exp()
    assert float(metrics["clip_frac"]) == pytest.approx(float(((ratio < 1 - low) | (ratio > 1 + high)).double().mean()))
    assert float(metrics["ratio_max_dev"]) == pytest.approx(float((ratio - 1).abs().max()))
    assert float(metrics["approx_kl"]) == pytest.approx(float((log_ratio**2).mean() / 2))


def test_gradient_at_ratio_one_is_minus_the_advantage():
    log_ratio = torch.zeros(3, requires_grad=True)
    clipped(log_ratio, torch.tensor([2.0, -0.5, 0.0]), 1e-4)[0].sum().backward()
    assert log_ratio.grad.tolist() == [-2.0, 0.5, 0.0]


def test_gradient_stops_only_on_the_good_side():
    """-A r where the ratio has moved against the advantage or not left the range, else 0."""
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    clipped(log_ratio, advantages, 0.1)[0].sum().backward()
    ratio = log_ratio.detach().exp()
    assert torch.equal(log_ratio.grad, -advantages * ratio * torch.tensor([0.0, 1, 1, 0, 1]))


@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), -float("inf")])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_huge_log_ratios_stay_finite_and_are_counted(value, advantage):
    """N2."""
    log_ratio = torch.tensor([value, 0.0], requires_grad=True)
    loss, metrics = clipped(log_ratio, torch.tensor([advantage, 1.0]), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_ratio.grad.isfinite().all()
    assert log_ratio.grad[0] == 0
    assert metrics["clamp_frac"] == 0.5


def test_advantages_of_another_precision_are_taken():
    loss, _ = clipped(torch.zeros(2), torch.tensor([1.0, -1.0], dtype=torch.float64), 0.2)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [-1, 1]
