"""The ratio of an untouched policy, measured: float32 is exact to rounding, bfloat16 depends on the batch."""

import pytest

from flowrl.numerics import deviations

pytestmark = pytest.mark.slow


def test_the_same_batch_gives_the_same_ratio_and_bfloat16_costs_more():
    exact, coarse = deviations("tiny/sd3")
    assert (exact.dtype, coarse.dtype) == ("float32", "bfloat16")
    assert exact.same_batch <= 1e-6 and exact.one_by_one <= 1e-5
    assert coarse.same_batch <= 1e-6  # equal portions, equal rounding
    assert coarse.one_by_one > exact.one_by_one
