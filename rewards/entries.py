"""The `rewards:` section of a config, read into scorers and rules.

    rewards:
      - {use: ocr, weight: 0.5, mode: contain}          `mode` is an option of the reward itself
      - {use: pixel.jpeg_size, norm: {affine: [30, 10]}}
      - {use: "./mine.py:sharpness", gate: {min: 0.3}, weight: 0}

or `{ocr: 0.5, pixel.jpeg_size: 1.0}` for names with weights, or in Python any mixture of names, functions, classes and
objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rewards.cache import ScoreCache
from rewards.combine import Rule, make_rule
from rewards.functions import label, nearest
from rewards.resolve import available, build
from rewards.scorer import Scorer
from rewards.types import RewardError, Traits, traits_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the hub is told about one reward; every other key of its config entry is an option of the reward."""

    use: Any
    name: str | None = None
    """Key of its scores; by default what `use` says."""
    weight: Any = 1.0
    norm: Any = None
    gate: Any = None
    min_std: Any = 0.0
    on_error: str = "nan"
    device: str | torch.device | None = None
    dtype: str | torch.dtype = "float32"
    batch_size: int | None = None
    frames: int = 4
    offload: str = "none"
    """Where its weights are between calls: none, cpu or drop; a network that another loaded reward shares stays."""
    cache: int = 0
    """How many verdicts to remember."""


KEYS = tuple(Entry.__dataclass_fields__)


def read_entries(entries: Any, device: torch.device) -> list[tuple[Scorer, Rule]]:
    """Scorers and rules in the order of the entries; nothing is loaded yet."""
    read = [_read(entry, device) for entry in _as_list(entries)]
    if not read:
        raise RewardError("no reward is given; there are: " + ", ".join(available()))
    names = [scorer.name for scorer, _ in read]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"two rewards are called {name!r}; tell them apart with `name:`")
    if not any(rule.counts for _, rule in read):
        raise RewardError(f"every reward has weight 0 ({', '.join(names)}): nothing to train on; give one a weight")
    return read


def place(device: str | torch.device) -> torch.device:
    """A device, with an index where it has one, so that "cuda" and "cuda:0" are one lane."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RewardError(
            f"device {str(device)!r} is none: {str(error).splitlines()[0]} Mend: auto, cpu or cuda:1"
        ) from error
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _as_list(entries: Any) -> list[Any]:
    if isinstance(entries, Mapping) and "use" not in entries:
        return [{"use": use, "weight": weight} for use, weight in entries.items()]
    return list(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries]


def _read(entry: Any, device: torch.device) -> tuple[Scorer, Rule]:
    given = dict(entry) if isinstance(entry, Mapping) else {"use": entry}
    if "use" not in given:
        raise RewardError(f"a reward entry needs `use: name`; this one has {', '.join(map(str, given)) or 'nothing'}")
    options = {key: value for key, value in given.items() if key not in KEYS}
    read = Entry(**{key: value for key, value in given.items() if key in KEYS})
    try:
        reward = build(read.use, options)
    except RewardError as error:
        meant = {key: nearest(key, KEYS, cutoff=0.75) for key in options}
        raise type(error)(" ".join([str(error), *(f"{key!r}{hint}" for key, hint in meant.items() if hint)])) from error
    traits = traits_of(reward)
    name = read.name or traits.name or _default_name(read.use)
    scorer = Scorer(
        reward=reward,
        name=name,
        traits=traits,
        device=place(read.device or traits.device or device),
        dtype=_dtype(name, read.dtype),
        batch_size=_at_least_one(name, "batch_size", read.batch_size),
        on_error=_on_error(name, read.on_error),
        frames=_at_least_one(name, "frames", read.frames) or 1,
        offload=_offload(name, read.offload),
        cache=_cache(name, read.cache, traits, f"{read.use!r} {options!r} {read.dtype} {read.frames}"),
    )
    return scorer, make_rule(name, read.weight, read.norm, read.gate, traits.range, read.min_std)


def _default_name(use: Any) -> str:
    """What the config calls it; for a path, what stands after the colon."""
    return use.rpartition(":")[2] if isinstance(use, str) else label(use)


def _dtype(name: str, dtype: Any) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RewardError(f"reward {name!r}: dtype is {dtype!r}; expected float32, bfloat16 or float16")
    return found


def _on_error(name: str, policy: Any) -> Literal["nan", "raise"]:
    if policy == "nan":
        return "nan"
    if policy == "raise":
        return "raise"
    raise RewardError(
        f"reward {name!r}: on_error is {policy!r}; expected nan (no verdict on that sample) or raise. "
        "There is no 0: a policy would learn from it."
    )


def _offload(name: str, where: Any) -> Literal["none", "cpu", "drop"]:
    if where in ("none", "cpu", "drop"):
        return where
    raise RewardError(
        f"reward {name!r}: offload is {where!r}; expected none (the weights stay where they score), cpu (they wait in "
        "the main memory between calls) or drop (they are read again for every call)"
    )


def _at_least_one(name: str, key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise RewardError(f"reward {name!r}: {key} is {value!r}; expected a whole number of at least 1")
    return value


def _cache(name: str, size: int, traits: Traits, identity: str) -> ScoreCache | None:
    if not size:
        return None
    if not traits.deterministic or traits.scope == "group":
        raise RewardError(
            f"reward {name!r} cannot be cached: it declares deterministic = {traits.deterministic} and scope = "
            f"{traits.scope!r}; expected True and 'sample'"
        )
    return ScoreCache(identity, size)
