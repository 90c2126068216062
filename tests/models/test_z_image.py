"""What is Z-Image's own: guidance that its call counts from 0, with a largest length and an end."""

import pytest
import torch

from flowrl.models import load
from tests.models.tiny import euler

pytestmark = pytest.mark.slow
TEXTS = ["a red cat", "two dogs on a hill"]


@pytest.fixture(scope="module")
def model():
    return load("tiny/z_image")


def test_guidance_is_one_more_than_the_call_s(model):
    assert model.guidance == 1.0
    assert model.arguments(guidance=1.0)["guidance_scale"] == 0.0
    assert model.arguments(guidance=5.0)["guidance_scale"] == 4.0


@pytest.mark.parametrize("settings", [{"cfg_normalization": 0.9}, {"cfg_truncation": 0.3}])
def test_limits_of_guidance_are_the_pipeline_s(model, settings):
    guided = load(model.path)
    guided.inference |= settings
    eps = torch.randn(2, *model.noise_shape(32, 32), generator=torch.Generator().manual_seed(0))
    times, cond = model.times(4, 32, 32), model.encode(TEXTS)
    plain, mine = (
        euler(lambda x, t, c, which=which: which.velocity(x, t, c, 6.0), eps, times, cond) for which in (model, guided)
    )
    call = guided.arguments(guidance=6.0, negative_prompt=[""] * len(TEXTS))  # the call takes no single one for several
    theirs = guided.pipe(prompt=list(TEXTS), latents=eps, output_type="latent", return_dict=False, **call)[0]
    assert not torch.allclose(plain, mine, atol=1e-3)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_encoding_leaves_the_list_of_prompts_alone(model):
    """The pipeline writes its template into the list that it is given."""
    texts = list(TEXTS)
    model.encode_text(texts, ())
    assert texts == TEXTS
