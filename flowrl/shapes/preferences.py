"""Preferences in the built-in world: pairs of pictures of which one is better for a known reason.

What `flowrl reward eval` is tried on. A slice (category) a reason, in equal shares:

    color, position, missing   the scene of the prompt, and the same one with an object recoloured, two objects that
                               have changed places, an object that is gone
    count                      the right number of objects, and another number of the same
    blur, noise                a picture, and the same one spoiled
    text                       a sign that says a word, 256 pixels, and one that misspells it
    tie                        two true pictures: neither is better

Prompts are of the held-out split, which the shipped scorer was not trained on. Which of two is called a is drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from flowrl.data import DataError
from flowrl.pairs import PAIRS, save_media
from flowrl.shapes.scenes import Scenes, draw, prompts, render
from rewards.media import from_pil, to_pil
from rewards.shapes import COLORS, NUMBERS, Spec, Thing

__all__ = ["SLICES", "write_preferences"]

BLUR = 2.0  # pixels, standard deviation
NOISE = 0.12  # standard deviation
SIGN = 256  # pixels, side of a picture with a word
POINTS = 48
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = (
    "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket",
    "kitchen", "lantern", "market", "number", "orange", "pencil", "quiet", "river", "summer", "travel",
    "under", "valley", "window", "yellow", "bakery", "coffee", "museum", "planet", "ticket", "winter",
)  # fmt: skip

Drawn = tuple[str, Tensor, Tensor]
"""Prompt, the better picture [3,H,W], the other one; of a tie in either order."""


def write_preferences(output: Path, count: int, seed: int = 0) -> None:
    """`count` pairs in the native form of `rewards.preferences`: pairs.jsonl and PNG pictures; the same for a seed.

    DataError where the folder holds pairs already, or the count is below 1.
    """
    if (output / PAIRS).exists():
        raise DataError(f"{output} holds pairs already; give another folder.")
    if count < 1:
        raise DataError(f"count is {count}; ask for at least 1 pair.")
    names = list(SLICES)
    rows = [_row(output, number, names[number % len(names)], seed) for number in range(count)]
    (output / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(output: Path, number: int, category: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed} {number}")
    prompt, better, other = SLICES[category](rng)
    first = rng.random() < 0.5
    a, b = (better, other) if first else (other, better)
    label = 0 if category == "tie" else 1 if first else -1
    dim = "quality" if category in ("blur", "noise") else "alignment"
    files = {side: save_media(picture[None], output, f"{number:05d}_{side}") for side, picture in (("a", a), ("b", b))}
    return {"prompt": prompt, **files, "label": label, "category": category, "dim": dim}


# ------------------------------------------------------------------------------------------------ scenes


def _spec(rng: random.Random, *categories: str) -> Spec:
    """A held-out prompt, the categories in equal shares."""
    category = rng.choice(categories)
    return rng.choice([spec for spec in prompts("held_out") if spec.category == category])


def _scene(spec: Spec, rng: random.Random) -> Scenes:
    return draw([spec], rng.randrange(2**32))


def _picture(scene: Scenes) -> Tensor:
    return render(scene)[0]


def _color(rng: random.Random) -> Drawn:
    spec = _spec(rng, "colors", "attribution")
    scene = _scene(spec, rng)
    slot = rng.randrange(len(spec.things))
    other = rng.choice([name for name in COLORS if name != spec.things[slot].color])
    wrong = scene._replace(rgb=scene.rgb.clone())
    wrong.rgb[0, slot] = torch.tensor(COLORS[other])
    return spec.prompt, _picture(scene), _picture(wrong)


def _count(rng: random.Random) -> Drawn:
    spec = _spec(rng, "counting")
    (thing,) = spec.things
    other = rng.choice([number for number in NUMBERS.values() if number != thing.count])
    wrong = Spec(spec.category, (Thing(thing.shape, count=other),))
    return spec.prompt, _picture(_scene(spec, rng)), _picture(_scene(wrong, rng))


def _position(rng: random.Random) -> Drawn:
    spec = _spec(rng, "position")
    scene = _scene(spec, rng)
    wrong = scene._replace(xy=scene.xy.clone())
    wrong.xy[0, :2] = scene.xy[0, :2].flip(0)
    return spec.prompt, _picture(scene), _picture(wrong)


def _missing(rng: random.Random) -> Drawn:
    spec = _spec(rng, "two", "position", "attribution")
    scene = _scene(spec, rng)
    wrong = scene._replace(shape=scene.shape.clone())
    wrong.shape[0, rng.randrange(2)] = -1
    return spec.prompt, _picture(scene), _picture(wrong)


_ALL = ("single", "two", "counting", "colors", "position", "attribution")


def _blur(rng: random.Random) -> Drawn:
    spec = _spec(rng, *_ALL)
    picture = _picture(_scene(spec, rng))
    return spec.prompt, picture, from_pil(to_pil(picture).filter(ImageFilter.GaussianBlur(BLUR)))


def _noise(rng: random.Random) -> Drawn:
    spec = _spec(rng, *_ALL)
    picture = _picture(_scene(spec, rng))
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    return spec.prompt, picture, (picture + NOISE * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def _tie(rng: random.Random) -> Drawn:
    spec = _spec(rng, *_ALL)
    return spec.prompt, _picture(_scene(spec, rng)), _picture(_scene(spec, rng))


# ------------------------------------------------------------------------------------------------ text


def _text(rng: random.Random) -> Drawn:
    word = rng.choice(_WORDS)
    corner = rng.randrange(8, 40), rng.randrange(20, SIGN - 80)
    return f'a sign that says "{word}"', _sign(word, corner), _sign(misspelt(word, rng), corner)


def misspelt(word: str, rng: random.Random) -> str:
    """A word with one letter replaced, left out, or put in twice; never the word itself."""
    at = rng.randrange(len(word))
    letter = rng.choice([each for each in _LETTERS if each != word[at]])
    middle = rng.choice([letter, "", word[at] * 2])
    return word[:at] + middle + word[at + 1 :]


def _sign(word: str, corner: tuple[int, int]) -> Tensor:
    image = Image.new("RGB", (SIGN, SIGN), "white")
    ImageDraw.Draw(image).text(corner, word, fill="black", font=ImageFont.load_default(POINTS))
    return from_pil(image)


SLICES: dict[str, Callable[[random.Random], Drawn]] = {
    "color": _color, "count": _count, "position": _position, "missing": _missing,
    "blur": _blur, "noise": _noise, "text": _text, "tie": _tie,
}  # fmt: skip
"""{category: what draws a pair of it}"""
