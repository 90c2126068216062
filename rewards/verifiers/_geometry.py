"""Boxes and points: how models write them, in which pixels they mean them, and how much two of them overlap."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewards.types import RewardContractError
from rewards.verifiers.types import NoVerdict

Scale: TypeAlias = Literal["abs", "norm1000", "model_input"]

MOST_CHARACTERS = 100_000
_FENCE = "```"
_CORNERS = ("bbox_2d", "bbox", "box", "box_2d")
_LABELS = ("label", "category", "name", "class")
_N = r"\s{0,4}(-?\d{1,9}(?:\.\d{1,9})?)\s{0,4}"
_FOUR = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]")
_TWICE_TWO = re.compile(rf"\({_N},{_N}\)\s{{0,4}},?\s{{0,4}}\({_N},{_N}\)")


@dataclass(frozen=True, slots=True)
class Box:
    """Corners x1 <= x2, y1 <= y2, and what is in it."""

    corners: tuple[float, float, float, float]
    label: str | None = None


def parse_boxes(text: str) -> list[Box] | None:
    """The boxes that a text lists, valid ones only; None if it lists none (an empty JSON list is an empty list).

    JSON, fenced or bare or with words around it, of objects {"bbox_2d": [x1, y1, x2, y2], "label": ...} or of lists of
    four numbers; else all (x1, y1, x2, y2), [x1, y1, x2, y2] and (x1, y1), (x2, y2) in the text.
    """
    if len(text) > MOST_CHARACTERS:
        return None
    found = parse_json(text)
    if found is not None:
        boxes = boxes_of(found)
        if boxes is not None:
            return boxes
    fours = _FOUR.findall(text) or _TWICE_TWO.findall(text)
    valid = [box for box in (_box(four, None) for four in fours) if box is not None]
    return valid if fours else None


def parse_json(text: str) -> Any | None:
    """The JSON object or list in a text: in the last fence, or from the first bracket to the last; None without one."""
    parts = text.split(_FENCE)
    region = parts[-2].removeprefix("json") if len(parts) >= 3 else text
    begins = [place for place in (region.find("{"), region.find("[")) if place >= 0]
    end = max(region.rfind("}"), region.rfind("]"))
    if not begins or end < min(begins):
        return None
    try:
        return json.loads(region[min(begins) : end + 1])
    except (ValueError, RecursionError):
        return None


def boxes_of(found: Any) -> list[Box] | None:
    """Boxes of an object that JSON or the metadata hold: one box or a list of them; None if it is neither."""
    if isinstance(found, Mapping) or _is_four(found):
        found = [found]
    if not isinstance(found, Sequence) or isinstance(found, str):
        return None
    boxes = []
    for item in found:
        box, is_one = _read(item)
        if not is_one:
            return None
        if box is not None:
            boxes.append(box)
    return boxes


def right_boxes(answer: Any) -> list[Box]:
    """The boxes of the metadata: text, or lists and objects as in JSON; NoVerdict if it is none of these."""
    boxes = parse_boxes(answer) if isinstance(answer, str) else boxes_of(_plain(answer))
    if boxes is None:
        raise NoVerdict(f"the right answer {str(answer)[:60]!r} is no box [x1, y1, x2, y2] and no list of boxes")
    return boxes


def distinct(boxes: Sequence[Box]) -> list[Box]:
    """Each box once, in order."""
    return list(dict.fromkeys(boxes))


def iou(a: Sequence[Box], b: Sequence[Box]) -> NDArray[np.float64]:
    """Intersection over union [N,M] of boxes without their border (no + 1); 0 where both have no area."""
    first, second = _corners(a)[:, None], _corners(b)[None, :]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = sides.clip(min=0).prod(-1)
    union = _area(first) + _area(second) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def factors(
    scale: Scale, image_size: Sequence[float] | None, model_size: Sequence[float] | None
) -> tuple[float, float]:
    """(x, y) factors that take what a model wrote to pixels of the image; sizes are (width, height).

    abs           it wrote pixels of the image
    norm1000      thousandths of the image's sides (Qwen2-VL, Qwen3-VL, InternVL)
    model_input   pixels of the picture that its processor made of the image, `model_size` (Qwen2.5-VL)
    """
    if scale == "abs":
        return 1.0, 1.0
    if scale not in ("norm1000", "model_input"):
        raise RewardContractError(f"scale is {scale!r}; expected abs, norm1000 or model_input")
    size = _size(image_size, "image_size", scale)
    base = _size(model_size, "model_size", scale) if scale == "model_input" else (1000.0, 1000.0)
    return size[0] / base[0], size[1] / base[1]


def scaled(box: Box, by: tuple[float, float]) -> Box:
    """A box with x and y multiplied."""
    x1, y1, x2, y2 = box.corners
    return Box((x1 * by[0], y1 * by[1], x2 * by[0], y2 * by[1]), box.label)


def numbers(found: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers in a list; None if it is no such list."""
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != count:
        return None
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in found):
        return None
    try:
        values = tuple(float(each) for each in found)
    except OverflowError:
        return None
    return values if all(math.isfinite(value) and abs(value) < 1e9 for value in values) else None


def _read(item: Any) -> tuple[Box | None, bool]:
    """(the box, whether this is written as one): a box with crossed corners is written as one, and is not valid."""
    if _is_four(item):
        return _box(item, None), True
    if not isinstance(item, Mapping):
        return None, False
    corners = next((item[key] for key in _CORNERS if key in item), None)
    label = next((item[key] for key in _LABELS if key in item), None)
    return _box(corners, None if label is None else str(label)), corners is not None


def _is_four(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str) and numbers(item, 4) is not None


def _box(corners: Any, label: str | None) -> Box | None:
    if isinstance(corners, tuple) and all(isinstance(each, str) for each in corners):
        corners = [float(each) for each in corners]
    four = numbers(corners, 4)
    if four is None or four[0] > four[2] or four[1] > four[3]:
        return None
    return Box((four[0], four[1], four[2], four[3]), label)


def _plain(answer: Any) -> Any:
    """Lists in place of arrays and tensors."""
    return answer.tolist() if hasattr(answer, "tolist") else answer


def _corners(boxes: Sequence[Box]) -> NDArray[np.float64]:
    return np.array([box.corners for box in boxes], dtype=np.float64).reshape(-1, 4)


def _area(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    area: NDArray[np.float64] = (corners[..., 2:] - corners[..., :2]).prod(-1)
    return area


def _size(size: Sequence[float] | None, key: str, scale: str) -> tuple[float, float]:
    pair = None if size is None else numbers(_plain(size), 2)
    if pair is None or min(pair) <= 0:
        raise NoVerdict(f"scale: {scale} needs meta[{key!r}] = [width, height]; it is {size!r}")
    return pair[0], pair[1]
