"""Variance-preserving models in flow coordinates: every first-order scheduler walks as our Euler steps do."""

import numpy as np
import pytest
import torch

import samplers
from flowrl.models import ModelError, load
from flowrl.models.sd import SD
from tests.models.test_conformance import drawn_by_diffusers, noise, sampled

pytestmark = pytest.mark.slow

TEXTS = ["a red cat", "two dogs on a hill"]
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
EXACT = {
    "ddim, leading": ("DDIMScheduler", {"timestep_spacing": "leading"}, 1e-5),
    "ddim, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 1e-5),
    "ddim, x0": ("DDIMScheduler", {"prediction_type": "sample"}, 1e-5),
    "ddim, v from pure noise": ("DDIMScheduler", {"timestep_spacing": "trailing", **V}, 1e-5),
    "euler, leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 1e-5),
    "euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 1e-5),
    "euler, fractions of a timestep": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, 1e-5),
    # The scheduler's own state is 4096 times the noise there, of which float32 keeps three decimals.
    "euler, v from pure noise": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", **V}, 1e-4),
    "dpm-solver, first order": ("DPMSolverMultistepScheduler", {"solver_order": 1}, 1e-5),
}


@pytest.fixture(scope="module")
def sd15():
    return load("tiny/sd15")


def with_scheduler(model, kind, **config):
    """The same networks with another scheduler over the same table."""
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(model.pipe.scheduler.config, **config)
    parts = {**model.pipe.components, "scheduler": scheduler}
    pipe = type(model.pipe)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return SD(pipe, inference=model.inference)


@pytest.mark.parametrize("name", EXACT)
def test_euler_in_flow_coordinates_is_the_scheduler_s_step(sd15, name):
    kind, config, tolerance = EXACT[name]
    model, steps = with_scheduler(sd15, kind, **config), 5
    eps = noise(model, len(TEXTS))
    mine = sampled(model, TEXTS, eps, 3.0, steps)
    theirs = drawn_by_diffusers(model, TEXTS, eps, 3.0, num_inference_steps=steps)
    assert torch.allclose(mine, theirs, atol=tolerance * float(theirs.abs().max().clamp(min=1))), (
        float((mine - theirs).abs().max())
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_of_higher_order_gives_its_grid(sd15, kind):
    times = with_scheduler(sd15, kind, skip_prk_steps=True).times(5, 32, 32)
    assert len(times) == 6 and 0.8 < float(times[0]) < 0.937 and float(times[-1]) == 0
    assert bool((times.diff() < 0).all())


def test_pndm_with_the_times_of_1_5_walks_ddim_s(sd15):
    """The scheduler that SD1.5 comes with."""
    pndm = with_scheduler(sd15, "PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False)
    assert torch.equal(pndm.times(20, 32, 32), sd15.times(20, 32, 32))
    with pytest.raises(ModelError, match="skip_prk_steps"):
        with_scheduler(sd15, "PNDMScheduler", skip_prk_steps=False).times(6, 32, 32)


def test_the_stochastic_step_is_ddim_s(sd15):
    """The kernel `ddim` in flow coordinates, of DDPO's eta = 1, against DDIMScheduler with the same noise."""
    model = with_scheduler(sd15, "DDIMScheduler")
    cond, eps = model.encode(TEXTS), noise(model, len(TEXTS))
    scheduler, times = model.pipe.scheduler, model.times(5, 32, 32)
    scheduler.set_timesteps(5)
    t, t_next = (times[i].expand(2) for i in (1, 2))
    z, place = noise(model, 2, seed=3), scheduler.timesteps[1]
    with torch.no_grad():
        said = model.pipe.unet(z, place, encoder_hidden_states=cond["prompt_embeds"]).sample
        x = samplers.flow_state(z, t)
        mine = samplers.ddim(x, model.velocity(x, t, cond), t, t_next, 1.0)
    theirs = scheduler.step(said, place, z, eta=1.0, variance_noise=eps).prev_sample
    assert torch.allclose(samplers.vp_state(mine.mean + mine.std * eps, t_next), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny/sd15", "tiny/sd21", "tiny/sdxl"])
def test_times_of_the_table_are_whole_timesteps(name):
    model = load(name)
    alphas = model.pipe.scheduler.alphas_cumprod
    t = samplers.flow_time(alphas.double()).float()
    assert torch.equal(model.timestep(t), torch.arange(1000.0))
    sigmas = ((1 - alphas[1:-1]) / alphas[1:-1]).sqrt().double().numpy()
    wanted = np.linspace(1, 998, 2500)
    sigma = torch.as_tensor(np.interp(wanted, np.arange(1, 999), sigmas))
    found = model.timestep((sigma / (1 + sigma)).float())
    assert float((found - torch.as_tensor(wanted)).abs().max()) < 2e-3


def test_times_beyond_the_table_are_read_as_its_ends(sd15):
    """A method may draw any t in (0, 1]: the same ray at the last level has the same velocity, and it is finite."""
    model = sd15
    cond, z = model.encode(TEXTS), noise(model, 2)
    last = samplers.flow_time(model.pipe.scheduler.alphas_cumprod[-1]).expand(2)
    assert 0.93 < float(last[0]) < 0.94
    known = model.velocity(samplers.flow_state(z, last), last, cond)
    for t in (torch.ones(2), torch.tensor([0.95, 0.999])):
        assert torch.allclose(model.velocity(samplers.flow_state(z, t), t, cond), known, atol=1e-4)
    assert torch.equal(model.timestep(torch.tensor([0.0, 1e-4, 1.0])), torch.tensor([0.0, 0.0, 999.0]))
    assert model.velocity(z, torch.tensor([0.0, 1e-3]), cond).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("DDIMScheduler", {"thresholding": True}, "clips"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "no places"),
        ("FlowMatchEulerDiscreteScheduler", {}, "alphas_cumprod"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_schedulers_that_do_more_are_refused(sd15, kind, config, why):
    model = with_scheduler(sd15, kind, **config)
    with pytest.raises(ModelError, match=why):
        model.times(4, 32, 32)


def test_what_would_not_be_the_pipeline_s_is_refused(sd15):
    with pytest.raises(ModelError, match=r"Leave model\.grid out"):
        SD(sd15.pipe, grid="linear").times(4, 32, 32)
    model = SD(sd15.pipe, inference={"guidance_rescale": 0.7})
    model.check_guidance(1.0)
    with pytest.raises(ModelError, match="guidance_rescale"):
        model.check_guidance(5.0)
