"""Is it the right text? Error rates of what was read, for OCR, transcription and short answers about texts.

`meta["answer"]` is the right text, or a list of right ones, of which the nearest counts. The edit distance lev is that
of Levenshtein. These are different numbers, and are not to be mixed: CER divides lev by the length of the right text,
ANLS by the longer of the two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from typing import Any

from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, verifier

__all__ = ["anls", "cer", "levenshtein", "wer"]

_MOST = 20_000
"""Characters or words of a right text; the distance of two texts of twice this length takes about a second."""


@verifier()
def cer(response: str, answer: Any, fold: bool = False) -> float:
    """1 - min(1, lev(p, g) / |g|) in characters: 1 minus the character error rate; `fold` ignores case."""
    return max(1 - _error_rate(_text(response, fold), right) for right in _rights(answer, fold))


@verifier()
def wer(response: str, answer: Any, fold: bool = False) -> float:
    """1 - min(1, lev(p, g) / |g|) in words: 1 minus the word error rate (Video-R1); `fold` ignores case."""
    said = _text(response, fold).split()
    return max(1 - _error_rate(said, right.split()) for right in _rights(answer, fold))


@verifier()
def anls(response: str, answer: Any, threshold: float = 0.5) -> float:
    """max over right texts of 1 - NL where NL < threshold, else 0; NL = lev(p, g) / max(|p|, |g|).

    Average normalised Levenshtein similarity (Biten et al., arXiv:1905.13648), without regard to case and white space.
    """
    said = _text(response, fold=True)
    return max(_similarity(said, right, threshold) for right in _rights(answer, fold=True))


def levenshtein(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`; O(|a| |b| / 64).

    One column of the table at a time, as two bit vectors of its differences (Myers 1999 in the form of Hyyro 2003).
    """
    if not a:
        return len(b)
    places: dict[Hashable, int] = {}
    for index, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << index
    full, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for item in b:
        here = places.get(item, 0)
        zero = (((here & up) + up) ^ up) | here | down
        right_up = down | ~(zero | up) & full
        right_down = up & zero
        distance += bool(right_up & top) - bool(right_down & top)
        right_up = (right_up << 1 | 1) & full
        right_down = right_down << 1 & full
        up = right_down | ~(zero | right_up) & full
        down = right_up & zero
    return distance


def _error_rate(said: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    if not right or len(said) >= 2 * len(right):  # so much too long costs the whole of it, without looking
        return float(len(said) > 0)
    return min(1.0, levenshtein(right, said) / len(right))


def _similarity(said: str, right: str, threshold: float) -> float:
    longest = max(len(said), len(right))
    if longest == 0:
        return 1.0
    if abs(len(said) - len(right)) >= threshold * longest:  # the distance is at least that
        return 0.0
    distance = levenshtein(right, said) / longest
    return 1 - distance if distance < threshold else 0.0


def _text(response: str, fold: bool) -> str:
    """What was read; a transcript may well contain "answer:", so that only marks make an answer."""
    return _spaced(answer_of(response, phrases=False) or "", fold)


def _rights(answer: Any, fold: bool) -> list[str]:
    rights = [_spaced(str(each), fold) for each in (answer if isinstance(answer, list | tuple) else [answer])]
    if not rights:
        raise NoVerdict("the right answer is an empty list")
    if max(map(len, rights)) > _MOST:
        raise NoVerdict(f"the right answer has more than {_MOST} characters; judge it page by page")
    return rights


def _spaced(text: str, fold: bool) -> str:
    """One way to write accents, one blank for white space, and one case if that does not matter."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if fold else text
