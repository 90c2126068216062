"""Text that wants to be run, to recurse, or to take forever: every verifier ends within a second."""

import math
import time

import pytest

from rewards.verifiers import Answer, available, build

pytestmark = pytest.mark.slow

LONG = 30_000
TEXTS = {
    "import": "__import__('os').system('touch owned')",
    "power": "9**9**9",
    "powers": "9^" * 190 + "9",
    "digits": "7" * 1_000_000,
    "brackets": "[" * 1_000_000,
    "braces": "{" * 1_000_000,
    "thousands": "1,234" * LONG,
    "parentheses": "(" * LONG + ")" * LONG,
    "json": '{"a":' * LONG,
    "boxes": "\\boxed{" * LONG,
    "closed boxes": "\\boxed{" * LONG + "}" * LONG,
    "tags": "<answer>" * LONG,
    "thinking": "<think>" * LONG + "</think>" * LONG,
    "phrases": "answer is: " * LONG,
    "math marks": "\\(" * LONG,
    "dollars": "$" * LONG,
    "fences": "```" * LONG,
    "blanks": " " * LONG + "x",
    "newlines": "answer:\n" * LONG,
    "minus": "-" * LONG,
    "commas": "1," * LONG,
    "calls": "f(" * LONG,
    "quotes": "click(text='" * LONG,
    "points": "(1,2)," * LONG,
    "words": "yes no " * LONG,
    "distinct": " ".join(map(str, range(LONG))),
    "han": "猫" * LONG,
    "surrogates": "\ud800" * 1000,
    "nul": "\0" * LONG,
    "roots": "\\sqrt" * 390,
    "fractions": "\\frac" * 390,
    "factorials": "9" + "!" * 300,
    "sci": "1e999999999",
    "tower": "2^{9999}*" * 40 + "1",
}
META = {
    "answer": "42",
    "options": ["42", "43"],
    "key_steps": ["1", "42"],
    "action": {"action": "click", "box": [1, 2, 3, 4]},
}
GOLD = {
    "verifiers.yes_no": "yes",
    "verifiers.boxes.grounding": [1, 2, 3, 4],
    "verifiers.boxes.detection": [[1, 2, 3, 4]],
    "verifiers.ocr.cer": "word " * 500,
    "verifiers.ocr.wer": "word " * 500,
    "verifiers.ocr.anls": "word " * 500,
}
OPTIONS = {
    "verifiers.judge": {"judge": lambda *_: 0.5},
    "verifiers.math": {"symbolic": False},
    "verifiers.cosine": {"verifier_options": {"symbolic": False}},
}


@pytest.mark.parametrize("name", available())
def test_every_verifier_ends_within_a_second(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verifier = build(name, OPTIONS.get(name, {}))
    if name == "verifiers.judge":
        verifier = build(name, {**OPTIONS[name], "rules": [{"use": "verifiers.math", "symbolic": False}]})
    meta = {**META, "answer": GOLD.get(name, META["answer"])}
    low, high = verifier.range
    for what, text in TEXTS.items():
        for response in (text, f"<answer>{text}</answer>"):
            answer = Answer(response, prompt="how many?", meta=meta, tokens=10)
            start = time.perf_counter()
            scores = verifier.score([answer])
            took = time.perf_counter() - start
            assert took < 1, (what, took)
            value = scores.value.item()
            assert math.isnan(value) or low <= value <= high, (what, value)
    assert not list(tmp_path.iterdir())
