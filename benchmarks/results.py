"""From the folders of runs to one table: what was spent, what was gained, and how sure that is.

Everything is read from the files that a run leaves: calls are the counted ones of metrics.jsonl, gains and their errors
come from the score of every sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowrl.evaluate import paired_gain

CARD = "benchmark.json"
STRICT, STRICTER = "shapes.strict", "shapes.stricter"
FIDELITY, PLACEMENT, COLOR = "fidelity", "diversity/placement", "diversity/color"

ROUTES = ("shapes_clip",)
"""Rewards that methods with direct gradients are trained on."""

MARKED_BELOW = 10.0
"""Percentage points of gain under which a method is marked: it has hardly learnt at this budget."""


class BenchmarkError(ValueError):
    """The benchmark cannot do what was asked; says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a run of the benchmark was asked for; lies in its folder as benchmark.json."""

    config: str
    budget: int
    """Denoiser calls that it may cost."""
    predicted: int
    """Denoiser calls that it was predicted to cost."""
    iterations: int
    seed: int
    threads: int
    jobs: int
    """Runs that went on beside each other."""
    changes: Sequence[str] = ()
    """Further overrides of the config."""


def read_card(folder: Path) -> Card:
    """The card in a run's folder."""
    return Card(**json.loads((folder / CARD).read_text(encoding="utf-8")))


def finished(folder: Path, iterations: int) -> bool:
    """Whether a run has come to the end of its iterations."""
    status = folder / "status.json"
    return status.is_file() and json.loads(status.read_text()) == {"state": "finished", "iteration": iterations}


class Value(NamedTuple):
    """A mean and its standard error, None where there is none."""

    mean: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a run, and what had been spent on it until then."""

    iteration: int
    calls: int
    seconds: float
    values: dict[str, Value]
    """Every score (`shapes.strict`, in [0, 1]) and measure (`fidelity`) by its name."""

    def mean(self, name: str) -> float | None:
        """The mean of a score or measure; None where this evaluation has none."""
        return self.values.get(name, Value()).mean


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its evaluations, the base model's first."""

    name: str
    card: Card
    points: list[Point]
    before: list[float | None]
    """Strict score of each sample before training; None = no verdict."""
    after: list[float | None]
    """The same prompts and noise after it."""
    prompts: list[str]


# ------------------------------------------------------------------------------------------------ reading


def read_runs(output: Path) -> tuple[list[Run], list[str]]:
    """The finished runs below a folder, by name, and a sentence about each that is not."""
    folders = sorted(path.parent for path in output.glob(f"*/{CARD}"))
    done = [folder for folder in folders if finished(folder, read_card(folder).iterations)]
    if not done:
        raise BenchmarkError(f"{output} has no finished run; make some: python -m benchmarks.learning run")
    missing = [f"{folder.name} has not finished and is left out." for folder in folders if folder not in done]
    return [read_run(folder) for folder in done], missing


def read_run(folder: Path) -> Run:
    """One finished run."""
    spent = [0]
    for row in _rows(folder / "metrics.jsonl"):
        spent.append(spent[-1] + counted_calls(row))
    points = [
        Point(
            iteration=row["iteration"], calls=spent[row["iteration"]], seconds=row["train_seconds"],
            values={name: Value(e["mean"], e["se"]) for name, e in (row["scores"] | row["measures"]).items()},
        )
        for row in _rows(folder / "evaluations.jsonl")
    ]  # fmt: skip
    first, last = (
        json.loads((folder / "samples" / f"{point.iteration:06d}.json").read_text(encoding="utf-8"))
        for point in (points[0], points[-1])
    )
    if STRICT not in first["scores"]:
        raise BenchmarkError(
            f"{folder} has no score {STRICT}, which the benchmark compares; add {{use: shapes, weight: 0}} to the "
            "rewards of its config."
        )
    return Run(
        name=folder.name, card=read_card(folder), points=points, before=first["scores"][STRICT],
        after=last["scores"][STRICT], prompts=first["prompts"],
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ numbers


def counted_calls(row: Mapping[str, Any]) -> int:
    """Denoiser calls of one iteration, in every role that its row of metrics.jsonl has under `calls/`."""
    return round(sum(count for name, count in row.items() if name.startswith("calls/")))


def calls_to_reach(points: Sequence[Point], target: float, name: str = STRICT) -> float | None:
    """Calls after which a score first stood at `target`, on straight lines between evaluations; None = never."""
    known = [(point.calls, mean) for point in points if (mean := point.mean(name)) is not None]
    for i, (calls, score) in enumerate(known):
        if score >= target:
            if i == 0:
                return float(calls)
            calls_before, score_before = known[i - 1]
            return calls_before + (calls - calls_before) * (target - score_before) / (score - score_before)
    return None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says about one method. Scores and gain in percent, measures in [0, 1]; None = not known."""

    method: str
    card: Card
    iterations: int
    calls: int
    """Counted, not predicted."""
    seconds: float
    base: float | None
    final: float | None
    gain: Value
    """Percentage points after - before, paired by prompt and noise, over the samples with both verdicts."""
    stricter: float | None
    fidelity: float | None
    placement: float | None
    color: float | None
    reach: float | None
    """Calls to the reference's final score."""
    ratio: float | None
    """Those calls as a share of all that the reference spent."""
    evaluations: list[Point]

    @property
    def marked(self) -> bool:
        """Whether it gained less than MARKED_BELOW, or nobody knows what."""
        return self.gain.mean is None or self.gain.mean < MARKED_BELOW


@dataclass(frozen=True, kw_only=True)
class Table:
    """All methods, the largest gain first."""

    reference: str
    rows: list[Row]
    notes: list[str]
    """What a reader must know before comparing rows."""


def table(runs: Sequence[Run], reference: str, notes: Sequence[str] = ()) -> Table:
    """The rows of the runs, and the notes with what else makes them hard to compare."""
    standard = next((run for run in runs if run.name == reference), None)
    rows = sorted((_row(run, standard) for run in runs), key=_order)
    absent = [] if standard else [f"There is no finished run of the reference {reference}, so nobody races to it."]
    return Table(reference=reference, rows=rows, notes=[*notes, *absent, *differences(runs)])


def differences(runs: Sequence[Run]) -> list[str]:
    """Sentences about what should be equal in all runs and is not."""
    same: dict[str, Callable[[Run], object]] = {
        "budget": lambda run: run.card.budget,
        "seed": lambda run: run.card.seed,
        "number of threads": lambda run: run.card.threads,
        "set of evaluation prompts": lambda run: run.prompts,
        "score of the base model": lambda run: run.before,
    }
    first = runs[0]
    found = {what: [run.name for run in runs if get(run) != get(first)] for what, get in same.items()}
    return [f"Not the same {what} as {first.name}: {', '.join(names)}." for what, names in found.items() if names]


def _row(run: Run, standard: Run | None) -> Row:
    first, last = run.points[0], run.points[-1]
    target = standard.points[-1].mean(STRICT) if standard else None
    reach = None if target is None else calls_to_reach(run.points, target)
    return Row(
        method=run.name, card=run.card, iterations=last.iteration, calls=last.calls, seconds=last.seconds,
        base=_percent(first.mean(STRICT)), final=_percent(last.mean(STRICT)),
        gain=Value(*(_percent(x) for x in paired_gain(_tensor(run.before), _tensor(run.after)))),
        stricter=_percent(last.mean(STRICTER)), fidelity=last.mean(FIDELITY), placement=last.mean(PLACEMENT),
        color=last.mean(COLOR), reach=reach,
        ratio=None if reach is None or standard is None else reach / standard.points[-1].calls, evaluations=run.points,
    )  # fmt: skip


def _order(row: Row) -> tuple[float, str]:
    return (math.inf if row.gain.mean is None else -row.gain.mean, row.method)


def _tensor(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([math.nan if v is None else v for v in values])


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


# ------------------------------------------------------------------------------------------------ the page


def render(found: Table) -> str:
    """The table as a Markdown page, with the picture and the commands that made it; no dates, no machine."""
    rows = found.rows
    header = (
        "method", "iterations", "calls (predicted)", "train s", "strict %", "gain ± SE", "stricter %", "fidelity",
        "diversity placement / colour", f"calls to the score of {found.reference}", "of its budget",
    )  # fmt: skip
    lines = [
        "# Learning for a number of denoiser calls",
        "",
        "Held-out prompts of the built-in world. Every method starts from the same weights, unless a note says",
        "otherwise, has a budget of denoiser calls, and is evaluated on the same prompts and noise. Strict scores",
        "in percent, the gain in percentage points. The error is that of the paired difference: it covers the luck",
        "of prompts and noise, not that of the training seed.",
        "",
        _line(header),
        _line(["---", *["---:"] * (len(header) - 1)]),
        _line(_base_cells(rows[0])),
        *(_line(_cells(row)) for row in rows),
        "",
    ]
    if any(row.marked for row in rows):
        lines += [f"† gained less than {MARKED_BELOW:g} points.", ""]
    lines += [f"Note: {note}" for note in found.notes] + ([""] if found.notes else [])
    lines += ["![Scores, fidelity and diversity against calls and seconds](learning.png)", ""]
    lines += _of_other_rewards(rows)
    lines += ["Made by", ""]
    lines += ["```bash", *_commands(found), "```", "", _circumstances(rows), ""]
    return "\n".join(lines)


def _of_other_rewards(rows: Sequence[Row]) -> list[str]:
    """What was trained on beside what was not, at every evaluation, where a run had a reward other than the checker."""
    trained = {row.method: [n for n in row.evaluations[0].values if n in ROUTES] for row in rows}
    shown = [row for row in rows if trained[row.method]]
    if not shown:
        return []
    lines = [
        "## Trained reward and checker", "",
        "These methods ascend a differentiable reward and never see the checker. Where the first rises while the",
        "second falls, the reward is being hacked. Each number is one evaluation, from the base model to the end.", "",
        _line(["method", "calls", "reward", "trained reward", "strict %"]), _line(["---", "---:", "---", "---", "---"]),
    ]  # fmt: skip
    for row in shown:
        for name in trained[row.method]:
            lines.append(_line([
                row.method, f"{row.calls:,}", f"`{name}`",
                " → ".join(_fixed(point.mean(name), 2) for point in row.evaluations),
                " → ".join(_fixed(_percent(point.mean(STRICT)), 1) for point in row.evaluations),
            ]))  # fmt: skip
    return [*lines, ""]


def _base_cells(row: Row) -> list[str]:
    """The model before training, as the evaluations of the best method's run have it."""
    first = row.evaluations[0]
    return [
        "base model", "0", "0", "0", _fixed(row.base, 1), "", _fixed(_percent(first.mean(STRICTER)), 1),
        _fixed(first.mean(FIDELITY), 3), f"{_fixed(first.mean(PLACEMENT), 3)} / {_fixed(first.mean(COLOR), 3)}", "", "",
    ]  # fmt: skip


def _cells(row: Row) -> list[str]:
    gain = "–" if row.gain.mean is None else f"{row.gain.mean:+.1f} ± {_fixed(row.gain.error, 1)}"
    return [
        row.method + (" †" if row.marked else ""), str(row.iterations), f"{row.calls:,} ({row.card.predicted:,})",
        f"{row.seconds:.0f}", f"{_fixed(row.base, 1)} → {_fixed(row.final, 1)}", gain, _fixed(row.stricter, 1),
        _fixed(row.fidelity, 3), f"{_fixed(row.placement, 3)} / {_fixed(row.color, 3)}",
        "–" if row.reach is None else f"{row.reach:,.0f}", _fixed(row.ratio, 2),
    ]  # fmt: skip


def _commands(found: Table) -> list[str]:
    asked: dict[str, list[str]] = {}
    for row in sorted(found.rows, key=lambda row: row.method):
        card = row.card
        options = f"--configs {Path(card.config).parent.as_posix()} --budget {card.budget} --seed {card.seed}"
        asked.setdefault(f"{options} --jobs {card.jobs}", []).append(row.method)
    # With one budget for all, a folder's name says which they are.
    only = {options: f" --only {' '.join(names)}" if len(asked) > 1 else "" for options, names in asked.items()}
    made = [f"python -m benchmarks.learning run {options}{only[options]}" for options in sorted(asked)]
    return [*made, f"python -m benchmarks.learning report --reference {found.reference}"]


def _circumstances(rows: Sequence[Row]) -> str:
    """Seeds, threads and neighbours of the runs."""
    told = {
        "seed": {row.card.seed for row in rows},
        "threads a run": {row.card.threads for row in rows},
        "runs beside each other": {row.card.jobs for row in rows},
    }
    return (
        ", ".join(f"{what}: {' and '.join(map(str, sorted(values)))}" for what, values in told.items()).capitalize()
        + "."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
