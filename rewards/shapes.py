"""The verifiable reward of the built-in world: what GenEval (arXiv:2310.11513) asks, checked on coloured shapes.

    grammar     Spec <-> prompt, six categories
    geometry    coverage(): the anti-aliased outline of every shape; `flowrl.shapes` draws with the same one
    detector    detect(): colour segmentation, connected components, template matching, what is left unexplained
    judge       judge(): strict 0/1, dense partial credit
    reward      Shapes: the above for samples

Symbols: N images, B blobs of all of them, M = MAX_BLOBS blob slots an image, K asked objects, S image side, C window
side; coordinates are pixels, x to the right, y downwards; the centre of the first pixel is at 0.5.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.card import Card
from rewards.types import MediaKind, RewardError, Sample, Scores

# ------------------------------------------------------------------------------------------------ grammar

SIZE = 96
BACKGROUND = 0.93
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (0.88, 0.16, 0.16),
    "yellow": (0.96, 0.78, 0.10),
    "green": (0.14, 0.66, 0.28),
    "blue": (0.14, 0.38, 0.90),
    "purple": (0.60, 0.20, 0.76),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")


@dataclass(frozen=True, slots=True)
class Thing:
    """What a prompt asks of one kind of object: its shape, its colour (None = any) and how many of it."""

    shape: str
    color: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Spec:
    """A prompt's meaning: the things it names and, for `position`, where the first stands as seen from the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The one sentence that asks for this."""
        if self.category == "counting":
            (thing,) = self.things
            number = next(word for word, n in NUMBERS.items() if n == thing.count)
            return f"{number} {thing.shape}s"
        phrases = [f"a {t.color} {t.shape}" if t.color else f"a {t.shape}" for t in self.things]
        return f" {self.relation or 'and'} ".join(phrases)


_THING = rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join(SHAPES)})s")
_ONE = re.compile(_THING)
_TWO = re.compile(rf"{_THING} (and|{'|'.join(RELATIONS)}) {_THING}")


def parse(prompt: str) -> Spec | None:
    """The meaning of a prompt of this world, or None when the sentence is not one of its grammar."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    if m := _COUNT.fullmatch(text):
        return Spec("counting", (Thing(m[2], count=NUMBERS[m[1]]),))
    if m := _ONE.fullmatch(text):
        return Spec("colors" if m[1] else "single", (Thing(m[2], m[1]),))
    if m := _TWO.fullmatch(text):
        things = (Thing(m[2], m[1]), Thing(m[5], m[4]))
        if m[3] != "and":
            return Spec("position", things, m[3])
        return Spec("attribution" if m[1] or m[4] else "two", things)
    return None


# ------------------------------------------------------------------------------------------------ geometry

# A shape is a star polygon: n tips at `outer` radii from the centre, n notches at `inner` radii, first tip at `turn`
# radians from straight up. A notch on the chord between two tips makes the regular polygon.
_OUTLINES = {
    "square": (4, 1.2, 1.2 * math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, 1.3, 1.3 * math.cos(math.pi / 3), 0.0),
    "star": (5, 1.3, 0.62, 0.0),
}


def _signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline of `shape`, negative inside; exact next to an edge, all that is drawn."""
    rho = torch.hypot(dx, dy)
    if shape == "circle":
        return rho - radius
    tips, outer, inner, turn = _OUTLINES[shape]
    wedge = math.pi / tips
    angle = torch.atan2(dx, -dy) - turn
    folded = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()
    px, py = rho * folded.cos(), rho * folded.sin()
    notch_x, notch_y = inner * math.cos(wedge), inner * math.sin(wedge)
    length = math.hypot(notch_y, outer - notch_x)
    return ((px - outer * radius) * notch_y + py * (outer - notch_x)) / length


def coverage(shape: Tensor, xy: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel each object covers, in [0, 1], with one pixel of anti-aliasing.

    shape [...] index into SHAPES (-1 = absent: covers nothing); xy [..., 2], radius [...] in pixels -> [..., S, S].
    """
    axis = torch.arange(size, dtype=torch.float32, device=xy.device) + 0.5
    dx = axis - xy[..., 0, None, None]
    dy = axis[:, None] - xy[..., 1, None, None]
    out = torch.zeros(*shape.shape, size, size, device=xy.device)
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        if chosen.any():
            distance = _signed_distance(name, dx[chosen], dy[chosen], radius[chosen][..., None, None])
            out[chosen] = (0.5 - distance).clamp(0, 1)
    return out


# ------------------------------------------------------------------------------------------------ detector

MAX_BLOBS = 8
MIN_AREA = 16  # pixels, a tenth of the smallest object drawn; what is smaller, or only a line, is dirt, not an object
TINT_ALLOWED = 0.06  # an object's flat colour may lie this far from its palette entry (per channel); the rest is dirt
_WINDOW = 36  # pixels, the side of the square in which a blob meets its templates; the largest object is 30 wide
_CHUNK = 64  # pictures at once: what they need stays in the cache


class Detections(NamedTuple):
    """What is in N pictures: at most M objects each, the largest first; empty slots have valid = False, shape = -1.

    shape, color [N,M] index of the best match; iou [N,M,4] overlap with the fitted template of every shape; color_error
    [N,M,5] RGB distance of the mean colour from every palette entry; xy [N,M,2] centre and radius [N,M] in pixels;
    rgb [N,M,3] the flat colour it is redrawn in; num [N] objects in the picture, also those beyond M; fill, background
    [N] RMS in RGB units of what the redrawn scene leaves unexplained inside and outside of the objects; finite [N]
    False where the picture holds NaN or infinity.
    """

    shape: Tensor
    color: Tensor
    iou: Tensor
    color_error: Tensor
    xy: Tensor
    radius: Tensor
    rgb: Tensor
    valid: Tensor
    num: Tensor
    fill: Tensor
    background: Tensor
    finite: Tensor

    @property
    def residual(self) -> Tensor:
        """[N] the dirt of a picture: the worse of fill and background, lest one be diluted by the other's area."""
        return torch.maximum(self.fill, self.background)


class _Blobs(NamedTuple):
    """B connected regions of N pictures.

    image, rank among the image's blobs by area, hue (palette index) [B]; area [B] and centre xy [B,2] of its pixels;
    rgb [B,3] mean colour; corner [B,2] (x, y) of its window; mask [B,C,C] its pixels in the window; free [B,C,C] the
    pixels of no blob; seen [B,C,C,3] the picture in the window.
    """

    image: Tensor
    rank: Tensor
    hue: Tensor
    area: Tensor
    xy: Tensor
    rgb: Tensor
    corner: Tensor
    mask: Tensor
    free: Tensor
    seen: Tensor


@torch.no_grad()
def detect(images: Tensor) -> Detections:
    """The objects of pictures [N,3,96,96] in [0,1]: nearest palette hue, connected components, best template by IoU."""
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"detect reads pictures [N,3,{SIZE},{SIZE}], not {list(images.shape)}; resize() makes them so")
    chunks = [_detect(chunk) for chunk in torch.split(images, _CHUNK)]
    return Detections(*(torch.cat(field) for field in zip(*chunks, strict=True)))


def _detect(images: Tensor) -> Detections:
    pixels = images.float()
    finite = pixels.sum((1, 2, 3)).isfinite()  # one NaN or infinity is enough to spoil the sum
    if not finite.all():
        pixels = torch.where(finite[:, None, None, None], pixels, BACKGROUND)
    pixels = pixels.clamp(0, 1)
    palette = torch.tensor(list(COLORS.values()), device=pixels.device)
    squares = (pixels - BACKGROUND).square().sum(1)  # [N,S,S] squared distance from the plain background
    pixels = pixels.movedim(1, -1)
    blobs, num = _segment(pixels, squares, palette)
    unit = torch.tensor([unit_area(name) for name in SHAPES], device=pixels.device)
    covered, area, xy = _refine(blobs)
    radius = (area[:, None] / unit).sqrt()
    iou, cover = _match(blobs, covered, xy, radius)
    shape = iou.argmax(1)
    flat = palette[blobs.hue] + (blobs.rgb - palette[blobs.hue]).clamp(-TINT_ALLOWED, TINT_ALLOWED)
    fill, background = _residual(pixels, squares, blobs, cover, flat)

    def table(values: Tensor, empty: float) -> Tensor:
        out = torch.full((len(images), MAX_BLOBS, *values.shape[1:]), empty, dtype=values.dtype, device=values.device)
        out[blobs.image, blobs.rank] = values
        return out

    return Detections(
        shape=table(shape, -1),
        color=table(blobs.hue, -1),
        iou=table(iou, 0.0),
        color_error=table((blobs.rgb[:, None] - palette).norm(dim=-1), math.inf),
        xy=table(xy, 0.0),
        radius=table(radius.gather(1, shape[:, None])[:, 0], 1.0),
        rgb=table(flat, 0.0),
        valid=table(torch.ones_like(blobs.image, dtype=torch.bool), False),
        num=num,
        fill=fill,
        background=background,
        finite=finite,
    )


def _hue(rgb: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Palette colour towards which pixels [F,3] leave the background, and how far: 1 = all of the way."""
    direction = palette - BACKGROUND
    length = direction.norm(dim=1)
    along, hue = ((rgb - BACKGROUND) @ (direction / length[:, None]).T).max(1)
    return hue, along / length[hue]


def _segment(pixels: Tensor, squares: Tensor, palette: Tensor) -> tuple[_Blobs, Tensor]:
    """Connected regions of one hue in pictures [N,S,S,3]: the largest MAX_BLOBS of each, and how many there are [N]."""
    n, side = squares.shape[:2]
    shortest = float((palette - BACKGROUND).norm(dim=1).min()) / 2
    image, y, x = (squares >= shortest**2).nonzero(as_tuple=True)  # where else could there be a foreground
    hue, way = _hue(pixels[image, y, x], palette)
    front = way >= 0.5  # half way = half covered = the outline, also of a blurred edge
    image, y, x, hue = image[front], y[front], x[front], hue[front]
    rgb = pixels[image, y, x]

    spots = len(image)  # F foreground pixels are the nodes of a graph; neighbours of one hue are joined
    node = torch.full((n, side + 1, side + 1), -1, dtype=torch.long, device=pixels.device)
    node[image, y, x] = torch.arange(spots, device=pixels.device)
    beside = torch.stack([node[image, y, x + 1], node[image, y + 1, x]])
    joined = (beside >= 0) & (hue[beside] == hue)
    a, b = joined.nonzero()[:, 1], beside[joined]
    label = _connect(spots, a, b)

    size = torch.bincount(label, minlength=spots)
    inside = torch.bincount(torch.cat([a, b]), minlength=spots) == 4  # all neighbours are its own: not on the soft rim
    thick = torch.bincount(label[inside], minlength=spots) > 0  # not the seam where two colours blend into a third
    (root,) = ((size >= MIN_AREA) & thick).nonzero(as_tuple=True)
    root = root[torch.argsort(image[root] * 2 * side**2 - size[root], stable=True)]  # by image, then the largest first
    num = torch.bincount(image[root], minlength=n)
    rank = torch.arange(len(root), device=num.device) - (num.cumsum(0) - num)[image[root]]
    root, rank = root[rank < MAX_BLOBS], rank[rank < MAX_BLOBS]

    def mean(values: Tensor, of: Tensor) -> Tensor:
        weights = torch.bincount(label[of], minlength=spots)[root]
        return (torch.bincount(label[of], values[of].double(), minlength=spots)[root] / weights).float()

    everywhere = torch.ones_like(inside)
    xy = torch.stack([mean(x + 0.5, everywhere), mean(y + 0.5, everywhere)], -1)
    color = torch.stack([mean(channel, inside) for channel in rgb.unbind(1)], -1)
    corner = (xy.round().long() - _WINDOW // 2).clamp(0, side - _WINDOW)
    near = node[_place(image[root], corner)]
    mask = (near >= 0) & (label[near] == root[:, None, None])
    seen = pixels[_place(image[root], corner)]
    return _Blobs(image[root], rank, hue[root], size[root].float(), xy, color, corner, mask, near < 0, seen), num


def _connect(count: int, a: Tensor, b: Tensor) -> Tensor:
    """Component label of `count` nodes with edges a[i] - b[i]: hook roots to larger labels, halve the paths, repeat."""
    label = torch.arange(count, device=a.device)
    while True:
        at, bt = label[a], label[b]
        joined = label.scatter_reduce(0, at, bt, "amax").scatter_reduce(0, bt, at, "amax")
        joined = joined[joined]
        if torch.equal(joined, label):
            return label
        label = joined


def _place(image: Tensor, corner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the windows [B,C,C] of blobs in a tensor [N,S,S,...]."""
    steps = torch.arange(_WINDOW, device=corner.device)
    return image[:, None, None], (corner[:, 1, None] + steps)[:, :, None], (corner[:, 0, None] + steps)[:, None, :]


def _refine(blobs: _Blobs) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each pixel [B,C,C] a blob covers, by how far the colour has gone; hence area [B] and centre [B,2]."""
    step = blobs.rgb - BACKGROUND
    way = ((blobs.seen - BACKGROUND) * (step / step.square().sum(1, keepdim=True))[:, None, None]).sum(-1)
    covered = way.clamp(0, 1) * _dilate(blobs.mask.float()) * (blobs.mask | blobs.free)
    area = covered.sum((1, 2))
    axis = torch.arange(_WINDOW, device=area.device) + 0.5
    xy = torch.stack([covered.sum(1) @ axis, covered.sum(2) @ axis], -1) / area[:, None] + blobs.corner
    overflows = blobs.mask.sum((1, 2)) < blobs.area
    return covered, torch.where(overflows, blobs.area, area), torch.where(overflows[:, None], blobs.xy, xy)


def _match(blobs: _Blobs, covered: Tensor, xy: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [B,4] of blobs with the four shapes at xy [B,2] with radius [B,4]; coverage [B,C,C] by the best.

    Only a pixel that is off by more than half counts as different. A blur does not change that, nor does noise on an
    outline that lies just in the middle of a row of pixels.
    """
    centre = (xy - blobs.corner)[:, None].expand(*radius.shape, 2)
    kinds = torch.arange(len(SHAPES), device=radius.device).expand_as(radius)
    cover = coverage(kinds, centre, radius, _WINDOW)
    template = cover >= 0.5
    off = covered[:, None] - cover
    missing = (template & (off < -0.5)).sum((-2, -1))
    outside = blobs.area - blobs.mask.sum((1, 2))  # the part that overflows the window is none of any shape
    extra = (off > 0.5).sum((-2, -1)) + outside[:, None]
    size = template.sum((-2, -1))
    iou = (size - missing) / (size + extra)
    return iou, cover[torch.arange(len(iou), device=iou.device), iou.argmax(1)]


def unit_area(name: str) -> float:
    """Area of a shape of radius 1."""
    if name == "circle":
        return math.pi
    tips, outer, inner, _ = _OUTLINES[name]
    return tips * outer * inner * math.sin(math.pi / tips)


def _residual(pixels: Tensor, squares: Tensor, blobs: _Blobs, cover: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """RMS difference [N] inside and outside of the objects between pictures and their scenes redrawn in flat colours.

    Next to an outline a pixel may have any value that the redrawn scene takes within one pixel, so that neither a soft
    edge nor the half-pixel error of a fitted centre counts; texture, background patterns and drifting tints do.
    """
    least, most = -_dilate(-cover)[..., None], _dilate(cover)[..., None]
    low = torch.full(pixels.shape, BACKGROUND, device=pixels.device)
    high, inside = low.clone(), torch.zeros_like(squares)
    squares = squares.clone()
    orders = [(blobs.rank == k).nonzero(as_tuple=True)[0] for k in range(MAX_BLOBS)]
    places = [(at, _place(blobs.image[at], blobs.corner[at])) for at in orders if len(at)]
    for at, place in places:  # the blobs of one image cannot be drawn at once: their windows overlap
        flat, below, above = rgb[at, None, None], low[place], high[place]
        low[place] = torch.minimum(below.lerp(flat, least[at]), below.lerp(flat, most[at]))
        high[place] = torch.maximum(above.lerp(flat, least[at]), above.lerp(flat, most[at]))
        inside[place] = torch.maximum(inside[place], (cover[at] >= 0.5).float())
    for at, place in places:  # outside of all windows the redrawn scene is plain background
        seen = blobs.seen[at]
        squares[place] = (seen - seen.clamp(low[place], high[place])).square().sum(-1)
    covered = inside.sum((1, 2))
    within = (squares * inside).sum((1, 2))
    fill = within / (3 * covered).clamp(min=1)
    without = (squares.sum((1, 2)) - within).clamp(min=0)
    background = without / (3 * (SIZE**2 - covered)).clamp(min=1)
    return fill.sqrt(), background.sqrt()


def _dilate(cover: Tensor) -> Tensor:
    """Largest value within one pixel, [B,C,C]; four shifts are much faster than max pooling."""
    out = cover.clone()
    torch.maximum(out[:, 1:], cover[:, :-1], out=out[:, 1:])
    torch.maximum(out[:, :-1], cover[:, 1:], out=out[:, :-1])
    tall = out.clone()
    torch.maximum(out[:, :, 1:], tall[:, :, :-1], out=out[:, :, 1:])
    torch.maximum(out[:, :, :-1], tall[:, :, 1:], out=out[:, :, :-1])
    return out


# ------------------------------------------------------------------------------------------------ judge


@dataclass(frozen=True, slots=True)
class Level:
    """How exact a picture must be: least template IoU, largest RGB distance from the colour, largest residual.

    For orientation, all but the worst drawn scenes reach: as they are IoU 0.99, color 0.05, residual 0; blurred with
    sigma 1 0.98, 0.09, 0.02; with noise of sd 0.05 0.99, 0.06, 0.05. Samples of a pretrained model: 0.99, 0.02, 0.014.
    """

    iou: float
    color: float
    residual: float


LEVELS = {"default": Level(0.85, 0.25, 0.10), "stricter": Level(0.93, 0.10, 0.035)}
CLEAN = 0.02  # residual up to which a picture is perfectly clean: a blur of one pixel, or the grain of an autoencoder
DIRT_SCALE = 0.05  # every such amount of residual above it divides the cleanliness by e
COS_SIDE = math.cos(math.pi / 4)  # "left of" = within 45 degrees of exactly to the left


class Verdict(NamedTuple):
    """N judged pictures, NaN where the picture is not finite.

    strict 0 or 1; soft in [0,1]; its factors objects (each asked object's best partial credit), precision (asked /
    found), relation and clean, each in [0,1].
    """

    strict: Tensor
    soft: Tensor
    objects: Tensor
    precision: Tensor
    relation: Tensor
    clean: Tensor


def judge(found: Detections, specs: Sequence[Spec], level: str = "default", clean: float = 0.5) -> Verdict:
    """Whether pictures show exactly what N specs ask: every object, count, colour and relation, nothing else, no dirt.

    soft = objects * precision * (1 + relation) / 2 * (1 - clean + clean * cleanliness). Where objects are missing it is
    the dense reward 1 - |n - n*| / n* (Flow-GRPO, arXiv:2505.05470); where there are too many the factor is n* / n,
    which is not yet 0 at the first extra one. With clean > 0 it reaches 1 only where strict does too.
    """
    limits = LEVELS[level]
    device = found.num.device
    right, credit, relation = (torch.zeros(len(specs), device=device) for _ in range(3))
    wanted = [[thing for thing in spec.things for _ in range(thing.count)] for spec in specs]
    asked = torch.tensor([len(w) for w in wanted], device=device)
    for count in set(asked.tolist()):
        at = [i for i, w in enumerate(wanted) if len(w) == count]
        rows = torch.tensor(at, device=device)
        these = Detections(*(field[rows] for field in found))
        relations = [specs[i].relation for i in at]
        right[rows], credit[rows], relation[rows] = _assign(these, [wanted[i] for i in at], relations, limits)
    tidy = torch.exp(-(found.residual - CLEAN).clamp(min=0) / DIRT_SCALE)
    precision = asked / torch.maximum(found.num, asked)
    strict = (right == 1) & (relation == 1) & (found.num == asked) & (found.residual <= limits.residual)
    soft = credit * precision * (1 + relation) / 2 * (1 - clean + clean * tidy)
    parts = (strict.float(), soft, credit, precision, relation, tidy)
    return Verdict(*(torch.where(found.finite, part, math.nan) for part in parts))


def _assign(
    found: Detections, wanted: list[list[Thing]], relations: list[str | None], limits: Level
) -> tuple[Tensor, Tensor, Tensor]:
    """The best one-to-one assignment of K asked objects to blobs [n]: all right (0/1), mean credit, relation credit."""
    device = found.num.device
    names = [None, *COLORS]
    shape = torch.tensor([[SHAPES.index(t.shape) for t in things] for things in wanted], device=device)
    color = torch.tensor([[names.index(t.color) - 1 for t in things] for things in wanted], device=device)
    right, credit = _affinity(found, shape, color, limits)  # [n,K,M]

    count = shape.shape[1]
    choices = torch.tensor(list(itertools.permutations(range(MAX_BLOBS), count)), device=device)  # [P,K]
    slots = torch.arange(count, device=device)
    all_right = right[:, slots, choices].all(-1)  # [n,P]
    mean_credit = credit[:, slots, choices].mean(-1)
    side = torch.ones_like(mean_credit)
    if any(relations):
        toward = torch.tensor([RELATIONS[r] if r else (0, 0) for r in relations], device=device, dtype=torch.float32)
        asked = toward.any(1, keepdim=True)
        step = found.xy[:, choices[:, 0]] - found.xy[:, choices[:, 1]]
        cos = (step * toward[:, None]).sum(-1) / step.norm(dim=-1).clamp(min=1e-6)
        both = found.valid[:, choices].all(-1)
        side = torch.where(asked, torch.where(both, ((1 + cos) / (1 + COS_SIDE)).clamp(max=1), 0.0), 1.0)
    best = (mean_credit * (1 + side) + all_right).argmax(1, keepdim=True)  # a right assignment wins over all others
    all_right, mean_credit, side = (t.gather(1, best)[:, 0].float() for t in (all_right, mean_credit, side))
    return all_right, mean_credit, side


def _affinity(found: Detections, shape: Tensor, color: Tensor, limits: Level) -> tuple[Tensor, Tensor]:
    """Whether blob m is what slot k asks (bool) and how nearly in [0,1]; shape, color [n,K] -> [n,K,M] each.

    Half of the credit needs the shape alone, the other half the colour too. A best match within the limits earns all of
    it, a second-best at most half, so that the credit always grows towards the right answer.
    """
    iou = found.iou.movedim(2, 1).gather(1, shape[:, :, None].expand(-1, -1, MAX_BLOBS))
    any_color = color < 0
    named = torch.where(any_color[:, :, None], found.color[:, None], color[:, :, None])
    error = found.color_error.movedim(2, 1).gather(1, named.clamp(min=0))
    shape_best = found.shape[:, None] == shape[:, :, None]
    color_best = found.color[:, None] == named
    right = found.valid[:, None] & shape_best & color_best & (iou >= limits.iou) & (error <= limits.color)
    shape_credit = ((iou - 0.5) / (limits.iou - 0.5)).clamp(0, 1) * torch.where(shape_best, 1.0, 0.5)
    color_credit = (1 - (error - limits.color) / (1 - limits.color)).clamp(0, 1) * torch.where(color_best, 1.0, 0.5)
    return right, torch.where(found.valid[:, None], shape_credit * (1 + color_credit) / 2, 0.0)


# ------------------------------------------------------------------------------------------------ reward


class Shapes:
    """Does a picture show what a sentence of the built-in world asks? GenEval's question (arXiv:2310.11513), by rule.

    Pictures of another size are resized to 96 x 96 with antialiasing. Parts: strict, soft and residual, and stricter,
    the strict score of a more exact checker, which is there to notice a policy that exploits the one it is trained on.
    """

    name = "shapes"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (0.0, 1.0)
    deterministic = True
    card = Card(
        source="this project; asks what GenEval (arXiv:2310.11513) asks",
        note="judges pictures of the built-in world by its own sentences, and nothing else",
    )

    def __init__(self, score: str = "soft", clean: float = 0.5, level: str = "default") -> None:
        """`score`: soft or strict; `clean` in [0, 1]: how much of soft a dirty picture loses; `level`: see LEVELS."""
        if score not in ("soft", "strict"):
            raise RewardError(f"shapes: score = {score!r}; expected 'soft' or 'strict'")
        if level not in LEVELS:
            raise RewardError(f"shapes: level = {level!r}; expected one of {', '.join(map(repr, LEVELS))}")
        if not 0 <= clean <= 1:
            raise RewardError(f"shapes: clean = {clean}; expected a weight between 0 and 1")
        self._score, self._clean, self._level = score, clean, level

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score images by their own prompts; NaN where the prompt is none of this world's or a pixel is not finite."""
        specs = [parse(sample.prompt) for sample in samples]
        known = [i for i, spec in enumerate(specs) if spec is not None]
        parts = {key: torch.full((len(samples),), math.nan) for key in ("strict", "soft", "residual", "stricter")}
        info: list[dict[str, Any]] = [{} for _ in samples]
        for i, sample in enumerate(samples):
            if specs[i] is None:
                info[i]["error"] = f"not a sentence of the built-in world: {sample.prompt!r}"
        if known:
            asked = [spec for spec in specs if spec is not None]
            found = detect(torch.stack([resize(samples[i].media.detach()) for i in known]))
            verdict = judge(found, asked, self._level, self._clean)
            stricter = judge(found, asked, "stricter").strict
            residual = torch.where(found.finite, found.residual, math.nan)
            for key, part in zip(parts, (verdict.strict, verdict.soft, residual, stricter), strict=True):
                parts[key][known] = part.cpu()
            for i, finite in zip(known, found.finite.tolist(), strict=True):
                if not finite:
                    info[i]["error"] = "the picture has pixels that are NaN or infinite"
        return Scores(value=parts[self._score], parts=parts, info=info)


def resize(media: Tensor) -> Tensor:
    """Pictures [...,3,H,W] at the side this world is drawn at: [...,3,96,96]."""
    if media.shape[-2:] == (SIZE, SIZE):
        return media
    flat = media.reshape(-1, *media.shape[-3:])
    small = torch.nn.functional.interpolate(flat.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
    return small.reshape(*media.shape[:-2], SIZE, SIZE)
