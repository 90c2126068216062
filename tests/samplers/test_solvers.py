"""ODE solvers against the exact flow of a Gaussian, and DPM-Solver++ against its textbook formula."""

import math

import pytest
import torch

from samplers import denoised, deterministic, dpmpp_2m, euler, heun, linear_times, rollout, shifted_times
from tests.samplers.toys import gaussian_velocity


def solve(solver, num_steps, x):
    index = torch.zeros(len(x), dtype=torch.long)
    plan = deterministic(shifted_times(num_steps, 1.0), solver)
    result = rollout(lambda x, t, prompt: gaussian_velocity(x, t), x, plan, prompt=index, group=index)
    assert result.calls == plan.calls(len(x))
    return result.x0


@pytest.mark.parametrize("solver, order, error", [("euler", 0.9, 0.02), ("heun", 1.7, 5e-4), ("dpmpp_2m", 1.3, 2e-3)])
def test_order_of_convergence_to_the_exact_flow(solver, order, error):
    """The flow maps quantile to quantile: x at t = 1 is N(0, 1), so x0 = 2 + x / 2."""
    x = torch.linspace(-2, 2, 9)[:, None]
    errors = [(solve(solver, n, x) - (2 + x / 2)).abs().max().item() for n in (20, 80)]
    assert math.log(errors[0] / errors[1], 4) > order and errors[1] < error


def test_heun_averages_the_slopes_at_both_ends():
    """dx/dt = x from t = 1 to 0.5: Euler goes to .5, the mean slope is (1 + .5)/2, so Heun goes to 1 - .5 * .75."""
    one, half = torch.ones(1), torch.full((1,), 0.5)
    assert heun(torch.ones(1, 1), torch.ones(1, 1), one, half, lambda x: x).item() == pytest.approx(0.625)


def test_heun_asks_twice_except_at_the_end():
    plan = deterministic(linear_times(5), "heun")
    assert plan.calls(3) == 3 * (2 * 4 + 1)
    asked = []

    def velocity(x, t, prompt):
        asked.append(float(t[0]))
        return x

    index = torch.zeros(3, dtype=torch.long)
    assert rollout(velocity, torch.ones(3, 2), plan, prompt=index, group=index).calls == plan.calls(3)
    assert min(asked) > 0


def textbook(x, x0, x0_before, t, t_next, t_before):
    """DPM-Solver++(2M) with alpha = 1-t, sigma = t, lambda = log(alpha/sigma), as printed in the paper."""
    lam = [math.log((1 - s) / s) for s in (t_before, t, t_next)]
    h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    return t_next / t * x - (1 - t_next) * (math.exp(-h) - 1) * d


def test_dpmpp_2m_is_the_textbook_step():
    x, v, x0_before = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t_before, t, t_next = 0.9, 0.7, 0.4
    got = dpmpp_2m(x, v, *(torch.tensor([s]).double() for s in (t, t_next)), (x0_before, torch.tensor([t_before])))
    assert torch.allclose(got, textbook(x, x - t * v, x0_before, t, t_next, t_before), atol=1e-6)


def test_dpmpp_2m_is_first_order_without_history_after_noise_and_at_the_end():
    x, v, before = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.6)
    first = euler(x, v, t, t / 2)  # in x0-prediction the first-order step is Euler's
    assert torch.allclose(dpmpp_2m(x, v, t, t / 2, None), first, atol=1e-6)
    assert torch.allclose(dpmpp_2m(x, v, t, t / 2, (before, torch.ones(2))), first, atol=1e-6)
    assert torch.allclose(dpmpp_2m(x, v, t, t * 0, (before, t + 0.1)), denoised(x, v, t), atol=1e-6)
