"""How well does each method learn for the same money? Same base, same seed, same number of denoiser calls.

    python -m benchmarks.learning run       trains every config of a folder; what is finished is not repeated
    python -m benchmarks.learning report    learning.md, learning.png and learning.json from what is finished

A call is one sample through the denoiser (two with guidance), in rollout, training, old, reference or teacher;
decoding, rewards, backward passes and evaluations are not in the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from benchmarks.results import CARD, BenchmarkError, Card, finished, read_card, read_runs, render, table
from flowrl.algorithms.schedule import plans_of
from flowrl.checkpoint import entries
from flowrl.config import Config, diff, load_config
from flowrl.costs import expected_cost
from flowrl.log import write_atomic
from flowrl.media import geometry_of, load_model
from flowrl.metrics import duration
from flowrl.types import Algorithm

THREADS = 1
"""Threads of a run: with one each, runs beside each other do not fight over the cores, and their seconds compare."""

EVALUATIONS = 4
"""Evaluations after the one of the base model; one more where the iterations do not divide by it."""

NOT_A_RUN = "base"
"""The config that the others of the folder stand on."""

Action = Literal["start", "resume", "skip"]


# ------------------------------------------------------------------------------------------------ the budget


def iterations_within(budget: int, calls: Callable[[int], int]) -> tuple[int, int]:
    """The most iterations 0, 1, ... whose summed `calls(iteration)` stay within the budget, and that sum.

    ValueError where not even one fits, or where an iteration costs nothing, so that any number would.
    """
    iterations = spent = 0
    while spent + (next_calls := calls(iterations)) <= budget:
        if next_calls < 1:
            raise BenchmarkError(
                f"iteration {iterations} is predicted to cost {next_calls} denoiser calls, so no number of iterations "
                "spends the budget; flowrl.costs.cost must count what this method does."
            )
        iterations, spent = iterations + 1, spent + next_calls
    if iterations == 0:
        raise BenchmarkError(f"one iteration costs {next_calls:,} denoiser calls, the budget is {budget:,}: raise it.")
    return iterations, spent


def predicted_calls(config: Config, algorithm: Algorithm, times: Tensor, iteration: int) -> int:
    """Denoiser calls of one iteration; nothing else here knows how plans are made and counted."""
    plans = plans_of(algorithm, times, iteration, config.data.samples_per_prompt, config.seed)
    return expected_cost(config, algorithm, plans, iteration).calls


def affordable(config: Config, budget: int) -> tuple[int, int]:
    """(iterations, predicted calls) of a config within the budget."""
    algorithm, model = config.algorithm.build(), load_model(config)
    size = geometry_of(config, model)
    times = model.times(algorithm.num_steps, size.height, size.width, size.frames)
    return iterations_within(budget, lambda iteration: predicted_calls(config, algorithm, times, iteration))


# ------------------------------------------------------------------------------------------------ what is to be done


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that the benchmark wants, and what has to be done for it."""

    name: str
    folder: Path
    card: Card
    action: Action

    @property
    def command(self) -> list[str]:
        """The `flowrl train` that does it."""
        resume = ["--resume"] if self.action == "resume" else []
        train = [sys.executable, "-m", "flowrl", "train", self.card.config]
        return [*train, *overrides(self.card, self.folder), *resume]


def overrides(card: Card, folder: Path) -> list[str]:
    """What the benchmark sets in a config."""
    every = -(-card.iterations // EVALUATIONS)
    return [
        f"iterations={card.iterations}", f"seed={card.seed}", f"evaluate_every={every}",
        f"engine.threads={card.threads}", f"output_dir={folder}", *card.changes,
    ]  # fmt: skip


def configs_in(folder: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """{name: file} of a folder's configs, the shared base left out; `only` names the ones that are wanted."""
    found = {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem != NOT_A_RUN}
    if not found:
        raise BenchmarkError(f"{folder} has no configs (*.yaml beside {NOT_A_RUN}.yaml); see --configs.")
    if unknown := [name for name in only if name not in found]:
        raise BenchmarkError(f"--only {' '.join(unknown)}: {folder} has {', '.join(found)}.")
    return {name: path for name, path in found.items() if not only or name in only}


def prepare(name: str, path: Path, output: Path, *, budget: int, seed: int, jobs: int) -> Job:
    """How many iterations a config gets, and whether its run is to be started, resumed or left alone.

    ValueError where the config cannot be used or the folder holds another run.
    """
    iterations, predicted = affordable(load_config(path, [f"seed={seed}"]), budget)
    card = Card(
        config=path.as_posix(), budget=budget, predicted=predicted, iterations=iterations, seed=seed, threads=THREADS,
        jobs=jobs,
    )  # fmt: skip
    folder = output / name
    action = decide(folder, card, load_config(path, overrides(card, folder)))
    return Job(name=name, folder=folder, card=card, action=action)


def decide(folder: Path, card: Card, config: Config) -> Action:
    """Skip what is finished, resume what has a checkpoint, start anything else.

    A run of another budget, seed or config is no part of this benchmark, but somebody waited for it: BenchmarkError.
    """
    if not (folder / CARD).is_file():
        if entries(folder / "checkpoints"):
            raise BenchmarkError(f"{folder} holds a run that is not the benchmark's: choose another --output.")
        return "start"
    changed = _changes(folder, card, config)
    if changed:
        raise BenchmarkError(
            f"{folder} holds another run: {'; '.join(changed)}. Delete that folder, or choose another --output."
        )
    if finished(folder, card.iterations):
        return "skip"
    return "resume" if entries(folder / "checkpoints") else "start"


def _changes(folder: Path, card: Card, config: Config) -> list[str]:
    """What a run in the folder has otherwise than the one that is wanted."""
    old = read_card(folder)
    pairs = {key: (getattr(old, key), getattr(card, key)) for key in ("budget", "iterations", "seed", "threads")}
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if (folder / "config.yaml").is_file():  # else the run died before it wrote anything
        changed |= diff(load_config(folder / "config.yaml"), config)
    return [f"{key} is {then!r} there, {now!r} now" for key, (then, now) in changed.items()]


# ------------------------------------------------------------------------------------------------ doing it


def write_card(folder: Path, card: Card) -> None:
    """Say what the run in a folder is for, before there is anything else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CARD, json.dumps(asdict(card), indent=2) + "\n")


def train(job: Job) -> int:
    """Start or resume a run in a process of its own, which logs to log.txt; returns its exit code."""
    write_card(job.folder, job.card)
    environment = os.environ | {"OMP_NUM_THREADS": str(job.card.threads)}
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
        print("$ flowrl", *job.command[3:], file=log, flush=True)
        done = subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    return done.returncode


def train_all(todo: Sequence[Job], workers: int) -> dict[str, str]:
    """Train, several at a time; {name: reason} of the runs that failed. Ctrl-C lets each save, and starts no other."""
    failed: dict[str, str] = {}
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(train, job): job for job in todo}
        try:
            for done in as_completed(running):
                job = running[done]
                if code := done.result():
                    failed[job.name] = f"exit code {code}: {_last_line(job.folder / 'log.txt')}"
                state = "FAILED" if code else "finished"
                print(f"{duration(time.monotonic() - start):>8}  {state} {job.name}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # the runs have got the same signal, and are waited for
            raise
    return failed


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"{lines[-1]} (all of it: {log})"


# ------------------------------------------------------------------------------------------------ commands


def run(configs: Path, output: Path, *, only: Sequence[str], budget: int, seed: int, jobs: int) -> dict[str, str]:
    """Bring every wanted run to its end; {name: reason} of those that could not be."""
    failed: dict[str, str] = {}
    todo: list[Job] = []
    for name, path in configs_in(configs, only).items():
        try:
            job = prepare(name, path, output, budget=budget, seed=seed, jobs=jobs)
        except (ValueError, OSError) as error:
            failed[name] = str(error)
            continue
        print(f"{job.action:>8}  {name}: {job.card.iterations} iterations, {job.card.predicted:,} calls", flush=True)
        if job.action != "skip":
            todo.append(job)
    return failed | train_all(todo, jobs)


def report(output: Path, to: Path, reference: str) -> list[Path]:
    """Write the table, the plot and all numbers of the finished runs; returns the files."""
    # matplotlib belongs to the extra `notebooks`; training does without it.
    from benchmarks.plot import draw

    runs, notes = read_runs(output)
    found = table(runs, reference, notes)
    to.mkdir(parents=True, exist_ok=True)
    files = [to / f"learning.{kind}" for kind in ("md", "json", "png")]
    files[0].write_text(render(found), encoding="utf-8")
    files[1].write_text(json.dumps(asdict(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(found, files[2])
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a run failed, 2 where nothing could be done, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            for file in report(options.output, options.to, options.reference):
                print(f"wrote {file}")
            return 0
        failed = run(
            options.configs, options.output, only=options.only, budget=options.budget, seed=options.seed,
            jobs=options.jobs,
        )  # fmt: skip
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train every config; resumable")
    runs.add_argument("--configs", type=Path, default=Path("configs/shapes"), help="folder of configs, one a method")
    runs.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these of them (file names without .yaml)")
    runs.add_argument("--budget", type=_positive, default=80_000, help="denoiser calls of a run")
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--jobs", type=_positive, default=2, help="runs at a time, a thread each")
    tells = commands.add_parser("report", help="table, plot and numbers of the finished runs")
    tells.add_argument("--to", type=Path, default=Path("docs/benchmarks"), help="folder of what is written")
    tells.add_argument("--reference", default="flow_grpo", metavar="NAME", help="whose final score others race to")
    for command in (runs, tells):
        command.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the run folders")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
