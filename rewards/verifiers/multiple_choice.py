"""One of several options, by its letter or by its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.verifiers.exact import folded
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, verifier

_ALONE = re.compile(r"\(?([A-Za-z])\)?[.):]?")
_LEADING = re.compile(r"\(([A-Z])\)[.:]?\s|([A-Z])[.):](?:\s|$)")
_NAMED = re.compile(r"\b(?i:option|choice) {0,4}\(?([A-Z])\b")
_LABEL = re.compile(r"\(?([A-Z])[.):]\)?\s+")
_MOST_CHARACTERS = 4000


@verifier(wants=("options",))
def multiple_choice(
    response: str,
    answer: Any,
    options: Sequence[str] | Mapping[str, str] | None = None,
    count: int = 26,
    strict: bool = False,
) -> float:
    """1 if the answer is the right option, else 0; two different ones are no answer.

    The letter counts where it stands alone ("B", "(B)", "b."), in front ("B. red") or after "option"; nowhere else, so
    that the A of "A dog" is none. Without a letter the text of an option counts: all of the answer, else in it.

    options   `meta["options"]` where it has them: their texts, or {letter: text}
    count     how many options there are where their texts are not given
    strict    only a marked answer counts
    """
    texts = _texts(options)
    letters = [chr(ord("A") + index) for index in range(len(texts) or count)]
    right = _right(str(answer).strip(), letters, texts)
    said = answer_of(response, strict=strict)
    return float(said is not None and _chosen(said[:_MOST_CHARACTERS].strip(" \t\r\n*_`$"), letters, texts) == right)


def _texts(options: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """The options' texts, folded and without "A." in front."""
    if options is None:
        return []
    listed = [options[key] for key in sorted(options)] if isinstance(options, Mapping) else list(options)
    return [folded(_LABEL.sub("", str(text), count=1) if _LABEL.match(str(text)) else str(text)) for text in listed]


def _right(answer: str, letters: Sequence[str], texts: Sequence[str]) -> str:
    if folded(answer) in texts and texts.count(folded(answer)) == 1:
        return letters[texts.index(folded(answer))]
    alone = _ALONE.fullmatch(answer) or _LABEL.match(answer)
    if alone is None or alone[1].upper() not in letters:
        raise NoVerdict(f"the right answer {answer[:60]!r} is none of the options {', '.join(letters)}")
    return alone[1].upper()


def _chosen(said: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    """The one option that is meant; None if there is none, or more than one."""
    alone = _ALONE.fullmatch(said)
    if alone is not None and alone[1].upper() in letters:
        return alone[1].upper()
    leading = _LEADING.match(said)
    found = {next(filter(None, leading.groups()))} if leading else set()
    found |= set(_NAMED.findall(said))
    found &= set(letters)
    if not found:
        found = _by_text(folded(said), letters, texts)
    return found.pop() if len(found) == 1 else None


def _by_text(said: str, letters: Sequence[str], texts: Sequence[str]) -> set[str]:
    pairs = list(zip(letters, texts, strict=True)) if texts else []
    whole = {letter for letter, text in pairs if text == said}
    if whole:
        return whole
    return {letter for letter, text in pairs if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)}
