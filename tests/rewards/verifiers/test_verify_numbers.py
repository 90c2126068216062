"""Numbers with a tolerance, counts, options, yes and no, the same words."""

import pytest

from rewards import RewardContractError
from rewards.verifiers import NoVerdict
from rewards.verifiers._numbers import quantity
from rewards.verifiers.counting import counting
from rewards.verifiers.exact import exact
from rewards.verifiers.multiple_choice import multiple_choice
from rewards.verifiers.numeric import regression, rounded, within
from rewards.verifiers.yes_no import yes_no


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("about 12.5 apples", 12.5),
        ("1,234,567 people", 1234567),
        ("from 3 to -5", -5),
        ("−7", -7),
        ("x-1", 1),
        (r"\frac{1}{4}", 0.25),
        (".5 of it", 0.5),
        ("it is 2.5e3 m long", 2500),
        ("a1", None),
        ("none", None),
        ("9" * 50, None),
    ],
)
def test_the_number_in_a_text(text, value):
    found = quantity(text)
    assert (found.value if found else None) == (pytest.approx(value) if text != "9" * 50 else pytest.approx(1e50))


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("<answer>105</answer>", 100, 1),
        ("95", "100", 1),
        ("105.1", 100, 0),
        ("94.9", 100, 0),
        ("21", 20, 1),
        ("-95", -100, 1),
        ("95", -100, 0),
        ("0.05", 0, 1),
        ("0.06", 0, 0),
        ("20%", 0.2, 1),
        ("20%", 20, 1),
        ("0.2", "20%", 1),
        ("20%", "0.2%", 0),
        ("no idea", 1, 0),
        ("<think>100</think>", 100, 0),
    ],
)
def test_within_five_percent(response, gold, expected):
    assert within(response, gold) == expected


def test_within_needs_a_right_number():
    for gold in ("many", True, None):
        with pytest.raises(NoVerdict, match="is no number"):
            within("1", gold)


def test_regression_is_one_minus_the_relative_error():
    assert regression("8", 10) == pytest.approx(0.8)
    assert regression("30", 10) == 0
    assert regression("10", 10) == 1
    assert regression("-10", 10) == 0
    assert (regression("0", 0), regression("0.1", 0), regression("", 5)) == (1, 0, 0)


def test_rounded_wants_the_same_kind_of_number():
    assert rounded("3.141", 3.14) == 1
    assert rounded("3.15", 3.14) == 0
    assert rounded("3", 3.0) == 0  # "3" is written without decimals
    assert rounded("3", 3) == 1


@pytest.mark.parametrize(
    ("response", "gold", "hard", "soft"),
    [
        ("[4]", 4, 1, 1),
        ("first [2], then [4]", 4, 1, 1),
        ("there are 4 of 9 left: 4", 4, 1, 1),
        ("<answer>5</answer>", 4, 0, 0.75),
        ("<answer>three dogs</answer>", 3, 1, 1),
        ("100", 4, 0, 0),
        ("4.5", 4, 0, 0),
        ("1", 0, 0, 0),
        ("0", 0, 1, 1),
        ("lots", 4, 0, 0),
    ],
)
def test_counting(response, gold, hard, soft):
    assert counting(response, gold) == hard
    assert counting(response, gold, soft=True) == pytest.approx(soft)


def test_counting_without_words():
    assert counting("three", 3, words=False) == 0
    with pytest.raises(NoVerdict, match="no count"):
        counting("3", 2.5)


OPTIONS = ["red", "dark red", "a blue sky", "none"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("**B**", 1),
        ("B. dark red", 1),
        ("(B) dark red", 1),
        ("The answer is B", 1),
        (r"\boxed{B}", 1),
        ("I choose option B", 1),
        ("dark red", 1),
        ("Dark  Red.", 1),
        ("A", 0),
        ("Z", 0),
        ("red", 0),
        ("option A or option B", 0),
        ("B. dark red, or maybe option A", 0),
        ("it is dark red", 0),  # "red" is in it too
        ("A Bird Can Dive", 0),  # capitals are no letters of options
        ("B and C", 0),
        ("", 0),
        ("<think>B</think>", 0),
    ],
)
def test_multiple_choice(response, expected):
    assert multiple_choice(response, "B", OPTIONS) == expected


def test_multiple_choice_by_text():
    assert multiple_choice("it is a blue sky", "C", OPTIONS) == 1
    assert multiple_choice("C", "a blue sky", OPTIONS) == 1
    assert multiple_choice("blue", "B", {"A": "red", "B": "blue"}) == 1
    assert multiple_choice("blue", "B", ["A. red", "(B) blue"]) == 1
    assert multiple_choice("y", "B", ["x", "y"]) == 1
    assert multiple_choice("D", "D") == 1


def test_multiple_choice_knows_its_letters():
    with pytest.raises(NoVerdict, match="none of the options A, B"):
        multiple_choice("C", "C", ["x", "y"])
    with pytest.raises(NoVerdict):
        multiple_choice("C", "C", count=2)
    assert multiple_choice("C", "A", count=2) == 0


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("Yes.", "yes", 1),
        ("<answer>no</answer>", "No", 1),
        ("true", True, 1),
        ("no", True, 0),
        ("yes and no", "yes", 0),
        ("I know", "no", 0),
        ("yesterday", "yes", 0),
        ("", "no", 0),
        ("<think>yes</think> no", "yes", 0),
    ],
)
def test_yes_no(response, gold, expected):
    assert yes_no(response, gold) == expected


def test_yes_no_of_neither_is_no_verdict():
    with pytest.raises(NoVerdict, match="neither yes nor no"):
        yes_no("", "")


def test_exact():
    assert exact("<answer>Ｐaris. </answer>", "paris") == 1
    assert exact("London", ["Paris", "london"]) == 1
    assert exact("London", "Paris") == 0
    assert exact("London", "Paris", mismatch="unknown") is None
    assert exact("", "Paris", mismatch="unknown") == 0
    with pytest.raises(RewardContractError, match="mismatch is 'x'"):
        exact("London", "Paris", mismatch="x")
