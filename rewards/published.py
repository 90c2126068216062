"""Published accuracies of rewards, each with its split, its rule for ties and its source (`data/published.yaml`).

The same model on "the same" benchmark has several numbers: PickScore on Pick-a-Pic is 70.5 % by one rule for ties and
80.2 % by another. A number without rule and split says little, so none is here without them, and none from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards.types import RewardError

__all__ = ["Published", "published"]

_FILE = Path(__file__).parent / "data" / "published.yaml"
_COLUMN = ("benchmark", "split", "metric", "ties")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One number of one table."""

    model: str
    benchmark: str
    split: str
    metric: str
    """What was measured, `pairwise accuracy` for instance; in percent."""
    value: float
    ties: str
    """What was done with ties of the labels and of the scores; "not stated" where the source does not say."""
    source: str
    """Address of the page that it was read on."""
    note: str = ""


def published(model: str | None = None, benchmark: str | None = None) -> list[Published]:
    """The rows about a model and a benchmark, in the order of the file; case and punctuation do not count."""
    return [
        row
        for row in _read(_FILE)
        if (model is None or _plain(row.model) == _plain(model))
        and (benchmark is None or _plain(row.benchmark) == _plain(benchmark))
    ]


@lru_cache(maxsize=4)
def _read(file: Path) -> tuple[Published, ...]:
    import yaml

    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    return tuple(row for number, table in enumerate(data["tables"]) for row in _rows(f"{file}: table {number}", table))


def _rows(place: str, table: Mapping[str, Any]) -> Iterator[Published]:
    """The cells of a table; a null is a cell that the source leaves empty."""
    columns = table["columns"]
    for column in columns:
        missing = [key for key in (*_COLUMN, "source") if not str({**table, **column}.get(key) or "").strip()]
        if missing:
            raise RewardError(f"{place}: column {column} has no {' and no '.join(missing)}")
    for model, values in table["rows"].items():
        if len(values) != len(columns):
            raise RewardError(f"{place}: {model} has {len(values)} values for {len(columns)} columns")
        for column, value in zip(columns, values, strict=True):
            if value is not None:
                shared = {key: str({**table, **column}[key]) for key in (*_COLUMN, "source")}
                note = " ".join(filter(None, (table.get("note"), table.get("notes", {}).get(model))))
                yield Published(model=str(model), value=float(value), note=note, **shared)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
