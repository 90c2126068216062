"""The verifiable reward of the built-in world that moves: does a clip show the motion that a sentence asks for?

    grammar     Clip <-> prompt, four categories
    detector    track(): colour masks of every frame, their areas, centroids and template overlaps
    judge       judge(): strict 0/1, dense partial credit
    reward      Motion: the above for samples

Symbols: N clips, F frames, C = 5 colours, K shapes, S = 32 the side of a frame; coordinates are pixels, x to the right,
y downwards; the centre of the first pixel is at 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.card import Card
from rewards.shapes import BACKGROUND, COLORS, coverage, unit_area
from rewards.shapes import SHAPES as ALL_SHAPES
from rewards.types import MediaKind, RewardError, Sample, Scores

# ------------------------------------------------------------------------------------------------ grammar

SIZE = 32
FRAMES = 9
SHAPES = ("circle", "triangle")  # so small, squares and stars are all but circles
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = {None: (3.0, 32.0), "slowly": (3.0, 10.5), "fast": (10.5, 32.0)}
"""Pixels between the first and the last frame that count as each speed; None = any."""
EVENTS = ("appears", "disappears")
CATEGORIES = ("move", "speed", "event", "two")


@dataclass(frozen=True, slots=True)
class Actor:
    """One coloured shape and what it does: moves in a direction (at a speed, None = any), or appears or disappears."""

    shape: str
    color: str
    does: str
    speed: str | None = None

    @property
    def phrase(self) -> str:
        """The actor's part of the sentence."""
        verb = self.does if self.does in EVENTS else f"moves {self.does}"
        return f"a {self.color} {self.shape} {verb}" + (f" {self.speed}" if self.speed else "")


@dataclass(frozen=True, slots=True)
class Clip:
    """A prompt's meaning: one actor, or two of different colours."""

    category: str
    actors: tuple[Actor, ...]

    @property
    def prompt(self) -> str:
        """The one sentence that asks for this."""
        return " and ".join(actor.phrase for actor in self.actors)


_ACTOR = re.compile(
    rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:({'|'.join(EVENTS)})|moves ({'|'.join(DIRECTIONS)})(?: (slowly|fast))?)"
)


def parse(prompt: str) -> Clip | None:
    """The meaning of a prompt of this world, or None when the sentence is not one of its grammar."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    found = [_ACTOR.fullmatch(phrase) for phrase in text.split(" and ")]
    actors = tuple(Actor(m[2], m[1], m[3] or m[4], m[5]) for m in found if m)
    if len(actors) != len(found) or len(actors) > 2 or len({actor.color for actor in actors}) != len(actors):
        return None
    if len(actors) == 2:
        return Clip("two", actors)
    (actor,) = actors
    return Clip("event" if actor.does in EVENTS else "speed" if actor.speed else "move", actors)


# ------------------------------------------------------------------------------------------------ detector

FULL_AREA = 30.0  # pixels from which an actor is wholly there; the smallest drawn one has 42
MIN_AREA = 20.0  # pixels from which it is there at all
GHOST_AREA = 6.0  # pixels up to which it is gone
FAINT = 0.25  # of the way from background to a colour: less is dirt
_WINDOW = 16  # pixels, the side of the square in which an actor meets its templates; the largest is 14 wide
_CHUNK = 32  # clips at once: what they need stays in the cache


class Tracks(NamedTuple):
    """Where and how the asked colours are in N clips; A = 2 actors, F frames.

    area [N,A,F] pixels; xy [N,A,F,2] centroid, the middle of the frame where there is none; iou [N,A,F,K] overlap with
    the template of every shape of that area at that place; foreign [N] pixels a frame of colours that nobody asked for;
    residual [N] RMS in RGB units of what no palette colour over the background explains; finite [N] False where the
    clip holds NaN or infinity.
    """

    area: Tensor
    xy: Tensor
    iou: Tensor
    foreign: Tensor
    residual: Tensor
    finite: Tensor


@torch.no_grad()
def track(clips: Tensor, colors: Tensor) -> Tracks:
    """Follow the colours [N,A] (index into the palette, -1 = none) through clips [N,F,3,32,32] in [0,1]."""
    parts = zip(torch.split(clips, _CHUNK), torch.split(colors, _CHUNK), strict=True)
    tracks = [_track(chunk, chosen) for chunk, chosen in parts]
    return Tracks(*(torch.cat(field) for field in zip(*tracks, strict=True)))


def _track(clips: Tensor, colors: Tensor) -> Tracks:
    pixels = clips.float()
    finite = pixels.sum((1, 2, 3, 4)).isfinite()  # one NaN or infinity is enough to spoil the sum
    pixels = torch.where(finite[:, None, None, None, None], pixels, BACKGROUND).clamp(0, 1)
    palette = torch.tensor(list(COLORS.values()), device=pixels.device)
    covered, residual = _explain(pixels, palette)  # [N,C,F,S,S]
    area = covered.sum((-2, -1))
    asked = colors >= 0
    wanted = F.one_hot(colors + 1, len(palette) + 1)[..., 1:].amax(1)  # [N,C]; -1 is none of them
    foreign = (area.mean(-1) * (1 - wanted)).sum(1)
    rows = torch.arange(len(clips), device=pixels.device)[:, None]
    masks = covered[rows, colors.clamp(min=0)] * asked[:, :, None, None, None]  # [N,A,F,S,S]
    area, xy = _centroids(masks)
    return Tracks(area, xy, _overlaps(masks, area, xy), foreign, residual, finite)


def _explain(pixels: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel [N,C,F,S,S] each colour covers, at most one of them; the RMS [N] of what that misses."""
    away = pixels - BACKGROUND
    direction = palette - BACKGROUND
    length = direction.norm(dim=1)
    along = torch.einsum("nfchw,kc->nkfhw", away, direction / length[:, None])
    hue = along.argmax(1, keepdim=True)
    way = (along / length.view(-1, 1, 1, 1)).clamp(0, 1)
    is_hue = torch.arange(len(palette), device=pixels.device).view(-1, 1, 1, 1) == hue
    covered = torch.where(is_hue & (way >= FAINT), way, 0.0)
    missed = away - torch.einsum("nkfhw,kc->nfchw", covered, direction)
    return covered, missed.square().mean((1, 2, 3, 4)).sqrt()


def _centroids(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Area [...] and centroid [...,2] of masks [...,S,S]; the middle where there is nothing."""
    side = masks.shape[-1]
    axis = torch.arange(side, device=masks.device) + 0.5
    area = masks.sum((-2, -1))
    sums = torch.stack([masks.sum(-2) @ axis, masks.sum(-1) @ axis], -1)
    return area, torch.where(area[..., None] > 0, sums / area[..., None].clamp(min=1e-6), side / 2)


def _overlaps(masks: Tensor, area: Tensor, xy: Tensor) -> Tensor:
    """IoU [...,K] of masks [...,S,S] with the shapes of the same area at the same place."""
    side = masks.shape[-1]
    corner = (xy.round().long() - _WINDOW // 2).clamp(0, side - _WINDOW)
    steps = torch.arange(_WINDOW, device=masks.device)
    row, column = corner[..., 1, None] + steps, corner[..., 0, None] + steps
    near = (row[..., :, None] * side + column[..., None, :]).flatten(-2)
    seen = masks.flatten(-2).gather(-1, near).reshape(*area.shape, 1, _WINDOW, _WINDOW)
    unit = torch.tensor([unit_area(name) for name in SHAPES], device=masks.device)
    radius = (area[..., None] / unit).sqrt().clamp(max=side)
    kinds = torch.tensor([ALL_SHAPES.index(name) for name in SHAPES], device=masks.device).expand_as(radius)
    cover = coverage(kinds, (xy - corner)[..., None, :].expand(*radius.shape, 2), radius, _WINDOW)
    shared = torch.minimum(cover, seen).sum((-2, -1))
    either = area[..., None] + cover.sum((-2, -1)) - shared  # what overflows the window is part of no template
    return shared / either.clamp(min=1e-6)


# ------------------------------------------------------------------------------------------------ judge


@dataclass(frozen=True, slots=True)
class Level:
    """How exact a clip must be.

    Least mean template IoU; how far a mover may stray sideways, as a share of its way; RMS in pixels around its
    straight line at constant speed; pixels of foreign colours a frame; RMS in RGB units of what no colour explains.
    """

    iou: float
    aside: float
    wobble: float
    foreign: float
    residual: float


LEVELS = {"default": Level(0.75, 0.5, 1.0, 6.0, 0.06), "stricter": Level(0.82, 0.25, 0.6, 2.0, 0.035)}
STILL = 2.0  # pixels that something which only appears or disappears may drift
REACH = 4.0  # pixels: every such distance from what was asked divides the credit for a way by e


class Verdict(NamedTuple):
    """N judged clips, NaN where the clip is not finite: strict 0 or 1; soft and its factors, all in [0,1].

    shown: present when it should be and only then; look: the asked shape; way: the asked way; clean: no foreign colours
    and no dirt.
    """

    strict: Tensor
    soft: Tensor
    shown: Tensor
    look: Tensor
    way: Tensor
    clean: Tensor


def judge(found: Tracks, clips: Sequence[Clip], level: str = "default", clean: float = 0.5) -> Verdict:
    """Whether clips [N] show what is asked: the right shapes in their colours, the right way, nothing else, no dirt.

    soft = mean over actors of shown (1 + look) / 2 (1 + 3 way) / 4, times (1 - clean + clean * cleanliness). It counts
    movement most and reaches 1 only where strict does.
    """
    limits = LEVELS[level]
    device = found.area.device
    slots = [[clip.actors[k] if k < len(clip.actors) else None for clip in clips] for k in range(found.area.shape[1])]
    asked = torch.tensor([[actor is not None for actor in slot] for slot in slots], device=device).T.float()
    columns = [_judge_actor(found, k, slot, limits) for k, slot in enumerate(slots)]
    right, shown, look, way = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    num = asked.sum(1)

    def mean(values: Tensor) -> Tensor:
        return (values * asked).sum(1) / num

    excess = (found.foreign - limits.foreign).clamp(min=0) / FULL_AREA
    dirt = (found.residual - limits.residual).clamp(min=0) / limits.residual
    tidy = torch.exp(-excess - dirt)
    soft = mean(shown * (1 + look) / 2 * (1 + 3 * way) / 4) * (1 - clean + clean * tidy)
    strict = (mean(right) == 1) & (found.foreign <= limits.foreign) & (found.residual <= limits.residual)
    parts = (strict.float(), soft, mean(shown), mean(look), mean(way), tidy)
    return Verdict(*(torch.where(found.finite, part, math.nan) for part in parts))


def _judge_actor(
    found: Tracks, k: int, actors: Sequence[Actor | None], limits: Level
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the k-th actors are all right (0 or 1), and how nearly: shown, look and way [N]."""
    device = found.area.device
    present = (found.area[:, k] >= MIN_AREA).float()  # [N,F]
    on_time, shown = _timing(found.area[:, k], [actor.does if actor else None for actor in actors])

    iou = (found.iou[:, k] * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp(min=1)  # [N,K]
    shape = torch.tensor([SHAPES.index(actor.shape) if actor else 0 for actor in actors], device=device)
    best = iou.argmax(1) == shape
    fit = iou.gather(1, shape[:, None])[:, 0]
    look = ((fit - 0.5) / (limits.iou - 0.5)).clamp(0, 1) * torch.where(best, 1.0, 0.5)

    travel, wobble = _motion(found.xy[:, k], present)
    off = _off_course(travel, actors, limits) + (wobble - limits.wobble).clamp(min=0)
    way = torch.exp(-off / REACH) * (present.sum(1) >= 2)
    right = on_time & best & (fit >= limits.iou) & (way == 1)
    return right.float(), shown, look, way


def _timing(area: Tensor, does: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Whether areas [N,F] are there exactly when they should be, and in which share of the frames; [N] each.

    Movers should be there always; what appears or disappears, after or before some frame, the best of which is taken.
    The frame of the change itself may look like anything.
    """
    num = area.shape[1]
    backwards = torch.tensor([what == "disappears" for what in does], device=area.device)
    event = torch.tensor([what in EVENTS for what in does], device=area.device)
    area = torch.where(backwards[:, None], area.flip(1), area)  # what disappears, appears in reverse
    amount = (area / FULL_AREA).clamp(0, 1)
    full, gone = area >= MIN_AREA, area <= GHOST_AREA
    frame = torch.arange(num, device=area.device)
    change = torch.arange(1, max(num - 1, 2), device=area.device)[:, None]
    later, same = frame >= change, frame == change  # [changes,F]
    agree = torch.where(later, amount[:, None], 1 - amount[:, None]).mean(-1).amax(1)
    exact = (torch.where(later, full[:, None], gone[:, None]) | same).all(-1).any(1)
    return torch.where(event, exact, full.all(1)), torch.where(event, agree, amount.mean(1))


def _motion(xy: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """How far [N,2] the line fitted to positions xy [N,F,2] goes in the whole clip, and RMS [N] around it, in pixels.

    Least squares over the frames where present [N,F] is 1.
    """
    frame = torch.arange(xy.shape[1], dtype=xy.dtype, device=xy.device)
    weight = present / present.sum(1, keepdim=True).clamp(min=1)
    time = frame - (weight * frame).sum(1, keepdim=True)
    place = xy - (weight[..., None] * xy).sum(1, keepdim=True)
    slope = (weight * time)[..., None].mul(place).sum(1) / (weight * time**2).sum(1, keepdim=True).clamp(min=1e-6)
    rest = (place - slope[:, None] * time[..., None]).square().sum(-1)
    return slope * (xy.shape[1] - 1), (weight * rest).sum(1).sqrt()


def _off_course(travel: Tensor, actors: Sequence[Actor | None], limits: Level) -> Tensor:
    """By how many pixels [N] the ways [N,2] miss the nearest one that would have been right."""
    ways = [DIRECTIONS.get(actor.does, (0, 0)) if actor else (0, 0) for actor in actors]
    toward = torch.tensor(ways, dtype=travel.dtype, device=travel.device)
    bounds = torch.tensor([TRAVEL[actor.speed if actor else None] for actor in actors], device=travel.device)
    along = (travel * toward).sum(1)
    across = (travel - along[:, None] * toward).norm(dim=1)
    short, long = (bounds[:, 0] - along).clamp(min=0), (along - bounds[:, 1]).clamp(min=0)
    moving = short + long + (across - limits.aside * along.clamp(min=0)).clamp(min=0)
    return torch.where(toward.any(1), moving, (travel.norm(dim=1) - STILL).clamp(min=0))


# ------------------------------------------------------------------------------------------------ reward


class Motion:
    """Does a clip show the motion that a sentence of the built-in world asks for? By rule, frame by frame.

    Frames of another size are resized to 32 x 32 with antialiasing. Parts: strict, soft and its factors shown, look,
    way and clean, and stricter, the strict score of a more exact checker, which is there to notice a policy that
    exploits the one it is trained on. Needs nothing but the prompt.
    """

    name = "motion"
    media: frozenset[MediaKind] = frozenset({"video"})
    range = (0.0, 1.0)
    deterministic = True
    card = Card(
        source="this project",
        note="judges clips of the built-in world by its own sentences, and nothing else",
    )

    def __init__(self, score: str = "soft", clean: float = 0.5, level: str = "default") -> None:
        """`score`: soft or strict; `clean` in [0, 1]: how much of soft a dirty clip loses; `level`: see LEVELS."""
        if score not in ("soft", "strict"):
            raise RewardError(f"motion: score = {score!r}; expected 'soft' or 'strict'")
        if level not in LEVELS:
            raise RewardError(f"motion: level = {level!r}; expected one of {', '.join(map(repr, LEVELS))}")
        if not 0 <= clean <= 1:
            raise RewardError(f"motion: clean = {clean}; expected a weight between 0 and 1")
        self._score, self._clean, self._level = score, clean, level

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score clips by their own prompts; NaN where the prompt is none of this world's or nothing can move."""
        clips = [parse(sample.prompt) for sample in samples]
        parts = {key: torch.full((len(samples),), math.nan) for key in (*Verdict._fields, "stricter")}
        info: list[dict[str, Any]] = [{} for _ in samples]
        by_length: dict[int, list[int]] = {}
        for i, (sample, clip) in enumerate(zip(samples, clips, strict=True)):
            if clip is None:
                info[i]["error"] = f"not a sentence of the moving built-in world: {sample.prompt!r}"
            elif len(sample.media) < 2:
                info[i]["error"] = "one frame shows no motion"
            else:
                by_length.setdefault(len(sample.media), []).append(i)
        for at in by_length.values():
            asked = [clip for i in at if (clip := clips[i]) is not None]
            found = track(torch.stack([resize(samples[i].media.detach()) for i in at]), colors_of(asked))
            verdict = judge(found, asked, self._level, self._clean)
            for key, part in (*verdict._asdict().items(), ("stricter", judge(found, asked, "stricter").strict)):
                parts[key][at] = part.cpu()
            for i, finite in zip(at, found.finite.tolist(), strict=True):
                if not finite:
                    info[i]["error"] = "the clip has pixels that are NaN or infinite"
        return Scores(value=parts[self._score], parts=parts, info=info)


def colors_of(clips: Sequence[Clip]) -> Tensor:
    """The palette index of each actor's colour [N,2]; -1 where there is no second actor."""
    names = list(COLORS)
    rows = [[names.index(actor.color) for actor in clip.actors] for clip in clips]
    return torch.tensor([row + [-1] * (2 - len(row)) for row in rows])


def resize(media: Tensor) -> Tensor:
    """Clips [F,3,H,W] at the side this world is drawn at: [F,3,32,32]."""
    if media.shape[-2:] == (SIZE, SIZE):
        return media
    return F.interpolate(media.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
