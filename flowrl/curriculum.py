"""Curricula: how much each prompt is wanted in an iteration, from what the run remembers of it.

    weigh = curriculum("learnable")                     or package.module:attr, ./file.py:attr
    prompts = sampler(iteration, weigh(history, prompts, iteration))

A curriculum is a function `(history, prompts, iteration) -> weights [P]`, none negative and not all 0; only their
ratios count. It must be a pure function of its arguments, since every process asks it for itself. Other numbers than
the defaults of a curriculum here are a line in a file of your own: `slowly = functools.partial(easy_first, over=500)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

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


def curriculum(name: str) -> Curriculum:
    """The function that `data.curriculum` stands for; ResolveError names what there is."""
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

    def weigh(history: PromptHistory, prompts: Sequence[Prompt], iteration: int) -> Tensor:
        weights = found(history, prompts, iteration)
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
    difficulty = torch.tensor([_difficulty(prompt) for prompt in prompts], dtype=torch.float64)
    easier = torch.searchsorted(difficulty.sort().values, difficulty)
    competence = min(1.0, start + (1 - start) * iteration / over)
    return (easier < competence * len(prompts)).double()


def _difficulty(prompt: Prompt) -> float:
    value = prompt.metadata.get("difficulty")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    found = f"is {short(value)}, not a finite number" if "difficulty" in prompt.metadata else "is missing"
    near = nearest("difficulty", prompt.metadata) if value is None else ""
    raise DataError(
        f"data.curriculum=easy_first: prompt {prompt.id} ({short(prompt.text)}): its metadata 'difficulty' {found}"
        f'{near}. Write a number into every line of a .jsonl file, {{"prompt": ..., "difficulty": 2}}, or remove '
        "data.curriculum."
    )


def _accepts(found: Any) -> bool:
    """Whether it can be called with the three arguments of a curriculum."""
    try:
        inspect.signature(found).bind(*_PARAMETERS)
    except (TypeError, ValueError):
        return False
    return not inspect.isclass(found)
