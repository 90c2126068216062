"""The record of a run: metrics.jsonl is the truth, the console and trackers are conveniences that may fail.

    metrics.jsonl        one row an iteration, {"iteration": 0, ...}; written before the checkpoint that follows it
    evaluations.jsonl    one row an evaluation, under the number of iterations that came before it

A resumed run repeats the iterations after its checkpoint, so their rows are dropped first: no row is there twice and
none is missing.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.metrics import duration

if TYPE_CHECKING:
    from rich.console import Console

    from flowrl.config import LogConfig

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
SHOWN = ("reward/mean", "reward/group_std", "zero_std_frac", "clip_frac", "kl", "grad_norm", "lr")
"""What the console line shows of a row, as far as the row has it."""

_ETA_WINDOW = 20
"""Iterations over which the remaining time is estimated."""


class RunLog:
    """Rows on disk, a line on the console, and trackers. On other processes than the main one it does nothing."""

    def __init__(
        self,
        folder: str | Path,
        config: LogConfig | None = None,
        *,
        resume_at: int = 0,
        total: int | None = None,
        main: bool = True,
        name: str = "",
        console: Console | None = None,
    ) -> None:
        """`resume_at` is the first iteration that will be written; rows from there on are dropped."""
        self.folder, self.main, self.total = Path(folder), main, total
        self._times: deque[float] = deque([time.monotonic()], maxlen=_ETA_WINDOW + 1)
        self._trackers: dict[str, _Tracker] = {}
        self._console = console
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        have = drop_rows(self.folder / METRICS, resume_at)
        # The evaluation after `resume_at` iterations is not repeated: its weights are those of the checkpoint.
        drop_rows(self.folder / EVALUATIONS, resume_at + 1 if resume_at else 0)
        missing = sorted(set(range(resume_at)) - set(have))
        if missing:
            self._warn(f"{self.folder / METRICS} lacks {len(missing)} earlier iterations, the first is {missing[0]}")
        self._rows = (self.folder / METRICS).open("a", encoding="utf-8")
        self._evaluations = (self.folder / EVALUATIONS).open("a", encoding="utf-8")
        self._start_trackers(config, name or self.folder.name, resume_at)

    # ------------------------------------------------------------------------------------------------ what is recorded

    def write(self, iteration: int, row: Mapping[str, Any]) -> None:
        """One iteration's row: to disk at once, then to the console and the trackers."""
        if not self.main:
            return
        clean = plain(row)
        _append(self._rows, {"iteration": iteration, **clean})
        self._times.append(time.monotonic())
        self.say(self._line(iteration, clean))
        self._track(iteration, clean)

    def evaluation(self, iteration: int, row: Mapping[str, Any]) -> None:
        """One evaluation's row, after `iteration` iterations."""
        if not self.main:
            return
        clean = plain(row)
        _append(self._evaluations, {"iteration": iteration, **clean})
        numbers = _scalars(clean)
        self._track(iteration, {f"evaluation/{key}": value for key, value in numbers.items()})
        self._times.clear()  # an evaluation's time is not an iteration's
        self._times.append(time.monotonic())

    def say(self, text: str) -> None:
        """A line on the console, as it stands: prompts and paths are not read as markup."""
        if self.main:
            self._out().print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Close files and trackers; a second call does nothing."""
        if not self.main or self._rows.closed:
            return
        for tracker in list(self._trackers.values()):
            self._guard(tracker.name, tracker.finish)
        self._rows.close()
        self._evaluations.close()

    def __enter__(self) -> RunLog:
        """The log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # ------------------------------------------------------------------------------------------------ console

    def _out(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console()
        return self._console

    def _line(self, iteration: int, row: Mapping[str, Any]) -> str:
        numbers = _scalars(row)
        shown = [f"{key.removesuffix('/mean')} {numbers[key]:.4g}" for key in SHOWN if key in numbers]
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        place, eta = str(iteration + 1), ""
        if self.total is not None:
            place = f"{iteration + 1:>{len(str(self.total))}}/{self.total}"
            eta = f"  eta {duration(seconds * (self.total - iteration - 1))}"
        return f"{place}  " + "  ".join([*shown, f"{seconds:.2f}s"]) + eta

    def _warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)

    # ------------------------------------------------------------------------------------------------ trackers

    def _start_trackers(self, config: LogConfig | None, name: str, resume_at: int) -> None:
        if config is None:
            return
        wanted: dict[str, Callable[[], _Tracker]] = {
            tracker: lambda tracker=tracker: _Accelerate(tracker, name, self.folder)  # type: ignore[misc]
            for tracker in config.trackers
        }
        if config.tensorboard:
            wanted["tensorboard"] = lambda: _TensorBoard(self.folder / "tensorboard", resume_at)
        for key, make in wanted.items():

            def start(key: str = key, make: Callable[[], _Tracker] = make) -> None:
                self._trackers[key] = make()

            self._guard(key, start)

    def _track(self, iteration: int, row: Mapping[str, Any]) -> None:
        numbers = _scalars(row)
        for tracker in list(self._trackers.values()):
            self._guard(tracker.name, lambda tracker=tracker: tracker.log(numbers, iteration))  # type: ignore[misc]

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Do something with a tracker; the first failure switches it off with one warning, and training goes on."""
        try:
            action()
        except Exception as error:
            self._trackers.pop(name, None)
            self._warn(
                f"the tracker {name!r} failed and is off for the rest of the run ({type(error).__name__}: {error}); "
                f"{self.folder / METRICS} still records everything"
            )


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points at or after `purge_step` that an earlier process wrote are hidden: they are about to be repeated.
        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_at or None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class _Accelerate:
    """One of the services that accelerate can talk to."""

    def __init__(self, name: str, run: str, folder: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name = name
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"unknown; accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        PartialState()  # the trackers ask it whether they are on the main process
        cls = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = cls(run, logging_dir=str(folder)) if cls.requires_logging_directory else cls(run)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def finish(self) -> None:
        self._tracker.finish()


_Tracker = _TensorBoard | _Accelerate


# ------------------------------------------------------------------------------------------------ rows


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a crash cut short is left out."""
    rows = []
    for line in _lines(Path(path)):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            rows.append(row)
    return rows


def drop_rows(path: Path, start: int) -> list[int]:
    """Rewrite a log without rows from `start` on, repeated ones and broken lines; returns the iterations left."""
    rows = {row["iteration"]: row for row in read_rows(path) if row["iteration"] < start}
    kept = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows.values())
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != kept:
        write_atomic(path, kept)
    return list(rows)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old contents or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plain(value: Any) -> Any:
    """JSON values: tensors and numpy scalars become numbers, tuples lists, and NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # torch and numpy, of any shape
        return plain(value.tolist())
    return str(value)


def _scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those of inner mappings under `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _append(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
