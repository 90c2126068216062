"""LAION's aesthetic score by a tiny CLIP and a head with the published file's names."""

import pytest
import torch
from torch import nn

from rewards import RewardError, Sample, build
from rewards.aesthetic import collapse
from rewards.files import read_tensors
from rewards.media import from_pil
from tests.rewards.clips import SIDE, build_clip, build_siglip, photo

SIZES = [(SIDE, SIDE), (96, 64), (40, 100)]


class Head(nn.Module):
    """Five linear layers with dropout between them, whose parameters have the published names."""

    def __init__(self, features):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


def write_head(path, features):
    """A random head, whose scores spread, in the published layout: the state itself, no wrapping."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        head = Head(features)
        for weight in head.parameters():
            weight *= 2
    torch.save(head.state_dict(), path)
    return str(path)


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_clip(folder), "head": write_head(folder / "sac+logos+ava1-l14-linearMSE.pth", 12)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("aesthetic"))


def loaded(options, dtype=torch.float32, **more):
    reward = build("aesthetic", {**options, **more})
    reward.load("cpu", dtype)
    return reward


def samples():
    return [Sample(media=from_pil(photo(*size, seed=i))) for i, size in enumerate(SIZES)]


def test_the_head_is_one_line(tmp_path):
    """The five layers, one after the other, against w f + b."""
    path = write_head(tmp_path / "head.pth", 12)
    head = Head(12).eval()
    head.load_state_dict(torch.load(path, weights_only=True))
    assert list(read_tensors(path := tmp_path / "head.pth")) == [
        f"layers.{number}.{part}" for number in (0, 2, 4, 6, 7) for part in ("weight", "bias")
    ]
    weight, bias = collapse(read_tensors(path))
    features = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features @ weight.mT + bias, head.double().layers(features))


def test_layers_are_taken_in_the_order_of_their_numbers():
    """10 comes after 9, though not as text."""
    first, second = (torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layers = {"layers.10.weight": second, "layers.10.bias": torch.zeros(3), "layers.9.weight": first}
    weight, _ = collapse({**layers, "layers.9.bias": torch.zeros(3)})
    torch.testing.assert_close(weight, (second.double() @ first.double()))


@torch.no_grad()
def test_score_is_the_head_on_transformers_own_image_embeds(options):
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(options["model"]).eval()
    head = Head(12).eval()
    head.load_state_dict(torch.load(options["head"], weights_only=True))
    images = [photo(*size, seed=i) for i, size in enumerate(SIZES)]
    pixels = CLIPImageProcessor.from_pretrained(options["model"])(images, return_tensors="pt")["pixel_values"]
    embeds = model(input_ids=torch.tensor([[1, 2]]), pixel_values=pixels).image_embeds
    expected = head.layers(embeds)[:, 0]
    ours = loaded(options).score(samples())
    torch.testing.assert_close(ours[:1], expected[:1], rtol=1e-4, atol=1e-5)  # of the network's own size
    assert (ours - expected).abs().max() < 0.1 * expected.std()


def test_batch_of_several_sizes_is_each_alone_and_prompts_do_not_count(options):
    reward = loaded(options)
    alone = torch.cat([reward.score([Sample(media=sample.media, prompt="a dog")]) for sample in samples()])
    torch.testing.assert_close(reward.score(samples()), alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_the_head_in_fp32(options):
    value, exact = loaded(options, torch.bfloat16).score(samples()), loaded(options).score(samples())
    assert value.dtype == torch.float32
    assert (value - exact).abs().max() < 0.3 * exact.std()


def test_a_head_of_another_clip_is_refused(options, tmp_path):
    with pytest.raises(RewardError, match="turns 16 features into 1 numbers, but .* has 12"):
        loaded(options, head=write_head(tmp_path / "head.pth", 16))
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match="the head has weight; expected layers.0.weight"):
        loaded(options, head=str(tmp_path / "other.pth"))


def test_a_missing_head_is_named_with_the_command(options, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError, match="hf download no-such-owner/no-such-head aesthetic-model.pth"):
        loaded(options, head="no-such-owner/no-such-head")


def test_a_siglip_is_refused(options, tmp_path):
    with pytest.raises(RewardError, match="'aesthetic': .* is a SiglipModel; expected a CLIP"):
        loaded(options, model=build_siglip(tmp_path))
