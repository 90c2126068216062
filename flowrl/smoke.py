"""Two tiny iterations of any config, saved, resumed and exported: what a long run will need is tried before it starts.

    flowrl train CONFIG --smoke

Everything that decides whether a run works stays: model, method, rewards, prompts, precision, adapters. What decides
how long it takes goes: few and small samples, two iterations, an evaluation of two samples. Filters go too, for they
could leave nothing to update with.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowrl.config import Config, ConfigError, load_config
from flowrl.resolve import resolve

GROUPS = (2, 3, 4, 6, 8, 9, 12, 16, 24, 32)
"""Sizes of a group that are tried, smallest first: a method with trees takes only some."""


def small(config: Config) -> list[str]:
    """Overrides that make a config's run tiny; the smallest groups and prompts that its method allows are to be found.

    What makes a sample cheap is the actor's to say (`flowrl.actor.Actor.small`).
    """
    data = config.data
    found = {
        "iterations": 2, "checkpoint_every": 1, "evaluate_every": 2, "optimizer.schedule": "constant",
        "optimizer.warmup": 0, "optimizer.min_lr_ratio": 0.0,
        "optimizer.updates_per_iteration": min(2, config.optimizer.updates_per_iteration),
        "data.evaluation.num_samples": 2, "data.evaluation.batch_size": 2,
        "data.filters": "[]", "data.max_tries": 1, "data.on_dead_group": "null",
        "data.evaluation.grid_prompts": min(2, data.evaluation.grid_prompts), "log.rollouts_every": 1,
    }  # fmt: skip
    found |= resolve(config.actor, "flowrl").small(config)
    return [f"{key}={value}" for key, value in found.items()]


def smallest(path: str | Path, overrides: Sequence[str]) -> Config:
    """The tiny config: overrides, then `small`, then the first group size that the config's own checks let pass.

    ConfigError of the config itself where no size does.
    """
    config = load_config(path, overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    name = f"{config.name}-smoke"
    fixed = [*overrides, *small(config), f"name={name}", f"output_dir={Path(config.output_dir).parent / name}"]
    stored = config.data.samples == "stored"
    wanted = config.data.samples_per_prompt
    sizes = [wanted] if stored else [*(size for size in GROUPS if size < wanted), wanted]
    # Prompts that come together are counted by reading them, so their number stays.
    fewer = () if config.data.together else (1, 2, 3, 4, 6)
    prompts = [*(n for n in fewer if world <= n < config.data.prompts_per_iteration)]
    told: ConfigError | None = None
    for size in sizes:
        for count in [*prompts, config.data.prompts_per_iteration]:
            try:
                return load_config(
                    path, [*fixed, f"data.samples_per_prompt={size}", f"data.prompts_per_iteration={count}"]
                )
            except ConfigError as error:
                told = error
    assert told is not None
    raise told


def smoke(path: str | Path, overrides: Sequence[str], say: Callable[[str], None]) -> Path:
    """One iteration, a checkpoint, the rest from that checkpoint, the export, and a sample of it; the run's folder."""
    from flowrl.train import Interrupted, Trainer

    config = smallest(path, overrides)
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    with _timed(say, "one iteration, with rewards and an evaluation"), suppress(Interrupted):
        trainer = Trainer(config)
        trainer.signal = signal.SIGTERM  # as if it had been asked to stop: it does after the first iteration
        trainer.run()
    with _timed(say, "resumed from its checkpoint, one more"):
        trainer = Trainer(config, resume=True)
        trainer.run()
    if trainer.main:
        with _timed(say, "exported weights loaded and sampled"):
            trainer.actor.check_export(folder / "weights")
        say(_peak(trainer))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        if rows and all(row.get("zero_std_frac") == 1 for row in rows):
            say(
                "note: the rewards of every group agreed (a random model is hardly ever right), so the updates had "
                "nothing to learn from: that the loss learns was not tried"
            )
    return folder


def _peak(trainer: Any) -> str:
    import torch

    device = trainer.engine.device
    if device.type != "cuda":
        return f"all of it worked on {device}"
    return f"all of it worked on {device}; peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


@contextmanager
def _timed(say: Callable[[str], None], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(f"smoke: {what}: {time.perf_counter() - start:.1f} s")
