"""Both heads of BLIP against the class of transformers, with its own processor."""

import pytest
import torch
import torch.nn.functional as F

from rewards import RewardError, Sample, build, traits_of
from rewards.media import from_pil, to_pil
from tests.rewards.makers import noise
from tests.rewards.test_reward_suder import bert_tokenizer, build_blip, save

SIDE = 32
PROMPTS = ["a red circle", "two blue squares left of a star", ""]
HEADS = ["blip.itm", "blip.itc"]


def build_retrieval(folder, side=SIDE, **images):
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    tokenizer = bert_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**size, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64},
        vision_config={**size, "image_size": SIDE, "patch_size": 8},
        image_text_hidden_size=16,
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": side, "width": side}, **images), tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(folder, BlipForImageTextRetrieval(config), processor)


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_retrieval(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_retrieval(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module", params=HEADS)
def head(request):
    return request.param


def loaded(head, folder, dtype=torch.float32):
    reward = build(head, {"model": str(folder)})
    reward.load(torch.device("cpu"), dtype)
    return reward


@pytest.fixture(scope="module")
def reward(head, folder):
    return loaded(head, folder)


@torch.no_grad()
def by_transformers(head, folder, sample, picture=None):
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    inputs = processor(images=picture or to_pil(sample.media), text=sample.prompt, return_tensors="pt")
    score = model(**inputs, use_itm_head=head == "blip.itm").itm_score
    return (score.softmax(-1)[0, 1] if head == "blip.itm" else score[0, 0]).item()


def samples_of(size=SIDE):
    """Pictures of whole bytes, so that PIL sees the same."""
    return [Sample(media=from_pil(to_pil(noise(i, size).media)), prompt=p) for i, p in enumerate(PROMPTS)]


def test_it_is_what_transformers_says(reward, head, folder):
    samples = samples_of()
    scores = reward.score(samples).tolist()
    assert scores == pytest.approx([by_transformers(head, folder, sample) for sample in samples], abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(samples)


def test_both_heads_hold_one_network(folder):
    match, contrast = (loaded(name, folder) for name in HEADS)
    assert match._trunk.model is contrast._trunk.model
    match.unload()
    assert contrast.score(samples_of()).isfinite().all()


def test_other_shapes_are_squashed_as_pil_does_it(reward, head, folder):
    from PIL import Image

    smooth = F.interpolate(torch.rand((1, 3, 9, 13), generator=torch.Generator().manual_seed(0)), (90, 150))[0]
    sample = Sample(media=from_pil(to_pil(smooth)), prompt="a red circle")
    squashed = to_pil(sample.media).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    score = reward.score([sample]).item()
    assert score == pytest.approx(by_transformers(head, folder, sample, squashed), abs=5e-4)
    cut = Sample(media=sample.media[..., 30:120], prompt="a red circle")
    assert abs(reward.score([cut]).item() - score) > 1e-3


def test_the_processors_numbers_are_used(head, folder, tmp_path):
    other = build_retrieval(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=2)
    sample = samples_of()[0]
    score = loaded(head, other).score([sample]).item()
    assert score == pytest.approx(by_transformers(head, other, sample), abs=1e-5)
    assert abs(score - by_transformers(head, folder, sample)) > 1e-4
    assert loaded(head, other)._preprocess.interpolation == "bilinear"


def test_a_batch_of_different_sizes_and_lengths_changes_nothing(reward):
    samples = [*samples_of(), noise(5, 40, prompt="a"), noise(6, 24, prompt=" ".join("a" * 90))]
    alone = [reward.score([sample]).item() for sample in samples]
    assert reward.score(samples).tolist() == pytest.approx(alone, abs=1e-5)


def test_its_gradient_is_that_of_finite_differences(head, folder):
    reward = loaded(head, folder, torch.float64)
    media = noise(0, 40).media.double() * 0.8 + 0.1
    away = torch.randn(media.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def score(pixels):
        return reward.score([Sample(media=pixels, prompt="a red circle")])[0]

    pixels = media.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(pixels), pixels)
    expected = (score(media + 1e-5 * away) - score(media - 1e-5 * away)) / 2e-5
    assert (slope * away).sum().item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(expected) > 1e-5


def test_a_half_precision_network_has_scores_in_full(reward, head, folder):
    """Not multiples of 1/256: what the heads give is brought to fp32 before the last step."""
    half, samples = loaded(head, folder, torch.bfloat16), [noise(i, SIDE, prompt=p) for i, p in enumerate(PROMPTS)]
    scores = half.score(samples)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert scores.tolist() == pytest.approx(reward.score(samples).tolist(), abs=0.05)


def test_a_config_alone_is_no_checkpoint(tmp_path):
    """What `flowrl reward list` goes by."""
    weights = build("blip.itm", {}).card.weights[0].at(str(tmp_path))
    for name in weights.names:
        assert not weights.is_here()
        (tmp_path / name).write_text("{}")
    assert weights.is_here() and {"config.json", "model.safetensors"} <= set(weights.names)


def test_what_it_declares(head):
    traits = traits_of(build(head, {}))
    assert traits.differentiable and traits.deterministic
    assert traits.range == ((0.0, 1.0) if head == "blip.itm" else (-1.0, 1.0))
    assert traits.card.weights[0].source == "Salesforce/blip-itm-large-coco"


# ------------------------------------------------------------------------------------------------ errors


def test_a_captioner_has_no_such_head(head, tmp_path):
    """Left to itself, transformers would draw the heads at random."""
    with pytest.raises(RewardError, match="no checkpoint of BlipForImageTextRetrieval: it lacks .* weights"):
        loaded(head, build_blip(tmp_path))


def test_a_processor_of_another_size_is_an_error(head, tmp_path):
    with pytest.raises(RewardError, match="makes pictures of 48 x 48, the network sees 32 x 32"):
        loaded(head, build_retrieval(tmp_path, side=48))


def test_a_folder_that_is_not_there(head, tmp_path):
    with pytest.raises(RewardError, match="none does not exist"):
        loaded(head, tmp_path / "none")


def test_unloaded_it_has_nothing_to_score_with(head, folder):
    reward = loaded(head, folder)
    reward.unload()
    with pytest.raises(RewardError, match="no weights yet"):
        reward.score([noise()])
