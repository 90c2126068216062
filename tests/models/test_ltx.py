"""LTX-Video's own arguments: guidance that is rescaled, and VAEs that decode with noise."""

import pytest
import torch

from flowrl.models import ModelError, load
from tests.models.tiny import euler

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "two dogs"]


@pytest.fixture(scope="module")
def ltx():
    return load("tiny/ltx")


@pytest.fixture
def noise(ltx):
    shape = ltx.noise_shape(ltx.height, ltx.width, ltx.frames)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def test_frame_rate_and_rescaled_guidance_are_those_of_the_call(ltx, noise):
    own = {"frame_rate": 8, "guidance_rescale": 0.7}
    model = type(ltx)(ltx.pipe, inference=ltx.inference | own)
    cond, times = model.encode(PROMPTS), model.times(4, 32, 32, 9)
    mine = euler(lambda x, t, c: model.velocity(x, t, c, 3.0), noise, times, cond)
    call = {"prompt": PROMPTS, "latents": model.pipeline_latents(noise), "output_type": "latent", "return_dict": False}
    theirs = model.pipe(**call, **model.arguments(guidance=3.0))[0]
    assert torch.allclose(model.pipeline_latents(mine), theirs, atol=1e-5)
    for name in own:
        plain = model.pipe(**call, **model.arguments(guidance=3.0, **{name: ltx.inference[name]}))[0]
        assert not torch.allclose(theirs, plain, atol=1e-3), name


def test_a_grid_that_ends_above_zero_has_no_single_step(ltx):
    assert float(ltx.times(4, 32, 32, 9)[-2]) == pytest.approx(0.1)
    with pytest.raises(ModelError, match="at least two"):
        ltx.times(1, 32, 32, 9)


def test_a_vae_that_wants_noise_gives_equal_videos_for_equal_latents(ltx, noise):
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    own = {"timestep_conditioning": True, "decoder_inject_noise": (True,) * 5}
    vae = AutoencoderKLLTXVideo.from_config({**ltx.pipe.vae.config, **own}).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        if "per_channel_scale" in name:
            weight.fill_(0.5)  # zeros in a new network: noise that does nothing
    before, ltx.pipe.vae = ltx.pipe.vae, vae
    try:
        model = type(ltx)(ltx.pipe, inference=ltx.inference | {"decode_timestep": 0.05, "decode_noise_scale": 0.2})
        videos = model.decode(noise)
        state = torch.get_rng_state()
        assert torch.equal(model.decode(noise), videos) and torch.equal(torch.get_rng_state(), state)
        assert torch.allclose(model.decode(noise[1:]), videos[1:], atol=1e-5)
        quiet = type(ltx)(ltx.pipe, inference=ltx.inference | {"decode_timestep": 0.05, "decode_noise_scale": 0.0})
        assert not torch.allclose(quiet.decode(noise), videos, atol=1e-3)

        finished = model.pipeline_latents(noise[:1])
        theirs = _decoded_by_the_pipeline(model, finished)
        assert torch.allclose(videos[:1], theirs, atol=1e-5)
    finally:
        ltx.pipe.vae = before


def _decoded_by_the_pipeline(model, finished):
    """The pipeline's own decoding of finished latents: its last step is replaced by them."""

    def finish(pipe, step, timestep, given):
        return {"latents": finished} if step == 1 else {}

    torch.manual_seed(0)  # the noise inside the decoder
    video = model.pipe(
        prompt=PROMPTS[:1], latents=torch.zeros_like(finished), output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(0), callback_on_step_end=finish,
        **model.arguments(guidance=1.0, num_inference_steps=2),
    )[0]  # fmt: skip
    return video.float()
