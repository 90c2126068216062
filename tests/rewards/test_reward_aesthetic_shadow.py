"""Aesthetic Shadow by a tiny ViT of two classes."""

import pytest
import torch

from rewards import RewardError, Sample, build
from rewards.media import from_pil
from tests.rewards.clips import SIDE, build_vit, photo

SIZES = [(SIDE, SIDE), (96, 64), (40, 100)]


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_vit(folder)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("shadow"))


def loaded(options, dtype=torch.float32, **more):
    reward = build("aesthetic_shadow", {**options, **more})
    reward.load("cpu", dtype)
    return reward


def samples():
    return [Sample(media=from_pil(photo(*size, seed=i))) for i, size in enumerate(SIZES)]


def test_score_is_what_transformers_pipeline_says(options):
    from transformers import pipeline

    classify = pipeline("image-classification", model=options["model"])
    told = [classify(photo(*size, seed=i)) for i, size in enumerate(SIZES)]
    expected = torch.tensor([next(each["score"] for each in one if each["label"] == "hq") for one in told])
    ours = loaded(options).score(samples())
    torch.testing.assert_close(ours[:1], expected[:1], rtol=1e-4, atol=1e-5)  # of the network's own size
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)
    assert expected.std() > 0.01
    torch.testing.assert_close(loaded(options, label="lq").score(samples()), 1 - ours)


def test_bfloat16(options):
    value = loaded(options, torch.bfloat16).score(samples())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loaded(options).score(samples()), rtol=0, atol=0.03)


def test_a_class_that_it_has_not_is_refused(options):
    with pytest.raises(RewardError, match="no class 'good'. Set `label` to one of: hq, lq"):
        loaded(options, label="good")


def test_missing_weights_are_named_with_the_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError, match="hf download RE-N-Y/aesthetic-shadow-v2"):
        loaded({"revision": "none-such"})
