"""Several processes' worth of trainers in threads of one process: the collectives are real, the launch is not.

trainers = [threaded.on_rank(rank, 2, lambda: Trainer(config)) for rank in range(2)]     config.engine.name = NAME
results = threaded.together([lambda t=t: t.step(0) for t in trainers])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

NAME = "tests.threaded:load"
TIMEOUT = 60

_place = threading.local()
_groups: dict[int, _Group] = {}


class _Group:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=TIMEOUT)
        self.slots: list[Any] = [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class Threaded:
    """An engine of `flowrl.engine` whose processes are threads."""

    def __init__(self, rank: int, world: int, group: _Group) -> None:
        self.rank, self.world, self.group, self.device = rank, world, group, torch.device("cpu")

    def sum(self, tensor):
        return torch.stack(self.group.exchange(self.rank, tensor.detach().clone())).sum(0)

    def barrier(self):
        self.group.exchange(self.rank, None)

    def gather_text(self, text):
        return self.group.exchange(self.rank, text)

    def close(self):
        self.barrier()


def load(device: str) -> Threaded:
    """The engine of the rank that is being built."""
    return Threaded(_place.rank, _place.world, _place.group)


def on_rank(rank: int, world: int, build: Callable[[], Any]) -> Any:
    """What `build` makes as a process of that rank; one rank after the other, rank 0 first."""
    if rank == 0:
        _groups[world] = _Group(world)
    _place.rank, _place.world, _place.group = rank, world, _groups[world]
    return build()


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Every job in a thread of its own; the result of each, or what it raised."""
    results: list[Any] = [None] * len(jobs)

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error
            for group in _groups.values():
                if not isinstance(error, threading.BrokenBarrierError) and group.barrier.n_waiting:
                    group.barrier.abort()  # the others would wait for this one until the timeout

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
