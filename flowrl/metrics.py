"""Numbers about a run: means over many small parts, and where the time went."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class PhaseTimer:
    """Wall-clock seconds by phase: `with timer("collect"): ...`; a phase that comes again adds up."""

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        """`synchronize` (such as torch.cuda.synchronize) is called at both ends, to wait for what was only started."""
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize or (lambda: None)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside, also when it raises."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())


class RunningMean:
    """Weighted means of named numbers that come in parts; NaN means that there is nothing to count."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Any], weight: float = 1.0) -> None:
        """Add numbers (or tensors of one element) that stand for `weight` items each."""
        for name, value in values.items():
            number = float(value)
            if not math.isnan(number):
                self._sums[name] = self._sums.get(name, 0.0) + weight * number
                self._weights[name] = self._weights.get(name, 0.0) + weight
            else:
                self._sums.setdefault(name, 0.0)
                self._weights.setdefault(name, 0.0)

    def means(self) -> dict[str, float]:
        """The mean of each name; NaN for one of which only NaN was seen."""
        return {name: total / w if (w := self._weights[name]) else math.nan for name, total in self._sums.items()}


def summarize(values: Iterable[float], name: str) -> dict[str, float]:
    """Mean, standard deviation (of the values, not of the mean), smallest, largest, and share of NaN."""
    every = [float(value) for value in values]
    known = [value for value in every if not math.isnan(value)]
    if not known:
        return {f"{name}/nan_frac": 1.0 if every else 0.0}
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
    frac = 1 - len(known) / len(every)
    return {
        f"{name}/mean": mean, f"{name}/std": std, f"{name}/min": min(known), f"{name}/max": max(known),
        f"{name}/nan_frac": frac,
    }  # fmt: skip


def duration(seconds: float) -> str:
    """`1h 02m`, `3m 20s`, `4.2s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {rest:02d}s"
