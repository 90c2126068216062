"""Several verifiers as one reward of answers: who judges which answer, and how the scores become one number.

    - {use: verifiers.math, name: right, when: {source: [geometry3k, mathvista]}}
    - {use: verifiers.boxes.detection, name: found, when: {source: coco}, threshold: dynamic}
    - {use: verifiers.format.thinking, weight: 0.1}
    - {use: "./mine.py:zoomed", weight: 0.2, only_where: {right: 0.5}}

Weights, norms, gates and `min_std` are those of `rewards.combine`. What is added:

    when         which answers an entry is for: {key of the metadata: value, or list of values}, all of which must hold.
                 Others do not ask it, and it is left out of their totals.
    only_where   {name of another entry: least score}: below it, or where that entry is not asked, this one counts as
                 nothing. A tool reward for right answers alone is one (DeepEyes, arXiv:2505.14362), a process reward
                 for them another (Posterior-GRPO).
    on_error     nan (no verdict on that answer) or raise, for a verifier that raises something else than NoVerdict

An answer gets its total from all the verifiers that it is routed to, or has no verdict.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewards.combine import Rule, combine, make_rule
from rewards.contract import Sheet, as_scores, short
from rewards.functions import label, nearest
from rewards.hub import HubResult
from rewards.scorer import NanWatch
from rewards.types import RewardContractError, RewardError, Scores
from rewards.verifiers.names import available, build
from rewards.verifiers.types import Answer, TextReward

KEYS = ("use", "name", "weight", "norm", "gate", "min_std", "when", "only_where", "on_error")
"""Keys of an entry; every other one is an option of the verifier."""
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verified(HubResult):
    """What the verifiers said about N answers. `scores` and `parts` are NaN where a verifier was not asked."""

    asked: dict[str, Tensor]
    """{verifier: bool [N]}: which answers it was asked about."""

    @property
    def nan_frac(self) -> dict[str, float]:
        """{verifier: share without a verdict, of the answers that it was asked about}; those asked nothing are out."""
        rows = {name: asked for name, asked in self.asked.items() if asked.any()}
        return {name: self.scores[name][asked].isnan().float().mean().item() for name, asked in rows.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One verifier with its place."""

    reward: TextReward
    rule: Rule
    when: dict[str, tuple[Any, ...]]
    only_where: dict[str, float]
    raises: bool

    def is_for(self, answer: Answer) -> bool:
        return all(key in answer.meta and answer.meta[key] in allowed for key, allowed in self.when.items())


class Verifiers:
    """The verifiers of a config. Not for two threads at once."""

    def __init__(self, entries: Any, *, renormalise: bool = False, max_nan_frac: float | None = 0.5) -> None:
        """`entries` as in this file's head, or {name: weight}, or names, functions, classes and objects.

        `renormalise` lets the verifiers that answered stand in for those that did not. A run stops when the share of
        answers without a verdict from one verifier stays above `max_nan_frac`.
        """
        self._renormalise = renormalise
        self._entries = _read_all(entries)
        self._warned: set[tuple[str, str]] = set()
        self._watches = {
            name: NanWatch(name=name, max_nan_frac=max_nan_frac)
            for name, entry in self._entries.items()
            if entry.rule.counts and max_nan_frac is not None
        }

    @property
    def rules(self) -> dict[str, Rule]:
        """{name: how its score enters the total}"""
        return {name: entry.rule for name, entry in self._entries.items()}

    def __call__(self, answers: Sequence[Answer], progress: float | None = None) -> Verified:
        """Judge N answers; `progress` in [0, 1] is how far the training is, for schedules such as a dynamic IoU.

        RewardContractError if no weighted verifier is for an answer: its source would be trained on nothing.
        """
        batch = _checked(answers)
        asked = self._asked(batch)
        self._check_routes(batch, asked)
        done = {name: self._ask(name, batch, asked[name], progress) for name in self._entries}
        scores = {name: sheet.value for name, (sheet, _) in done.items()}
        return Verified(
            total=self.combine(scores, asked, torch.tensor([answer.group for answer in batch])),
            scores=scores,
            parts={name: sheet.parts for name, (sheet, _) in done.items()},
            info=[{n: s.info[row] for n, (s, _) in done.items() if asked[n][row]} for row in range(len(batch))],
            seconds={name: seconds for name, (_, seconds) in done.items()},
            asked=asked,
        )

    def gaps(self, questions: Sequence[Answer]) -> list[str]:
        """What is missing in the metadata of the questions, known before anything is answered; [] = nothing.

        A question that no weighted verifier is for; and what a verifier reads, where none of its questions has it.
        """
        asked = self._asked(questions)
        known = dict.fromkeys(key for question in questions for key in question.meta)
        lacking: dict[str, list[str]] = {}
        for name, entry in self._entries.items():
            its_own = [question for question, here in zip(questions, asked[name].tolist(), strict=True) if here]
            for key, of in (*((key, questions) for key in entry.when), *((key, its_own) for key in entry.reward.needs)):
                if of and all(question.meta.get(key) is None for question in of):
                    lacking.setdefault(key, []).append(repr(name))
        told = [
            f"no question has {key!r}{nearest(key, known)}, which is read by {', '.join(names)}"
            for key, names in lacking.items()
        ]
        try:
            self._check_routes(questions, asked)
        except RewardContractError as error:
            told.append(str(error))
        return told

    def combine(self, scores: Mapping[str, Tensor], asked: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """Total [N] of raw scores and of who was asked, for callers that gather them from several processes first.

        Answers that ask the same verifiers are combined together, so a group must not be split between routes.
        """
        heard = {name: self._gated(name, scores, asked) for name in self._entries}
        routes = torch.stack([asked[name] for name in self._entries], 1)
        total = torch.full((len(group),), float("nan"))
        for route in torch.unique(routes, dim=0):
            rows = (routes == route).all(1)
            names = [name for name, here in zip(self._entries, route.tolist(), strict=True) if here]
            part = {name: heard[name][rows] for name in names}
            rules = {name: self._entries[name].rule for name in names}
            total[rows] = combine(part, rules, group[rows], renormalise=self._renormalise)
        return total

    def close(self) -> None:
        """Let go of what verifiers hold, such as a process of their own."""
        for entry in self._entries.values():
            if hasattr(entry.reward, "unload"):
                entry.reward.unload()

    def __enter__(self) -> Self:
        """The adapter itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # -------------------------------------------------------------------------------------------- one verifier

    def _ask(self, name: str, batch: list[Answer], asked: Tensor, progress: float | None) -> tuple[Sheet, float]:
        """One verifier's scores of the answers that are for it, and the seconds that it took."""
        entry, sheet = self._entries[name], Sheet(len(batch))
        start = time.perf_counter()
        rows: list[int] = []
        for row in asked.nonzero().flatten().tolist():
            missing = [key for key in entry.reward.needs if batch[row].meta.get(key) is None]
            if missing:
                sheet.fail([row], f"the metadata have no {', '.join(missing)}")
            else:
                rows.append(row)
        if rows:
            scores = as_scores(entry.reward.score([batch[row] for row in rows], progress), len(rows), name)
            sheet.put(rows, scores)
            self._settle(name, entry, scores)
        sheet.fail(sheet.value.isnan().logical_and(asked).nonzero().flatten().tolist(), "the verifier said None or NaN")
        if name in self._watches:
            errors = [
                sheet.info[row]["error"] for row in asked.nonzero().flatten().tolist() if "error" in sheet.info[row]
            ]
            self._watches[name].see(sheet.value[asked], errors)
        return sheet, time.perf_counter() - start

    def _gated(self, name: str, scores: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> Tensor:
        """Scores [N] with those that `only_where` rules out set to what counts as nothing; NaN where it cannot tell."""
        score, entry = scores[name], self._entries[name]
        for other, least in entry.only_where.items():
            out = ~asked[other] | (scores[other] < least)
            score = torch.where(out, entry.rule.affine[0], score)
            score = torch.where(asked[other] & scores[other].isnan(), scores[other], score)
        return score

    def _asked(self, batch: Sequence[Answer]) -> dict[str, Tensor]:
        """{verifier: bool [N]}: which answers it is for."""
        return {
            name: torch.tensor([entry.is_for(answer) for answer in batch], dtype=torch.bool)
            for name, entry in self._entries.items()
        }

    def _check_routes(self, batch: Sequence[Answer], asked: Mapping[str, Tensor]) -> None:
        counted = [asked[name] for name, entry in self._entries.items() if entry.rule.counts]
        for row in (~torch.stack(counted).any(0)).nonzero().flatten().tolist():
            keys = {key: batch[row].meta.get(key) for entry in self._entries.values() for key in entry.when}
            raise RewardContractError(
                f"no weighted verifier is for number {row}, {short(batch[row].prompt)}, whose metadata have {keys}. "
                "Mend: name these values in the `when` of an entry, or add an entry without `when`."
            )

    def _settle(self, name: str, entry: _Entry, scores: Scores) -> None:
        """Raise, or warn once, where a verifier broke; and where its scores are not in the range that it declares."""
        failed = [told for told in scores.info if told.get("failed")]
        if failed:
            told = (
                f"verifier {name!r} fails on {len(failed)} of {len(scores.info)} answers, first with "
                f"{failed[0].get('error', 'no reason')}."
            )
            if entry.raises:
                raise RewardError(f"{told} `on_error: nan` leaves such answers out of training instead.")
            self._warn_once(
                name, "failed", f"{told} They have no verdict, and are not trained on; `on_error: raise` would stop."
            )
        if entry.reward.range is not None:
            low, high = entry.reward.range
            out = scores.value[(scores.value < low - _ROUNDING) | (scores.value > high + _ROUNDING)]
            if len(out):
                self._warn_once(
                    name, "range",
                    f"verifier {name!r} gives {out[0]:g}, but declares a range of {low:g} to {high:g}; mend either.",
                )  # fmt: skip

    def _warn_once(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            warnings.warn(message, stacklevel=2)


def _checked(answers: Sequence[Answer]) -> list[Answer]:
    for index, answer in enumerate(answers):
        if not isinstance(answer, Answer):
            raise RewardContractError(
                f"item {index} is a {type(answer).__name__}; expected rewards.verifiers.Answer(response, prompt, ...)"
            )
    return list(answers)


# ------------------------------------------------------------------------------------------------ reading entries


def _read_all(entries: Any) -> dict[str, _Entry]:
    if isinstance(entries, Mapping) and "use" not in entries:
        entries = [{"use": use, "weight": weight} for use, weight in entries.items()]
    listed = list(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries]
    read: dict[str, _Entry] = {}
    for item in listed:
        name, entry = _read(dict(item) if isinstance(item, Mapping) else {"use": item})
        if name in read:
            raise RewardError(f"two verifiers are called {name!r}; tell them apart with `name:`")
        read[name] = entry
    if not read:
        raise RewardError("no verifier is given; there are: " + ", ".join(available()))
    if not any(entry.rule.counts for entry in read.values()):
        raise RewardError(f"every verifier has weight 0 ({', '.join(read)}): nothing to train on; give one a weight")
    for name, entry in read.items():
        for other in entry.only_where:
            if other not in read or other == name:
                raise RewardError(
                    f"verifier {name!r}: only_where names {other!r}{nearest(other, read)}; "
                    f"expected another entry, one of {', '.join(each for each in read if each != name) or 'none'}"
                )
    return read


def _read(given: dict[str, Any]) -> tuple[str, _Entry]:
    use = given.get("use")
    if use is None:
        raise RewardError(f"a verifier's entry needs `use: name`; this one has {', '.join(given) or 'nothing'}")
    reward = build(use, {key: value for key, value in given.items() if key not in KEYS})
    name = str(given.get("name") or (use.rpartition(":")[2] if isinstance(use, str) else label(use)))
    weight, norm, gate = given.get("weight", 1.0), given.get("norm"), given.get("gate")
    rule = make_rule(name, weight, norm, gate, reward.range, given.get("min_std", 0.0))
    return name, _Entry(
        reward=reward,
        rule=rule,
        when=_when(name, given.get("when")),
        only_where=_only_where(name, given.get("only_where"), rule),
        raises=_raises(name, given.get("on_error", "nan")),
    )


def _when(name: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if when is None:
        return {}
    if not isinstance(when, Mapping) or not when or any(isinstance(value, Mapping) for value in when.values()):
        raise RewardError(f"verifier {name!r}: when is {when!r}; expected {{source: [geometry3k, coco]}}")
    lists = {key: value if isinstance(value, list | tuple | set) else (value,) for key, value in when.items()}
    return {key: tuple(value) for key, value in lists.items()}


def _only_where(name: str, given: Any, rule: Rule) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or any(
        isinstance(v, bool) or not isinstance(v, int | float) for v in given.values()
    ):
        raise RewardError(
            f"verifier {name!r}: only_where is {given!r}; expected {{name of another entry: least score}}"
        )
    if rule.rank or rule.gate is not None:
        what = "norm: rank" if rule.rank else "a gate"
        raise RewardError(f"verifier {name!r}: only_where sets scores to nothing, which {what} would misread; drop one")
    return {key: float(least) for key, least in given.items()}


def _raises(name: str, policy: Any) -> bool:
    if policy not in ("nan", "raise"):
        raise RewardError(f"verifier {name!r}: on_error is {policy!r}; expected nan or raise. There is no 0.")
    return bool(policy == "raise")
