"""Train the built-in world's scorer, a small CLIP (arXiv:2103.00020): what `rewards/shapes_clip.py` loads.

CLIP's symmetric loss on rendered scenes, with three additions: hard negatives (the caption with one thing changed, or
two things swapped), control words (pictures are spoilt on purpose, and captions say how), and pictures that went
through the built-in autoencoder, as generated ones do. Captions, wrong ones too, are of the train split only.

`flowrl shapes train-scorer --output DIR` runs it and measures the result on held-out captions.
Symbols: B pictures of a batch, U different texts of a batch, P train prompts, n pictures.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flowrl.shapes.pretrain import INFERENCE, Muon, Stage
from flowrl.shapes.scenes import Scenes, draw, prompts, render
from rewards.shapes import BACKGROUND, CATEGORIES, COLORS, NUMBERS, RELATIONS, SHAPES, Spec, detect, judge
from rewards.shapes_clip import CONTROLS, WORDS, ShapesClip, TwoTowers

TEXT_LOOKS = ("", *CONTROLS)  # what may stand before a caption
LOOKS = ("clean", "light", *CONTROLS[1:])  # what may be done to a picture
_LOOK_WEIGHTS = (0.5, 0.14, 0.09, 0.09, 0.09, 0.09)
_MIX = {"single": 1, "two": 2, "counting": 3, "colors": 1, "position": 4, "attribution": 4}
TRUE, UNSURE, FALSE = 1, 0, -1
_LOG_SCALE_MAX = math.log(100.0)  # as CLIP


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a training run. The defaults made the weights that are shipped."""

    seed: int = 0
    steps: int = 1_600
    batch: int = 64
    pool: int = 24_000
    """Scenes rendered once and drawn from ever after."""
    decoded: float = 1 / 3
    """Share of the pool that went through the autoencoder."""
    latent_noise: float = 0.35
    """Largest std of the noise on their latents: the decoder has learnt to undo that much."""
    own_caption: float = 0.7
    """Share of pictures with the caption they were drawn for; the others get any other true one."""
    wrong_captions: int = 3
    """Hard negatives of a caption."""
    unknown: float = 0.03
    """Share of articles replaced by the unknown word, so that it means nothing rather than anything."""
    ema: float = 0.998
    test_scenes: int = 2_000
    test_samples: int = 400
    """Pictures of the built-in model, on which the scorer is compared with the strict reward."""


# ------------------------------------------------------------------------------------------------ truth


def differences(a: Spec, b: Spec) -> int:
    """How many words (shape, colour, number, relation) tell two specs of one category apart."""
    pairs = zip(a.things, b.things, strict=True)
    changed = sum((s.shape != t.shape) + (s.color != t.color) + (s.count != t.count) for s, t in pairs)
    return changed + (a.relation != b.relation)


def swapped(spec: Spec) -> Spec | None:
    """The spec with its two colours exchanged, or else its two places: the same words, another picture."""
    if spec.category == "attribution":
        a, b = spec.things
        return replace(spec, things=(replace(a, color=b.color), replace(b, color=a.color)))
    return replace(spec, things=spec.things[::-1]) if spec.relation else None


def mistakes(spec: Spec, world: Sequence[Spec]) -> list[Spec]:
    """The specs of `world` that are the given one with one word wrong."""
    return [other for other in world if other.category == spec.category and differences(spec, other) == 1]


def meanings(shapes: Sequence[str], colors: Sequence[str], xy: Sequence[Sequence[float]]) -> tuple[set[str], set[str]]:
    """The prompts that are true of the objects of a scene, and those about which one could disagree.

    As the strict reward has it: nothing else may be in the picture. Near a diagonal nobody is left of anybody for sure.
    """
    if len(shapes) == 1:
        return {f"a {shapes[0]}", f"a {colors[0]} {shapes[0]}"}, set()
    if len(set(shapes)) == 1:
        return {f"{word} {shapes[0]}s" for word, number in NUMBERS.items() if number == len(shapes)}, set()
    true: set[str] = set()
    unsure: set[str] = set()
    for a, b in ((0, 1), (1, 0)):
        true |= {f"a {shapes[a]} and a {shapes[b]}", f"a {colors[a]} {shapes[a]} and a {colors[b]} {shapes[b]}"}
        step = [xy[a][0] - xy[b][0], xy[a][1] - xy[b][1]]
        for relation, (ux, uy) in RELATIONS.items():
            along, across = step[0] * ux + step[1] * uy, abs(step[0] * uy) + abs(step[1] * ux)
            if along > 0 and 0.7 < across / along < 1.4:
                unsure.add(f"a {shapes[a]} {relation} a {shapes[b]}")
            elif along > across:
                true.add(f"a {shapes[a]} {relation} a {shapes[b]}")
    return true, unsure


def truth(scenes: Scenes, texts: Sequence[str]) -> Tensor:
    """int8 [n,P]: whether each of the texts is TRUE, FALSE or UNSURE of each of the scenes."""
    index = {text: i for i, text in enumerate(texts)}
    table = torch.full((len(scenes.shape), len(texts)), FALSE, dtype=torch.int8)
    palette, names = torch.tensor(list(COLORS.values())), list(COLORS)
    nearest = (scenes.rgb[:, :, None] - palette).norm(dim=-1).argmin(-1).tolist()
    for row, shape, color, xy in zip(table, scenes.shape.tolist(), nearest, scenes.xy.tolist(), strict=True):
        filled = [k for k, kind in enumerate(shape) if kind >= 0]
        found = meanings([SHAPES[shape[k]] for k in filled], [names[color[k]] for k in filled], [xy[k] for k in filled])
        for value, sentences in zip((TRUE, UNSURE), found, strict=True):
            row[[index[text] for text in sentences if text in index]] = value
    return table


def look_truth() -> Tensor:
    """int8 [LOOKS, TEXT_LOOKS]: whether a picture that looks so may have a caption that begins so.

    A caption without a control word is about the content: a spoilt picture is neither right nor wrong for it.
    """
    table = torch.full((len(LOOKS), len(TEXT_LOOKS)), FALSE, dtype=torch.int8)
    table[0, :2] = TRUE  # a clean picture: no control word, or "clean."
    table[1] = UNSURE
    table[1, 0] = TRUE
    for look in range(2, len(LOOKS)):
        table[look, 0], table[look, look] = UNSURE, TRUE
    return table


# ------------------------------------------------------------------------------------------------ pictures


def spoil(pictures: Tensor, looks: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n,3,S,S] in [0,1], each made to look as `looks` [n] (index into LOOKS) says, by a random amount."""
    from torchvision.transforms.functional import gaussian_blur

    n = len(pictures)
    strength = torch.rand(n, generator=generator)
    weak = looks == 1
    kind = torch.where(weak, torch.randint(2, 5, (n,), generator=generator), looks)  # light: blur, noise or fading
    out = pictures.clone()
    for i in (kind == 2).nonzero()[:, 0].tolist():
        sigma = 0.3 + 0.4 * strength[i] if weak[i] else 1.2 + 1.8 * strength[i]
        out[i] = gaussian_blur(out[i], [13, 13], [float(sigma)])
    std = torch.where(weak, 0.01 + 0.03 * strength, 0.08 + 0.17 * strength)[:, None, None, None]
    noise = torch.randn(out.shape, generator=generator)
    out = torch.where((kind == 3)[:, None, None, None], out + std * noise, out)
    keep = torch.where(weak, 0.8 + 0.15 * strength, 0.25 + 0.3 * strength)[:, None, None, None]
    out = torch.where((kind == 4)[:, None, None, None], BACKGROUND + keep * (out - BACKGROUND), out)
    for i in (kind == 5).nonzero()[:, 0].tolist():
        out[i] = _litter(out[i], int(3 + 6 * strength[i]), generator)
    return out.clamp(0, 1)


def _litter(picture: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A picture [3,S,S] with `count` small round blobs of any colour somewhere on it."""
    axis = torch.arange(picture.shape[-1]) + 0.5
    spots = torch.rand(count, 6, generator=generator)
    for x, y, radius, *rgb in spots.tolist():
        distance = torch.hypot(axis - x * len(axis), axis[:, None] - y * len(axis))
        cover = (1.5 + 2.5 * radius + 0.5 - distance).clamp(0, 1)
        picture = picture + cover * (torch.tensor(rgb)[:, None, None] - picture)
    return picture


def built_in_pipeline() -> Any:
    """The built-in model as a diffusers pipeline, float32."""
    from diffusers import StableDiffusion3Pipeline

    from flowrl.models.pipeline import resolve

    parts = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(resolve("shapes"), dtype=torch.float32, **parts)


@torch.no_grad()
def rendered(
    scenes: Scenes, autoencoder: nn.Module, decoded: float, noise: float, seed: int, chunk: int = 250
) -> Tensor:
    """uint8 pictures [n,3,S,S] of scenes; a share `decoded` is decoded from latents with noise of std 0 to `noise`."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(scenes.shape), chunk):
        pictures = render(Scenes(*(field[start : start + chunk] for field in scenes)))
        passed = round(decoded * len(pictures))
        z = autoencoder.encoder(2 * pictures[:passed] - 1)
        std = noise * torch.rand(passed, 1, 1, 1, generator=generator)
        pictures[:passed] = autoencoder.decoder(z + std * torch.randn(z.shape, generator=generator)).add(1).div(2)
        out.append((pictures.clamp(0, 1) * 255).round().byte())
    return torch.cat(out)


def mixed(specs: Sequence[Spec], count: int, seed: int) -> list[Spec]:
    """`count` of the specs at random, more of the hard categories."""
    rng = random.Random(seed)
    by_category = {category: [spec for spec in specs if spec.category == category] for category in CATEGORIES}
    return [rng.choice(by_category[c]) for c in rng.choices(list(_MIX), list(_MIX.values()), k=count)]


# ------------------------------------------------------------------------------------------------ training


class Captions(NamedTuple):
    """What can be said: texts of the P train prompts, the word ids [6P,L] of `look * P + prompt`, and what is hard."""

    texts: list[str]
    ids: Tensor
    wrong: list[list[int]]
    """Prompts with one word wrong, or two swapped, for each of the P."""


def captions_of(network: TwoTowers) -> Captions:
    """The captions of the train split."""
    world = prompts("train")
    texts = [spec.prompt for spec in world]
    index = {text: i for i, text in enumerate(texts)}
    wrong = []
    for spec in world:
        near = mistakes(spec, world)
        near += [other] * len(near) if (other := swapped(spec)) else []  # half of them: binding is what is hard
        wrong.append([index[s.prompt] for s in near if s.prompt in index])
    return Captions(texts, network.tokens([f"{look} {text}" for look in TEXT_LOOKS for text in texts]), wrong)


class Batch(NamedTuple):
    """pictures [B,3,S,S] in [0,1]; text [U] codes `look * P + prompt`; own [B] each picture's place among them.

    label int8 [B,U]: TRUE, FALSE or UNSURE.
    """

    pictures: Tensor
    text: Tensor
    own: Tensor
    label: Tensor


class Pool:
    """Rendered scenes and all that is true of them; batches are drawn from it."""

    def __init__(self, recipe: Recipe, captions: Captions, autoencoder: nn.Module) -> None:
        self.recipe, self.captions = recipe, captions
        specs = mixed(prompts("train"), recipe.pool, recipe.seed + 1)
        scenes = draw(specs, recipe.seed + 1)
        self.pictures = rendered(scenes, autoencoder, recipe.decoded, recipe.latent_noise, recipe.seed + 2)
        self.truth = truth(scenes, captions.texts)
        index = {text: i for i, text in enumerate(captions.texts)}
        self.prompt = [index[spec.prompt] for spec in specs]
        self.drawn_for: list[list[int]] = [[] for _ in captions.texts]
        for row, prompt in enumerate(self.prompt):
            self.drawn_for[prompt].append(row)
        self.looks = look_truth()

    def batch(self, generator: torch.Generator) -> Batch:
        """Pairs of scenes of nearly the same prompt, spoilt or not, with a true caption and wrong ones for each."""
        recipe, num = self.recipe, len(self.captions.texts)
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        rows: list[int] = []
        while len(rows) < recipe.batch:
            rows.append(rng.randrange(len(self.prompt)))
            near = [p for p in self.captions.wrong[self.prompt[rows[-1]]] if self.drawn_for[p]]
            rows.append(rng.choice(self.drawn_for[rng.choice(near)]) if near else rng.randrange(len(self.prompt)))
        looks = rng.choices(range(len(LOOKS)), _LOOK_WEIGHTS, k=len(rows))
        own, wrong = [], []
        for row, look in zip(rows, looks, strict=True):
            said = self.prompt[row]
            if rng.random() >= recipe.own_caption:
                said = rng.choice((self.truth[row] == TRUE).nonzero()[:, 0].tolist())
            how = rng.choice((self.looks[look] == TRUE).nonzero()[:, 0].tolist())
            own.append(how * num + said)
            wrong += [how * num + p for p in rng.choices(self.captions.wrong[said], k=recipe.wrong_captions)]
            wrong.append(rng.randrange(1, len(TEXT_LOOKS)) * num + said)
        text, place = torch.tensor(own + wrong).unique(return_inverse=True)
        content, look = self.truth[rows][:, text % num], self.looks[looks][:, text // num]
        pictures = spoil(self.pictures[rows].float() / 255, torch.tensor(looks), generator)
        return Batch(pictures, text, place[: len(rows)], torch.minimum(content, look))


def contrastive(logits: Tensor, own: Tensor, label: Tensor) -> Tensor:
    """CLIP's symmetric loss (arXiv:2103.00020, figure 3) on logits [B,U], with more texts than pictures.

    own [B]: each picture's caption. For a picture it competes with all texts that are FALSE of the picture; for a
    caption its picture competes with all pictures of which it is FALSE. What else is true, or unsure, does not count.
    """
    rows = torch.arange(len(own))
    counted = label == FALSE
    of_text = logits.T[own].masked_fill(~(counted.T[own] | torch.eye(len(own), dtype=torch.bool)), -math.inf)
    counted = counted.index_put((rows, own), torch.tensor(True))
    of_picture = logits.masked_fill(~counted, -math.inf)
    return (F.cross_entropy(of_picture, own) + F.cross_entropy(of_text, rows)) / 2


def train(recipe: Recipe, folder: Path, autoencoder: nn.Module) -> TwoTowers:
    """Run (or continue) the training in `folder`; the averaged weights."""
    torch.manual_seed(recipe.seed)
    network = TwoTowers(WORDS).to(memory_format=torch.channels_last)
    captions = captions_of(network)
    matrices = [p for name, p in network.named_parameters() if "_blocks" in name and p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in taken]
    optimizers = [Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-2)]
    stage = Stage(folder, nn.ModuleDict({"network": network}), optimizers, recipe.ema)
    pool = Pool(recipe, captions, autoencoder)
    articles = network.tokens(["a"])[0, 0]
    unknown = network.tokens(["?"])[0, 0]

    def loss(generator: torch.Generator) -> Tensor:
        batch = pool.batch(generator)
        ids = captions.ids[batch.text]
        dropped = (ids == articles) & (torch.rand(ids.shape, generator=generator) < recipe.unknown)
        texts = network.texts(torch.where(dropped, unknown, ids))
        images = network.images(batch.pictures.contiguous(memory_format=torch.channels_last))
        scale = network.log_scale.clamp(max=_LOG_SCALE_MAX).exp()
        return contrastive(scale * images @ texts.T, batch.own, batch.label)

    stage.run(recipe.steps, loss, recipe.seed, save_every=500)
    stage.finish()
    with torch.no_grad():
        network.log_scale.clamp_(max=_LOG_SCALE_MAX)
    return network.eval()


def write(network: TwoTowers, recipe: Recipe, output: Path) -> None:
    """config.json, recipe.json and model.safetensors in float16: what `ShapesClip(weights=...)` reads."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps({"words": WORDS}, indent=2) + "\n")
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ measurement


class Figure(NamedTuple):
    """One question: how often a right answer scores higher than a wrong one, and of how many."""

    name: str
    accuracy: float
    num: int


def accuracies(scorer: ShapesClip, scenes: int, seed: int, autoencoder: nn.Module) -> list[Figure]:
    """Right against wrong on new scenes of held-out prompts, half of them through the autoencoder.

    caption/*: the true caption against one with one word wrong, by category; swapped/*: against the same words with
    colours or places exchanged. text/*: on a clean picture "clean." against a control word that is wrong, and on a
    spoilt one the right control word against "clean."; picture/*: with "clean.", a clean picture against a spoilt one.
    """
    world = prompts("train") + prompts("held_out")
    known = {spec.prompt for spec in world}
    specs = mixed(prompts("held_out"), scenes, seed)
    pictures = rendered(draw(specs, seed), autoencoder, 0.5, 0.35, seed).float() / 255
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def cosine(features: Tensor, texts: Sequence[str]) -> Tensor:
        return (features * scorer.text_features(texts)).sum(-1)

    def features_of(media: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([scorer.image_features(part) for part in media.split(250)])

    features = features_of(pictures)
    true = cosine(features, [spec.prompt for spec in specs])
    right = true > cosine(features, [rng.choice(mistakes(spec, world)).prompt for spec in specs])
    category = [spec.category for spec in specs]

    def test(name: str, values: Tensor) -> Figure:
        return Figure(name, float(values.double().mean()), len(values))

    tests = [test("caption/all", right)]
    tests += [test(f"caption/{c}", right[[got == c for got in category]]) for c in CATEGORIES]
    for c in ("position", "attribution"):
        at = [i for i, spec in enumerate(specs) if spec.category == c]
        others = [other.prompt if (other := swapped(specs[i])) and other.prompt in known else "" for i in at]
        kept = [k for k, text in enumerate(others) if text]
        rows = [at[k] for k in kept]
        tests.append(test(f"swapped/{c}", true[rows] > cosine(features[rows], [others[k] for k in kept])))

    def said(look: str) -> list[str]:
        return [f"{look}. {spec.prompt}" for spec in specs]

    clean = cosine(features, said("clean"))
    for number, look in enumerate(CONTROLS[1:], start=2):
        spoilt = features_of(spoil(pictures, torch.full((scenes,), number), generator))
        as_clean = cosine(spoilt, said("clean"))
        tests.append(test(f"text/clean picture, not {look}", clean > cosine(features, said(look))))
        tests.append(test(f"text/{look} picture, not clean", cosine(spoilt, said(look)) > as_clean))
        tests.append(test(f"picture/clean, not {look}", clean > as_clean))
    return tests


@torch.no_grad()
def agreement(scorer: ShapesClip, count: int, seed: int, pipe: Any) -> dict[str, float]:
    """Spearman correlation of the score with the strict and the soft reward on the built-in model's own pictures."""
    specs = mixed(prompts("held_out"), count, seed)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = [
        pipe([spec.prompt for spec in specs[i : i + 50]], generator=generator, output_type="pt", **INFERENCE).images
        for i in range(0, count, 50)
    ]
    pictures = torch.cat(made)
    texts = [spec.prompt for spec in specs]
    scores = (scorer.image_features(pictures) * scorer.text_features(texts)).sum(-1)
    verdict = judge(detect(pictures), specs)
    return {"strict": spearman(scores, verdict.strict), "soft": spearman(scores, verdict.soft)}


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two sets of n numbers; equal numbers share the mean of their ranks."""
    ranks = []
    for values in (a, b):
        _, group, size = values.unique(return_inverse=True, return_counts=True)
        ranks.append((size.cumsum(0) - (size - 1) / 2)[group].double())
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def measure(scorer: ShapesClip, recipe: Recipe, pipe: Any) -> list[str]:
    """The figures as lines of a Markdown table."""
    tests = accuracies(scorer, recipe.test_scenes, recipe.seed + 1_000, pipe.vae)
    lines = ["| question | right | of |", "|---|---|---|"]
    lines += [f"| {test.name} | {test.accuracy:.1%} | {test.num} |" for test in tests]
    for name, value in agreement(scorer, recipe.test_samples, recipe.seed + 2_000, pipe).items():
        lines.append(f"| Spearman correlation with the {name} reward | {value:.2f} | {recipe.test_samples} |")
    return lines


def train_scorer(output: Path, recipe: Recipe = Recipe()) -> list[str]:
    """Train, write the weights to `output` and measure what was written; the lines of the table of figures."""
    pipe = built_in_pipeline()
    work = output / ".train"
    write(train(recipe, work, pipe.vae), recipe, output)
    shutil.rmtree(work)
    scorer = ShapesClip(weights=str(output))
    scorer.load()
    return measure(scorer, recipe, pipe)
