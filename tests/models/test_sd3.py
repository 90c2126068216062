"""SD3's adapter does what diffusers' pipeline does: same times, same ODE, same picture."""

import copy

import pytest
import torch

from flowrl.models import ModelError, load
from flowrl.types import Model, take
from tests.models.tiny import WORDS, build_sd3, euler

PROMPTS = ["a cat", "two dogs in a box"]


def noise(model, number=2, height=32, width=32, seed=0):
    return torch.randn(number, *model.noise_shape(height, width), generator=torch.Generator().manual_seed(seed))


def with_scheduler(model, **config):
    """The model with another scheduler; the networks are shared."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    other, other.pipe = copy.copy(model), copy.copy(model.pipe)
    other.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    return other


def sample(model, x, num_steps, guidance, height=32, width=32):
    cond = model.encode(PROMPTS)
    return euler(lambda x, t, c: model.velocity(x, t, c, guidance), x, model.times(num_steps, height, width), cond)


def test_it_is_a_model(sd3):
    assert isinstance(sd3, Model)
    assert not any(p.requires_grad for p in sd3.trainable.parameters())
    assert (sd3.height, sd3.width) == (32, 32)
    assert sd3.noise_shape(48, 32) == (4, 24, 16)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_euler_along_our_velocity_is_the_pipeline(sd3, guidance, size):
    x = noise(sd3, 2, *size)
    ours = sample(sd3, x, 5, guidance, *size)
    call = sd3.arguments(num_inference_steps=5, guidance_scale=guidance, height=size[0], width=size[1])
    theirs = sd3.pipe(PROMPTS, latents=x, output_type="latent", **call).images
    assert (ours - x).abs().max() > 0.1  # it moved
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_picture_is_the_pipeline_s(sd3):
    x = noise(sd3)
    media = sd3.decode(sample(sd3, x, 3, 1.0))
    call = sd3.arguments(num_inference_steps=3, guidance_scale=1.0)
    theirs = sd3.pipe(PROMPTS, latents=x, output_type="pt", **call).images
    assert media.shape == (2, 1, 3, 32, 32) and media.dtype == torch.float32
    assert media.min() >= 0 and media.max() <= 1
    torch.testing.assert_close(media[:, 0], theirs, rtol=0, atol=1e-5)


SCHEDULERS = {
    "static": {"shift": 3.0},
    "none": {},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"shift_terminal": 0.1},
}


@pytest.mark.parametrize("config", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("grid", ["scheduler", "linear"])
def test_times_are_those_the_pipeline_walks(sd3, config, grid):
    model = with_scheduler(sd3, **config)
    model.grid = grid
    times = model.times(4, 48, 32)
    walked = []
    model.pipe(
        PROMPTS[0], output_type="latent", callback_on_step_end=lambda p, i, t, k: walked.append(t) or {},
        **model.arguments(num_inference_steps=4, guidance_scale=1.0, height=48, width=32),
    )  # fmt: skip
    assert times.dtype == torch.float32 and times.shape == (5,)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    torch.testing.assert_close(times, model.pipe.scheduler.sigmas, rtol=0, atol=0)
    torch.testing.assert_close(times[:-1] * 1000, torch.stack(walked), rtol=0, atol=0)


def test_asking_for_times_leaves_the_pipeline_alone(sd3):
    before = sd3.pipe.scheduler.sigmas.clone()
    sd3.times(7, 32, 32)
    assert torch.equal(before, sd3.pipe.scheduler.sigmas)


def test_the_tiny_last_step_of_a_shifted_grid_is_kept(sd3):
    """Shift 3, T = 4: u = 3 u0 / (1 + 2 u0) applied to 1/1000 twice is 0.0089; the linear grid ends at 0.5."""
    scheduler, linear = with_scheduler(sd3, shift=3.0), with_scheduler(sd3, shift=3.0)
    linear.grid = "linear"
    torch.testing.assert_close(scheduler.times(4, 32, 32)[-2], torch.tensor(0.0089), rtol=0, atol=1e-4)
    torch.testing.assert_close(linear.times(4, 32, 32), torch.tensor([1, 0.9, 0.75, 0.5, 0]), rtol=0, atol=1e-6)


def test_conditions_are_the_pipeline_s_and_stored_once_a_prompt(sd3):
    cond = sd3.encode(PROMPTS)
    embeds, negative, pooled, negative_pooled = sd3.pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=8)
    assert set(cond) == {
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    }  # fmt: skip
    assert all(len(tensor) == 2 for tensor in cond.values())
    torch.testing.assert_close(cond["prompt_embeds"], embeds)
    torch.testing.assert_close(cond["negative_prompt_embeds"], negative)
    torch.testing.assert_close(cond["pooled_prompt_embeds"], pooled)
    torch.testing.assert_close(cond["negative_pooled_prompt_embeds"], negative_pooled)
    assert cond["negative_prompt_embeds"].stride(0) == 0  # a view: the empty prompt is there once
    assert not any(tensor.requires_grad for tensor in cond.values())


def test_many_prompts_are_encoded_in_portions(sd3):
    prompts = [f"cat {'x' * (i % 5)}" for i in range(40)]
    cond = sd3.encode(prompts)
    torch.testing.assert_close(cond["prompt_embeds"][33:35], sd3.encode(prompts[33:35])["prompt_embeds"])


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_batch_of_eight_is_eight_single_samples(sd3, guidance):
    x, t = noise(sd3, 8), torch.linspace(0.1, 1, 8)
    cond = take(sd3.encode(PROMPTS), torch.arange(8) % 2)
    with torch.no_grad():
        together = sd3.velocity(x, t, cond, guidance)
        single = [sd3.velocity(x[i : i + 1], t[i : i + 1], take(cond, torch.tensor([i])), guidance) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(single), rtol=0, atol=1e-5)


def test_guidance_is_one_call_of_twice_the_batch(sd3):
    seen = []
    hook = sd3.trainable.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    x, cond = noise(sd3), sd3.encode(PROMPTS)
    with torch.no_grad():
        plain = sd3.velocity(x, torch.ones(2), cond)
        empty = {k.removeprefix("negative_"): v for k, v in cond.items() if k.startswith("negative_")}
        without = sd3.velocity(x, torch.ones(2), empty)
        guided = sd3.velocity(x, torch.ones(2), cond, 3.0)
    hook.remove()
    assert seen == [2, 2, 4]
    torch.testing.assert_close(guided, without + 3 * (plain - without), rtol=0, atol=1e-5)


def test_decode_is_differentiable_and_its_portions_are_equal(sd3):
    model = copy.copy(sd3)
    x = noise(model, 3, seed=1).requires_grad_()
    whole = model.decode(x)
    (gradient,) = torch.autograd.grad(whole.mean(), x)
    model.decode_micro_batch = 2
    (in_portions,) = torch.autograd.grad(model.decode(x).mean(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(model.decode(x), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_portions, gradient, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(tiny_sd3):
    model = load(tiny_sd3)
    model.trainable.requires_grad_(True)
    x, cond = noise(model), model.encode(PROMPTS)
    gradients = []
    for _ in range(2):
        model.trainable.zero_grad()
        model.velocity(x, torch.full((2,), 0.5), cond).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.trainable.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    assert model.pipe.transformer.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_without_a_t5_the_number_of_zero_tokens_is_the_folder_s(tmp_path):
    """The pipeline appends max_sequence_length zero tokens, 256 unless told otherwise; the built-in model has none."""
    folder = build_sd3(tmp_path / "model", t5=False)
    assert load(folder).encode(["a"])["prompt_embeds"].shape[1] == WORDS + 256
    (folder / "inference.json").write_text('{"max_sequence_length": 0, "num_inference_steps": 3, "guidance_scale": 2}')
    model = load(folder)
    assert model.encode(["a"])["prompt_embeds"].shape[1] == WORDS
    x = noise(model)
    theirs = model.pipe(PROMPTS, latents=x, output_type="latent", **model.arguments()).images
    torch.testing.assert_close(sample(model, x, 3, 2.0), theirs, rtol=0, atol=1e-5)
    assert load(folder, max_sequence_length=4).encode(["a"])["prompt_embeds"].shape[1] == WORDS + 4


def test_recommended_settings_are_defaults_that_a_run_may_change(sd3, tiny_sd3):
    call = {"num_inference_steps": 4, "guidance_scale": 7.0, "max_sequence_length": 8, "height": 32, "width": 32}
    call["negative_prompt"] = ""  # a call with guidance names its other branch
    assert sd3.arguments() == call
    assert sd3.arguments(num_inference_steps=9, guidance_scale=None) == {**call, "num_inference_steps": 9}
    other = load(tiny_sd3, height=48, grid="linear")
    assert (other.height, other.width) == (48, 32)
    assert other.arguments(num_inference_steps=2)["sigmas"] == [1.0, 0.5]


def test_a_folder_that_passes_sigmas_means_the_linear_grid(sd3):
    model = type(sd3)(sd3.pipe, inference={"sigmas": [1.0, 0.5], "num_inference_steps": 2})
    assert model.grid == "linear"
    assert model.arguments(num_inference_steps=4)["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    assert type(sd3)(sd3.pipe, inference={"sigmas": [1.0]}, grid="scheduler").arguments().get("sigmas") is None


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(tiny_sd3, sd3):
    model = load(tiny_sd3, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.pipe.vae.dtype == torch.float32
    assert model.pipe.text_encoder_3.dtype == torch.bfloat16
    x = noise(model)
    with torch.no_grad():
        v = model.velocity(x, torch.full((2,), 0.5), model.encode(PROMPTS))
        exact = sd3.velocity(x, torch.full((2,), 0.5), sd3.encode(PROMPTS))
    assert v.dtype == torch.float32 and model.decode(x).dtype == torch.float32
    assert 0 < (v - exact).abs().max() < 0.1


def test_sizes_and_frames_that_cannot_be(sd3):
    with pytest.raises(ModelError, match=r"multiples of 4; nearest: 32 x 48"):
        sd3.noise_shape(33, 47)
    with pytest.raises(ModelError, match="makes images"):
        sd3.noise_shape(32, 32, 9)
