"""Real iterations of models that write, through the one trainer: every method, every kind of model, every setting.

A new method in flowrl/algorithms joins by being there, and so does a new tiny model in flowrl/vlm/tiny.py.
"""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.grpo import GRPO
from flowrl.config import algorithm_class
from flowrl.resolve import available
from flowrl.vlm import tiny
from tests import runs
from tests.vlm.conftest import LONGEST, LORA, MEMBERS, STEADY

pytestmark = pytest.mark.slow


def token_methods():
    """Names of the files in flowrl/algorithms that are a method for answers."""
    found = []
    for name in available("flowrl.algorithms"):
        try:
            method = algorithm_class(name)
        except ValidationError:
            continue  # a part of methods
        if method().needs.tokens:
            found.append(name)
    return found


METHODS = token_methods()
EVERY = pytest.mark.parametrize("name", METHODS)


def test_the_methods_were_listed():
    assert {"grpo", "gspo", "reinforce_pp", "ppo"} <= set(METHODS)
    assert "flow_grpo" not in METHODS


def iterate(trainer, iterations=2):
    """The metrics of the first iterations, which are all sound and move the weights."""
    before, rows = runs.weights(trainer), []
    for iteration in range(iterations):
        rows.append(trainer.step(iteration))
        trainer.iteration = iteration + 1
    assert runs.distance(runs.weights(trainer), before) > 0
    for row in rows:
        bad = [key for key, value in row.items() if not runs.finite(value)]
        assert not bad
        assert row["ratio_first_update"] < 1e-4
    return rows


@EVERY
def test_every_method_trains(text_run, name):
    rows = iterate(text_run({"algorithm": {"name": name}}))
    assert rows[0]["calls/rollout"] > 0 and rows[0]["calls/train"] > 0
    assert 0 < rows[0]["text/tokens/all"] <= LONGEST
