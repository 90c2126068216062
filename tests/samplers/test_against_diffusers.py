"""Grids and the DDIM kernel against diffusers' schedulers; skipped where diffusers is not installed."""

import math

import pytest
import torch

from samplers import (
    ddim,
    dynamic_shift,
    dynamic_times,
    flow_state,
    flow_time,
    scheduler_times,
    trailing_vp_times,
    velocity_from_eps,
    velocity_from_v_prediction,
    velocity_from_x0,
    vp_state,
)

diffusers = pytest.importorskip("diffusers")


def scheduler(**kwargs):
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **kwargs,
    )


FROM = {"epsilon": velocity_from_eps, "v_prediction": velocity_from_v_prediction, "sample": velocity_from_x0}


@pytest.mark.parametrize("prediction_type", FROM)
@pytest.mark.parametrize("eta", [0.0, 0.8, 1.0])
def test_ddim_steps(prediction_type, eta):
    """Every step of 20, with the noise given, in VP states: equal to 1e-6 of the state's size."""
    reference = scheduler(prediction_type=prediction_type)
    reference.set_timesteps(20)
    times = trailing_vp_times(20, reference.alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    for step, timestep in enumerate(reference.timesteps):
        z, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        options = {"eta": eta, "variance_noise": noise} if eta else {"eta": 0.0}
        want = reference.step(output, timestep, z, **options).prev_sample
        t, t_next = times[step].expand(2), times[step + 1].expand(2)
        x = flow_state(z, t)
        # x0 at the last noise level amplifies rounding by 1/sqrt(A), which is 15 there.
        v = FROM[prediction_type](x, output, t)
        mean, std = ddim(x, v, t, t_next, eta)
        got = vp_state(mean + std * noise, t_next)
        assert (got - want).abs().max() <= 1e-6 * max(1, want.abs().max())


def test_trailing_grid():
    reference = scheduler()
    for num_steps in (7, 20, 50):
        reference.set_timesteps(num_steps)
        want = flow_time(reference.alphas_cumprod.double()[reference.timesteps])
        assert torch.allclose(trailing_vp_times(num_steps, reference.alphas_cumprod)[:-1].double(), want, atol=1e-6)


@pytest.mark.parametrize("num_steps", [4, 10, 28])
def test_static_shift_grid(num_steps):
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(num_steps)
    assert torch.allclose(scheduler_times(num_steps, 3.0), reference.sigmas, atol=1e-6)


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_dynamic_grid(terminal):
    reference = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
    mu = dynamic_shift(1024)
    reference.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist(), mu=mu)
    assert torch.allclose(dynamic_times(12, mu, terminal), reference.sigmas, atol=1e-6)
    assert math.isclose(mu, 0.63)
