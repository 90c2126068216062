"""Likeness to a reference by tiny DINOv2 and CLIP networks, against transformers' own classes and processors."""

import tempfile
from pathlib import Path

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build
from rewards.media import from_pil
from tests.rewards.clips import SIDE, build_clip, build_dino, photo

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
    ours = loaded(model).score(samples(reference))
    assert (ours - expected).abs().max() < 0.02
    assert expected.std() > 0.02


def test_a_path_and_a_tensor_of_the_same_picture_are_the_same(model):
    reward, path = loaded(model), metas()["reference"]
    assert torch.equal(reward.score(samples(path)), reward.score(samples(from_pil(photo(60, 80, seed=9)))))


def test_the_reference_itself_scores_one_and_several_references_do_not_mix(model):
    pictures = [from_pil(photo(*size, seed=i)) for i, size in enumerate(SIZES)]
    own = [Sample(media=picture, meta={"reference": picture}) for picture in pictures]
    reward = loaded(model)
    torch.testing.assert_close(reward.score(own), torch.ones(3))
    turned = [Sample(media=pictures[i], meta={"reference": pictures[(i + 1) % 3]}) for i in range(3)]
    assert (reward.score(turned) < 0.999).all()
    alone = torch.cat([reward.score([sample]) for sample in turned])
    torch.testing.assert_close(reward.score(turned), alone, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_picture_and_not_the_reference(model):
    picture, reference = (from_pil(photo(60, 80, seed=seed)).requires_grad_() for seed in (1, 2))
    loaded(model).score([Sample(media=picture, meta={"reference": reference})]).sum().backward()
    assert picture.grad.abs().max() > 0
    assert reference.grad is None


def test_bfloat16(model):
    reference = metas()["reference"]
    value = loaded(model, torch.bfloat16).score(samples(reference))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loaded(model).score(samples(reference)), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "bad", ["/no/such/picture.png", 7, torch.rand(1, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_a_reference_that_is_no_picture_costs_its_sample_the_verdict(bad, tmp_path_factory):
    given = [Sample(media=torch.rand(3, 40, 40), meta={"reference": r}) for r in (metas()["reference"], bad)]
    with RewardHub({"use": "image_sim", **tiny(tmp_path_factory.mktemp("one"))}, device="cpu") as hub:
        with pytest.warns(UserWarning, match="image_sim"):
            told = hub(given)
    assert told.total.isnan().tolist() == [False, True]
    assert "reference" in told.info[1]["image_sim"]["error"]


def test_a_file_that_is_no_picture_is_told(model, tmp_path):
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(RewardError, match="cannot be read"):
        loaded(model).score(samples(str(tmp_path / "page.html")))
