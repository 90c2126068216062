"""ImageReward from a tiny checkpoint in the upstream layout, against BLIP of transformers and against plain torch."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from rewards import RewardError, Sample, build, traits_of
from rewards.imagereward import renamed
from rewards.media import from_pil, to_pil
from tests.rewards.makers import noise
from tests.rewards.test_reward_suder import bert_tokenizer

WIDTH, SIDE, PATCH, BLOCKS = 128, 32, 8, 2  # of the picture encoder: two heads of 64
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
HEAD = [32, 16, 8, 8, 4, 1]
HEAD_PLACES = [0, 2, 4, 6, 7]  # upstream has dropouts between them
PROMPTS = ["a red circle", "two blue squares left of a star", ""]


# ------------------------------------------------------------------------------------------------ tiny checkpoint


def reference():
    """BLIP of transformers with random weights, and the matrices and biases of a head."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BlipConfig(
            text_config={**TEXT, "vocab_size": len(bert_tokenizer()) + 1, "encoder_hidden_size": WIDTH},
            vision_config={
                "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
                "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6,
            },
        )  # fmt: skip
        blip = BlipForImageTextRetrieval(config).eval().requires_grad_(False)
        for weight in blip.parameters():
            weight += 0.1 * torch.randn_like(weight)
        layers = [(0.2 * torch.randn(b, a), torch.randn(b)) for a, b in zip(HEAD, HEAD[1:], strict=False)]
    return blip, layers


def upstream(blip, layers):
    """The same under the names of ImageReward.pt, with the weights that only its training used."""
    vision = blip.vision_model
    named = {
        "cls_token": vision.embeddings.class_embedding,
        "pos_embed": vision.embeddings.position_embedding,
        "patch_embed.proj.weight": vision.embeddings.patch_embedding.weight,
        "patch_embed.proj.bias": vision.embeddings.patch_embedding.bias,
        "norm.weight": vision.post_layernorm.weight,
        "norm.bias": vision.post_layernorm.bias,
    }
    for i, block in enumerate(vision.encoder.layers):
        parts = {
            "norm1": block.layer_norm1, "norm2": block.layer_norm2, "attn.qkv": block.self_attn.qkv,
            "attn.proj": block.self_attn.projection, "mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2,
        }  # fmt: skip
        for name, part in parts.items():
            named |= {f"blocks.{i}.{name}.weight": part.weight, f"blocks.{i}.{name}.bias": part.bias}
    tensors = {f"blip.visual_encoder.{name}": value.detach() for name, value in named.items()}
    tensors |= {f"blip.text_encoder.{name}": value for name, value in blip.text_encoder.state_dict().items()}
    for place, (weight, bias) in zip(HEAD_PLACES, layers, strict=True):
        tensors |= {f"mlp.layers.{place}.weight": weight, f"mlp.layers.{place}.bias": bias}
    return {
        **tensors,
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": torch.zeros(4, WIDTH),
        "blip.text_proj.bias": torch.zeros(4),
        "blip.image_queue": torch.zeros(4, 9),
    }


def write(folder, tensors, config=TEXT):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**config, "vocab_size": 30524, "encoder_width": 768}))
    tokenizer = bert_tokenizer()  # which has one of the two tokens that are added already
    tokenizer.save_pretrained(folder / "bert")
    return {"model": str(folder), "tokenizer": str(folder / "bert")}


def tiny(folder):
    """For the conformance tests."""
    return write(folder, upstream(*reference()))


@pytest.fixture(scope="module")
def network():
    return reference()


@pytest.fixture(scope="module")
def tensors(network):
    return upstream(*network)


@pytest.fixture(scope="module")
def options(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("imagereward"), tensors)


def loaded(options, dtype=torch.float32):
    reward = build("imagereward", options)
    reward.load(torch.device("cpu"), dtype)
    return reward


@pytest.fixture(scope="module")
def reward(options):
    return loaded(options)


def samples_of(prompts=PROMPTS, size=SIDE):
    """Pictures of whole bytes, so that PIL sees the same."""
    return [Sample(media=from_pil(to_pil(noise(i, size).media)), prompt=p) for i, p in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------ the score


def by_transformers(network, samples):
    """With the processor of CLIP, of which upstream's transform is a copy, and a tokenizer of its own."""
    from transformers import CLIPImageProcessor

    blip, layers = network
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokenizer = bert_tokenizer()
    found = []
    for sample in samples:
        pixels = processor(to_pil(sample.media), return_tensors="pt").pixel_values
        read = tokenizer(sample.prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        out = blip(input_ids=read.input_ids, attention_mask=read.attention_mask, pixel_values=pixels).question_embeds
        x = out[:, 0]
        for weight, bias in layers:
            x = x @ weight.T + bias
        found.append((x.item() - 0.16717362830052426) / 1.0333394966054072)
    return found


def test_it_is_transformers_blip_with_a_linear_head(reward, network):
    samples = samples_of()
    scores = reward.score(samples).tolist()
    assert scores == pytest.approx(by_transformers(network, samples), abs=1e-5)
    assert len({round(score, 2) for score in scores}) == len(samples)


def test_pictures_of_other_sizes_are_cut_as_pil_does_it(reward, network):
    """To rounding to bytes, which PIL does after resizing."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand((1, 3, 9, 13), generator=generator), (90, 150), mode="bicubic").clamp(0, 1)[0]
    sample = Sample(media=from_pil(to_pil(smooth)), prompt="a red circle")
    score = reward.score([sample]).item()
    assert score == pytest.approx(by_transformers(network, [sample])[0], abs=0.01)
    squashed = F.interpolate(sample.media[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0].clamp(0, 1)
    assert abs(reward.score([Sample(media=squashed, prompt="a red circle")]).item() - score) > 0.02


def attention(x, seen, query, key, value, heads):
    """Multi-head attention of x [L,W] on seen [M,V], by pairs (weight, bias)."""
    q, k, v = (F.linear(of, *pair).unflatten(-1, (heads, -1)).transpose(0, 1)
               for of, pair in ((x, query), (seen, key), (seen, value)))  # fmt: skip
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def by_torch(tensors, pixels, ids):
    """The score of one picture [3,S,S] and the ids [L] of its prompt, by upstream's names alone and without padding."""

    def pair(name):
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def normed(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], *pair(name), eps)

    eyes, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels[None], *pair(f"{eyes}.patch_embed.proj"), stride=PATCH)[0].flatten(1).T
    x = torch.cat([tensors[f"{eyes}.cls_token"][0], patches]) + tensors[f"{eyes}.pos_embed"][0]
    for i in range(BLOCKS):
        name = f"{eyes}.blocks.{i}"
        y = normed(x, f"{name}.norm1", 1e-6)
        qkv = zip(*(whole.chunk(3) for whole in pair(f"{name}.attn.qkv")), strict=True)
        x = x + F.linear(attention(y, y, *qkv, WIDTH // 64), *pair(f"{name}.attn.proj"))
        y = F.gelu(F.linear(normed(x, f"{name}.norm2", 1e-6), *pair(f"{name}.mlp.fc1")))
        x = x + F.linear(y, *pair(f"{name}.mlp.fc2"))
    seen = normed(x, f"{eyes}.norm", 1e-6)

    words = tensors[f"{text}.embeddings.word_embeddings.weight"][ids]
    x = words + tensors[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    x = normed(x, f"{text}.embeddings.LayerNorm", 1e-12)
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{i}"
        for part, to in (("attention", x), ("crossattention", seen)):
            name = f"{layer}.{part}"
            qkv = (pair(f"{name}.self.{each}") for each in ("query", "key", "value"))
            y = attention(x, x if part == "attention" else to, *qkv, TEXT["num_attention_heads"])
            x = normed(x + F.linear(y, *pair(f"{name}.output.dense")), f"{name}.output.LayerNorm", 1e-12)
        y = F.linear(F.gelu(F.linear(x, *pair(f"{layer}.intermediate.dense"))), *pair(f"{layer}.output.dense"))
        x = normed(x + y, f"{layer}.output.LayerNorm", 1e-12)

    out = x[0]
    for place in HEAD_PLACES:
        out = F.linear(out, *pair(f"mlp.layers.{place}"))
    return (out.item() - 0.16717362830052426) / 1.0333394966054072


def test_it_is_what_upstreams_names_say_in_plain_torch(reward, tensors):
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (torch.tensor(value)[:, None, None] for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    for sample in samples_of():
        ids = bert_tokenizer()(sample.prompt)["input_ids"]
        expected = by_torch(tensors, (sample.media - mean) / std, ids)
        assert reward.score([sample]).item() == pytest.approx(expected, abs=1e-4)


SMALL = {
    "vision": ("blip.visual_encoder", ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")),
    "text": ("blip.text_encoder.embeddings", ("word_embeddings.weight", "position_embeddings.weight")),
}


@pytest.mark.parametrize("tower", SMALL)
def test_what_keeps_a_norm_from_dividing_by_zero_is_upstreams(tensors, tmp_path, tower):
    """1e-6 and 1e-12 matter where what is normalised is that small; here it is."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    where, names = SMALL[tower]
    small = {**tensors, **{f"{where}.{name}": 1e-3 * tensors[f"{where}.{name}"] for name in names}}
    reward, (sample, *_) = loaded(write(tmp_path, small)), samples_of()
    mean, std = (torch.tensor(value)[:, None, None] for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    expected = by_torch(small, (sample.media - mean) / std, bert_tokenizer()(sample.prompt)["input_ids"])
    assert reward.score([sample]).item() == pytest.approx(expected, abs=1e-4)


def test_every_weight_has_its_place_and_none_is_left(reward, tensors):
    new = renamed(tensors)
    own = reward._network.state_dict()
    assert new.keys() == own.keys()
    assert all(torch.equal(new[name], own[name]) for name in new)
    assert len(tensors) - len(new) == 4


def test_a_prompt_is_read_up_to_its_35th_token(options, reward):
    media = noise(0, SIDE).media
    fits, cut = " ".join("a" * 33), " ".join("a" * 33 + "b" * 9)
    reads = loaded(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = reads.score([Sample(media=media, prompt=fits)])
        with pytest.raises(UserWarning, match="reads 35 tokens of a prompt, and one has 44"):
            reads.score([Sample(media=media, prompt=cut)])
        assert torch.equal(reads.score([Sample(media=media, prompt=cut)]), expected)  # and says it once
    shorter = reward.score([Sample(media=media, prompt=fits[:-2])])
    assert abs(shorter - expected) > 1e-4


def test_its_gradient_is_that_of_finite_differences(options):
    reward = loaded(options, torch.float64)
    media = noise(0, 40).media.double() * 0.8 + 0.1
    away = torch.randn(media.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def score(pixels):
        return reward.score([Sample(media=pixels, prompt="a red circle")])[0]

    pixels = media.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(pixels), pixels)
    step = 1e-5
    expected = (score(media + step * away) - score(media - step * away)) / (2 * step)
    assert (slope * away).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected) > 1e-3


def test_half_precision_keeps_the_head_in_full(options, reward):
    half = loaded(options, torch.bfloat16)
    assert half._network.text_encoder.dtype == torch.bfloat16
    assert {weight.dtype for weight in half._network.mlp.parameters()} == {torch.float32}
    samples = samples_of()
    assert half.score(samples).tolist() == pytest.approx(reward.score(samples).tolist(), abs=0.1)


def test_loading_leaves_a_runs_noise_alone(options):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded(options)
    assert torch.equal(torch.rand(3), expected)


def test_what_it_declares():
    traits = traits_of(build("imagereward", {}))
    assert traits.deterministic and traits.differentiable and traits.range is None


# ------------------------------------------------------------------------------------------------ errors


def refused(folder, tensors, pattern, config=TEXT):
    with pytest.raises(RewardError, match=pattern):
        loaded(write(folder, tensors, config))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blip.visual_encoder.cls_token", "1 missing .vision_model.embeddings.class_embedding"),
        ("blip.visual_encoder.pos_embed", "'vision_model.embeddings.position_embedding' is missing"),
        ("blip.visual_encoder.blocks.0.mlp.fc1.weight", "'vision_model.encoder.layers.0.mlp.fc1.weight' is missing"),
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", "1 missing .vision_model.encoder.layers.1.self_attn.qkv.bias"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "1 missing .text_encoder.*key.weight"),
        ("mlp.layers.4.weight", "'mlp.2.weight' is missing"),
        ("mlp.layers.7.bias", "1 missing .mlp.4.bias"),
    ],
)
def test_a_missing_weight_is_an_error(tensors, tmp_path, name, told):
    refused(tmp_path, {key: value for key, value in tensors.items() if key != name}, told)


def test_a_weight_too_many_is_an_error(tensors, tmp_path):
    refused(tmp_path, {**tensors, "blip.visual_encoder.blocks.0.gamma": torch.zeros(1)}, "1 unexpected.*gamma")


def test_a_weight_of_another_shape_is_an_error(tensors, tmp_path):
    name = "blip.visual_encoder.blocks.0.norm1.weight"
    refused(tmp_path, {**tensors, name: torch.zeros(3)}, "(?s)not of this network.*layer_norm1.weight")


def test_a_config_without_a_size_is_an_error(tensors, tmp_path):
    sizes = {key: value for key, value in TEXT.items() if key != "num_attention_heads"}
    refused(tmp_path, tensors, "'num_attention_heads' is missing.*hf download THUDM/ImageReward", sizes)


def test_a_tokenizer_of_another_vocabulary_is_an_error(options, tmp_path):
    tokenizer = bert_tokenizer()
    tokenizer.add_tokens(["[MORE]"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="the checkpoint has .* bert-base-uncased in `tokenizer`"):
        loaded({**options, "tokenizer": str(tmp_path)})


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json"])
def test_a_missing_file_is_named(tensors, tmp_path, name):
    options = write(tmp_path, tensors)
    (tmp_path / name).unlink()
    with pytest.raises(RewardError, match=f"has no {name}.*hf download"):
        loaded(options)


def test_the_checkpoint_itself_can_be_given(tensors, tmp_path, reward):
    """Under any name; the other file is looked for beside it."""
    options, samples = write(tmp_path, tensors), samples_of()
    for name in ("ImageReward.pt", "mine.pt"):
        (tmp_path / "ImageReward.pt").replace(tmp_path / name)
        given = loaded({**options, "model": str(tmp_path / name)})
        assert torch.equal(given.score(samples), reward.score(samples))
        (tmp_path / name).replace(tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(RewardError, match=r"ImageReward.pt is a file, and around it there is no med_config.json"):
        loaded({**options, "model": str(tmp_path / "ImageReward.pt")})


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"{", b"3"])
def test_a_config_that_is_none_is_named(tensors, tmp_path, content):
    options = write(tmp_path, tensors)
    (tmp_path / "med_config.json").write_bytes(content)
    with pytest.raises(RewardError, match="med_config.json is no med_config.json .*hf download THUDM/ImageReward"):
        loaded(options)


def test_offline_the_error_names_the_file_and_the_command(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match="ImageReward.pt of 'THUDM/ImageReward'.*hf download THUDM/ImageReward"):
        loaded({})


def test_unloaded_it_has_nothing_to_score_with(options):
    reward = loaded(options)
    reward.unload()
    with pytest.raises(RewardError, match="no weights yet"):
        reward.score([noise()])
