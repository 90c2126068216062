"""Likeness to a reference by tiny DINOv2 and CLIP networks, against transformers' own classes and processors."""

import tempfile
from pathlib import Path

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build
from rewards.media import from_pil
from tests.rewards.clips import SIDE, build_clip, build_dino, loud, photo

SIZES = [(SIDE, SIDE), (96, 64), (40, 100)]
_FOLDER = tempfile.TemporaryDirectory()


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_dino(folder)}


def metas():
    """For the conformance tests: the path of a picture."""
    path = Path(_FOLDER.name) / "reference.png"
    if not path.exists():
        photo(60, 80, seed=9).save(path)
    return {"reference": str(path)}


@pytest.fixture(scope="module", params=["dino", "clip"])
def model(request, tmp_path_factory):
    return {"dino": build_dino, "clip": build_clip}[request.param](tmp_path_factory.mktemp(request.param))


def loaded(model, dtype=torch.float32):
    reward = build("image_sim", {"model": model})
    reward.load("cpu", dtype)
    return reward


def samples(reference):
    return [Sample(media=from_pil(photo(*size, seed=i)), meta={"reference": reference}) for i, size in enumerate(SIZES)]


@torch.no_grad()
def embed(model, image):
    """Features by the model's own class and processor."""
    from transformers import AutoImageProcessor, CLIPModel, Dinov2Model

    pixels = AutoImageProcessor.from_pretrained(model)(image, return_tensors="pt")["pixel_values"]
    if (Path(model) / "tokenizer.json").exists():
        return CLIPModel.from_pretrained(model).eval().get_image_features(pixel_values=pixels).pooler_output[0]
    return Dinov2Model.from_pretrained(model).eval()(pixel_values=pixels).pooler_output[0]  # the normed CLS token


def test_score_is_the_cosine_of_the_classes_own_features(model):
    reference = metas()["reference"]
    features = [embed(model, photo(*size, seed=i)) for i, size in enumerate(SIZES)]
    expected = torch.stack([torch.cosine_similarity(f, embed(model, photo(60, 80, seed=9)), dim=0) for f in features])
    ours = loaded(model).score(samples(reference)).value
    assert (ours - expected).abs().max() < 0.02
    assert expected.std() > 0.02


def test_a_path_and_a_tensor_of_the_same_picture_are_the_same(model):
    reward, path = loaded(model), metas()["reference"]
    picture = from_pil(photo(60, 80, seed=9))
    assert torch.equal(reward.score(samples(path)).value, reward.score(samples(picture)).value)


def test_the_reference_itself_scores_one_and_several_references_do_not_mix(model):
    pictures = [from_pil(photo(*size, seed=i)) for i, size in enumerate(SIZES)]
    own = [Sample(media=picture, meta={"reference": picture}) for picture in pictures]
    reward = loaded(model)
    torch.testing.assert_close(reward.score(own).value, torch.ones(3))
    turned = [Sample(media=pictures[i], meta={"reference": pictures[(i + 1) % 3]}) for i in range(3)]
    assert (reward.score(turned).value < 0.999).all()
    alone = torch.cat([reward.score([sample]).value for sample in turned])
    torch.testing.assert_close(reward.score(turned).value, alone, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_picture_and_not_the_reference(model):
    picture, reference = (from_pil(photo(60, 80, seed=seed)).requires_grad_() for seed in (1, 2))
    loaded(model).score([Sample(media=picture, meta={"reference": reference})]).value.sum().backward()
    assert picture.grad.abs().max() > 0
    assert reference.grad is None


def test_bfloat16(model):
    reference = metas()["reference"]
    value = loaded(model, torch.bfloat16).score(samples(reference)).value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loaded(model).score(samples(reference)).value, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "bad", ["/no/such/picture.png", 7, torch.rand(1, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_a_reference_that_is_no_picture_costs_its_sample_the_verdict(bad, tmp_path_factory):
    given = [Sample(media=torch.rand(3, 40, 40), meta={"reference": r}) for r in (metas()["reference"], bad)]
    with RewardHub({"use": "image_sim", **tiny(tmp_path_factory.mktemp("one"))}, device="cpu") as hub:
        told = hub(given)
    assert told.total.isnan().tolist() == [False, True]
    assert "reference" in told.info[1]["image_sim"]["error"]


def test_one_bad_reference_leaves_the_batch_whole(model, monkeypatch):
    reward = loaded(model)
    good = samples(metas()["reference"])
    bad = Sample(media=good[0].media, meta={"reference": "/no/such/picture.png"})
    alone, sizes = reward.score(good).value, []
    own = reward._features
    monkeypatch.setattr(reward, "_features", lambda images: sizes.append(len(images)) or own(images))
    media = [sample.media.clone().requires_grad_() for sample in (good[0], bad, *good[1:])]
    metadata = [sample.meta for sample in (good[0], bad, *good[1:])]
    told = reward.score([Sample(media=m, meta=meta) for m, meta in zip(media, metadata, strict=True)])
    assert sizes == [1, 3]  # the reference, and the pictures that have one
    assert told.value.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(told.value[[0, 2, 3]], alone)
    assert "/no/such/picture.png" in told.info[1]["error"] and told.info[0] == {}
    told.value.nansum().backward()
    assert [m.grad is not None and m.grad.abs().max().item() > 0 for m in media] == [True, False, True, True]
    none = reward.score([bad, bad])
    assert none.value.isnan().all() and all("reference" in entry["error"] for entry in none.info)


def test_a_file_that_is_no_picture_is_told(model, tmp_path):
    (tmp_path / "page.html").write_text("<html></html>")
    told = loaded(model).score(samples(str(tmp_path / "page.html")))
    assert told.value.isnan().all() and "cannot be read" in told.info[0]["error"]


@torch.no_grad()
def test_a_vit_without_the_pooler_that_is_not_looked_at(tmp_path):
    """As DINO's are published. The pooler that transformers makes up is NaN, so that nobody could use it unnoticed."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    theirs = loud(lambda: ViTModel(config, add_pooling_layer=False)).eval()
    theirs.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3).save_pretrained(tmp_path)
    reward = loaded(str(tmp_path))
    a, b = (from_pil(photo(SIDE, SIDE, seed=seed)) for seed in (1, 2))
    expected = torch.cosine_similarity(*theirs(pixel_values=reward._prepare([a, b])).last_hidden_state[:, 0], dim=0)
    (score,) = reward.score([Sample(media=a, meta={"reference": b})]).value
    assert score.item() == pytest.approx(expected.item(), abs=1e-5) and score < 0.99
    assert all(weight.isnan().all() for weight in reward._trunk.model.pooler.parameters())


def test_a_vit_that_lacks_more_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = build_dino(tmp_path)
    tensors = load_file(f"{model}/model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, f"{model}/model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights \(layernorm.weight"):
        loaded(model)
