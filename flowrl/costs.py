"""What an iteration costs, before it is run: samples, steps, denoiser calls, updates (counted the way `calls/*` is)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.algorithms.schedule import credit_of
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
    stored: int
    """Distinct states that the rollout stores."""
    states: int
    """Those that are trained on. Fewer than edges where siblings share a state."""
    rollout: int
    train: int
    reference: int
    teacher: int
    updates: int
    single_pass: bool
    """Whether the update takes the rollout's own graphs."""


LEAST_TRAINED = 2 / 3
"""Share of the stored states from which on a backward pass through all of them, about two forward passes each, costs
less than a forward and a backward pass of those that are trained on."""


def expected_cost(config: Any, algorithm: Algorithm, plans: Sequence[Plan], iteration: int = 0) -> Cost:
    """The cost of an iteration of a config."""
    data, o = config.data, config.optimizer
    return cost(
        algorithm, plans, prompts=data.prompts_per_iteration, samples_per_prompt=data.samples_per_prompt,
        guided=config.model.guidance > 1, updates=o.updates_per_iteration,
        update=o.update_of(config.model.gradient_checkpointing), iteration=iteration, seed=config.seed,
    )  # fmt: skip


def cost(
    algorithm: Algorithm, plans: Sequence[Plan], *, prompts: int, samples_per_prompt: int, guided: bool, updates: int,
    update: Literal["auto", "single_pass", "recompute"] = "recompute", iteration: int = 0, seed: int = 0,
) -> Cost:  # fmt: skip
    """The call counts of an iteration in which every sample gets a verdict, and no two the same.

    Counted on the iteration itself, walked with latents of one number: what the plans evaluate, and which of the stored
    states the method's credit leaves in training. Siblings leave from one state, which is evaluated once. Guidance
    doubles a call; a single pass trains without calls; a KL asks the reference, and a distillation its teachers, once
    for each trained state.
    """
    branches, needs = 2 if guided else 1, algorithm.needs
    batch = _sketch(algorithm, plans, prompts, samples_per_prompt, iteration, seed)
    edges = batch.trajectory.select(~credit_of(algorithm, batch).isnan())
    stored, states = (len(table.state.unique()) for table in (batch.trajectory, edges))
    single_pass = update == "single_pass" or (update == "auto" and states >= LEAST_TRAINED * stored)
    return Cost(
        prompts=prompts, samples=prompts * samples_per_prompt,
        roots=prompts * samples_per_prompt // plans[0].leaves_per_root, edges=len(edges), stored=stored, states=states,
        rollout=branches * batch.trajectory.calls, train=0 if single_pass else branches * states,
        reference=branches * states if needs.reference else 0,
        teacher=(2 if needs.guidance > 1 else 1) * states if needs.teachers else 0, updates=updates,
        single_pass=single_pass,
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
    data = config.data
    c = expected_cost(config, algorithm, plans)
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
