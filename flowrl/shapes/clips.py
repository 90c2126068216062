"""Clips of the built-in world that moves: which sentences exist, how one becomes tracks, how tracks become frames.

A clip is 9 frames of 32 x 32 pixels with one or two coloured shapes. A mover goes straight at constant speed and stays
inside the picture; two movers go along one axis in lanes of their own, so that they never cover each other.
Symbols: N clips, K = 2 actors, F = 9 frames.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.motion import CATEGORIES, DIRECTIONS, EVENTS, FRAMES, SHAPES, SIZE, TRAVEL, Actor, Clip
from rewards.shapes import BACKGROUND, COLORS, coverage
from rewards.shapes import SHAPES as ALL_SHAPES

ACTORS = 2
RADIUS = (4.4, 5.2)  # pixels
MARGIN = 6.0  # pixels that a centre keeps from the picture's edge
LANES = (8.5, 23.5)
JITTER = 1.0  # pixels around a lane
DRAWN = {"slowly": (5.0, 8.5), "fast": (13.0, 18.0)}
"""Pixels that the drawn movers travel: well inside of what the reward accepts."""
SWITCH = (3, 6)  # first frame after an actor appeared or disappeared, both ends included
TINT = 0.02  # spread of an actor's colour around its palette entry
HELD_OUT_EVERY = 4


class Tracks(NamedTuple):
    """N drawn clips.

    shape [N,K] index into `rewards.shapes.SHAPES` (-1 empty); xy [N,K,F,2] and radius [N,K] in pixels; rgb [N,K,3];
    shown bool [N,K,F].
    """

    shape: Tensor
    xy: Tensor
    radius: Tensor
    rgb: Tensor
    shown: Tensor


def render(tracks: Tracks) -> Tensor:
    """Clips [N,F,3,32,32] in [0,1] of the tracks."""
    shape = torch.where(tracks.shown, tracks.shape[..., None], -1)
    masks = coverage(shape, tracks.xy, tracks.radius[..., None].expand_as(shape), SIZE)
    video = torch.full((len(shape), shape.shape[2], 3, SIZE, SIZE), BACKGROUND)
    for k in range(shape.shape[1]):
        video = video + masks[:, k, :, None] * (tracks.rgb[:, k, None, :, None, None] - video)
    return video


# ------------------------------------------------------------------------------------------------ sentences


def compositions(category: str, shapes: tuple[str, ...] = SHAPES) -> list[tuple[Clip, ...]]:
    """Every composition of a category, each as the one or two sentences that mean the same thing, in a fixed order."""
    things = [(shape, color) for shape in shapes for color in COLORS]
    if category == "move":
        return [(Clip(category, (Actor(s, c, d),)),) for s, c in things for d in DIRECTIONS]
    if category == "speed":
        speeds = [speed for speed in TRAVEL if speed]
        return [(Clip(category, (Actor(s, c, d, v),)),) for s, c in things for d in DIRECTIONS for v in speeds]
    if category == "event":
        return [(Clip(category, (Actor(s, c, e),)),) for s, c in things for e in EVENTS]
    if category == "two":
        pairs = [(a, b) for a, b in itertools.combinations(things, 2) if a[1] != b[1]]
        axes = (("left", "right"), ("up", "down"))
        return [
            (Clip(category, (Actor(*a, d), Actor(*b, e))), Clip(category, (Actor(*b, e), Actor(*a, d))))
            for a, b in pairs for axis in axes for d in axis for e in axis
        ]  # fmt: skip
    raise ValueError(f"unknown category {category!r}; the world has {', '.join(CATEGORIES)}")


def prompts(split: str, shapes: tuple[str, ...] = SHAPES) -> list[Clip]:
    """The prompts of a split, "train" or "held_out": no composition, in whichever wording, is in both.

    One composition in four of every category is held out, chosen by a fixed shuffle.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; use 'train' or 'held_out'")
    chosen: list[Clip] = []
    for category in CATEGORIES:
        everything = compositions(category, shapes)
        random.Random(category).shuffle(everything)
        for index, wordings in enumerate(everything):
            if (index % HELD_OUT_EVERY == 0) == (split == "held_out"):
                chosen.extend(wordings)
    return chosen


# ------------------------------------------------------------------------------------------------ tracks


def _path(actor: Actor, lane: float | None, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of one actor, frame by frame; `lane` is where it stands across its way, None = anywhere."""
    low, high = MARGIN, SIZE - MARGIN
    across = rng.uniform(low, high) if lane is None else lane + rng.uniform(-JITTER, JITTER)
    if actor.does in EVENTS:
        return [(rng.uniform(low, high), across)] * FRAMES
    ux, uy = DIRECTIONS[actor.does]
    travel = rng.uniform(*DRAWN[actor.speed or rng.choice(list(DRAWN))])
    start = rng.uniform(low, high - travel)
    along = [start + travel * i / (FRAMES - 1) for i in range(FRAMES)]
    if ux + uy < 0:
        along.reverse()
    return [(a, across) if ux else (across, a) for a in along]


def _shown(actor: Actor, rng: random.Random) -> list[bool]:
    """In which frames an actor is to be seen."""
    if actor.does not in EVENTS:
        return [True] * FRAMES
    switch = rng.randint(*SWITCH)
    return [(i >= switch) == (actor.does == "appears") for i in range(FRAMES)]


def draw(clips: list[Clip], seed: int) -> Tracks:
    """Random tracks for each clip; what its sentence leaves open (places, sizes, exact speeds) is drawn at random."""
    rng = random.Random(seed)
    n = len(clips)
    shape = torch.full((n, ACTORS), -1)
    xy, radius = torch.zeros(n, ACTORS, FRAMES, 2), torch.ones(n, ACTORS)
    rgb, shown = torch.zeros(n, ACTORS, 3), torch.zeros(n, ACTORS, FRAMES, dtype=torch.bool)
    for i, clip in enumerate(clips):
        lanes = rng.sample(LANES, 2) if len(clip.actors) == 2 else [None]
        for k, (actor, lane) in enumerate(zip(clip.actors, lanes, strict=True)):
            shape[i, k] = ALL_SHAPES.index(actor.shape)
            xy[i, k] = torch.tensor(_path(actor, lane, rng))
            radius[i, k] = rng.uniform(*RADIUS)
            rgb[i, k] = torch.tensor([c + rng.uniform(-TINT, TINT) for c in COLORS[actor.color]]).clamp(0, 1)
            shown[i, k] = torch.tensor(_shown(actor, rng))
    return Tracks(shape, xy, radius, rgb, shown)
