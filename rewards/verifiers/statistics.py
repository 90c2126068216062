"""Figures about a batch of answers, for the log: by source, by length, and how much they reconsider (V-Triune).

A figure about a part that is empty, such as the length of wrong answers where all are right, is left out: never NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from rewards.verifiers.types import Answer

REFLECTION = (
    "re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine", "reevaluation",
    "rethink", "check again", "think again", "try again", "verify", "wait", "yet",
)  # fmt: skip
"""V-Triune's words. Whole words count here, so that there is no "yet" in "yeti"."""

_REFLECTS = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, REFLECTION))})(?![\w-])", re.IGNORECASE)


def reflects(response: str) -> bool:
    """Whether a response reconsiders, by V-Triune's words."""
    return _REFLECTS.search(response) is not None


def statistics(
    answers: Sequence[Answer], score: Tensor, *, threshold: float = 0.5, source: str = "source"
) -> dict[str, float]:
    """Figures by name of N answers and their `score` [N], NaN = no verdict.

    An answer is right from `threshold` on; those without a verdict are neither right nor wrong.

        score/<source>                                       mean by `meta[source]`
        tokens/all, /right, /wrong                           mean length, where tokens are counted
        truncated/all, /right, /wrong                        share
        reflection/all, /right, /wrong                       share that reconsiders
        right/reflective, right/unreflective                 share of right answers among those that do, or do not
    """
    rows = [(answer, value, reflects(answer.response)) for answer, value in zip(answers, score.tolist(), strict=True)]
    judged = [row for row in rows if row[1] == row[1]]
    right = [row for row in judged if row[1] >= threshold]
    wrong = [row for row in judged if row[1] < threshold]
    figures: dict[str, list[float]] = {}
    for answer, value, _ in judged:
        if source in answer.meta:
            figures.setdefault(f"score/{answer.meta[source]}", []).append(value)
    for name, part in (("all", rows), ("right", right), ("wrong", wrong)):
        figures[f"tokens/{name}"] = [float(answer.tokens) for answer, _, _ in part if answer.tokens is not None]
        figures[f"truncated/{name}"] = [float(answer.truncated) for answer, _, _ in part]
        figures[f"reflection/{name}"] = [float(does) for _, _, does in part]
    for name, wanted in (("reflective", True), ("unreflective", False)):
        figures[f"right/{name}"] = [float(value >= threshold) for _, value, does in judged if does is wanted]
    return _means(figures)


def _means(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in figures.items() if values}
