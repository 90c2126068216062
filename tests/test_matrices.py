"""What `make test` leaves of a matrix has every value of every parameter."""

from itertools import product

import pytest

from tests.matrices import one_of_each, places, runs_always, thinned


@pytest.mark.parametrize("lengths", [(25, 5), (25, 4), (4, 4), (25, 5, 2)])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_value_keeps_a_cell_where_another_parameter_has_n(lengths, n):
    cells = list(product(*map(range, lengths)))
    kept = [cell for cell in cells if runs_always(cell, n)]
    assert len(kept) == pytest.approx(len(cells) / n, abs=1)
    for axis, length in enumerate(lengths):
        assert {cell[axis] for cell in kept} == set(range(length))


def test_of_one_parameter_every_nth_stays():
    assert [place for place in range(7) if runs_always([place], 3)] == [0, 3, 6]


def test_values_of_a_kind_take_turns():
    assert one_of_each(["a1", "b1", "a2", "b2", "c1", "b3"], kind=lambda value: value[0]) == {"a1", "b2", "c1"}
    assert one_of_each([], kind=len) == set()


def test_what_is_not_kept_is_there_and_marked():
    odd = thinned([1, 2, 3], keep=lambda value: value % 2 == 1)
    assert odd[0] == 1 and odd[2] == 3
    assert odd[1].values == (2,) and [mark.name for mark in odd[1].marks] == ["exhaustive"]


def test_places_are_those_of_the_values():
    lists = {"row": "abc", "column": [{}, {}]}  # equal, and two
    cells = [dict(zip(lists, cell, strict=True)) for cell in product(*lists.values())]
    assert list(places(cells)) == [[row, column] for row in range(3) for column in range(2)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("row", range(2))
def test_the_mark_is_set_by_the_places(request, row, column):
    """Were nothing marked, the cells of odd places would run in `make test`, and fail."""
    if len(request.node.session.items) > 1:  # one that is chosen by its name has the first places
        assert (request.node.get_closest_marker("exhaustive") is not None) == ((row + column) % 2 == 1)
