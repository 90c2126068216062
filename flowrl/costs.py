"""What an iteration costs, before it is run: samples, steps, denoiser calls, updates (counted the way `calls/*` is)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowrl.types import Algorithm
from samplers import Plan


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
    updates: int


def cost(
    algorithm: Algorithm, plan: Plan, *, prompts: int, samples_per_prompt: int, guided: bool, updates: int
) -> Cost:
    """The call counts of an iteration in which every sample gets a verdict; g is 2 with guidance, else 1.

    rollout g calls(roots); train g M, and reference g M where the loss has a KL, with M = roots * sum of nodes(step)
    over the stochastic steps: siblings leave from one state, which is evaluated once. A linear rollout has M = E.
    """
    branches = 2 if guided else 1
    roots = prompts * samples_per_prompt // plan.leaves_per_root
    states = roots * sum(plan.nodes(step) for step in plan.stochastic_steps)
    return Cost(
        prompts=prompts, samples=prompts * samples_per_prompt, roots=roots, edges=plan.num_edges(roots), states=states,
        rollout=branches * plan.calls(roots), train=branches * states,
        reference=branches * states if algorithm.needs.reference else 0, updates=updates,
    )  # fmt: skip


def describe(config: Any, algorithm: Algorithm, plan: Plan, *, trainable: int, world: int = 1) -> list[tuple[str, str]]:
    """The plan of a run as (what, how much) lines for people."""
    data, o = config.data, config.optimizer
    c = cost(
        algorithm, plan, prompts=data.prompts_per_iteration, samples_per_prompt=data.samples_per_prompt,
        guided=config.model.guidance > 1, updates=o.updates_per_iteration,
    )  # fmt: skip
    marks = "".join("S" if s else "." for s in plan.stochastic)
    shared = f", {c.roots} starts: each group shares its first noise" if c.roots < c.samples else ""
    weights = "LoRA" if config.model.lora else "full weights"
    steps = f"{plan.num_steps}, first iteration {marks} (S = stochastic and trained)"
    reference = f" + {c.reference} reference" if c.reference else ""
    return [
        ("model", f"{config.model.path}, guidance {config.model.guidance:g}, {weights}"),
        ("algorithm", f"{config.algorithm.name}"),
        ("samples", f"{c.prompts} prompts x {data.samples_per_prompt} = {c.samples} an iteration{shared}"),
        ("steps", f"{steps}; evaluation {data.evaluation.num_steps}"),
        ("denoiser calls", f"{c.rollout} rollout + {c.train} train{reference} an iteration"),
        ("updates", f"{c.updates} an iteration, {c.edges} stored steps from {c.states} states"),
        ("trainable", f"{trainable:,} parameters"),
        ("length", f"{config.iterations} iterations on {world} process{'es' if world > 1 else ''}"),
    ]
