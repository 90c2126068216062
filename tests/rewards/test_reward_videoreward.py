"""VideoReward on a tiny random Qwen2-VL in upstream's file layout, against transformers' own model and processor."""

import json
from dataclasses import replace

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build, traits_of
from rewards.preprocess import resize
from rewards.videoreward import _QUESTION, _frames
from tests.rewards.makers import noise
from tests.rewards.test_reward_qwen2vl import chat, network_of, old_names, processor_of, write_base

MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
NORM = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121}
CONFIG = {
    "data_config": {
        "meta_data": "x.csv", "data_dir": "x", "fps": 2.0, "num_frames": None, "max_frame_pixels": 200704,
        "sample_type": "uniform", "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special",
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": False, "lora_r": 16, "lora_alpha": 32},
    "inference_config": NORM,
}  # fmt: skip


def head_of(outputs):
    return torch.randn(outputs, 32, generator=torch.Generator().manual_seed(2))


def write(folder, tensors, step=11352, **config):
    """A checkpoint as upstream's training leaves it."""
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    torch.save(tensors, folder / f"checkpoint-{step}" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps({**CONFIG, **config}))
    return str(folder)


def tiny(folder, outputs=1):
    """A base without weights and a checkpoint of three values at three tokens: options for the reward."""
    base = write_base(folder / "base")
    tensors = {**old_names(network_of(base, MARKS).state_dict()), "rm_head.weight": head_of(outputs)}
    return {"model": write(folder / "model", tensors), "base": str(base)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def tensors(options):
    return torch.load(f"{options['model']}/checkpoint-11352/model.pth", weights_only=True)


def loaded(options, dtype=torch.float32, **more):
    reward = build("videoreward", {**options, **more})
    reward.load(torch.device("cpu"), dtype)
    return reward


@pytest.fixture(scope="module")
def reward(options):
    return loaded(options)


def film(seed=0, size=336, frames=4, **fields):
    """336 x 336 is kept as it is, and so are 4 frames."""
    return noise(seed, size, frames=frames, **{"fps": 8.0, "prompt": "a red circle", **fields})


def parts_of(reward, *samples):
    parts = reward.score(samples).parts
    return {key: parts[key].tolist() for key in ("VQ", "MQ", "TA")}


# ------------------------------------------------------------------------------------------------ the score


@torch.no_grad()
def by_hand(options, sample, outputs=1, positions="1-D", model=None):
    """VQ, MQ and TA by transformers' model and processor; a video that keeps its size and its frames."""
    model = model or network_of(options["base"], MARKS)
    processor = processor_of(options["base"], MARKS)
    text = chat(_QUESTION.replace("{prompt}", sample.prompt), "video")
    inputs = processor(text=text, videos=[sample.media], do_rescale=False, do_resize=False, return_tensors="pt")
    patches = sample.media.shape[-1] // 14
    assert inputs["video_grid_thw"].tolist() == [[len(sample.media) // 2, patches, patches]]
    if positions == "1-D":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    hidden = model.model(**inputs).last_hidden_state[0]
    ids = inputs["input_ids"][0].tolist()
    values = {}
    for place, mark in enumerate(MARKS):
        state = hidden[ids.index(processor.tokenizer.convert_tokens_to_ids(mark))]
        raw = (state @ head_of(outputs)[place if outputs == 3 else 0]).item()
        key = mark[2:4]
        values[key] = (raw - NORM[f"{key}_mean"]) / NORM[f"{key}_std"]
    return values


def test_three_values_at_three_tokens_each_normalised(reward, options):
    sample = film(prompt="a {red} circle")
    scores, expected = reward.score([sample]), by_hand(options, sample)
    for key, value in expected.items():
        assert scores.parts[key].tolist() == pytest.approx([value], abs=1e-4)
    assert scores.value.tolist() == scores.parts["Overall"].tolist()
    assert scores.value.tolist() == pytest.approx([sum(expected.values())], abs=1e-4)


@pytest.mark.parametrize(
    ("size", "told", "seen"),
    [(64, None, 336), (560, None, 448), (560, 200704, 448), (448, 112896, 336)],  # 128, 256, 256 and 144 x 28 x 28
)
def test_frames_are_resized_within_bounds(options, tensors, tmp_path, size, told, seen):
    """At least 128 x 28 x 28 pixels, and at most what the settings say, or 256 x 28 x 28."""
    data = {**CONFIG["data_config"], "max_frame_pixels": told}
    bounded = loaded({**options, "model": write(tmp_path / "bounded", tensors, data_config=data)})
    sample = film(0, size)
    expected = by_hand(options, replace(sample, media=resize(sample.media, seen, seen)))
    assert {key: value[0] for key, value in parts_of(bounded, sample).items()} == pytest.approx(expected, abs=1e-4)


def test_positions_are_not_three_dimensional(reward, options):
    sample = film()
    other = by_hand(options, sample, positions="m-RoPE")
    assert all(abs(value[0] - other[key]) > 1e-4 for key, value in parts_of(reward, sample).items())


def test_a_head_with_three_outputs_gives_each_token_its_own(options, tensors, tmp_path):
    folder = write(tmp_path / "three", {**tensors, "rm_head.weight": head_of(3)})
    three, sample = loaded({**options, "model": folder}), film()
    expected = by_hand(options, sample, outputs=3)
    assert {key: value[0] for key, value in parts_of(three, sample).items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dimension", ["VQ", "MQ", "TA"])
def test_one_of_them_can_be_the_score(options, dimension):
    scores = loaded(options, dimension=dimension).score([film(0), film(1)])
    assert scores.value.tolist() == scores.parts[dimension].tolist()
    assert scores.parts[dimension].tolist() != scores.parts["Overall"].tolist()


def test_without_an_inference_config_values_stay_as_they_are(options, tensors, reward, tmp_path):
    raw = loaded({**options, "model": write(tmp_path / "raw", tensors, inference_config=None)})
    sample = film()
    normed = parts_of(reward, sample)
    for key, value in parts_of(raw, sample).items():
        assert (value[0] - NORM[f"{key}_mean"]) / NORM[f"{key}_std"] == pytest.approx(normed[key][0], abs=1e-4)


def test_the_prompt_decides_only_the_alignment(reward):
    """It stands in the last block of the question, and a causal network looks back alone."""
    first, second = (parts_of(reward, film(prompt=prompt)) for prompt in ("a red circle", "two blue squares"))
    assert first["VQ"] == pytest.approx(second["VQ"], abs=1e-5)
    assert first["MQ"] == pytest.approx(second["MQ"], abs=1e-5)
    assert abs(first["TA"][0] - second["TA"][0]) > 1e-3


def test_a_batch_changes_nothing(reward):
    samples = [
        film(0, 336, 4, prompt="a red circle"),
        film(1, 64, 8, prompt="two {blue} squares, left of a star and above a green triangle"),
        film(2, 400, 40, prompt="", fps=10.0),
    ]
    alone = [parts_of(reward, sample) for sample in samples]
    for key, values in parts_of(reward, *samples).items():
        assert values == pytest.approx([one[key][0] for one in alone], abs=1e-5)


def test_frames_in_another_order_are_another_video(reward):
    sample = film()
    turned = Sample(media=sample.media.flip(0), prompt=sample.prompt, fps=sample.fps)
    assert abs(parts_of(reward, sample)["MQ"][0] - parts_of(reward, turned)["MQ"][0]) > 1e-4


def test_the_gradient_reaches_the_frames_that_are_looked_at(reward):
    media = film(0, 64, 17).media.requires_grad_()
    reward.score([Sample(media=media, prompt="a red circle", fps=24.0)]).value.sum().backward()
    reached = [frame for frame, grad in enumerate(media.grad) if grad.abs().max() > 0]
    assert reached == [0, 5, 11, 16]
    assert media.grad.isfinite().all()


def test_a_bf16_network_with_an_fp32_head(options, reward):
    half = loaded(options, torch.bfloat16)
    assert half._network._head.weight.dtype == torch.float32
    assert {p.dtype for p in half._network._backbone.parameters()} == {torch.bfloat16}
    sample = film()
    assert half.score([sample]).value.item() == pytest.approx(reward.score([sample]).value.item(), abs=0.2)


def test_the_hub_runs_it(options):
    with RewardHub({"use": "videoreward", "on_error": "raise", **options}) as hub:
        hub.warmup()
        assert hub([film(0, 64), film(1, 64)]).total.isfinite().all()


# ------------------------------------------------------------------------------------------------ frames


def even_number(count, fps):
    """By trying all: the one nearest to two a second, at least 4 of them; of two that are equally near 4, 8, 12, ..."""
    most = max(number for number in range(2, min(count, 768) + 1) if number % 2 == 0)
    aim = min(max(2 * count / fps, 4), most)
    return min(range(2, most + 1, 2), key=lambda number: (abs(number - aim), number % 4))


@pytest.mark.parametrize("fps", [1.0, 2.0, 7.5, 8.0, 16.0, 24.0, 29.97])
def test_how_many_frames_are_looked_at_and_which(fps):
    for count in [*range(2, 60), 81, 121, 2000]:
        places = _frames(count, count / fps * 2.0)
        assert len(places) == even_number(count, fps)
        assert places[0] == 0 and places[-1] == count - 1
        exact = [(count - 1) * k / (len(places) - 1) for k in range(len(places))]
        assert all(abs(place - wanted) <= 0.5 + 1e-4 for place, wanted in zip(places, exact, strict=True))
        assert len(set(places)) == len(places)


def test_frames_worked_out_by_hand():
    assert _frames(17, 17 / 24 * 2) == [0, 5, 11, 16]
    assert _frames(81, 81 / 16 * 2) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]  # 10.1 are asked for
    assert _frames(3, 0.1) == [0, 2]
    assert _frames(40, 2, fixed=True) == [0, 39]


def test_a_fixed_number_of_frames_needs_no_fps(options, tensors, tmp_path):
    data = {**CONFIG["data_config"], "num_frames": 2}
    fixed = loaded({**options, "model": write(tmp_path / "fixed", tensors, data_config=data)})
    media = film(0, 336, 9).media
    whole = fixed.score([Sample(media=media, prompt="a")]).value
    ends = fixed.score([Sample(media=media[[0, -1]], prompt="a", fps=1.0)]).value
    assert whole.tolist() == pytest.approx(ends.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (film(0, 64, 1), "one frame has no motion"),
        (film(0, 64, 4, fps=None), "set Sample.fps"),
        (film(0, 64, 4, prompt="a <|TA_reward|>"), "'<|TA_reward|>' in it"),
        (film(0, 64, 4, prompt="a <|video_pad|>"), "'<|video_pad|>' in it"),
    ],
)
def test_what_cannot_be_judged_has_no_verdict(reward, sample, why):
    scores = reward.score([sample, film(1, 64)])
    assert scores.value.isnan().tolist() == [True, False]
    assert why in scores.info[0]["error"] and not scores.info[1]
    assert all(part.isnan().tolist() == [True, False] for part in scores.parts.values())
    assert reward.score([sample]).value.isnan().tolist() == [True]


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_that_is_kept_apart_is_added(options, tmp_path, rslora):
    """The state of a real peft model of the reward's network, as upstream's training saves it."""
    import peft

    model = network_of(options["base"], MARKS)
    model.rm_head = torch.nn.Linear(32, 1, bias=False)
    model.rm_head.weight.data = head_of(1)
    lora = {"r": 4, "lora_alpha": 6, "use_rslora": rslora}
    targets = ["q_proj", "v_proj", "up_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora, target_modules=targets, bias="none")).eval()
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.data = 0.3 * torch.randn_like(weight)
    tensors = wrapped.state_dict()
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight" in tensors
    said = {"lora_enable": True, "lora_r": 4, "lora_alpha": 6, "use_rslora": rslora}
    folder = write(tmp_path / "lora", old_names(tensors), peft_lora_config=said)
    sample = film()
    expected = by_hand(options, sample, model=wrapped.base_model.model)
    found = parts_of(loaded({**options, "model": folder}), sample)
    assert {key: value[0] for key, value in found.items()} == pytest.approx(expected, abs=1e-4)
    plain = by_hand(options, sample)
    assert all(abs(plain[key] - value) > 1e-3 for key, value in expected.items())
    unsaid = write(tmp_path / "unsaid", old_names(tensors))
    with pytest.raises(RewardError, match="unexpected .*lora_A"):
        loaded({**options, "model": unsaid})


def test_the_last_of_several_checkpoints_is_read(options, tensors, reward, tmp_path):
    write(tmp_path / "run", {**tensors, "rm_head.weight": torch.zeros(1, 32)}, step=900)
    (tmp_path / "run" / "checkpoint-final").mkdir()
    folder = write(tmp_path / "run", tensors, step=1000)
    sample = film(0, 64)
    assert loaded({**options, "model": folder}).score([sample]).value.equal(reward.score([sample]).value)


def test_a_checkpoint_itself_can_be_given(options, tensors, reward, tmp_path):
    """Then its settings are one folder above, or beside it; and no other checkpoint is looked for."""
    folder, sample = write(tmp_path / "run", tensors, step=900), film(0, 64)
    write(tmp_path / "run", {**tensors, "rm_head.weight": torch.zeros(1, 32)}, step=1000)
    file, expected = tmp_path / "run" / "checkpoint-900" / "model.pth", reward.score([sample]).value
    assert loaded({**options, "model": str(file)}).score([sample]).value.equal(expected)
    settings = tmp_path / "run" / "model_config.json"
    settings.replace(file.parent / settings.name)
    assert loaded({**options, "model": str(file)}).score([sample]).value.equal(expected)
    (file.parent / settings.name).unlink()
    with pytest.raises(RewardError, match=r"model.pth is a file, and around it there is no model_config.json"):
        loaded({**options, "model": str(file)})
    assert folder == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"rm_head.weight": None}, r"rm_head of .*1 missing \(weight\)"),
        ({"rm_head.weight": torch.ones(4, 32)}, "4 outputs; expected 1 or 3"),
        ({"model.norm.weight": None}, r"1 missing \(language_model.norm.weight"),
        ({"rm_head.bias": torch.ones(1)}, r"1 unexpected \(bias\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options, tensors, tmp_path, change, pattern):
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(RewardError, match=pattern):
        loaded({**options, "model": write(tmp_path / "other", changed)})


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"model_config": {"use_special_tokens": False}}, "use_special_tokens = False; only checkpoints with True"),
        ({"data_config": {"sample_type": "multi_pts"}}, "sample_type = 'multi_pts'"),
        ({"inference_config": {"VQ_mean": 1}}, r"is no model_config.json of VideoReward \(KeyError: 'MQ_mean'"),
        ({"peft_lora_config": {"lora_enable": True}}, "KeyError: 'lora_r'"),
    ],
)
def test_settings_that_are_not_understood_are_refused(options, tensors, tmp_path, config, pattern):
    with pytest.raises(RewardError, match=pattern):
        loaded({**options, "model": write(tmp_path / "odd", tensors, **config)})


def test_what_is_missing_is_named(options, tensors, tmp_path, monkeypatch):
    with pytest.raises(RewardError, match=r"has no model_config.json.*hf download"):
        loaded({**options, "model": str(tmp_path)})
    (tmp_path / "model_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(RewardError, match=r"has no checkpoint-11352/model.pth"):
        loaded({**options, "model": str(tmp_path)})
    (tmp_path / "model_config.json").write_text("{")
    with pytest.raises(RewardError, match=r"is no model_config.json of VideoReward \(JSONDecodeError"):
        loaded({**options, "model": str(tmp_path)})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"model_config.json of 'KwaiVGI/VideoReward' cannot be had"):
        loaded({})


def test_what_it_declares(options):
    traits = traits_of(build("videoreward", options))
    assert traits.media == {"video"} and traits.differentiable and traits.deterministic and traits.range is None
    assert "template" in traits.card.note
    assert [weights.source for weights in traits.card.weights] == ["KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"]
    with pytest.raises(RewardError, match="dimension is 'XX'; expected Overall, VQ, MQ or TA"):
        build("videoreward", {**options, "dimension": "XX"})


def test_unloaded_it_has_nothing_to_score_with(options):
    reward = loaded(options)
    reward.unload()
    with pytest.raises(RewardError, match="'videoreward' is not loaded"):
        reward.score([film(0, 64)])
