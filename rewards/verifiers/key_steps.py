"""Does the reasoning pass the steps that a good one passes? (StepGRPO of R1-VL, arXiv:2503.12937.)

`meta["key_steps"]` lists them in order; a step is a text, or a list of texts of which any will do ("3/4", "0.75",
"three quarters"). All of the response is searched, thinking included: these are rewards of the way, not of its end.

    - {use: verifiers.math, name: right}                        1 for the right answer
    - {use: verifiers.key_steps.matched, weight: 0.1}           StepRAR: alpha k
    - {use: verifiers.key_steps.complete, weight: 1}            StepRVR: 1 for all steps in their order

Note: R1-VL's StepRVR looks for a description, a rationale and an answer in this order; here the steps themselves are
what has to be complete and in order, so put such markers among them.
"""

from __future__ import annotations

import re
from typing import Any

from rewards.verifiers.types import NoVerdict, verifier

_MOST_CHARACTERS = 500_000


@verifier()
def matched(response: str, key_steps: Any) -> float:
    """Share of the steps that the response has in it, as whole words, without regard to case and white space."""
    steps, text = _steps(key_steps), _folded(response[:_MOST_CHARACTERS])
    return sum(_place(text, step, 0) is not None for step in steps) / len(steps)


@verifier()
def complete(response: str, key_steps: Any) -> float:
    """1 if the response has all steps in it, each after the one before, else 0."""
    text, place = _folded(response[:_MOST_CHARACTERS]), 0
    for step in _steps(key_steps):
        end = _place(text, step, place)
        if end is None:
            return 0.0
        place = end
    return 1.0


def _steps(key_steps: Any) -> list[list[str]]:
    """Folded texts of each step."""
    listed = key_steps if isinstance(key_steps, list | tuple) else [key_steps]
    steps = [[_folded(str(text)) for text in (each if isinstance(each, list | tuple) else [each])] for each in listed]
    if not steps or any(not text for step in steps for text in step):
        raise NoVerdict(f"key_steps is {str(key_steps)[:60]!r}; expected a list of texts, or of lists of texts")
    return steps


def _place(text: str, step: list[str], start: int) -> int | None:
    """Where the earliest of a step's texts ends, from `start` on; None if there is none of them."""
    searches = (re.compile(rf"(?<!\w){re.escape(each)}(?!\w)").search(text, start) for each in step)
    return min((found.end() for found in searches if found), default=None)


def _folded(text: str) -> str:
    return " ".join(text.replace("$", "").casefold().split())
