"""Scores remembered by what was scored; for rewards that declare `deterministic`, and off unless asked for.

A key holds everything a score may depend on: the reward and its configuration, the prompt, the fps, all of `meta`, and
the media's shape and bytes. Media is compared as uint8, which is what it would be saved as.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rewards.contract import Sheet
from rewards.media import to_uint8
from rewards.types import Sample, Scores


class ScoreCache:
    """The last `size` verdicts of one reward (least recently used leaves first)."""

    def __init__(self, identity: str, size: int) -> None:
        """`identity` names the reward and its configuration."""
        self._identity = identity
        self._size = size
        self._kept: OrderedDict[str, Scores] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def recall(self, key: str | None, row: int, sheet: Sheet) -> bool:
        """Write the verdict kept under `key` into a row, if there is one."""
        if key is None or key not in self._kept:
            self.misses += 1
            return False
        self.hits += 1
        self._kept.move_to_end(key)
        kept = self._kept[key]
        sheet.put([row], replace(kept, info=[dict(kept.info[0])]))
        return True

    def remember(self, keys: Mapping[int, str | None], sheet: Sheet) -> None:
        """Keep the verdicts of rows. A missing one is not kept: what failed may work the next time."""
        for row, key in keys.items():
            if key is None or sheet.value[row].isnan():
                continue
            parts = {name: part[[row]] for name, part in sheet.parts.items()}
            self._kept[key] = Scores(value=sheet.value[[row]], parts=parts, info=[dict(sheet.info[row])])
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def key(self, sample: Sample) -> str | None:
        """sha256 of all that a score may depend on; None where `meta` holds something that has no stable bytes."""
        digest = hashlib.sha256()
        try:
            _feed(digest, [self._identity, sample.prompt, sample.fps, dict(sample.meta), to_uint8(sample.media)])
        except TypeError:
            return None
        return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    """Type, length and content of a value, so that no two different values run into the same bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "O":
            raise TypeError("an array of objects has no stable bytes")
        digest.update(f"array {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"map {len(value)}".encode())
        for key in sorted(value):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, str | int | float | bool):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)}".encode() + text)
    else:
        raise TypeError(f"{type(value).__name__} has no stable bytes")
