"""Grids against their printed values and their defining formulas."""

import math

import pytest
import torch

from samplers import (
    dynamic_shift,
    dynamic_times,
    flow_time,
    linear_times,
    scheduler_times,
    shifted_times,
    trailing_vp_times,
    vp_alpha,
)

SD3 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]


def sd15_alphas() -> torch.Tensor:
    """Stable Diffusion 1.5's table of cumulative alphas ("scaled linear")."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


@pytest.mark.parametrize(
    "times",
    [
        linear_times(7),
        shifted_times(7, 3.0),
        scheduler_times(7),
        dynamic_times(7, mu=1.15),
        dynamic_times(7, mu=0.6, terminal=0.02),
        trailing_vp_times(7, sd15_alphas()),
    ],
)
def test_every_grid_is_fp32_and_falls_to_zero(times):
    assert times.dtype == torch.float32 and times.shape == (8,)
    assert (times.diff() < 0).all() and times[-1] == 0 and times[0] <= 1


def test_shifted_grid_of_sixteen_steps():
    times = shifted_times(16, 3.0)
    expected = [3 * u / (1 + 2 * u) for u in (1 - i / 16 for i in range(17))]
    assert torch.allclose(times, torch.tensor(expected), atol=1e-7)
    assert times[1] == pytest.approx(0.978, abs=5e-4) and times[-3:].tolist() == pytest.approx([0.3, 1 / 6, 0])


def test_shift_one_is_linear():
    assert torch.equal(shifted_times(5), linear_times(5))
    assert linear_times(5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_scheduler_grid_has_the_printed_sd3_times():
    assert scheduler_times(10, 3.0).tolist() == pytest.approx(SD3, abs=5e-5)


def test_dynamic_shift_runs_through_both_anchors():
    assert dynamic_shift(256) == pytest.approx(0.5) and dynamic_shift(4096) == pytest.approx(1.15)
    assert dynamic_shift(2176) == pytest.approx((0.5 + 1.15) / 2)


def test_dynamic_times_is_the_exponential_time_shift():
    mu, u = 0.8, torch.linspace(1, 0, 11)[:-1]
    expected = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    assert torch.allclose(dynamic_times(10, mu)[:-1], expected, atol=1e-6)


def test_terminal_stretches_the_last_time():
    times = dynamic_times(8, mu=0.7, terminal=0.02)
    assert times[-2] == pytest.approx(0.02, abs=1e-6) and times[0] == 1


def test_trailing_grid_takes_the_last_training_step_first():
    alphas = sd15_alphas()
    times = trailing_vp_times(50, alphas)
    assert torch.allclose(vp_alpha(times[:-1].double()), alphas[torch.arange(999, 0, -20)], atol=1e-6)
    assert times[0] == pytest.approx(float(flow_time(alphas[-1]))) and times[0] == pytest.approx(0.936, abs=1e-3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: linear_times(0), "num_steps must be at least 1"),
        (lambda: shifted_times(4, 0.0), "shift must be positive"),
        (lambda: trailing_vp_times(2000, sd15_alphas()), "ask for at most 1000"),
    ],
)
def test_bad_requests_say_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=words):
        make()
