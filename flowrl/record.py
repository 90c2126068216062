"""Single-pass updates: keep the graphs of the rollout's own evaluations, and the update needs no second forward pass.

With one optimiser step for a rollout the policy that is trained is the one that drew the samples: the ratio is exactly
1, and the velocity of a stored state would be computed a second time to the same numbers.

Symbols: N states of one call, M stored states of a rollout, *L latent dimensions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.policy import Policy
from flowrl.types import Cond


@dataclass(kw_only=True)
class Recorder:
    """Evaluates the states that are stored, and keeps their graphs while they fit into a share of the free memory."""

    policy: Policy
    states: int
    """How many states the rollout will store."""
    memory_share: float | None = None
    """Share of the free memory that the graphs may take; None = whatever they take."""
    velocities: list[Tensor] = field(default_factory=list)
    given_up: bool = False
    """The first portion showed that the graphs would not fit: evaluate without from then on."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] without its graph, which stays here."""
        if self.given_up:
            return self.policy.velocity(x, t, cond)
        with torch.enable_grad():
            if self.memory_share is not None and not self.velocities:
                velocity, size = _measured(self.policy, x, t, cond)
                free = free_memory(x.device)
                self.given_up = free is not None and size / len(x) * self.states > self.memory_share * free
            else:
                velocity = self.policy.velocity(x, t, cond)
        if not self.given_up:
            self.velocities.append(velocity.float())
        return velocity.detach()

    def result(self) -> Tensor | None:
        """Velocities [M,*L] of the stored states by their number, with graph; None where none was kept."""
        return None if self.given_up or not self.velocities else torch.cat(self.velocities)


def _measured(policy: Policy, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, int]:
    """The velocity, and the bytes that its graph keeps alive besides the weights."""
    seen = {p.untyped_storage().data_ptr() for p in policy.model.trainable.parameters()}
    size = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal size
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, _unchanged):
        velocity = policy.velocity(x, t, cond)
    return velocity, size


def _unchanged(tensor: Any) -> Any:
    return tensor


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that could still be allocated there; None where the system does not say. `root` holds /proc and /sys."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    groups = root / "sys/fs/cgroup"
    left = [
        _number(root / "proc/meminfo", "MemAvailable:", unit=1024),
        # A container sees the memory of its host there, and is killed at its own limit.
        _left(groups / "memory.max", groups / "memory.current"),
        _left(groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ]
    return min((number for number in left if number is not None), default=None)


def _left(limit: Path, used: Path) -> int | None:
    most, now = _number(limit), _number(used)
    return None if most is None or now is None else max(0, most - now)


def _number(file: Path, label: str = "", unit: int = 1) -> int | None:
    """The number behind `label` in a file; None where there is none, such as the word "max"."""
    try:
        found = re.search(rf"^{label}\s*(\d+)", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * unit if found else None
