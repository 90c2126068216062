"""Rows of earlier iterations that are worth learning from once more, and how old rows may be.

    buffer = ReplayBuffer(size=512, max_age=4, build=answers)
    buffer.add(rows, advantages, prompt_ids, iteration)         rows of all processes, in one order
    again = buffer.draw(count, iteration, seed)                 to fill the places of groups that taught nothing

It is fed with the rows of all processes (`gathered` makes such a table) and draws by keys, so it is equal on every
process, and a checkpoint of one of them is a checkpoint of all.

Symbols: N rows, S places of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowrl.types import Tokens
from samplers import stable_seed


class Rows(Protocol):
    """A table of rows as a buffer sees it: a dataclass of tensors whose first dimension is the row."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> Self:
        """The rows of a bool mask [N] or an index [M]."""
        ...

    @classmethod
    def cat(cls, tables: Sequence[Self]) -> Self:
        """Tables under each other."""
        ...


Table = TypeVar("Table", bound=Rows)

_INDEX = ("advantages", "prompts", "born", "number")
_ROWS = "rows."
"""What the names of the table's own tensors begin with in a state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed(Generic[Table]):
    """Rows that were drawn from a buffer, N of them, in the order in which they were added."""

    rows: Table
    """As they were added; the `prompt` of `Tokens` still counts in the list of prompts of that time."""
    advantages: Tensor
    """Their credit when they were new, float64 [N]; never 0."""
    prompts: Tensor
    """Ids of their prompts, int64 [N]."""
    age: Tensor
    """Iterations since they were made, int64 [N]."""


class ReplayBuffer(Generic[Table]):
    """Rows with an advantage, drawn again in proportion to |A| (SSB of Skywork R1V2, arXiv:2504.16656).

    Holds the newest `size` rows whose advantage is neither 0 nor NaN, for `max_age` iterations: those of iteration i
    can be drawn up to i + max_age. They are kept in main memory, and a row may be drawn more than once.

    `build` makes a table of its tensors {name: [N, ...]}, without what is no tensor; `answers` does for `Tokens`. Who
    draws puts that back by the prompts' ids.
    """

    def __init__(self, size: int, max_age: int, build: Callable[[dict[str, Tensor]], Table]) -> None:
        if size < 1 or max_age < 1:
            raise ValueError(
                f"a replay buffer of size={size} rows for max_age={max_age} iterations: both are at least 1; leave the "
                "buffer out to train on new rows only."
            )
        self.size, self.max_age = size, max_age
        self._build = build
        self._rows: Table | None = None
        self._advantages = torch.zeros(0, dtype=torch.float64)
        self._prompts = self._born = self._number = torch.zeros(0, dtype=torch.int64)
        self._added = 0

    def __len__(self) -> int:
        """Rows that are held, too old ones perhaps included until the next `add`."""
        return len(self._number)

    def add(self, rows: Table, advantages: Tensor, prompts: Tensor, iteration: int) -> None:
        """Hold those of N new rows that have an advantage [N]; prompts [N] are their ids. The oldest make room.

        All processes must add the same rows in the same order. ValueError where the lengths differ.
        """
        if not len(rows) == len(advantages) == len(prompts) or advantages.dim() != 1:
            raise ValueError(
                f"{len(rows)} rows with advantages {list(advantages.shape)} of prompts {list(prompts.shape)}: give one "
                "number a row."
            )
        advantages = advantages.detach().cpu().double()
        chosen = torch.nonzero(advantages.isfinite() & (advantages != 0)).flatten()
        new = self._build({name: tensor.cpu() for name, tensor in tensors_of(rows.select(chosen)).items()})
        self._rows = new if self._rows is None else type(new).cat([self._rows, new])
        self._advantages = torch.cat([self._advantages, advantages[chosen]])
        self._prompts = torch.cat([self._prompts, prompts.cpu()[chosen]])
        self._born = torch.cat([self._born, torch.full_like(chosen, iteration)])
        self._number = torch.cat([self._number, self._added + torch.arange(len(chosen))])
        self._added += len(chosen)
        young = torch.nonzero(self._age(iteration) <= self.max_age).flatten()
        self._keep(young[-self.size :])

    def draw(self, count: int, iteration: int, seed: int) -> Replayed[Table] | None:
        """`count` different rows, each draw in proportion to |A| of the rows that are left; all where there are fewer.

        A function of (seed, iteration) and of what is held. None where no row is young enough, or none is asked for.
        """
        young = torch.nonzero(self._age(iteration) <= self.max_age).flatten().tolist()
        if self._rows is None or not young or count < 1:
            return None
        # Weighted draws without replacement: the first to ring of exponential clocks with these rates.
        rings = {
            i: _exponential(seed, iteration, int(self._number[i])) / abs(float(self._advantages[i])) for i in young
        }
        drawn = torch.tensor(sorted(sorted(young, key=lambda i: rings[i])[:count]))
        return Replayed(
            rows=self._rows.select(drawn),
            advantages=self._advantages[drawn],
            prompts=self._prompts[drawn],
            age=self._age(iteration)[drawn],
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as plain finite tensors.

        `advantages` float64 [N]; `prompts`, `born`, `number` int64 [N]; `added` int64 [1]; `rows.<name>` [N, ...].
        """
        index = {name: getattr(self, f"_{name}") for name in _INDEX}
        table = {} if self._rows is None else tensors_of(self._rows)
        rows = {_ROWS + name: tensor.contiguous() for name, tensor in table.items()}
        return index | rows | {"added": torch.tensor([self._added])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the buffer that `state_dict` described; ValueError where it is another run's."""
        if missing := [name for name in (*_INDEX, "added") if name not in state]:
            raise ValueError(f"the saved replay buffer lacks {', '.join(missing)}; start a new run.")
        if len(state["number"]) > self.size:
            raise ValueError(
                f"the saved replay buffer holds {len(state['number'])} rows, more than its size, {self.size}; put the "
                "old size back, or start a new run."
            )
        for name in _INDEX:
            setattr(self, f"_{name}", state[name].cpu().clone())
        rows = {name.removeprefix(_ROWS): t.cpu().clone() for name, t in state.items() if name.startswith(_ROWS)}
        self._rows = self._build(rows) if rows else None
        self._added = int(state["added"])

    def _age(self, iteration: int) -> Tensor:
        return iteration - self._born

    def _keep(self, index: Tensor) -> None:
        assert self._rows is not None
        self._rows = self._rows.select(index)
        for name in _INDEX:
            setattr(self, f"_{name}", getattr(self, f"_{name}")[index])


def tensors_of(table: Any) -> dict[str, Tensor]:
    """The tensors among the fields of a dataclass, by name."""
    values = {f.name: getattr(table, f.name) for f in fields(table)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def answers(tensors: dict[str, Tensor]) -> Tokens:
    """Answers of a model that writes, without what it was given: `inputs` are None."""
    return Tokens(**tensors, inputs=(None,) * len(tensors["ids"]))


def gathered(rows: Tokens, place: Tensor, size: int, total: Callable[[Tensor], Tensor]) -> Tokens:
    """The answers of all processes as one table of `size` rows, from each one's own and their places [N] among all.

    `total` adds a tensor up over the processes. `inputs` are None.
    """
    place = place.cpu()
    lengths = torch.zeros(size, dtype=torch.int64)
    lengths[place] = rows.present.sum(1).cpu()
    places = int(total(lengths).max())

    def everyones(own: Tensor) -> Tensor:
        wide = own.cpu() if own.dim() == 1 else pad(own.cpu()[:, :places], (0, places - min(places, own.shape[1])))
        table = torch.zeros(size, *wide.shape[1:], dtype=torch.int64 if own.dtype == torch.bool else own.dtype)
        table[place] = wide.to(table.dtype)
        return total(table).to(own.dtype)  # sums of one number and zeros: exact in any type

    return answers({name: everyones(tensor) for name, tensor in tensors_of(rows).items()})


def capacity(version: int, accepted: int, running: int, batch: int, max_staleness: int) -> int:
    """How many more samples may be started, so that none is used too late (AReaL, arXiv:2505.24298).

    `accepted` samples are done and kept, from the first on, `running` ones are on their way, and each of the `version`
    updates so far took `batch` of them. With

        accepted + running <= (max_staleness + version + 1) batch

    samples that are used in the order of their start are at most `max_staleness` updates older than the policy that
    trains on them. 0 where no more may be started.
    """
    return max(0, (max_staleness + version + 1) * batch - accepted - running)


def _exponential(*key: int) -> float:
    """An exponential variate of mean 1 as a function of its key."""
    return -math.log(((stable_seed(*key) >> 12) + 0.5) / 2**52)
