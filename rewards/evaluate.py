"""Which reward to trust: rewards and judges of pairs measured against what people preferred.

    report = evaluate(["shapes", {"use": "ocr", "mode": "contain"}], "pairs.jsonl")
    print(report.to_markdown())

An item is scored once, however many pairs it is in. What the columns mean:

    accuracy        pairs without a tied label that the scores put in the right order; equal scores count 1/2
    ties_half       PickScore's rule: of a, b and tie, the same 1, a one-sided tie 1/2; the threshold is fitted
    ties_exact      Ties Matter (arXiv:2305.14324): the same 1, anything else 0; the threshold is fitted
    ties_exact_max  the same with the best threshold for the very pairs it is measured on: how the benchmarks do it
    brier, nll, ece of sigmoid(delta / T) against the share of people that preferred a; T is fitted
    rank_score, spearman, kendall   per prompt, where the data has rankings, and their mean
    leaderboard     win rates of the generators by people and by the reward, and how they correlate
    order_flips     share of the pairs on which a judge prefers another one when the sides are swapped
    repeats         share of the pairs on which it says the same when asked again

What is fitted is fitted on a share `dev` of the prompts, and measured on the others. Intervals are 95 % bootstraps by
prompt: with fewer than about ten prompts they are too narrow. A pair of which either item has no verdict is out, and
counted in `nan_frac`. Data with several dims (VQ, MQ, TA, Overall) is summed up by its "Overall" where it has that; a
dim that the reward reports as a part is judged by that part.

Note: PickScore's threshold is on |p(a) - p(b)| = |2 sigmoid(delta) - 1| with eleven values to choose from; here it is
on |delta|, which has the same order, with every value that occurs.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards import statistics as st
from rewards.contract import as_scores
from rewards.entries import KEYS, place, read_entries
from rewards.functions import check_options, label
from rewards.preferences import Item, Preference, Preferences, Ranking, read_preferences
from rewards.resolve import resolve
from rewards.scorer import BUGS, Scorer
from rewards.types import RewardContractError, RewardError, Sample, traits_of

__all__ = ["Estimate", "Leaderboard", "Report", "Result", "evaluate"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""(reward, done, of how many)"""

_BUDGET = 2**30  # bytes of media in one batch: a handful of long videos is as much as hundreds of images
_SHOWN_ERRORS = 3
_REPEATED = 100  # pairs that a judge is asked about once more
_COMBINING = ("weight", "norm", "gate", "min_std", "offload", "cache")  # keys of an entry that say nothing here
_SUMMARY = "Overall"


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval; all NaN where there was nothing to measure."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    """Of how many pairs or prompts."""
    prompts: int = 0
    """From how many prompts they are: the interval is by prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """Win rates of generators over the same pairs, ties counting 1/2: by people and by the reward."""

    people: Mapping[str, float]
    reward: Mapping[str, float]
    spearman: float
    kendall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured of one reward or judge; NaN = not measured. `rewards.evaluate` says what the words mean."""

    name: str
    kind: str
    """`"reward"`, or `"judge"` for what compares pairs."""
    pairs: int
    """With a verdict, of those that are summed up."""
    nan_frac: float
    score_ties: float
    """Share of the pairs without a tied label whose scores are equal; benchmarks that call them wrong give half less.

    `accuracy - score_ties / 2` is the accuracy by that rule.
    """
    accuracy: Estimate
    ties_half: Estimate
    ties_half_threshold: float
    ties_exact: Estimate
    ties_exact_threshold: float
    ties_exact_max: float
    temperature: float
    """inf where the scores point the wrong way, or nowhere."""
    brier: float
    nll: float
    ece: float
    rank_score: Estimate = Estimate()
    spearman: Estimate = Estimate()
    kendall: Estimate = Estimate()
    leaderboard: Leaderboard | None = None
    order_flips: float = math.nan
    repeats: float = math.nan
    slices: Mapping[str, Estimate] = field(default_factory=dict)
    """{"category=...", "dim=...": accuracy of it}"""
    parts: Mapping[str, str] = field(default_factory=dict)
    """{dim: the reward's part that it was judged by}"""
    seconds: float = math.nan
    """Per item (of a judge: per question), loading of weights and media excluded."""
    load_seconds: float = math.nan
    memory_gb: float = math.nan
    """Peak on the GPU; on the CPU by how much the peak of the process grew, so that a smaller one after it shows 0."""
    errors: tuple[str, ...] = ()
    """Some of the reasons for missing verdicts."""
    deltas: tuple[float, ...] = field(default=(), repr=False)
    """score(a) - score(b) of every pair of the data, in its order; NaN = no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `evaluate` found."""

    data: str
    format: str
    pairs: int
    tied_labels: int
    prompts: int
    skipped: Mapping[str, int]
    seed: int
    dev: float
    results: tuple[Result, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row per reward: name, then numbers; None = not measured."""
        return [_row(result) for result in self.results]

    def to_json(self) -> str:
        """All of it but the deltas; null = not measured, or infinite."""
        data = asdict(self)
        for result in data["results"]:
            del result["deltas"]
        return json.dumps(_plain(data), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Tables for people: the rewards, the slices, the leaderboards, and why verdicts are missing."""
        return "\n".join(_markdown(self)) + "\n"


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    entries: Any,
    data: Preferences | str | Path,
    *,
    device: str | torch.device = "auto",
    batch_size: int = 16,
    seed: int = 0,
    dev: float = 0.2,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> Report:
    """Score preference data with every reward, one after the other, and compare with what people preferred.

    entries     as in a config: names, `{use: ..., option: ...}`, functions, classes, objects; weights, norms and gates
                do not matter. What has `prefers(first, second)` is a judge of pairs, and is asked in both orders
    data        what `read_preferences` gives, or the path that it is to read
    batch_size  media in memory at a time (fewer if they are more than 1 GiB)
    dev         share of the prompts that thresholds and the temperature are fitted on

    RewardError as the hub raises it; a sample or file that fails has no verdict, and its reason is in `errors`.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RewardError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
    if not 0 <= dev < 1:
        raise RewardError(f"dev is {dev!r}; expected the share of the prompts to fit on, from 0 to below 1")
    told = data if isinstance(data, Preferences) else read_preferences(data)
    measured = [_measured(entry, place(device)) for entry in _listed(entries)]
    names = [each.name for each in measured]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"two rewards are called {name!r}; tell them apart with `name:`")
    counting = _counting(told.pairs)
    results = []
    for each in measured:
        said = each.run(told, batch_size, progress)
        results.append(_result(each, told, counting, said, seed=seed, dev=dev, resamples=resamples))
    return Report(
        data=told.name, format=told.format, pairs=len(told.pairs), skipped=told.skipped, seed=seed, dev=dev,
        tied_labels=sum(pair.label == 0 for pair in told.pairs), prompts=len({pair.prompt for pair in told.pairs}),
        results=tuple(results),
    )  # fmt: skip


@dataclass(kw_only=True)
class _Verdicts:
    """What a reward or judge said: a delta for every pair, and what else there is to know."""

    deltas: st.Array
    scores: Callable[[Item, str | None], float] | None = None
    """Of an item, on a dim; judges have none."""
    parts: Mapping[str, str] = field(default_factory=dict)
    order_flips: float = math.nan
    repeats: float = math.nan
    seconds: float = math.nan
    load_seconds: float = math.nan
    memory_gb: float = math.nan
    errors: tuple[str, ...] = ()


def _result(
    who: _Reward | _Judge, data: Preferences, counting: NDArray[np.bool_], said: _Verdicts, *,
    seed: int, dev: float, resamples: int,
) -> Result:  # fmt: skip
    """All that is measured, from what was said."""

    def estimate(values: st.Array, clusters: Sequence[Hashable]) -> Estimate:
        known = ~np.isnan(values)
        low, high = st.interval(values, clusters, seed=seed, resamples=resamples)
        prompts = len({cluster for cluster, there in zip(clusters, known, strict=True) if there})
        return Estimate(value=st.mean(values), low=low, high=high, count=int(known.sum()), prompts=prompts)

    labels = np.array([pair.label for pair in data.pairs], np.float64)
    prompts = [pair.prompt for pair in data.pairs]
    credit = np.where(np.isnan(said.deltas), math.nan, st.order_credit(said.deltas, labels))
    judged = counting & ~np.isnan(said.deltas)
    untied = judged & (labels != 0)
    fitting = st.split(prompts, dev, seed)
    fit, test = judged & fitting, judged & ~fitting
    fitted = _with_ties(said.deltas, labels, fit, test, lambda values: estimate(values, _chosen(prompts, test)))
    target = np.array([pair.p_a for pair in data.pairs])
    rows = [row for row in data.rankings if row.dim in (None, _SUMMARY) or counting.all()]
    return Result(
        name=who.name, kind=who.kind, pairs=int(judged.sum()),
        nan_frac=float(np.isnan(said.deltas[counting]).mean()),
        score_ties=st.mean((said.deltas[untied] == 0).astype(np.float64)),
        accuracy=estimate(credit[counting], _chosen(prompts, counting)),
        **fitted, **_calibration(said.deltas, target, fit, test),
        ties_exact_max=_best_exact(said.deltas[judged], labels[judged]),
        **({} if said.scores is None else _rankings(rows, said.scores, estimate)),
        leaderboard=_leaderboard(_chosen(data.pairs, judged), said.deltas[judged]),
        order_flips=said.order_flips, repeats=said.repeats,
        slices={key: estimate(credit[at], _chosen(prompts, at)) for key, at in _slices(data.pairs).items()},
        parts=said.parts, seconds=said.seconds, load_seconds=said.load_seconds, memory_gb=said.memory_gb,
        errors=said.errors, deltas=tuple(said.deltas.tolist()),
    )  # fmt: skip


def _counting(pairs: Sequence[Preference]) -> NDArray[np.bool_]:
    """The pairs that are summed up: those of the dim Overall and of none, or all where that would be none."""
    chosen = np.array([pair.dim in (None, _SUMMARY) for pair in pairs], bool)
    return chosen if chosen.any() else np.ones(len(pairs), bool)


def _slices(pairs: Sequence[Preference]) -> dict[str, NDArray[np.bool_]]:
    """{"category=...", "dim=...": which pairs}, in the order of the data."""
    rows: dict[str, list[int]] = defaultdict(list)
    for key in ("category", "dim"):
        for row, pair in enumerate(pairs):
            value = getattr(pair, key)
            if value is not None:
                rows[f"{key}={value}"].append(row)
    return {key: np.isin(np.arange(len(pairs)), at) for key, at in rows.items()}


def _with_ties(
    deltas: st.Array, labels: st.Array, fit: NDArray[np.bool_], test: NDArray[np.bool_],
    estimate: Callable[[st.Array], Estimate],
) -> dict[str, Any]:  # fmt: skip
    """Both accuracies with ties, their thresholds fitted on some pairs and used on the others."""
    found: dict[str, Any] = {}
    for key, credit in (("ties_half", st.half_credit), ("ties_exact", st.exact_credit)):
        fitted = st.fit_threshold(deltas[fit], labels[fit], credit) if fit.any() and test.any() else math.nan
        found[f"{key}_threshold"] = fitted
        earned = credit(deltas[test], labels[test], fitted)
        found[key] = Estimate() if math.isnan(fitted) else estimate(earned)
    return found


def _best_exact(deltas: st.Array, labels: st.Array) -> float:
    best = st.fit_threshold(deltas, labels, st.exact_credit)
    return st.mean(st.exact_credit(deltas, labels, best))


def _calibration(deltas: st.Array, target: st.Array, fit: NDArray[np.bool_], test: NDArray[np.bool_]) -> dict[str, Any]:
    if not (fit.any() and test.any()):
        return dict.fromkeys(("temperature", "brier", "nll", "ece"), math.nan)
    temperature = st.fit_temperature(deltas[fit], target[fit])
    chance, actual = st.sigmoid(deltas[test] / temperature), target[test]
    return {
        "temperature": temperature,
        "brier": st.brier(chance, actual),
        "nll": st.nll(chance, actual),
        "ece": st.ece(chance, actual),
    }


def _rankings(
    rankings: Sequence[Ranking],
    score: Callable[[Item, str | None], float],
    estimate: Callable[[st.Array, Sequence[Hashable]], Estimate],
) -> dict[str, Any]:
    """Agreement with each ranking all of whose items have a score, and the means."""
    rows = [[score(item, ranking.dim) for item in ranking.items] for ranking in rankings]
    whole = [(r, scores) for r, scores in zip(rankings, rows, strict=True) if not any(map(math.isnan, scores))]
    prompts = [ranking.items[0].prompt for ranking, _ in whole]

    def mean_of(agreement: Callable[[Sequence[float], Sequence[float]], float]) -> Estimate:
        return estimate(np.array([agreement(scores, ranking.rank) for ranking, scores in whole]), prompts)

    return {
        "rank_score": mean_of(st.rank_score),
        "spearman": mean_of(lambda scores, rank: st.spearman(scores, [-r for r in rank])),
        "kendall": mean_of(lambda scores, rank: st.kendall(scores, [-r for r in rank])),
    }


def _leaderboard(pairs: Sequence[Preference], deltas: st.Array) -> Leaderboard | None:
    """Win rates of the generators over pairs of different ones; None with fewer than three, which cannot correlate."""
    people: dict[str, list[float]] = defaultdict(list)
    reward: dict[str, list[float]] = defaultdict(list)
    for pair, delta in zip(pairs, deltas.tolist(), strict=True):
        if pair.a.model is None or pair.b.model is None or pair.a.model == pair.b.model:
            continue
        won = ((delta > 0) - (delta < 0) + 1) / 2
        for model, preferred, scored in ((pair.a.model, pair.p_a, won), (pair.b.model, 1 - pair.p_a, 1 - won)):
            people[model].append(preferred)
            reward[model].append(scored)
    if len(people) < 3:
        return None
    by_people = {model: float(np.mean(people[model])) for model in sorted(people)}
    by_reward = {model: float(np.mean(reward[model])) for model in sorted(people)}
    columns = list(by_people.values()), list(by_reward.values())
    return Leaderboard(people=by_people, reward=by_reward, spearman=st.spearman(*columns), kendall=st.kendall(*columns))


T = TypeVar("T")


def _chosen(rows: Sequence[T], at: NDArray[np.bool_]) -> list[T]:
    return [row for row, taken in zip(rows, at.tolist(), strict=True) if taken]


# ------------------------------------------------------------------------------------------------ asking


def _listed(entries: Any) -> list[dict[str, Any]]:
    """The entries of a config as dicts with `use`, without what is about combining scores."""
    if isinstance(entries, Mapping) and "use" not in entries:
        entries = list(entries)  # {name: weight}
    listed = list(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries]
    if not listed:
        raise RewardError("no reward is given; `flowrl reward list` shows what there is")
    given = [dict(entry) if isinstance(entry, Mapping) else {"use": entry} for entry in listed]
    return [{key: value for key, value in entry.items() if key not in _COMBINING} for entry in given]


def _measured(entry: Mapping[str, Any], device: torch.device) -> _Reward | _Judge:
    """What an entry stands for; nothing is loaded yet."""
    use = entry.get("use")
    target = resolve(use) if isinstance(use, str) else use
    if callable(getattr(target, "prefers", None)):
        judge = _Judge.read(entry, target, device)
        if judge.compares:
            return judge
    ((scorer, _),) = read_entries([entry], device)
    if scorer.traits.scope == "group":
        raise RewardError(
            f"reward {scorer.name!r} compares the samples of a group, so it has no score for one item; evaluate "
            "its judge, or the rewards that it is made of"
        )
    return _Reward(scorer)


class _Clock:
    """Time and memory of one reward."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds, self.count, self.load_seconds = device, 0.0, 0, 0.0
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # before it there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(device)
        self._before = _peak_gb(device)

    def figures(self) -> dict[str, Any]:
        """The fields of a result that they are."""
        before = 0.0 if self._device.type == "cuda" else self._before
        return {
            "seconds": self.seconds / self.count if self.count else math.nan,
            "load_seconds": self.load_seconds,
            "memory_gb": _peak_gb(self._device) - before,
        }


def _peak_gb(device: torch.device) -> float:
    """Most memory used so far, of a GPU's tensors or of the process; NaN where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


class _Reward:
    """A reward, which scores items."""

    kind = "reward"

    def __init__(self, scorer: Scorer) -> None:
        self.name, self._scorer = scorer.name, scorer

    def run(self, data: Preferences, batch_size: int, progress: Progress | None) -> _Verdicts:
        """Score every item once."""
        items = {item.key: item for pair in data.pairs for item in (pair.a, pair.b)}
        scores: dict[str | None, dict[str, float]] = {None: {}}  # by part; None is the score itself
        clock, errors, done = _Clock(self._scorer.device), dict[str, None](), 0
        try:
            start = time.perf_counter()
            self._scorer.load()
            clock.load_seconds = time.perf_counter() - start
            for keys, samples, failed in _batches(list(items.items()), batch_size):
                errors.update(dict.fromkeys(failed))
                said, seconds = self._scorer.run(samples, {})
                clock.seconds, clock.count = clock.seconds + seconds, clock.count + len(samples)
                errors.update(dict.fromkeys(entry["error"] for entry in said.info if "error" in entry))
                said_by: list[tuple[str | None, Tensor]] = [(None, said.value), *said.parts.items()]
                for part, values in said_by:
                    scores.setdefault(part, {}).update(zip(keys, values.tolist(), strict=True))
                done += len(samples) + len(failed)
                if progress is not None:
                    progress(self.name, done, len(items))
        finally:
            self._scorer.unload()

        def score(item: Item, dim: str | None) -> float:
            return scores.get(dim, scores[None]).get(item.key, math.nan)

        dims = {pair.dim for pair in data.pairs} & set(scores)
        return _Verdicts(
            deltas=np.array([score(p.a, p.dim) - score(p.b, p.dim) for p in data.pairs], np.float64),
            scores=score, parts={dim: dim for dim in sorted(d for d in dims if d is not None)},
            errors=tuple(errors)[:_SHOWN_ERRORS], **clock.figures(),
        )  # fmt: skip


def _batches(items: Sequence[tuple[str, Item]], size: int) -> Iterator[tuple[list[str], list[Sample], list[str]]]:
    """(keys, samples, why some could not be read) in batches of at most `size` items and about _BUDGET bytes."""
    keys, samples, failed, held = list[str](), list[Sample](), list[str](), 0
    for key, item in items:
        try:
            sample = item.sample()
        except RewardError as error:
            failed.append(str(error))
            continue
        keys.append(key)
        samples.append(sample)
        held += sample.media.numel() * sample.media.element_size()
        if len(samples) == size or held >= _BUDGET:
            yield keys, samples, failed
            keys, samples, failed, held = [], [], [], 0
    if samples or failed:
        yield keys, samples, failed


class _Judge:
    """A judge of pairs, who is shown each in both orders."""

    kind = "judge"

    def __init__(self, judge: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self._judge, self._device, self._dtype = name, judge, device, dtype
        self._errors: dict[str, None] = {}

    @classmethod
    def read(cls, entry: Mapping[str, Any], target: Any, device: torch.device) -> _Judge:
        """From a config entry, whose other keys are options of a class."""
        options = {key: value for key, value in entry.items() if key not in KEYS}
        use = entry["use"]
        name = entry.get("name") or (use if isinstance(use, str) else label(use))
        if inspect.isclass(target):
            signature = inspect.signature(target)
            if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
                check_options(name, options, list(signature.parameters))
            try:
                signature.bind(**options)
            except TypeError as error:
                raise RewardError(f"judge {name!r}: {error}; give it beside `use`") from error
            target = target(**options)
        elif options:
            raise RewardError(f"judge {name!r} is an object already; give its constructor {', '.join(options)}")
        dtype = getattr(torch, str(entry.get("dtype", "float32")).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise RewardError(f"judge {name!r}: dtype is {entry['dtype']!r}; expected float32, bfloat16 or float16")
        return cls(target, name, place(entry.get("device") or traits_of(target).device or device), dtype)

    @property
    def compares(self) -> bool:
        """Whether it looks at pairs; one that scores too says by `compares` which of the two it does as it was made."""
        return getattr(self._judge, "compares", True)

    def run(self, data: Preferences, batch_size: int, progress: Progress | None) -> _Verdicts:
        """Ask about every pair in both orders, and about the first ones once more."""
        clock = _Clock(self._device)
        first, second = (np.full(len(data.pairs), math.nan) for _ in range(2))
        again = np.full(min(_REPEATED, len(data.pairs)), math.nan)
        try:
            start = time.perf_counter()
            if hasattr(self._judge, "load"):
                self._judge.load(self._device, self._dtype)
            clock.load_seconds = time.perf_counter() - start
            for start_row in range(0, len(data.pairs), max(1, batch_size // 2)):
                rows, shown = self._shown(data.pairs, range(start_row, start_row + max(1, batch_size // 2)))
                first[rows] = self._ask(shown, clock)
                second[rows] = self._ask([(b, a) for a, b in shown], clock)
                repeated = [(row, pair) for row, pair in zip(rows, shown, strict=True) if row < len(again)]
                again[[row for row, _ in repeated]] = self._ask([pair for _, pair in repeated], clock)
                if progress is not None:
                    progress(self.name, min(len(data.pairs), start_row + len(rows)), len(data.pairs))
        finally:
            if hasattr(self._judge, "unload"):
                self._judge.unload()
        return _Verdicts(
            deltas=(first - second) / 2,
            order_flips=_share((first - 0.5) * (0.5 - second) < 0, first + second),
            repeats=_share(np.sign(again - 0.5) == np.sign(first[: len(again)] - 0.5), again + first[: len(again)]),
            errors=tuple(self._errors)[:_SHOWN_ERRORS], **clock.figures(),
        )  # fmt: skip

    def _shown(self, pairs: Sequence[Preference], rows: range) -> tuple[list[int], list[tuple[Sample, Sample]]]:
        """The pairs of some rows, read; what cannot be read is left out."""
        found: dict[int, tuple[Sample, Sample]] = {}
        for row in rows[: max(0, len(pairs) - rows.start)]:
            try:
                found[row] = self._placed(pairs[row].a), self._placed(pairs[row].b)
            except RewardContractError:
                raise
            except RewardError as error:
                self._errors[str(error)] = None
        return list(found), list(found.values())

    def _placed(self, item: Item) -> Sample:
        sample = item.sample()
        if sample.kind not in traits_of(self._judge).media:
            raise RewardContractError(f"judge {self.name!r} does not judge {sample.kind}s, which this data has")
        return replace(sample, media=sample.media.to(self._device))

    @torch.no_grad()
    def _ask(self, shown: Sequence[tuple[Sample, Sample]], clock: _Clock) -> st.Array:
        """The probabilities that the first is better; NaN = no verdict."""
        if not shown:
            return np.zeros(0)
        start = time.perf_counter()
        batch = getattr(self._judge, "prefers_batch", None)
        answers: Any = None
        if batch is not None:
            try:
                answers = batch(list(shown))
            except BUGS:
                raise
            except Exception as error:  # asked one by one, only what really fails is lost
                self._errors[f"{type(error).__name__}: {error}"] = None
        if answers is None:
            answers = [self._ask_one(*pair) for pair in shown]
        clock.seconds, clock.count = clock.seconds + time.perf_counter() - start, clock.count + len(shown)
        chances: st.Array = as_scores(answers, len(shown), self.name).value.double().numpy()
        outside = chances[(chances < 0) | (chances > 1)]
        if len(outside):
            raise RewardContractError(
                f"judge {self.name!r} answered {outside[0]:g}; expected the probability that the first is better"
            )
        return chances

    def _ask_one(self, first: Sample, second: Sample) -> float | None:
        try:
            answer: float | None = self._judge.prefers(first, second)
            return answer
        except BUGS:
            raise
        except Exception as error:
            self._errors[f"{type(error).__name__}: {error}"] = None
            return None


def _share(true: NDArray[np.bool_], known: st.Array) -> float:
    """Share of the rows that are known (not NaN)."""
    return st.mean(np.where(np.isnan(known), math.nan, true))


# ------------------------------------------------------------------------------------------------ words


_COLUMNS = {
    "accuracy": "accuracy", "ties_half": "ties ½", "ties_exact": "ties exact", "ties_exact_max": "ties exact, max τ",
    "brier": "Brier", "nll": "NLL", "ece": "ECE", "rank_score": "rank score", "spearman": "Spearman",
    "kendall": "Kendall", "order_flips": "order flips", "repeats": "repeats", "nan_frac": "no verdict",
}  # fmt: skip


def _row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"reward": result.name, "kind": result.kind, "pairs": result.pairs}
    for key in _COLUMNS:
        value = getattr(result, key)
        row[key] = value.value if isinstance(value, Estimate) else value
        if isinstance(value, Estimate):
            row[f"{key}_low"], row[f"{key}_high"] = value.low, value.high
    row |= {key: getattr(result, key) for key in ("score_ties", "seconds", "load_seconds", "memory_gb")}
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """What JSON can hold: None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: Report) -> Iterator[str]:
    yield f"# {_cell(report.data)}"
    yield ""
    left = "".join(f", {count} left out ({_cell(why)})" for why, count in report.skipped.items())
    yield f"{report.pairs} pairs, {report.tied_labels} of them ties, {report.prompts} prompts{left}."
    yield f"Fitted on {report.dev:.0%} of the prompts, 95 % intervals by prompt, seed {report.seed}."
    yield ""
    columns = {key: head for key, head in _COLUMNS.items() if any(row[key] is not None for row in report.table())}
    heads = ["reward", "pairs", *columns.values(), "ms an item", "GB"]
    lines = [
        [result.name, str(result.pairs), *(_figure(getattr(result, key)) for key in columns),
         f"{1000 * result.seconds:.3g}", f"{result.memory_gb:.3g}"]
        for result in report.results
    ]  # fmt: skip
    yield from _table(heads, lines)
    keys = list(dict.fromkeys(key for result in report.results for key in result.slices))
    if keys:
        yield from ("", "## Accuracy by slice (pairs)", "")
        lines = [[key, *(_slice(result.slices.get(key)) for result in report.results)] for key in keys]
        yield from _table(["slice", *(result.name for result in report.results)], lines)
    boards = [result for result in report.results if result.leaderboard is not None]
    if boards:
        yield from ("", "## Win rates of the generators", "")
        yield from _boards(boards)
    for result in report.results:
        for error in result.errors:
            yield from ("", f"No verdict by {_cell(result.name)}: {_cell(error)}")


def _boards(results: Sequence[Result]) -> Iterator[str]:
    boards = {result.name: result.leaderboard for result in results if result.leaderboard is not None}
    models = sorted({model for board in boards.values() for model in board.people})
    people = next(iter(boards.values())).people
    lines = [
        [
            model,
            _figure(people.get(model, math.nan)),
            *(_figure(b.reward.get(model, math.nan)) for b in boards.values()),
        ]
        for model in models
    ]
    lines.append(["Spearman", "", *(_figure(board.spearman) for board in boards.values())])
    lines.append(["Kendall", "", *(_figure(board.kendall) for board in boards.values())])
    yield from _table(["generator", "people", *boards], lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_cell, heads))} |"
    yield "|---" * len(heads) + "|"
    for line in lines:
        yield f"| {' | '.join(map(_cell, line))} |"


def _figure(value: Estimate | float) -> str:
    if not isinstance(value, Estimate):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    if math.isnan(value.value):
        return "–"
    return f"{value.value:.3f}" + ("" if math.isnan(value.low) else f" [{value.low:.3f}, {value.high:.3f}]")


def _slice(value: Estimate | None) -> str:
    return "–" if value is None or not value.count else f"{_figure(value)} ({value.count})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
