"""What a reward may return, and the words with which anything else is refused."""

import math

import numpy as np
import pytest
import torch

from rewards import RewardContractError, Scores
from rewards.contract import Sheet, as_scores


async def _coroutine():
    return [1.0, 2.0]


REFUSED = {
    "missing return": (lambda: None, "returned None; expected 2 scores. Mend: a `return` is missing"),
    "one float": (lambda: 0.5, "returned float 0.5; expected a list or tensor of 2 numbers. Mend: return a list"),
    "one int": (lambda: 3, "returned int 3"),
    "string": (lambda: "ab", "returned str 'ab'; expected a list or tensor of 2 numbers"),
    "dict": (lambda: {"a": 1}, r"returned dict .*Scores\(value=..., parts=...\)"),
    "generator": (lambda: (x for x in (1.0, 2.0)), "returned generator"),
    "coroutine": (_coroutine, "a coroutine.*plain function"),
    "too few": (lambda: [1.0], "returned 1 scores; expected 2, one per sample. Mend: .*NaN or None"),
    "too many": (lambda: torch.zeros(3), r"returned shape \[3\]; expected \[2\], one score per sample. Mend"),
    "strings": (lambda: ["0.5", "1"], "returned str '0.5' for sample 0; expected a number. Mend: use float"),
    "bools": (lambda: [1.0, True], "returned bool True for sample 1; .*use float.* yes or no"),
    "numpy bools": (lambda: [np.bool_(True), 1.0], "returned bool True for sample 0"),
    "nested": (lambda: [[1.0], [2.0]], r"returned list \[1.0\] for sample 0"),
    "complex": (lambda: [1j, 2.0], "returned complex 1j for sample 0"),
    "bool tensor": (lambda: torch.tensor([True, False]), r"values of torch.bool; .*\.float\(\).* 1\.0"),
    "bool array": (lambda: np.array([True, False]), "values of torch.bool"),
    "object array": (lambda: np.array(["a", "b"]), "an array of <U1; expected numbers"),
    "column": (lambda: torch.zeros(2, 1), r"shape \[2, 1\]; .*Mend: use .reshape\(2\) or .squeeze\(1\)"),
    "row": (lambda: torch.zeros(1, 2), r"shape \[1, 2\]; .*\.squeeze\(0\)"),
    "mean of the batch": (lambda: torch.tensor(0.5), r"shape \[\]; .*do not average over the batch"),
    "an image": (lambda: torch.zeros(2, 3, 8), r"shape \[2, 3, 8\]; .*flatten\(1\)\.mean\(1\)"),
    "graph": (lambda: torch.zeros(2, requires_grad=True), r"gradient graph; .*detach\(\)"),
    "part": (
        lambda: Scores(value=torch.zeros(2), parts={"a": torch.zeros(3)}),
        r"reward 'mine/a' returned shape \[3\]",
    ),
    "parts": (lambda: Scores(value=torch.zeros(2), parts=[1]), "parts of type list; expected a dict"),
    "info": (lambda: Scores(value=torch.zeros(2), info=[{}]), "returned 1 info dicts; expected 2"),
    "info type": (lambda: Scores(value=torch.zeros(2), info=["a", "b"]), "info of type list; expected a list with one"),
}


@pytest.mark.parametrize(("returned", "message"), REFUSED.values(), ids=REFUSED)
def test_a_broken_contract_says_what_and_how_to_mend_it(returned, message):
    with torch.no_grad(), pytest.raises(RewardContractError, match=message) as caught:
        as_scores(returned(), 2, "mine")
    assert "reward 'mine" in str(caught.value)


ACCEPTED = {
    "list": [1, 2.5],
    "tuple": (1.0, 2.5),
    "zero-dimensional tensors": [torch.tensor(1.0), torch.tensor(2.5)],
    "numpy scalars": [np.float32(1), np.float64(2.5)],
    "array": np.array([1.0, 2.5]),
    "double": torch.tensor([1.0, 2.5], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
    "scores": Scores(value=torch.tensor([1.0, 2.5])),
}


@pytest.mark.parametrize("returned", ACCEPTED.values(), ids=ACCEPTED)
def test_numbers_in_any_usual_form_become_fp32(returned):
    scores = as_scores(returned, 2, "mine")
    assert scores.value.dtype == torch.float32
    assert scores.value.tolist() == [1.0, 2.5]
    assert scores.info == [{}, {}]


def test_scores_are_fp32_whatever_the_default_dtype_is():
    """A library that loads a model in another thread may have changed it for a moment."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        value = as_scores([18.123456, None], 2, "mine").value
        sheet = Sheet(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert value[0].item() == pytest.approx(18.123456, abs=1e-6)
    assert value.dtype == sheet.value.dtype == torch.float32


def test_integers_are_numbers():
    assert as_scores(torch.tensor([1, 0]), 2, "mine").value.tolist() == [1.0, 0.0]


def test_none_nan_and_infinities_are_all_no_verdict():
    value = as_scores([None, math.nan, math.inf, -math.inf, 0.0], 5, "mine").value
    assert value.isnan().tolist() == [True] * 4 + [False]


def test_where_gradients_are_on_scores_keep_their_graph_and_parts_do_not():
    x = torch.tensor([1.0, math.inf, 3.0], requires_grad=True)
    scores = as_scores(Scores(value=2 * x, parts={"x": 3 * x}), 3, "mine")
    assert not scores.parts["x"].requires_grad
    scores.value[[0, 2]].sum().backward()
    assert scores.value.isnan().tolist() == [False, True, False]
    assert x.grad.tolist() == [2, 0, 2]


def test_no_samples_are_fine():
    assert as_scores([], 0, "mine").value.shape == (0,)


def test_no_nan_is_without_a_reason():
    sheet = Sheet(3)
    sheet.fail([1], "ValueError: no face")
    sheet.put([0, 2], as_scores(Scores(value=torch.tensor([1.0, math.nan]), parts={"a": torch.ones(2)}), 2, "mine"))
    scores = sheet.scores()
    assert scores.info == [
        {},
        {"error": "ValueError: no face"},
        {"error": "the reward returned NaN, None or an infinity"},
    ]
    assert scores.parts["a"].isnan().tolist() == [False, True, False]
