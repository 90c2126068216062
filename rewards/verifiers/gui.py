"""Would this click or keystroke have been the right one? The type of an action, its argument, and where it points.

A response gives the action as JSON, {"action": "click", "coordinate": [x, y]}, or as a call, click(x=10, y=20),
type(text='hello'), scroll(direction="down"). `meta["action"]` says what is right:

    {"action": "click", "box": [x1, y1, x2, y2]}      a point in the box, border included, in pixels of the image
    {"action": "type", "text": "hello"}               the text
    {"action": "scroll", "direction": "down"}         every other key: the same value
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.verifiers._geometry import Scale, factors, numbers, parse_json
from rewards.verifiers.exact import folded
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, Verdict, verifier

_TYPES = ("action", "action_type", "type", "name")
_POINTS = ("coordinate", "point", "position", "start_box", "box", "bbox", "bbox_2d")
_SAME = {"tap": "click", "left_click": "click", "input": "type", "input_text": "type", "write": "type"}
_CALL = re.compile(r"\b([A-Za-z_]{1,40})\(([^\n]{0,2000})\)")
_ARGUMENT = re.compile(
    r"(?:([A-Za-z_]{1,40})\s{0,4}=\s{0,4})?"
    r"('[^'\n]{0,1000}'|\"[^\"\n]{0,1000}\"|\([^()\n]{0,200}\)|\[[^\[\]\n]{0,200}\]|[^\s,()'\"\[\]=]{1,200})"
)
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?")
_MOST_CHARACTERS = 20_000


@verifier(wants=("image_size", "model_size"))
def gui(
    response: str,
    action: Mapping[str, Any],
    type_share: float = 0.0,
    text_f1: float | None = None,
    scale: Scale = "abs",
    image_size: Sequence[float] | None = None,
    model_size: Sequence[float] | None = None,
) -> Verdict:
    """1 if the action's type and argument are right, else 0 (GLM-4.5V; UI-R1, arXiv:2503.21620).

    type_share   what the right type with a wrong argument is worth, in [0, 1]
    text_f1      typed text is right from this F1 of its words on (GUI-R1, arXiv:2504.10458); None: if it is the same
    scale        abs, norm1000 or model_input: what the model's numbers are, as in `verifiers.boxes`

    Parts: type, argument.
    """
    right_type, right = _right(action)
    by = factors(scale, image_size, model_size)
    given = _given(response)
    if given is None or given[0] != right_type:
        return Verdict(0.0, {"type": 0.0, "argument": 0.0})
    argument = float(all(_fits(key, value, given[1], by, text_f1) for key, value in right.items()))
    return Verdict(type_share + (1 - type_share) * argument, {"type": 1.0, "argument": argument})


def _right(action: Any) -> tuple[str, dict[str, Any]]:
    key = next((key for key in _TYPES if key in action), None) if isinstance(action, Mapping) else None
    if key is None:
        raise NoVerdict(f"the right action is {str(action)[:60]!r}; expected {{action: click, box: [x1, y1, x2, y2]}}")
    arguments = {each: value for each, value in action.items() if each != key and value is not None}
    for each in ("box", "bbox"):
        if each in arguments and numbers(_listed(arguments[each]), 4) is None:
            raise NoVerdict(f"the right action's {each} is {arguments[each]!r}; expected [x1, y1, x2, y2]")
    return _type(action[key]), arguments


def _given(response: str) -> tuple[str, dict[str, Any]] | None:
    """Type and arguments of the last action in the answer; None without one."""
    said = answer_of(response, phrases=False)
    if said is None or len(said) > _MOST_CHARACTERS:
        return None
    found = parse_json(said)
    last = found[-1] if isinstance(found, list) and found else found
    if isinstance(last, Mapping):
        key = next((key for key in _TYPES if isinstance(last.get(key), str)), None)
        inner = last.get("arguments")
        others = dict(inner) if isinstance(inner, Mapping) else {each: last[each] for each in last if each != key}
        return None if key is None else (_type(last[key]), others)
    calls = list(_CALL.finditer(said))
    return (_type(calls[-1][1]), _arguments(calls[-1][2])) if calls else None


def _arguments(text: str) -> dict[str, Any]:
    """Arguments of a call by name; those without a name are a point if they are numbers, else a text."""
    named: dict[str, Any] = {}
    bare: list[str] = []
    for match in _ARGUMENT.finditer(text):
        value = match[2].strip("'\"")
        if match[1]:
            named[match[1]] = value
        else:
            bare.append(value)
    points = [float(number) for value in bare for number in _NUMBER.findall(value)]
    if len(points) in (2, 4):
        named.setdefault("point", points)
    elif len(bare) == 1:
        named.setdefault("text", bare[0])
    return named


def _fits(key: str, value: Any, given: Mapping[str, Any], by: tuple[float, float], text_f1: float | None) -> bool:
    if key in ("box", "bbox"):
        return _is_inside(_point(given), numbers(_listed(value), 4), by)
    said = given.get(key)
    if said is None and key == "text":
        said = next((given[each] for each in ("content", "value") if each in given), None)
    if said is None:
        return False
    if key == "text" and text_f1 is not None:
        return word_f1(str(said), str(value)) >= text_f1
    return folded(str(said)) == folded(str(value))


def _is_inside(point: tuple[float, float] | None, box: tuple[float, ...] | None, by: tuple[float, float]) -> bool:
    if point is None or box is None:
        return False
    x, y = point[0] * by[0], point[1] * by[1]
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _point(given: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where an action points: its x and y, the point that it has, or the centre of its box."""
    pair = [given.get("x"), given.get("y")]
    values = [pair] if None not in pair else [given[key] for key in _POINTS if key in given]
    for value in values:
        found = [
            float(n) for n in _NUMBER.findall(value if isinstance(value, str) else " ".join(map(str, _listed(value))))
        ]
        if len(found) == 4:
            return (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
        if len(found) == 2:
            return found[0], found[1]
    return None


def word_f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1], repeated ones counted."""
    a, b = folded(said).split(), folded(right).split()
    shared = (Counter(a) & Counter(b)).total()
    return 2 * shared / (len(a) + len(b)) if a or b else 1.0


def _listed(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _type(name: Any) -> str:
    plain = str(name).strip().casefold().replace(" ", "_").replace("-", "_")
    return _SAME.get(plain, plain)
