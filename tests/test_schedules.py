"""Piecewise-linear schedules."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from flowrl.schedules import Schedule, value_at, values

READ = TypeAdapter(Schedule)


def test_a_number_is_a_constant():
    assert value_at(READ.validate_python(0.3), -5) == value_at(0.3, 1e9) == 0.3
    assert values(0.3) == (0.3,)


def test_points_are_joined_by_lines_and_held_outside():
    points = READ.validate_python([[10, 1.0], [50, 0.25], [60, 0.0]])
    for at in (-3, 10, 11, 30.5, 50, 55, 60, 999):
        assert value_at(points, at) == pytest.approx(np.interp(at, [10, 50, 60], [1.0, 0.25, 0.0]))
    assert values(points) == (1.0, 0.25, 0.0)


@pytest.mark.parametrize("bad", [[], [[5, 1], [5, 2]], [[5, 1], [1, 2]]])
def test_points_that_do_not_rise_are_refused(bad):
    with pytest.raises(ValidationError, match="point"):
        READ.validate_python(bad)
