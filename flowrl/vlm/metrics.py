"""Figures about answers in text: rewards by source, lengths, truncation, reconsidering, pass@k, tools (after V-Triune).

They are computed from one table over the answers of all processes, rewards [B], groups [B] and facts [B], so that every
process logs the same. A figure about a part that is empty, such as the length of wrong answers where all are right, is
left out: never NaN. Sums are exact, so the order of the answers does not matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

REFLECTS = "reflects"
"""The fact that an answer reconsiders, 1 or 0."""
SHARES = ("forced", "over_turns")
"""Facts that are 1 or 0, whose mean is logged."""
COUNTS = ("calls", "failed_calls", "continuations")
"""Facts that count something in an answer, whose mean is logged."""
REFLECTION = (
    "re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine", "reevaluation",
    "rethink", "check again", "think again", "try again", "verify", "wait", "yet",
)  # fmt: skip
"""V-Triune's words. Whole words count here, so that there is no "yet" in "yeti"."""

_RECONSIDERS = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, REFLECTION))})(?![\w-])", re.IGNORECASE)


def reflection(texts: Iterable[str]) -> Tensor:
    """1 for each text that reconsiders, by V-Triune's words, else 0; float64 [B]: a fact."""
    return torch.tensor([float(_RECONSIDERS.search(text) is not None) for text in texts], dtype=torch.float64)


def pass_at_k(right: int, count: int, k: int) -> float:
    """Probability that one of k answers, drawn from `count` of which `right` are right, is right (arXiv:2107.03374).

    1 - C(n - c, k) / C(n, k), unbiased for the chance of k fresh answers. ValueError unless 1 <= k <= count.
    """
    if not (1 <= k <= count and 0 <= right <= count):
        raise ValueError(f"pass@{k} of {right} right answers among {count}: need 1 <= k <= {count} and right <= count")
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def text_metrics(
    rewards: Tensor, group: Tensor, facts: Mapping[str, Tensor], *, sources: Sequence[str] | None = None,
    right: Tensor | None = None, threshold: float = 0.5, passes: Sequence[int] = (1, 2, 4, 8, 16),
    seconds: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Figures by name of B answers with their rewards [B] (NaN = no verdict), groups [B] and facts [B] each.

    An answer is right where `right` [B], else its reward, is at least `threshold`; NaN is neither right nor wrong.
    `sources` names the data set of each; `seconds` is how long it took to write all of them.

        text/reward/<source>                              mean reward
        text/tokens/all, /right, /wrong                   mean length; the same for text/truncated, a share
        text/reflection/ratio, /in_correct, /in_incorrect share of answers that reconsider, by the fact `reflects`
        text/reflection/correct_in_reflective, /correct_in_nonreflective
        text/pass@k                                       mean over the groups that have k answers with a verdict
        text/groups/all_right, /all_wrong                 share of groups that teach nothing, of those with a verdict
        text/forced, /over_turns, /calls, /failed_calls, /continuations   mean of the fact
        text/tokens_per_second
    """
    verdict = [_verdict(value, threshold) for value in (rewards if right is None else right).tolist()]
    is_right, is_wrong = [v is True for v in verdict], [v is False for v in verdict]
    named = {name: fact.tolist() for name, fact in facts.items()}
    figures = _by_source(rewards.tolist(), sources or []) | _groups(verdict, group.tolist(), passes)
    for name in ("tokens", "truncated"):
        values = named.get(name, [])
        figures |= {f"{name}/all": values}
        figures |= {f"{name}/right": compress(values, is_right), f"{name}/wrong": compress(values, is_wrong)}
    figures |= {name: named[name] for name in (*SHARES, *COUNTS) if name in named}
    if REFLECTS in named:
        figures |= {f"reflection/{key}": values for key, values in _reflection(named[REFLECTS], verdict).items()}
    means = {f"text/{name}": mean for name, values in figures.items() if (mean := _mean(values)) is not None}
    if seconds and "tokens" in named:
        means["text/tokens_per_second"] = math.fsum(named["tokens"]) / seconds
    return means


def _verdict(score: float, threshold: float) -> bool | None:
    return None if math.isnan(score) else score >= threshold


def _by_source(rewards: Sequence[float], sources: Sequence[str]) -> dict[str, Iterable[float]]:
    return {
        f"reward/{name}": [value for value, source in zip(rewards, sources, strict=True) if source == name]
        for name in sorted(set(sources))
    }


def _reflection(reflective: Sequence[float], verdict: Sequence[bool | None]) -> dict[str, Iterable[float]]:
    pairs = [(does, v) for does, v in zip(reflective, verdict, strict=True)]
    return {
        "ratio": reflective,
        "in_correct": [does for does, v in pairs if v is True],
        "in_incorrect": [does for does, v in pairs if v is False],
        "correct_in_reflective": [float(v) for does, v in pairs if does and v is not None],
        "correct_in_nonreflective": [float(v) for does, v in pairs if not does and v is not None],
    }


def _groups(verdict: Sequence[bool | None], group: Sequence[int], passes: Sequence[int]) -> dict[str, Iterable[float]]:
    """pass@k and the groups that are all right or all wrong, each by its values a group."""
    judged: dict[int, list[bool]] = {}
    for number, answer in zip(group, verdict, strict=True):
        if answer is not None:
            judged.setdefault(number, []).append(answer)
    tally = [(sum(answers), len(answers)) for answers in judged.values()]
    return {
        **{f"pass@{k}": [pass_at_k(right, count, k) for right, count in tally if count >= k] for k in passes},
        "groups/all_right": [float(right == count) for right, count in tally],
        "groups/all_wrong": [float(right == 0) for right, _ in tally],
    }


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None
