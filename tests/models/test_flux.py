"""FLUX.1 and FLUX.2 beyond what all families are asked: guidance that is told, several sources, sizes of sources."""

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from flowrl.models import ModelError, load
from flowrl.types import take
from tests.models.tiny import euler

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "two dogs on a hill"]


@pytest.fixture(scope="module", params=["flux", "flux_schnell", "flux_kontext", "flux2", "flux2_klein"])
def model(request):
    """A test that changes it must load its own."""
    return load(f"tiny/{request.param}")


@pytest.fixture(scope="module")
def flux2():
    return load("tiny/flux2")


def pictures(count, height=64, width=64):
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.rand(3, height, width, generator=generator) for _ in range(count))


def noise(model, count, height=None, width=None):
    shape = model.noise_shape(height or model.height, width or model.width)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


class Seen(Exception):
    """Pixels that came to the VAE; nothing after them is of interest."""


def pixels_seen(model, call):
    def stop(module, args):
        raise Seen(args[0])

    hook = model.pipe.vae.encoder.register_forward_pre_hook(stop)
    try:
        with pytest.raises(Seen) as seen:
            call()
    finally:
        hook.remove()
    return seen.value.args[0]


def test_a_picture_that_is_no_square_is_the_pipeline_s(model):
    height, width = model.height, 2 * model.width
    given = [pictures(1, model.height, model.width)] * model.num_sources[0]
    x = noise(model, 1, height, width)
    cond = model.encode(PROMPTS[:1], given)
    ours = euler(model.velocity, x, model.times(3, height, width), cond)
    call = model.arguments(height=height, width=width, num_inference_steps=3)
    call |= {"image": to_pil_image(given[0][0])} if given else {}
    with torch.no_grad():
        theirs = model.pipe(
            prompt=PROMPTS[:1], latents=model.pipeline_latents(x), output_type="latent", return_dict=False, **call
        )[0]
    assert torch.allclose(model.pipeline_output(ours), theirs, atol=1e-5 * float(theirs.abs().max()))


def test_times_reach_the_network_as_the_pipeline_rounds_them(model):
    own = load(model.path, dtype=torch.bfloat16)
    x = noise(own, 1)
    given = [pictures(1, own.height, own.width)] * own.num_sources[0]
    cond = own.encode(PROMPTS[:1], given)
    seen = []
    hook = own.trainable.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    with torch.no_grad():
        euler(own.velocity, x, own.times(3, own.height, own.width), cond)
        own.pipe.vae.bfloat16()  # the pipeline encodes sources in the dtype of its text
        call = own.arguments(num_inference_steps=3)
        call |= {"image": to_pil_image(given[0][0])} if given else {}
        own.pipe(prompt=PROMPTS[:1], latents=own.pipeline_latents(x), output_type="latent", **call)
    hook.remove()
    assert len(seen) == 6 and all(t.dtype == torch.bfloat16 for t in seen)
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


@pytest.mark.parametrize("name", ["flux", "flux_kontext", "flux2"])
def test_embedded_guidance_reaches_the_network(name):
    velocities = []
    for guidance in (1.0, 7.0):
        own = load(f"tiny/{name}", embedded_guidance=guidance)
        assert own.arguments(guidance=1.0)["guidance_scale"] == guidance
        given = [pictures(1, own.height, own.width)] * own.num_sources[0]
        velocities.append(own.velocity(noise(own, 1), torch.tensor([0.5]), own.encode(PROMPTS[:1], given)))
    assert not torch.allclose(*velocities, atol=1e-4)


@pytest.mark.parametrize("name", ["flux_schnell", "flux2_klein"])
def test_weights_without_such_an_input_refuse_embedded_guidance(name):
    with pytest.raises(ModelError, match="no such input"):
        load(f"tiny/{name}", embedded_guidance=3.5)


def test_flux2_s_arguments_have_no_guidance_that_its_call_does_not_take(flux2):
    with pytest.raises(ModelError, match="embedded_guidance"):
        flux2.check_guidance(2.0)
    assert flux2.guidance == 1.0
    assert flux2.arguments(guidance=1.0) == flux2.arguments() == flux2.inference


def test_distilled_klein_is_not_guided():
    own = load("tiny/flux2_klein")
    own.check_guidance(4.0)
    own.pipe.register_to_config(is_distilled=True)
    with pytest.raises(ModelError, match="distilled"):
        own.check_guidance(4.0)
    plain = type(own)(own.pipe)
    assert (plain.guidance, plain.inference["num_inference_steps"]) == (1.0, 4)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_several_sources_are_the_pipeline_s(name):
    own = load(f"tiny/{name}")
    shown, x = pictures(3), noise(own, 1)
    ours = euler(own.velocity, x, own.times(2, 64, 64), own.encode(PROMPTS[:1], [shown]))
    with torch.no_grad():
        theirs = own.pipe(
            prompt=PROMPTS[:1], image=[to_pil_image(picture) for picture in shown], latents=own.pipeline_latents(x),
            output_type="latent", return_dict=False, **own.arguments(num_inference_steps=2),
        )[0]  # fmt: skip
    assert torch.allclose(own.pipeline_output(ours), theirs, atol=1e-5 * float(theirs.abs().max()))


def test_prompts_may_have_other_numbers_of_sources(flux2):
    """A prompt's velocity does not depend on how many pictures its neighbours are shown."""
    shown = pictures(3)
    sources = [shown, (), shown[:1]]
    cond = flux2.encode(["cat"] * 3, sources)
    assert cond["image_latents"].shape[:2] == (3, 3) and cond["image_mask"].sum(1).tolist() == [3, 0, 1]
    x, t = noise(flux2, 1).repeat(3, 1, 1, 1), torch.full((3,), 0.6)
    together = flux2.velocity(x, t, cond)
    for i, given in enumerate(sources):
        alone = flux2.velocity(x[:1], t[:1], flux2.encode(["cat"], [given] if given else ()))
        assert torch.allclose(together[i : i + 1], alone, atol=2e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-3)
    longer = flux2.encode(["cat"] * 40, [()] * 33 + [shown] * 7)  # of two portions
    assert torch.allclose(flux2.velocity(x, t, take(longer, torch.tensor([39, 0, 0])))[:2], together[:2], atol=2e-5)


def test_nobody_with_sources_is_as_no_sources(flux2):
    x, t = noise(flux2, 2), torch.full((2,), 0.6)
    none, empty = flux2.encode(PROMPTS), flux2.encode(PROMPTS, [(), ()])
    assert empty["image_latents"].shape[:2] == (2, 0)
    assert torch.equal(flux2.velocity(x, t, none), flux2.velocity(x, t, empty))


def test_latents_are_scaled_by_patches_and_back(flux2):
    x = noise(flux2, 2)
    assert torch.allclose(flux2.scale(flux2.unscale(x)), x, atol=1e-5)
    assert not torch.allclose(flux2.unscale(x), x, atol=0.1)


def test_kontext_s_sources_have_the_size_that_the_pipeline_prefers():
    """Of a picture with the model's proportions, at about a megapixel whatever the sizes are."""
    tiny = load("tiny/flux_kontext")
    own = type(tiny)(tiny.pipe, inference={"height": 96, "width": 128})
    (picture,) = pictures(1, 300, 400)
    assert own.source_size() == (880, 1184)
    ours = pixels_seen(own, lambda: own.encode_sources([(picture,)]))
    theirs = pixels_seen(own, lambda: own.pipe(prompt="cat", image=to_pil_image(picture), **own.arguments()))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_flux2_s_large_sources_are_shrunk_as_the_pipeline_shrinks_them(flux2):
    own = type(flux2)(flux2.pipe, inference={**flux2.inference, "height": 1152, "width": 1536})
    (picture,) = pictures(1, 1152, 1536)
    ours = pixels_seen(own, lambda: own.encode_sources([(picture,)]))
    theirs = pixels_seen(
        own, lambda: own.pipe(prompt="cat", image=to_pil_image(picture), **own.arguments(height=64, width=64))
    )
    assert ours.shape == (1, 3, 880, 1168)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_batch_may_mix_prompts_with_and_without_pictures(tmp_path):
    from PIL import Image

    from flowrl.collect import Conditions
    from flowrl.policy import Policy
    from flowrl.types import Prompt

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    own = load("tiny/flux2")
    prompts = [Prompt(id=0, text="x"), Prompt(id=1, text="y", metadata={"source": str(tmp_path / "a.png")})]
    x, t = torch.randn(2, *own.noise_shape(own.height, own.width)), torch.full((2,), 0.5)
    conditions = Conditions(encode=Policy(own, frozen=True).encode)
    there = own.velocity(x, t, conditions(prompts))
    back = own.velocity(x.flip(0), t, conditions(prompts[::-1])).flip(0)
    alone = [own.velocity(x[i : i + 1], t[:1], conditions(prompts[i : i + 1])) for i in range(2)]
    assert torch.allclose(there, back, atol=1e-5) and torch.allclose(there, torch.cat(alone), atol=1e-5)


def test_a_teacher_may_not_guide_what_cannot_be_guided():
    from flowrl.models import ModelError
    from flowrl.policy import Policy

    with pytest.raises(ModelError, match="no classifier-free guidance"):
        Policy(load("tiny/flux2"), frozen=True, largest_guidance=3.0)
