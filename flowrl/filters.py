"""Which samples and groups of an iteration are trained on, judged by their rewards; for pictures and texts alike.

    filters = build([{"use": "informative"}, {"use": "band", "low": 0.1, "high": 0.9}])
    kept = filters.keep(rewards, group, facts, key=stable_seed(seed, iteration))
    rows = torch.repeat_interleave(torch.arange(len(batch.rows)), times(batch, kept.counts))

A filter is a function `(rewards, group, [facts], [key], options) -> keep`: rewards float64 [B] of the samples of all
processes (NaN = no verdict), their groups int [B], facts {name: float64 [B]}, a number that keys what is drawn at
random. It returns which samples stay, bool [B], or how often each is trained on, int [B]. It must be a pure function of
its arguments, since every process asks it for itself. Ties fall to the earlier sample, or to the group of lower number.

Symbols: B samples, G groups, K samples of a group, R rows of this process.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.algorithms.advantages import group_advantages
from flowrl.resolve import ResolveError, nearest, resolve
from flowrl.types import AnyBatch, TokenBatch
from flowrl.user_code import told
from samplers import best_and_worst, stable_seed

Facts = Mapping[str, Tensor]
"""What else is known of every sample by its name, each float64 [B]: tokens, truncated, the score of a reward, ..."""

_FIRST_TWO = ["rewards", "group"]
_GIVEN = (*_FIRST_TWO, "facts", "key")
"""What a filter is given; its other parameters are options of its config entry."""


class FilterError(ValueError):
    """A filter cannot be used; the message names its place in the config, what is wrong, and how to mend it."""


# ------------------------------------------------------------------------------------------------ whole groups


def informative(rewards: Tensor, group: Tensor) -> Tensor:
    """Groups whose rewards differ: the others have advantage 0 (dynamic sampling, DAPO, arXiv:2503.14476). bool [B].

    Groups differ where `flowrl.algorithms.advantages.group_advantages` calls them live, that is beyond rounding: in
    float32 the mean of equal numbers is not that number, and a test for a std of exactly 0 lets such groups through.
    """
    _, member = torch.unique(group, return_inverse=True)
    return group_advantages(rewards, group).live[member]


def band(
    rewards: Tensor, group: Tensor, facts: Facts, low: float = 0.01, high: float = 0.99, of: str = "reward"
) -> Tensor:
    """Groups with low < mean < high (online filtering of EasyR1, whose bounds are the defaults). bool [B].

    The mean, over the samples with a verdict, is that of the reward, or of the fact called `of`, such as the score of
    the one reward that tells right from wrong. Difficulty bands: Qwen3-VL takes 0 and 0.9; V-Triune takes prompts that
    are not always right, low = -1 and high = 1.
    """
    _check(low < high, f"low={low}, high={high}: low is less than high")
    values = rewards if of == "reward" else _fact(facts, of).where(rewards.isfinite(), torch.nan)
    return _of_groups(values, group, lambda r: low < _mean(r) < high)


def std_band(rewards: Tensor, group: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Groups with low < std < high, the std over the group's verdicts, divided by their number (ROLL). bool [B]."""
    _check(0 <= low < high, f"low={low}, high={high}: low is at least 0 and less than high")
    return _of_groups(rewards, group, lambda r: len(r) > 1 and low < _std(r) < high)


def top_std(rewards: Tensor, group: Tensor, share: float = 0.25) -> Tensor:
    """The share of the groups whose rewards have the largest std, at least one (StarPO-S, arXiv:2504.20073). bool [B].

    floor(share G) of the G groups with two verdicts or more.
    """
    _check(0 < share <= 1, f"share={share}: a share is in (0, 1]")
    spread = {name: _std(rewards[members]) for name, members in _groups(rewards, group) if len(members) > 1}
    widest = sorted(spread, key=lambda name: -spread[name])  # stable: of equal ones the lower number first
    return _in(group, widest[: max(1, _floor(share * len(spread)))])


# ------------------------------------------------------------------------------------------------ samples


def largest_advantage(rewards: Tensor, group: Tensor, prune: float = 0.5) -> Tensor:
    """The floor(K (1 - prune)) samples of each group with the largest |A|, at least one (CPPO, arXiv:2503.22342).

    K is the number of the group's verdicts; bool [B]. A is the reward minus the mean of its group: what a group's
    advantages are divided by does not change their order.
    """
    _check(0 <= prune < 1, f"prune={prune}: the share that goes is in [0, 1)")
    size = group_advantages(rewards, group, std="none").value.abs()
    keep = torch.zeros_like(group, dtype=torch.bool)
    for _, members in _groups(rewards, group):
        order = size[members].argsort(descending=True, stable=True)
        keep[members[order[: max(1, _floor(len(members) * (1 - prune)))]]] = True
    return keep


def best_worst(rewards: Tensor, group: Tensor, best: int, worst: int) -> Tensor:
    """The `best` highest and `worst` lowest rewards of each group (best-of-n of DanceGRPO, arXiv:2505.07818). bool [B].

    A group with fewer verdicts stays whole.
    """
    _check(min(best, worst) >= 0 < best + worst, f"best={best}, worst={worst}: none is negative, and one at least 1")
    return best_and_worst(rewards, group, best, worst)


def pf_ppo(
    rewards: Tensor, group: Tensor, key: int, how: Literal["pow", "max_min", "max_random"] = "pow", power: float = 2.0
) -> Tensor:
    """Samples drawn anew by what their reward says about itself (PF-PPO, arXiv:2409.06957): how often each, int64 [B].

    Of each group as many are drawn, with replacement, as it has verdicts, in proportion to

        pow           |r|^power
        max_min       1 for the best and the worst, 0 for the others
        max_random    0.4 for the best, 0.1 for the others

    and evenly where all of these are 0. Equal rewards have equal weights.

    Note: each group's draw is systematic (one random number places K equidistant marks), so that a sample of weight w
    comes floor(w K) or ceil(w K) times and w K times on average; drawn independently its number would vary more. The
    code of veRL draws over the whole batch, where max_min keeps the best and the worst of all prompts.
    """
    _check(how in ("pow", "max_min", "max_random"), f"how={how!r}: choose pow, max_min or max_random")
    _check(power > 0, f"power={power}: more than 0")
    counts = torch.zeros_like(group, dtype=torch.long)
    for name, members in _groups(rewards, group):
        r = rewards[members]
        if how == "pow":
            weight = r.abs() ** power
        elif how == "max_min":
            weight = ((r == r.max()) | (r == r.min())).double()
        else:
            weight = torch.where(r == r.max(), 0.4, 0.1).double()
        counts[members] = _systematic(weight, stable_seed(key, name))
    return counts


def not_truncated(rewards: Tensor, group: Tensor, facts: Facts) -> Tensor:
    """Answers that came to their own end (overlong filtering, DAPO, arXiv:2503.14476); fact `truncated`. bool [B].

    They stay in the statistics of their group.
    """
    return _fact(facts, "truncated") == 0


def within_turns(rewards: Tensor, group: Tensor, facts: Facts) -> Tensor:
    """Answers that did not ask for a tool in their last turn (over-turn masking, Mini-o3, arXiv:2509.07969). bool [B].

    Such an answer is unfinished, not wrong; it stays in the statistics of its group. Fact `over_turns`.
    """
    return _fact(facts, "over_turns") == 0


def short_enough(rewards: Tensor, group: Tensor, facts: Facts, most: int) -> Tensor:
    """Answers of at most `most` tokens (the length mask of ROLL); fact `tokens`. bool [B]."""
    _check(most >= 1, f"most={most}: at least 1 token")
    return _fact(facts, "tokens") <= most


# ------------------------------------------------------------------------------------------------ several of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What filters leave of B samples."""

    counts: Tensor
    """How often each sample is trained on, int64 [B]; 0 = not at all."""
    group: Tensor
    """The group of each sample, int [B]."""
    metrics: dict[str, float]
    """kept_samples and kept_groups, shares; dead_low and dead_high, shares of the groups whose rewards are all alike
    and do not pass, or pass."""

    @property
    def samples(self) -> Tensor:
        """Samples that are trained on, bool [B]."""
        return self.counts > 0

    @property
    def groups(self) -> Tensor:
        """Numbers of the groups with such a sample, in rising order, [G']."""
        return torch.unique(self.group[self.samples])

    @property
    def in_groups(self) -> Tensor:
        """All samples of these groups, bool [B]: what the statistics of credit should be taken over."""
        return torch.isin(self.group, self.groups)

    def first(self, count: int) -> Kept:
        """With the `count` groups of the lowest numbers only: the cut where a refill brought more than are wanted."""
        return replace(self, counts=self.counts * torch.isin(self.group, self.groups[:count]))


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters that are applied one after another; without any, every sample with a verdict stays."""

    steps: tuple[Callable[..., Tensor], ...] = ()
    passing: float = 0.5
    """Mean reward from which on a dead group counts as one of right answers."""

    def keep(self, rewards: Tensor, group: Tensor, facts: Facts | None = None, *, key: int = 0) -> Kept:
        """What is left of the samples of all processes, rewards and group [B], facts {name: [B]}.

        A filter sees what the ones before it took away as samples without a verdict. Where a sample is taken more than
        once, the numbers are multiplied. FilterError where a filter asks for a fact that there is not, or answers with
        something else than [B] bools or counts.
        """
        rewards, group = rewards.detach().cpu().double(), group.cpu()
        facts = {name: fact.detach().cpu().double() for name, fact in (facts or {}).items()}
        rewards = rewards.where(rewards.isfinite(), torch.nan)
        counts = rewards.isfinite().long()
        for step in self.steps:
            counts = counts * step(rewards.where(counts > 0, torch.nan), group, facts, key).long()
        kept = Kept(counts=counts, group=group, metrics={})
        return replace(kept, metrics=self._metrics(kept, rewards))

    def _metrics(self, kept: Kept, rewards: Tensor) -> dict[str, float]:
        live = informative(rewards, kept.group)
        dead = [rewards[m] for _, m in _groups(rewards, kept.group) if len(m) > 1 and not live[m[0]]]
        high = sum(_mean(r) >= self.passing for r in dead)
        num_groups, num_samples = max(1, len(torch.unique(kept.group))), max(1, len(kept.group))
        return {
            "kept_samples": int(kept.samples.sum()) / num_samples,
            "kept_groups": len(kept.groups) / num_groups,
            "dead_low": (len(dead) - high) / num_groups,
            "dead_high": high / num_groups,
        }


def times(batch: AnyBatch, counts: Tensor, whole_units: bool = False) -> Tensor:
    """How often each row of this process's batch is trained on, int64 [R], from `Kept.counts` [B] of all samples.

    A row counts as its sample does; a stored step that several samples share as the one of them that counts most. With
    `whole_units` (`Needs`) the draws of a unit count once where all of its samples stay. `batch.place` must be known.
    """
    assert batch.place is not None
    own = counts[batch.place.cpu()]
    if isinstance(batch, TokenBatch):
        return own
    if batch.draws is not None:
        of_draw = own[batch.draws.sample.cpu()]
        return _of_units(of_draw, batch.draws.unit.cpu()) if whole_units else of_draw
    leaves = batch.trajectory.leaves.cpu()
    return (leaves * own).amax(1) if leaves.numel() else own.new_zeros(len(leaves))


def build(entries: Sequence[Mapping[str, Any]], passing: float = 0.5) -> Filters:
    """The filters of a config section, a list of `{use: name, option: value, ...}`; FilterError for what cannot work.

    `use` is a function of this file, `package.module:attr` or `./file.py:attr`. Each is tried on an example at once, so
    that impossible options are refused before a run.
    """
    return Filters(tuple(_step(f"data.filters[{i}]", entry) for i, entry in enumerate(entries)), passing)


def available() -> list[str]:
    """The filters of this file: its public functions that begin with the parameters of one."""
    functions = {name: f for name, f in globals().items() if inspect.isfunction(f) and not name.startswith("_")}
    own = {name: f for name, f in functions.items() if f.__module__ == __name__}
    return [name for name, f in own.items() if list(inspect.signature(f).parameters)[:2] == _FIRST_TWO]


def _step(place: str, entry: Mapping[str, Any]) -> Callable[..., Tensor]:
    """One entry as a function of (rewards, group, facts, key) that checks what it answers."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("use"), str):
        raise FilterError(f"{place} is {entry!r}; write {{use: informative}}, with the filter's options beside `use`.")
    options = {name: value for name, value in entry.items() if name != "use"}
    name = entry["use"]
    place = f"{place} ({name})"
    function = _function(place, name)
    parameters = inspect.signature(function).parameters
    _check_options(place, parameters, options)
    given = [given for given in _GIVEN if given in parameters]

    def step(rewards: Tensor, group: Tensor, facts: Facts, key: int) -> Tensor:
        known = {"rewards": rewards, "group": group, "facts": facts, "key": key}
        try:
            answer = function(**{name: known[name] for name in given}, **options)
        except FilterError as error:
            raise FilterError(f"{place}: {error}") from error
        except Exception as error:
            raise FilterError(f"{place} raises {told(error)}. {_mend(options)}") from error
        _check_answer(place, answer, group)
        return answer

    example = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    step(example, torch.tensor([0, 0, 1, 1]), defaultdict(lambda: torch.ones(4, dtype=torch.float64)), 0)
    return step


def _mend(options: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"Mend the function, or what its options are set to: {given}." if options else "Mend the function."


def _function(place: str, name: str) -> Callable[..., Tensor]:
    own = ":" in name or name.endswith(".py")
    if not own and name not in available():
        raise FilterError(
            f"{place}: there is no such filter{nearest(name, available())}. There are: {', '.join(available())}; or "
            "give package.module:attr, or ./file.py:attr."
        )
    try:
        found = resolve(name if own else f"{__name__}:{name}", "flowrl")
    except ResolveError as error:
        raise FilterError(f"{place}: {error}.") from error
    if not callable(found) or inspect.isclass(found) or not {*_FIRST_TWO} <= set(inspect.signature(found).parameters):
        raise FilterError(f"{place}: expected a function (rewards, group, ...) -> keep, found {type(found).__name__}.")
    return found


def _check_options(place: str, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    free = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    takes = {name: p for name, p in parameters.items() if name not in _GIVEN and p.kind not in free}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown := [name for name in options if name not in takes and not anything]:
        known = f"its options are {', '.join(takes)}" if takes else "it has none"
        raise FilterError(f"{place}: there is no option {unknown[0]!r}{nearest(unknown[0], takes)}; {known}.")
    if missing := [name for name, p in takes.items() if p.default is p.empty and name not in options]:
        raise FilterError(f"{place}: {' and '.join(missing)} must be set; put it beside `use`, as in {missing[0]}: 1.")


def _check_answer(place: str, answer: Any, group: Tensor) -> None:
    fits = isinstance(answer, Tensor) and answer.shape == group.shape
    if not fits or answer.is_floating_point() or answer.is_complex() or bool((answer.long() < 0).any()):
        told = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise FilterError(f"{place} returned {told}; return bools, or counts from 0 upwards, [{len(group)}].")


# ------------------------------------------------------------------------------------------------ drawing more


@dataclass(slots=True)
class Refill:
    """How many more prompts an iteration draws until enough groups are kept (dynamic sampling, DAPO).

        refill = Refill(wanted=48, max_tries=4)
        while count := refill.wants():
            ...                                     collect and filter `count` prompts
            refill.saw(count, len(kept.groups))

    Everything is a function of the numbers it is told, which are those of all processes.
    """

    wanted: int
    """Groups that the iteration trains on; the first try draws as many prompts."""
    max_tries: int
    """Tries, the first included."""
    least: int = 1
    """Fewest prompts that a further try draws: one for each process that shares them, on any number of them."""
    tries: list[tuple[int, int]] = field(default_factory=list)
    """Prompts drawn, groups kept: of each try so far."""

    def __post_init__(self) -> None:
        if self.wanted < 1 or self.max_tries < 1 or not 1 <= self.least <= self.wanted:
            raise FilterError(
                f"a refill of wanted={self.wanted} groups, max_tries={self.max_tries}, least={self.least}: each is at "
                "least 1, and a try draws at most as many prompts as groups are wanted."
            )

    @property
    def drawn(self) -> int:
        """Prompts drawn so far."""
        return sum(drawn for drawn, _ in self.tries)

    @property
    def kept(self) -> int:
        """Groups kept so far, more than are wanted perhaps."""
        return sum(kept for _, kept in self.tries)

    def saw(self, drawn: int, kept: int) -> None:
        """A try drew so many prompts, and so many of their groups were kept."""
        self.tries.append((drawn, kept))

    def wants(self) -> int:
        """Prompts that the next try draws; 0 = stop.

        What is missing, divided by the share that was kept so far, and a quarter more (the adaptive batch size of
        GRESO, arXiv:2506.02177): from `least` to `wanted`.
        """
        missing = self.wanted - self.kept
        if missing <= 0 or len(self.tries) == self.max_tries:
            return 0
        if not self.kept:
            return self.wanted
        return min(self.wanted, max(self.least, math.ceil(1.25 * missing * self.drawn / self.kept)))

    @property
    def warning(self) -> str | None:
        """What to tell the user after the last try, where not a single group is left to train on."""
        if self.kept or not self.tries:
            return None
        return (
            f"warning: data.filters kept none of {self.drawn} groups in {len(self.tries)} tries, so this iteration "
            "trains on nothing. If that goes on, the prompts are too easy or too hard for this policy, the filters too "
            "strict, or the rewards have no verdict: look at dead_low, dead_high and score_no_verdict, loosen "
            "data.filters, or raise data.max_tries."
        )

    @property
    def metrics(self) -> dict[str, float]:
        """refill_tries, refill_drawn (prompts), and refill_missing, the share of the wanted groups not found."""
        missing = max(0, self.wanted - self.kept) / self.wanted
        return {
            "refill_tries": float(len(self.tries)),
            "refill_drawn": float(self.drawn),
            "refill_missing": missing,
        }


# ------------------------------------------------------------------------------------------------ parts


def _groups(rewards: Tensor, group: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number, places of its samples with a verdict) of each group that has one, in rising order."""
    judged = rewards.isfinite()
    for name in torch.unique(group[judged]).tolist():
        yield name, torch.nonzero((group == name) & judged).flatten()


def _of_groups(values: Tensor, group: Tensor, wanted: Callable[[Tensor], bool]) -> Tensor:
    """Samples of the groups whose known values are as wanted, bool [B]."""
    names = [name for name, members in _groups(values, group) if wanted(values[members])]
    return _in(group, names)


def _of_units(counts: Tensor, unit: Tensor) -> Tensor:
    """1 for the draws [N] of units of which every one counts, else 0."""
    names, member = torch.unique(unit, return_inverse=True)
    least = counts.new_ones(len(names)).scatter_reduce(0, member, counts, "amin")
    return least[member]


def _in(group: Tensor, names: Sequence[int]) -> Tensor:
    """Samples whose group is one of these, bool [B]."""
    return torch.isin(group, torch.tensor(names, dtype=group.dtype))


def _mean(values: Tensor) -> float:
    """Their mean, summed in sorted order: to the last bit the same for any order of the samples."""
    return float(values.sort().values.mean())


def _std(values: Tensor) -> float:
    """The same for the std; that of equal values is 0, not what rounding their mean leaves."""
    values = values.sort().values
    return float((values - values[0]).std(correction=0))


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)  # 10 (1 - 0.9) is 0.99...98


def _systematic(weight: Tensor, seed: int) -> Tensor:
    """How often each of K is drawn in K draws in proportion to weight [K] (systematic resampling), int64 [K]."""
    until = (weight if weight.any() else torch.ones_like(weight)).cumsum(0)
    offset, size = (seed >> 11) / 2**53, len(weight)
    marks = (until / until[-1] * size + offset).floor().clamp(max=size)  # K + offset may be rounded to K + 1
    return marks.diff(prepend=marks.new_zeros(1)).long()


def _fact(facts: Facts, name: str) -> Tensor:
    try:
        return facts[name]
    except KeyError:
        known = f"known are {', '.join(facts)}" if facts else "nothing but the reward is known"
        raise FilterError(f"the samples have no fact {name!r}{nearest(name, facts)}; {known}.") from None


def _check(holds: bool, text: str) -> None:
    if not holds:
        raise FilterError(f"{text}.")
