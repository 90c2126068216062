"""How long does an iteration take, and where? Several configs in one process, in turns, so that noise hits all alike.

python -m benchmarks.cost --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import BenchmarkError, counted_calls
from flowrl.config import load_config
from flowrl.train import Trainer

PHASES = ("collect", "score", "update")


class Case(NamedTuple):
    """One row of the table."""

    label: str
    config: str
    overrides: tuple[str, ...]
    reference: str
    """Label of the row that its ratio is taken to: a floor that nothing can beat, or a peer."""


EQUAL = (
    "algorithm.num_steps=25", "data.prompts_per_iteration=6", "data.samples_per_prompt=16",
    "optimizer.updates_per_iteration=3",
)  # fmt: skip
"""Equal work: 96 samples of 25 steps (MixGRPO's published number), three optimiser steps."""
SLIDE = (  # over the whole grid
    "algorithm.window=4",
    "algorithm.shift_every=1",
    "algorithm.stride=2",  # eleven places: as many rounds see each once
    "algorithm.last_start=null",
)
TREE = (  # the published splits 0, 3, 6, 9 of 20 steps, at the same share of 25
    "algorithm.splits=[0,4,8,11]",
    "algorithm.prune_steps=[13,14,15,16,17,18,19,20,21,22,23]",
    "algorithm.prune_stop=13",
)


CASES = (
    Case("dance_grpo", "configs/shapes/dance_grpo.yaml", EQUAL, "dance_grpo"),
    Case("mix_grpo", "configs/shapes/mix_grpo.yaml", (*EQUAL, *SLIDE), "dance_grpo"),
    Case("mix_grpo flash", "configs/shapes/mix_grpo_flash.yaml", (*EQUAL, *SLIDE), "dance_grpo"),
    Case(
        "mix_grpo flash*",
        "configs/shapes/mix_grpo_flash.yaml",
        (*EQUAL, "algorithm.window=4", "algorithm.last_start=null", "algorithm.strategy=frozen", "algorithm.tail=0.2"),
        "dance_grpo",
    ),
    Case("branch_grpo", "configs/shapes/branch_grpo.yaml", (*EQUAL, TREE[0], "algorithm.prune_steps=[]"), "dance_grpo"),
    Case(
        "branch_grpo pruned",
        "configs/shapes/branch_grpo.yaml",
        (*EQUAL, *TREE, "algorithm.width=parent_top"),
        "dance_grpo",
    ),
    Case(
        "recompute",
        "configs/shapes/flow_grpo.yaml",
        ("optimizer.updates_per_iteration=1", "optimizer.update=recompute"),
        "recompute",
    ),
    Case(
        "single pass",
        "configs/shapes/flow_grpo.yaml",
        ("optimizer.updates_per_iteration=1", "optimizer.update=single_pass"),
        "recompute",
    ),
)


class Timing(NamedTuple):
    """What one case cost: medians over the rounds, in seconds."""

    label: str
    phases: dict[str, float]
    iteration: float
    """All phases, those too that `phases` leaves out."""
    calls: float
    """Denoiser calls an iteration, the mean: they may differ from one iteration to the next."""
    ratio: float
    """Median of this case's seconds over the reference's of the same round."""


def measure(cases: Sequence[Case], rounds: int, threads: int) -> list[Timing]:
    """Time `rounds` iterations of each case, one of each in turn, after one of each that does not count."""
    labels = [case.label for case in cases]
    for case in cases:
        if case.reference not in labels:
            raise BenchmarkError(
                f"case {case.label!r}: its reference {case.reference!r} is none of {', '.join(labels)}."
            )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = [
            stack.enter_context(_trainer(case, Path(folder) / str(place), threads)) for place, case in enumerate(cases)
        ]
        rows = [[trainer.step(iteration) for trainer in trainers] for iteration in range(1 + rounds)][1:]
    taken = {label: [row[place] for row in rows] for place, label in enumerate(labels)}
    return [timing(case, taken[case.label], taken[case.reference]) for case in cases]


@contextmanager
def _trainer(case: Case, folder: Path, threads: int) -> Iterator[Trainer]:
    """A trainer that is stepped by hand; what `run` would close is closed here."""
    trainer = Trainer(load_config(case.config, [*case.overrides, f"output_dir={folder}", f"engine.threads={threads}"]))
    try:
        yield trainer
    finally:
        trainer.hub.close()
        trainer.log.close()
        if trainer.lock is not None:
            trainer.lock.release()


def timing(case: Case, rows: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]) -> Timing:
    """One case's numbers from the metrics of its timed iterations and of its reference's, round by round."""
    whole = "time/iteration"
    return Timing(
        label=case.label,
        phases={phase: statistics.median(row[f"time/{phase}"] for row in rows) for phase in PHASES},
        iteration=statistics.median(row[whole] for row in rows),
        calls=statistics.mean(counted_calls(row) for row in rows),
        ratio=statistics.median(row[whole] / beside[whole] for row, beside in zip(rows, reference, strict=True)),
    )


def render(cases: Sequence[Case], timings: Sequence[Timing]) -> str:
    """The timings as a Markdown table."""
    header = ["case", *(f"{phase} s" for phase in PHASES), "iteration s", "calls", "ratio", "to"]
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"]]
    for case, found in zip(cases, timings, strict=True):
        seconds = [f"{value:.3f}" for value in (*found.phases.values(), found.iteration)]
        lines.append([found.label, *seconds, f"{found.calls:,.0f}", f"{found.ratio:.2f}", case.reference])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each case, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="threads of the denoiser")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    print(render(CASES, measure(CASES, options.rounds, options.threads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
