"""What rewards cost, and what their failures cost: speed of the hub and of OCR, and runs with a failing reward.

    python -m benchmarks.rewards speed      images a second of OCR, the hub's own time, and how much scoring overlaps
    python -m benchmarks.rewards train      the runs of configs/rewards (minutes each); what is finished is not repeated
    python -m benchmarks.rewards report     docs/benchmarks/rewards.md from the finished runs

Gains are paired, sample by sample, against the base model; errors are standard errors over prompts, and over seeds too
where there are several.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from flowrl.evaluate import mean_and_error, paired_gain
from flowrl.hacking import scores_of
from rewards import RewardHub, Sample, build
from rewards.media import from_pil

RUNS = Path("runs/rewards")
PAGE = Path("docs/benchmarks/rewards.md")
MULTI = {"shapes": 1.0, "shapes_clip": 0.5, "pixel.jpeg_compressibility": 1.0}
FAILING = {
    "failing_none": "none",
    "failing_nan": "20 % at random: no verdict",
    "failing_zero": "20 % at random: score 0",
    "failing_busy_nan": "on busy pictures: no verdict",
    "failing_busy_zero": "on busy pictures: score 0",
}
SEEDS = (0, 1, 2)
BUSY_KB = 2.33
"""What configs/rewards/failing_busy_*.yaml call busy."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("speed", "train", "report"))
    parser.add_argument("--count", type=int, default=32, help="speed: pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="train: of the failing runs")
    options = parser.parse_args(arguments)
    {"speed": lambda: speed(options.count), "train": lambda: train(options.seeds), "report": report}[options.what]()


# ------------------------------------------------------------------------------------------------ speed


def signs(count: int, size: int = 512) -> list[Sample]:
    """Pictures of `size` pixels with a drawn word each."""
    samples = []
    for i in range(count):
        word = f"flow {i:03d}"
        image = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(image).text((40, size // 2), word, fill="black", font=ImageFont.load_default(size // 10))
        samples.append(Sample(media=from_pil(image), prompt=f'a sign that says "{word}"', group=i // 8))
    return samples


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def speed(count: int) -> None:
    """Print three lines: OCR, the hub's own time, and the overlap."""
    samples = signs(count)
    reward = build("ocr")
    with RewardHub({"use": reward}, device="cpu") as hub:
        hub.warmup(samples[:2])
        with_hub = seconds(lambda: hub(samples), 3)
        alone = seconds(lambda: reward.score(samples), 3)
        print(f"ocr: {count / with_hub:.1f} images/s of 512 px on {os.cpu_count()} cores ({count} images)")
        own = seconds(lambda: hub_time(samples), 9)
        print(f"hub: {1000 * own:.1f} ms for {count} images, {100 * own / alone:.2f} % of OCR's own {alone:.2f} s")

    waiting = 0.2

    def slow(batch: Sequence[Sample]) -> list[float]:
        time.sleep(waiting)
        return [0.0] * len(batch)

    with RewardHub(slow) as hub:
        start = time.perf_counter()
        tickets = []
        for _ in range(5):
            tickets.append(hub.submit(samples))
            time.sleep(waiting)  # the next part of a rollout
        for ticket in tickets:
            hub.result(ticket)
        took = time.perf_counter() - start
    print(f"overlap: 5 x {waiting} s of sampling and 5 x {waiting} s of scoring in {took:.2f} s; in turn they take 2 s")


def hub_time(samples: Sequence[Sample]) -> None:
    """What a hub does beside scoring: it checks pixels, passes samples to a lane and combines what comes back."""
    with RewardHub(lambda samples: [0.0] * len(samples)) as hub:
        hub(samples)


# ------------------------------------------------------------------------------------------------ runs


def folder_of(config: str, seed: int) -> Path:
    """Where a run is."""
    return RUNS / (config if seed == 0 else f"{config}-seed{seed}")


def train(seeds: Sequence[int]) -> None:
    """Train what is not finished."""
    for config, seed in [("multi", 0), *((name, seed) for seed in seeds for name in FAILING)]:
        folder = folder_of(config, seed)
        if (folder / "summary.json").is_file():
            continue
        command = [sys.executable, "-m", "flowrl", "train", f"configs/rewards/{config}.yaml", f"seed={seed}",
                   f"output_dir={folder}", "engine.threads=1"]  # fmt: skip
        subprocess.run(command, check=True)


def ends(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Per-sample scores of the base model and of the trained one."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before, after = scores_of(folder, 0), scores_of(folder, summary["iterations"])
    assert before is not None and after is not None
    return before, after


def report() -> None:
    """Write the page from what is finished."""
    lines = [
        "# Several rewards, and failing ones",
        "",
        "Made by `python -m benchmarks.rewards train` and `report`.",
        "",
    ]
    lines += _multi() + _failing()
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def _multi() -> list[str]:
    """The table of the run with three rewards."""
    folder = folder_of("multi", 0)
    if not (folder / "summary.json").is_file():
        return []
    before, after = ends(folder)
    rows = [
        "## Three rewards at once", "",
        "configs/rewards/multi.yaml, seed 0: one advantage for each reward, then their weighted sum.", "",
        "| reward | weight | before | after | gain |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, weight in MULTI.items():
        gain, error = paired_gain(before[name], after[name])
        means = f"{_mean(before[name])} | {_mean(after[name])}"
        rows.append(f"| `{name}` | {weight:g} | {means} | {gain:+.3f} ± {error:.3f} |")
    return [*rows, ""]


def _failing() -> list[str]:
    """The table of the runs with a failing reward: true scores, whatever the run saw."""
    rows = [
        "## A reward that fails", "",
        "The reward is `shapes`; `true` is what it would have said. Busy pictures are those above "
        f"{BUSY_KB} kB as a JPEG, 17.5 % of the base model's. Gains are of the true reward, means over the seeds ± the "
        "standard error over the seeds.", "",
        "| failures | seeds | true reward, gain | share of busy pictures, end | kB, end | true, busy | true, others |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    found = False
    for config, told in FAILING.items():
        folders = [folder_of(config, seed) for seed in SEEDS]
        done = [ends(folder) for folder in folders if (folder / "summary.json").is_file()]
        if not done:
            continue
        found = True
        columns = []
        gains = [paired_gain(before["judge.true"], after["judge.true"])[0] for before, after in done]
        columns.append([gain for gain in gains if gain is not None])
        busy = [after["pixel.jpeg_size"] > BUSY_KB for _, after in done]
        columns.append([share.float().mean().item() for share in busy])
        columns.append([after["pixel.jpeg_size"].mean().item() for _, after in done])
        columns.append([after["judge.true"][b].mean().item() for (_, after), b in zip(done, busy, strict=True)])
        columns.append([after["judge.true"][~b].mean().item() for (_, after), b in zip(done, busy, strict=True)])
        rows.append(f"| {told} | {len(done)} | " + " | ".join(_spread(column) for column in columns) + " |")
    return rows if found else []


def _mean(score: torch.Tensor) -> str:
    mean, _ = mean_and_error(score)
    return "–" if mean is None else f"{mean:.3f}"


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
