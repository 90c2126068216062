"""What an iteration costs, before it is run: samples, steps, denoiser calls, updates (counted the way `calls/*` is)."""

from __future__ import annotations

from collections.abc import Sequence
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
    algorithm: Algorithm, plans: Sequence[Plan], *, prompts: int, samples_per_prompt: int, guided: bool, updates: int,
    single_pass: bool = False,
) -> Cost:  # fmt: skip
    """The call counts of an iteration in which every edge is trained on.

    The roots are dealt to the plans in turn. With R roots a plan costs g calls(R) in the rollout, and g M each in
    training (none in a single pass) and, where the loss has a KL, for the reference; M = R * sum of nodes(step) over
    the stochastic steps: siblings leave from one state, which is evaluated once. A linear rollout has M = E. g is 2
    with guidance.
    """
    branches = 2 if guided else 1
    roots = prompts * samples_per_prompt // plans[0].leaves_per_root
    shares = [len(range(index, roots, len(plans))) for index in range(len(plans))]
    dealt = list(zip(plans, shares, strict=True))
    states = sum(share * sum(plan.nodes(step) for step in plan.stochastic_steps) for plan, share in dealt)
    return Cost(
        prompts=prompts, samples=prompts * samples_per_prompt, roots=roots,
        edges=sum(plan.num_edges(share) for plan, share in dealt), states=states,
        rollout=branches * sum(plan.calls(share) for plan, share in dealt),
        train=0 if single_pass else branches * states,
        reference=branches * states if algorithm.needs.reference else 0, updates=updates,
    )  # fmt: skip


def describe(
    config: Any, algorithm: Algorithm, plans: Sequence[Plan], *, trainable: int, world: int = 1
) -> list[tuple[str, str]]:
    """The plan of a run as (what, how much) lines for people."""
    data, o = config.data, config.optimizer
    c = cost(
        algorithm, plans, prompts=data.prompts_per_iteration, samples_per_prompt=data.samples_per_prompt,
        guided=config.model.guidance > 1, updates=o.updates_per_iteration,
        single_pass=o.single_pass(config.model.gradient_checkpointing),
    )  # fmt: skip
    marks = " ".join("".join("S" if s else "." for s in plan.stochastic) for plan in plans)
    shared = f", {c.roots} starts: each group shares its first noise" if c.roots < c.samples else ""
    weights = "LoRA" if config.model.lora else "full weights"
    steps = f"{plans[0].num_steps}, first iteration {marks} (S = stochastic and trained)"
    reference = f" + {c.reference} reference" if c.reference else ""
    train = f"{c.train} train" if c.train else "no more to train (single pass)"
    return [
        ("model", f"{config.model.path}, guidance {config.model.guidance:g}, {weights}"),
        ("algorithm", f"{config.algorithm.name}"),
        ("samples", f"{c.prompts} prompts x {data.samples_per_prompt} = {c.samples} an iteration{shared}"),
        ("steps", f"{steps}; evaluation {data.evaluation.num_steps}"),
        ("denoiser calls", f"{c.rollout} rollout + {train}{reference} an iteration"),
        ("updates", f"{c.updates} an iteration, {c.edges} stored steps from {c.states} states"),
        ("trainable", f"{trainable:,} parameters"),
        ("length", f"{config.iterations} iterations on {world} process{'es' if world > 1 else ''}"),
    ]
