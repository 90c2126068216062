"""CLIPScore by tiny CLIP and SigLIP checkpoints, against transformers' own classes and processors."""

import gc
import threading
import weakref

import pytest
import torch

from rewards import RewardError, Sample, build, traits_of
from rewards._clip import _SHARED, _read
from rewards.clipscore import CLIPScore
from rewards.media import from_pil
from tests.rewards.clips import SIDE, WORDS, build_clip, build_siglip, photo
from tests.rewards.test_reward_aesthetic import write_head

PROMPTS = ["a red circle", "two blue squares", "star"]
SIZES = [(SIDE, SIDE), (96, 64), (40, 100)]


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_clip(folder)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("clip"), resized=40)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return build_siglip(tmp_path_factory.mktemp("siglip"))


def loaded(**options):
    reward = build("clipscore", options)
    reward.load("cpu", torch.float32)
    return reward


def samples(sizes=SIZES, prompts=PROMPTS):
    return [
        Sample(media=from_pil(photo(*size, seed=i)), prompt=prompt)
        for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))
    ]


def images(sizes=SIZES):
    return [photo(*size, seed=i) for i, size in enumerate(sizes)]


@torch.no_grad()
def test_clip_is_the_cosine_of_its_class_with_its_own_preprocessing(clip):
    """The folder's preprocessor_config.json asks for a shorter side of 40 before the cut of 32."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=PROMPTS, images=images(), return_tensors="pt", padding=True)
    expected = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    assert (loaded(model=clip).score(samples()) - expected).abs().max() < 0.01
    assert expected.std() > 0.05


@torch.no_grad()
def test_siglip_is_the_cosine_of_its_class_padded_and_without_a_mask(siglip):
    """Squashed and bilinear as its preprocessor_config.json says; padding is seen, as it was in training."""
    from transformers import AutoTokenizer, SiglipImageProcessor, SiglipModel

    model = SiglipModel.from_pretrained(siglip).eval()
    tokens = AutoTokenizer.from_pretrained(siglip)(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    pixels = SiglipImageProcessor.from_pretrained(siglip)(images(), return_tensors="pt")["pixel_values"]
    logits = model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image.diagonal()
    expected = (logits - model.logit_bias) / model.logit_scale.exp()
    reward = loaded(model=siglip)
    assert (reward.score(samples()) - expected).abs().max() < 0.01
    assert expected.std() > 0.05
    assert reward.scale == pytest.approx(model.logit_scale.exp().item())
    masked = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    masked = torch.nn.functional.normalize(masked.pooler_output, dim=-1)
    assert (reward.text_features(PROMPTS) - masked).abs().max() > 0.01  # so the mask would have mattered


def test_the_scales_are_those_of_the_paper_and_of_torchmetrics(clip):
    given = samples([(SIDE, SIDE)] * 12, WORDS)
    cosines = loaded(model=clip).score(given)
    assert cosines.min() < 0 < cosines.max()  # so that both sides of the cut are seen
    hessel, torchmetrics = (loaded(model=clip, scale=scale) for scale in ("hessel", "torchmetrics"))
    torch.testing.assert_close(hessel.score(given), 2.5 * cosines.relu())
    torch.testing.assert_close(torchmetrics.score(given), 100 * cosines.relu())
    assert [traits_of(each).range for each in (hessel, torchmetrics)] == [(0, 2.5), (0, 100)]
    assert traits_of(CLIPScore()).range == (-1, 1)


def test_scale_is_checked():
    with pytest.raises(RewardError, match="scale is 'logit'; expected one of cosine, hessel, torchmetrics"):
        CLIPScore(scale="logit")


def test_bfloat16(clip):
    reward = build("clipscore", {"model": clip})
    reward.load("cpu", torch.bfloat16)
    torch.testing.assert_close(reward.score(samples()), loaded(model=clip).score(samples()), rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------ preprocessing


CLIP = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 1},  # Lanczos
        {"do_center_crop": False},  # not square
        {"crop_size": {"height": 224, "width": 200}},
        {"crop_size": {"height": 256, "width": 256}},  # would have to be padded
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_resize": False},
        {"size": {"height": 256, "width": 256}},  # squashed, then cut
        {"size": {"height": 256, "width": 224}, "do_center_crop": False},
        {"size": None},
    ],
)
def test_preprocessing_that_is_not_ours_is_refused(change):
    assert _read(CLIP).size == 224
    assert _read({**CLIP, **change}) is None


def test_a_refused_preprocessing_is_told(clip, tmp_path):
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(do_center_crop=False).save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(f"{clip}/{file}")
    with pytest.raises(RewardError, match="preprocessing of .* is not supported: .*shortest_edge"):
        loaded(model=str(tmp_path))


def test_a_processor_saved_as_one_file_is_read_too(clip, tmp_path):
    """CLIPProcessor.save_pretrained of transformers 5 writes processor_config.json alone."""
    from transformers import CLIPProcessor

    CLIPProcessor.from_pretrained(clip).save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(f"{clip}/{file}")
    assert torch.equal(loaded(model=str(tmp_path)).score(samples()), loaded(model=clip).score(samples()))


# ------------------------------------------------------------------------------------------------ shared trunks


def test_clipscore_and_aesthetic_hold_one_network_which_leaves_with_the_last(clip, tmp_path):
    head = write_head(tmp_path / "head.pth", 12)
    score, look = build("clipscore", {"model": clip}), build("aesthetic", {"model": clip, "head": head})
    for reward in (score, look):
        reward.load(torch.device("cpu"), torch.float32)
    model, other = weakref.ref(score._encoder.trunk.model), build("clipscore", {"model": clip})
    assert model() is look._trunk.model
    other.load("cpu", torch.bfloat16)
    assert other._encoder.trunk.model is not model()  # another precision is another copy

    score.unload()
    gc.collect()
    assert model() is not None
    assert look.score(samples()).isfinite().all()
    look.unload()
    gc.collect()
    assert model() is None

    score.load("cpu", torch.float32)
    assert score.score(samples()).isfinite().all()


def test_many_threads_that_load_at_once_get_one_network(clip):
    gc.collect()
    rewards = [build("clipscore", {"model": clip}) for _ in range(6)]
    before = len(_SHARED)
    threads = [threading.Thread(target=reward.load, args=("cpu", torch.float64)) for reward in rewards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(reward._encoder.trunk.model) for reward in rewards}) == 1
    assert len(_SHARED) == before + 1
