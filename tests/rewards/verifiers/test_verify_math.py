"""Mathematics: against sympy, which the fallback does without, and against the traps of math-verify."""

import random
import threading
import time

import pytest
import sympy

from rewards import RewardError
from rewards.verifiers import Answer, build
from rewards.verifiers._expression import Collection, TooLarge, Unreadable, Value, read, same
from rewards.verifiers.math import Math, equal

EQUAL = [
    ("42", "42.0"),
    ("1,234", "1234"),
    ("$18", "18"),
    ("18 dollars", "18"),
    (r"5\text{ cm}^2", "5"),
    ("5 cm", r"5\mathrm{cm}"),
    (r"60^\circ", "60"),
    ("20%", "0.2"),
    (r"20\%", "20"),
    ("12 percent", "0.12"),
    (r"\frac{3}{4}", "0.75"),
    (r"\dfrac12", "1/2"),
    (r"-\frac12", "-.5"),
    (r"1\frac{1}{2}", "1.5"),
    ("3:4", "0.75"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\sqrt[3]{-27}", "-3"),
    (r"3 \times 10^{4}", "30000"),
    ("1e3", "1000"),
    ("2**-1", ".5"),
    ("-2^2", "-4"),
    ("5!", "120"),
    ("|-3|", "3"),
    ("3.14159", r"\pi"),
    (r"\sin(\pi)", "0"),
    ("x = 5", "5"),
    ("f(x) = 2x", "2x"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    (r"x_1 + x_{2}", "x_2+x_1"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("1 and 2", "2, 1"),
    ("x = 1 or x = 2", "1, 2"),
    (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)"),
    ("(1, 2), (3, 4)", "(3, 4), (1, 2)"),
    ("2^{2024}", "4^{1012}"),
    ("0", "-0"),
    ("East", r"\text{east}"),
]
DIFFERENT = [
    ("41", "42"),
    ("1/3", "0.3333"),
    ("(1, 2)", "(2, 1)"),
    ("(0, 1]", "(0, 1)"),
    (r"\{1, 1\}", r"\{1, 2\}"),
    ("1, 2, 3", "1, 2"),
    ("20%", "0.2%"),
    ("(x+1)^2", "x^2 + 2x + 2"),
    ("B", "C"),
    (r"\infty", r"-\infty"),
    ("2^{2024}", "2^{2024} - 1"),
    ("9**9**9", "1"),
]
UNKNOWN = [
    "east",
    "1 2",
    "log 5",
    "",
    "{",
    "(1",
    r"\frac{1}{0}",
    r"\pm 2",
    "x + y = 1",
    "__import__('os')",
    "(-1)^{0.5}",
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert equal(a, b) is True and equal(b, a) is True


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert equal(a, b) is False


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_cannot_be_read_is_no_verdict(text):
    assert equal(text, "7") is None
    with pytest.raises(Unreadable):
        read(text)


def test_words_are_no_products_of_letters():
    """math-verify takes them for such."""
    assert equal("seat", "east") is None
    assert score(Math(), ("seat", "east"), ("east", "East")) == [None, 1]


def test_values_agree_with_sympy():
    """Random LaTeX with fractions, roots, powers and products, and its value by sympy from the same tree."""
    draw = random.Random(0)

    def tree(depth):
        if depth == 0:
            number = draw.randint(1, 12)
            return str(number), sympy.Integer(number)
        (a, x), (b, y) = tree(depth - 1), tree(depth - 1)
        kind = draw.choice("+-*/rq")
        if kind == "/":
            return rf"\frac{{{a}}}{{{b}}}", x / y
        if kind == "r":
            return rf"\sqrt{{{a}}}", sympy.sqrt(x)
        if kind == "q":
            return rf"\left({a}\right)^{{2}}", x**2
        sign = {"+": "+", "-": "-", "*": r"\cdot "}[kind]
        return rf"({a}){sign}({b})", {"+": x + y, "-": x - y, "*": x * y}[kind]

    seen = 0
    for _ in range(150):
        text, value = tree(3)
        if not value.is_real or not value.is_finite:
            continue
        seen += 1
        (found,) = read(text).at
        assert float(found) == pytest.approx(float(value), rel=1e-9, abs=1e-9), text
    assert seen > 100


def test_what_is_exact_stays_exact():
    assert read("2^{2024} - 1").at == (2**2024 - 1,)
    assert read("0.1 + 0.2") == read("0.3")
    assert isinstance(read("(1, 2)"), Collection) and isinstance(read("(1)"), Value)
    assert same(read("10^{30}"), read("10^{30} + 1")) is False


@pytest.mark.parametrize("text", ["9**9**9", "9^{9^{9}}", "10^{400}!", "1001!", "2^{100000}", "1" * 2001])
def test_too_large_is_not_computed(text):
    start = time.perf_counter()
    with pytest.raises(TooLarge):
        read(text)
    assert time.perf_counter() - start < 0.5


# ------------------------------------------------------------------------------------------------ the verifier


def score(verifier, *pairs):
    scores = verifier.score([Answer(response, meta={"answer": gold}) for response, gold in pairs])
    return [None if value != value else value for value in scores.value.tolist()]


@pytest.fixture(scope="module")
def rules():
    return Math(symbolic=False)


@pytest.fixture(scope="module")
def symbolic():
    pytest.importorskip("math_verify")
    verifier = Math(timeout=4.0)
    yield verifier
    verifier.unload()


def test_the_traps_of_math_verify(rules):
    pairs = [
        ("<answer>42</answer>", 42),  # reads nothing there
        (r"\boxed{41}, so \boxed{42}", "42"),  # takes both for a set
        ("<answer>B</answer>", "B"),  # reads no letters
        ("<answer>20%</answer>", "0.2"),
    ]
    assert score(rules, *pairs) == [1, 1, 1, 1]


def test_verdicts(rules):
    assert score(rules, ("<think>5</think>", "5"), ("it is 5", "5"), (r"\boxed{5}", r"$\boxed{5}$")) == [0, 0, 1]
    assert score(rules, ("<answer>x + y = 2</answer>", "x + y = 1")) == [None]
    assert score(rules, (r"\boxed{9^{9^9}}", "1"), (r"\boxed{5}", ["4", "5"]), ("6", [4, 5])) == [0, 1, 0]
    (info,) = rules.score([Answer("q", meta={"answer": "x=y=z"})]).info
    assert "cannot be read" in info["error"] and info["read"] == "q"


def test_strict():
    assert score(Math(strict=True, symbolic=False), ("5", "5"), ("<answer>5</answer>", "5")) == [0, 1]


def test_math_verify_decides_what_is_not_read(symbolic, rules):
    pairs = [(r"\boxed{\int_0^1 x dx}", "1/2"), (r"\boxed{xy + 1}", "1 + yx"), (r"\boxed{\int_0^1 x dx}", "1/3")]
    assert score(symbolic, *pairs) == [1, 1, 0]
    assert score(rules, *pairs) == [0, None, 0]


def test_math_verify_works_in_any_thread(symbolic):
    found = []
    threads = [threading.Thread(target=lambda: found.append(score(symbolic, ("xy", "yx")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1]] * 3


def test_math_verify_is_stopped_and_started_again():
    pytest.importorskip("math_verify")
    verifier = Math(timeout=1.0)
    assert score(verifier, ("xy", "yx")) == [1]
    start = time.perf_counter()
    assert score(verifier, (r"\boxed{\sum_{k=1}^{10^9} k!}", "1/2")) == [None]
    assert time.perf_counter() - start < 3
    assert score(verifier, ("xy", "yx")) == [1]
    process = verifier._symbolic._process
    verifier.unload()
    assert process.poll() is not None
    verifier.unload()


def test_math_verify_is_not_asked_what_it_chokes_on(symbolic):
    score(symbolic, ("xy", "yx"))  # it has started
    nasty = ["[" * 250, "(" * 125 + ")" * 125, "f(" * 120, "(1,2)," * 40, '{"a":' * 50, "\\(" * 120, "x" * 301]
    start = time.perf_counter()
    assert score(symbolic, *((text, "42") for text in nasty)) == [0] * len(nasty)
    assert time.perf_counter() - start < 1


def test_no_text_is_run(symbolic, tmp_path):
    sentinel = tmp_path / "owned"
    nasty = [f"__import__('os').mkdir('{sentinel}')", f"open('{sentinel}','w')", "print.__globals__", "exec('x=1')"]
    assert all(each in (0, None) for each in score(symbolic, *((rf"\boxed{{{text}}}", "1") for text in nasty)))
    assert not sentinel.exists()


@pytest.mark.parametrize(("options", "message"), [({"timeout": 0}, "timeout is 0"), ({"strikt": True}, "'strikt'")])
def test_wrong_options_say_so(options, message):
    with pytest.raises(RewardError, match=message):
        build("verifiers.math", options)
