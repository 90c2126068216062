"""Runs small enough for tests: a random SD3 of 0.2M numbers on 32 x 32 pixels, three prompts, four samples each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowrl.config import Config, make_config

PROMPTS = ["a cat", "two dogs", "a red house"]
SAMPLES = 4
"""Samples a prompt."""

FLOW = {"name": "flow_grpo", "num_steps": 4, "eta": 0.7, "clip_range": 1e-2, "kl_coef": 0.04}
MIX = {"name": "mix_grpo", "num_steps": 4, "window": 2, "shift_every": 1, "eta": 0.7, "clip_range": 1e-2}
LORA = {"rank": 4, "alpha": 8}


def tree(model: str | Path, folder: str | Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config as plain values; `changes` are {dotted key: value} and replace whole values."""
    values: dict[str, Any] = {
        "name": "test",
        "output_dir": str(folder),
        "iterations": 3,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "evaluate_every": 100,
        "model": {"path": str(model)},
        "algorithm": dict(MIX),
        "rewards": [{"use": "pixel.brightness"}],
        "data": {
            "prompts": list(PROMPTS),
            "prompts_per_iteration": len(PROMPTS),
            "samples_per_prompt": SAMPLES,
            "evaluation": {"num_samples": 4, "num_steps": 3, "grid_prompts": 2},
        },
        "optimizer": {"lr": 1e-3, "ema_decay": 0.9, "update": "recompute"},
        "engine": {"name": "local", "device": "cpu"},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def config(model: str | Path, folder: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The same as a config."""
    return make_config(tree(model, folder, changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_clock = lambda key: key.startswith("time/") or key.endswith("_per_second")  # noqa: E731
    return [{key: value for key, value in row.items() if not by_clock(key)} for row in lines]


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Everything that training changes: weights, their average, and the optimizer's state."""
    from flowrl.checkpoint import flatten_optimizer

    tensors, _ = flatten_optimizer(trainer.optimizer)
    own = {f"optimizer.{name}": tensor.clone() for name, tensor in tensors.items()}
    return {**own, **trainer.policy.state_dict()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(trainer: Any) -> torch.Tensor:
    """What learns, in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.policy.trainable_parameters()]).clone()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def reward_file(folder: Path, body: str, name: str = "reward.py") -> str:
    """A reward `score(samples)` in a file; `body` has `samples`, `calls` (training calls so far, this one included)."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    path = folder / name
    path.write_text(
        "import math, os, signal, time\nimport torch\n\ncalls = 0\n\n\n"
        "def brightness(samples):\n    return [s.media.mean().item() for s in samples]\n\n\n"
        "def score(samples):\n    global calls\n"
        f"    training = len(samples) == {len(PROMPTS) * SAMPLES}\n"
        f"    calls += training\n{lines}\n"
    )
    return f"{path}:score"


def digest(path: Path) -> str:
    """sha256 of a file's contents; of a safetensors file's tensors, since the order of its metadata is random."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def finite(value: float) -> bool:
    return value is not None and math.isfinite(value)


def no_number(media, prompts, group):
    """A measure that found nothing to measure."""
    return {"nothing": math.nan}
