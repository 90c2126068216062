"""Curricula: how much each prompt is wanted in an iteration, from what the run remembers of it.

    weigh = curriculum("learnable")                     or package.module:attr, ./file.py:attr
    weigh = curriculum({"use": "easy_first", "over": 500})
    prompts = sampler(iteration, weigh(history, prompts, iteration))

A curriculum is a function `(history, prompts, iteration) -> weights [P]`, none negative and not all 0; only their
ratios count. It must be a pure function of its arguments, since every process asks it for itself. Its further
parameters are options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.data import DataError, short
from flowrl.history import PromptHistory
from flowrl.resolve import ResolveError, nearest, resolve
from flowrl.types import Prompt

Curriculum = Callable[[PromptHistory, Sequence[Prompt], int], Tensor]
"""From the history, all P prompts and the iteration (from 0) to weights [P]."""

_PARAMETERS = ["history", "prompts", "iteration"]
_FIRST = 1e12
"""Weight of a prompt that has to come before all others: theirs add up to the number of prompts."""


def curriculum(entry: str | Mapping[str, Any]) -> Curriculum:
    """The function that `data.curriculum` stands for: a name, or {use: name, option: value, ...}.

    ResolveError names what there is, of functions and of options.
    """
    name, options = _read(entry)
    if ":" not in name and not name.endswith(".py") and name not in available():
        raise ResolveError(
            f"data.curriculum={name!r} is not known{nearest(name, available())}. There are: {', '.join(available())}; "
            "or give package.module:attr, or ./file.py:attr"
        )
    if name.endswith(".py"):
        raise ResolveError(f"data.curriculum={name!r}: name the function in the file too, as {name}:attr")
    found = resolve(name if ":" in name else f"{__name__}:{name}", "flowrl")
    if not _accepts(found):
        raise ResolveError(
            f"data.curriculum={name!r} is no curriculum: expected a function ({', '.join(_PARAMETERS)}) -> weights, "
            f"found {type(found).__name__} {short(found)}"
        )
    _check_options(name, found, options)

    def weigh(history: PromptHistory, prompts: Sequence[Prompt], iteration: int) -> Tensor:
        weights = found(history, prompts, iteration, **options)
        if not isinstance(weights, Tensor):  # None, where a return was forgotten, would mean no curriculum at all
            raise DataError(
                f"data.curriculum={name} returned {type(weights).__name__} {short(weights)}; return a tensor of "
                f"{len(prompts)} weights, one a prompt."
            )
        return weights

    return weigh


def available() -> list[str]:
    """The curricula of this file: its functions that begin with the parameters of one."""
    functions = {name: thing for name, thing in globals().items() if inspect.isfunction(thing)}
    return [name for name, thing in functions.items() if list(inspect.signature(thing).parameters)[:3] == _PARAMETERS]


def learnable(history: PromptHistory, prompts: Sequence[Prompt], iteration: int, explore: float = 0.1) -> Tensor:
    """Prompts whose rewards differ within a group, in proportion to that variance (learnability, arXiv:2502.12272).

    The advantages of a group whose rewards are all equal are 0: it costs a rollout and teaches nothing. Of a reward
    that is 0 or 1 the variance is p (1 - p), the learnability of the paper. With s² the variance within the remembered
    groups of a prompt, averaged over the n prompts that have one,

        weight = explore + (1 - explore) s² / mean(s²)

    so that a share `explore` of the draws, in (0, 1], falls on these prompts evenly: none is given up for good.
    Unseen prompts come first. A prompt that was seen, but never with two verdicts in a group, has weight `explore`.
    Returns float64 [P].

    Note: the paper picks the most learnable questions by rollouts made for that purpose; here all are weighed by the
    rollouts that training has made anyway, so the variance is one of older policies.
    """
    if not 0 < explore <= 1:
        raise ValueError(f"learnable: explore={explore}; it is a share in (0, 1].")
    if history.size < 2:
        raise DataError(
            f"data.curriculum=learnable compares the rewards of a group, but data.history={history.size} keeps fewer "
            "than two; set data.history to a few times data.samples_per_prompt."
        )
    variance = torch.tensor([history.group_variance(prompt.id) for prompt in prompts], dtype=torch.float64)
    unseen = torch.tensor([history.seen(prompt.id) == 0 for prompt in prompts])
    mean = variance.nanmean()  # NaN without any; then, and where all are 0, the prompts are equally wanted
    share = variance / mean if mean > 0 else torch.ones_like(variance)
    weights = explore + (1 - explore) * share.nan_to_num(nan=0.0)
    return weights.where(~unseen, _FIRST)


def easy_first(
    history: PromptHistory, prompts: Sequence[Prompt], iteration: int, over: int = 100, start: float = 0.1
) -> Tensor:
    """The easiest prompts, and ever harder ones with them (competence-based curriculum, arXiv:1903.09848, linear).

    With d the share of prompts that are easier than a prompt by their metadata `difficulty` (any scale, larger =
    harder), its weight is 1 where d < c(iteration) and 0 elsewhere,

        c(i) = min(1, start + (1 - start) i / over)

    so from iteration `over` (1 or more) on all prompts are equally wanted. `start`, in (0, 1], is the share of the
    first iteration. Returns float64 [P]; DataError where a prompt has no difficulty.

    Note: the paper counts the prompts that are at most as hard. Where many have the same difficulty that share can
    exceed `start` even for the easiest, and there would be no prompt to begin with.
    """
    if over < 1 or not 0 < start <= 1:
        raise ValueError(f"easy_first: over={over}, start={start}; over is at least 1 iteration, start is in (0, 1].")
    difficulty = torch.tensor([_number(prompt, "difficulty", "easy_first") for prompt in prompts], dtype=torch.float64)
    easier = torch.searchsorted(difficulty.sort().values, difficulty)
    competence = min(1.0, start + (1 - start) * iteration / over)
    return (easier < competence * len(prompts)).double()


def rlcs(
    history: PromptHistory, prompts: Sequence[Prompt], iteration: int, bins: int = 10, explore: float = 0.1
) -> Tensor:
    """Prompts by how informative their level of difficulty is (RLCS of GLM-4.5V, arXiv:2507.01006). float64 [P].

    The pass rate p of a prompt merges what was measured before the run, its metadata `pass_rate` g in [0, 1] if it has
    one, with the online one e of its n judged groups (`PromptHistory.pass_rate`): p = (g + n e) / (1 + n). Levels are
    `bins` equal parts of [0, 1]; with q the mean p of a level, its prompts have

        weight = explore + (1 - explore) u / mean(u)        u = 4 q (1 - q)

    u is the variance of a reward that is 1 with chance q, as a share of the largest: too easy and too hard levels are
    drawn less. Prompts of which nothing is known come first.

    Note: the report says what is merged and which levels are drawn less, but gives no formula; this one is ours.
    """
    _check("rlcs", bins >= 1 and 0 < explore <= 1, f"bins={bins}, explore={explore}: at least 1; a share in (0, 1]")
    rate = torch.tensor([_merged_rate(history, prompt) for prompt in prompts], dtype=torch.float64)
    known = ~rate.isnan()
    level = (rate[known] * bins).long().clamp(max=bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64)
    mean = zeros.index_add(0, level, rate[known]) / zeros.index_add(0, level, torch.ones_like(rate[known])).clamp(min=1)
    useful = (4 * mean * (1 - mean))[level]
    share = useful / useful.mean() if useful.sum() > 0 else torch.ones_like(useful)
    return torch.full_like(rate, _FIRST).masked_scatter(known, explore + (1 - explore) * share)


def _merged_rate(history: PromptHistory, prompt: Prompt) -> float:
    """The pass rate of a prompt by its metadata and its history; NaN where neither knows it."""
    groups, online = history.rated(prompt.id), history.pass_rate(prompt.id)
    if "pass_rate" not in prompt.metadata:
        return online
    graded = _number(prompt, "pass_rate", "rlcs")
    if not 0 <= graded <= 1:
        raise DataError(
            f"data.curriculum=rlcs: prompt {prompt.id} ({short(prompt.text)}): its metadata 'pass_rate' is {graded}; "
            "write the share of samples that were right, in [0, 1]."
        )
    return (graded + groups * online) / (1 + groups) if groups else graded


def greso(
    history: PromptHistory, prompts: Sequence[Prompt], iteration: int, easy: float = 1 / 12, hard: float = 1 / 6,
    start: float = 0.5,
) -> Tensor:  # fmt: skip
    """Prompts less, the longer their groups have been all right or all wrong (GRESO, arXiv:2506.02177). float64 [P].

    The paper draws a prompt evenly and skips it with probability 1 - p^z, z its latest groups in a row that were all
    alike. What it keeps is distributed in proportion to

        weight = max(p^z, 0.01)

    with one p for prompts that are always right, and one for those that never are. Both begin at `start`; after each
    iteration p falls by 0.01 where the share of such groups among all that it drew was at least its target, `easy` or
    `hard`, and else rises by 0.01, within [0.05, 0.95]. That begins after the first epoch, when as many groups were
    seen as there are prompts. Unseen prompts come first.

    Note: the paper goes through epochs, in which a skipped prompt does not come again; here each iteration draws anew.
    """
    targets = {"easy": easy, "hard": hard, "start": start}
    _check("greso", all(0 <= value <= 1 for value in targets.values()), f"{targets}: all are in [0, 1]")
    base = {
        1: _tuned(history, column=2, target=easy, start=start),
        -1: _tuned(history, column=3, target=hard, start=start),
    }
    weights = []
    for prompt in prompts:
        streak = history.streak(prompt.id)
        wanted = max(base[1 if streak > 0 else -1] ** abs(streak), _GRESO_LEAST)
        weights.append(wanted if history.seen(prompt.id) else _FIRST)
    return torch.tensor(weights, dtype=torch.float64)


_GRESO_LEAST, _GRESO_STEP, _GRESO_RANGE = 0.01, 0.01, (0.05, 0.95)


def _tuned(history: PromptHistory, column: int, target: float, start: float) -> float:
    """GRESO's p after the iterations so far; `column` of the outcomes holds the dead groups it is about."""
    low, high = _GRESO_RANGE
    p, seen = start, 0
    for row in history.outcomes().tolist():
        if seen >= history.num_prompts:
            step = -_GRESO_STEP if row[column] >= target * row[1] else _GRESO_STEP
            p = min(high, max(low, p + step))
        seen += row[1]
    return p


def history_resampling(history: PromptHistory, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """Without prompts whose last group was all right, in epochs (SRPO for language, arXiv:2504.14286). float64 [P].

    Mixed and all wrong ones stay. Those that stay and were seen least often come first, so that an epoch of them is
    gone through before the next begins; where all would go, all stay.

    Note: the paper chooses at the end of an epoch; here a prompt goes as soon as its group was all right, which is the
    same, since an epoch meets it once.
    """
    seen = torch.tensor([history.seen(prompt.id) for prompt in prompts])
    solved = torch.tensor([history.streak(prompt.id) > 0 for prompt in prompts])
    if bool(solved.all()):
        return torch.ones(len(prompts), dtype=torch.float64)
    now = seen == seen[~solved].min()
    return torch.where(now, 1.0, 1 / _FIRST).double().where(~solved, 0.0)


def staged(
    history: PromptHistory, prompts: Sequence[Prompt], iteration: int, stages: Sequence[Mapping[str, Any]],
    by: str = "difficulty",
) -> Tensor:  # fmt: skip
    """The prompts of the stage that an iteration belongs to (Curr-ReFT, arXiv:2503.07065). float64 [P], 1 or 0.

    A stage is {start, low, high}, prompts whose metadata `by` is a number in [low, high], or {start, values}, those
    where it is one of a list: yes/no questions, then choices, then open ones. `start` is the iteration that it begins
    with; the last that has begun is in force, and the first begins with 0. DataError where no prompt belongs to it.

        {use: staged, by: kind, stages: [{start: 0, values: [yes_no]}, {start: 100, values: [yes_no, open]}]}
    """
    _check_stages(stages)
    stage = [stage for stage in stages if stage["start"] <= iteration][-1]
    if "values" in stage:
        inside = [prompt.metadata.get(by) in stage["values"] for prompt in prompts]
    else:
        inside = [stage["low"] <= _number(prompt, by, "staged") <= stage["high"] for prompt in prompts]
    if not any(inside):
        raise DataError(
            f"data.curriculum=staged: no prompt has a metadata {by!r} that belongs to the stage {dict(stage)}; there "
            f"are {short(sorted({str(prompt.metadata.get(by)) for prompt in prompts}))}. Change the stage, or `by`."
        )
    return torch.tensor(inside, dtype=torch.float64)


def _check_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    for stage in stages:
        if not isinstance(stage, Mapping) or set(stage) not in ({"start", "low", "high"}, {"start", "values"}):
            raise DataError(
                f"data.curriculum=staged: a stage is {short(stage)}; write {{start: 0, low: 0, high: 0.5}}, or "
                "{start: 0, values: [yes_no]}."
            )
    starts = [stage["start"] for stage in stages]
    if starts[:1] != [0] or sorted(set(starts)) != starts:
        raise DataError(f"data.curriculum=staged: stages start at {starts}; begin with 0, and let them rise.")


# ------------------------------------------------------------------------------------------------ more samples


def extra_samples(pass_rates: Tensor, samples: int, most: int, how: Literal["equal", "hard"] = "equal") -> Tensor:
    """How many more samples prompts get after their first ones (DARS, arXiv:2508.13755). int64 [P].

    pass_rates [P] are shares of the `samples` N of each that were right; prompts that are right less often than every
    second time get, all in all,

        equal    N / (4 u (1 - u)): sum |r - mean| over the group is then that of u = 1/2
        hard     the larger of that and 3 N / (8 u): ever more, the harder a prompt is

    rounded and at most `most`; the others, and those without a verdict (NaN), no more.

    Note: the paper's code has tables for N = 8 instead, with `most` 32 and 48, and these are the formulas of their
    numbers. "equal" is derived, "hard" is fitted.
    """
    if not 1 <= samples <= most:
        raise ValueError(f"extra_samples: samples={samples}, most={most}; at least 1 sample, and no fewer in all.")
    if how not in ("equal", "hard"):
        raise ValueError(f"extra_samples: how={how!r}; choose equal or hard.")
    u = pass_rates.double()
    total = samples / (4 * u * (1 - u))
    if how == "hard":
        total = torch.maximum(total, 3 * samples / (8 * u))
    total = total.round().clamp(max=most).where(u < 0.5, samples)
    return total.long() - samples


# ------------------------------------------------------------------------------------------------ parts


def _number(prompt: Prompt, key: str, used_by: str) -> float:
    """A number of a prompt's metadata; DataError where it is none."""
    value = prompt.metadata.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    found = f"is {short(value)}, not a finite number" if key in prompt.metadata else "is missing"
    near = nearest(key, prompt.metadata) if value is None else ""
    raise DataError(
        f"data.curriculum={used_by}: prompt {prompt.id} ({short(prompt.text)}): its metadata {key!r} {found}"
        f'{near}. Write a number into every line of a .jsonl file, {{"prompt": ..., "{key}": 2}}, or remove '
        "data.curriculum."
    )


def _check(name: str, holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {text}.")


def _read(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options of an entry."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry.get("use"), str):
        raise ResolveError(
            f"data.curriculum is {short(dict(entry))}; write {{use: learnable, explore: 0.2}}, or a name"
        )
    return entry["use"], {name: value for name, value in entry.items() if name != "use"}


def _check_options(name: str, function: Any, options: Mapping[str, Any]) -> None:
    takes = list(inspect.signature(function).parameters)[len(_PARAMETERS) :]
    if unknown := [option for option in options if option not in takes]:
        known = f"its options are {', '.join(takes)}" if takes else "it has none"
        raise ResolveError(
            f"data.curriculum={name!r} has no option {unknown[0]!r}{nearest(unknown[0], takes)}; {known}"
        )
    try:
        inspect.signature(function).bind(*_PARAMETERS, **options)
    except TypeError as error:
        raise ResolveError(f"data.curriculum={name!r}: {error}; write {{use: {name}, {takes[0]}: ...}}") from error


def _accepts(found: Any) -> bool:
    """Whether it can be called with the three arguments of a curriculum, and perhaps options."""
    try:
        inspect.signature(found).bind_partial(*_PARAMETERS)
    except (TypeError, ValueError):
        return False
    return not inspect.isclass(found)
