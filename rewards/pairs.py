"""Win rates within a group instead of scores (Pref-GRPO, arXiv:2508.20751).

    lead(a, b)   = score(a) - score(b)                     by a judge of single samples, which is any other reward
                 = prefers(a, b) - 1/2                     by a judge of pairs, shown once
                 = (prefers(a, b) - prefers(b, a)) / 2     by a judge of pairs, shown both ways round
    a beats b where lead > margin, b beats a where lead < -margin, between them it is a tie
    win rate(a)  = mean of 1 (won), 1/2 (tied), 0 (lost) over the judged pairs of a

Who meets whom, and how results become a ranking where not everybody meets everybody, is in `rewards.tournament`.

Why: scores of one prompt's samples often differ by next to nothing, and an advantage that is divided by their spread
blows that nothing up until the policy exploits it. A win rate only knows who is better, and `margin` says by how much.

Note: the paper's code shows each pair once, the sample with the lower number first, so that a judge that favours one
side favours low numbers. And it makes a tie of an answer that it cannot read; here such a pair has no verdict.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from rewards.card import Card
from rewards.contract import as_scores
from rewards.functions import check_options, label
from rewards.resolve import build, resolve
from rewards.scorer import BUGS, Scorer
from rewards.tournament import Pair, Schedule, bradley_terry, expected_wins, play
from rewards.types import Reward, RewardContractError, RewardError, Sample, Scope, Scores, traits_of

__all__ = ["PairJudge", "Pairs"]


@runtime_checkable
class PairJudge(Protocol):
    """Anything that says which of two samples of one prompt is better.

    Optional: `prefers_batch(pairs)`, a list of (first, second) in and as many answers out; `load` and `unload` as
    rewards have them; and of the traits `media`, `needs` and `device`.
    """

    def prefers(self, first: Sample, second: Sample, /) -> float | None:
        """Probability in [0, 1] that the first is better; None or NaN = no verdict."""
        ...


class Pairs:
    """Win rate within the group, in [0, 1], by comparing its samples in pairs (Pref-GRPO, arXiv:2508.20751).

    Parts, counted over a sample's pairs: wins, ties, losses, and unjudged; with a judge of single samples also score,
    what it said; with one of pairs that is shown both orders flips, the pairs whose winner depends on the order. The
    mean of a group whose pairs are all judged is 1/2 whatever the policy has learned, so watch progress on score, or on
    another reward of weight 0. A video is judged frame by frame where the judge knows images alone, and its win rate is
    the mean over them.
    """

    name = "pairs"
    scope: Scope = "group"
    range = (0.0, 1.0)
    card = Card(source="Pref-GRPO (arXiv:2508.20751)", note="as good as its judge, whose licence and weights count")

    def __init__(
        self,
        judge: Any = "shapes",
        judge_options: Mapping[str, Any] | None = None,
        margin: float = 0.05,
        both_orders: bool = True,
        schedule: str = "all",
        value: str = "win_rate",
        seed: int = 0,
    ) -> None:
        """`judge`: what a reward's `use` can be, or the name of a `PairJudge`, or either as an object.

        judge_options     options of the judge
        margin            leads up to it are ties; in the judge's units, or in probability (below 1/2) for a `PairJudge`
        both_orders       a `PairJudge` sees each pair a second time with the sides swapped, so that a preference for
                          one side cancels; without a verdict on both there is none. False: the first of the batch first
        schedule          who meets whom: all, ring:k or swiss:r, see `rewards.tournament`
        value             win_rate, or bradley_terry: mean probability to beat each of the others, by fitted strengths
        """
        options = {} if judge_options is None else judge_options
        if not isinstance(options, Mapping):
            raise RewardError(f"pairs: judge_options is {options!r}; expected a section, such as {{level: stricter}}")
        if not isinstance(both_orders, bool):
            raise RewardError(f"pairs: both_orders is {both_orders!r}; expected true or false")
        if value not in ("win_rate", "bradley_terry"):
            raise RewardError(f"pairs: value is {value!r}; expected win_rate or bradley_terry")
        if not _is_whole(seed):
            raise RewardError(f"pairs: seed is {seed!r}; expected a whole number")
        self._judge = _read_judge(judge, options, both_orders)
        self._margin = _checked_margin(margin, self._judge.most)
        self._schedule, self._value, self._seed = Schedule.parse(schedule), value, seed
        if self._schedule.rounds > 1 and isinstance(self._judge, _ScoreJudge):
            raise RewardError(
                f"pairs: schedule {schedule!r} saves calls of a judge of pairs, but judge {judge!r} scores each sample "
                "once, whatever pairs are made of it. Mend: schedule: all"
            )
        traits = traits_of(self._judge.judge)
        self.media, self.needs, self.device = traits.media, traits.needs, traits.device

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the judge."""
        self._judge.load(device, dtype)

    def unload(self) -> None:
        """Let the judge's weights go."""
        self._judge.unload()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Win rates [N] of the samples of any number of groups, in any order; NaN where no pair has a verdict.

        `info` lists the pairs without a verdict under "unjudged": whom they were against, by place in the group, and
        why. Raises what the judge raised if that was a bug, or if it has left no pair of the call with a verdict;
        where it says itself that it could not ask, `info` has its `failed` instead.
        """
        groups: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            groups.setdefault(sample.group, []).append(row)
        leads: list[_Lead] = []
        parts: dict[str, Tensor] = {}

        def ask(round_: list[Pair]) -> list[float]:
            found, more = self._judge.compare(samples, round_)
            leads.extend(found)
            parts.update(more)
            return [_result(lead.value, self._margin) for lead in found]

        pairs = play(self._schedule, groups, self._seed, ask)
        value, counts = _win_rates(pairs, [lead.value for lead in leads], len(samples), self._margin)
        if self._value == "bradley_terry":
            value = _expected(pairs, [_result(lead.value, self._margin) for lead in leads], groups.values(), value)
        if self._judge.shows_both:
            counts["flips"] = _flips(pairs, leads, counts["wins"])
        place = {row: number for rows in groups.values() for number, row in enumerate(rows)}
        return Scores(value=value, parts={**counts, **parts}, info=_info(pairs, leads, place, value))


# ------------------------------------------------------------------------------------------------ judges


class _Lead(NamedTuple):
    """By how much the first of a pair is better; NaN = no verdict, for this reason."""

    value: float
    reason: str
    flipped: bool = False
    """Each order had another winner: the judge looks at the side, not at the sample."""
    failed: bool = False
    """No verdict because whom the judge asked, such as a server, could not answer."""


class _ScoreJudge:
    """A judge of single samples: each is scored once, however many pairs it is in."""

    most = math.inf
    shows_both = False

    def __init__(self, judge: Reward, name: str) -> None:
        """A `Scorer` isolates failing samples and halves batches, as it does for every reward."""
        traits = traits_of(judge)
        if traits.scope == "group":
            raise RewardError("it compares whole groups itself; a judge scores each sample on its own (scope 'sample')")
        self.judge = judge
        self._scorer = Scorer(
            reward=judge, name=f"pairs (judge {name})", traits=traits, device=torch.device(traits.device or "cpu")
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self._scorer.device, self._scorer.dtype = device, dtype
        self._scorer.load()

    def unload(self) -> None:
        self._scorer.unload()

    def compare(self, samples: Sequence[Sample], pairs: Sequence[Pair]) -> tuple[list[_Lead], dict[str, Tensor]]:
        """Leads of the pairs, and the scores [N] behind them."""
        try:
            scores, _ = self._scorer.run(samples, {})
        except RewardError as error:  # it forgives samples, so this is a bug or no memory: nothing to go on with
            raise RewardContractError(str(error)) from error
        failed = any(entry.get("failed") for entry in scores.info)  # it has waited for a server, and told why: enough
        if scores.value.isnan().all() and not failed:
            self._scorer.warm(samples)  # raises what the judge raised, if it did: then it is broken, not unlucky
        return [self._lead(pair, scores) for pair in pairs], {"score": scores.value}

    @staticmethod
    def _lead(pair: Pair, scores: Scores) -> _Lead:
        (a, b), told = scores.value[list(pair)].tolist(), [scores.info[row] for row in pair]
        reason = told[0 if math.isnan(a) else 1].get("error", "")
        return _Lead(a - b, f"no score: {reason}", failed=any(entry.get("failed") for entry in told))


class _PreferenceJudge:
    """A judge of pairs, who sees both samples at once."""

    most = 0.5

    def __init__(self, judge: PairJudge, name: str, both_orders: bool) -> None:
        self.judge, self._name, self.shows_both = judge, name, both_orders

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        if hasattr(self.judge, "load"):
            self.judge.load(device, dtype)

    def unload(self) -> None:
        if hasattr(self.judge, "unload"):
            self.judge.unload()

    def compare(self, samples: Sequence[Sample], pairs: Sequence[Pair]) -> tuple[list[_Lead], dict[str, Tensor]]:
        """Leads of the pairs."""
        shown = [(samples[i], samples[j]) for i, j in pairs]
        answers = self._ask([*shown, *((b, a) for a, b in shown)] if self.shows_both else shown)
        leads = [self._lead(answers[k :: len(pairs)]) for k in range(len(pairs))]
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures and all(math.isnan(lead.value) for lead in leads):
            raise failures[-1]  # the judge is broken; `on_error` and the warm-up decide what follows
        return leads, {}

    def _lead(self, answers: Sequence[float | Exception]) -> _Lead:
        """The lead from one answer, or from those to both orders; both must be there, else one side is favoured."""
        chances = [answer for answer in answers if not isinstance(answer, Exception)]
        if len(chances) < len(answers):
            failure = next(answer for answer in answers if isinstance(answer, Exception))
            return _Lead(math.nan, f"{type(failure).__name__}: {failure}")
        value = chances[0] - 0.5 if len(chances) == 1 else (chances[0] - chances[1]) / 2
        flipped = len(chances) == 2 and (chances[0] - 0.5) * (chances[1] - 0.5) > 0
        return _Lead(value, "the judge returned NaN, None or an infinity", flipped)

    def _ask(self, shown: list[tuple[Sample, Sample]]) -> Sequence[float | Exception]:
        """The judge's answers in order, all at once where it can do that; for a pair that fails what was raised."""
        batch = getattr(self.judge, "prefers_batch", None)
        if batch is not None and shown:
            try:
                return self._chances(batch(shown), len(shown), "prefers_batch")
            except BUGS:
                raise
            except Exception as error:
                warnings.warn(
                    f"pairs: judge {self._name!r} fails on {len(shown)} pairs at once "
                    f"({type(error).__name__}: {error}); it is asked pair by pair, which is slow. Mend its "
                    "prefers_batch, or give the reward a smaller `batch_size` (samples at a time, in whole groups)",
                    stacklevel=2,
                )
        return [self._ask_one(first, second) for first, second in shown]

    def _ask_one(self, first: Sample, second: Sample) -> float | Exception:
        try:
            return self._chances([self.judge.prefers(first, second)], 1, "prefers")[0]
        except (*BUGS, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return error

    def _chances(self, returned: Any, count: int, method: str) -> list[float]:
        """What the judge returned as `count` probabilities; NaN = no verdict."""
        where = f"pairs: judge {self._name!r}: {method}"
        if isinstance(returned, Sized) and len(returned) != count:
            raise RewardContractError(
                f"{where} returned {len(returned)} answers for {count} pairs. "
                "Mend: return one for each pair, in their order; NaN or None for a pair without a verdict."
            )
        chances: list[float] = as_scores(returned, count, f"{self._name}.{method}").value.tolist()
        outside = [chance for chance in chances if chance < 0 or chance > 1]
        if outside:
            raise RewardContractError(
                f"{where} returned {outside[0]:g}; expected the probability that the first is better, from 0 to 1. "
                "Mend: squash a difference of scores with a sigmoid, or name a reward as the judge."
            )
        return chances


def _read_judge(judge: Any, options: Mapping[str, Any], both_orders: bool) -> _ScoreJudge | _PreferenceJudge:
    """A judge of either kind from a name, class, function or object; one with `prefers` judges pairs."""
    name = judge if isinstance(judge, str) else label(judge)
    try:
        target = resolve(judge) if isinstance(judge, str) else judge
        if callable(getattr(target, "prefers", None)):
            return _PreferenceJudge(_pair_judge(target, options), name, both_orders)
        return _ScoreJudge(build(target, options), name)
    except RewardError as error:
        raise type(error)(f"pairs: judge {name!r} (a reward, or what has prefers(first, second)): {error}") from error


def _pair_judge(target: Any, options: Mapping[str, Any]) -> PairJudge:
    """An object with `prefers` as it is, or a class constructed with its options, which are checked by name."""
    if not inspect.isclass(target):
        if options:
            raise RewardError(f"it is an object already; give its constructor the options {', '.join(options)}")
        return target
    signature = inspect.signature(target)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        check_options(target.__name__, options, list(signature.parameters))
    try:
        signature.bind(**options)
    except TypeError as error:
        raise RewardError(f"{error}; give it in judge_options") from error
    made: Any = target(**options)
    return made


def _checked_margin(margin: Any, most: float) -> float:
    """A margin that leaves room for a win."""
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < most:
        room = f"below {most:g}: a probability is at most that far from 1/2" if most < math.inf else "finite"
        raise RewardError(f"pairs: margin is {margin!r}; expected a number of at least 0 and {room}")
    return float(margin)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ results


def _win_rates(
    pairs: Sequence[Pair], leads: Sequence[float], count: int, margin: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Win rates [count] from the pairs' leads, NaN where none is judged, and the counts [count] behind them."""
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    lead = torch.tensor(leads, dtype=torch.float64)

    def tally(of_first: Tensor, of_second: Tensor) -> Tensor:
        """In how many pairs each sample is the first of one kind, or the second of the other."""
        return torch.bincount(torch.cat([first[of_first], second[of_second]]), minlength=count).float()

    ahead, behind, level, unjudged = lead > margin, lead < -margin, lead.abs() <= margin, lead.isnan()
    counts = {"wins": tally(ahead, behind), "ties": tally(level, level), "losses": tally(behind, ahead)}
    judged = counts["wins"] + counts["ties"] + counts["losses"]
    value = (counts["wins"] + counts["ties"] / 2) / judged  # 0 / 0 is NaN
    counts["unjudged"] = tally(unjudged, unjudged)
    return value, {key: part.where(judged > 0, math.nan) for key, part in counts.items()}


def _result(lead: float, margin: float) -> float:
    """1 = the first won, 0 = the second, 1/2 = a tie; NaN = no verdict."""
    return math.nan if math.isnan(lead) else 0.5 if abs(lead) <= margin else float(lead > 0)


def _expected(pairs: Sequence[Pair], won: Sequence[float], groups: Iterable[Sequence[int]], win_rate: Tensor) -> Tensor:
    """Bradley-Terry's expected wins [N] within each group; NaN where a sample has no judged pair."""
    value = torch.full_like(win_rate, math.nan)
    judged = {pair: result for pair, result in zip(pairs, won, strict=True) if not math.isnan(result)}
    for rows in groups:
        ranked = [row for row in rows if not win_rate[row].isnan()]
        index = {row: i for i, row in enumerate(ranked)}
        own = {(index[i], index[j]): result for (i, j), result in judged.items() if i in index and j in index}
        if own:
            strength = bradley_terry(list(own), list(own.values()), len(ranked))
            value[ranked] = expected_wins(strength).to(value.dtype)
    return value


def _flips(pairs: Sequence[Pair], leads: Sequence[_Lead], like: Tensor) -> Tensor:
    """In how many of its pairs [N] the winner depended on the order; NaN where `like` is."""
    flipped = torch.tensor([pair for pair, lead in zip(pairs, leads, strict=True) if lead.flipped], dtype=torch.long)
    return torch.bincount(flipped.flatten(), minlength=len(like)).float().where(~like.isnan(), math.nan)


def _info(
    pairs: Sequence[Pair], leads: Sequence[_Lead], place: Mapping[int, int], value: Tensor
) -> list[dict[str, Any]]:
    """Per sample the pairs without a verdict, and `error` where there was no other: `failed` if none was to be had."""
    unjudged: list[list[dict[str, Any]]] = [[] for _ in value]
    failed: set[int] = set()
    for (i, j), lead in zip(pairs, leads, strict=True):
        if math.isnan(lead.value):
            failed |= {i, j} if lead.failed else set()
            unjudged[i].append({"against": place[j], "error": lead.reason})
            unjudged[j].append({"against": place[i], "error": lead.reason})
    info: list[dict[str, Any]] = [{"unjudged": missed} if missed else {} for missed in unjudged]
    for row in value.isnan().nonzero().flatten().tolist():
        missed = unjudged[row]
        reason = f"none of its {len(missed)} pairs has a verdict; the first: {missed[0]['error']}" if missed else ""
        info[row]["error"] = reason or "its group has no other sample to compare it with"
        info[row] |= {"failed": True} if row in failed else {}
    return info
