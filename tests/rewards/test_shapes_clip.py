"""The shipped scorer: its gradient against differences, its answers on held-out prompts, the parts of its recipe."""

import itertools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from flowrl.shapes.scenes import draw, prompts, render
from flowrl.shapes.scorer import (
    FALSE,
    LOOKS,
    TEXT_LOOKS,
    TRUE,
    UNSURE,
    Pool,
    Recipe,
    captions_of,
    contrastive,
    differences,
    look_truth,
    mistakes,
    mixed,
    spearman,
    spoil,
    swapped,
    train_scorer,
    truth,
)
from rewards import RewardError, RewardHub, Sample, build
from rewards.shapes import detect, judge, parse
from rewards.shapes_clip import CONTROLS, MAX_WORDS, WEIGHTS, WORDS, ShapesClip, TwoTowers

WORLD = prompts("train") + prompts("held_out")


def loaded(dtype=torch.float32, **options):
    scorer = ShapesClip(**options)
    scorer.load("cpu", dtype)
    return scorer


@pytest.fixture(scope="module")
def scorer():
    return loaded()


@pytest.fixture(scope="module")
def exam(scorer):
    """300 held-out prompts with a scene each: specs, pictures, features."""
    specs = mixed(prompts("held_out"), 300, seed=77)
    pictures = render(draw(specs, seed=77))
    return specs, pictures, scorer.image_features(pictures)


def cosine(scorer, features, texts):
    return (features * scorer.text_features(texts)).sum(-1)


# ------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("size", [96, 64, 130])
def test_the_gradient_is_that_of_finite_differences(size):
    """float64, in random directions and of single pixels; at another size it passes a resize, which is float32."""
    double = loaded(torch.float64)
    generator = torch.Generator().manual_seed(size)
    picture = render(draw([parse("a red circle above a blue star")], seed=1), 96)[0].double()
    picture = F.interpolate(picture[None], (size, size), mode="bilinear")[0]
    picture = picture + 0.05 * torch.randn(picture.shape, generator=generator, dtype=torch.float64)

    def score(media):
        return double.score([Sample(media=media, prompt="clean. a circle above a star")])[0]

    media = picture.clone().requires_grad_()
    score(media).backward()
    directions = [torch.randn(picture.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    for channel, y, x in ((0, size // 2, size // 2), (1, 5, 7), (2, size - 9, size // 3)):
        directions.append(torch.zeros_like(picture))
        directions[-1][channel, y, x] = 1.0
    step, tolerance = (1e-5, 1e-6) if size == 96 else (1e-2, 2e-2)
    for direction in directions:
        unit = direction / direction.norm()
        slope = (score(picture + step * unit) - score(picture - step * unit)) / (2 * step)
        torch.testing.assert_close((media.grad * unit).sum(), slope, rtol=tolerance, atol=tolerance * 1e-2)


def test_following_the_gradient_mends_a_wrong_picture(scorer):
    """What direct-gradient methods rest on: some ascent from a wrong picture makes the wanted caption win."""
    media = render(draw([parse("a red circle")], seed=3))
    asked, wrong = "a blue circle", "a red circle"
    assert cosine(scorer, scorer.image_features(media), [asked]) < cosine(scorer, scorer.image_features(media), [wrong])
    for _ in range(20):
        media = media.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cosine(scorer, scorer.image_features(media), [asked]).sum(), media)
        media = (media + 0.5 * grad / grad.norm()).clamp(0, 1)
    assert cosine(scorer, scorer.image_features(media), [asked]) > cosine(scorer, scorer.image_features(media), [wrong])


def test_the_weights_take_no_gradient_and_the_prompt_neither(scorer):
    assert not scorer.text_features(["a star"]).requires_grad
    assert not scorer.image_features(torch.rand(1, 3, 96, 96)).requires_grad


# ------------------------------------------------------------------------------------------------ answers


def test_it_prefers_the_true_caption_to_one_with_a_wrong_word(scorer, exam):
    specs, _, features = exam
    rng = random.Random(0)
    wrong = [rng.choice(mistakes(spec, WORLD)).prompt for spec in specs]
    right = cosine(scorer, features, [spec.prompt for spec in specs]) > cosine(scorer, features, wrong)
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("category", ["position", "attribution"])
def test_it_knows_which_is_which(scorer, exam, category):
    """The same words, bound differently."""
    specs, _, features = exam
    rows = [i for i, spec in enumerate(specs) if spec.category == category]
    right = cosine(scorer, features[rows], [specs[i].prompt for i in rows])
    other = cosine(scorer, features[rows], [swapped(specs[i]).prompt for i in rows])
    assert (right > other).float().mean() > 0.85


@pytest.mark.parametrize("look", CONTROLS[1:])
def test_control_words_say_how_a_picture_looks(scorer, exam, look):
    specs, pictures, features = exam
    as_clean = [f"clean. {spec.prompt}" for spec in specs]
    as_spoilt = [f"{look}. {spec.prompt}" for spec in specs]
    spoilt = spoil(pictures, torch.full((len(specs),), LOOKS.index(look)), torch.Generator().manual_seed(0))
    worse = scorer.image_features(spoilt)
    assert (cosine(scorer, features, as_clean) > cosine(scorer, features, as_spoilt)).float().mean() > 0.9
    assert (cosine(scorer, worse, as_spoilt) > cosine(scorer, worse, as_clean)).float().mean() > 0.9
    assert (cosine(scorer, features, as_clean) > cosine(scorer, worse, as_clean)).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ contract


def test_a_score_is_the_cosine_of_two_normalised_features(scorer):
    media, texts = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0)), ["a star", "two circles", "?"]
    images, words = scorer.image_features(media), scorer.text_features(texts)
    for features in (images, words):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    scores = scorer.score([Sample(media=m, prompt=t) for m, t in zip(media, texts, strict=True)])
    torch.testing.assert_close(scores, F.cosine_similarity(images, words))
    assert 1 < scorer.scale <= 100.01


def test_pictures_of_several_sizes_are_scored_together(scorer):
    scene = render(draw([parse("a green square")], seed=5), 96)
    sizes = [scene[0], F.interpolate(scene, (200, 200), mode="bilinear")[0], F.interpolate(scene, (64, 128))[0]]
    samples = [Sample(media=media, prompt="a green square") for media in sizes]
    together = scorer.score(samples)
    torch.testing.assert_close(together, torch.cat([scorer.score([sample]) for sample in samples]))
    assert (together[1] - together[0]).abs() < 0.05


def test_unknown_words_do_no_harm(scorer):
    texts = ["", "...", "Ein roter Kreis!", "a red circle " * 9, "an green star.", "A GREEN STAR"]
    features = scorer.text_features(texts)
    assert features.isfinite().all()
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[4], features[5])
    torch.testing.assert_close(features[5], scorer.text_features(["a green star"])[0])


def test_every_word_and_prompt_of_the_world_is_known():
    tokens = TwoTowers(WORDS).tokens([f"{look}. {spec.prompt}" for look in CONTROLS for spec in WORLD])
    assert len(tokens.unique(dim=0)) == len(tokens), "two prompts look the same"
    assert not (tokens == TwoTowers(WORDS).tokens(["?"])[0, 0]).any()
    assert max(len(f"clean {spec.prompt}".split()) for spec in WORLD) <= MAX_WORDS


def test_the_hub_finds_it_and_half_precision_is_close():
    samples = [Sample(media=render(draw([s], seed=0))[0], prompt=s.prompt) for s in prompts("held_out")[::9]]
    with RewardHub({"use": "shapes_clip"}) as hub:
        total = hub(samples).total
    torch.testing.assert_close(total, loaded().score(samples))
    half = loaded(torch.bfloat16).score(samples)
    assert half.dtype == torch.float32 and (half - total).abs().max() < 0.05


def test_the_shipped_files_are_small_and_safe():
    files = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "recipe.json"}
    assert sum(files.values()) <= 4e6
    assert tuple(json.loads((WEIGHTS / "config.json").read_text())["words"]) == WORDS
    assert json.loads((WEIGHTS / "recipe.json").read_text()) == Recipe().__dict__


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(RewardError, match=r"config\.json.*flowrl shapes train-scorer"):
        loaded(weights=str(tmp_path))
    with pytest.raises(RewardError, match="load"):
        build("shapes_clip").image_features(torch.rand(1, 3, 96, 96))


# ------------------------------------------------------------------------------------------------ recipe


def test_what_is_true_of_a_scene_is_what_the_strict_reward_says():
    """Every prompt of the world against every scene, by the detector, which sees nothing but the picture."""
    scenes = draw(mixed(prompts("train"), 60, seed=4), seed=4)
    table = truth(scenes, [spec.prompt for spec in WORLD])
    found = detect(render(scenes))
    for spec, column in zip(WORLD[::3], table.T[::3], strict=True):
        strict = judge(found, [spec] * len(table)).strict
        sure = column != UNSURE
        assert torch.equal(strict[sure] == 1, column[sure] == TRUE), spec.prompt
    assert (table == TRUE).any(1).all() and (table == UNSURE).float().mean() < 0.02


def test_mistakes_change_one_word_and_swaps_only_the_order():
    for spec in WORLD:
        one = mistakes(spec, WORLD)
        assert one and all(differences(spec, other) == 1 and other != spec for other in one)
        if other := swapped(spec):
            assert sorted(other.prompt.split()) == sorted(spec.prompt.split()) and other.prompt != spec.prompt
    assert swapped(parse("two stars")) is None
    assert swapped(parse("a red circle and a blue star")).prompt == "a blue circle and a red star"
    assert swapped(parse("a circle above a star")).prompt == "a star above a circle"


def test_no_held_out_prompt_is_ever_a_caption():
    captions = captions_of(TwoTowers(WORDS))
    assert not {spec.prompt for spec in prompts("held_out")} & set(captions.texts)
    assert len(captions.ids) == len(TEXT_LOOKS) * len(captions.texts)
    for text, wrong in zip(captions.texts, captions.wrong, strict=True):
        assert wrong and captions.texts.index(text) not in wrong


def test_the_loss_is_clips_where_every_other_caption_is_wrong():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    label = torch.full((5, 5), FALSE, dtype=torch.int8).fill_diagonal_(TRUE)
    own = torch.tensor([2, 0, 4, 1, 3])
    rows, columns = logits.softmax(1), logits.softmax(0)
    at = (torch.arange(5), own)
    expected = -(rows[at].log().mean() + columns[at].log().mean()) / 2
    shuffled = torch.full((5, 5), FALSE, dtype=torch.int8)
    shuffled[at] = TRUE
    torch.testing.assert_close(contrastive(logits, own, shuffled), expected)
    assert not torch.allclose(contrastive(logits, torch.arange(5), label), expected)


def test_the_loss_by_hand_leaves_out_what_else_is_true():
    """Two pictures, three texts: text 0 is true of picture 0 and unsure of 1, text 1 true of both, text 2 of none."""
    logits = torch.tensor([[1.0, 7.0, 2.0], [8.0, 3.0, 4.0]], requires_grad=True)
    label = torch.tensor([[TRUE, TRUE, FALSE], [UNSURE, TRUE, FALSE]], dtype=torch.int8)
    loss = contrastive(logits, torch.tensor([0, 1]), label)
    expected = (math.log(1 + math.e) + math.log(1 + math.e)) / 2 / 2  # each picture: its text against text 2; texts: 0
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert logits.grad[0, 1] == 0 and logits.grad[1, 0] == 0 and (logits.grad[:, 2] > 0).all()


def test_looks_of_pictures_and_captions():
    table = look_truth()
    state = {TRUE: "yes", FALSE: "no", UNSURE: "?"}
    said = {
        (look, text): state[int(table[i, j])]
        for (i, look), (j, text) in itertools.product(enumerate(LOOKS), enumerate(TEXT_LOOKS))
    }
    assert said["clean", ""] == said["clean", "clean"] == said["light", ""] == said["noisy", "noisy"] == "yes"
    assert said["clean", "faded"] == said["noisy", "clean"] == said["blurry", "noisy"] == "no"
    assert said["light", "clean"] == said["light", "blurry"] == said["faded", ""] == "?"


@pytest.mark.parametrize("look", LOOKS)
def test_spoiling_does_what_its_name_says(look):
    specs = prompts("train")[:6]
    pictures = render(draw(specs, seed=0))
    spoilt = spoil(pictures, torch.full((6,), LOOKS.index(look)), torch.Generator().manual_seed(1))
    again = spoil(pictures, torch.full((6,), LOOKS.index(look)), torch.Generator().manual_seed(1))
    assert torch.equal(spoilt, again) and spoilt.min() >= 0 and spoilt.max() <= 1
    edges = (spoilt.diff(dim=-1).abs().amax((1, 2, 3)), pictures.diff(dim=-1).abs().amax((1, 2, 3)))
    contrast = (spoilt.std((1, 2, 3)), pictures.std((1, 2, 3)))
    if look == "clean":
        assert torch.equal(spoilt, pictures)
    elif look == "light":
        assert not torch.equal(spoilt, pictures) and (judge(detect(spoilt), specs).strict == 1).all()
    elif look == "blurry":
        assert (edges[0] < 0.6 * edges[1]).all()
    elif look == "noisy":
        assert (spoilt[:, :, :3, :3] - pictures[:, :, :3, :3]).std() > 0.03
    elif look == "faded":
        torch.testing.assert_close(contrast[0] / contrast[1], torch.full((6,), 0.4), rtol=0, atol=0.16)
    else:
        changed = (spoilt != pictures).any(1).float().mean((1, 2))
        assert (changed > 0.002).all() and (changed < 0.15).all()


def test_rank_correlation():
    """Without ties 1 - 6 sum d^2 / (n (n^2 - 1)); with ties, ranks (1.5, 1.5, 3) against (1, 2, 3) by hand."""
    a, b = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0]), torch.tensor([2.0, 7.0, 1.0, 8.0, 2.5])
    ranks = [[sorted(values.tolist()).index(value) for value in values.tolist()] for values in (a, b)]
    squares = sum((x - y) ** 2 for x, y in zip(*ranks, strict=True))
    assert spearman(a, b) == pytest.approx(1 - 6 * squares / (5 * 24))
    assert spearman(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(3) / 2)


class Identity(torch.nn.Module):
    """Stands for the autoencoder where only captions and labels are looked at."""

    encoder = decoder = torch.nn.Identity()


def test_a_batch_is_a_function_of_its_seed_and_its_captions_are_true():
    recipe = Recipe(pool=300, batch=16)
    pool = Pool(recipe, captions_of(TwoTowers(WORDS)), Identity())
    first, again, other = (pool.batch(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.pictures, again.pictures) and torch.equal(first.text, again.text)
    assert not torch.equal(first.pictures, other.pictures)
    assert (first.label.gather(1, first.own[:, None]) == TRUE).all()
    assert ((first.label == FALSE).sum(1) >= recipe.wrong_captions).all()


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_and_its_weights_load(tmp_path):
    recipe = Recipe(pool=100, steps=2, batch=4, test_scenes=60, test_samples=4)
    table = train_scorer(tmp_path / "scorer", recipe)
    assert any("caption/all" in line and line.endswith("| 60 |") for line in table)
    assert {path.name for path in (tmp_path / "scorer").iterdir()} == {
        "config.json",
        "model.safetensors",
        "recipe.json",
    }
    trained = loaded(weights=str(tmp_path / "scorer"))
    assert trained.score([Sample(media=torch.rand(3, 96, 96), prompt="a star")]).isfinite().all()
