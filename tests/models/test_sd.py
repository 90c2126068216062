"""What is Stable Diffusion's own: sizes that SDXL is told, its other branch of guidance, weights that are refused."""

import pytest
import torch

from flowrl.models import ModelError, load
from flowrl.models.sd import SD
from tests.models.test_conformance import drawn_by_diffusers, noise, sampled

pytestmark = pytest.mark.slow

TEXTS = ["a red cat", "two dogs on a hill"]


def same_as_the_pipeline(model):
    eps = noise(model, len(TEXTS))
    mine, theirs = sampled(model, TEXTS, eps, 3.0, 4), drawn_by_diffusers(model, TEXTS, eps, 3.0)
    return torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", ["tiny/sd15", "tiny/sdxl"])
def test_other_sizes_and_negative_prompts_are_the_pipeline_s(name):
    """40 x 24 pixels are 5 x 3 latents, which the U-Net cannot halve; and SDXL is told them."""
    model = load(name, height=40, width=24, negative_prompt="blue")
    assert model.noise_shape(40, 24) == (4, 5, 3)
    assert same_as_the_pipeline(model)


def test_xl_is_guided_away_from_zeros_unless_a_negative_prompt_is_given():
    zeros, given = load("tiny/sdxl").encode(TEXTS), load("tiny/sdxl", negative_prompt="").encode(TEXTS)
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert not zeros[name].any()
        assert given[name].any()


def test_xl_is_told_the_sizes_of_the_folder():
    model = load("tiny/sdxl")
    cond, eps, t = model.encode(TEXTS), noise(model, 2), torch.full((2,), 0.5)
    before = model.velocity(eps, t, cond)
    model.inference |= {"original_size": [64, 48], "crops_coords_top_left": [2, 3], "target_size": [24, 40]}
    assert not torch.allclose(before, model.velocity(eps, t, cond), atol=1e-6)
    assert same_as_the_pipeline(model)


def test_the_size_is_that_of_the_weights_where_none_is_given():
    for name in ("tiny/sd15", "tiny/sdxl"):
        model = load(name)
        bare = type(model)(model.pipe)
        assert (bare.height, bare.width) == (32, 32)


def test_a_distilled_unet_is_refused():
    pipe = load("tiny/sd15").pipe
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ModelError, match="distilled"):
        SD(pipe)
