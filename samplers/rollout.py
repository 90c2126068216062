"""One rollout for every plan: linear, windowed, branching and mixed.

Shapes: R roots, N nodes alive at a step, E stored edges, B leaves, *L latent dims.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.kernels import Kernel, Transition
from samplers.logprob import Reduction, gaussian_logprob
from samplers.noise import Noise
from samplers.plan import Plan
from samplers.prediction import denoised
from samplers.solvers import dpmpp_2m, euler, heun
from samplers.trajectory import Trajectory

__all__ = ["MeanVelocity", "Prune", "Velocity", "rollout"]

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x [N, *L] fp32, t [N] fp32, prompt [N] int64) -> v [N, *L]."""

MeanVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""velocity(x, t, prompt, t_next [N] fp32) -> mean velocity from t to t_next; the solver ``average`` asks for it."""

Prune = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""prune(step, x0 estimates [N, *L], root [N], member [N]) -> bool [N] of the nodes that go on, or None for all."""


class _Nodes(NamedTuple):
    """The states alive at one step; ``member`` is the index of a node's first leaf below its root."""

    x: Tensor
    root: Tensor
    member: Tensor
    visited: Tensor
    x0_before: Tensor | None = None
    t_before: float = math.nan

    def take(self, index: Tensor) -> "_Nodes":
        before = None if self.x0_before is None else self.x0_before[index]
        return _Nodes(self.x[index], self.root[index], self.member[index], self.visited[index], before, self.t_before)

    def keep(self, v: Tensor) -> "_Nodes":
        """Remember the states at hand, and the velocities there."""
        here = torch.stack([self.x, v], 1)[:, None]
        return self._replace(visited=torch.cat([self.visited, here], 1))


class _Edges(NamedTuple):
    """Edges of one step; each covers the leaves numbered first <= leaf < end, counted over all roots."""

    x: Tensor
    x_next: Tensor
    mean: Tensor
    step: Tensor
    state: Tensor
    root: Tensor
    eta: Tensor
    logprob: Tensor
    first: Tensor
    end: Tensor


@torch.no_grad()
def rollout(
    velocity: Velocity | MeanVelocity,
    x_init: Tensor,
    plan: Plan,
    kernel: Kernel | None = None,
    *,
    prompt: Tensor,
    group: Tensor,
    eta: float | Sequence[float] | Tensor = 0.0,
    noise: Noise | None = None,
    storage_dtype: torch.dtype = torch.float32,
    reduction: Reduction = "mean",
    prune: Prune | None = None,
    micro_batch: int | None = None,
    store: torch.device | str | None = None,
    keep_mean: bool = False,
    stored_velocity: Velocity | None = None,
) -> Trajectory:
    """Walk R roots ``x_init`` [R, *L] along a plan and return the edge table.

    The nodes of one depth go through ``velocity`` together (in slices of ``micro_batch``). ``prompt`` and ``group`` are
    int [R]. ``eta`` is one number or one per step, times the plan's ``noise``. ``noise(root, member, step)`` gives each
    child its own key, so the result depends neither on batching nor on the order of the roots. ``store`` is the device
    of the returned table; ``keep_mean`` adds the means of the stochastic steps to it. ``stored_velocity`` is asked
    instead of ``velocity`` at the states that are stored, in the order of their numbers (a caller may keep its graph).

    Where the plan's solver is ``average``, ``velocity`` gets a fourth argument in ODE steps, the time that the step
    leads to, and answers with the mean velocity of the step.

    States and log-probs are fp32. A state is rounded to ``storage_dtype`` before a stochastic step uses it and before
    the log-prob of having reached it is taken, so recomputing from the table gives a ratio of 1. ODE steps are neither
    stored nor given a log-prob. Raises ValueError when a stochastic step would add no noise.
    """
    etas = _per_step(eta, plan)
    if not len(x_init) == len(prompt) == len(group):
        raise ValueError(
            f"give one prompt and one group per root: {len(x_init)} roots, {len(prompt)} prompts, {len(group)} groups."
        )
    if plan.num_stochastic and (kernel is None or noise is None):
        raise ValueError("this plan has stochastic steps, which need a kernel (say flow_sde) and a noise source.")
    where = prompt.to(x_init.device)
    evaluate = _Counted(velocity, where, micro_batch)
    evaluate_stored = _Counted(stored_velocity or velocity, where, micro_batch)
    times = plan.grid().tolist()  # rounded to fp32, as the edges store them
    roots = torch.arange(len(x_init), device=x_init.device)
    visited = torch.zeros(len(x_init), 0, 2, *x_init.shape[1:], device=x_init.device)
    nodes = _Nodes(x_init.float(), roots, torch.zeros_like(roots), visited)
    edges = [_no_edges(x_init, storage_dtype, store, keep_mean)]

    def advance(nodes: _Nodes, step: int, now: float, then: float) -> _Nodes:
        """One step of all nodes; a stochastic one adds its edges to the table."""
        stochastic = step < plan.head and plan.stochastic[step]
        if stochastic:
            nodes = nodes._replace(x=nodes.x.to(storage_dtype).float())
        t, t_next = (torch.full((len(nodes.x),), value, device=nodes.x.device) for value in (now, then))
        first = evaluate_stored.calls
        if stochastic:
            v = evaluate_stored(nodes.x, t, nodes.root)
        else:
            v = evaluate(nodes.x, t, nodes.root, t_next if plan.solver == "average" else None)
        if step in plan.kept:
            nodes = nodes.keep(v)
        state = first + torch.arange(len(nodes.x), device=nodes.x.device)
        x0 = denoised(nodes.x, v, t)
        keep = prune(step, x0, nodes.root, nodes.member) if prune is not None else None
        if keep is not None:
            _check_survivors(keep, step)
            nodes, v, x0, t, t_next, state = nodes.take(keep), v[keep], x0[keep], t[keep], t_next[keep], state[keep]
        if stochastic:
            assert kernel is not None and noise is not None
            transition = kernel(nodes.x, v, t, t_next, etas[step])
            nodes, new = _branch(nodes, transition, state, etas[step], plan, step, noise, storage_dtype, reduction)
            edges.append(_stored(new, storage_dtype, store, keep_mean))
            x0 = x0.repeat_interleave(plan.fanout[step], 0)
        else:
            nodes = nodes._replace(x=_ode_step(plan, nodes, v, t, t_next, evaluate))
        # Only the multistep solver looks back; no other plan pays for a second latent per node.
        return nodes._replace(x0_before=x0 if plan.solver == "dpmpp_2m" else None, t_before=now)

    for step in range(plan.head):
        nodes = advance(nodes, step, times[step], times[step + 1])
    ends = []
    for number, tail in enumerate(plan.tails):
        end = nodes._replace(member=nodes.member + number)
        grid = torch.tensor(tail).tolist()
        for step, (now, then) in enumerate(pairwise(grid), start=plan.head):
            end = advance(end, step, now, then)
        ends.append(end)
    calls = evaluate.calls + evaluate_stored.calls
    return _table(edges, _together(ends, plan), plan, prompt, group, calls, store, keep_mean)


class _Counted:
    """The velocity in fp32, evaluated in slices, with the number of samples that went through it."""

    def __init__(self, velocity: Velocity | MeanVelocity, prompt: Tensor, micro_batch: int | None) -> None:
        self.velocity, self.prompt, self.micro_batch, self.calls = velocity, prompt, micro_batch, 0

    def __call__(self, x: Tensor, t: Tensor, root: Tensor, t_next: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        size = self.micro_batch or max(len(x), 1)
        asked = (x, t, self.prompt[root], *([] if t_next is None else [t_next]))
        parts = zip(*(torch.split(whole, size) for whole in asked), strict=True)
        v = torch.cat([self.velocity(*part).float() for part in parts])
        if v.shape != x.shape:
            raise ValueError(f"velocity returned {tuple(v.shape)} for a state of {tuple(x.shape)}; shapes must agree.")
        return v


def _branch(
    parents: _Nodes,
    transition: Transition,
    state: Tensor,
    eta: float,
    plan: Plan,
    step: int,
    noise: Noise,
    storage_dtype: torch.dtype,
    reduction: Reduction,
) -> tuple[_Nodes, _Edges]:
    """Draw the children of every node: node order is kept and siblings stand together."""
    fanout, num = plan.fanout[step], len(parents.x)
    span = plan.leaves_per_root // plan.nodes(step + 1)
    index = torch.arange(num, device=parents.x.device).repeat_interleave(fanout)
    children = parents.take(index)
    member = children.member + span * torch.arange(fanout, device=index.device).repeat(num)
    z = noise(children.root, member, step).to(parents.x)
    if z.shape != children.x.shape:
        raise ValueError(f"noise returned {tuple(z.shape)} for {tuple(children.x.shape)} states; shapes must agree.")
    transition = Transition(transition.mean[index], transition.std[index])
    x_next = (transition.mean + transition.std * z).to(storage_dtype).float()
    logprob = gaussian_logprob(x_next, transition, reduction)
    first = children.root * plan.leaves_per_root + member
    edges = _Edges(
        x=children.x, x_next=x_next, mean=transition.mean, step=torch.full_like(first, step), state=state[index],
        root=children.root, eta=torch.full_like(logprob, eta), logprob=logprob, first=first, end=first + span,
    )  # fmt: skip
    return children._replace(x=x_next, member=member), edges


def _together(ends: list[_Nodes], plan: Plan) -> _Nodes:
    """The finished samples of all tails, in the order of root and member."""
    if len(ends) == 1:
        return ends[0]
    parts = zip(*(end[:4] for end in ends), strict=True)
    whole = _Nodes(*(torch.cat(tensors) for tensors in parts))  # type: ignore[arg-type]
    return whole.take((whole.root * plan.leaves_per_root + whole.member).argsort())


def _no_edges(x: Tensor, dtype: torch.dtype, device: torch.device | str | None, keep_mean: bool) -> _Edges:
    """A table without rows, so that a plan without stochastic steps needs no case of its own."""
    none, index = x[:0], torch.zeros(0, dtype=torch.long, device=x.device)
    number = torch.zeros(0, device=x.device)
    edges = _Edges(none, none, none.float(), index, index, index, number, number, index, index)
    return _stored(edges, dtype, device, keep_mean)


def _ode_step(plan: Plan, nodes: _Nodes, v: Tensor, t: Tensor, t_next: Tensor, evaluate: _Counted) -> Tensor:
    if plan.solver == "heun" and bool((t_next > 0).all()):
        return heun(nodes.x, v, t, t_next, lambda x: evaluate(x, t_next, nodes.root))
    if plan.solver == "dpmpp_2m":
        before = None if nodes.x0_before is None else (nodes.x0_before, torch.full_like(t, nodes.t_before))
        return dpmpp_2m(nodes.x, v, t, t_next, before)
    return euler(nodes.x, v, t, t_next)


def _stored(edges: _Edges, dtype: torch.dtype, device: torch.device | str | None, keep_mean: bool) -> _Edges:
    """Move the latents away at once when a store is given, so that the walk holds one depth only."""
    x, x_next = (value.to(device or value.device, dtype) for value in (edges.x, edges.x_next))
    mean = edges.mean.to(device or edges.mean.device) if keep_mean else edges.mean[:0]
    return edges._replace(x=x, x_next=x_next, mean=mean)


def _check_survivors(keep: Tensor, step: int) -> None:
    if not bool(keep.any()):
        raise ValueError(f"prune dropped every node at step {step}; keep at least one, or return None to keep all.")


def _per_step(eta: float | Sequence[float] | Tensor, plan: Plan) -> list[float]:
    values = torch.as_tensor(eta, dtype=torch.float64).reshape(-1).tolist()
    etas: list[float] = values * plan.num_steps if len(values) == 1 else values
    if len(etas) != plan.num_steps:
        raise ValueError(f"eta has {len(etas)} entries for {plan.num_steps} steps; give one number or one per step.")
    silent = [step for step in plan.stochastic_steps if not etas[step] * plan.noise[step] > 0]
    if silent:
        raise ValueError(
            f"eta is not positive at the stochastic steps {silent}: they would add no noise and have no log-prob. "
            "Raise eta, or make these steps ODE steps in the plan."
        )
    return [value * factor for value, factor in zip(etas, plan.noise, strict=True)]


def _table(
    edges: list[_Edges],
    nodes: _Nodes,
    plan: Plan,
    prompt: Tensor,
    group: Tensor,
    calls: int,
    store: torch.device | str | None,
    keep_mean: bool,
) -> Trajectory:
    """Join the steps into one table and drop the edges whose every leaf was pruned on the way."""
    device = nodes.x.device
    prompt, group, times = prompt.to(device).long(), group.to(device).long(), plan.grid(device)
    joined = _Edges(*(torch.cat(column) for column in zip(*edges, strict=True)))
    leaf = nodes.root * plan.leaves_per_root + nodes.member
    leaves = (leaf >= joined.first[:, None]) & (leaf < joined.end[:, None])
    table = Trajectory(
        x=joined.x,
        x_next=joined.x_next,
        t=times[joined.step],
        t_next=times[joined.step + 1],
        step=joined.step,
        state=joined.state,
        prompt=prompt[joined.root],
        eta=joined.eta,
        logprob=joined.logprob,
        leaves=leaves,
        x0=nodes.x,
        group=group[nodes.root],
        leaf_prompt=prompt[nodes.root],
        mean=joined.mean if keep_mean else None,
        visited=nodes.visited if plan.kept else None,
        calls=calls,
    ).to(store or device)
    return table if bool(table.leaves.any(1).all()) else table.select(table.leaves.any(1))
