"""Values of the states inside answers by Monte Carlo (VinePPO, arXiv:2410.01679): the policy goes on, verifiers grade.

A state is the prompt with the first tokens of an answer. From each the policy writes K answers to the end, and the mean
of their rewards is an unbiased estimate of what the policy gets from there. Answers that begin alike share their
states, so the first one, the bare prompt, is asked once for all of its answers.

Symbols: N answers, S places, K continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowrl.algorithms.advantages import monte_carlo_values
from flowrl.types import Tokens
from flowrl.vlm.generate import Row
from flowrl.vlm.policy import TextPolicy

Grade = Callable[[Sequence[Row], Sequence[int]], Tensor]
"""Rewards [n] of n answers, each to the prompt at this place in the batch's list; NaN = no verdict."""
_KEY = -9


@dataclass(kw_only=True, slots=True)
class State:
    """The prompt with the first tokens of an answer."""

    start: Row
    done: int
    """Tokens of it that the policy chose."""
    prompt: int
    at: list[tuple[int, int]] = field(default_factory=list)
    """Where it occurs: (answer, place)."""


def state_values(
    policy: TextPolicy, tokens: Tokens, keys: Sequence[Sequence[int]], grade: Grade, *, continuations: int, every: int,
    limit: int, batch: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values [N,S] at every `every`-th token of the policy's own, NaN elsewhere; and continuations written [N].

    `keys` [N] name each answer's prompt in the run (seed, iteration, slot). An answer has `limit` tokens at most, those
    before the state included. `batch` continuations are written at a time, None: all of one length. What is written is
    counted for the first answer that has the state.
    """
    values = torch.full(tokens.ids.shape, torch.nan)
    count = torch.zeros(len(tokens), dtype=torch.float64)
    states = [state for state in _states(tokens, keys, every) if state.done < limit]
    for done in sorted({state.done for state in states}):
        here = [state for state in states if state.done == done]
        rows = [replace(s.start, key=(*s.start.key, k)) for s in here for k in range(continuations)]
        written = policy.write(rows, limit=limit - done, batch=batch)
        rewards = grade(written, [s.prompt for s in here for _ in range(continuations)])
        found = monte_carlo_values(rewards.view(len(here), continuations))
        for state, value in zip(here, found.tolist(), strict=True):
            count[state.at[0][0]] += continuations
            for answer, place in state.at:
                values[answer, place] = value
    return values, count


def _states(tokens: Tokens, keys: Sequence[Sequence[int]], every: int) -> Iterator[State]:
    """The distinct states of N answers."""
    found: dict[tuple[int, ...], State] = {}
    for answer, (mask, key, prompt) in enumerate(zip(tokens.mask.cpu(), keys, tokens.prompt.tolist(), strict=True)):
        ids = tokens.ids[answer].cpu()
        for done, place in list(enumerate(mask.nonzero().flatten().tolist()))[::every]:
            before = ids[:place]
            name = (prompt, *before.tolist())
            if name not in found:
                start = Row(
                    inputs=tokens.inputs[answer], key=(*key, _KEY, *before.tolist()), ids=before, mask=mask[:place],
                    logprob=tokens.logprob[answer, :place].cpu(),
                )  # fmt: skip
                found[name] = State(start=start, done=done, prompt=prompt)
            found[name].at.append((answer, place))
    yield from found.values()
