"""From a name in a config to a verifier, as `rewards.resolve` does it for rewards of media.

    verifiers.math, verifiers.boxes.grounding   a file of this package, and the verifier in it where there are several
    package.module:attribute                    anything importable
    ./file.py:attribute                         a file loaded by its path

A module's verifiers are its public functions marked with `@verifier(...)` and its classes with `score`, save what its
`__all__` leaves out.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch

import rewards.resolve
from rewards.contract import Sheet, as_scores
from rewards.functions import check_options, label, nearest
from rewards.types import RewardContractError, RewardError, ScoreLike, Scores, no_verdict
from rewards.verifiers.types import FIELDS, Answer, NoVerdict, TextReward, Verdict, is_verifier

PREFIX = "verifiers."

BUGS = (NameError, ImportError, NotImplementedError, RewardContractError)
"""What no answer is to blame for. A TypeError is not among them: odd JSON in an answer is enough for one."""


def available() -> list[str]:
    """Names of all verifiers of this package."""
    return [name for module in _modules() for name in _found(module)]


def resolve(name: str) -> Any:
    """The function or class that a name stands for."""
    if ":" in name or name.endswith(".py"):
        return rewards.resolve.resolve(name)
    module = name.removeprefix(PREFIX).partition(".")[0]
    found = _found(module) if module in _modules() else {}
    if name in found:
        return found[name]
    known = available()
    hint = f" (did you mean {' or '.join(map(repr, found))}?)" if found else nearest(PREFIX + name, known)
    raise RewardError(
        f"no verifier {name!r}{hint}. There are: {', '.join(known)}; "
        "or give package.module:attribute, or ./file.py:attribute."
    )


def build(use: Any, options: Mapping[str, Any] | None = None) -> TextReward:
    """A verifier from a name, function, class or ready object; `options` are its parameters' or its constructor's."""
    options = dict(options or {})
    target = resolve(use) if isinstance(use, str) else use
    if inspect.isclass(target):
        return _Object(rewards.resolve.build(target, options), label(target))
    if callable(getattr(target, "score", None)):
        if options:
            raise RewardError(f"verifier {use!r} is an object already; give its constructor {', '.join(options)}")
        return _Object(target, label(target))
    if callable(target):
        return _Function(target, options)
    raise RewardError(f"{use!r} is a {type(target).__name__}; a verifier is a function or has a method score(answers)")


class _Object:
    """An object with `score(answers)` or `score(answers, progress)`."""

    def __init__(self, target: Any, name: str) -> None:
        self._target, self._name = target, name
        self.range: tuple[float, float] | None = getattr(target, "range", None)
        self.needs: tuple[str, ...] = tuple(getattr(target, "needs", ()))
        self._takes_progress = "progress" in inspect.signature(target.score).parameters

    def score(self, answers: Sequence[Answer], progress: float | None = None) -> ScoreLike:
        """All at once; one by one if that fails, so that only what really fails is lost."""
        try:
            return self._call(answers, progress)
        except BUGS:
            raise
        except Exception as error:
            if len(answers) == 1:
                return _failed(error)
        sheet = Sheet(len(answers))
        for row, answer in enumerate(answers):
            sheet.put([row], as_scores(self.score([answer], progress), 1, self._name))
        return sheet.scores()

    def unload(self) -> None:
        """Let go of what it holds, if it holds anything."""
        if hasattr(self._target, "unload"):
            self._target.unload()

    def _call(self, answers: Sequence[Answer], progress: float | None) -> ScoreLike:
        returned = self._target.score(answers, progress) if self._takes_progress else self._target.score(answers)
        return as_scores(returned, len(answers), self._name)


class _Function:
    """A function with its options, called once per answer."""

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        """Check the signature and the options now, so that a typo does not wait for the first batch."""
        self._name, self._function, self._options = label(function), function, dict(options)
        parameters = inspect.signature(function).parameters
        if next(iter(parameters), None) != "response":
            raise RewardError(
                f"verifier {self._name!r} has the signature {inspect.signature(function)}; expected "
                "(response, answer, option=default, ...), where what has no default is a key of the metadata"
            )
        self.range: tuple[float, float] | None = getattr(function, "range", None)
        self._fields = [key for key in FIELDS if key in parameters]
        self._takes_progress = "progress" in parameters
        fixed = {"response", "progress", *self._fields}
        named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        free = {key: p for key, p in named.items() if key not in fixed}
        check_options(self._name, options, list(free))
        self._options = _typed(self._name, function, self._options)
        self.needs = tuple(key for key, p in free.items() if p.default is p.empty and key not in options)
        self._wants = [key for key in getattr(function, "wants", ()) if key not in options]
        self._rest = set(named) if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else None

    def score(self, answers: Sequence[Answer], progress: float | None = None) -> Scores:
        """One verdict after the other."""
        sheet = Sheet(len(answers))
        for row, answer in enumerate(answers):
            sheet.put([row], self._judge(answer, progress))
        return sheet.scores()

    def _judge(self, answer: Answer, progress: float | None) -> Scores:
        try:
            returned = self._function(answer.response, **self._arguments(answer, progress))
        except BUGS:
            raise
        except Exception as error:
            return _failed(error)
        verdict = returned if isinstance(returned, Verdict) else Verdict(returned)
        value = as_scores([verdict.value], 1, self._name).value
        parts = {key: torch.tensor([float(part)]) for key, part in verdict.parts.items()}
        return Scores(value=value, parts=parts, info=[dict(verdict.info)])

    def _arguments(self, answer: Answer, progress: float | None) -> dict[str, Any]:
        keys = [*self.needs, *(key for key in self._wants if key in answer.meta)]
        given = {key: answer.meta[key] for key in keys}
        if self._rest is not None:
            given |= {key: value for key, value in answer.meta.items() if key not in self._rest}
        given |= {key: getattr(answer, key) for key in self._fields}
        if self._takes_progress:
            given["progress"] = progress
        return given | self._options


def _failed(error: Exception) -> Scores:
    """No verdict on one answer, and why; `failed` where the verifier broke, for `on_error: raise`."""
    if isinstance(error, NoVerdict):
        return Scores(value=no_verdict(1), info=[{"error": str(error)}])
    frame = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return Scores(value=no_verdict(1), info=[{"error": told, "failed": True}])


def _typed(name: str, function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as their annotations read them, so that `tolerance: 1e-3`, a text in YAML, is a number."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker sees: nothing to compare with
        hints = {}
    return {key: _read(name, key, value, hints[key]) if key in hints else value for key, value in options.items()}


def _read(name: str, key: str, value: Any, hint: Any) -> Any:
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticSchemaGenerationError:  # a class of its own
        return value
    except ValidationError as error:
        wanted = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
        raise RewardError(f"verifier {name!r}: {key} is {value!r}: {wanted}.") from error


def _modules() -> list[str]:
    """This package's public modules, relative to it; none is imported."""
    package = importlib.import_module("rewards.verifiers")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def _found(module: str) -> dict[str, Any]:
    """A module's verifiers by config name: the module's own where it has a single one."""
    loaded = importlib.import_module(f"rewards.verifiers.{module}")
    offers = _offered(loaded)
    return {PREFIX + (module if len(offers) == 1 else f"{module}.{key}"): value for key, value in offers.items()}


def _offered(module: ModuleType) -> dict[str, Any]:
    names = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
    own = {key: getattr(module, key) for key in names if getattr(module, key).__class__ is not ModuleType}
    return {
        key: value
        for key, value in own.items()
        if getattr(value, "__module__", None) == module.__name__ and is_verifier(value)
    }
