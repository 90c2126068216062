"""Pictures become latents by the inverse of what decoding does: same shift, same scale, no randomness."""

import copy

import pytest
import torch

from flowrl.models import ModelError, load

PICTURES = torch.rand(3, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mode_of_the_posterior_shifted_and_scaled(sd3):
    vae = sd3.pipe.vae
    posterior = vae.encode(PICTURES[:, 0] * 2 - 1).latent_dist
    assert posterior.std.max() > 0.1  # a sample would be seen
    expected = (posterior.mean - 0.0609) * 1.5305
    found = sd3.encode_media(PICTURES)
    assert found.shape == (3, *sd3.noise_shape(32, 48)) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found, sd3.encode_media(PICTURES))


def test_decoding_is_its_inverse_but_for_the_networks(sd3):
    """With a VAE that hands its pixels through, decode(encode(x)) is x: scale and shift cancel."""

    class Through:
        """The two calls of a VAE on pictures whose latents they are themselves."""

        dtype, device = torch.float32, torch.device("cpu")
        config = sd3.pipe.vae.config

        def encode(self, pixels, return_dict):
            return (pixels,)

        def decode(self, latents, return_dict):
            return (latents,)

    model, model.pipe = copy.copy(sd3), copy.copy(sd3.pipe)
    model.pipe.vae = Through()
    torch.testing.assert_close(model.decode(model.encode_media(PICTURES)), PICTURES, rtol=0, atol=1e-6)
    assert (model.encode_media(PICTURES) - (PICTURES[:, 0] * 2 - 1)).abs().max() > 0.1


def test_portions_are_equal_and_nothing_is_kept_for_a_gradient(sd3):
    model, seen = copy.copy(sd3), []
    model.decode_micro_batch = 2
    hook = model.pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = model.encode_media(PICTURES.clone().requires_grad_())
    hook.remove()
    assert seen == [2, 1] and not found.requires_grad
    torch.testing.assert_close(found, sd3.encode_media(PICTURES), rtol=0, atol=1e-5)


def test_what_the_model_could_not_have_made_is_refused(sd3):
    with pytest.raises(ModelError, match="2 frames asked of StableDiffusion3Pipeline"):
        sd3.encode_media(torch.zeros(1, 2, 3, 32, 32))
    with pytest.raises(ModelError, match=r"30 x 32 pixels: .* nearest: 32 x 32"):
        sd3.encode_media(torch.zeros(1, 1, 3, 30, 32))


def test_scenes_of_the_built_in_world_survive():
    """Measured on 85 scenes: mean error of a pixel 0.0065, root mean square 0.019; the checker passes each of them."""
    from flowrl.shapes import scenes
    from rewards import RewardHub, Sample

    specs = scenes.prompts("held_out")
    media = scenes.render(scenes.draw(specs, seed=3))[:, None]
    model = load("shapes")
    latents = model.encode_media(media)
    assert latents.shape == (len(specs), *model.noise_shape(model.height, model.width))
    assert latents.mean().abs() < 0.05 and 0.9 < latents.std() < 1.1  # as the denoiser's latents were in training
    again = model.decode(latents)
    error = again - media
    assert error.abs().mean() < 0.01 and error.square().mean().sqrt() < 0.025
    with RewardHub(["shapes"], device="cpu") as hub:
        result = hub([Sample(media=m[0], prompt=s.prompt) for m, s in zip(again, specs, strict=True)])
    assert result.parts["shapes"]["strict"].eq(1).all()
