"""Plain functions as rewards. Two signatures are understood, and the parameters' names tell which one is meant.

    def my(samples, strength=1.0): ...                 all samples; other parameters are options, set in the config
    def my(images, prompts, text, strength=1.0): ...   columns: `images` [n, 3, H, W] stacked, `prompts` a list of str;
                                                       a parameter without a default is a column of `Sample.meta` (here
                                                       "text" is needed), one with a default is an option, and
                                                       `**columns` receives every other meta key that all samples have

`images`, `videos` or `media` says what the function judges: images, videos [n, F, 3, H, W], or both.
Media of different sizes cannot be stacked: the function is then called once per size.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from rewards.contract import Sheet, as_scores
from rewards.types import Reward, RewardError, Sample, ScoreLike, Scores, Traits

_MEDIA = {"images": {"image"}, "videos": {"video"}, "media": {"image", "video"}}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def from_function(function: Callable[..., Any], options: Mapping[str, Any]) -> Reward:
    """A function with its options bound, as a reward."""
    return _FunctionReward(function, options)


class _FunctionReward:
    """A function with its options, as a reward; it declares what the function declares."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Check the signature and the options now, so that a typo does not wait for the first batch."""
        self._label = label(function)
        self._function, self._options = function, dict(options)
        parameters = inspect.signature(function).parameters
        named = [p for p in parameters.values() if p.kind in _NAMED]
        self._media = _media_column(parameters)
        fixed = {self._media, "prompts"} if self._media else {p.name for p in named[:1]}
        check_options(self._label, options, [p.name for p in named if p.name not in fixed])
        required = [p.name for p in named if p.name not in fixed | set(options) and p.default is p.empty]
        self._rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if self._media:
            self.media = _MEDIA[self._media]
            self.needs = tuple(required)
        elif required or not named or named[0].kind is inspect.Parameter.KEYWORD_ONLY:
            raise RewardError(
                f"reward {self._label!r} has the signature {inspect.signature(function)}; expected "
                "(samples, option=default, ...) or (images, prompts, ...). "
                f"Not understood: {', '.join(required) or 'nothing takes the samples'}."
            )
        for key in Traits.__dataclass_fields__:
            if hasattr(function, key):
                setattr(self, key, getattr(function, key))

    def score(self, samples: Sequence[Sample]) -> ScoreLike:
        """Call the function the way its signature asks for."""
        if not self._media:
            answer: ScoreLike = self._function(samples, **self._options)
            return answer
        by_shape: dict[torch.Size, list[int]] = {}
        for index, sample in enumerate(samples):
            by_shape.setdefault(sample.media.shape, []).append(index)
        if len(by_shape) == 1:
            return self._call_columns(samples)
        sheet = Sheet(len(samples))
        for rows in by_shape.values():
            sheet.put(rows, as_scores(self._call_columns([samples[row] for row in rows]), len(rows), self._label))
        return Scores(value=sheet.value, parts=sheet.parts, info=sheet.info)

    def _call_columns(self, samples: Sequence[Sample]) -> ScoreLike:
        keys = set(self.needs)
        if self._rest:
            keys |= set.intersection(*(set(sample.meta) for sample in samples)) - set(self._options)
        columns: dict[str, Any] = {key: [sample.meta[key] for sample in samples] for key in sorted(keys)}
        columns[str(self._media)] = torch.stack([sample.media for sample in samples])
        columns["prompts"] = [sample.prompt for sample in samples]
        answer: ScoreLike = self._function(**columns, **self._options)
        return answer


def label(use: object) -> str:
    """What a function, class or object is called."""
    if isinstance(use, functools.partial):
        return label(use.func)
    return str(getattr(use, "__name__", None) or type(use).__name__)


def check_options(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an option that a reward does not have, naming the one that was probably meant."""
    for key in options:
        if key not in known:
            meant = nearest(key, known)
            raise RewardError(f"reward {name!r} has no option {key!r}{meant}. It has: {', '.join(known) or 'none'}.")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` (did you mean ...?)` for a word that is almost one of `known`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=cutoff)
    return f" (did you mean {' or '.join(repr(match) for match in close)}?)" if close else ""


def _media_column(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Name of the media parameter of the columns signature; None for the samples signature."""
    return next((key for key in parameters if key in _MEDIA), None) if "prompts" in parameters else None
