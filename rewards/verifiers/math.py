r"""Mathematics: is the answer the same value, expression, tuple or set as the right one?

    1. the last answer of the response is taken (`rewards.verifiers.extract`), thinking never
    2. equal once spelt alike: right
    3. both can be read as expressions (`rewards.verifiers._expression`): equal or not, for certain
    4. else, where no words are in them, math-verify is asked (`pip install math-verify`), in a process of its own
    5. else: wrong where only the answer cannot be read, no verdict where the right one cannot

Note: TRL and others ask math-verify first. It takes two boxes for a set, reads nothing from `<answer>42</answer>`, and
stops by a signal, which raises outside of the main thread; here it is only asked what the steps above cannot tell.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.contract import Sheet
from rewards.types import RewardError, Scores
from rewards.verifiers._expression import Expression, TooLarge, Unreadable, read, same, simplified
from rewards.verifiers.extract import answer_of, last_boxed
from rewards.verifiers.types import Answer

__all__ = ["Math", "equal"]

_STARTING = 120.0
"""Seconds that the import of sympy may take on a busy machine."""
_MOST_CHARACTERS = 300
"""Of a text that math-verify is asked about."""
_MOST_BRACKETS = 40
"""Its parser takes seconds for some hundred of them."""
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_NAMES = frozenset(
    "sin cos tan cot sec csc log exp max min mod gcd lcm cases matrix pmatrix bmatrix vmatrix array".split()
)


class Math:
    """1 if the answer equals `meta["answer"]` as mathematics, else 0 (the accuracy of DeepSeek-R1 and TRL).

    `meta["answer"]` may be a list: one of them has to be met. No verdict where the right answer cannot be read, or the
    comparison takes too long.
    """

    range = (0.0, 1.0)
    needs = ("answer",)
    better_with = {"math_verify": 'pip install -e ".[vlm]"'}

    def __init__(self, strict: bool = False, symbolic: bool | None = None, timeout: float = 2.0) -> None:
        r"""Keep the options.

        strict     only an answer in <answer> tags or \boxed{} counts
        symbolic   whether math-verify decides what is unreadable otherwise; None: if it is installed
        timeout    seconds that it has for one answer
        """
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise RewardError(f"math: timeout is {timeout!r}; expected a number of seconds above 0")
        if symbolic and not _installed():
            raise RewardError("math: symbolic needs math-verify. Mend: pip install math-verify, or symbolic: false")
        self._strict = strict
        use = _installed() if symbolic is None else symbolic
        self._symbolic = _Symbolic(float(timeout)) if use else None

    def score(self, answers: Sequence[Answer]) -> Scores:
        """One verdict per answer; 0 for a response without an answer."""
        sheet = Sheet(len(answers))
        for row, answer in enumerate(answers):
            said = answer_of(answer.response, strict=self._strict)
            verdict = 0.0 if said is None else self._judge(said, answer.meta["answer"])
            if verdict is None:
                sheet.fail([row], "the right answer cannot be read as mathematics, or the comparison takes too long")
            else:
                sheet.value[row] = verdict
            sheet.info[row]["read"] = said and said[:_MOST_CHARACTERS]
        return sheet.scores()

    def unload(self) -> None:
        """End the process of math-verify, if there is one."""
        if self._symbolic is not None:
            self._symbolic.close()

    def _judge(self, said: str, gold: Any) -> float | None:
        verdicts = [self._equal(said, str(each)) for each in (gold if isinstance(gold, list | tuple) else [gold])]
        if True in verdicts:
            return 1.0
        return None if None in verdicts else 0.0

    def _equal(self, said: str, gold: str) -> bool | None:
        boxed = last_boxed(gold)
        gold = gold if boxed is None else boxed
        sure = equal(said, gold)
        if sure is not None:
            return sure
        if self._symbolic is not None and _is_formula(gold) and _is_formula(said):
            return self._symbolic.same(gold, said)
        return None if isinstance(_readable(gold), Unreadable) else False


def equal(said: str, gold: str) -> bool | None:
    """Whether two answers are equal as text or as expressions; None where one of them cannot be read."""
    if simplified(said).casefold() == simplified(gold).casefold():
        return True
    right, given = _readable(gold), _readable(said)
    if isinstance(right, Unreadable):
        return None
    if isinstance(given, Unreadable):
        return False if isinstance(given, TooLarge) else None
    return same(right, given)


def _readable(text: str) -> Expression | Unreadable:
    try:
        return read(text)
    except Unreadable as error:
        return error


def _is_formula(text: str) -> bool:
    """Whether to ask math-verify about a text: it is short, and has no words and not too many brackets in it.

    math-verify would take "east" for a product, and find that it equals "seat".
    """
    if len(text) > _MOST_CHARACTERS or sum(map(text.count, "([{")) > _MOST_BRACKETS:
        return False
    return all(word in _NAMES for word in _WORD.findall(simplified(text)))


def _installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


class _Symbolic:
    """math-verify in a process of its own, which is ended when it takes too long and started again when needed."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def same(self, gold: str, said: str) -> bool | None:
        """math-verify's verdict; None if it has none, or not in time. Any thread may ask."""
        with self._lock:
            try:
                if self._process is None:
                    self._process = self._start()
                line = self._exchange(json.dumps([gold, said]), self._timeout)
            except BrokenPipeError:
                line = ""
            if not line:
                self._end()
                return None
            verdict: bool | None = json.loads(line)
            return verdict

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("_math_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", str(worker)],  # -I: nothing of the working directory is imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if self._exchange(None, _STARTING) != "ready":
            self._end()
            raise RewardError(
                "math: the process of math-verify does not start. Mend: see what "
                f"`{Path(sys.executable).name} -c 'import math_verify'` says, or give symbolic: false"
            )
        return self._process

    def _exchange(self, line: str | None, seconds: float) -> str:
        """A line to the process and one back; "" if it ends, which it does when the time is up."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        clock = threading.Timer(seconds, process.kill)
        clock.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            return process.stdout.readline().strip()
        finally:
            clock.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
