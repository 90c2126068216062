"""How hard questions are for a model: pass rates of its answers, written beside the rows they belong to.

    grades = grade(rewards, prompts)
    write_graded("questions.jsonl", grades, "graded.jsonl")

Curricula and filters read `difficulty` and `pass_rate` from there.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.data import IMAGES, DataError
from flowrl.vlm.metrics import pass_at_k
from flowrl.vlm.rows import PICTURES, Row, first_of, image_of, read_rows, stored, write_whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grade:
    """How well a model answers one question."""

    right: int
    count: int
    """Answers with a verdict."""
    mean_reward: float
    pass_at: Mapping[int, float]
    """{k: pass@k} for each k that the answers suffice for."""

    @property
    def pass_rate(self) -> float:
        """Share of right answers."""
        return self.right / self.count

    @property
    def difficulty(self) -> float:
        """Share of wrong answers: 0 is always right, 1 never."""
        return 1 - self.pass_rate


def grade(
    rewards: Tensor, prompt: Tensor, *, threshold: float = 0.5, passes: Sequence[int] = (1, 2, 4, 8, 16)
) -> dict[int, Grade]:
    """{prompt: its grade} of B answers with rewards [B], NaN = no verdict, to the prompts [B].

    An answer is right from `threshold` on. A prompt without a verdict has no grade.
    """
    scores: dict[int, list[float]] = {}
    for number, value in zip(prompt.tolist(), rewards.tolist(), strict=True):
        if not math.isnan(value):
            scores.setdefault(number, []).append(value)
    return {number: _grade(values, threshold, passes) for number, values in sorted(scores.items())}


def _grade(values: Sequence[float], threshold: float, passes: Sequence[int]) -> Grade:
    right, count = sum(value >= threshold for value in values), len(values)
    pass_at = {k: pass_at_k(right, count, k) for k in passes if k <= count}
    return Grade(right, count, math.fsum(values) / count, pass_at)


def write_graded(
    source: str | Path | Sequence[str], grades: Mapping[int, Grade], file: str | Path, split: str = "train",
    fields: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """Write the rows of a source again, with `difficulty`, `pass_rate` and more, as a .jsonl file; how many.

    Rows are counted as `load_questions` numbers them; one without a grade stays as it is. Paths are made relative to
    the new file, and pictures that have none are saved beside it.
    """
    target = Path(file).expanduser()
    if isinstance(source, str | Path) and target.resolve() == Path(source).expanduser().resolve():
        raise DataError(f"{target}: the graded rows would replace their source; give another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    column = (fields or {}).get(IMAGES)
    lines = [
        json.dumps(_plain({**_portable(row, column, target), **_told(grades.get(number))}), ensure_ascii=False)
        for number, row in enumerate(read_rows(source, split))
    ]
    write_whole(target, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def _told(grade: Grade | None) -> dict[str, Any]:
    if grade is None:
        return {}
    passes = {f"pass@{k}": value for k, value in grade.pass_at.items()}
    return {
        "difficulty": grade.difficulty, "pass_rate": grade.pass_rate, "right": grade.right, "answers": grade.count,
        "mean_reward": grade.mean_reward, **passes,
    }  # fmt: skip


def _portable(row: Row, column: str | None, target: Path) -> dict[str, Any]:
    """A row's fields with pictures as paths relative to the folder of `target`."""
    shown = first_of(row.fields, PICTURES if column is None else (column,))
    if shown is None or row.fields[shown] is None:
        return row.fields
    beside = target.parent / f"{target.stem}_pictures"
    given = row.fields[shown]
    listed = given if isinstance(given, list | tuple) else [given]
    files = [_saved(image_of(f"{row.place}: {shown!r}", item, row.folder, beside), beside) for item in listed]
    return {**row.fields, shown: [Path(os.path.relpath(file, target.parent.resolve())).as_posix() for file in files]}


def _saved(image: Any, folder: Path) -> str:
    if isinstance(image, str):
        return str(Path(image).resolve())
    png = io.BytesIO()
    image.save(png, format="PNG")
    return str(stored("picture", png.getvalue(), folder).resolve())


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN is null, what it does not know is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
