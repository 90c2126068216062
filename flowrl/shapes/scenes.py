"""Scenes of the built-in world: which compositions exist, how a prompt becomes a scene, how a scene becomes pixels.

Objects stand in the cells of a 3 x 3 grid, one a cell, with a little jitter. Symbols: N scenes, K = 4 object slots.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.shapes import BACKGROUND, CATEGORIES, COLORS, NUMBERS, RELATIONS, SHAPES, SIZE, Spec, Thing, coverage

GRID = 3
CELL = SIZE / GRID
SLOTS = 4
JITTER = 1.5  # pixels
RADIUS = (9.0, 11.5)  # pixels
TINT = 0.03  # spread of an object's colour around its palette entry
HELD_OUT_EVERY = 4

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Scenes(NamedTuple):
    """N drawn scenes: shape [N,K] index into SHAPES (-1 empty), xy [N,K,2] and radius [N,K] in pixels, rgb [N,K,3]."""

    shape: Tensor
    xy: Tensor
    radius: Tensor
    rgb: Tensor


def render(scenes: Scenes, size: int = SIZE) -> Tensor:
    """Pictures [N,3,S,S] in [0,1] of the scenes; later slots cover earlier ones."""
    masks = coverage(scenes.shape, scenes.xy, scenes.radius, size)
    image = torch.full((len(scenes.shape), 3, size, size), BACKGROUND)
    for k in range(scenes.shape.shape[1]):
        mask = masks[:, k, None]
        image = image + mask * (scenes.rgb[:, k, :, None, None] - image)
    return image


# ------------------------------------------------------------------------------------------------ compositions


def _pairs(category: str, first: tuple[Thing, Thing], relation: str | None = None) -> tuple[Spec, ...]:
    """Both sentences that describe one composition of two things."""
    a, b = first
    return Spec(category, (a, b), relation), Spec(category, (b, a), _OPPOSITE[relation] if relation else None)


def compositions(category: str) -> list[tuple[Spec, ...]]:
    """Every composition of a category, each as the one or two sentences that mean the same thing, in a fixed order."""
    shapes, colors = SHAPES, tuple(COLORS)
    if category == "single":
        return [(Spec(category, (Thing(s),)),) for s in shapes]
    if category == "counting":
        return [(Spec(category, (Thing(s, count=n),)),) for s in shapes for n in NUMBERS.values()]
    if category == "colors":
        return [(Spec(category, (Thing(s, c),)),) for s in shapes for c in colors]
    if category == "two":
        return [_pairs(category, (Thing(a), Thing(b))) for a, b in itertools.combinations(shapes, 2)]
    if category == "position":
        pairs = itertools.permutations(shapes, 2)
        return [_pairs(category, (Thing(a), Thing(b)), r) for a, b in pairs for r in ("left of", "above")]
    if category == "attribution":
        shape_pairs, color_pairs = itertools.combinations(shapes, 2), list(itertools.permutations(colors, 2))
        return [_pairs(category, (Thing(a, c), Thing(b, d))) for a, b in shape_pairs for c, d in color_pairs]
    raise ValueError(f"unknown category {category!r}; the world has {', '.join(CATEGORIES)}")


def prompts(split: str) -> list[Spec]:
    """The prompts of a split, "train" or "held_out": no composition, in whichever wording, is in both.

    One composition in four of every category is held out, chosen by a fixed shuffle, so that it does not line up with
    the order in which shapes and colours are listed.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; use 'train' or 'held_out'")
    chosen: list[Spec] = []
    for category in CATEGORIES:
        everything = compositions(category)
        random.Random(category).shuffle(everything)
        for index, wordings in enumerate(everything):
            if (index % HELD_OUT_EVERY == 0) == (split == "held_out"):
                chosen.extend(wordings)
    return chosen


# ------------------------------------------------------------------------------------------------ scenes


def _cells(spec: Spec, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Distinct (column, row) cells; for a relation, the first clearly on its side: further along than across."""
    cells = [(x, y) for x in range(GRID) for y in range(GRID)]
    if spec.relation is None:
        return rng.sample(cells, count)
    ux, uy = RELATIONS[spec.relation]
    while True:
        a, b = rng.sample(cells, 2)
        along = (a[0] - b[0]) * ux + (a[1] - b[1]) * uy
        across = abs((a[0] - b[0]) * uy) + abs((a[1] - b[1]) * ux)
        if along > across:
            return [a, b]


def draw(specs: list[Spec], seed: int) -> Scenes:
    """One random scene for each spec; what the spec leaves open (colours, places, sizes) is drawn at random."""
    rng = random.Random(seed)
    n = len(specs)
    shape = torch.full((n, SLOTS), -1)
    xy, radius, rgb = torch.zeros(n, SLOTS, 2), torch.ones(n, SLOTS), torch.zeros(n, SLOTS, 3)
    names = list(COLORS)
    for i, spec in enumerate(specs):
        objects = [thing for thing in spec.things for _ in range(thing.count)]
        for k, (thing, cell) in enumerate(zip(objects, _cells(spec, len(objects), rng), strict=True)):
            color = COLORS[thing.color or rng.choice(names)]
            shape[i, k] = SHAPES.index(thing.shape)
            xy[i, k] = torch.tensor([(c + 0.5) * CELL + rng.uniform(-JITTER, JITTER) for c in cell])
            radius[i, k] = rng.uniform(*RADIUS)
            rgb[i, k] = torch.tensor([min(1.0, max(0.0, c + rng.uniform(-TINT, TINT))) for c in color])
    return Scenes(shape, xy, radius, rgb)
