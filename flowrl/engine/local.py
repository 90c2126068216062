"""The engine of a single process."""

from __future__ import annotations

from torch import Tensor

from flowrl.engine import default_device


class Local:
    """One process on one device: every collective is the identity."""

    rank = 0
    world = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = default_device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def barrier(self) -> None:
        """Nothing to wait for."""

    def gather_text(self, text: str) -> list[str]:
        """The one text."""
        return [text]

    def close(self) -> None:
        """Nothing to leave."""


def load(device: str = "auto") -> Local:
    """The engine `local`."""
    return Local(device)
