"""What a response answers: the last mark counts, and thinking never does."""

import pytest

from rewards.verifiers.extract import answer_of, last_between, last_boxed, spoken


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>2 + 2</think><answer>4</answer>", "4"),
        ("<answer>41</answer> no, <answer> 42 </answer>", "42"),
        ("<answer><|begin_of_box|>7<|end_of_box|></answer>", "7"),
        (r"<answer>So \boxed{3}.</answer>", "3"),
        (r"\boxed{41} or rather \boxed{42}", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {6}", "6"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{ { \boxed{8}", "8"),
        (r"<think>\boxed{1} <answer>1</answer></think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> 2", "2"),
        ("thought without its opening </think> 2", "2"),
        ("12 <think> is it 13?", "12"),
        ("The answer is 42.", "42"),
        ("The final answer is: **B**", "B"),
        ("Answer: 3.5 cm. That is because 3 + 0.5 = 3.5.", "3.5 cm"),
        ("The answer is 1? No. The answer is\n2", "2"),
        ("just words", "just words"),
        ("<answer>42", "<answer>42"),
    ],
)
def test_the_answer(response, answer):
    assert answer_of(response) == answer


@pytest.mark.parametrize("response", ["", "  ", r"<think>\boxed{1}", "<answer></answer>", r"\boxed{}", "x</think>"])
def test_no_answer(response):
    assert answer_of(response) is None


def test_strict_takes_only_what_is_marked():
    assert answer_of("the answer is 3", strict=True) is None
    assert answer_of("3", strict=True) is None
    assert answer_of("<answer>3", strict=True) is None
    assert answer_of(r"\boxed{3}", strict=True) == "3"
    assert answer_of("<answer>3</answer>", strict=True) == "3"


def test_phrases_can_be_left_out():
    assert answer_of("Question: why? Answer: because", phrases=False) == "Question: why? Answer: because"


def test_only_closed_pairs_count():
    assert last_between("<a>1</a><a>2", "<a>", "</a>") == "1"
    assert last_between("<a>1</a> </a>", "<a>", "</a>") == "1"
    assert last_between("</a><a>", "<a>", "</a>") is None
    assert last_boxed("\\boxed{1}}}}") == "1"
    assert last_boxed(r"\boxed{a\}b}") == r"a\}b"
    assert last_boxed(r"\boxed 5") is None
    assert spoken("a</think>b</think>c<think>d<think>e") == "c"
