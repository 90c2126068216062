"""The tiny vision-language models: written without a download, read back bit for bit, and what a policy relies on."""

import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.models.pipeline import ModelError
from flowrl.types import padded
from flowrl.vlm import tiny

pytestmark = pytest.mark.slow

NAMES = tiny.names()
VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
TOKENS = {  # of a picture 56 x 56 and of one 60 wide, 28 high
    "qwen2_vl": (4, 2),  # 28 x 28 pixels a token, each side rounded to a multiple of 28
    "qwen2_5_vl": (4, 2),
    "qwen3_vl": (4, 2),  # 32 x 32 pixels a token: 64 x 64 and 64 x 32
    "internvl": (4, 12),  # 4 a tile: one tile; two tiles and a thumbnail
    "llava": (4, 4),  # every picture is cut to 28 x 28
    "smolvlm": (20, 12),  # 4 a tile: 2 x 2 tiles, or 1 x 2, and a thumbnail
}


def picture(seed, width=56, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def chat(processor, text, images=0):
    """The prompt of one user message with its pictures first."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(processor, *prompts):
    """Prompts (text, pictures) as one batch; no argument for pictures where there are none at all."""
    texts = [chat(processor, text, len(pictures)) for text, pictures in prompts]
    pictures = [pictures for _, pictures in prompts]
    given = {"images": pictures} if any(pictures) else {}
    return processor(text=texts, padding=True, return_tensors="pt", **given)


def mixed():
    """Three prompts of different lengths, pictures of different sizes and numbers."""
    return (
        ("how many?", [picture(1)]),
        ("which is larger?", [picture(2, 60, 28), picture(3)]),
        ("a", [picture(4, 120, 90)]),
    )


def special(processor):
    """Ids that must never be sampled: every special token but the end of the answer."""
    words = processor.tokenizer
    return sorted(i for i, t in words.added_tokens_decoder.items() if t.special and i != words.eos_token_id)


def extended(inputs, tokens):
    """The inputs with `tokens` [B,T] after every prompt: per-token keys get ones in the mask and zeros elsewhere."""
    new = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {
        key: torch.cat([x, new.get(key, torch.zeros_like(tokens))], 1) if x.shape == inputs["input_ids"].shape else x
        for key, x in inputs.items()
    }


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    """Any connection fails, whatever the environment says."""

    def refused(*_):
        raise AssertionError("a connection to the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.build(name, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def models(folders):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return {
        name: (AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder))
        for name, folder in folders.items()
    }


@pytest.fixture(params=NAMES)
def vlm(request, models):
    return models[request.param]


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ModelError, match="'qwen9_vl'.*qwen2_vl.*smolvlm"):
        tiny.build("qwen9_vl", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_bytes_each_time_and_small(name, folders, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = tiny.build(name, tmp_path / "new" / name)
    assert torch.equal(torch.get_rng_state(), state)
    first = {file.name: file.read_bytes() for file in folders[name].iterdir()}
    assert first == {file.name: file.read_bytes() for file in again.iterdir()}
    assert len(first["model.safetensors"]) < 1_000_000
    assert "chat_template.jinja" in first
    shutil.rmtree(again)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_back_bit_for_bit(name, models):
    torch.manual_seed(tiny.SEED)
    made, made_processor = tiny._MAKERS[name]()
    read, processor = models[name]
    assert type(read) is type(made) and type(processor) is type(made_processor)
    wanted, weights = made.state_dict(), read.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(w.dtype == torch.float32 and torch.equal(w, wanted[key]) for key, w in weights.items())
    ours, theirs = encode(processor, *mixed()), encode(made_processor, *mixed())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_training_mode_changes_nothing(vlm):
    model, processor = vlm
    inputs = encode(processor, *mixed())
    with torch.no_grad():
        still = model(**inputs).logits
        training = model.train()(**inputs).logits
    model.eval()
    assert torch.equal(still, training)


def test_the_end_of_an_answer_is_no_padding(vlm):
    model, processor = vlm
    words = processor.tokenizer
    assert model.generation_config.eos_token_id == words.eos_token_id != words.pad_token_id
    assert model.generation_config.pad_token_id == words.pad_token_id
    assert model.get_output_embeddings().out_features == len(words)
    assert words.decode(words("Größe: 3²!")["input_ids"]) == "Größe: 3²!"


def test_the_template_takes_text_pictures_and_plain_strings(vlm):
    _, processor = vlm
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    said = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    assert processor.apply_chat_template(plain) == processor.apply_chat_template(parts) == said
    for count in range(3):
        prompt = chat(processor, "hello", count)
        assert prompt.count(processor.image_token) == count
        assert prompt.endswith("hello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_pictures_of_two_sizes(name, models):
    _, processor = models[name]
    square, wide = picture(0), picture(0, 60, 28)
    counts = [encode(processor, ("a", [p]))["input_ids"].eq(processor.image_token_id).sum() for p in (square, wide)]
    both = encode(processor, ("a", [square, wide]))["input_ids"].eq(processor.image_token_id).sum()
    assert (*counts, both) == (*TOKENS[name], sum(TOKENS[name]))


def test_prompts_alone_put_together_are_the_batch(vlm):
    """Per-token keys padded on the left, the others under each other (SmolVLM's with empty tiles at the end)."""
    _, processor = vlm
    alone = [encode(processor, prompt) for prompt in mixed()]
    batch = encode(processor, *mixed())
    longest = batch["input_ids"].shape[1]
    pad = {"input_ids": processor.tokenizer.pad_token_id}
    for key, whole in batch.items():
        parts = [one[key] for one in alone]
        if whole.shape == batch["input_ids"].shape:
            fill = pad.get(key, 0)
            parts = [torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=fill) for p in parts]
        assert torch.equal(padded(parts), whole), key


def test_a_row_does_not_depend_on_its_batch(vlm):
    """Neither on the padding, nor on the others' pictures; also for a prompt that has no picture."""
    model, processor = vlm
    prompts = (*mixed(), ("hello", []))
    with torch.no_grad():
        batch = model(**encode(processor, *prompts)).logits[:, -1]
        alone = torch.cat([model(**encode(processor, prompt)).logits[:, -1] for prompt in prompts])
    torch.testing.assert_close(batch, alone, atol=2e-5, rtol=0)
    assert batch.std() > 0.5, "logits so alike that a wrong row would pass"


def test_pictures_and_their_order_change_the_answer(vlm):
    model, processor = vlm
    first, second = picture(1), picture(2)
    pairs = [first, second], [second, first], [first, first]
    with torch.no_grad():
        a, b, c = (model(**encode(processor, ("which?", pair))).logits[0, -1] for pair in pairs)
    assert min((a - b).abs().max(), (a - c).abs().max(), (b - c).abs().max()) > 0.05


@pytest.mark.parametrize("pictures", [True, False])
def test_a_forward_pass_gives_the_probabilities_of_sampling(vlm, pictures):
    """Left padding, several pictures, a temperature and banned ids: logits of `generate` and of one pass agree."""
    model, processor = vlm
    inputs = encode(processor, *(mixed() if pictures else (("hi", []), ("what is it?", []))))
    banned, length, temperature = special(processor), inputs["input_ids"].shape[1], 0.7
    torch.manual_seed(0)
    drawn = model.generate(
        **inputs, max_new_tokens=8, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        suppress_tokens=banned, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    tokens = drawn.sequences[:, length:]
    with torch.no_grad():
        raw = model(**extended(inputs, tokens), logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
    raw[..., banned] = -torch.inf
    ended = tokens == processor.tokenizer.eos_token_id
    real = (
        ended.cumsum(1) - ended.long() == 0
    )  # the first end of an answer belongs to it, the padding after it does not
    sampled = torch.stack(drawn.scores, dim=1).log_softmax(-1)
    taught = (raw / temperature).log_softmax(-1)
    torch.testing.assert_close(taught[real], sampled[real], atol=1e-4, rtol=0)
    assert not torch.isin(tokens[real], torch.tensor(banned)).any()


def test_logits_to_keep_are_the_last_ones(vlm):
    model, processor = vlm
    inputs = encode(processor, *mixed())
    with torch.no_grad():
        whole, kept = model(**inputs).logits, model(**inputs, logits_to_keep=3).logits
    assert kept.shape[1] == 3 and torch.equal(kept, whole[:, -3:])


def test_a_sampled_placeholder_breaks_the_next_pass(vlm):
    """Why those ids are banned; the other special tokens pass."""
    model, processor = vlm
    inputs = encode(processor, ("a", [picture(0)]))
    assert processor.image_token_id in special(processor)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**extended(inputs, torch.tensor([[65, processor.image_token_id]])))


def test_the_vision_tower_is_found_and_can_be_frozen(vlm):
    model, processor = vlm
    tower, inputs = model.get_encoder(modality="image"), encode(processor, ("a", [picture(0)]))
    words = model.get_decoder()
    assert tower is not model and not {*map(id, tower.parameters())} & {*map(id, words.parameters())}
    model(**inputs).logits[:, -1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())
    model.zero_grad()
    tower.requires_grad_(False)
    model(**inputs).logits[:, -1].sum().backward()
    assert all(p.grad is None for p in tower.parameters()) and all(p.grad is not None for p in words.parameters())
    tower.requires_grad_(True)
    model.zero_grad()


@pytest.mark.parametrize("name", VIDEO)
def test_frames_of_a_video_change_the_answer(name, models):
    model, processor = models[name]
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    clip = torch.randint(0, 255, (4, 3, 56, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        one, other = (
            model(**processor(text=[prompt], videos=[frames], return_tensors="pt")).logits[0, -1]
            for frames in (clip, clip.flip(0))
        )
    assert (one - other).abs().max() > 0.01
