r"""What a response answers, out of all that it says; and never out of what it thinks.

    1. what stands after the last `</think>`, and before a `<think>` that is not closed
    2. in it, the last `<answer>...</answer>`
    3. in that, the last `<|begin_of_box|>...<|end_of_box|>`, else the last balanced `\boxed{...}`
    4. if there was none of these: what follows the last "answer is" or "answer:", on its line
    5. if there was none of that either: all of it

Every function here reads a text in linear time, whatever is in it.
"""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\(?:boxed|fbox) {0,4}\{|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(r"\banswer(?: +is\b *:?| *:)", re.IGNORECASE)
_AROUND = " \t\r\n*_`"


def answer_of(response: str, *, strict: bool = False, phrases: bool = True) -> str | None:
    """The answer, without white space around it; None if there is none.

    strict    only a marked answer counts: 2 and 3
    phrases   whether "the answer is ..." marks one where nothing else does
    """
    said = spoken(response)
    tagged = last_between(said, "<answer>", "</answer>")
    inner = said if tagged is None else tagged
    boxed = last_between(inner, "<|begin_of_box|>", "<|end_of_box|>")
    if boxed is None:
        boxed = last_boxed(inner)
    if boxed is not None:
        return boxed.strip() or None
    if tagged is not None:
        return tagged.strip() or None
    if strict:
        return None
    found = last_phrase(said) if phrases else None
    return (said.strip() if found is None else found) or None


def spoken(response: str) -> str:
    """What is not thinking: after the last `</think>`, up to a `<think>` that was never closed."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def last_between(text: str, start: str, end: str) -> str | None:
    """What the last closed pair of two marks encloses; None without one."""
    begin = text.rfind(start, 0, max(text.rfind(end), 0))
    return text[begin + len(start) :].partition(end)[0] if begin >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""What the last balanced `\boxed{...}` encloses, braces in it included; None without one.

    The last one is that which begins last: of two that are nested, the inner.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    opened: list[int | None] = []  # per open brace: where the content of a box begins, or None for any other brace
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            begin = opened.pop() if opened else None
            if begin is not None and (best is None or begin > best[0]):
                best = (begin, match.start())
        elif token == "{":
            opened.append(None)
        elif len(token) > 2:
            opened.append(match.end())
    return None if best is None else text[best[0] : best[1]]


def last_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "answer:": the rest of its line, or of its sentence; None without one."""
    last = None
    for match in _PHRASE.finditer(text):
        last = match
    if last is None:
        return None
    line = text[last.end() :].lstrip(_AROUND).partition("\n")[0]
    return line.partition(". ")[0].strip(_AROUND).removesuffix(".").rstrip(_AROUND) or None
