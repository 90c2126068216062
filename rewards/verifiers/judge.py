"""Rules first, and a judge only for what they cannot tell (the order of GLM-4.5V).

    {use: verifiers.judge, judge: "./mine.py:ask", rules: [{use: verifiers.exact, mismatch: unknown}]}

The judge is any function `(prompt, response, answer) -> float in [0, 1], or None`, or a class whose objects are called
like that; a call to a language model is one. It sees the answer of the response, not its thinking.
"""

from __future__ import annotations

import inspect
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any

from rewards.contract import Sheet, as_scores
from rewards.resolve import resolve
from rewards.types import RewardError, Scores
from rewards.verifiers.extract import answer_of
from rewards.verifiers.names import BUGS, build
from rewards.verifiers.types import Answer, NoVerdict

__all__ = ["Judge"]


class Judge:
    """The first verdict among some rules, else that of a judge; none where the judge fails or is late.

    Parts: judged, 1 where the judge was asked.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        judge: Any,
        judge_options: Mapping[str, Any] | None = None,
        rules: Sequence[Any] = ("verifiers.math",),
        key: str = "answer",
        timeout: float = 30.0,
        threads: int = 8,
    ) -> None:
        """`judge`: a callable, or its name as `package.module:attribute` or `./file.py:attribute`.

        judge_options   those of its constructor, if it is a class
        rules           verifiers that are asked first, in this order: names, or {use: name, option: value}
        key             of the metadata, where the right answer is
        timeout         seconds that it has for one answer
        threads         how many answers it is asked about at a time
        """
        if not timeout > 0 or threads < 1:
            raise RewardError(f"judge: timeout is {timeout!r}, threads is {threads!r}; expected numbers above 0")
        self._judge = _callable(judge, dict(judge_options or {}))
        entries = [dict(rule) if isinstance(rule, Mapping) else {"use": rule} for rule in rules]
        self._rules = [build(entry.pop("use", None), entry) for entry in entries]
        self._key, self._timeout, self._threads = key, float(timeout), threads
        self.needs = tuple(dict.fromkeys([key, *(need for rule in self._rules for need in rule.needs)]))

    def score(self, answers: Sequence[Answer], progress: float | None = None) -> Scores:
        """One value per answer: the rules decide what they can, the judge the rest."""
        sheet = Sheet(len(answers))
        sheet.parts["judged"] = as_scores([0.0] * len(answers), len(answers), "judge").value
        open_rows = list(range(len(answers)))
        for rule in self._rules:
            if open_rows:
                batch = [answers[row] for row in open_rows]
                sheet.value[open_rows] = as_scores(rule.score(batch, progress), len(batch), "judge").value
                open_rows = [row for row in open_rows if math.isnan(sheet.value[row])]
        sheet.parts["judged"][open_rows] = 1.0
        for row, verdict in zip(open_rows, self._ask([answers[row] for row in open_rows]), strict=True):
            if isinstance(verdict, float):
                sheet.value[row] = verdict
            else:
                sheet.info[row] |= verdict
        return sheet.scores()

    def unload(self) -> None:
        """Let go of what the rules hold."""
        for rule in self._rules:
            if hasattr(rule, "unload"):
                rule.unload()

    def _ask(self, answers: Sequence[Answer]) -> list[float | dict[str, Any]]:
        """The judge's verdict on each answer, or why there is none."""
        waiting: queue.SimpleQueue[tuple[Future[Any], Answer]] = queue.SimpleQueue()
        futures: list[Future[Any]] = [Future() for _ in answers]
        for pair in zip(futures, answers, strict=True):
            waiting.put(pair)
        workers = min(self._threads, len(answers))
        for _ in range(workers):  # daemons, so that a judge that hangs does not keep the program from ending
            threading.Thread(target=self._work, args=(waiting,), daemon=True, name="judge").start()
        end = time.monotonic() + self._timeout * math.ceil(len(answers) / max(workers, 1))
        told = [self._verdict(future, end) for future in futures]
        for future in futures:
            future.cancel()
        return told

    def _work(self, waiting: queue.SimpleQueue[tuple[Future[Any], Answer]]) -> None:
        while True:
            try:
                future, answer = waiting.get_nowait()
            except queue.Empty:
                return
            if future.set_running_or_notify_cancel():
                try:
                    said = answer_of(answer.response) or ""
                    future.set_result(self._judge(answer.prompt, said, answer.meta[self._key]))
                except Exception as error:
                    future.set_exception(error)

    def _verdict(self, future: Future[Any], end: float) -> float | dict[str, Any]:
        try:
            said = future.result(timeout=max(0.0, end - time.monotonic()))
        except Late:
            return {"error": f"the judge took longer than {self._timeout:g} s", "failed": True}
        except NoVerdict as error:
            return {"error": str(error)}
        except BUGS:
            raise
        except Exception as error:
            return {"error": f"the judge fails: {type(error).__name__}: {error}", "failed": True}
        if said is None:
            return {"error": "the judge has no verdict"}
        value = float(as_scores([said], 1, "judge").value)
        if not 0 <= value <= 1:
            return {"error": f"the judge said {said!r}; expected a number from 0 to 1"}
        return value


def _callable(judge: Any, options: dict[str, Any]) -> Callable[[str, str, Any], Any]:
    found = resolve(judge) if isinstance(judge, str) else judge
    ready = found(**options) if inspect.isclass(found) else found
    if not callable(ready) or (options and not inspect.isclass(found)):
        told = "has no options" if callable(ready) else f"is a {type(ready).__name__}, which cannot be called"
        raise RewardError(f"judge: {judge!r} {told}; expected (prompt, response, answer) -> float, or a class of such")
    return ready
