"""What an iteration costs, before it is run: samples, steps, denoiser calls, updates (counted the way `calls/*` is)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.collect import grow, roots_of_prompts
from flowrl.history import PromptHistory
from flowrl.types import Algorithm, Batch, Prompt
from samplers import Plan, Trajectory, rollout


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Denoiser calls of one iteration over all processes; a call is one sample through the network, guidance twice."""

    prompts: int
    samples: int
    roots: int
    edges: int
    """Stored steps: what the loss is a mean over."""
    states: int
    """Distinct states that they start from: what is evaluated. Fewer than edges where siblings share a state."""
    rollout: int
    train: int
    reference: int
    teacher: int
    updates: int


def cost(
    algorithm: Algorithm, plans: Sequence[Plan], *, prompts: int, samples_per_prompt: int, guided: bool, updates: int,
    single_pass: bool = False, iteration: int = 0, seed: int = 0,
) -> Cost:  # fmt: skip
    """The call counts of an iteration in which every sample gets a verdict, and no two the same.

    Counted on the iteration itself, walked with latents of one number: what the plans evaluate, and which of the stored
    states the method's credit leaves in training. Siblings leave from one state, which is evaluated once. Guidance
    doubles a call; a single pass trains without calls; a KL asks the reference, and a distillation its teachers, once
    for each trained state.
    """
    branches, needs = 2 if guided else 1, algorithm.needs
    batch = _sketch(algorithm, plans, prompts, samples_per_prompt, iteration, seed)
    edges = batch.trajectory.select(~algorithm.credit(batch).isnan())
    states = len(edges.state.unique())
    return Cost(
        prompts=prompts, samples=prompts * samples_per_prompt,
        roots=prompts * samples_per_prompt // plans[0].leaves_per_root, edges=len(edges), states=states,
        rollout=branches * batch.trajectory.calls, train=0 if single_pass else branches * states,
        reference=branches * states if needs.reference else 0,
        teacher=(2 if needs.guidance > 1 else 1) * states if needs.teachers else 0, updates=updates,
    )  # fmt: skip


def _sketch(
    algorithm: Algorithm, plans: Sequence[Plan], num_prompts: int, samples_per_prompt: int, iteration: int, seed: int
) -> Batch:
    """An iteration of the right shape: its table has latents of one number, its rewards are all different."""
    prompt, number = roots_of_prompts(plans, num_prompts, samples_per_prompt)
    groups = [Prompt(id=i, text="") for i in range(num_prompts)]

    def walk(plan: Plan, mine: Tensor) -> Trajectory:
        return rollout(
            lambda x, t, i: torch.zeros_like(x), torch.zeros(len(mine), 1), plan, algorithm.kernel, eta=algorithm.eta,
            prompt=prompt[mine], group=prompt[mine], noise=lambda root, member, step: torch.zeros(len(root), 1),
        )  # fmt: skip

    place = prompt * (samples_per_prompt // plans[0].leaves_per_root) + number
    trajectory = grow(plans, place, walk)
    rewards = torch.linspace(0, 1, num_prompts * samples_per_prompt, dtype=torch.float64)
    history = PromptHistory(max(samples_per_prompt, algorithm.needs.history), num_prompts)
    for index, row in enumerate(rewards.view(num_prompts, samples_per_prompt)):
        history.add(index, row, iteration)
    return Batch(
        prompts=groups, groups=groups, cond={}, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt,
        plans=tuple(plans), iteration=iteration, seed=seed, rewards=rewards, scores={"reward": rewards},
        weights={"reward": 1.0}, history=history,
    )  # fmt: skip


def describe(
    config: Any, algorithm: Algorithm, plans: Sequence[Plan], *, trainable: int, world: int = 1
) -> list[tuple[str, str]]:
    """The plan of a run as (what, how much) lines for people."""
    data, o = config.data, config.optimizer
    c = cost(
        algorithm, plans, prompts=data.prompts_per_iteration, samples_per_prompt=data.samples_per_prompt,
        guided=config.model.guidance > 1, updates=o.updates_per_iteration,
        single_pass=o.single_pass(config.model.gradient_checkpointing), seed=config.seed,
    )  # fmt: skip
    marks = " ".join("".join("S" if s else "." for s in plan.stochastic) for plan in plans)
    shared = f", {c.roots} starts: each group shares its first noise" if c.roots < c.samples else ""
    weights = "LoRA" if config.model.lora else "full weights"
    steps = f"{plans[0].num_steps}, first iteration {marks} (S = stochastic and trained)"
    others = "".join(f" + {n} {what}" for what, n in (("reference", c.reference), ("teacher", c.teacher)) if n)
    train = f"{c.train} train" if c.train else "no more to train (single pass)"
    return [
        ("model", f"{config.model.path}, guidance {config.model.guidance:g}, {weights}"),
        ("algorithm", f"{config.algorithm.name}"),
        ("samples", f"{c.prompts} prompts x {data.samples_per_prompt} = {c.samples} an iteration{shared}"),
        ("steps", f"{steps}; evaluation {data.evaluation.num_steps}"),
        ("denoiser calls", f"{c.rollout} rollout + {train}{others} an iteration"),
        ("updates", f"{c.updates} an iteration, {c.edges} stored steps from {c.states} states"),
        ("trainable", f"{trainable:,} parameters"),
        ("length", f"{config.iterations} iterations on {world} process{'es' if world > 1 else ''}"),
    ]
