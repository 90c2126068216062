"""Every tiny pipeline, of every family: what is trained is what diffusers samples. A new file in flowrl/tiny joins."""

import inspect
from collections import Counter

import pytest
import torch

import samplers
from flowrl import comfyui, tiny
from flowrl.models import ModelError, load
from flowrl.policy import Policy, load_weights
from flowrl.types import take
from flowrl.weights import FORMATS
from tests.models.tiny import euler

pytestmark = pytest.mark.slow

NAMES = sorted(tiny.names())
GUIDANCE = 3.0
EXPERTS = (0.9, 0.1)  # times of which either expert has one
KERNELS = ("flow_sde", "dance_sde", "wan_sde", "cps", "ddim")


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    """The family's tiny model; a test that changes it must load its own."""
    return load(f"tiny/{request.param}")


def prompts(model):
    """As many prompts as the pipeline's call takes with sources."""
    return ["a red cat"] if model.num_sources[1] else ["a red cat", "two dogs on a hill"]


def sources(model, count):
    """As many pictures a prompt as the family must have, or takes."""
    torch.manual_seed(5)
    most = max(model.num_sources[0], min(1, model.num_sources[1]))
    return [tuple(torch.rand(3, model.height, model.width) for _ in range(most)) for _ in range(count)] if most else ()


def noise(model, count, seed=0):
    shape = model.noise_shape(model.height, model.width, model.frames)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def drawn_by_diffusers(model, texts, eps, guidance, output="latent", **changed):
    """What the family's pipeline makes of this noise."""
    from torchvision.transforms.functional import to_pil_image

    pipe = model.pipeline_with(guidance)
    call = inspect.signature(type(pipe).__call__).parameters
    arguments = model.arguments(guidance=guidance, **changed)
    negative = model.inference.get("negative_prompt") or model.empty_prompt
    if guidance > 1 and "negative_prompt" in call and negative is not None:
        arguments["negative_prompt"] = [negative] * len(texts)
    if given := sources(model, len(texts)):
        pictures = [[to_pil_image(picture) for picture in each] for each in given]
        arguments["image"] = pictures[0] if len(pictures[0]) > 1 else pictures[0][0]
    arguments = {name: value for name, value in arguments.items() if name in call}
    with torch.no_grad():
        return pipe(
            prompt=texts, latents=model.pipeline_latents(eps), output_type=output, return_dict=False, **arguments
        )[0]


def sampled(model, texts, eps, guidance, num_steps):
    cond = model.encode(texts, sources(model, len(texts)))
    times = model.times(num_steps, model.height, model.width, model.frames)
    x = model.start(eps, float(times[0]))
    return euler(lambda x, t, c: model.velocity(x, t, c, guidance), x, times, cond)


def allowed(model):
    """Guidances that these weights take."""
    try:
        model.check_guidance(GUIDANCE)
    except ModelError:
        return [1.0]
    return [1.0, GUIDANCE]


def test_sampling_is_the_pipeline_s(model):
    texts = prompts(model)
    eps = noise(model, len(texts))
    steps = model.inference["num_inference_steps"]
    for guidance in allowed(model):
        mine = model.pipeline_output(sampled(model, texts, eps, guidance, steps))
        theirs = drawn_by_diffusers(model, texts, eps, guidance)
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs.float(), atol=1e-5 * float(theirs.abs().max().clamp(min=1))), (
            guidance, float((mine - theirs).abs().max()),
        )  # fmt: skip


def test_one_step_moves_as_the_pipeline_s(model):
    """Two steps, where the scheduler's grid cannot have one: it would divide 0 by 0."""
    texts, steps = prompts(model), 2 if model.pipe.scheduler.config.get("shift_terminal") else 1
    eps = noise(model, len(texts), seed=1)
    mine = model.pipeline_output(sampled(model, texts, eps, 1.0, steps))
    theirs = drawn_by_diffusers(model, texts, eps, 1.0, num_inference_steps=steps)
    assert not torch.allclose(mine, model.pipeline_output(eps), atol=1e-2)  # it did move
    assert torch.allclose(mine, theirs.float(), atol=1e-5 * float(theirs.abs().max().clamp(min=1)))


def test_a_wide_and_longer_sample_is_the_pipeline_s(model):
    """Height, width and time are not taken for one another."""
    if model.height != model.width:
        pytest.skip("it is no square in the other tests either")
    frames = model.frames + 2 * model.temporal_factor if model.video else 1
    own = load(model.path, height=model.height, width=2 * model.width, frames=frames)
    texts = prompts(own)[:1]
    eps = noise(own, 1)
    x0 = sampled(own, texts, eps, 1.0, 2)
    assert own.decode(x0).shape == (1, frames, 3, own.height, own.width)
    mine, theirs = own.pipeline_output(x0), drawn_by_diffusers(own, texts, eps, 1.0, num_inference_steps=2)
    assert torch.allclose(mine, theirs.float(), atol=1e-5 * float(theirs.abs().max().clamp(min=1)))


def test_prompts_sources_and_guidance_count(model):
    """Conditions reach the network: another prompt, another picture, another guidance give another velocity."""
    texts = prompts(model)
    eps, t = noise(model, len(texts)), torch.full((len(texts),), 0.6)
    given = sources(model, len(texts))
    base = model.velocity(eps, t, model.encode(texts, given))
    assert base.shape == eps.shape and base.dtype == torch.float32 and base.isfinite().all()
    assert not torch.allclose(base, model.velocity(eps, t, model.encode(["blue"] * len(texts), given)), atol=1e-6)
    if given:
        others = [tuple(1 - picture for picture in each) for each in given]
        assert not torch.allclose(base, model.velocity(eps, t, model.encode(texts, others)), atol=1e-6)
    if len(allowed(model)) > 1:
        assert not torch.allclose(base, model.velocity(eps, t, model.encode(texts, given), GUIDANCE), atol=1e-6)


def test_neighbours_in_a_batch_change_nothing(model):
    """A prompt's velocity is that of its own text and picture, however long its neighbours are and what they show."""
    texts, given = ["cat", "a rather long sentence of many words"], sources(model, 2)
    eps, t = noise(model, 2), torch.tensor([0.3, 0.8])
    both, each = model.encode(texts, given), [model.encode([texts[i]], given[i : i + 1]) for i in range(2)]
    for guidance in allowed(model):
        together = model.velocity(eps, t, both, guidance)
        for i, cond in enumerate(each):
            alone = model.velocity(eps[i : i + 1], t[i : i + 1], cond, guidance)
            assert torch.allclose(together[i : i + 1], alone, atol=2e-5), float((together[i] - alone[0]).abs().max())


def test_decoded_media_are_the_pipeline_s(model):
    texts = prompts(model)
    eps = noise(model, len(texts))
    steps = model.inference["num_inference_steps"]
    media = model.decode(sampled(model, texts, eps, 1.0, steps))
    assert media.shape == (len(texts), model.frames, 3, model.height, model.width)
    assert media.dtype == torch.float32 and 0 <= float(media.min()) and float(media.max()) <= 1
    theirs = torch.as_tensor(drawn_by_diffusers(model, texts, eps, 1.0, output="pt"))
    theirs = theirs if model.video else theirs.unsqueeze(1)
    assert torch.allclose(media, theirs.float(), atol=2e-4), float((media - theirs).abs().max())


def test_media_come_back_as_latents(model):
    latents = model.encode_media(torch.rand(1, model.frames, 3, model.height, model.width))
    assert latents.shape[1:] == model.noise_shape(model.height, model.width, model.frames)
    assert latents.isfinite().all() and latents.dtype == torch.float32


def test_latents_of_media_are_the_vae_s_scaled(model):
    """`unscale` is checked by the decoding above; `scale` is its inverse."""
    vae = model.pipe.vae
    media = torch.rand(1, model.frames, 3, model.height, model.width, generator=torch.Generator().manual_seed(0))
    pixels = media.transpose(1, 2) if any(p.ndim == 5 for p in vae.parameters()) else media[:, 0]
    with torch.no_grad():
        found = vae.encode(pixels * 2 - 1, return_dict=False)[0]
        raw = found if isinstance(found, torch.Tensor) else found.mode()
    latents = model.encode_media(media)
    again = model.unscale(latents)
    assert torch.allclose(again.reshape(raw.shape), raw, atol=1e-5 * float(raw.abs().max().clamp(min=1)))
    assert torch.allclose(model.scale(again), latents, atol=1e-5 * float(latents.abs().max().clamp(min=1)))
    assert latents.shape != raw.shape or not torch.allclose(latents, raw, atol=1e-2)


def test_sizes_that_cannot_be_are_refused_with_the_nearest(model):
    with pytest.raises(ModelError, match="nearest"):
        model.noise_shape(model.height + 1, model.width, model.frames)
    with pytest.raises(ModelError, match="frames"):
        model.noise_shape(model.height, model.width, 1 + 2 * model.temporal_factor - 1 if model.video else 2)


@pytest.mark.one_in(len(KERNELS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_first_ratio_is_one(model, kernel):
    """What was drawn has the same log-probability when it is evaluated again, one state at a time."""
    texts, step = prompts(model), getattr(samplers, kernel)
    cond = model.encode(texts, sources(model, len(texts)))
    times = model.times(4, model.height, model.width, model.frames)
    prompt = torch.arange(len(texts)).repeat_interleave(2)
    root = torch.arange(len(prompt))
    shape = model.noise_shape(model.height, model.width, model.frames)
    source = samplers.noise_source(shape, seed=0, iteration=0, prompt=prompt, member=root % 2)
    with torch.no_grad():
        walked = samplers.rollout(
            lambda x, t, i: model.velocity(x, t, take(cond, i)),
            model.start(source(root, torch.zeros_like(root), -1), float(times[0])), samplers.all_steps(times), step,
            eta=0.5, prompt=prompt, group=prompt, noise=source,
        )  # fmt: skip
        for edge in range(len(walked.t)):
            one = walked.select(torch.tensor([edge]))
            v = model.velocity(one.x, one.t, take(cond, one.prompt))
            again = samplers.gaussian_logprob(one.x_next, step(one.x, v, one.t, one.t_next, 0.5))
            assert abs(float(again - one.logprob)) <= 1e-5


def attention_runs(model):
    """{layer of attention: how often it has run}, counted from now on.

    Without those of HunyuanVideo's refiner of the text, whose activations diffusers keeps.
    """
    runs = Counter()
    for part in model.components:
        for name, module in getattr(model.pipe, part).named_modules():
            if name.endswith(model.lora_targets) and "token_refiner" not in name:
                module.register_forward_pre_hook(lambda *_, layer=f"{part}.{name}": runs.update([layer]))
    return runs


@pytest.mark.one_in(2)
def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_gradient(model):
    found, runs = [], []
    for checkpointing in (False, True):
        own = load(model.path)
        own.trainable.requires_grad_(True).train(False)
        if checkpointing:
            own.enable_gradient_checkpointing()
            own.trainable.train()
        runs.append(attention_runs(own))
        cond = take(own.encode(prompts(own)[:1], sources(own, 1)), torch.zeros(2, dtype=torch.long))
        own.velocity(noise(own, 2), torch.tensor(EXPERTS), cond).square().mean().backward()
        found.append({n: p.grad for n, p in own.trainable.named_parameters() if p.grad is not None})
    for part in model.components:
        once = {layer: count for layer, count in runs[0].items() if layer.startswith(f"{part}.")}
        assert once and {layer: runs[1][layer] for layer in once} == {layer: 2 * count for layer, count in once.items()}
    assert found[0] and found[0].keys() == found[1].keys()
    largest = max(float(g.abs().max()) for g in found[0].values())
    assert largest > 0
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6 * max(1.0, largest)), name


# ------------------------------------------------------------------------------------------------ learning and export

LORA = {"rank": 2, "alpha": 6}  # a reader that takes alpha for the rank is wrong by a factor of 3


def adapted(model, seed=0):
    """A policy on a fresh copy of the model whose adapters say something: B is no zero."""
    policy = Policy(load(model.path), lora=LORA, guidance=allowed(model)[-1], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.trainable.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


ADAPTED = {
    "cogvideox": 8, "cogvideox15": 8, "flux": 11, "flux2": 9, "flux2_klein": 9, "flux_kontext": 11, "flux_schnell": 11,
    "hunyuan_video": 15, "hunyuan_video15": 20, "ltx": 16, "qwen_image": 16, "qwen_image_edit": 16,
    "qwen_image_edit_plus": 16, "sana": 16, "sd15": 32, "sd21": 32, "sd3": 19, "sdxl": 32, "wan": 16, "wan22": 32,
    "wan22_i2v": 32, "wan22_ti2v": 16, "wan22_ti2v_image": 16, "wan_i2v": 20, "z_image": 16,
}  # fmt: skip
"""Layers that adapters go to by default; of a new family, count those of its attention by hand."""


def test_adapters_go_to_every_layer_of_attention(model):
    policy = Policy(load(model.path), lora=LORA)
    layers = [name for name, _ in policy.model.trainable.named_parameters() if "lora_A" in name]
    assert len(layers) == ADAPTED[model.path.removeprefix("tiny/")], layers


def changed(model, seed=0):
    """A policy on a fresh copy of the model that learns all weights, and has learnt something."""
    policy = Policy(load(model.path), guidance=allowed(model)[-1])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def said(policy, texts):
    """Velocities at times of both experts."""
    cond = policy.encode(texts, *([given] if (given := sources(policy.model, len(texts))) else []))
    eps = noise(policy.model, len(texts))
    return torch.cat([policy.velocity(eps, torch.full((len(texts),), t), cond) for t in EXPERTS])


def drawn_by_readme(model, folder, monkeypatch):
    """What the code in an export's README loads, and its settings, make of a prompt and the test's noise."""
    from torchvision.transforms.functional import to_pil_image

    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].splitlines()
    assert code[-1].startswith(("pipe(", "export_to_video("))
    monkeypatch.chdir(folder.parent)
    names = {}
    exec("\n".join(code[:-1]), names)
    pipe, settings = names["pipe"], names["settings"]
    pipe.set_progress_bar_config(disable=True)
    if given := sources(model, 1):
        pictures = [to_pil_image(picture) for picture in given[0]]
        settings["image"] = pictures if len(pictures) > 1 else pictures[0]
    latents = model.pipeline_latents(noise(model, 1))
    with torch.no_grad():
        return pipe(prompt=prompts(model)[0], latents=latents, output_type="latent", return_dict=False, **settings)[0]


def check_export(policy, folder, monkeypatch):
    """Equal latents in a fresh pipeline, that are not those of the base model."""
    model, text = policy.model, prompts(policy.model)[:1]
    with torch.no_grad():
        ours, base = (
            one.pipeline_output(
                sampled(one, text, noise(one, 1), policy.guidance, model.inference["num_inference_steps"])
            )
            for one in (model, load(model.path))
        )
    size = float(ours.abs().max().clamp(min=1))
    assert not torch.allclose(ours, base, atol=1e-2)
    theirs = drawn_by_readme(model, folder, monkeypatch)
    assert torch.allclose(theirs.float(), ours, atol=1e-5 * size), float((theirs - ours).abs().max()) / size


@pytest.mark.one_in(len(FORMATS))
@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_adapter_draws_the_same(model, form, tmp_path, monkeypatch):
    policy = adapted(model)
    tables = [comfyui.LAYOUTS.get(type(getattr(policy.model.pipe, name)).__name__) for name in policy.model.components]
    if form == "comfyui" and None in tables:
        with pytest.raises(ModelError, match="no table of ComfyUI's layer names.*Take format diffusers"):
            policy.export(tmp_path / "weights", form=form)
        return
    folder = policy.export(tmp_path / "weights", form=form)
    if form == "comfyui" and not all(table.importer for table in tables):
        assert "```" not in (folder / "README.md").read_text()  # tests/test_export.py checks its tensors
        return
    check_export(policy, folder, monkeypatch)


@pytest.mark.one_in(len(FORMATS))
@pytest.mark.parametrize("form", FORMATS)
def test_exported_weights_draw_the_same(model, form, tmp_path, monkeypatch):
    policy = changed(model)
    if form in ("peft", "comfyui"):
        with pytest.raises(ModelError, match="is for LoRA adapters"):
            policy.export(tmp_path / "weights", form=form)
        return
    check_export(policy, policy.export(tmp_path / "weights", form=form), monkeypatch)


@pytest.mark.one_in(4)
def test_exported_weights_are_read_again(model, tmp_path):
    text = prompts(model)[:1]
    for make in (adapted, changed):
        policy = make(model)
        folder = policy.export(tmp_path / make.__name__)
        own, frozen = make(model, seed=1), Policy(load(model.path), frozen=True, guidance=policy.guidance)
        with torch.no_grad():
            ours = said(policy, text)
            assert not torch.allclose(said(own, text), ours, atol=1e-4)
            for target in (own, frozen):
                load_weights(target, folder)
                assert torch.allclose(said(target, text), ours, atol=1e-5 * float(ours.abs().max().clamp(min=1)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", [adapted, changed])
def test_a_step_changes_what_is_trained_and_nothing_else(model, make):
    policy = make(model)
    modules = {name: getattr(policy.model.pipe, name) for name in policy.model.components}
    before = {name: {n: p.detach().clone() for n, p in part.named_parameters()} for name, part in modules.items()}
    trained = {id(parameter) for parameter in policy.trainable_parameters()}
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    said(policy, prompts(model)[:1]).square().mean().backward()
    optimizer.step()
    for name, part in modules.items():
        moved = {n for n, p in part.named_parameters() if not torch.equal(p, before[name][n])}
        learns = {n for n, p in part.named_parameters() if id(p) in trained}
        assert moved <= learns and len(moved) > len(learns) / 2, (name, learns - moved)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("make", [adapted, changed])
def test_a_state_goes_on_bit_by_bit(model, make):
    policy, other = make(model), make(model, seed=1)
    text = prompts(model)[:1]
    with torch.no_grad():
        ours = said(policy, text)
        assert not torch.equal(said(other, text), ours)
        other.load_state_dict(policy.state_dict())
        assert torch.equal(said(other, text), ours)
