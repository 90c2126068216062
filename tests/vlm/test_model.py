"""Loading vision-language models, what of them learns, their tokens, and the logits that are made of their states."""

import json

import pytest
import torch
from torch import nn

from flowrl.models.pipeline import ModelError
from flowrl.vlm import tiny
from flowrl.vlm.collate import asked
from flowrl.vlm.generate import begin
from flowrl.vlm.model import ImageTextModel, pictures_of, resolve, with_pictures
from tests.vlm.policies import NAMES, QUESTIONS, load, picture, written_out

pytestmark = pytest.mark.slow

VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
INSIDE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
"""Classes whose projector is a part of the vision tower."""


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in NAMES}


@pytest.fixture
def folder(tmp_path):
    return tiny.build("llava", tmp_path / "llava")


# ------------------------------------------------------------------------------------------------ finding and loading


def test_a_tiny_model_is_built_once_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWRL_CACHE", str(tmp_path))
    first = resolve("tiny/llava")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert first.startswith(str(tmp_path)) and written
    assert resolve("tiny/llava") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    assert ImageTextModel.load("tiny/llava").trainable.num_parameters() == load("llava").trainable.num_parameters()


def test_a_folder_and_a_hub_id_are_told_apart(folder):
    assert resolve(folder) == str(folder) and resolve("owner/name") == "owner/name"
    made = ImageTextModel.load(folder, dtype=torch.bfloat16, attention="eager")
    assert made.dtype == torch.bfloat16 and made.trainable.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("no such", "there is no such folder.*shapes_vlm"),
        ("tiny/llama", "no such tiny.*llava"),
        ("{empty}", "has no config.json"),
    ],
)
def test_a_path_that_is_no_model(path, match, tmp_path):
    with pytest.raises(ModelError, match=match):
        resolve(path.format(empty=tmp_path))


def test_a_folder_without_a_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="image_processor|cannot be read"):
        ImageTextModel.load(folder)


def test_a_folder_without_a_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template.*chat_template.jinja"):
        ImageTextModel.load(folder)


def test_a_model_of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="cannot be read or used as a vision-language model"):
        ImageTextModel.load(folder)


def test_weights_that_are_not_safetensors(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read.*safetensors"):
        ImageTextModel.load(folder)


def test_a_model_that_does_not_say_how_answers_end(models):
    model = models["llava"]
    processor, network = model.processor, model.trainable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.generation_config, "eos_token_id", [258, 7])
        assert ImageTextModel(network, processor).ends == [258, 7]
        patch.setattr(network.generation_config, "eos_token_id", None)
        assert ImageTextModel(network, processor).ends == [processor.tokenizer.eos_token_id]
        processor.tokenizer.eos_token, end = None, processor.tokenizer.eos_token
        try:
            with pytest.raises(ModelError, match="eos_token_id"):
                ImageTextModel(network, processor)
        finally:
            processor.tokenizer.eos_token = end


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_banned_but_for_the_ends(models, name):
    model = models[name]
    special = {i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    banned = set(model.banned.tolist())
    assert banned == special - set(model.ends) and model.processor.image_token_id in banned
    assert not banned & set(model.ends) and model.pad_id in model.ends


def test_rows_of_the_embedding_without_a_token_are_banned(folder):
    network = ImageTextModel.load(folder).trainable
    network.resize_token_embeddings(300)
    network.save_pretrained(folder)
    model = ImageTextModel.load(folder, allow=["<|im_start|>"])
    assert set(range(260, 300)) < set(model.banned.tolist()) and 257 not in model.banned.tolist()
    assert 259 in ImageTextModel.load(folder, allow=["<image>"]).banned.tolist()  # never a picture's
    with pytest.raises(ModelError, match="no token '<nope>'"):
        ImageTextModel.load(folder, allow=["<nope>"])


@pytest.mark.parametrize("name", NAMES)
def test_the_text_that_stands_for_a_picture_is_the_chat_templates(models, name):
    model = models[name]
    text = model.processor.apply_chat_template(list(asked("§ what", [None] * 2)), tokenize=False)
    assert f"{model.picture * 2}§ what" in text
    part = model.foreign("", [picture(0), picture(1, 90, 30)])
    assert model.processor.image_token_id in part.ids.tolist() and part.media


def test_answers_are_read_without_what_ends_them(models):
    model = models["qwen2_vl"]
    ids = [*model.encode("a</think> b"), model.processor.image_token_id, *model.encode("c"), *model.ends]
    assert model.decode(ids) == model.decode(torch.tensor(ids)) == "a</think> bc"


@pytest.mark.parametrize("name", NAMES)
def test_foreign_text_holds_no_control_tokens(models, name):
    model = models[name]
    end, image = model.tokenizer.convert_ids_to_tokens([model.ends[0], model.processor.image_token_id])
    nasty = f"a{end}b{image}c{end[:3]}{image}{end[3:]}d"
    assert model.harmless(nasty) == "abcd"
    ids = model.foreign(nasty, template="{text}" + end).ids.tolist()
    assert ids == [*model.encode("abcd"), model.ends[0]]
    with pytest.raises(ModelError, match="control token"):
        model.prepare(asked(f"what is {image}?", [picture(0)]))


def test_a_solution_ends_like_an_answer(models):
    model = models["llava"]
    assert model.prepare(asked("1 + 1"), solution="2").solution.tolist() == [*model.encode("2"), model.ends[0]]
    assert model.prepare(asked("1 + 1")).solution is None


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_that_cannot_be_written_is_refused(models, name):
    """Its log-prob would be minus infinity, and the loss with it."""
    model = models[name]
    end = model.tokenizer.convert_ids_to_tokens(model.ends[0])
    for token in (model.picture, end):
        with pytest.raises(ModelError, match=r"cannot be learnt.*leave the row's `solution` out"):
            model.prepare(asked("1 + 1"), solution=f"it is {token} 2")


def test_messages_are_left_as_they_are(models):
    talk = asked("what?", [picture(0)], system="short")
    before = [dict(message) for message in talk]
    models["llava"].prepare(talk)
    assert [dict(message) for message in talk] == before
    assert pictures_of(talk) == [talk[1]["content"][0]["image"]]
    other = with_pictures(talk, ["x"])
    assert pictures_of(other) == ["x"] and pictures_of(talk) != ["x"] and other[0] == talk[0]
    assert with_pictures([{"role": "user", "content": "text"}], []) == ({"role": "user", "content": "text"},)


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_the_softmax_of_the_models_own_logits(models, name):
    """With positions and the last layer of ours, against the model's own forward pass that is left to itself."""
    model = models[name]
    batch = written_out(model, [begin(model.prepare(asked(*question)), ()) for question in QUESTIONS])
    with torch.no_grad():
        states, _ = model.states(batch)
        logits = model.trainable(**batch).logits
    for tau in (0.7, 1.0):
        ours = model.logprobs(states[:, -1], tau)
        wanted = (logits[:, -1].double() / tau).index_fill(-1, model.banned, -torch.inf).log_softmax(-1)
        assert torch.allclose(ours.double(), wanted, atol=2e-5)
    assert (ours.exp()[:, model.banned] == 0).all() and "forward" not in vars(model.trainable.lm_head)


def test_soft_caps_are_heard_and_other_heads_refused(models):
    model = load("llava")
    states = torch.randn(3, 32)
    plain = model._logits(states)
    model._softcap = 5.0
    assert torch.allclose(model._logits(states), 5 * torch.tanh(plain / 5))
    batch = written_out(model, [begin(model.prepare(asked(*QUESTIONS[0])), ())])
    with pytest.raises(ModelError, match="more than a linear layer"):  # for this model has no cap
        model.states(batch)


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_is_a_prompt_like_any_other(models, name):
    model = models[name]
    frames = [torch.randint(0, 255, (4, 3, 56, 56), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    talks = [
        [{"role": "user", "content": [{"type": "video", "video": one.byte()}, {"type": "text", "text": "what?"}]}]
        for one in frames
    ]
    inputs = [model.prepare(talk) for talk in talks] + [model.prepare(asked(*QUESTIONS[1]))]
    batch = written_out(model, [begin(one, ()) for one in inputs])
    with torch.no_grad():
        states, _ = model.states(batch)
        for row, one in enumerate(inputs):
            alone = model.trainable(**written_out(model, [begin(one, ())])).logits[0, -1]
            assert torch.allclose(model._logits(states[row, -1]), alone, atol=2e-5)
    assert not torch.allclose(states[0, -1], states[1, -1], atol=1e-3)


# ------------------------------------------------------------------------------------------------ what learns


@pytest.mark.parametrize("name", NAMES)
def test_vision_tower_and_projector_can_be_frozen(models, name):
    from flowrl.vlm.policy import TextPolicy

    tower = {n for n, m in models[name].trainable.named_modules() if m is models[name].trainable.get_encoder("image")}
    assert len(tower) == 1
    inside = f"{tower.pop()}."
    learning = {}
    for vision, projector in ((True, None), (True, False), (False, None)):
        model = load(name, freeze_vision=vision, freeze_projector=projector)
        policy = TextPolicy(model)
        batch = written_out(model, [begin(model.prepare(asked(*QUESTIONS[0])), ())])
        model.states(batch)[0].sum().backward()
        reached = {n for n, p in policy._parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        learning[vision, projector] = set(policy._parameters)
        assert any(n.startswith(inside) for n in reached) == (not vision)
        assert not [
            n for n, p in model.trainable.named_parameters() if p.grad is not None and n not in policy._parameters
        ]
    text, joints, everything = learning.values()
    assert text and not any(n.startswith(inside) for n in joints) and everything > joints
    assert (text == joints) == (name in INSIDE)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_stay_out_of_what_is_frozen(models, name):
    model = models[name]
    language = {id(m) for m in model.trainable.get_decoder().modules()}
    modules = dict(model.trainable.named_modules())
    assert all(id(modules[n]) in language and isinstance(modules[n], nn.Linear) for n in model.lora_targets)
    assert len(model.lora_targets) == 14  # 2 layers of 7
    assert "lm_head" not in model.lora_targets
    found = model.layers(["q_proj", "qkv"])
    assert len(found) == 2 and set(found) < set(model.lora_targets)  # CLIP's q_proj is not among them
    with pytest.raises(ModelError, match="no linear layer .* is called nope"):
        model.layers(["nope"])
    open_ = load(name, freeze_vision=False)
    assert set(open_.lora_targets) == set(model.lora_targets) and len(open_.layers(["q_proj", "qkv"])) == 4


def test_forgetting_activations_changes_no_gradient():
    grads, kept = [], []
    for forget in (False, True):
        model = load("qwen2_vl")
        model.trainable.get_decoder().requires_grad_(True)
        if forget:
            model.enable_gradient_checkpointing()
        batch = written_out(model, [begin(model.prepare(asked(*question)), ()) for question in QUESTIONS])
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            states, _ = model.states(batch)
        states.pow(2).sum().backward()
        grads.append([p.grad for p in model.trainable.get_decoder().parameters()])
        kept.append(sum(saved))
        assert not any(m.training for m in model.trainable.modules())
        with torch.no_grad():  # and the cache still works
            assert model.states(batch, use_cache=True)[1].get_seq_length() == batch["input_ids"].shape[1]
    assert kept[1] < kept[0] / 2
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads, strict=True))


def test_a_value_head_starts_at_zero():
    model = load("llava", value_head=True)
    assert model.values(torch.randn(2, 5, 32)).tolist() == [[0.0] * 5] * 2
    with pytest.raises(ModelError, match="value_head=True"):
        load("llava").values(torch.randn(2, 32))


def test_the_processor_takes_options():
    large = ImageTextModel.load("tiny/qwen2_vl").prepare(asked("x", [picture(0, 112, 112)]))
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    small = ImageTextModel.load("tiny/qwen2_vl", processor={"size": size}).prepare(asked("x", [picture(0, 112, 112)]))
    assert len(small.ids) < len(large.ids)
