"""The rules of GenEval (arXiv:2310.11513) without a network: what is asked, what counts as found, where things are.

    spec = read_spec(meta)                                 what a row of the benchmark asks for
    objects = {name: keep(found, threshold, 16, 1.0)}      what of a detector's finds counts, the surest first
    verdict = judge(spec, objects)                         strict, exact, dense, and why

Boxes are (left, top, right, bottom) in pixels, y downwards, the right and lower edges not included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = 0x99 / 0xFF
"""The grey, #999, that the surroundings of a masked object are painted with before its colour is judged."""

_NARROWEST = 16  # longer side over shorter of a crop; a colour classifier only looks at the middle square of it

Box: TypeAlias = tuple[float, float, float, float]


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Include:
    """At least `count` objects of a class, perhaps of one colour, perhaps somewhere."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """(relation, which earlier clause of `include` it is a relation to)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclude:
    """Fewer than `count` objects of a class."""

    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a picture must show: all of `include`, and none of `exclude`."""

    tag: str
    include: tuple[Include, ...] = ()
    exclude: tuple[Exclude, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every class that matters, once, in the order of the clauses."""
        named = [clause.name for clause in self.include] + [clause.name for clause in self.exclude]
        return tuple(dict.fromkeys(named))


def read_spec(meta: Mapping[str, Any]) -> Spec:
    """`meta["geneval"]`, or `tag`, `include` and `exclude` of `meta` itself, where a row of the benchmark has them.

    ValueError says what is wrong with it.
    """
    row = meta.get("geneval", meta)
    if not isinstance(row, Mapping):
        raise ValueError(f"meta['geneval'] is a {type(row).__name__}; expected a mapping with `include` or `exclude`")
    include: list[Include] = []
    for clause in _clauses(row, "include"):
        include.append(_read_include(clause, earlier=len(include)))
    exclude = [Exclude(name=_name(clause), count=_count(clause)) for clause in _clauses(row, "exclude")]
    if not include and not exclude:
        raise ValueError(
            'no objects to look for: set meta["geneval"] = {"tag": ..., "include": [{"class": "cat", "count": 1}]}, '
            "or use a row of GenEval's evaluation_metadata.jsonl as metadata"
        )
    return Spec(tag=str(row.get("tag", "")), include=tuple(include), exclude=tuple(exclude))


def _clauses(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    clauses = row.get(key) or []
    known = {"class", "count"} | ({"color", "position"} if key == "include" else set())
    if not isinstance(clauses, Sequence) or not all(isinstance(clause, Mapping) for clause in clauses):
        raise ValueError(f"{key} is {clauses!r}; expected a list of mappings such as {{'class': 'cat', 'count': 1}}")
    for clause in clauses:
        if not {"class", "count"} <= clause.keys() <= known:
            raise ValueError(f"{key} has {dict(clause)!r}; expected class and count, and nothing but {sorted(known)}")
    return list(clauses)


def _read_include(clause: Mapping[str, Any], earlier: int) -> Include:
    color, position = clause.get("color"), clause.get("position")
    if color is not None and color not in COLORS:
        raise ValueError(f"color is {color!r}; expected one of {', '.join(COLORS)}")
    if position is not None:
        position = _position(position, earlier)
    return Include(name=_name(clause), count=_count(clause), color=color, position=position)


def _position(value: Any, earlier: int) -> tuple[str, int]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or pair[0] not in RELATIONS or pair[1] not in range(earlier):
        raise ValueError(
            f"position is {value!r}; expected [relation, clause]: one of {', '.join(RELATIONS)}, and the index of an "
            f"earlier clause of include (there are {earlier})"
        )
    return str(pair[0]), int(pair[1])


def _name(clause: Mapping[str, Any]) -> str:
    name = clause["class"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"class is {name!r}; expected the name of a class of objects")
    return name.strip()


def _count(clause: Mapping[str, Any]) -> int:
    count = clause["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count of {clause['class']!r} is {count!r}; expected a whole number of at least 1")
    return count


# ------------------------------------------------------------------------------------------------ what is found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """One object that a detector found."""

    name: str
    """Its class, as it was asked for."""
    score: float
    box: Box
    mask: Tensor | None = field(default=None, repr=False)
    """bool [H,W], of the whole picture; None from a detector without masks."""
    color: str | None = None
    """One of COLORS; None where nobody asked."""


def keep(found: Sequence[Found], threshold: float, max_objects: int, max_overlap: float) -> list[Found]:
    """Of the objects of one class, those that count, the surest first.

    Scores must exceed the threshold; of those the best `max_objects` are taken, and of these one that overlaps with a
    surer one by `max_overlap` or more (intersection over union) is dropped; 1 drops none, equal boxes included.
    """
    sure = sorted((each for each in found if each.score > threshold), key=lambda each: -each.score)
    kept: list[Found] = []
    for each in sure[:max_objects]:
        if max_overlap >= 1 or all(overlap(each.box, other.box) < max_overlap for other in kept):
            kept.append(each)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def relations(a: Box, b: Box, threshold: float = 0.1) -> set[str]:
    """Where `a` is as seen from `b`: at most one of RELATIONS for each axis, so two at once near a diagonal.

        d = centre(a) - centre(b)
        s = sign(d) max(|d| - threshold (size(a) + size(b)), 0) / |d|_2        component by component, but for |d|_2

    A relation holds where its component of s exceeds 1/2. s is shorter than 1, since its numerator alone is shrunk.
    """
    offset, shrunk = [], []
    for axis in (0, 1):
        sizes = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        distance = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        offset.append(distance)
        shrunk.append(math.copysign(max(abs(distance) - threshold * sizes, 0.0), distance))
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    x, y = (component / math.hypot(*offset) for component in shrunk)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def crop(image: Tensor, found: Found) -> Tensor:
    """[3,h,w] of an image [3,H,W]: the box of an object, with all outside its mask in grey.

    At least one pixel. A sliver is cut to its middle, for a resize that keeps its shape would make it huge.
    """
    height, width = image.shape[-2:]
    if found.mask is not None:
        image = image.where(found.mask.to(image.device), torch.full_like(image, BACKGROUND))
    left, right = _span(found.box[0], found.box[2], width)
    top, bottom = _span(found.box[1], found.box[3], height)
    most = _NARROWEST * min(right - left, bottom - top)
    left, right = _middle(left, right, most)
    top, bottom = _middle(top, bottom, most)
    return image[:, top:bottom, left:right]


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    start = min(max(round(low), 0), size - 1)
    return start, max(min(round(high), size), start + 1)


def _middle(low: int, high: int, most: int) -> tuple[int, int]:
    cut = max(high - low - most, 0)
    return low + cut // 2, high - (cut - cut // 2)


# ------------------------------------------------------------------------------------------------ what it is worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How well what was found fits a spec, in three measures: exact implies strict, and is where dense is 1."""

    strict: bool
    """GenEval's `correct`: of every class at least as many as asked for, the surest of which fit; nothing excluded."""
    exact: bool
    """The same with as many as asked for and no more: Flow-GRPO's `strict_correct`."""
    dense: float
    """Mean of all credits, in [0,1]: Flow-GRPO's `score`, but for what the head of rewards.geneval notes."""
    credits: list[dict[str, Any]]
    """{"class", "count", "color", "position"} per clause of include, {"class", "absent"} per counted one of exclude."""
    strict_reasons: list[str]
    exact_reasons: list[str]


def judge(spec: Spec, objects: Mapping[str, Sequence[Found]], threshold: float = 0.1) -> Verdict:
    """Check all clauses; `objects` by class as `keep` gives them, with colours wherever a clause wants one.

    The clauses are independent of each other: two that name the same class look at the same objects.
    """
    _, strict_reasons = _check(spec, objects, threshold, exact=False)
    credits, exact_reasons = _check(spec, objects, threshold, exact=True)
    earned = [value for credit in credits for key, value in credit.items() if key != "class"]
    return Verdict(
        strict=not strict_reasons,
        exact=not exact_reasons,
        dense=math.fsum(earned) / len(earned),
        credits=credits,
        strict_reasons=strict_reasons,
        exact_reasons=exact_reasons,
    )


def _check(
    spec: Spec, objects: Mapping[str, Sequence[Found]], threshold: float, exact: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Credits of all clauses, and what is wrong; nothing is if there is no reason."""
    credits: list[dict[str, Any]] = []
    reasons: list[str] = []
    groups: list[Sequence[Found]] = []  # what met each clause; empty where it is not met
    for clause in spec.include:
        found = objects.get(clause.name, ())
        target = groups[clause.position[1]] if clause.position else ()
        credit, reason = _check_include(clause, found, target, threshold, exact)
        credits.append({"class": clause.name, **credit})
        reasons += [reason] if reason else []
        groups.append(() if reason else found[: clause.count])
    for unwanted in spec.exclude:
        number = len(objects.get(unwanted.name, ()))
        if number >= unwanted.count:
            reasons.append(f"expected {unwanted.name}<{unwanted.count}, found {number}")
        if not any(each.name == unwanted.name and each.count < unwanted.count for each in spec.include):
            credits.append({"class": unwanted.name, "absent": float(number < unwanted.count)})
    return credits, reasons


def _check_include(
    clause: Include, found: Sequence[Found], target: Sequence[Found], threshold: float, exact: bool
) -> tuple[dict[str, float], str]:
    """Credits for count, colour and position, each 0 where the one before is not met in full; the first thing wrong."""
    number, wanted, name = len(found), clause.count, clause.name
    credit = {"count": max(1 - abs(wanted - number) / wanted, 0.0)}
    reason = ""
    if number < wanted or (exact and number > wanted):
        reason = f"expected {name}{'==' if exact else '>='}{wanted}, found {number}"
    best = found[:wanted]
    if clause.color:
        right = sum(each.color == clause.color for each in best)
        credit["color"] = 0.0 if reason else right / wanted
        if not reason and right < wanted:
            seen = ", ".join(each.color or "no colour" for each in best)
            reason = f"expected {clause.color} {name}>={wanted}, found {right} {clause.color} ({seen})"
    if clause.position:
        reason = reason or _misplaced(clause, best, target, threshold)
        credit["position"] = float(not reason)
    return credit, reason


def _misplaced(clause: Include, found: Sequence[Found], target: Sequence[Found], threshold: float) -> str:
    """Which relation does not hold; all of `found` must be in it to all of `target`."""
    relation = clause.position[0] if clause.position else ""
    if not target:
        return f"no target for {clause.name} to be {relation}"
    for one in found:
        for other in target:
            seen = relations(one.box, other.box, threshold)
            if relation not in seen:
                told = " and ".join(sorted(seen)) or "in none of the four directions from"
                return f"expected {clause.name} {relation} target, found {told} target"
    return ""
