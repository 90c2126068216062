"""The parts of the moving world's base model, against what diffusers' own pipeline does with them; the shipped one."""

import json
import random
from pathlib import Path

import pytest
import torch

from flowrl.shapes.clips import draw, prompts, render
from flowrl.shapes.pretrain_video import (
    INFERENCE,
    LATENT,
    MAX_TOKENS,
    Recipe,
    build_autoencoder,
    build_tokenizer,
    captioned_clips,
    channels_last,
    embed,
    misread,
    pretrain,
)
from rewards.motion import FRAMES, SIZE, colors_of, judge, parse, track

SHIPPED = Path(__file__).parents[2] / "flowrl/shapes/weights_video"
EVERYTHING = prompts("train") + prompts("held_out")


# ------------------------------------------------------------------------------------------------ captions


def test_a_careless_caption_has_one_wrong_word():
    rng = random.Random(0)
    changed = set()
    for clip in EVERYTHING:
        wrong = misread(clip, rng)
        words, others = clip.prompt.split(), wrong.prompt.split()
        differ = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
        assert len(differ) == 1 and parse(wrong.prompt) == wrong
        changed.update(differ[0])
    assert {"circle", "red", "left", "appears", "slowly"} <= changed


def test_the_asked_share_of_the_captions_is_wrong_and_the_clips_stay_the_same():
    right, tracks = captioned_clips(2000, 1, 0.0)
    said, same = captioned_clips(2000, 1, 0.3)
    assert sum(a != b for a, b in zip(right, said, strict=True)) / 2000 == pytest.approx(0.3, abs=0.04)
    own = [clip for text in right[:200] if (clip := parse(text))]
    found = track(render(type(tracks)(*(field[:200] for field in tracks))), colors_of(own))
    assert judge(found, own).strict.min() == 1
    assert tracks.xy.shape == same.xy.shape


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.slow
def test_every_word_is_one_token_and_every_sentence_fits():
    tokenizer = build_tokenizer()
    for clip in EVERYTHING:
        ids = tokenizer(clip.prompt).input_ids
        assert len(ids) == len(clip.prompt.split()) + 1 <= MAX_TOKENS and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == clip.prompt
        assert tokenizer.unk_token_id not in ids
    assert tokenizer("a pink circle").input_ids[1] == tokenizer.unk_token_id


@pytest.mark.slow
def test_the_autoencoder_is_causal_and_all_but_deterministic():
    torch.manual_seed(0)
    autoencoder = build_autoencoder().eval()
    x = torch.rand(2, 3, FRAMES, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        posterior = autoencoder.encode(x).latent_dist
        later = x.clone()
        later[:, :, 5:] = 0
        changed = (autoencoder.encode(later).latent_dist.mode() - posterior.mode()).abs().amax((0, 1, 3, 4))
        assert autoencoder.decode(posterior.mode()).sample.shape == x.shape
    assert posterior.mode().shape == (2, *LATENT) and posterior.std.max() < 0.01
    assert changed[:2].max() == 0 and changed[2] > 1e-4  # latent frames 0 and 1 stand for frames 0 to 4


@pytest.mark.slow
def test_the_order_of_the_weights_in_memory_changes_nothing():
    torch.manual_seed(0)
    autoencoder = build_autoencoder().eval()
    x = torch.rand(2, 3, FRAMES, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        ordered = autoencoder(x).sample
        for module in autoencoder.modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.contiguous_format)
        plain = autoencoder(x).sample
        again = channels_last(autoencoder)(x).sample
    torch.testing.assert_close(ordered, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, ordered)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The smallest pretraining there can be."""
    recipe = Recipe(pool=64, autoencoder_steps=4, autoencoder_batch=2, denoiser_steps=2, denoiser_batch=2, save_every=1)
    return pretrain(tmp_path_factory.mktemp("base"), recipe)


@pytest.fixture(scope="module")
def pipe(trained):
    from diffusers import DiffusionPipeline

    made = DiffusionPipeline.from_pretrained(trained, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.slow
def test_it_is_a_pipeline_that_diffusers_loads_and_calls(trained, pipe):
    assert type(pipe).__name__ == "WanPipeline"
    assert not (trained / ".pretrain").exists()
    arguments = json.loads((trained / "inference.json").read_text())
    assert arguments == INFERENCE
    frames = pipe(["a red circle moves left"] * 2, output_type="pt", **arguments).frames
    assert frames.shape == (2, FRAMES, 3, SIZE, SIZE) and frames.isfinite().all()
    assert frames.min() >= 0 and frames.max() <= 1


@pytest.mark.slow
def test_prompts_are_embedded_as_the_pipeline_embeds_them(pipe):
    texts = ["a red circle moves left", "a red circle moves left and a blue triangle moves right", ""]
    expected, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(embed(pipe.text_encoder, tokens.input_ids, tokens.attention_mask), expected)


@pytest.mark.slow
def test_latents_are_standardised_as_the_config_says(pipe):
    """What the pipeline will undo before it decodes: mean 0 and standard deviation 1 in every channel."""
    _, tracks = captioned_clips(64, Recipe().seed + 2, 0.0)
    with torch.no_grad():
        z = pipe.vae.encode(render(tracks).movedim(1, 2) * 2 - 1).latent_dist.mode()
    mean, std = (torch.tensor(pipe.vae.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    normal = (z - mean) / std
    assert normal.mean((0, 2, 3, 4)).abs().max() < 0.02 and (normal.std((0, 2, 3, 4)) - 1).abs().max() < 0.02


# ------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.slow
def test_the_shipped_model_does_what_it_is_told_but_not_always():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    clips = random.Random(0).sample(prompts("held_out"), 96)
    arguments = json.loads((SHIPPED / "inference.json").read_text())
    video = pipe(
        [clip.prompt for clip in clips], output_type="pt", generator=torch.Generator().manual_seed(0), **arguments
    ).frames
    own = judge(track(video, colors_of(clips)), clips)
    turned = clips[1:] + clips[:1]
    other = judge(track(video, colors_of(turned)), turned)
    assert 0.2 < own.strict.mean() < 0.7 and own.soft.mean() > 0.5
    assert other.strict.mean() < 0.05


@pytest.mark.slow
def test_the_shipped_autoencoder_keeps_what_moves():
    from diffusers import AutoencoderKLWan

    autoencoder = AutoencoderKLWan.from_pretrained(SHIPPED / "vae", torch_dtype=torch.float32)
    clips = random.Random(0).sample(EVERYTHING, 100)
    video = render(draw(clips, seed=1))
    with torch.no_grad():
        z = autoencoder.encode(video.movedim(1, 2) * 2 - 1).latent_dist.mode()
        again = (autoencoder.decode(z).sample.movedim(1, 2) + 1) / 2
    verdict = judge(track(again, colors_of(clips)), clips)
    assert verdict.strict.mean() > 0.9 and verdict.way.mean() > 0.99


def test_the_shipped_folder_is_small_and_says_how_it_was_made():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".model", ".txt"}
    assert Recipe(**json.loads((SHIPPED / "recipe.json").read_text())) == Recipe()
