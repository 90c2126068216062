"""Which cells of a large matrix of tests `make test` runs, by their places; `make test-all` runs the others too."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest


def places(cells: Iterable[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Of every cell of a test, {parameter: value}, the places of its values in the order in which they came."""
    seen: dict[str, dict[int, int]] = {}
    for cell in cells:
        known = [(seen.setdefault(name, {}), value) for name, value in cell.items()]
        yield [place.setdefault(id(value), len(place)) for place, value in known]


def runs_always(places: Iterable[int], n: int) -> bool:
    """Whether a cell of a test marked `one_in(n)` is no further one: its places in the lists of its parameters add up
    to a multiple of n.

    Along each list the places rise by one, so a value has such a cell with any n values of another parameter.
    """
    return sum(places) % n == 0


def thinned(values: Sequence[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test; those that are not to be kept are marked exhaustive."""
    return [value if keep(value) else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


def one_of_each(values: Iterable[Any], kind: Callable[[Any], Hashable]) -> set[Any]:
    """A value of every kind, of each kind that of another place: the first, the second and so on, and round again."""
    groups: dict[Hashable, list[Any]] = {}
    for value in values:
        groups.setdefault(kind(value), []).append(value)
    return {group[place % len(group)] for place, group in enumerate(groups.values())}
