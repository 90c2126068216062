"""How many are there? The right number, or one that is nearly right."""

from __future__ import annotations

import re
from typing import Any

from rewards.verifiers._numbers import Quantity, quantity, right_quantity
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, verifier

_BRACKETED = re.compile(r"\[\s{0,4}(-?\d{1,18})\s{0,4}\]")
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


@verifier()
def counting(response: str, answer: Any, soft: bool = False, words: bool = True, strict: bool = False) -> float:
    """1 if the whole number p of the answer is the right one g, else 0; the last `[p]`, or else the last number.

    soft     max(0, 1 - |p - g| / max(g, 1)) instead
    words    zero to twenty may be spelt out, in an answer without digits
    strict   only a marked answer counts
    """
    right = right_quantity(answer).value
    if right != int(right) or right < 0:
        raise NoVerdict(f"the right answer {answer!r} is no count")
    said = answer_of(response, strict=strict)
    found = None if said is None else _count(said, words)
    if found is None or found.percent or found.value != int(found.value):
        return 0.0
    distance = abs(found.value - right)
    return max(0.0, 1 - distance / max(right, 1.0)) if soft else float(distance == 0)


def _count(text: str, words: bool) -> Quantity | None:
    bracketed = _BRACKETED.findall(text)
    if bracketed:
        return Quantity(float(bracketed[-1]))
    spelt = _WORD.findall(text) if words and not re.search(r"\d", text) else []
    return Quantity(float(_WORDS.index(spelt[-1].lower()))) if spelt else quantity(text)
