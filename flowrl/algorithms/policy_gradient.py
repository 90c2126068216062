"""What the GRPO family shares: hyperparameters, the credit of a group, and the loss of stored edges.

A method is a `PolicyGradient` with a plan of its own; where it differs in credit or weight it brings those too.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import Advantages, batch_advantages, keep_nonzero, to_edges
from flowrl.algorithms.kl import Step, step_kl
from flowrl.algorithms.objectives import NEEDS_MEANS, NEEDS_SEGMENTS, Edges, Limits, objective
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.types import Batch, Hyperparameters, Loss, Needs, Policy
from samplers import Kernel, Plan, Transition, gaussian_kl, gaussian_logprob


class PolicyGradient(Hyperparameters):
    """The hyperparameters of the family, and its usual credit and loss: GRPO (arXiv:2402.03300) on stochastic steps."""

    num_steps: fields.NumSteps = 10
    shift: fields.Shift = None
    sde: fields.SDE = "flow_sde"
    eta: fields.Eta = 0.7
    objective: fields.ObjectiveName = "clip"
    clip_range: fields.ClipRange = 1e-4
    dual_clip: fields.DualClip = 3.0
    trust: fields.Trust = None
    combine: fields.CombineHow = "sum"
    baseline: fields.Baseline = "mean"
    adv_std: fields.AdvStd = "group"
    adv_eps: fields.AdvEps = 1e-4
    adv_floor: fields.AdvFloor = 0.0
    adv_clip: fields.AdvClip = 5.0
    unbiased: fields.Unbiased = False
    drop_zero: fields.DropZero = False
    kl_coef: fields.KLCoef = 0.0
    kl_form: fields.KLForm = "exact"

    @model_validator(mode="after")
    def _noise_is_possible(self) -> Self:
        fields.check_eta(self.sde, self.eta)
        fields.check_steps(self.objective)
        fields.check_trust(self.objective, self.trust)
        return self

    @property
    def needs(self) -> Needs:
        """Log-probs; the initial weights only for the KL; what the objective and the combination ask for."""
        return Needs(
            reference=self.kl_coef > 0,
            means=self.objective in NEEDS_MEANS,
            whole_samples=self.objective in NEEDS_SEGMENTS,
            scores=self.combine != "sum",
        )

    @property
    def kernel(self) -> Kernel:
        """The step named by `sde`."""
        return fields.resolve_kernel(self.sde)

    @abstractmethod
    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan | Sequence[Plan]:
        """Which steps are stochastic or branch; see `flowrl.types.Algorithm`."""

    def sample_advantages(self, batch: Batch, group: Tensor | None = None) -> Advantages:
        """Advantages of the samples [B], against those of their prompt's group (or of other groups [B])."""
        if batch.rewards is None:
            raise ValueError("credit needs batch.rewards; score the samples first.")
        group = batch.trajectory.group if group is None else group
        how = {
            "std": self.adv_std, "eps": self.adv_eps, "unbiased": self.unbiased, "baseline": self.baseline,
            "std_floor": self.adv_floor, "clip": self.adv_clip,
        }  # fmt: skip
        return batch_advantages(batch.rewards, batch.scores, batch.weights, group, self.combine, **how)

    def credit(self, batch: Batch) -> Tensor:
        """Every edge gets the mean advantage of the samples that it led to."""
        return self.edge_credit(batch, self.sample_advantages(batch))

    def edge_credit(self, batch: Batch, found: Advantages) -> Tensor:
        """Credit [E] fp32 of the edges from the samples' advantages; NaN where no sample below has a verdict."""
        leaves = batch.trajectory.leaves
        credit = to_edges(found.value, leaves, found.valid)
        return (keep_nonzero(credit) if self.drop_zero else credit).to(leaves.device, torch.float32)

    def weight(self, batch: Batch) -> Tensor | None:
        """Factor [E] on the loss of each edge; None = 1."""
        return None

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Mean over the edges of the weighted objective plus kl_coef times the distance to the initial weights."""
        if batch.advantages is None:
            raise ValueError("the loss needs batch.advantages; fill them with credit(batch) first.")
        edges = batch.trajectory
        current = current_step(policy, batch, self.kernel)
        seen = edges_seen(batch, current, self.needs.whole_samples)
        loss, metrics = objective(self.objective, seen, self._limits)
        metrics["adv_abs"] = batch.advantages.abs().mean()
        metrics["adv_zero_frac"] = (batch.advantages == 0).float().mean()
        weight = self.weight(batch)
        if weight is not None:
            if weight.shape != loss.shape:
                raise AlgorithmError(
                    f"weight() returned {list(weight.shape)}; return one factor for each edge, {list(loss.shape)}."
                )
            loss = loss * weight
        metrics["policy_loss"] = loss.detach().mean()
        if self.kl_coef > 0:
            with torch.no_grad(), policy.reference():
                reference = current_step(policy, replace(batch, velocity=None), self.kernel)
            kl = step_kl(current, reference, edges.t - edges.t_next, self.kl_form)
            metrics["kl"] = kl.detach().mean()
            loss = loss + self.kl_coef * kl
        return Loss(loss.mean(), metrics)

    @property
    def _limits(self) -> Limits:
        low, high = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)
        return Limits(low, high, dual=self.dual_clip, trust=self.trust or fields.DPPO_TRUST)


def current_step(policy: Policy, batch: Batch, kernel: Kernel) -> Step:
    """The step that the policy's weights would now take from each stored state; siblings share one evaluation.

    In a single-pass update the rollout's own evaluation, with its graph, is taken instead.
    """
    edges = batch.trajectory
    states, of_edge = torch.unique(edges.state, return_inverse=True)
    first = torch.full((len(states),), len(edges), device=of_edge.device)
    first = first.scatter_reduce(0, of_edge, torch.arange(len(edges), device=of_edge.device), "amin")
    x, t, t_next, eta = edges.x[first].float(), edges.t[first], edges.t_next[first], edges.eta[first]
    if batch.velocity is not None:
        velocity = batch.velocity[states.to(batch.velocity.device)]
    else:
        velocity = policy.velocity(x, t, batch.cond_at(edges.prompt[first])).float()
    transition = kernel(x, velocity, t, t_next, eta)
    return Step(velocity[of_edge], Transition(transition.mean[of_edge], transition.std[of_edge]))


def edges_seen(batch: Batch, current: Step, segmented: bool = False) -> Edges:
    """What an objective sees: how the current step differs from the stored one, and what that was worth.

    Only `segmented` edges are told which chain they belong to; otherwise each is one of its own.
    """
    edges, transition = batch.trajectory, current.transition
    assert batch.advantages is not None
    return Edges(
        log_ratio=gaussian_logprob(edges.x_next, transition) - edges.logprob,
        advantages=batch.advantages,
        logprob=edges.logprob,
        segment=segments(edges.leaves) if segmented else torch.arange(len(edges), device=edges.step.device),
        std=transition.std.flatten(),
        h=edges.t - edges.t_next,
        divergence=None if edges.mean is None else gaussian_kl(transition, transition._replace(mean=edges.mean)),
    )


def segments(leaves: Tensor) -> Tensor:
    """Number [E] of the chain of steps that an edge belongs to: edges with the same samples below them [E,B]."""
    if not leaves.numel():
        return leaves.new_zeros(len(leaves), dtype=torch.long)
    first = leaves.int().argmax(1)
    return first * (leaves.shape[1] + 1) + leaves.sum(1)


def roots_of(batch: Batch) -> Tensor:
    """Which of the batch's roots each edge [E] grew from; every root has equally many samples, standing together."""
    leaves = batch.trajectory.leaves
    return leaves.int().argmax(1) // batch.plans[0].leaves_per_root


def std_of(kernel: Kernel, t: Tensor, t_next: Tensor, eta: Tensor) -> Tensor:
    """Std [N] of the kernel's steps: it depends on times and eta alone."""
    nothing = torch.zeros(len(t), 1, device=t.device)
    return kernel(nothing, nothing, t, t_next, eta).std.flatten()


def sensitivity(kernel: Kernel, t: Tensor, t_next: Tensor, eta: Tensor) -> Tensor:
    """|d mean / d v| / std of the kernel's steps [N]: how fast log-probs, hence gradients, move with the velocity."""
    nothing = torch.zeros(len(t), 1, device=t.device)
    at_rest, moving = (kernel(nothing, v, t, t_next, eta) for v in (nothing, nothing + 1))
    return ((moving.mean - at_rest.mean).abs() / at_rest.std).flatten()


def over_plans(batch: Batch, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """t, t_next and eta [S] of all stochastic steps of the iteration's plans: what step weights are normalised over."""
    steps = [(p.times[s], p.times[s + 1], eta * p.noise[s]) for p in batch.plans for s in p.stochastic_steps]
    t, t_next, etas = torch.tensor(steps, device=batch.trajectory.t.device).unbind(1)
    return t, t_next, etas
