"""The learning curves of all methods in one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import FIDELITY, PLACEMENT, STRICT, Point, Row, Table, Value

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, which colour-blind people tell apart; the yellow, invisible on white, is a grey here."""

STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line and marker; the next pair is taken when the colours are used up."""


class Panel(NamedTuple):
    """What one of the four panels shows."""

    measure: str
    label: str
    scale: float
    across: Callable[[Point], float]
    across_label: str


PANELS = (
    Panel(STRICT, "strict score, %", 100, lambda point: point.calls, "denoiser calls"),
    Panel(STRICT, "strict score, %", 100, lambda point: point.seconds, "training seconds"),
    Panel(FIDELITY, "fidelity", 1, lambda point: point.calls, "denoiser calls"),
    Panel(PLACEMENT, "diversity of placement", 1, lambda point: point.calls, "denoiser calls"),
)


def figure(found: Table) -> Figure:
    """2 x 2 panels, a line a method in the order of the table, error bars of one standard error, the legend beside."""
    sheet = Figure(figsize=(13, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.subplots(2, 2).flat
    for panel, axis in zip(PANELS, axes, strict=True):
        for place, row in enumerate(found.rows):
            _curve(axis, panel, row, place)
        axis.set(xlabel=panel.across_label, ylabel=panel.label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = sheet.axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside right upper", frameon=False)
    return sheet


def draw(found: Table, path: Path) -> None:
    """Write the picture; the same numbers give the same bytes."""
    figure(found).savefig(path, metadata={"Software": None})


def _curve(axis: Axes, panel: Panel, row: Row, place: int) -> None:
    """One method's line; evaluations without the measure are left out, and a line without any is only in the legend."""
    line, marker = STYLES[place // len(COLORS) % len(STYLES)]
    values = [(point, point.values.get(panel.measure, Value())) for point in row.evaluations]
    known = [(panel.across(point), v.mean, v.error or 0.0) for point, v in values if v.mean is not None]
    axis.errorbar(
        [x for x, _, _ in known], [panel.scale * mean for _, mean, _ in known],
        yerr=[panel.scale * error for _, _, error in known], label=row.method, color=COLORS[place % len(COLORS)],
        linestyle=line, marker=marker, markersize=4, linewidth=1.5, elinewidth=0.8, capsize=2,
    )  # fmt: skip
