"""Yes or no."""

from __future__ import annotations

import re
from typing import Any

from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, verifier

_SIDE = {"yes": True, "true": True, "no": False, "false": False}
_WORD = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)


@verifier()
def yes_no(response: str, answer: Any, strict: bool = False) -> float:
    """1 if the answer says yes (true) or no (false) as the right one does, else 0: also where it says both or neither.

    Whole words count: there is no "no" in "know". `strict`: only a marked answer counts.
    """
    right = {answer} if isinstance(answer, bool) else _sides(str(answer))
    if len(right) != 1:
        raise NoVerdict(f"the right answer {str(answer)[:60]!r} is neither yes nor no")
    said = answer_of(response, strict=strict)
    return float(said is not None and _sides(said) == right)


def _sides(text: str) -> set[bool]:
    return {_SIDE[word.lower()] for word in _WORD.findall(text)}
