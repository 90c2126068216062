"""No behaviour change goes unseen: the recorded losses come out again."""

import json

import pytest

from tests.algorithms.golden import CASES, PATH, trace

# Small differences of fp32 numbers; other processors also round the rest differently, in the last digit.
FEWER_DIGITS = ("kl", "approx_kl", "ratio_max_dev")


@pytest.mark.parametrize("name", CASES)
def test_trace_is_the_recorded_one(name):
    recorded = json.loads(PATH.read_text())[name]
    found = trace(name)
    assert len(found) == len(recorded) == 20
    for iteration, (now, then) in enumerate(zip(found, recorded, strict=True)):
        assert now.keys() == then.keys()
        for key, value in then.items():
            rel, tiny = (1e-3, 1e-9) if key in FEWER_DIGITS else (1e-6, 5e-7)
            assert now[key] == pytest.approx(value, rel=rel, abs=tiny), f"{name}, iteration {iteration}: {key}"
