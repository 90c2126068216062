"""A judge is asked what the rules cannot tell, and only that."""

import threading
import time

import pytest

from rewards import RewardError
from rewards.verifiers import Answer, NoVerdict, Verifiers, build

RULES = [{"use": "verifiers.exact", "mismatch": "unknown"}]


def given(*responses):
    return [Answer(response, prompt="capital?", meta={"answer": "Paris"}) for response in responses]


def judged(judge, *responses, **options):
    entry = {"use": "verifiers.judge", "judge": judge, "rules": RULES, "name": "judge", **options}
    return Verifiers([entry], max_nan_frac=None)(given(*responses))


def test_only_what_is_open_is_asked():
    asked = []

    def ask(prompt, response, answer):
        asked.append((prompt, response, answer))
        return 0.5

    result = judged(ask, "<think>hm</think>paris", "<think>hm</think>the city of light", "")
    assert result.total.tolist() == [1, 0.5, 0]
    assert asked == [("capital?", "the city of light", "Paris")]
    assert result.parts["judge"]["judged"].tolist() == [0, 1, 0]


def test_rules_are_asked_in_order():
    rules = ["verifiers.math", *RULES]
    result = judged(lambda *_: 0.25, "5", "Paris", "Lyon", rules=rules)
    assert result.total.tolist() == [0.25, 1, 0.25]  # "Paris" is no mathematics, and no product either


def test_answers_are_asked_about_in_parallel():
    barrier = threading.Barrier(4, timeout=10)

    def ask(prompt, response, answer):
        barrier.wait()
        return 1.0

    assert judged(ask, "a", "b", "c", "d", threads=4).total.tolist() == [1] * 4


def test_a_late_judge_has_no_verdict():
    release = threading.Event()

    def ask(prompt, response, answer):
        if response == "slow":
            release.wait(20)
        return 1.0

    start = time.perf_counter()
    result = judged(ask, "slow", "fast", timeout=0.3, threads=2)
    release.set()
    assert time.perf_counter() - start < 3
    assert result.total[0].isnan() and result.total[1] == 1
    assert "longer than 0.3 s" in result.info[0]["judge"]["error"]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (None, "the judge has no verdict"),
        (7.0, "expected a number from 0 to 1"),
        (ValueError("down"), "the judge fails: ValueError: down"),
        (NoVerdict("not a question"), "not a question"),
    ],
)
def test_a_judge_that_cannot_tell(says, told):
    def ask(prompt, response, answer):
        if isinstance(says, Exception):
            raise says
        return says

    result = judged(ask, "Lyon")
    assert result.total.isnan().all() and told in result.info[0]["judge"]["error"]


def test_a_judge_by_its_path_with_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Ask:\n    def __init__(self, worth):\n        self.worth = worth\n"
        "    def __call__(self, prompt, response, answer):\n        return self.worth\n"
    )
    path = f"{tmp_path}/mine.py:Ask"
    assert judged(path, "Lyon", judge_options={"worth": 0.75}).total.item() == 0.75
    for judge, options, message in [(path, {}, "worth"), (3, {}, "cannot be called"), (len, {"a": 1}, "no options")]:
        with pytest.raises((RewardError, TypeError), match=message):
            build("verifiers.judge", {"judge": judge, "judge_options": options})
