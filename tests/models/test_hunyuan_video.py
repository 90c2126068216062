"""HunyuanVideo's embedded guidance, and the guider and the masked tokens of version 1.5."""

import pytest
import torch

from flowrl.models import ModelError, load
from tests.models.tiny import euler

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", 'a sign that says "open" and "late"']


@pytest.fixture(scope="module")
def first():
    return load("tiny/hunyuan_video")


@pytest.fixture(scope="module")
def second():
    return load("tiny/hunyuan_video15")


def noise(model):
    shape = model.noise_shape(model.height, model.width, model.frames)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def drawn(model, guidance, **arguments):
    """By the pipeline itself."""
    with torch.no_grad():
        return model.pipeline_with(guidance)(
            prompt=PROMPTS, latents=noise(model), output_type="latent", return_dict=False,
            **model.arguments(guidance=guidance, **arguments),
        )[0]  # fmt: skip


def walked(model, guidance):
    times = model.times(4, model.height, model.width, model.frames)
    return euler(lambda x, t, c: model.velocity(x, t, c, guidance), noise(model), times, model.encode(PROMPTS))


def test_embedded_guidance_is_the_call_s_guidance_scale(first):
    other = type(first)(first.pipe, inference=first.inference, embedded_guidance=2.5)
    assert other.inference["guidance_scale"] == 2.5 and first.inference["guidance_scale"] == 6.0
    assert other.guidance == 1.0  # classifier-free guidance is something else
    theirs = drawn(first, 1.0, guidance_scale=2.5)
    assert torch.allclose(walked(other, 1.0), theirs, atol=1e-5)
    assert not torch.allclose(walked(first, 1.0), theirs, atol=1e-3)


def test_weights_without_that_input_refuse_it(first, monkeypatch):
    monkeypatch.setattr(type(first), "takes_embedded_guidance", False)
    with pytest.raises(ModelError, match="no such input"):
        type(first)(first.pipe, embedded_guidance=2.5)


def test_text_in_quotes_and_cut_padding_draw_what_the_pipeline_draws(second):
    cond = second.encode(PROMPTS)
    assert cond["prompt_embeds"].shape[1] == len(PROMPTS[1]) and cond["prompt_embeds_mask"].sum(1).tolist() == [9, 34]
    glyphs = len('Text "open". Text "late". ') + 1  # bytes, and the end
    assert cond["prompt_embeds_mask_2"].sum(1).tolist() == [0, glyphs]
    assert torch.allclose(walked(second, 1.0), drawn(second, 1.0), atol=1e-5)


def test_guidance_is_the_guider_s(second):
    from diffusers import ClassifierFreeGuidance

    pipe = second.pipe
    pipe.guider = ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7)
    assert second.guidance == 6.0 and "guidance_scale" not in second.arguments(guidance=3.0)
    theirs = drawn(second, 3.0, negative_prompt=[""] * 2)
    assert torch.allclose(walked(second, 3.0), theirs, atol=2e-5)

    pipe.guider = ClassifierFreeGuidance(guidance_scale=6.0, stop=0.5)
    second.check_guidance(1.0)
    with pytest.raises(ModelError, match="ClassifierFreeGuidance"):
        second.check_guidance(3.0)
