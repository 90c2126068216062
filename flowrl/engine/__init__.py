"""Where a run runs: one process, or several that share the work. `connect(name)` gives the engine of a config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from flowrl.resolve import resolve


class Engine(Protocol):
    """The few things that processes must do together. Each must be called by every process, in the same order."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every process."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """One text from each process, in rank order, on every process."""
        ...

    def close(self) -> None:
        """Leave the group cleanly."""
        ...


class EngineError(RuntimeError):
    """Processes could not be joined, or one of them failed."""


def connect(name: str, device: str = "auto") -> Engine:
    """The engine `local`, `accelerate`, `package.module:attr` or `./file.py:attr`, joined to its group.

    Raises EngineError when a launcher started several processes and the engine would run them unconnected: that would
    look like a run on N devices and be N equal runs.
    """
    engine: Engine = resolve(name, "flowrl.engine")(device)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if engine.world != launched:
        raise EngineError(
            f"{launched} processes were launched (WORLD_SIZE), but engine '{name}' joined {engine.world}. "
            "Set engine.name=accelerate and launch with `torchrun --standalone --nproc_per_node N -m flowrl train ...`."
        )
    return engine


def default_device(device: str = "auto") -> torch.device:
    """`auto` means the process's accelerator when there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        return torch.device(f"{kind.type if kind else 'cuda'}:{os.environ.get('LOCAL_RANK', '0')}")
    return torch.device("cpu")


@contextmanager
def together(engine: Engine) -> Iterator[None]:
    """All processes leave this block, or all of them stop with the error of the one that failed in it."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    raise_together(engine, error)


def raise_together(engine: Engine, error: BaseException | None) -> None:
    """Stop every process when one failed, with that one's own message, so that none waits in a collective for ever."""
    messages = engine.gather_text("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise EngineError(f"process {rank} failed: {message}")
