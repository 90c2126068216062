"""What an iteration costs, before it is run: samples, steps, denoiser calls, updates (counted the way `calls/*` is)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.algorithms.schedule import credit_of
from flowrl.collect import grow, injected, roots_of_prompts
from flowrl.history import PromptHistory
from flowrl.types import Algorithm, Batch, Prompt
from flowrl.update import deal
from samplers import Plan, Trajectory, rollout, stable_seed


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Denoiser calls of one iteration over all processes; a call is one sample through the network, guidance twice."""

    prompts: int
    samples: int
    roots: int
    rows: int
    """What the loss is a mean over: stored steps, or draws."""
    stored: int
    """Distinct states that the rollout stores."""
    states: int
    """What is evaluated in the update: those of them that are trained on (siblings share one), or the draws."""
    rollout: int
    train: int
    old: int
    reference: int
    teacher: int
    updates: int
    single_pass: bool
    """Whether the update takes the rollout's own graphs."""

    @property
    def calls(self) -> int:
        """All of them."""
        return self.rollout + self.train + self.old + self.reference + self.teacher


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
        stored=data.samples == "stored",
    )  # fmt: skip


def cost(
    algorithm: Algorithm, plans: Sequence[Plan], *, prompts: int, samples_per_prompt: int, guided: bool, updates: int,
    update: Literal["auto", "single_pass", "recompute"] = "recompute", iteration: int = 0, seed: int = 0,
    stored: bool = False,
) -> Cost:  # fmt: skip
    """The call counts of an iteration in which every sample gets a verdict, and no two the same.

    Counted on the iteration itself, walked with latents of one number: what the plans evaluate, and which of the rows
    the method's credit leaves in training. Siblings leave from one state, which is evaluated once. Guidance doubles a
    call; a single pass trains without calls; a KL asks the reference, and a distillation its teachers, once for each
    trained state; the old policy is asked where it is not the trained one. `stored` samples cost no rollout.
    """
    branches, needs = 2 if guided else 1, algorithm.needs
    batch = _sketch(algorithm, plans, prompts, samples_per_prompt, iteration, seed)
    given = int(injected(seed, iteration, range(prompts), algorithm.injection(iteration)).sum()) * needs.stored
    credit = credit_of(algorithm, batch)
    trained = replace(batch, advantages=credit).select(~credit.isnan())
    roots = prompts * samples_per_prompt // plans[0].leaves_per_root
    if trained.draws is None:
        kept, states = len(batch.trajectory.state.unique()), len(trained.trajectory.state.unique())
    else:
        kept, states = 0, len(trained.draws)
    single_pass = update == "single_pass" or (update == "auto" and 0 < kept and states >= LEAST_TRAINED * kept)
    return Cost(
        prompts=prompts, samples=prompts * samples_per_prompt, roots=roots, rows=len(trained.rows), stored=kept,
        states=states,
        rollout=0 if stored else branches * batch.trajectory.calls * (roots - given) // roots,
        train=0 if single_pass else branches * states * needs.evaluations,
        old=branches * _asked_of_old(algorithm, trained, prompts, samples_per_prompt, updates, iteration, seed),
        reference=branches * states if needs.reference else 0,
        teacher=(2 if needs.guidance > 1 else 1) * states if needs.teachers else 0, updates=updates,
        single_pass=single_pass,
    )  # fmt: skip


def _asked_of_old(
    algorithm: Algorithm, batch: Batch, prompts: int, samples_per_prompt: int, updates: int, iteration: int, seed: int
) -> int:
    """Calls of the old policy: at all draws, but those of the first update where it still is the trained one."""
    if not algorithm.asks_old(iteration) or batch.draws is None:
        return 0
    probes = algorithm.probes(batch.draws)
    if iteration > 0 and algorithm.old_decay(iteration - 1) > 0:
        return probes + len(batch.draws)
    key = stable_seed(seed, iteration, -2)
    return probes + int((deal(batch, range(prompts), prompts, samples_per_prompt, updates, key) > 0).sum())


def _sketch(
    algorithm: Algorithm, plans: Sequence[Plan], num_prompts: int, samples_per_prompt: int, iteration: int, seed: int
) -> Batch:
    """An iteration of the right shape: its table has latents of one number, its rewards are all different."""
    prompt, number = roots_of_prompts(plans, num_prompts, samples_per_prompt)
    groups = [Prompt(id=i, text="") for i in range(num_prompts)]

    def walk(plan: Plan, mine: Tensor) -> Trajectory:
        return rollout(
            lambda x, *_: torch.zeros_like(x), torch.zeros(len(mine), 1), plan, algorithm.kernel, eta=algorithm.eta,
            prompt=prompt[mine], group=prompt[mine], noise=lambda root, member, step: torch.zeros(len(root), 1),
        )  # fmt: skip

    place = prompt * (samples_per_prompt // plans[0].leaves_per_root) + number
    trajectory = grow(plans, place, walk)
    rewards = torch.linspace(0, 1, num_prompts * samples_per_prompt, dtype=torch.float64)
    history = PromptHistory(max(samples_per_prompt, algorithm.needs.history), num_prompts)
    for index, row in enumerate(rewards.view(num_prompts, samples_per_prompt)):
        history.add(index, row, iteration)
    batch = Batch(
        prompts=groups, groups=groups, cond={}, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt,
        plans=tuple(plans), iteration=iteration, seed=seed, rewards=rewards, scores={"reward": rewards},
        weights={"reward": 1.0}, history=history, times=plans[0].grid(), place=torch.arange(len(rewards)),
    )  # fmt: skip
    return replace(batch, draws=algorithm.draws(batch))


def describe(
    config: Any, algorithm: Algorithm, plans: Sequence[Plan], *, trainable: int, world: int = 1
) -> list[tuple[str, str]]:
    """The plan of a run as (what, how much) lines for people."""
    data = config.data
    c = expected_cost(config, algorithm, plans)
    marks = " ".join("".join("S" if s else "." for s in plan.stochastic) for plan in plans)
    shared = f", {c.roots} starts: each group shares its first noise" if c.roots < c.samples else ""
    weights = "LoRA" if config.model.lora else "full weights"
    stochastic = f", first iteration {marks} (S = stochastic and trained)" if c.stored else ", all ODE"
    steps = f"{plans[0].num_steps}{stochastic}"
    rows = f"{c.rows} stored steps from {c.states} states" if c.stored else f"{c.rows} draws of the samples"
    asked = (("old", c.old), ("reference", c.reference), ("teacher", c.teacher))
    others = "".join(f" + {count} {what}" for what, count in asked if count)
    train = f"{c.train} train" if c.train else "no more to train (single pass)"
    return [
        ("model", f"{config.model.path}, guidance {config.model.guidance:g}, {weights}"),
        ("algorithm", f"{config.algorithm.name}"),
        ("samples", f"{c.prompts} prompts x {data.samples_per_prompt} = {c.samples} an iteration{shared}"),
        ("steps", f"{steps}; evaluation {data.evaluation.num_steps}"),
        ("denoiser calls", f"{c.rollout} rollout + {train}{others} an iteration"),
        ("updates", f"{c.updates} an iteration, {rows}"),
        ("trainable", f"{trainable:,} parameters"),
        ("length", f"{config.iterations} iterations on {world} process{'es' if world > 1 else ''}"),
    ]
