"""HPSv3 on a tiny random Qwen2-VL in upstream's file layout, against transformers' own model and processor."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rewards import RewardError, RewardHub, Sample, build, traits_of
from rewards.hpsv3 import _QUESTION
from tests.rewards.makers import noise
from tests.rewards.test_reward_qwen2vl import chat, network_of, old_names, processor_of, shard, write_base

MARKS = ("<|Reward|>",)
PROMPTS = ["a red circle", "two {blue} squares, left of a star and above a green triangle", "", "Zwei Kreise, 2 ⭐!"]


def tiny(folder):
    """A base without weights, and HPSv3.safetensors in the old layout: options with which the reward uses them."""
    base = write_base(folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = {}
        for index, (rows, columns) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
            head[f"rm_head.{index}.weight"] = torch.randn(rows, columns) / columns**0.5
            head[f"rm_head.{index}.bias"] = 0.1 * torch.randn(rows)
    save_file({**old_names(network_of(base, MARKS).state_dict()), **head}, folder / "HPSv3.safetensors")
    return {"model": str(folder), "base": str(base)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("hpsv3"))


def loaded(options, dtype=torch.float32, **more):
    reward = build("hpsv3", {**options, **more})
    reward.load(torch.device("cpu"), dtype)
    return reward


@pytest.fixture(scope="module")
def reward(options):
    return loaded(options)


def tall_and_small():
    """Pictures of different sizes with prompts of different lengths."""
    sizes = [(448, 448), (96, 160), (700, 300), (64, 64)]
    pictures = [torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    return [Sample(media=media, prompt=prompt) for media, prompt in zip(pictures, PROMPTS, strict=True)]


# ------------------------------------------------------------------------------------------------ the score


@torch.no_grad()
def by_hand(options, sample, question=_QUESTION, positions="1-D"):
    """mu and sigma by transformers' model and processor, and the head written out; a picture that keeps its size."""
    tensors = load_file(f"{options['model']}/HPSv3.safetensors")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rm_head.")}
    model = network_of(options["base"], MARKS)
    theirs = old_names(model.state_dict())
    assert all(torch.equal(value, theirs[name]) for name, value in tensors.items())  # it is the network of the file
    processor = processor_of(options["base"], MARKS)
    text = chat(question.replace("{prompt}", sample.prompt), "image")
    inputs = processor(text=text, images=sample.media, do_rescale=False, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
    if positions == "1-D":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    hidden = model.model(**inputs).last_hidden_state
    mark = processor.tokenizer.convert_tokens_to_ids(MARKS[0])
    state = hidden[0, inputs["input_ids"][0].tolist().index(mark)]
    for index in (0, 3, 5):
        state = F.linear(state if index == 0 else state.relu(), head[f"rm_head.{index}.weight"],
                         head[f"rm_head.{index}.bias"])  # fmt: skip
    return state.tolist()


def test_it_is_mu_of_the_head_at_the_reward_token(reward, options):
    sample = noise(0, 448, prompt="a {red} circle")
    scores = reward.score([sample])
    mu, sigma = by_hand(options, sample)
    assert scores.value.tolist() == scores.parts["mu"].tolist() == pytest.approx([mu], abs=1e-5)
    assert scores.parts["sigma"].tolist() == pytest.approx([sigma], abs=1e-5)
    assert abs(mu - sigma) > 0.01


def test_positions_are_not_three_dimensional(reward, options):
    sample = noise(0, 448, prompt="a red circle")
    one = reward.score([sample]).value.item()
    assert one == pytest.approx(by_hand(options, sample)[0], abs=1e-5)
    assert abs(one - by_hand(options, sample, positions="m-RoPE")[0]) > 1e-3


def test_the_users_template_is_what_is_asked(options, tmp_path):
    (tmp_path / "theirs.txt").write_text("\nHow {good} is it? \n{text_prompt}\n\n<|Reward|>\n\nEND\n")
    sample = noise(0, 448, prompt="a {red} circle {text_prompt}")
    asked = "\nHow {good} is it? \n{prompt}\n\n<|Reward|>\n\nEND\n"
    score = loaded(options, template=str(tmp_path / "theirs.txt")).score([sample]).value.item()
    assert score == pytest.approx(by_hand(options, sample, asked)[0], abs=1e-5)
    assert abs(score - loaded(options).score([sample]).value.item()) > 1e-3


def test_a_batch_changes_nothing_and_keeps_the_order(reward):
    samples = tall_and_small()
    alone = [reward.score([sample]).value.item() for sample in samples]
    assert reward.score(samples).value.tolist() == pytest.approx(alone, abs=1e-5)
    assert reward.score(samples[::-1]).value.tolist() == pytest.approx(alone[::-1], abs=1e-5)
    assert len({round(value, 4) for value in alone}) == len(alone)


def test_the_gradient_reaches_pictures_of_all_sizes(reward):
    samples = tall_and_small()
    for sample in samples:
        sample.media.requires_grad_()
    reward.score(samples).value.sum().backward()
    for sample in samples:
        assert sample.media.grad.isfinite().all()
        assert (sample.media.grad != 0).float().mean() > 0.5


def test_the_gradient_is_that_of_finite_differences(reward):
    sample = noise(5, 64, prompt="a red circle")
    media = sample.media.clone().requires_grad_()
    reward.score([Sample(media=media, prompt=sample.prompt)]).value.sum().backward()
    direction = media.grad / media.grad.norm()
    step = 0.05

    def at(shift):
        return reward.score([Sample(media=sample.media + shift * direction, prompt=sample.prompt)]).value.item()

    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(media.grad.norm().item(), rel=0.1)


def test_the_head_stays_fp32_with_a_bf16_network(reward, options):
    half = loaded(options, torch.bfloat16)
    assert {p.dtype for p in half._network._backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half._network._head.parameters()} == {torch.float32}
    sample = noise(0, 448, prompt="a red circle")
    heads = []
    half._network._head.register_forward_hook(lambda module, given, out: heads.append((given[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        score = half.score([sample])
    (given, out), = heads  # fmt: skip
    assert given.dtype == out.dtype == score.value.dtype == torch.float32
    assert torch.equal(half._network._head(given), out)  # outside of any autocast
    assert score.value.item() == pytest.approx(reward.score([sample]).value.item(), abs=0.01)


def test_frozen_and_in_evaluation(reward):
    network = reward._network
    for module in (network._backbone, network._head):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_by_the_hub(options):
    with RewardHub({"use": "hpsv3", "on_error": "raise", **options}) as hub:
        hub.warmup()
        samples = tall_and_small()
        samples[2] = Sample(media=samples[2].media.requires_grad_(), prompt=samples[2].prompt)
        plain, graph = hub(samples).total, hub.differentiate(samples).total
    torch.testing.assert_close(plain, graph.detach(), atol=1e-5, rtol=1e-5)
    graph.sum().backward()
    assert samples[2].media.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_control_token_has_no_verdict(reward, token):
    samples = [noise(0, 64, prompt=f"a {token} circle"), noise(1, 64, prompt="a red circle")]
    scores = reward.score(samples)
    assert scores.value.isnan().tolist() == [True, False]
    assert f"{token!r} in it" in scores.info[0]["error"] and not scores.info[1]
    assert scores.value[1].item() == pytest.approx(reward.score(samples[1:]).value.item(), abs=1e-5)
    assert reward.score(samples[:1]).value.isnan().tolist() == [True]


def test_a_thread_of_a_picture_has_no_verdict(reward):
    scores = reward.score([Sample(media=torch.rand(3, 2, 500), prompt="a line")])
    assert scores.value.isnan().all() and "too narrow" in scores.info[0]["error"]


# ------------------------------------------------------------------------------------------------ files


def with_tensors(options, folder, change):
    """The same options with other weights."""
    tensors = load_file(f"{options['model']}/HPSv3.safetensors")
    change(tensors)
    save_file(tensors, folder / "HPSv3.safetensors")
    return {**options, "model": str(folder)}


def test_shards_and_the_new_layout_are_read_too(options, reward, tmp_path):
    sample = noise(0, 64, prompt="a red circle")
    folder = shard(f"{options['model']}/HPSv3.safetensors", tmp_path / "shards")
    assert torch.equal(loaded({**options, "model": str(folder)}).score([sample]).value, reward.score([sample]).value)

    def renew(tensors):
        head = {name: tensors[name] for name in list(tensors) if name.startswith("rm_head.")}
        tensors.clear()
        tensors.update({**network_of(options["base"], MARKS).state_dict(), **head})

    renewed = loaded(with_tensors(options, tmp_path, renew))
    assert torch.equal(renewed.score([sample]).value, reward.score([sample]).value)
    by_file = loaded({**options, "model": str(tmp_path / "HPSv3.safetensors")})
    assert torch.equal(by_file.score([sample]).value, reward.score([sample]).value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda tensors: tensors.pop("rm_head.5.weight"), r"rm_head of .*1 missing \(5.weight\)"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "rm_head" in name], "6 missing"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(language_model.layers.1.mlp"),
        (lambda tensors: tensors.pop("visual.merger.ln_q.weight"), r"1 missing \(visual.merger.ln_q.weight"),
        (
            lambda tensors: tensors.update({"model.layers.9.x": torch.ones(1)}),
            r"1 unexpected \(language_model.layers.9",
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(400, 32)}),
            r"1 of another size \(language_model.embed_tokens.weight \[400, 32\] instead of \[265, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(options, tmp_path, change, pattern):
    with pytest.raises(RewardError, match=pattern) as caught:
        loaded(with_tensors(options, tmp_path, change))
    assert "Mend: give" in str(caught.value)


def test_what_is_missing_is_named(options, tmp_path, monkeypatch):
    with pytest.raises(RewardError, match=r"has no HPSv3.safetensors.*hf download"):
        loaded({**options, "model": str(tmp_path)})
    with pytest.raises(RewardError, match=r"hpsv3.*cannot be loaded.*Mend: fetch it.*hf download"):
        loaded({**options, "base": str(tmp_path)})
    (write_base(tmp_path / "mute") / "chat_template.json").unlink()
    with pytest.raises(RewardError, match=r"has no chat template.*chat_template.json"):
        loaded({**options, "base": str(tmp_path / "mute")})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"HPSv3.safetensors of 'MizzenAI/HPSv3' cannot be had"):
        loaded({})


def test_what_it_declares(options):
    traits = traits_of(build("hpsv3", options))
    assert traits.differentiable and traits.deterministic and traits.range is None and traits.media == {"image"}
    assert "template" in traits.card.note and traits.card.memory_gb == 16.6


def test_unloaded_it_has_nothing_to_score_with(options):
    reward = loaded(options)
    reward.unload()
    with pytest.raises(RewardError, match="'hpsv3' is not loaded"):
        reward.score([noise()])
