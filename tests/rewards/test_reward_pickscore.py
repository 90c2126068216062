"""PickScore by a tiny CLIP: the score that transformers' own class and processor give, and what the family shares."""

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build
from rewards.media import from_pil
from rewards.pickscore import PickScore
from tests.rewards.clips import SIDE, build_clip, build_siglip, photo

PROMPTS = ["a red circle", "two squares and 3 ⭐ more", "a red circle", ""]
SIZES = [(SIDE, SIDE), (96, 64), (40, 200), (64, 64)]


def tiny(folder):
    """For the conformance tests: weights and tokenizer are in two places, as upstream."""
    model = build_clip(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "model" / name).rename(folder / "tokenizer" / name)
    return {"model": model, "tokenizer": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def reward(options):
    made = build("pickscore", options)
    made.load("cpu", torch.float32)
    return made


@pytest.fixture(scope="module")
def reference(options):
    """transformers' own model and processor."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    processor = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(options["model"]), AutoTokenizer.from_pretrained(options["tokenizer"])
    )
    return CLIPModel.from_pretrained(options["model"]).eval(), processor


def samples(prompts=PROMPTS, sizes=SIZES):
    return [
        Sample(media=from_pil(photo(*size, seed=i)), prompt=prompt)
        for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))
    ]


@torch.no_grad()
def theirs(reference, sizes, prompts=PROMPTS):
    model, processor = reference
    images = [photo(*size, seed=i) for i, size in enumerate(sizes)]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=77)
    return model(**inputs).logits_per_image.diagonal()


def test_score_is_the_diagonal_of_logits_per_image(reward, reference):
    native = [(SIDE, SIDE)] * 4  # nothing to resize: nothing to round
    torch.testing.assert_close(reward.score(samples(sizes=native)), theirs(reference, native), rtol=1e-5, atol=1e-4)
    assert reward.score(samples(sizes=native)).std() > 0.1


def test_pictures_of_other_sizes_score_as_by_the_processor_but_for_rounding(reward, reference):
    ours, expected = reward.score(samples()), theirs(reference, SIZES)
    assert (ours - expected).abs().max() < 0.05 * expected.std()


def test_a_long_prompt_is_cut_after_77_tokens(reward, reference):
    prompts = ["red circle " * 60, "two " * 200, "a", "b"]
    native = [(SIDE, SIDE)] * 4
    expected = theirs(reference, native, prompts)
    torch.testing.assert_close(reward.score(samples(prompts, native)), expected, rtol=1e-5, atol=1e-4)


def test_features_are_the_models_own_image_embeds(reward, reference):
    model, processor = reference
    image = photo(SIDE, SIDE)
    with torch.no_grad():
        out = model(**processor(text=PROMPTS[:2], images=[image], return_tensors="pt", padding=True))
    torch.testing.assert_close(reward.image_features(from_pil(image)[None]), out.image_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reward.text_features(PROMPTS[:2]), out.text_embeds, rtol=1e-5, atol=1e-6)
    assert reward.scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)


def test_the_score_is_scale_times_the_product_of_features(reward):
    same = samples(sizes=[(64, 48)] * 4)
    images = reward.image_features(torch.stack([sample.media for sample in same]))
    texts = reward.text_features([sample.prompt for sample in same])
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(reward.scale * (images * texts).sum(-1), reward.score(same))


def test_a_prompt_of_several_samples_is_read_once(reward, monkeypatch):
    read = []
    own = type(reward._encoder).text_features
    monkeypatch.setattr(
        type(reward._encoder), "text_features", lambda self, texts: read.extend(texts) or own(self, texts)
    )
    reward.score(samples())
    assert read == ["a red circle", "two squares and 3 ⭐ more", ""]


def test_batch_of_several_sizes_is_each_alone(reward):
    alone = torch.cat([reward.score([sample]) for sample in samples()])
    torch.testing.assert_close(reward.score(samples()), alone, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(options):
    """In float64, through a resize and through a picture of the network's own size, for a few pixels of each."""
    reward = build("pickscore", options)
    reward.load("cpu", torch.float64)
    media = [
        torch.rand(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for size in SIZES[:2]
    ]

    def score(pictures):
        return reward.score(
            [Sample(media=p, prompt=prompt) for p, prompt in zip(pictures, PROMPTS, strict=False)]
        )  # fmt: skip

    leaves = [picture.clone().requires_grad_() for picture in media]
    score(leaves).sum().backward()
    for row, (channel, y, x) in [(0, (0, 5, 7)), (0, (2, 31, 0)), (1, (1, 40, 40)), (1, (0, 33, 12))]:
        step = torch.zeros_like(media[row])
        step[channel, y, x] = 1e-5
        ends = [score([p + sign * step if i == row else p for i, p in enumerate(media)]).sum() for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope.item() == pytest.approx(leaves[row].grad[channel, y, x].item(), rel=1e-4, abs=1e-8)
        assert abs(slope) > 1e-6


def test_checkpointing_changes_nothing_but_the_memory(options, reward):
    """Fewer tensors are kept for the backward pass; scores and gradients are the same."""

    def run(made):
        kept = []
        media = samples()[1].media.requires_grad_()

        def keep(tensor):
            if 17 in tensor.shape:  # 4 x 4 patches and the class token
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = made.score([Sample(media=media, prompt=PROMPTS[0])])
        value.sum().backward()
        return value.detach(), media.grad, sum(kept)

    made = build("pickscore", {**options, "checkpoint": True})
    made.load("cpu", torch.float32)
    (value, gradient, kept), (expected, slope, all_kept) = run(made), run(reward)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slope)
    assert kept < 0.5 * all_kept
    assert made._encoder.trunk.model is not reward._encoder.trunk.model


def test_bfloat16_scores_in_fp32_and_with_the_exact_scale(options, reward):
    made = build("pickscore", options)
    made.load("cpu", torch.bfloat16)
    value = made.score(samples())
    assert value.dtype == torch.float32
    assert made.scale == reward.scale  # log 100 in bfloat16 would make it 98.9
    torch.testing.assert_close(value, reward.score(samples()), rtol=0.05, atol=4)
    assert next(made._encoder.trunk.model.vision_model.parameters()).dtype == torch.bfloat16


def test_the_hub_differentiates_and_embeds_it(options):
    with RewardHub({"use": "pickscore", **options}, device="cpu") as hub:
        media = [sample.media.requires_grad_() for sample in samples()]
        told = hub.differentiate([Sample(media=m, prompt=p) for m, p in zip(media, PROMPTS, strict=True)])
        told.total.sum().backward()
        assert all(m.grad.abs().max() > 0 for m in media)
        embedder = hub.embedder()
        assert embedder.image_features(torch.rand(2, 3, 50, 40)).shape == embedder.text_features(["a", "b"]).shape
        assert embedder.scale > 1


def test_weights_are_frozen(reward):
    assert not any(weight.requires_grad for weight in reward._encoder.trunk.model.parameters())
    assert not reward._encoder.trunk.model.training


def test_missing_files_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError, match="hf download yuvalkirstain/PickScore_v1 config.json model.safetensors"):
        PickScore(revision="none-such").load("cpu", torch.float32)
    with pytest.raises(RewardError, match="cannot be loaded"):
        PickScore(model=str(tmp_path)).load("cpu", torch.float32)


def test_weights_that_are_not_in_the_file_are_an_error_not_random(options, tmp_path):
    """transformers fills in what is missing, with a warning: here a text tower's projection."""
    from safetensors.torch import load_file, save_file

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((open(f"{options['model']}/{file}", "rb")).read())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights \(text_projection.weight"):
        PickScore(**{**options, "model": str(tmp_path)}).load("cpu", torch.float32)


def test_a_network_of_another_kind_is_refused(tmp_path):
    from tests.rewards.clips import build_dino

    with pytest.raises(RewardError, match="Dinov2Model, which does not compare"):
        PickScore(model=build_dino(tmp_path)).load("cpu", torch.float32)


def test_a_siglip_is_refused_and_told_where_it_belongs(tmp_path):
    """CLIP's colours, crop and tokens would give it scores that mean nothing."""
    with pytest.raises(RewardError, match="is a SiglipModel; expected a CLIP.*use `clipscore`"):
        PickScore(model=build_siglip(tmp_path), tokenizer=str(tmp_path)).load("cpu", torch.float32)


def test_it_says_when_it_is_not_loaded():
    with pytest.raises(RewardError, match="pickscore has no weights yet"):
        PickScore().score(samples())
