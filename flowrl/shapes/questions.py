"""The built-in world asks questions: pictures of shapes, six kinds of questions, and the verifiers that grade them.

    count     how many circles are there ?                                          3
    color     what color is the star ?                                              red
    yes_no    is there a red circle ?                                               no
    relation  is the red circle left , right , above or below the blue star ?       above
    box       where is the red circle ?                                             [ 4 , 18 , 13 , 28 ]
    digits    what digit is written in the picture ?                                7

Objects stand in the cells of a 4 x 4 grid, each within its cell. A digit is drawn as a pattern of single light and dark
pixels on a plate of their mean: at half of the resolution nothing of it is left, in a crop at full resolution it is.
Coordinates are pixels, x to the right and y downwards; a box is [x1, y1, x2, y2] with x2 and y2 past its last pixel.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as numbers
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.shapes import BACKGROUND, COLORS, SHAPES, coverage

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]
Box = tuple[int, int, int, int]

KINDS = ("count", "color", "yes_no", "relation", "box", "digits")
SPLITS = {"train": 3600, "held_out": 720}
"""Rows of each split."""
SIZE = 64  # pixels
GRID = 4
CELL = SIZE // GRID
RADII = (4.5, 6.0)  # pixels; the larger one fills its cell, the smaller one moves in it by `_STEP`
TINT = 0.03  # spread of an object's colour around its palette entry
SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
QUADRANTS: tuple[Box, ...] = tuple((x, y, x + SIZE // 2, y + SIZE // 2) for y in (0, SIZE // 2) for x in (0, SIZE // 2))
HELD_OUT_EVERY = 4

_STEP = 2  # pixels
_NUMBERS = (1, 2, 3, 4)  # right answers to "how many"
_MOST = 5  # objects in a picture
_PLATE, _INK = 128 / 255, 102 / 255  # grey of a digit's plate, and how much lighter and darker its pixels are
_GLYPHS = (
    "###/#.#/#.#/#.#/###", ".#./##./.#./.#./###", "###/..#/###/#../###", "###/..#/.##/..#/###", "#.#/#.#/###/..#/..#",
    "###/#../###/..#/###", "###/#../###/#.#/###", "###/..#/..#/.#./.#.", "###/#.#/###/#.#/###", "###/#.#/###/..#/###",
)  # fmt: skip

VERIFIERS: list[dict[str, Any]] = [
    {"use": "verifiers.counting", "name": "count", "when": {"data_source": "count"}, "strict": True},
    {"use": "verifiers.exact", "name": "color", "when": {"data_source": "color"}, "strict": True},
    {"use": "verifiers.yes_no", "name": "yes_no", "when": {"data_source": "yes_no"}, "strict": True},
    {"use": "verifiers.multiple_choice", "name": "relation", "when": {"data_source": "relation"}, "strict": True},
    {
        "use": "verifiers.boxes.grounding", "name": "box", "when": {"data_source": "box"},
        "mode": "hit", "threshold": 0.85,
    },
    {"use": "verifiers.numeric.within", "name": "digits", "when": {"data_source": "digits"},
     "tolerance": 0.0, "strict": True},
]  # fmt: skip
"""Entries for `rewards.verifiers.adapter.Verifiers`, one a kind; all but that of boxes insist on the answer's tags."""


# ------------------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, the cell (column, row) in which it stands, its centre in that cell and its radius."""

    color: str
    shape: str
    cell: tuple[int, int]
    offset: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        """Its colour and shape."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """The centre of its cell in pixels, "24 , 8"."""
        return " , ".join(str(CELL * index + CELL // 2) for index in self.cell)

    @property
    def box(self) -> Box:
        """The smallest box around the pixels that it covers by half at least."""
        inside = _mask(self.shape, self.offset, self.radius) >= 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        x, y = (CELL * index for index in self.cell)
        return (x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Digit:
    """A digit and the left upper corner (x, y) of its glyph, both even, so that it vanishes at half resolution."""

    value: int
    corner: tuple[int, int]

    @property
    def box(self) -> Box:
        """The glyph's box."""
        x, y = self.corner
        return (x, y, x + 6, y + 10)

    @property
    def quadrant(self) -> Box:
        """The quarter of the picture in which it stands."""
        half = SIZE // 2
        return QUADRANTS[2 * (self.corner[1] // half) + self.corner[0] // half]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture; things are in reading order, row by row."""

    things: tuple[Thing, ...]
    digit: Digit | None = None

    @property
    def held_out(self) -> bool:
        """Whether the composition, colours and shapes and digit, is one of the quarter that no training sees."""
        names = [*sorted(thing.name for thing in self.things), str(self.digit and self.digit.value)]
        return zlib.crc32(" ".join(names).encode()) % HELD_OUT_EVERY == 0


class Case(NamedTuple):
    """A question before its picture is drawn. `asked` are the things that it names, in its order."""

    kind: str
    text: str
    answer: Any
    scene: Scene
    asked: tuple[Thing, ...] = ()


@lru_cache(maxsize=256)
def _mask(shape: str, offset: tuple[float, float], radius: float) -> Array:
    """How much of the pixels of its cell [C,C] a thing covers."""
    cover = coverage(torch.tensor(SHAPES.index(shape)), torch.tensor(offset), torch.tensor(radius), CELL)
    mask: Array = cover.numpy()
    return mask


def draw(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """The picture [S,S,3] of a scene; `rng` tints its things."""
    picture = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.float32)
    for thing in scene.things:
        x, y = (CELL * index for index in thing.cell)
        tile = picture[y : y + CELL, x : x + CELL]
        rgb = np.array([min(1.0, max(0.0, c + rng.uniform(-TINT, TINT))) for c in COLORS[thing.color]])
        tile += _mask(thing.shape, thing.offset, thing.radius)[..., None] * (rgb - tile)
    if scene.digit is not None:
        x1, y1, x2, y2 = scene.digit.box
        picture[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = _PLATE
        picture[y1:y2, x1:x2] += _glyph(scene.digit.value)[..., None]
    return (picture * 255).round().astype(np.uint8)


@lru_cache
def _glyph(value: int) -> Array:
    """What a digit adds to its plate [10,6]: a block of four pixels, two lighter and two darker, for each dot of it."""
    dots = np.array([[dot == "#" for dot in line] for line in _GLYPHS[value].split("/")], dtype=np.float32)
    return np.kron(dots, _INK * np.array([[1, -1], [-1, 1]], dtype=np.float32))


# ------------------------------------------------------------------------------------------------ cases


def _placed(names: Sequence[tuple[str, str]], cells: Sequence[tuple[int, int]], rng: random.Random) -> list[Thing]:
    """Things of the given (colour, shape) in the given cells, of random size and jitter, in the order given."""
    things = []
    for (color, shape), cell in zip(names, cells, strict=True):
        radius = rng.choice(RADII)
        room = math.floor((CELL / 2 - 1.3 * radius) / _STEP) * _STEP  # the farthest tip is 1.3 radii from the centre
        x, y = (CELL / 2 + rng.randrange(-room, room + 1, _STEP) for _ in range(2))
        things.append(Thing(color, shape, cell, (x, y), radius))
    return things


def _scene(things: Iterable[Thing], digit: Digit | None = None) -> Scene:
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell[::-1])), digit)


def _cells(count: int, rng: random.Random, free: Callable[[tuple[int, int]], bool] = lambda _: True) -> list[Any]:
    return rng.sample([cell for y in range(GRID) for x in range(GRID) if free(cell := (x, y))], count)


def _names(count: int, rng: random.Random, allowed: Callable[[str, str], bool]) -> list[tuple[str, str]]:
    pairs = [(color, shape) for color in COLORS for shape in SHAPES if allowed(color, shape)]
    return [rng.choice(pairs) for _ in range(count)]


def _count(turn: int, rng: random.Random) -> Case:
    right = _NUMBERS[turn % len(_NUMBERS)]
    others = rng.randint(0, _MOST - right)
    if rng.random() < 0.5:
        what = rng.choice(SHAPES)
        names = [(rng.choice(list(COLORS)), what) for _ in range(right)] + _names(others, rng, lambda _, s: s != what)
    else:
        what = rng.choice(list(COLORS))
        names = [(what, rng.choice(SHAPES)) for _ in range(right)] + _names(others, rng, lambda c, _: c != what)
    return Case("count", _how_many(what), right, _scene(_placed(names, _cells(len(names), rng), rng)))


def _color(turn: int, rng: random.Random) -> Case:
    right, shape = list(COLORS)[turn % len(COLORS)], rng.choice(SHAPES)
    others = _names(rng.randint(1, _MOST - 2), rng, lambda c, s: c != right and s != shape)
    things = _placed([(right, shape), *others], _cells(1 + len(others), rng), rng)
    return Case("color", f"what color is the {shape} ?", right, _scene(things), (things[0],))


def _yes_no(turn: int, rng: random.Random) -> Case:
    right = ("yes", "no")[turn % 2]
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    names = _names(rng.randint(1, _MOST - 2), rng, lambda c, s: (c, s) != (color, shape))
    if right == "yes":
        names[0] = (color, shape)
    elif len(names) > 1:  # the colour and the shape are there, but not in one thing
        names[0] = (color, rng.choice([s for s in SHAPES if s != shape]))
        names[1] = (rng.choice([c for c in COLORS if c != color]), shape)
    scene = _scene(_placed(names, _cells(len(names), rng), rng))
    return Case("yes_no", f"is there a {color} {shape} ?", right, scene)


def _relation(turn: int, rng: random.Random) -> Case:
    right = list(SIDES)[turn % len(SIDES)]
    first, second = rng.sample([(c, s) for c in COLORS for s in SHAPES], 2)
    others = _names(rng.randint(0, 2), rng, lambda c, s: (c, s) not in (first, second))
    while _side(*(cells := _cells(2 + len(others), rng))[:2]) != right:
        pass
    things = _placed([first, second, *others], cells, rng)
    a, b = things[:2]
    return Case("relation", _which_side(a, b), right, _scene(things), (a, b))


def _side(a: tuple[int, int], b: tuple[int, int]) -> str | None:
    """On which side of cell b cell a lies; None where it is as far across as along."""
    x, y = a[0] - b[0], a[1] - b[1]
    if abs(x) == abs(y):
        return None
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("above" if y < 0 else "below")


def _box(_: int, rng: random.Random) -> Case:
    (name,) = _names(1, rng, lambda _c, _s: True)
    others = _names(rng.randint(0, 3), rng, lambda c, s: (c, s) != name)
    things = _placed([name, *others], _cells(1 + len(others), rng), rng)
    return Case("box", f"where is the {things[0].name} ?", things[0].box, _scene(things), (things[0],))


def _digits(turn: int, rng: random.Random) -> Case:
    cell = rng.randrange(GRID), rng.randrange(GRID)
    digit = Digit(turn % 10, (CELL * cell[0] + rng.choice((2, 8)), CELL * cell[1] + rng.choice((2, 4))))
    names = _names(rng.randint(0, 3), rng, lambda _c, _s: True)
    things = _placed(names, _cells(len(names), rng, lambda free: free != cell), rng)
    return Case("digits", "what digit is written in the picture ?", digit.value, _scene(things, digit))


_MAKERS = {"count": _count, "color": _color, "yes_no": _yes_no, "relation": _relation, "box": _box, "digits": _digits}


def make(kind: str, turn: int, rng: random.Random, split: str = "train") -> Case:
    """A random case of a kind and a split; the right answers go round with `turn`, so that all are as frequent."""
    while (case := _MAKERS[kind](turn, rng)).scene.held_out != (split == "held_out"):
        pass
    return case


def about(scene: Scene, kind: str, rng: random.Random) -> Case | None:
    """A random question of a kind, not of digits, about a given scene; None where the scene allows for none.

    Right answers are as frequent as scenes make them, and "how many" may be none.
    """
    return _ASKERS[kind](scene, rng)


def _any_count(scene: Scene, rng: random.Random) -> Case:
    what = rng.choice([*SHAPES, *COLORS])
    right = sum(what in (thing.shape, thing.color) for thing in scene.things)
    return Case("count", _how_many(what), right, scene)


def _any_color(scene: Scene, rng: random.Random) -> Case | None:
    shapes = [thing.shape for thing in scene.things]
    alone = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return Case("color", f"what color is the {thing.shape} ?", thing.color, scene, (thing,))


def _any_yes_no(scene: Scene, rng: random.Random) -> Case:
    names = [thing.name for thing in scene.things]
    near = f"{rng.choice(scene.things).color} {rng.choice(scene.things).shape}"
    name = rng.choice([near, rng.choice(names)])
    return Case("yes_no", f"is there a {name} ?", "yes" if name in names else "no", scene)


def _any_relation(scene: Scene, rng: random.Random) -> Case | None:
    alone = _alone(scene)
    pairs = [(a, b, side) for a in alone for b in alone if (side := _side(a.cell, b.cell)) is not None]
    if not pairs:
        return None
    a, b, side = rng.choice(pairs)
    return Case("relation", _which_side(a, b), side, scene, (a, b))


def _any_box(scene: Scene, rng: random.Random) -> Case | None:
    alone = _alone(scene)
    if not alone:
        return None
    thing = rng.choice(alone)
    return Case("box", f"where is the {thing.name} ?", thing.box, scene, (thing,))


def _alone(scene: Scene) -> list[Thing]:
    """The things whose name no other has."""
    names = [thing.name for thing in scene.things]
    return [thing for thing in scene.things if names.count(thing.name) == 1]


_ASKERS: dict[str, Callable[[Scene, random.Random], Case | None]] = {
    "count": _any_count, "color": _any_color, "yes_no": _any_yes_no, "relation": _any_relation, "box": _any_box,
}  # fmt: skip


def _how_many(what: str) -> str:
    return f"how many {what}{'s' if what in SHAPES else ' things'} are there ?"


def _which_side(a: Thing, b: Thing) -> str:
    return f"is the {a.name} left , right , above or below the {b.name} ?"


def thought(case: Case) -> str:
    """What one who looks would note before answering."""
    if case.scene.digit is not None:
        return f"the digit is {case.answer}"
    if case.kind in ("relation", "box"):
        return " , ".join(f"{thing.name} at {thing.place}" for thing in case.asked)
    return " , ".join(thing.name for thing in case.scene.things)


def written(answer: Any) -> str:
    """An answer as the model writes it: a box is a list with its numbers apart."""
    return f"[ {' , '.join(map(str, answer))} ]" if isinstance(answer, tuple) else str(answer)


# ------------------------------------------------------------------------------------------------ questions


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question about a picture, with all that its verifier needs."""

    text: str
    picture: Image
    metadata: dict[str, Any]
    """answer, data_source and category (the kind), solution (a gold response), image_size [width, height]; `options`
    of a relation; `region` [x1, y1, x2, y2] of a digit, the quarter of the picture to look into."""


def questions(split: str, kinds: Sequence[str] | None = None, count: int | None = None) -> list[Question]:
    """The questions of a split, "train" or "held_out", kind after kind in turn; always the same ones.

    kinds   those of KINDS that are asked for; default all
    count   the first so many; default all, as many of each kind (600 in train and 120 in held_out)

    A quarter of all compositions (colours and shapes of the things in a picture, and its digit) is held out; no picture
    of the other split shows one. ValueError for what is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use 'train' or 'held_out'")
    kinds = KINDS if kinds is None else kinds
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"unknown kinds {sorted(unknown)}; the world asks {', '.join(KINDS)}")
    most = SPLITS[split] // len(KINDS) * len(kinds)
    streams = [_stream(split, kind) for kind in kinds]
    turns = (next(streams[turn % len(streams)]) for turn in numbers())
    return list(islice(turns, most if count is None else min(count, most)))


def _stream(split: str, kind: str) -> Any:
    rng = random.Random(f"{split} {kind}")
    for turn in numbers():
        case = make(kind, turn, rng, split)
        yield _question(case, rng)


def _question(case: Case, rng: random.Random) -> Question:
    from PIL import Image

    answer = list(case.answer) if isinstance(case.answer, tuple) else case.answer
    metadata = {"answer": answer, "data_source": case.kind, "category": case.kind, "image_size": [SIZE, SIZE]}
    metadata["solution"] = f"<think> {thought(case)} </think> <answer> {written(case.answer)} </answer>"
    if case.kind == "relation":
        metadata["options"] = list(SIDES)
    if case.scene.digit is not None:
        metadata["region"] = list(case.scene.digit.quadrant)
    return Question(case.text, Image.fromarray(draw(case.scene, rng)), metadata)


def rows(split: str, kinds: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The questions of a split as (text, {"images": [picture], **metadata}), for a loader of prompts."""
    asked = _whole(split, None if kinds is None else tuple(kinds))
    return [(q.text, {"images": [q.picture], **q.metadata}) for q in asked]


@lru_cache(maxsize=4)
def _whole(split: str, kinds: tuple[str, ...] | None) -> list[Question]:
    """A split is drawn once, though a config is checked, planned and run: nobody changes a picture."""
    return questions(split, kinds)
