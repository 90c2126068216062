"""The `rewards:` section of a config, read into scorers and rules.

    rewards:
      - {use: ocr, weight: 0.5, mode: contain}          `mode` is an option of the reward itself
      - {use: pixel.jpeg_size, norm: {affine: [30, 10]}}
      - {use: "./mine.py:sharpness", gate: {min: 0.3}, weight: 0}

or `{ocr: 0.5, pixel.jpeg_size: 1.0}` for names with weights, or in Python any mixture of names, functions, classes and objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewards.cache import ScoreCache
from rewards.combine import Rule, make_rule
from rewards.functions import nearest
from rewards.resolve import build
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
    on_error: str = "nan"
    device: str | None = None
    dtype: str = "float32"
    batch_size: int | None = None
    frames: int = 4
    cache: int = 0
    """How many verdicts to remember."""


KEYS = tuple(Entry.__dataclass_fields__)


def read_entries(entries: Any, device: torch.device) -> list[tuple[Scorer, Rule]]:
    """Scorers and rules in the order of the entries; nothing is loaded yet."""
    read = [_read(entry, device) for entry in _as_list(entries)]
    names = [scorer.name for scorer, _ in read]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"two rewards are called {name!r}; tell them apart with `name:`")
    if read and not any(rule.counts for _, rule in read):
        raise RewardError(f"every reward has weight 0 ({', '.join(names)}), so there is nothing to train on; give one a weight")
    return read
