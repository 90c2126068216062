"""Text that was read, its form, length, repetition, script and steps."""

import math
import random

import pytest

from rewards import RewardContractError
from rewards.ocr import levenshtein as plain_levenshtein
from rewards.verifiers import Answer, NoVerdict, Verifiers, build
from rewards.verifiers.cosine import cosine
from rewards.verifiers.format import boxed, tags, thinking
from rewards.verifiers.key_steps import complete, matched
from rewards.verifiers.language import cjk_share, mixed, other_than_asked
from rewards.verifiers.length import overlong, truncated
from rewards.verifiers.ocr import anls, cer, levenshtein, wer
from rewards.verifiers.repetition import boxes as repeated_boxes
from rewards.verifiers.repetition import ngrams
from rewards.verifiers.tool_call import tool_call

# ------------------------------------------------------------------------------------------------ OCR


def test_distance_is_the_plain_one():
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abcé ", k=draw.randrange(90))) for _ in range(2))
        assert levenshtein(a, b) == levenshtein(b, a) == plain_levenshtein(a, b)
    assert levenshtein("kitten", "sitting") == 3
    assert (levenshtein("", "abc"), levenshtein("abc", ""), levenshtein("", "")) == (3, 3, 0)
    assert levenshtein(["a", "b"], ["b"]) == 1


def test_cer():
    assert cer("<answer>hallo</answer>", "hello") == pytest.approx(0.8)
    assert cer("hello", "hello") == 1
    assert cer("", "hello") == 0
    assert cer("hello" * 100, "hello") == 0
    assert cer("HELLO", "hello") == 0 and cer("HELLO", "hello", fold=True) == 1
    assert cer("a  b\nc", "a b c") == 1
    assert cer("cafe\u0301", "caf\u00e9") == 1
    assert cer("", "") == 1 and cer("x", "") == 0
    assert cer("Answer: yes", "Answer: yes") == 1  # a transcript, no announcement of one
    assert cer("hello", ["xxxxx", "hello"]) == 1


def test_cer_at_the_border_of_the_short_cut():
    """From twice the length on nothing is computed; just below, the distance itself says the same."""
    for given in ("ab" * 2, "ab" * 2 + "c", "xabx", "abx"):
        expected = 1 - min(1, plain_levenshtein(given, "ab") / 2)
        assert cer(given, "ab") == pytest.approx(expected)


def test_wer():
    assert wer("the cat sat", "the cat sat") == 1
    assert wer("the dog sat", "the cat sat") == pytest.approx(2 / 3)
    assert wer("", "the cat") == 0


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("Hello", "hello", 1),
        ("hallo", "hello", 0.8),
        ("hxxxx", "hello", 0),
        ("ab", "abcd", 0),  # NL = 1/2 is not below 1/2
        ("abxx", "abcd", 0),  # nor is it where the lengths do not tell
        ("abcdef", "abcdefghij", 0.6),
        ("abc", "abcd", 0.75),
        ("abcd", ["zzzz", "abcx"], 0.75),
        ("", "", 1),
        ("x", "", 0),
        ("a b", "a  b", 1),
    ],
)
def test_anls(response, gold, expected):
    assert anls(response, gold) == pytest.approx(expected)


def test_a_page_is_too_long():
    with pytest.raises(NoVerdict, match="page by page"):
        cer("x", "x" * 30_000)


# ------------------------------------------------------------------------------------------------ form

GOOD = "<think>a</think>\n<answer>b</answer>"


@pytest.mark.parametrize(
    ("response", "form", "share"),
    [
        (GOOD, 1, 1),
        (f"  {GOOD}\n", 1, 1),
        ("<think>a</think><answer>b</answer>", 1, 1),
        ("<think>\na\n</think>  <answer>b<answer></answer>", 0, 0.75),
        ("<think>a</think> so <answer>b</answer>", 0, 1),
        (f"{GOOD} and more", 0, 1),
        ("<think>a<answer>b</answer></think>", 0, 1),
        ("<answer>b</answer><think>a</think>", 0, 1),
        ("<answer>b</answer>", 0, 0.5),
        (GOOD + GOOD, 0, 0),
        ("", 0, 0),
    ],
)
def test_form(response, form, share):
    assert (thinking(response), tags(response)) == (form, share)


def test_boxed_after_thinking():
    assert boxed(r"<think>\boxed{1}</think>") == 0
    assert boxed(r"<think>x</think> \boxed{1}") == 1


# ------------------------------------------------------------------------------------------------ length


@pytest.mark.parametrize(("tokens", "value"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (101, -1), (10_000, -1)])
def test_soft_overlong(tokens, value):
    assert overlong("", tokens, limit=100, buffer=20) == pytest.approx(value)


def test_overlong_without_floor():
    assert overlong("", 120, limit=100, buffer=20, floor=False) == pytest.approx(-2)
    with pytest.raises(RewardContractError, match="0 < buffer <= limit"):
        overlong("", 1, limit=10, buffer=20)
    with pytest.raises(NoVerdict, match="tokens is not given"):
        overlong("", None)


def test_truncated():
    assert (truncated("", True), truncated("", False)) == (-1, 0)


def test_cosine_by_hand():
    assert cosine(0, 100, 1.0, 0.5) == 1
    assert cosine(100, 100, 1.0, 0.5) == cosine(200, 100, 1.0, 0.5) == pytest.approx(0.5)
    assert cosine(50, 100, 1.0, 0.5) == pytest.approx(0.75)
    assert cosine(25, 100, -1.0, -0.5) == pytest.approx(-0.5 - 0.25 * (1 + math.cos(math.pi / 4)))


def test_cosine_depends_on_what_is_right():
    """VLM-R1's gives wrong answers the curve of right ones."""
    judge = Verifiers([{"use": "verifiers.cosine", "verifier": "verifiers.exact", "limit": 100}])
    cases = [("a", 0), ("a", 100), ("a", 500), ("b", 0), ("b", 100), ("a", None)]
    answers = [Answer(text, meta={"answer": "a"}, tokens=tokens) for text, tokens in cases]
    result = judge(answers)
    assert result.total[:5].tolist() == pytest.approx([1, 0.5, 0.5, -1, -0.5])
    assert result.total[5].isnan() and "tokens" in result.info[5]["verifiers.cosine"]["error"]
    assert result.parts["verifiers.cosine"]["right"].tolist() == [1, 1, 1, 0, 0, 1]
    assert build("verifiers.cosine", {"verifier": "verifiers.boxes.grounding"}).needs == ("answer",)


# ------------------------------------------------------------------------------------------------ repetition


def test_ngrams_by_hand():
    assert ngrams("a b c a b c a b c") == pytest.approx(-(1 - 3 / 7))
    assert ngrams("a b c d e") == 0
    assert ngrams("a b") == ngrams("") == 0
    assert ngrams("a a a a", n=1) == pytest.approx(-0.75)
    assert ngrams("a b. a b.", n=2, unit="word") == pytest.approx(-(1 - 2 / 3))
    assert ngrams("aaaa", n=1, unit="character") == pytest.approx(-0.75)


def test_ngrams_of_scripts_without_blanks():
    text = "我看见一只猫" * 5
    assert ngrams(text, unit="word") == 0  # one word
    assert ngrams(text) == pytest.approx(-(1 - 6 / 28))


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 1.5}, {"unit": "byte"}])
def test_ngrams_options(options):
    with pytest.raises(RewardContractError):
        ngrams("a b c", **options)


def test_repeated_boxes():
    assert repeated_boxes("[[1,2,3,4],[1,2,3,4],[1,2,3,4],[5,6,7,8]]") == pytest.approx(-0.5)
    assert repeated_boxes("no boxes") == repeated_boxes("[]") == 0


# ------------------------------------------------------------------------------------------------ language


def test_share_of_scripts():
    assert cjk_share("猫 cat") == pytest.approx(1 / 4)
    assert cjk_share("123 (B) x") is None
    assert cjk_share(r"猫 $\alpha cat$ `code` <answer> \frac{x}{y} \text{area} ```print``` \(abc\)") == 1
    assert cjk_share("한국어 かな") == 1


def test_mixed():
    assert mixed("这是一只猫 that sits").value == -1  # 5 of 13
    assert mixed("这是一只很大的猫在桌子上面 cat").value == 0  # 3 of 16
    assert mixed("only english").value == 0 and mixed("只有中文").value == 0
    assert mixed("12 + 3").value == 0
    assert mixed("这是一只猫 that sits").parts["cjk"] == pytest.approx(5 / 13)
    assert mixed("这是一只猫 that sits", limit=0.4).value == 0


@pytest.mark.parametrize("text", ["只有猫 animals", "只有猫在桌子上 cat"])
def test_as_much_as_the_limit_is_not_mixed(text):
    """3 letters of 10, of the one script or of the other: 1 - 0.7 is more than 0.3 by rounding."""
    assert mixed(text, limit=0.3).value == 0 and mixed(text, limit=0.29).value == -1


def test_the_language_of_the_question():
    assert other_than_asked("a cat", "这是什么？").value == -1
    assert other_than_asked("一只猫", "这是什么？").value == 0
    assert other_than_asked("(B)", "这是什么？").value == 0


# ------------------------------------------------------------------------------------------------ key steps

STEPS = ["radius 5", ["25 pi", "78.5"], "area"]


def test_matched():
    assert matched("<think>The Radius  5 gives 78.5</think>", STEPS) == pytest.approx(2 / 3)
    assert matched("radius 50 gives 178.5", STEPS) == 0  # whole words
    assert matched("$25 pi$ area radius 5", STEPS) == 1
    assert matched("one step", "one step") == 1


def test_complete_means_in_order():
    assert complete("radius 5, so 25 pi is the area", STEPS) == 1
    assert complete("the area is 25 pi by radius 5", STEPS) == 0
    assert complete("radius 5, so 25 pi", STEPS) == 0
    assert complete("area; radius 5; 78.5; area", STEPS) == 1


@pytest.mark.parametrize("steps", [[], [""], ["$"]])
def test_steps_without_text(steps):
    with pytest.raises(NoVerdict, match="key_steps is"):
        matched("x", steps)


# ------------------------------------------------------------------------------------------------ tools

ZOOM = '<tool_call> {"name": "zoom", "arguments": {"bbox_2d": [0, 0, 8, 8]}} </tool_call>'


@pytest.mark.parametrize(
    ("response", "called"),
    [
        (f"{ZOOM} <answer> 7 </answer>", True),
        ("a </tool_call> " + ZOOM, True),
        ('<tool_call>{"name": "zoom"}</tool_call>', True),
        (ZOOM.removesuffix("</tool_call>"), False),
        ("<tool_call> zoom </tool_call>", False),
        ('<tool_call> ["name"] </tool_call>', False),
        ('<tool_call> {"name": 3} </tool_call>', False),
        ('<tool_call> {"name": "zoom", "arguments": [1]} </tool_call>', False),
        ('zoom {"name": "zoom"}', False),
    ],
)
def test_a_call_is_json_that_names_a_tool(response, called):
    assert tool_call(response) == tool_call(response, tool="zoom") == called
    assert tool_call(response, tool="calculator") == 0


def test_a_tool_counts_for_right_answers_alone():
    grade = Verifiers(
        [
            {"use": "verifiers.numeric.within", "name": "right"},
            {"use": "verifiers.tool_call", "weight": 0.2, "only_where": {"right": 1}},
        ]
    )
    said = [f"{call} <answer> {digit} </answer>" for call in (ZOOM, "") for digit in (7, 3)]
    assert grade([Answer(text, meta={"answer": 7}) for text in said]).total.tolist() == pytest.approx([1.2, 0, 1, 0])
