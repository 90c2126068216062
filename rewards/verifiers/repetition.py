"""Does it say the same thing over and over?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rewards.types import RewardContractError
from rewards.verifiers._geometry import parse_boxes
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import verifier

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_UNIT = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
_MOST_CHARACTERS = 200_000


@verifier(range=(-1.0, 0.0))
def ngrams(response: str, n: int = 3, unit: Literal["mixed", "word", "character"] = "mixed") -> float:
    """-(1 - distinct / all n-grams) of the whole response (Yeo et al., arXiv:2502.03373; TRL, ROLL, VLM-R1).

    unit   mixed: words, signs, and single letters of scripts that put no blanks between words; word: what stands
           between blanks, which makes one word of a Chinese sentence; character

    Of a longer response only the last 200 000 characters count; 0 for one of fewer than n units.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RewardContractError(f"ngrams: n is {n!r}; expected a whole number of at least 1")
    units = _units(response[-_MOST_CHARACTERS:], unit)
    total = len(units) - n + 1
    return distinct_share(list(zip(*(units[start:] for start in range(n)), strict=False))) - 1 if total > 0 else 0.0


@verifier(range=(-1.0, 0.0))
def boxes(response: str) -> float:
    """-(1 - distinct / all) of the boxes with their labels that the response lists (VLM-R1); 0 if it lists none."""
    found = parse_boxes(answer_of(response, phrases=False) or "")
    return distinct_share(found) - 1 if found else 0.0


def distinct_share(items: Sequence[object]) -> float:
    """Distinct items / items, in (0, 1]."""
    return len(set(items)) / len(items)


def _units(text: str, unit: str) -> list[str]:
    if unit == "mixed":
        return _UNIT.findall(text)
    if unit == "word":
        return text.split()
    if unit == "character":
        return list(text)
    raise RewardContractError(f"ngrams: unit is {unit!r}; expected mixed, word or character")
