"""Make the built-in world's few-step generator: average velocities (MeanFlow, arXiv:2505.13447) from the base model.

The teacher is the base model. Its ODE is walked once for many noises, on a random time grid each, and every two states
of a trajectory give the average velocity between them, u(x_t, r, t) = (x_t - x_r) / (t - r), the definition itself
(eq. 3). Some rows have r = t, where u is the teacher's velocity.

Note: the paper trains from data on the MeanFlow identity u = v - (t - r) du/dt (eq. 6), whose target moves with the
network. With a teacher the integral can be had directly: no derivative, a fixed target, and half of the evaluations.

`flowrl shapes meanflow --output DIR` runs it; the result is a copy of the base model with a folder `meanflow` more.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl.models.meanflow import FOLDER
from flowrl.models.pipeline import load, resolve
from flowrl.shapes.pretrain import Stage
from flowrl.shapes.scenes import prompts
from flowrl.weights import save_component
from samplers import keyed_noise, stable_seed
from samplers.solvers import dpmpp_2m

RECIPE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a run. The defaults made the weights that flowrl ships."""

    seed: int = 0
    trajectories: int = 3_072
    times: int = 16
    """Steps of the teacher (DPM-Solver++), at one random time in each of as many equal parts of [0, 1]."""
    steps: int = 1_200
    batch: int = 64
    same_time: float = 0.25
    """Share of rows with r = t."""
    lr: float = 1.5e-3
    ema: float = 0.99
    save_every: int = 100


@torch.no_grad()
def trajectories(recipe: Recipe, teacher: Any, size: int = 64) -> dict[str, Tensor]:
    """Walks of the teacher: states x and velocities v [M,T+1,*L], times t [M,T+1] falling from 1 to 0, prompt [M].

    The velocity at t = 0 is not asked for; it is 0 there and no row uses it.
    """
    everything = [spec.prompt for spec in prompts("train")]
    shape = teacher.noise_shape(teacher.height, teacher.width)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("x", "v", "t", "prompt")}
    size = min(size, recipe.trajectories)
    for start in range(0, recipe.trajectories, size):
        generator = torch.Generator().manual_seed(stable_seed(recipe.seed, start))
        prompt = torch.randint(len(everything), (size,), generator=generator)
        cond = teacher.encode([everything[i] for i in prompt.tolist()])
        grid = (torch.arange(recipe.times) + torch.rand(recipe.times, generator=generator)) / recipe.times
        grid = torch.cat([torch.ones(1), grid.flip(0)[1:], torch.zeros(1)])
        x = torch.stack([
            keyed_noise(shape, seed=recipe.seed, iteration=0, prompt=start + i, member=0, step=-1) for i in range(size)
        ])  # fmt: skip
        states, velocities, before = [x], [], None
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            t, t_next = now.expand(size), then.expand(size)
            v = teacher.velocity(x, t, cond)
            x_next = dpmpp_2m(x, v, t, t_next, before)
            before = (x - now * v, t)
            x = x_next
            states.append(x)
            velocities.append(v)
        parts["x"].append(torch.stack(states, 1))
        parts["v"].append(torch.stack([*velocities, torch.zeros_like(x)], 1))
        parts["t"].append(grid.expand(size, -1))
        parts["prompt"].append(prompt)
        print(f"trajectories {start + size}/{recipe.trajectories}", flush=True)
    return {name: torch.cat(tensors)[: recipe.trajectories] for name, tensors in parts.items()}


def rows_of(walks: dict[str, Tensor], recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A batch of rows: state x_t [N,*L], t [N], r [N], target u [N,*L], prompt [N]; two states of a walk at random."""
    n, last = recipe.batch, walks["t"].shape[1] - 1
    walk = torch.randint(len(walks["t"]), (n,), generator=generator)
    pair = torch.stack([torch.randperm(last + 1, generator=generator)[:2] for _ in range(n)]).sort(1).values
    same = torch.rand(n, generator=generator) < recipe.same_time
    first, second = pair[:, 0], torch.where(same, pair[:, 0], pair[:, 1])
    x, t = walks["x"][walk, first], walks["t"][walk, first]
    r = walks["t"][walk, second]
    span = torch.where(same, 1.0, t - r).view(-1, 1, 1, 1)
    chord = (x - walks["x"][walk, second]) / span
    return x, t, r, torch.where(same.view(-1, 1, 1, 1), walks["v"][walk, first], chord), walks["prompt"][walk]


def train_meanflow(output: Path, recipe: Recipe = Recipe(), base: str = "shapes") -> Path:
    """Walk the teacher, train (or continue), and write a copy of the base model with the two-time network, float16."""
    work = output / ".meanflow"
    work.mkdir(parents=True, exist_ok=True)
    teacher: Any = load(base)
    if not (work / "walks.safetensors").exists():
        save_file(trajectories(recipe, teacher), work / "walks.part")
        (work / "walks.part").replace(work / "walks.safetensors")
    walks = load_file(work / "walks.safetensors")
    cond = teacher.encode([spec.prompt for spec in prompts("train")])
    cond = {name: tensor for name, tensor in cond.items() if not name.startswith("negative_")}
    student: Any = load(base, family=FOLDER, fresh=True)
    network: nn.Module = student.trainable.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    stage = Stage(work / "student", nn.ModuleDict({"network": network}), [optimizer], recipe.ema)

    def loss(generator: torch.Generator) -> Tensor:
        x, t, r, target, prompt = rows_of(walks, recipe, generator)
        asked = {name: tensor[prompt] for name, tensor in cond.items()}
        return F.mse_loss(student.velocity(x, t, {**asked, "t_next": r}), target)

    stage.run(recipe.steps, loss, recipe.seed, recipe.save_every)
    stage.finish()
    without = shutil.ignore_patterns("README.md", RECIPE, FOLDER)
    shutil.copytree(resolve(base), output, dirs_exist_ok=True, ignore=without)
    save_component(network.to(torch.float16), output / FOLDER)
    (output / FOLDER / RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.rmtree(work)
    return output
