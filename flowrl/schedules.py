"""Numbers that change along a run: piecewise linear between points, constant before the first and after the last.

0.5                          always
[[0, 0], [500, 0.5]]         rises for 500 iterations, then stays
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator

Points = tuple[tuple[float, float], ...]


def _rising(schedule: float | Points) -> float | Points:
    if isinstance(schedule, tuple):
        if not schedule:
            raise ValueError("a schedule without points has no value; give a number, or [[at, value], ...].")
        if any(after[0] <= before[0] for before, after in pairwise(schedule)):
            raise ValueError(f"the points of a schedule must come in rising order, got {[list(p) for p in schedule]}.")
    return schedule


Schedule = Annotated[float | Points, AfterValidator(_rising)]


def value_at(schedule: float | Points, at: float) -> float:
    """The schedule's value there."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    if at <= schedule[0][0]:
        return float(schedule[0][1])
    for (start, low), (end, high) in pairwise(schedule):
        if at <= end:
            return low + (high - low) * (at - start) / (end - start)
    return float(schedule[-1][1])


def values(schedule: float | Points) -> tuple[float, ...]:
    """All values that its ends and corners take: between them lie all others."""
    return tuple(value for _, value in schedule) if isinstance(schedule, tuple) else (float(schedule),)
