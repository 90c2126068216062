"""Turn whatever a reward returned into `Scores`, or say exactly what is wrong with it.

Every check answers three questions: what was returned, what was expected, how to mend it. Nothing is guessed or mended
silently: a list of bools or an [N, 1] tensor would train, and would train on something else than was meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from rewards.types import RewardContractError, Scores, no_verdict


def as_scores(returned: Any, count: int, name: str) -> Scores:
    """`returned` by the reward `name` for `count` samples, as fp32 CPU `Scores` without infinities.

    Where gradients are off a graph is refused; where they are on, `value` keeps its graph, and `parts` are only logged.
    """
    scores = returned if isinstance(returned, Scores) else Scores(value=_vector(returned, count, name))
    if not isinstance(scores.parts, Mapping):
        _refuse(name, f"parts of type {type(scores.parts).__name__}", "a dict of name -> N values", "")
    parts = {key: _vector(part, count, f"{name}/{key}").detach() for key, part in scores.parts.items()}
    return Scores(value=_finite(_vector(scores.value, count, name)), parts=parts, info=_info(scores.info, count, name))


class Sheet:
    """The scores of N samples, filled in piece by piece; what is never filled in stays without a verdict."""

    def __init__(self, count: int) -> None:
        """`count` samples, none of them scored."""
        self.value = no_verdict(count)
        self.parts: dict[str, Tensor] = {}
        self.info: list[dict[str, Any]] = [{} for _ in range(count)]

    def put(self, rows: Sequence[int], scores: Scores) -> None:
        """Write the scores of some samples (as `as_scores` gives them) into their rows."""
        at = list(rows)
        self.value[at] = scores.value
        for key, part in scores.parts.items():
            self.parts.setdefault(key, no_verdict(len(self.value)))[at] = part
        for row, entry in zip(at, scores.info, strict=True):
            self.info[row] = entry

    def fail(self, rows: Sequence[int], error: str) -> None:
        """Leave the rows without a verdict, and say why, where nothing has been said yet."""
        for row in rows:
            self.info[row].setdefault("error", error)

    def scores(self) -> Scores:
        """The sheet as it is now; no NaN is without a reason in `info`."""
        self.fail(self.value.isnan().nonzero().flatten().tolist(), "the reward returned NaN, None or an infinity")
        return Scores(value=self.value, parts=self.parts, info=self.info)


def _finite(value: Tensor) -> Tensor:
    """An infinity is no verdict either: one of them would be the whole mean and the whole std of its group."""
    return torch.where(value.isfinite(), value, no_verdict(len(value)))


def _info(info: Any, count: int, name: str) -> list[dict[str, Any]]:
    if not isinstance(info, list) or not all(isinstance(entry, dict) for entry in info):
        _refuse(name, f"info of type {type(info).__name__}", "a list with one dict per sample, or []", "")
    if info and len(info) != count:
        _refuse(name, f"{len(info)} info dicts", f"{count}, one per sample, or []", "")
    return [_told(entry) for entry in info] if info else [{} for _ in range(count)]


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    """A copy whose `error` is text, as everybody takes it to be."""
    return {**entry, "error": str(entry["error"])} if "error" in entry else dict(entry)


def _vector(returned: Any, count: int, name: str) -> Tensor:
    """A tensor, an array or a sequence of numbers as fp32 [count] on the CPU."""
    if isinstance(returned, np.ndarray):
        if returned.dtype.kind not in "iufb":
            _refuse(name, f"an array of {returned.dtype}", "numbers", "use float(...), and NaN for no verdict")
        returned = torch.from_numpy(returned)
    value = returned
    if not isinstance(returned, Tensor):
        value = torch.tensor(_numbers(returned, count, name), dtype=torch.float32)  # whatever the default dtype is
    if value.dtype == torch.bool or value.is_complex():
        _refuse(name, f"values of {value.dtype}", "floating point", "use .float(), and mind that True becomes 1.0")
    if value.requires_grad and not torch.is_grad_enabled():
        _refuse(name, "a tensor that carries a gradient graph", "plain values here", "return value.detach()")
    if tuple(value.shape) != (count,):
        mend = _mend_shape(tuple(value.shape), count)
        _refuse(name, f"shape {list(value.shape)}", f"[{count}], one score per sample", mend)
    return value.to("cpu", torch.float32)


def _mend_shape(shape: tuple[int, ...], count: int) -> str:
    if shape in ((count, 1), (1, count)):
        return f"use .reshape({count}) or .squeeze({1 if shape[0] == count else 0})"
    if not shape or shape == (1,):
        return "do not average over the batch: .mean(dim=(1, 2, 3)) keeps one value per image, .mean() does not"
    if shape[0] == count:
        return "reduce all dimensions but the first, for instance with .flatten(1).mean(1)"
    return "return the scores in the order of the samples; NaN (or None in a list) for a sample without a verdict"


def _numbers(returned: Any, count: int, name: str) -> list[float]:
    """A sequence's items as floats; None becomes NaN."""
    if inspect.iscoroutine(returned):
        returned.close()
        _refuse(name, "a coroutine", "scores", "make it a plain function; it may block, a lane is a thread")
    if returned is None:
        _refuse(name, "None", f"{count} scores", "a `return` is missing")
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Sequence):
        mend = "return Scores(value=..., parts=...) to report components" if isinstance(returned, Mapping) else ""
        if isinstance(returned, Real):
            mend = "return a list of one score per sample, also when there is only one sample"
        _refuse(name, f"{type(returned).__name__} {short(returned)}", f"a list or tensor of {count} numbers", mend)
    if len(returned) != count:
        mend = "return the scores in the order of the samples; NaN or None for a sample without a verdict"
        _refuse(name, f"{len(returned)} scores", f"{count}, one per sample", mend)
    return [_number(item, index, name) for index, item in enumerate(returned)]


def _number(item: Any, index: int, name: str) -> float:
    if item is None:
        return float("nan")
    if isinstance(item, Tensor | np.generic | np.ndarray) and item.ndim == 0:
        item = item.item()
    if isinstance(item, bool) or not isinstance(item, Real):
        mend = "use float(...) if the answer really is yes or no" if isinstance(item, bool) else "use float(...)"
        _refuse(name, f"{type(item).__name__} {short(item)} for sample {index}", "a number", mend)
    return float(item)


def short(value: object, most: int = 80) -> str:
    """A value as messages quote it: its repr, cut off after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _refuse(name: str, returned: str, expected: str, mend: str) -> NoReturn:
    advice = f" Mend: {mend}." if mend else ""
    raise RewardContractError(f"reward {name!r} returned {returned}; expected {expected}.{advice}")
