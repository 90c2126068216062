"""BranchGRPO (arXiv:2509.06040): rollouts that branch, rewards fused up the tree, advantages by depth, pruned training.

| symbol | here |
|---|---|
| T; B, branching steps; K, branching factor | num_steps; splits; fanout |
| noise scale of a split | split_noise, a factor on eta |
| R(n), fused reward of a node | `fused_rewards`: mean over its leaves, or by path probability |
| A(n), normalised over a depth of a tree | `advantages.edge_advantages` |
| depth pruning; its sliding window | prune_steps; prune_every, prune_stop |
| width pruning: parent-top1, extreme | width; width_share |
| BranchGRPO-Mix | mix_window, mix_every |
| epsilon | clip_range |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import edge_advantages, keep_nonzero, leaf_mean
from flowrl.algorithms.policy_gradient import PolicyGradient, roots_of
from flowrl.algorithms.schedule import check_group_size, training_times
from flowrl.types import Batch
from samplers import Plan, Trajectory, at_steps, best_and_worst, branch_at, subset, window_start


class BranchGRPO(PolicyGradient):
    """BranchGRPO (arXiv:2509.06040): every node splits at the steps `splits`; what the branches share is computed once.

    An edge's credit is the fused reward of its child against the other nodes of the same tree and depth.
    Note: the official code takes the split's noise from a wider Gaussian than its log-prob; here `split_noise` is a
    factor on eta, in drift, noise and log-prob alike.
    Note: depths with two nodes have advantages of +-0.7 (unbiased std) however close their rewards; `adv_floor` sets a
    scale below which differences stay small.
    Note: width pruning looks at each tree by itself; the official "extreme" mixes prompts.
    Note: the official Mix window does not slide with the iterations; here it moves one step every `mix_every`.
    """

    num_steps: fields.NumSteps = 20
    shift: fields.Shift = 3.0
    sde: fields.SDE = "dance_sde"
    eta: fields.Eta = 0.3
    clip_range: fields.ClipRange = 1e-3
    adv_eps: fields.AdvEps = 1e-8
    adv_floor: fields.AdvFloor = 1e-3
    unbiased: fields.Unbiased = True
    splits: Annotated[tuple[int, ...], Field(description="Steps at which every node splits.", min_length=1)] = (
        0,
        3,
        6,
        9,
    )
    fanout: Annotated[int, Field(description="Children of a node at a split.", ge=2)] = 2
    split_noise: Annotated[float, Field(description="Factor on eta at the splits.", gt=0)] = 4.0
    fusion: Annotated[
        Literal["mean", "probability"],
        Field(description="Reward of a node: mean of its leaves, or of its children by their path probabilities."),
    ] = "mean"
    fusion_scale: Annotated[
        float, Field(description="Factor on the log-prob in the softmax of probability fusion.", gt=0)
    ] = 1.0
    prune_steps: Annotated[
        tuple[int, ...], Field(description="Steps whose edges are not trained on (depth pruning); they slide.")
    ] = ()
    prune_every: Annotated[
        fields.Count, Field(description="Iterations after which they move one step towards the noise.")
    ] = 30
    prune_stop: Annotated[
        int | None,
        Field(description="Step at which the first of them stops; null: the last split, less one.", ge=0),
    ] = None
    width: Annotated[
        Literal["none", "parent_top", "extreme"],
        Field(description="Behind the last split, train on: all; each parent's best; each tree's best and worst."),
    ] = "none"
    width_share: Annotated[float, Field(description="Share of the branches that width pruning keeps.", gt=0, le=1)] = (
        0.5
    )
    prune_until: Annotated[
        int | None, Field(description="Iteration from which on nothing is pruned; null: always prune.", ge=0)
    ] = None
    mix_window: Annotated[
        int | None, Field(description="Mix: stochastic steps besides the splits, the rest ODE; null: all.", ge=0)
    ] = None
    mix_every: Annotated[fields.Count, Field(description="Mix: iterations at one place of the window.")] = 30

    @model_validator(mode="after")
    def _possible(self) -> "BranchGRPO":
        self._check_steps()
        self._check_pruning()
        try:
            fields.check_eta(self.sde, self.eta * self.split_noise)
        except ValueError as error:
            raise ValueError(f"the splits take eta times split_noise={self.split_noise:g}, but {error}") from None
        for name, default in (("combine", "sum"), ("baseline", "mean")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} compares samples, but here the nodes of a tree are compared, depth "
                    f"by depth; leave {name} at {default}."
                )
        if self.adv_std == "global":
            raise ValueError("adv_std=global would mix trees and depths; choose group (a tree's depth) or none.")
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The tree; as Mix, ODE steps outside of the splits and of a window that slides with the iterations."""
        check_group_size(samples_per_prompt)
        leaves = self.fanout ** len(self.splits)
        if samples_per_prompt % leaves:
            raise ValueError(
                f"samples_per_prompt={samples_per_prompt} is no multiple of the {leaves} leaves of a tree, fanout "
                f"{self.fanout} at {len(self.splits)} splits; change it, the splits or the fanout."
            )
        grid = training_times(times, self.num_steps, self.shift)
        if self.mix_window is None:
            plan = branch_at(grid, self.splits, self.fanout)
        else:
            plan = subset(grid, sorted({*self.splits, *self._mix_steps(iteration)}))
            plan = plan.with_fanout(dict.fromkeys(self.splits, self.fanout))
        return plan.with_noise(dict.fromkeys(self.splits, self.split_noise))

    def credit(self, batch: Batch) -> Tensor:
        """Fused reward of each edge's child, normalised over its depth of the tree; NaN where it is pruned."""
        if batch.rewards is None:
            raise ValueError("credit needs batch.rewards; score the samples first.")
        edges = batch.trajectory
        scale = None if self.fusion == "mean" else self.fusion_scale
        value = fused_rewards(edges, batch.rewards, scale)
        std: Literal["group", "none"] = "none" if self.adv_std == "none" else "group"
        found = edge_advantages(
            value, roots_of(batch), edges.step, std=std, eps=self.adv_eps, std_floor=self.adv_floor,
            unbiased=self.unbiased,
        ).clamp(-self.adv_clip, self.adv_clip)  # fmt: skip
        if self.prune_until is None or batch.iteration < self.prune_until:
            found = found.where(self._kept(batch).cpu(), torch.nan)
        return (keep_nonzero(found) if self.drop_zero else found).to(edges.leaves.device, torch.float32)

    def pruned_steps(self, iteration: int) -> tuple[int, ...]:
        """The steps that depth pruning leaves out in an iteration: they slide towards the noise, and stop."""
        moved = min(iteration // self.prune_every, self._prune_way)
        return tuple(step - moved for step in self.prune_steps)

    @property
    def _prune_way(self) -> int:
        """Steps that depth pruning slides in all."""
        stop = max(max(self.splits) - 1, 0) if self.prune_stop is None else self.prune_stop
        return max(0, min(self.prune_steps, default=0) - stop)

    def _check_steps(self) -> None:
        last = self.num_steps - 1
        for name, steps in (("splits", self.splits), ("prune_steps", self.prune_steps)):
            if not set(steps) <= set(range(last)) or len(set(steps)) < len(steps):
                raise ValueError(
                    f"{name}={list(steps)} must name different steps from 0 to {last - 1}: of num_steps="
                    f"{self.num_steps} the last always follows the ODE."
                )
        if self.mix_window is not None and self.mix_window > last:
            raise ValueError(
                f"mix_window={self.mix_window} reaches past the end: num_steps={self.num_steps} leaves {last} steps "
                "that can be stochastic; choose fewer, or more steps."
            )

    def _check_pruning(self) -> None:
        """Refuse pruning that would, in some iteration, leave no step at which nodes of a tree can be compared."""
        compared = range(min(self.splits), self.num_steps - 1) if self.mix_window is None else self.splits
        for moved in range(self._prune_way + 1):
            if set(compared) <= {step - moved for step in self.prune_steps}:
                raise ValueError(
                    f"prune_steps={list(self.prune_steps)}, which have moved by {moved} at iteration "
                    f"{moved * self.prune_every}, would then leave nothing to learn from: nodes of a tree can be "
                    f"compared at steps {list(compared)}. Prune fewer, or stop earlier with a larger prune_stop."
                )

    def _mix_steps(self, iteration: int) -> range:
        if not self.mix_window:
            return range(0)
        start = window_start(iteration, num_steps=self.num_steps, width=self.mix_window, shift_every=self.mix_every)
        return range(start, start + self.mix_window)

    def _kept(self, batch: Batch) -> Tensor:
        """bool [E]: edges that neither depth nor width pruning leaves out."""
        edges = batch.trajectory
        keep = ~at_steps(edges.step, self.pruned_steps(batch.iteration))
        if self.width == "none" or batch.rewards is None:
            return keep
        width = batch.plans[0].leaves_per_root
        span = width if self.width == "extreme" else self.fanout  # leaves of a tree; of a node of the last split
        group = torch.arange(len(batch.rewards)) // span
        both = self.width == "extreme"
        count = max(2 if both else 1, int(span * self.width_share + 1e-9))
        worst = count // 2 if both else 0
        leaves = best_and_worst(batch.rewards.cpu(), group, count - worst, worst)
        alive = (edges.leaves & leaves.to(edges.leaves.device)).any(1)
        return keep & (alive | (edges.step <= max(self.splits)))


def fused_rewards(edges: Trajectory, rewards: Tensor, scale: float | None = None) -> Tensor:
    """R(n) of each edge's child, float64 [E]: the mean of its leaves, or (BranchGRPO) by path probability.

    With a `scale` a, R(n) = sum over its children of softmax(a log-prob of the child's edge) R(child), from the leaves
    up; children without a verdict do not count. A log-prob is a mean over the latent dims, so that siblings differ
    little and the weights are nearly equal unless `scale` is about their number. NaN where no leaf has a verdict.
    """
    value = leaf_mean(rewards, edges.leaves)
    if scale is None:
        return value
    steps, leaves = edges.step.cpu(), edges.leaves.cpu()
    depths = sorted(set(steps.tolist()), reverse=True)
    for later, step in zip(depths, depths[1:], strict=False):
        parents, children = (torch.nonzero(steps == s).flatten() for s in (step, later))
        below = (leaves[parents].double() @ leaves[children].double().T) > 0
        below &= ~value[children].isnan()
        weight = (scale * edges.logprob.cpu().double()[children]).expand(len(parents), -1)
        weight = weight.masked_fill(~below, -torch.inf).softmax(1).nan_to_num()
        fused = weight @ value[children].nan_to_num()
        value[parents] = torch.where(below.any(1), fused, torch.nan)
    return value
