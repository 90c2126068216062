"""CogVideoX: times that begin in pure noise, frames that are 1 + 8 k, latents in pairs."""

import pytest
import torch

from flowrl.models import ModelError, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    return load("tiny/cogvideox"), load("tiny/cogvideox15")


def test_times_begin_at_one_with_either_scheduler(models):
    """The table by hand: signal to noise divided by 3, then sqrt(A) stretched so that its last is 0."""
    from diffusers import CogVideoXDPMScheduler

    model, _ = models
    times = model.times(4, 16, 16, 9)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    root = (alphas / (3 - 2 * alphas)).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    noise = (1 - root.square()).sqrt()
    wanted = (noise / (root + noise))[[999, 749, 499, 249]]
    assert float(times[0]) == 1.0 and float(times[-1]) == 0.0
    assert torch.allclose(times[:-1].double(), wanted, atol=1e-6)

    before, model.pipe.scheduler = model.pipe.scheduler, CogVideoXDPMScheduler.from_config(model.pipe.scheduler.config)
    try:
        assert torch.equal(type(model)(model.pipe, inference=model.inference).times(4, 16, 16, 9), times)
    finally:
        model.pipe.scheduler = before


def test_frames_that_the_vae_would_not_give_back_are_refused(models):
    for model, latents in zip(models, (5, 6), strict=True):
        assert model.noise_shape(16, 16, 17)[1] == latents
        with pytest.raises(ModelError, match="nearest: 17"):
            model.noise_shape(16, 16, 15)
        with pytest.raises(ModelError, match="nearest: 1"):
            model.noise_shape(16, 16, 5)  # two latents, which the VAE decodes to eight frames


def test_the_latent_at_the_front_is_not_decoded_and_repeats_the_first(models):
    _, model = models
    media = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = model.encode_media(media)
    assert latents.shape[2] == 4 and torch.equal(latents[:, :, 0], latents[:, :, 1])
    changed = latents.clone()
    changed[:, :, 0] += 1
    assert torch.equal(model.decode(changed), model.decode(latents))


def test_guidance_that_depends_on_the_step_is_refused(models):
    model, _ = models
    other = type(model)(model.pipe, inference=model.inference | {"use_dynamic_cfg": True})
    other.check_guidance(1.0)
    with pytest.raises(ModelError, match="use_dynamic_cfg"):
        other.check_guidance(6.0)
