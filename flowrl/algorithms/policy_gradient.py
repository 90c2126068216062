"""What the GRPO family shares: the credit of a group, and the loss of stored edges under the current weights.

Methods compose these functions; where one differs it brings its own plan, credit, weight or ratio.
"""

import torch
from torch import Tensor

from flowrl.algorithms.advantages import StdMode, group_advantages, to_edges
from flowrl.algorithms.kl import KLForm, Step, step_kl
from flowrl.algorithms.objectives import clipped
from flowrl.types import Batch, Loss, Policy
from samplers import Kernel, Transition, gaussian_logprob


def group_credit(batch: Batch, *, std: StdMode, eps: float, unbiased: bool = False, clip: float) -> Tensor:
    """Group-relative advantage of each stored edge, fp32 [E]; 0 for samples without a verdict and for dead groups."""
    if batch.rewards is None:
        raise ValueError("credit needs batch.rewards; score the samples first.")
    found = group_advantages(batch.rewards, batch.trajectory.group, std, eps, unbiased, clip)
    leaves = batch.trajectory.leaves
    return to_edges(found.value, leaves, found.valid).to(leaves.device, torch.float32)


def current_step(policy: Policy, batch: Batch, kernel: Kernel, eta: float) -> Step:
    """The step that the policy's weights would now take from each stored state; siblings share one evaluation."""
    edges = batch.trajectory
    first, of_edge = distinct_states(batch)
    x, t, t_next = edges.x[first].float(), edges.t[first], edges.t_next[first]
    velocity = policy.velocity(x, t, batch.cond_at(edges.prompt[first])).float()
    transition = kernel(x, velocity, t, t_next, eta)
    return Step(velocity[of_edge], Transition(transition.mean[of_edge], transition.std[of_edge]))


def distinct_states(batch: Batch) -> tuple[Tensor, Tensor]:
    """One edge for each distinct state [M], and for each edge the place of its state among them [E]."""
    edges = batch.trajectory
    if len(edges) == 0:
        return edges.node, edges.node
    _, of_edge = torch.unique(edges.step * (edges.node.max() + 1) + edges.node, return_inverse=True)
    first = torch.full((int(of_edge.max()) + 1,), len(edges), device=of_edge.device)
    first = first.scatter_reduce(0, of_edge, torch.arange(len(edges), device=of_edge.device), "amin")
    return first, of_edge


def reference_kl(policy: Policy, batch: Batch, kernel: Kernel, eta: float, current: Step, form: KLForm) -> Tensor:
    """Distance [E] of the current step from the one of the frozen initial weights; costs one forward pass."""
    with torch.no_grad(), policy.reference():
        reference = current_step(policy, batch, kernel, eta)
    return step_kl(current, reference, batch.trajectory.t - batch.trajectory.t_next, form)


def clipped_policy_gradient(
    policy: Policy,
    batch: Batch,
    kernel: Kernel,
    eta: float,
    *,
    clip_range: float | tuple[float, float],
    kl_coef: float = 0.0,
    kl_form: KLForm = "flow_grpo",
    weight: Tensor | None = None,
) -> Loss:
    """Mean over the edges of the clipped objective, times `weight` [E] where given, plus kl_coef times the KL."""
    if batch.advantages is None:
        raise ValueError("the loss needs batch.advantages; fill them with credit(batch) first.")
    edges = batch.trajectory
    current = current_step(policy, batch, kernel, eta)
    log_ratio = gaussian_logprob(edges.x_next, current.transition) - edges.logprob
    loss, metrics = clipped(log_ratio, batch.advantages, clip_range)
    metrics["adv_abs"] = batch.advantages.abs().mean()
    metrics["adv_zero_frac"] = (batch.advantages == 0).float().mean()
    if weight is not None:
        loss = loss * weight
    metrics["policy_loss"] = loss.detach().mean()
    if kl_coef > 0:
        kl = reference_kl(policy, batch, kernel, eta, current, kl_form)
        metrics["kl"] = kl.detach().mean()
        loss = loss + kl_coef * kl
    return Loss(loss.mean(), metrics)
