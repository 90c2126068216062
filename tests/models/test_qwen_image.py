"""What is Qwen-Image's own: guidance that keeps lengths, and source pictures of any number and shape in a batch."""

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from flowrl.models import ModelError, load
from tests.models.tiny import euler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plus():
    return load("tiny/qwen_image_edit_plus")


@pytest.fixture(scope="module")
def pictures():
    """8 bits, as a data set has them: of three shapes."""
    made = torch.Generator().manual_seed(2)
    return [torch.randint(256, (3, *size), generator=made) / 255 for size in ((64, 96), (80, 48), (32, 32))]


def noise(model, count, height, width):
    return torch.randn(count, *model.noise_shape(height, width), generator=torch.Generator().manual_seed(0))


def test_guidance_keeps_the_length_of_each_token():
    model = load("tiny/qwen_image")
    x, t, cond = noise(model, 2, 32, 48), torch.tensor([0.4, 0.9]), model.encode(["a cat", "two dogs"])
    tokens = [model.pipeline_latents(model.velocity(x, t, cond, guidance)) for guidance in (1.0, 4.0)]
    plain, guided = (each.norm(dim=-1) for each in tokens)
    assert not torch.allclose(*tokens, atol=1e-3)
    torch.testing.assert_close(guided, plain)


def test_arguments_of_guidance_hold_a_negative_prompt(plus):
    """Without one the pipeline's call does not guide, whatever its scale is."""
    call = plus.arguments(guidance=4.0)
    assert (call["true_cfg_scale"], call["negative_prompt"]) == (4.0, " ")


def test_several_sources_are_drawn_as_by_the_pipeline(plus, pictures):
    height, width, steps = 96, 64, 2
    x = noise(plus, 1, height, width)
    cond = plus.encode(["put one on the other"], [tuple(pictures[:2])])
    times = plus.times(steps, height, width)
    mine = euler(lambda x, t, c: plus.velocity(x, t, c, 2.0), x, times, cond)
    call = plus.arguments(guidance=2.0, height=height, width=width, num_inference_steps=steps)
    theirs = plus.pipe(
        image=[to_pil_image(picture) for picture in pictures[:2]], prompt="put one on the other",
        latents=plus.pipeline_latents(x), output_type="latent", return_dict=False, **call,
    )[0]  # fmt: skip
    torch.testing.assert_close(plus.pipeline_output(mine), theirs, rtol=0, atol=1e-5)


def test_sources_of_other_shapes_and_numbers_in_a_batch_change_nothing(plus, pictures):
    texts = ["make it blue", "swap them", "a rather long instruction for one picture"]
    sources = [(pictures[1],), (pictures[0], pictures[2]), (pictures[2],)]
    x, t = noise(plus, 3, 64, 96), torch.tensor([0.9, 0.5, 0.2])
    together = plus.encode(texts, sources)
    assert together["source_grids"].shape == (3, 2, 3)
    found = plus.velocity(x, t, together, 3.0)
    for i in range(3):
        alone = plus.velocity(x[i : i + 1], t[i : i + 1], plus.encode(texts[i : i + 1], sources[i : i + 1]), 3.0)
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=2e-5)


def test_too_many_or_no_sources_are_refused(plus, pictures):
    for given in ((), (pictures[2],) * 4):
        with pytest.raises(ModelError, match="takes 1 to 3"):
            plus.encode(["draw"], [given])


def test_one_step_is_refused_and_the_grid_ends_where_the_scheduler_says(plus):
    with pytest.raises(ModelError, match="at least two steps"):
        plus.times(1, 64, 96)
    times = plus.times(8, 64, 96)
    assert times[0] == 1 and times[-1] == 0
    assert float(times[-2]) == pytest.approx(plus.pipe.scheduler.config.shift_terminal)
