"""Single samples of a rollout, with what every reward said and why: rollouts/000010.jsonl and a picture beside it.

A mean does not tell why a reward rises. One line a sample does: prompt, what a model wrote, group, total, raw scores,
their parts, what was read or answered, and the error where there is no verdict. `cell` is its place in the picture, row
and column.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.types import AnyBatch, Batch, TokenBatch
from rewards import HubResult
from rewards.media import to_pil

CELL = 96
"""Pixels of a thumbnail."""
TEXT, ITEMS = 4000, 100
"""Characters of a text, and items of a list, that are kept of what a reward says."""
GROUPS, SAMPLES = 12, 16
"""At most so many groups are written, and so many samples of each."""


def write_rollout(folder: Path, iteration: int, batch: AnyBatch, result: HubResult) -> None:
    """The first groups of this process: `<iteration>.jsonl` and, where there are media, `<iteration>.jpg`."""
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group.tolist()):
        groups.setdefault(group, []).append(row)
    shown = {group: rows[:SAMPLES] for group, rows in list(groups.items())[:GROUPS]}
    cells = {row: (i, j) for i, rows in enumerate(shown.values()) for j, row in enumerate(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_line(row, cell, batch, result) for row, cell in cells.items()]
    text = "".join(json.dumps(line, default=str, allow_nan=False) + "\n" for line in lines)
    (folder / f"{iteration:06d}.jsonl").write_text(text, encoding="utf-8")
    if isinstance(batch, Batch) and batch.media is not None and cells:
        _sheet(batch, cells).save(folder / f"{iteration:06d}.jpg", quality=88)


def forget_after(folder: Path, iteration: int) -> None:
    """Remove the records of iterations from `iteration` on, which will be repeated."""
    for path in folder.glob("[0-9]*"):
        if path.stem.isdigit() and int(path.stem) >= iteration:
            path.unlink()


def _line(row: int, cell: tuple[int, int], batch: AnyBatch, result: HubResult) -> dict[str, Any]:
    prompt = batch.prompts[int(batch.leaf_prompt[row])]
    return {
        "prompt": prompt.text, "prompt_id": prompt.id, "group": int(batch.group[row]), "cell": cell,
        **(_answered(batch, row) if isinstance(batch, TokenBatch) else {}),
        "total": _number(result.total[row]),
        "scores": {name: _number(score[row]) for name, score in result.scores.items()},
        "parts": {
            name: {part: _number(values[row]) for part, values in parts.items()}
            for name, parts in result.parts.items() if parts
        },
        "info": {name: _plain(entry) for name, entry in result.info[row].items() if entry},
    }  # fmt: skip


def _answered(batch: TokenBatch, row: int) -> dict[str, Any]:
    """What was written, what was right, and what was shown where that is a file."""
    meta = batch.samples[row].meta
    shown = [path for path in meta.get("images", ()) if isinstance(path, str)]
    return {"response": batch.samples[row].response[:TEXT], "answer": _plain(meta.get("answer")), "images": shown}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(value: Any, depth: int = 8) -> Any:
    """What JSON has a form for, within limits: a reward may say anything. NaN becomes null."""
    if isinstance(value, dict) and depth:
        return {str(key)[:TEXT]: _plain(item, depth - 1) for key, item in list(value.items())[:ITEMS]}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value[:ITEMS]]
    if value is None or isinstance(value, bool | int):
        return value
    return _number(value) if isinstance(value, float) else str(value)[:TEXT] if depth else "..."


def _sheet(batch: Batch, cells: dict[int, tuple[int, int]]) -> Image.Image:
    """First frames as thumbnails, a group a row."""
    assert batch.media is not None
    rows, columns = (1 + max(cell[axis] for cell in cells.values()) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * (CELL + 4) + 4, rows * (CELL + 4) + 4), "white")
    for row, (i, j) in cells.items():
        frame = batch.media[row, 0] if batch.media.ndim == 5 else batch.media[row]
        picture = to_pil(frame)
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(picture, (4 + j * (CELL + 4), 4 + i * (CELL + 4)))
    return sheet
