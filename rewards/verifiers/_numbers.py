"""The number that an answer gives, in words around it or not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from rewards.verifiers._expression import Unreadable, Value, read
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict

_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})"
    r"(?:[eE][-+]?\d{1,3})?(?!\d)\s{0,2}(?:\\?%)?"
)
_MOST_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number, as it was written and what that means."""

    value: float
    percent: bool = False
    """Written with a percent sign; `value` is what stands before it."""
    written: str = ""


def quantity_of(response: str, strict: bool = False) -> Quantity | None:
    """The number that the response's answer is, else the last one in it; None if it has none."""
    said = answer_of(response, strict=strict)
    return None if said is None else quantity(said)


def quantity(text: str) -> Quantity | None:
    """The number that a text is, else the last one in it."""
    try:
        whole = read(text)
        if isinstance(whole, Value) and len(whole.at) == 1 and math.isfinite(float(whole.at[0])):
            return Quantity(float(whole.at[0]), whole.percent, text.strip())
    except (Unreadable, OverflowError):
        pass
    last = None
    for match in _NUMBER.finditer(text[-_MOST_CHARACTERS:]):
        last = match
    if last is None:
        return None
    written = last[0].strip()
    value = float(written.rstrip("\\%").strip().replace(",", "").replace("−", "-"))
    return Quantity(value, written.endswith("%"), written) if math.isfinite(value) else None


def right_quantity(answer: Any) -> Quantity:
    """The number in the metadata; NoVerdict if it is none."""
    found = None if isinstance(answer, bool) else quantity(str(answer))
    if found is None:
        raise NoVerdict(f"the right answer {str(answer)[:60]!r} is no number")
    return found


def readings(said: Quantity, right: Quantity) -> list[float]:
    """What `said` may mean in the unit of `right`: 20% is 20 or 0.2, where only one of the two has the sign."""
    if said.percent == right.percent:
        return [said.value]
    return [said.value, said.value / 100 if said.percent else said.value * 100]
