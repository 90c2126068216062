"""Exponential moving average of the trained weights: e <- d e + (1 - d) w after each optimiser step (Polyak, 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

COUNT = "count"


class EMA:
    """The average of named parameters, which can take their place.

    `warmup` lowers the decay to (1 + n) / (10 + n) at update n = 0, 1, ..., as Flow-GRPO does, so that a short run's
    average does not stay at its first weights.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}; null switches the average off.")
        self.decay, self.warmup, self.count = decay, warmup, 0
        self._parameters = dict(parameters)
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._applied = False

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """Moves the average towards the weights, by the decay it was built with or this one; once a step."""
        self._refuse_while_applied("update")
        if decay is None:
            decay = min((1 + self.count) / (10 + self.count), self.decay) if self.warmup else self.decay
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach(), 1 - decay)
        self.count += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold the average; after it exactly what they held before."""
        self._refuse_while_applied("applied")
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._swap()
            self._applied = False

    def equals_weights(self) -> bool:
        """Whether the average is the weights, bit by bit."""
        return all(torch.equal(self._average[name], p) for name, p in self._parameters.items())

    def reset(self) -> None:
        """Starts the average again at the present weights."""
        self._refuse_while_applied("reset")
        self.count = 0
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, and the number of updates; copies on the CPU."""
        self._refuse_while_applied("state_dict")
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._average.items()}
        return {**tensors, COUNT: torch.tensor(self.count)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; the names must be the same."""
        self._refuse_while_applied("load_state_dict")
        if set(state) != {*self._average, COUNT}:
            raise ValueError(f"average of other weights: {_difference(set(state), {*self._average, COUNT})}")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
        self.count = int(state[COUNT])

    @torch.no_grad()
    def _swap(self) -> None:
        # Values change places through a real copy: on a CPU `.detach()` and `.cpu()` are aliases, and with one of them
        # as the store the live weights would be lost.
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(kept)

    def _refuse_while_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"EMA.{what} inside `with applied()`: the average and the weights have changed places.")


def _difference(given: set[str], own: set[str]) -> str:
    missing, extra = sorted(own - given), sorted(given - own)
    return f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
