"""Kernels against the papers' own formulas, exact Gaussian marginals and their limits."""

import math

import pytest
import torch

from samplers import (
    all_steps,
    cps,
    dance_sde,
    ddim,
    denoised,
    deterministic,
    diffusion,
    dynamic_times,
    euler,
    flow_sde,
    linear_times,
    noise_estimate,
    rows,
    scheduler_times,
    shifted_times,
    subset,
    vp_alpha,
    vp_state,
    wan_sde,
)
from tests.samplers.toys import gaussian_velocity

KERNELS = [flow_sde, dance_sde, wan_sde, cps, ddim]


def state(num=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, num, 3, 4, generator=generator, dtype=dtype)
    t = torch.linspace(0.95, 0.2, num, dtype=dtype)
    return x, v, t, t - torch.linspace(0.02, 0.15, num, dtype=dtype)


def terminal(plan, kernel, eta, mean=2.0, std=0.5):
    """Exact (mean, std) at t = 0 for data N(mean, std^2): the velocity is linear, so a step is x -> a x + b + noise."""
    probe, times = torch.tensor([[0.0], [1.0]], dtype=torch.float64), plan.grid().double()
    m, var = 0.0, 1.0
    for step in range(plan.num_steps):
        t, t_next = times[step].expand(2), times[step + 1].expand(2)
        v = gaussian_velocity(probe, t, mean, std)
        if plan.stochastic[step]:
            y, noise = kernel(probe, v, t, t_next, eta)
        else:
            y, noise = euler(probe, v, t, t_next), torch.zeros(2, 1)
        b, a = float(y[0]), float(y[1] - y[0])
        m, var = a * m + b, a * a * var + float(noise[0]) ** 2
    return m, math.sqrt(var)


# Printed values came from sampling, hence the tolerance; every step is stochastic in them, the last one too.
@pytest.mark.parametrize(
    "num_steps, ode, flow, dance, cps_",
    [(10, 0.371, 0.424, 0.384, 0.314), (40, 0.464, 0.479, 0.469, 0.371), (200, 0.493, 0.496, 0.493, 0.395)],
)
def test_terminal_std_of_the_gaussian_toy(num_steps, ode, flow, dance, cps_):
    times = shifted_times(num_steps, 3.0)
    rows_ = [(flow_sde, 0.7, flow), (dance_sde, 0.3, dance), (cps, 0.8, cps_)]
    for kernel, eta, expected in rows_:
        mean, std = terminal(subset(times, range(num_steps)), kernel, eta)
        assert std == pytest.approx(expected, abs=2e-3) and mean == pytest.approx(2, abs=1e-4)
    assert terminal(deterministic(times), None, 0)[1] == pytest.approx(ode, abs=2e-3)


@pytest.mark.parametrize("kernel, eta", [(flow_sde, 0.7), (dance_sde, 0.5), (wan_sde, 1.0), (ddim, 0.8), (ddim, 1.0)])
def test_marginals_converge_to_the_data(kernel, eta):
    errors = [abs(terminal(all_steps(shifted_times(n, 3.0)), kernel, eta)[1] - 0.5) for n in (100, 1000)]
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 4


def test_cps_stays_too_narrow_however_many_steps():
    assert terminal(all_steps(shifted_times(2000, 3.0)), cps, 0.8)[1] == pytest.approx(0.402, abs=2e-3)


def test_flow_sde_is_the_equation_of_the_paper():
    x, v, t, t_next = state()
    s, dt = t[:, None, None], (t_next - t)[:, None, None]
    sigma = 0.7 * (s / (1 - s)).sqrt()
    mean = x + (v + sigma**2 / (2 * s) * (x + (1 - s) * v)) * dt
    got = flow_sde(x, v, t, t_next, 0.7)
    assert torch.allclose(got.mean, mean, atol=1e-14) and torch.allclose(got.std, sigma * (-dt).sqrt(), atol=1e-14)


def test_dance_sde_is_its_score_form():
    x, v, t, t_next = state()
    s, dt = t[:, None, None], (t_next - t)[:, None, None]
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean = x + dt * v - 0.5 * 0.3**2 * score * dt
    got = dance_sde(x, v, t, t_next, 0.3)
    assert torch.allclose(got.mean, mean, atol=1e-14) and torch.allclose(got.std, 0.3 * (-dt).sqrt(), atol=1e-14)


def test_cps_is_its_cosine_form():
    x, v, t, t_next = state()
    s = t_next[:, None, None]
    mean = (1 - s) * denoised(x, v, t) + s * math.cos(0.4 * math.pi) * noise_estimate(x, v, t)
    got = cps(x, v, t, t_next, 0.8)
    assert torch.allclose(got.mean, mean, atol=1e-14)
    assert torch.allclose(got.std, s * math.sin(0.4 * math.pi), atol=1e-14)


def test_ddim_is_the_vp_formula():
    x, v, t, t_next = state()
    a, b = vp_alpha(t)[:, None, None], vp_alpha(t_next)[:, None, None]
    std = 0.8 * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    mean = b.sqrt() * denoised(x, v, t) + (1 - b - std**2).sqrt() * noise_estimate(x, v, t)
    got = ddim(x, v, t, t_next, 0.8)
    assert torch.allclose(vp_state(got.mean, t_next), mean, atol=1e-13)
    assert torch.allclose(vp_state(got.std, t_next), std, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_noise_is_the_euler_step(kernel):
    x, v, t, t_next = state()
    mean, std = kernel(x, v, t, t_next, 0.0)
    assert torch.allclose(mean, euler(x, v, t, t_next), atol=1e-14) and not std.any()
    mean, std = kernel(x, v, t, t_next, 1e-4)
    assert torch.allclose(mean, euler(x, v, t, t_next), atol=1e-6) and std.max() < 2e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_goes_in_and_fp32_comes_out(kernel):
    x, v, t, t_next = state(dtype=torch.float32)
    got = kernel(x.bfloat16(), v.bfloat16(), t, t_next, 0.5)
    want = kernel(x.bfloat16().float(), v.bfloat16().float(), t, t_next, 0.5)
    assert got.mean.dtype == got.std.dtype == torch.float32
    assert torch.equal(got.mean, want.mean) and torch.equal(got.std, want.std)
    assert got.std.shape == (6, 1, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_eta_may_differ_per_sample(kernel):
    x, v, t, t_next = state()
    eta = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    got = kernel(x, v, t, t_next, eta)
    for i, e in enumerate(eta.tolist()):
        one = kernel(x[i : i + 1], v[i : i + 1], t[i : i + 1], t_next[i : i + 1], e)
        assert torch.allclose(got.mean[i], one.mean[0]) and torch.allclose(got.std[i], one.std[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_reaches_the_velocity(kernel):
    x, v, t, t_next = state(dtype=torch.float32)
    v.requires_grad_()
    kernel(x, v, torch.ones_like(t), t_next, 0.5).mean.sum().backward()
    assert torch.isfinite(v.grad).all() and v.grad.abs().sum() > 0


GRIDS = [
    linear_times(10),
    shifted_times(16, 3.0),
    shifted_times(3, 12.0),
    shifted_times(50, 7.0),
    scheduler_times(10),
    dynamic_times(28, 1.15),
]


@pytest.mark.parametrize("times", GRIDS)
def test_flow_sde_first_std_is_eta_and_later_steps_are_unguarded(times):
    x = v = torch.zeros(len(times) - 1, 2)
    std = flow_sde(x, v, times[:-1], times[1:], 0.7).std[:, 0]
    assert std[0] == pytest.approx(0.7, rel=1e-5)
    plain = 0.7 * (times[:-1] / (1 - times[:-1]) * -times.diff()).sqrt()
    assert torch.allclose(std[1:], plain[1:], rtol=1e-5)


@pytest.mark.parametrize("start", [1.0, 1 - 1e-7, 0.99999, 0.9999, 0.9997, 0.999])
def test_flow_sde_does_not_explode_just_below_one(start):
    x = v = torch.ones(1, 2)
    mean, std = flow_sde(x, v, torch.tensor([start]), torch.tensor([0.96]), 0.7)
    assert float(std) == pytest.approx(0.7, rel=0.02) and mean.abs().max() < 2


@pytest.mark.parametrize("kernel", [cps, ddim])
def test_interpolants_end_exactly_at_the_clean_estimate(kernel):
    x, v, t, _ = state()
    mean, std = kernel(x, v, t, torch.zeros_like(t), 0.8)
    assert torch.equal(mean, denoised(x, v, t)) and not std.any()


@pytest.mark.parametrize("kernel", [cps, ddim])
@pytest.mark.parametrize("eta", [1.2, -0.1, torch.tensor([0.5, 2.0])])
def test_interpolants_refuse_more_noise_than_there_is(kernel, eta):
    x, v, t, t_next = state(2)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        kernel(x, v, t, t_next, eta)


def test_diffusion_is_g():
    x, v, t, t_next = state()
    assert torch.allclose(diffusion(dance_sde(x, v, t, t_next, 0.3), t, t_next), torch.full((6, 1, 1), 0.3).double())
    g = 0.7 * (t / (1 - t)).sqrt()
    assert torch.allclose(diffusion(flow_sde(x, v, t, t_next, 0.7), t, t_next), rows(g, x))


def test_wan_recipe_is_g_proportional_to_time():
    x, v, t, t_next = state()
    second = 0.97  # the recipe: g = last + (second - last) t with last = 0
    assert torch.allclose(diffusion(wan_sde(x, v, t, t_next, second), t, t_next), rows(second * t, x))
