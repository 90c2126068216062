"""What `make test` leaves of a matrix has every value of every parameter."""

from itertools import product

import pytest

from tests.matrices import one_of_each, runs_always, thinned


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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", range(4))
def test_the_mark_is_set_by_the_place(request, place):
    """Were nothing marked, the cells of odd places would run and fail."""
    assert (request.node.get_closest_marker("exhaustive") is not None) == (place % 2 == 1)
