"""Tools that a model may call while it answers: what one is, two built-in ones, how a call is read, how calls run.

    <tool_call> {"name": "zoom", "arguments": {"bbox_2d": [8, 8, 24, 24]}} </tool_call>

A tool is any object with a `name` that can be called with (arguments, pictures), or a function, whose own name counts:

    def weigh(arguments, pictures):
        return ToolResult("12 kg")

What a model writes decides nothing but the arguments. Whatever is wrong with a call (JSON that is none, a tool that
does not exist, an argument of another type, a tool that raises or takes too long) is answered to the model as text.
What a tool does wrong itself, an exception other than `BadCall` or a result of another type, is a warning too.
"""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol, TypeAlias

from PIL import Image

from flowrl.resolve import ResolveError, nearest, resolve
from flowrl.user_code import misfit, told
from rewards.verifiers._expression import Unreadable, Value, read
from rewards.verifiers._geometry import factors, numbers

Picture: TypeAlias = Image.Image

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 8
"""Calls that one turn may make."""
_MOST_CHARACTERS = 20_000
"""Of one call. A longer one is not parsed."""
_SHOWN = 60
"""Characters of a model's own text that an answer to it repeats."""


class ToolError(ValueError):
    """A tool in the config cannot be used; the message says which, why, and what to write instead."""


class BadCall(ValueError):
    """What a call asks for cannot be done. A tool raises it; the message is what the model is told."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answers: text, pictures, or both."""

    text: str = ""
    pictures: tuple[Picture, ...] = ()
    error: bool = False
    """The call failed; `text` says why."""


class Tool(Protocol):
    """What a model may call. It runs in a thread of its own, next to other calls of the same tool."""

    name: str

    def __call__(self, arguments: dict[str, Any], pictures: list[Picture]) -> ToolResult:
        """Do it; `pictures` are those that the model has seen so far, in order. BadCall says what is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One call as a model wrote it."""

    name: str = ""
    arguments: Mapping[str, Any] | None = None
    problem: str = ""
    """Why it cannot be run; "" where nothing is wrong with its form."""


# ------------------------------------------------------------------------------------------------ built-in tools

_WORST_ASPECT = 100
"""A strip that is longer than this many times its width shows nothing, and processors refuse it (Qwen2-VL: 200)."""


class Zoom:
    """A part of a picture, larger (the zoom tool of DeepEyes, arXiv:2505.14362).

    Arguments: `bbox_2d` [x1, y1, x2, y2]; `index`, which of the pictures seen so far (0 the first, the default).
    What lies outside of the picture is cut off. A side that is too small is widened around its middle.
    """

    name = "zoom"

    def __init__(
        self, min_side: int = 8, enlarge_to: int | None = None, scale: Literal["abs", "norm1000"] = "abs"
    ) -> None:
        """Keep the options.

        min_side     pixels that either side of a crop has at least, where the picture has them
        enlarge_to   pixels of the crop's longer side after enlarging (it is never made smaller); None = as it is
        scale        abs: the model writes pixels of the picture; norm1000: thousandths of its sides
        """
        if min_side < 1 or (enlarge_to is not None and enlarge_to < 1):
            raise ToolError(f"zoom: min_side={min_side}, enlarge_to={enlarge_to}; both are pixels, at least 1.")
        if scale not in ("abs", "norm1000"):
            raise ToolError(f"zoom: scale is {scale!r}; write abs or norm1000.")
        self._min_side, self._enlarge_to, self._scale = min_side, enlarge_to, scale

    def __call__(self, arguments: dict[str, Any], pictures: list[Picture]) -> ToolResult:
        """The part of the picture."""
        picture = pictures[_index(arguments.get("index", 0), len(pictures))]
        corners = numbers(arguments.get("bbox_2d"), 4)
        if corners is None:
            raise BadCall("bbox_2d must be four numbers [x1, y1, x2, y2]")
        by = factors(self._scale, picture.size, None)
        left, right = _span(corners[0] * by[0], corners[2] * by[0], picture.width, self._min_side)
        top, bottom = _span(corners[1] * by[1], corners[3] * by[1], picture.height, self._min_side)
        if max(right - left, bottom - top) > _WORST_ASPECT * min(right - left, bottom - top):
            raise BadCall("bbox_2d is too thin")
        return ToolResult(pictures=(self._enlarged(picture.crop((left, top, right, bottom))),))

    def _enlarged(self, crop: Picture) -> Picture:
        longer = max(crop.size)
        if self._enlarge_to is None or longer >= self._enlarge_to:
            return crop
        width, height = (max(1, round(side * self._enlarge_to / longer)) for side in crop.size)
        return crop.resize((width, height), Image.Resampling.BICUBIC)


def _index(given: Any, count: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < count:
        raise BadCall(f"index must be a whole number from 0 to {count - 1}" if count else "there is no picture")
    return given


def _span(low: float, high: float, size: int, least: int) -> tuple[int, int]:
    """Whole pixels of one side that [low, high] touches, within [0, size], at least `least` where there are so many."""
    if not (low < high and high > 0 and low < size):
        raise BadCall("bbox_2d must have x1 < x2 and y1 < y2, and overlap the picture")
    start, stop = max(0, math.floor(low)), min(size, math.ceil(high))
    least = min(least, size)
    if stop - start < least:
        start = min(max(0, (start + stop - least) // 2), size - least)
        stop = start + least
    return start, stop


class Calculator:
    """The value of an expression of numbers, plain or LaTeX; nothing of it is run as code.

    Argument: `expression`. Long ones and huge values (9**9**9) are refused before they are computed.
    """

    name = "calculator"

    def __call__(self, arguments: dict[str, Any], pictures: list[Picture]) -> ToolResult:
        """The value: whole numbers below 10^15 exactly, others to 12 digits."""
        expression = arguments.get("expression")
        if not isinstance(expression, str):
            raise BadCall("expression must be a text such as '2 * (3 + 4)'")
        try:
            found = read(expression)
        except Unreadable as error:
            raise BadCall(f"{_shown(expression)} cannot be computed: {str(error)[:_SHOWN]}") from error
        if not isinstance(found, Value) or len(found.at) > 1:
            raise BadCall(f"{_shown(expression)} is not one number")
        return ToolResult(_written(found.at[0] / 100 if found.percent else found.at[0]))


def _written(value: Fraction | float) -> str:
    if isinstance(value, Fraction) and value.denominator == 1 and abs(value) < 10**15:
        return str(value.numerator)
    try:
        return f"{float(value):.12g}"
    except OverflowError:  # exact numbers may be beyond the largest float
        return f"{Decimal(math.floor(value)):.11e}"


_BUILT_IN: tuple[Callable[..., Tool], ...] = (Zoom, Calculator)
_FORM = "(arguments, pictures) -> ToolResult"


# ------------------------------------------------------------------------------------------------ from the config


def build_tools(entries: Sequence[Any]) -> dict[str, Tool]:
    """The tools of a config by the name that a model calls them by; ToolError for one that cannot be used.

    An entry is a name, `{use: name, ...options}`, or a ready tool. A name is `zoom`, `calculator`,
    `package.module:attribute` or `./file.py:attribute`; the options are those of the constructor where it is a class.
    """
    tools: dict[str, Tool] = {}
    for entry in entries:
        tool = _build(entry)
        if tool.name in tools:
            raise ToolError(f"two tools are called {tool.name!r}; give one of them another `name`.")
        tools[tool.name] = tool
    return tools


def _build(entry: Any) -> Tool:
    options = dict(entry) if isinstance(entry, Mapping) else {"use": entry}
    use = options.pop("use", None)
    if use is None:
        raise ToolError(f"a tool's entry needs `use: name`; this one has {', '.join(options) or 'nothing'}.")
    made = _resolved(use) if isinstance(use, str) else use
    if isinstance(made, type):
        if why := misfit(made, **options):
            raise ToolError(f"tool {use!r} does not take these options: it {why}.")
        try:
            made = made(**options)
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(f"tool {use!r} could not be made: {told(error)}.") from error
    elif options:
        raise ToolError(f"tool {use!r} is ready-made and takes no options; remove {', '.join(options)}.")
    if not callable(made):
        raise ToolError(f"tool {use!r} is a {type(made).__name__}; give a function {_FORM}.")
    if why := misfit(made, {}, []):
        raise ToolError(f"tool {use!r} {why}. Give it the form {_FORM}, both positional.")
    return made if hasattr(made, "name") else _Function(made)


def _resolved(use: str) -> Any:
    built_in = {tool.name: tool for tool in _BUILT_IN}  # type: ignore[attr-defined]
    if use in built_in:
        return built_in[use]
    if ":" not in use and not use.endswith(".py"):
        known = ", ".join(built_in)
        raise ToolError(
            f"there is no tool {use!r}{nearest(use, built_in)}; there are {known}, package.module:attribute and "
            "./file.py:attribute."
        )
    try:
        return resolve(use, "flowrl.vlm")
    except ResolveError as error:
        raise ToolError(f"tool {error}") from error


class _Function:
    """A function as a tool: its name is the tool's."""

    def __init__(self, function: Callable[[dict[str, Any], list[Picture]], ToolResult]) -> None:
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self._function = function

    def __call__(self, arguments: dict[str, Any], pictures: list[Picture]) -> ToolResult:
        return self._function(arguments, pictures)


# ------------------------------------------------------------------------------------------------ reading calls


def parse_calls(turn: str) -> list[Call]:
    """The calls that a turn ends with, in order; none if it ends with something else.

    Several calls at the end, with nothing but white space between them, are one request. Calls before other text are
    not looked at: the model went on without their results. Linear in the length of the text.
    """
    rest = turn.rstrip()
    calls: list[Call] = []
    while rest.endswith(CLOSE):
        if len(calls) == MOST_CALLS:
            return [Call(problem=f"more than {MOST_CALLS} calls in one turn")]
        body = rest.removesuffix(CLOSE)
        before, mark, inner = body.rpartition(OPEN)
        if not mark or CLOSE in inner:
            return [Call(problem=f"{CLOSE} without {OPEN}"), *reversed(calls)]
        calls.append(_read_call(inner.strip()))
        rest = before.rstrip()
    return calls[::-1]


def _read_call(text: str) -> Call:
    if len(text) > _MOST_CHARACTERS:
        return Call(problem=f"a call of {len(text)} characters; at most {_MOST_CHARACTERS} are read")
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return Call(problem='the call is not JSON like {"name": "zoom", "arguments": {}}')
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return Call(problem='the call is no object with a "name"')
    arguments = found.get("arguments", {})
    if not isinstance(arguments, dict):
        return Call(found["name"], problem='"arguments" is no object')
    return Call(found["name"], arguments)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


# ------------------------------------------------------------------------------------------------ running calls


@dataclass(frozen=True, slots=True)
class _Fault:
    """What a tool itself did wrong; the model's mistakes are none."""

    tool: str
    kind: str
    """Of a kind a tool's first fault is told: the name of the exception, or of the type that it returned."""
    what: str


_TOLD: set[tuple[str, str]] = set()
"""Tools and kinds of faults that there was a warning of, in this process."""


def run_calls(
    calls: Sequence[tuple[Call, Sequence[Picture]]], tools: Mapping[str, Tool], *, seconds: float, at_once: int = 16
) -> list[ToolResult]:
    """Results of calls, each with the pictures that its model has seen, in their order; never raises for a call.

    A fault of a tool itself is a warning, once for each tool and kind of exception, and an error to the model.
    Up to `at_once` run side by side, each for at most `seconds`. One that takes longer is answered with an error.
    Note: its thread cannot be stopped and runs on in the background, so a tool that may hang should bound itself too;
    one that holds Python's global lock throughout holds up everything until it returns.
    """
    results: list[ToolResult] = [_error("not run")] * len(calls)
    done: SimpleQueue[tuple[int, ToolResult, _Fault | None]] = SimpleQueue()
    waiting = deque(range(len(calls)))
    until: dict[int, float] = {}
    while waiting or until:
        while waiting and len(until) < at_once:
            index = waiting.popleft()
            call, pictures = calls[index]
            until[index] = time.monotonic() + seconds
            job = (done, index, call, tools, list(pictures))
            threading.Thread(target=_work, args=job, daemon=True, name=f"tool-{index}").start()
        try:
            index, result, fault = done.get(timeout=max(0.0, min(until.values()) - time.monotonic()))
            if until.pop(index, None) is not None:
                results[index] = result
                _warn_once(fault)
        except Empty:
            for late in [index for index, end in until.items() if end <= time.monotonic()]:
                del until[late]
                results[late] = _error(f"the tool took longer than {seconds:g} seconds")
    return results


def _work(
    done: SimpleQueue[tuple[int, ToolResult, _Fault | None]],
    index: int, call: Call, tools: Mapping[str, Tool], seen: list[Picture],
) -> None:  # fmt: skip
    done.put((index, *_run(call, tools, seen)))


def _run(call: Call, tools: Mapping[str, Tool], pictures: list[Picture]) -> tuple[ToolResult, _Fault | None]:
    if call.problem:
        return _error(call.problem), None
    if call.name not in tools:
        return _error(f"there is no tool {_shown(call.name)}; there are {', '.join(tools) or 'none'}"), None
    try:
        result = tools[call.name](dict(call.arguments or {}), pictures)
    except BadCall as error:
        return _error(str(error)), None
    except BaseException as error:  # even SystemExit: the model is told, the run goes on, nobody waits for the thread
        kind = type(error).__name__
        return _error(f"{call.name} failed ({kind})"), _Fault(call.name, kind, told(error))
    if not isinstance(result, ToolResult):
        kind = f"returned a {type(result).__name__}"
        return _error(f"{call.name} {kind}"), _Fault(call.name, kind, f"it {kind} and no ToolResult")
    return result, None


def _warn_once(fault: _Fault | None) -> None:
    if fault is None or (fault.tool, fault.kind) in _TOLD:
        return
    _TOLD.add((fault.tool, fault.kind))
    warnings.warn(
        f"tool {fault.tool!r} failed: {fault.what}. The model is told that its call failed, and the run goes on; "
        "further faults of this kind are not shown. Mend the tool; for what is wrong with a call let it raise "
        "flowrl.vlm.tools.BadCall.",
        stacklevel=3,
    )


def _error(why: str) -> ToolResult:
    return ToolResult(f"error: {why}", error=True)
