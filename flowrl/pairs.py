"""The pair store: what was preferred to what, as a folder that can be read by eye, moved, and made elsewhere.

    pairs.jsonl          one pair a line
    media/00012_03.png   an image, lossless; a video is .safetensors with one tensor "media", uint8 [F,3,H,W]

    {"prompt": "a red star", "chosen": "media/00012_03.png", "rejected": "media/00012_00.png", "margin": 0.4,
     "scores": {"chosen": {"shapes": 0.9}, "rejected": {"shapes": 0.5}}, "rewards": {"chosen": 0.9, "rejected": 0.5},
     "metadata": {"category": "colors"}, "policy": {"model": "shapes", "weights": null, ...}}

Only prompt, chosen and rejected are needed. `flowrl pairs make` writes such a folder. Files are named relative to it,
and none outside it is read. Nothing here is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from flowrl.algorithms.pairing import choose
from flowrl.data import PAIRS, DataError, json_row, read_lines, short
from flowrl.resolve import nearest
from flowrl.types import Prompt

__all__ = ["MEDIA", "PAIRS", "STORE", "Pair", "choose", "describe_pairs", "load_media", "read_pairs", "save_media"]

MEDIA, STORE = "media", "store.json"

_SIDES = ("chosen", "rejected")
_OPTIONAL = ("margin", "scores", "rewards", "metadata", "policy")
_TENSOR = "media"
_IMAGES = ("PNG", "JPEG", "WEBP")  # all that PIL may try: some of its other formats start programs
_SHOWN = 10
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One checked row."""

    prompt: str
    chosen: Path
    """Absolute, as `rejected`."""
    rejected: Path
    rewards: tuple[float, float]
    """Of the chosen and of the rejected; 1 and 0 where the row has none."""
    margin: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)


class _BrokenError(ValueError):
    """What is wrong with a row, and how to mend it."""


# ------------------------------------------------------------------------------------------------ reading


def read_pairs(path: str | Path) -> list[Prompt]:
    """The pairs of a store, given by its folder or its pairs.jsonl, one prompt each, numbered from 0.

    A prompt's metadata is its row's, and under "stored" [{"media": absolute path, "reward": number}, ...], the chosen
    first; without rewards in the row these are 1 and 0. Of the media only the headers are read. DataError names every
    broken row (the first 10) by file and line, what is wrong there, and how to mend it.
    """
    return [
        Prompt(id=index, text=pair.prompt, metadata={**pair.metadata, "stored": _stored(pair)})
        for index, pair in enumerate(_read_rows(path))
    ]


def describe_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(what, value) rows about a store: pairs, prompts, margins, ties, and which policies made them."""
    pairs = _read_rows(path)
    margins = torch.tensor([p.margin for p in pairs if p.margin is not None], dtype=torch.float64)
    rows = [("pairs", str(len(pairs))), ("prompts", str(len({p.prompt for p in pairs})))]
    if len(margins):
        at = margins.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
        of = f" (of {len(margins)} pairs)" if len(margins) < len(pairs) else ""
        rows.append((f"margin, mean{of}", f"{margins.mean().item():.4g}"))
        rows += [(f"margin, {q:.0%} quantile", f"{value:.4g}") for q, value in zip(_QUANTILES, at, strict=True)]
    counts = _counts(_file(path).parent / STORE)
    if counts["prompts"]:
        tied, unjudged = counts["tied"] / counts["prompts"], counts["unjudged"] / counts["prompts"]
        rows.append(("groups without a pair: ties", f"{counts['tied']} of {counts['prompts']} ({tied:.0%})"))
        rows.append(("groups without a pair: no verdicts", f"{counts['unjudged']} ({unjudged:.0%})"))
        rows.append(("samples without a verdict", str(counts["no_verdict"])))
    for policy, count in Counter(json.dumps(p.policy, sort_keys=True) for p in pairs).most_common():
        named = {key: value for key, value in json.loads(policy).items() if value is not None}
        rows.append((f"policy of {count} pairs", ", ".join(f"{k} {v}" for k, v in named.items()) or "unknown"))
    return rows


def _counts(path: Path) -> Counter[str]:
    """How many groups gave no pair, from the record of `flowrl pairs make`; zeros where the store is not of its making.

    DataError where the record is damaged.
    """
    if not path.is_file():
        return Counter()
    try:
        return Counter(json.loads(path.read_text(encoding="utf-8"))["counts"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); remove it (a rerun cannot go on from here then).") from error


def _stored(pair: Pair) -> list[dict[str, Any]]:
    media = (pair.chosen, pair.rejected)
    return [{"media": str(m), "reward": r} for m, r in zip(media, pair.rewards, strict=True)]


def _file(path: str | Path) -> Path:
    source = Path(path).expanduser()
    return source / PAIRS if source.is_dir() else source


def _read_rows(path: str | Path) -> list[Pair]:
    """Every pair of a store, or a DataError about all rows that are broken."""
    file = _file(path)
    if not file.is_file():
        there = nearest(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise DataError(
            f"there is no file {str(file)!r}{there}; looked for {file.absolute()}. Give the folder of a pair store or "
            f"its {PAIRS}; `flowrl pairs make CONFIG FOLDER` makes one."
        )
    lines, sizes = read_lines(file), dict[Path, tuple[int, int, int]]()
    pairs, broken = [], []
    for number, line in enumerate(lines, start=1):
        place = f"{file}:{number}"
        try:
            pairs.append(_pair(file.parent, place, line, sizes))
        except _BrokenError as error:
            broken.append(f"{place}: {error}")
        except DataError as error:  # of the reader of prompts, which names the place itself
            broken.append(str(error))
    if broken:
        more = f"\n... and {len(broken) - _SHOWN} more." if len(broken) > _SHOWN else ""
        listed = "\n".join(broken[:_SHOWN]) + more
        raise DataError(listed if len(broken) == 1 else f"{len(broken)} of {len(lines)} rows are broken.\n{listed}")
    if not pairs:
        raise DataError(f"{file} holds no pairs; lower --min-margin, or make more samples a prompt.")
    return pairs


def _pair(folder: Path, place: str, line: str, sizes: dict[Path, tuple[int, int, int]]) -> Pair:
    """A line, checked. `sizes` remembers the media that were looked at: pairs of one group share them."""
    prompt, row = json_row(place, line)
    for key in row:
        if key not in (*_SIDES, *_OPTIONAL):
            near = nearest(key, (*_SIDES, *_OPTIONAL))
            raise _BrokenError(f'unknown field {key!r}{near}; what belongs to the prompt goes into "metadata".')
    chosen, rejected = (_medium(folder, side, row) for side in _SIDES)
    if chosen == rejected:
        raise _BrokenError(
            f"chosen and rejected are the same file {row['chosen']!r}; name two, or remove the line: a tie is no pair."
        )
    for side, medium in zip(_SIDES, (chosen, rejected), strict=True):
        if medium not in sizes:
            sizes[medium] = _looked_at(medium, f"{side}: {short(row[side])}")
    if sizes[chosen] != sizes[rejected]:
        (f, h, w), (other_f, other_h, other_w) = sizes[chosen], sizes[rejected]
        raise _BrokenError(
            f"chosen is {f} x {h} x {w} (frames, height, width), rejected {other_f} x {other_h} x {other_w}; "
            "bring both to one size."
        )
    scores = _object(row, "scores")
    if scores and not all(isinstance(scores.get(side), dict) for side in _SIDES):
        raise _BrokenError(f'scores is {short(scores)}; expected {{"chosen": {{...}}, "rejected": {{...}}}}.')
    return Pair(
        prompt=prompt, chosen=chosen, rejected=rejected, rewards=_rewards(row), margin=_margin(row),
        metadata=_metadata(row), policy=_object(row, "policy"),
    )  # fmt: skip


def _medium(folder: Path, side: str, row: Mapping[str, Any]) -> Path:
    """The file that a row names, whichever way links lead, in the store and nowhere else."""
    if side not in row:
        raise _BrokenError(f'the field "{side}" is missing{nearest(side, row)}; name a file in {MEDIA}/.')
    name = row[side]
    try:
        if not isinstance(name, str) or not name.strip():
            raise ValueError
        root = Path(os.path.realpath(folder))
        file = Path(os.path.realpath(root / name))
    except ValueError as error:  # also characters that no file's name can have
        what = f"{side} is {short(name)}, not the name of a file"
        raise _BrokenError(f'{what}; write one such as "{MEDIA}/00012_03.png".') from error
    if Path(name).is_absolute() or not file.is_relative_to(root):
        raise _BrokenError(
            f"{side}: {short(name)} lies outside the store; copy it into {MEDIA}/, and name it relative to the store."
        )
    return file


def _looked_at(file: Path, what: str) -> tuple[int, int, int]:
    """Frames, height and width of a medium; only its header is read."""
    try:
        if not file.is_file():
            raise _BrokenError(f"{what} is no file; put it there, or remove the line.")
        return _size(file)
    except (OSError, SafetensorError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, _BrokenError):
            raise
        raise _BrokenError(f"{what} cannot be read ({error}); write it anew, or remove the line.") from error


def _size(file: Path) -> tuple[int, int, int]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            if list(tensors.keys()) != [_TENSOR]:
                raise ValueError(f'it holds {short(list(tensors.keys()))}, not the one tensor "{_TENSOR}"')
            entry = tensors.get_slice(_TENSOR)
            shape, dtype = entry.get_shape(), entry.get_dtype()
        if dtype != "U8" or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"its tensor is {dtype} {shape}, not U8 [F,3,H,W]")
        return shape[0], shape[2], shape[3]
    with Image.open(file, formats=_IMAGES) as image:
        if image.mode[0] in "IF":
            raise ValueError("it has more than 8 bits a channel")
        return 1, image.height, image.width


def _margin(row: Mapping[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if not _is_number(margin) or margin <= 0:
        raise _BrokenError(f"margin is {short(margin)}; expected a finite number above 0, or leave the field out.")
    return float(margin)


def _rewards(row: Mapping[str, Any]) -> tuple[float, float]:
    rewards = _object(row, "rewards")
    if not rewards:
        return 1.0, 0.0
    values: list[Any] = [rewards.get(side) for side in _SIDES]
    if not all(map(_is_number, values)):
        raise _BrokenError(
            f'rewards is {short(rewards)}; expected finite numbers as in {{"chosen": 0.9, "rejected": 0.5}}, or leave '
            "the field out."
        )
    chosen, rejected = (float(value) for value in values)
    if chosen <= rejected:
        raise _BrokenError(
            f"rewards has {chosen:g} for the chosen and {rejected:g} for the rejected, which is no preference for the "
            "chosen; swap the two, or leave the field out (then 1 and 0 are taken)."
        )
    return chosen, rejected


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = _object(row, "metadata")
    if "stored" in metadata:
        raise _BrokenError('metadata has a field "stored", which is the name of the media themselves; rename it.')
    return metadata


def _object(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    if value is not None and not isinstance(value, dict):
        what = f"{type(value).__name__} {short(value)}"
        raise _BrokenError(f"{key} is {what}; expected an object, or leave the field out.")
    return value or {}


def _is_number(value: Any) -> bool:
    """Whether it is finite as a float; a JSON integer may have any number of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


# ------------------------------------------------------------------------------------------------ media


def load_media(path: str | Path) -> Tensor:
    """Media [F,3,H,W] float32 in [0,1] of a file of the store: an image has one frame. DataError if it is damaged."""
    file = Path(path)
    try:
        _size(file)  # its form, so that no other number is taken for a pixel
        if file.suffix == ".safetensors":
            return load_file(file)[_TENSOR].float() / 255
        with Image.open(file, formats=_IMAGES) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SafetensorError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read ({error}); write it anew, or remove its pairs.") from error
    return pixels.permute(2, 0, 1).contiguous().float()[None] / 255


def save_media(media: Tensor, folder: Path, name: str) -> str:
    """Writes media [F,3,H,W] in [0,1], rounded to 8 bits, into the store `folder`; returns its name in a row.

    One frame becomes a PNG, several a .safetensors; both are read back as they were rounded. The file is on the disk
    when this returns.
    """
    pixels = (media.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    if len(pixels) == 1:
        buffer = io.BytesIO()
        Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
        relative, data = f"{MEDIA}/{name}.png", buffer.getvalue()
    else:
        relative, data = f"{MEDIA}/{name}.safetensors", to_bytes({_TENSOR: pixels.contiguous()})
    (folder / MEDIA).mkdir(parents=True, exist_ok=True)
    with (folder / relative).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return relative
