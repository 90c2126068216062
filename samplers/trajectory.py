"""One flat table of stochastic steps ("edges") for linear, windowed, branching and pruned rollouts.

Shapes: E edges, B leaves (finished samples), *L latent dims.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["Trajectory", "minibatch_indices"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """Every stored stochastic step of a rollout, and its finished samples.

    Edges are ordered by step; within a step by root, then by the position of the child's leaves. Leaves are ordered by
    root, then by position in the tree. A linear rollout is the case in which every edge has one leaf.

    Example: credit is a matrix product, ``(leaves.float() @ advantages) / leaves.sum(1)``.
    """

    x: Tensor
    """[E, *L] state before the step, in the storage dtype; use ``x.float()``."""
    x_next: Tensor
    """[E, *L] state after it, in the storage dtype, rounded before its log-prob was taken."""
    t: Tensor
    """[E] fp32 time before the step."""
    t_next: Tensor
    """[E] fp32 time after it."""
    step: Tensor
    """[E] int64 index of the step in the plan."""
    state: Tensor
    """[E] int64 number of the state ``x``: siblings have the same one, and need one evaluation. States are numbered in
    the order in which the rollout evaluated them."""
    prompt: Tensor
    """[E] int64 prompt index, as given to ``rollout``."""
    eta: Tensor
    """[E] fp32 eta that the kernel was given."""
    logprob: Tensor
    """[E] fp32 log-prob under the policy that made the rollout."""
    leaves: Tensor
    """[E, B] bool: the finished samples that descend from this edge."""
    x0: Tensor
    """[B, *L] fp32 finished samples (latents at t = 0)."""
    group: Tensor
    """[B] int64 group in which a sample's reward is compared."""
    leaf_prompt: Tensor
    """[B] int64 prompt index of each finished sample."""
    mean: Tensor | None = None
    """[E, *L] fp32 mean of the step under the policy that made the rollout, where it was asked for."""
    visited: Tensor | None = None
    """[B, S, 2, *L] fp32: each sample's states at the beginning of the plan's ``kept`` steps, and the velocities there;
    None where the plan keeps none."""
    calls: int = 0
    """Velocity evaluations (samples through the network) that the rollout cost."""

    def __len__(self) -> int:
        """E."""
        return len(self.logprob)

    @property
    def num_leaves(self) -> int:
        """B."""
        return len(self.x0)

    def select(self, edges: Tensor) -> "Trajectory":
        """Keep the edges of a bool mask [E] or an index [M] (which may reorder); the leaves stay."""
        return replace(self, **{name: getattr(self, name)[edges] for name in self._edge_fields})

    def keep_leaves(self, mask: Tensor) -> "Trajectory":
        """Prune: keep the leaves of a bool mask [B] and drop the edges that lead to none of them."""
        chosen = {name: getattr(self, name)[mask] for name in self._leaf_fields}
        kept = replace(self, leaves=self.leaves[:, mask], **chosen)
        return kept.select(kept.leaves.any(1))

    def reorder_leaves(self, order: Tensor) -> "Trajectory":
        """The same samples in another order [B]."""
        return replace(self, leaves=self.leaves[:, order], **{n: getattr(self, n)[order] for n in self._leaf_fields})

    def minibatches(
        self, *, size: int | None = None, count: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator["Trajectory"]:
        """Disjoint parts that together hold every edge; see ``minibatch_indices``."""
        indices = minibatch_indices(len(self), size=size, count=count, generator=generator)
        return (self.select(index.to(self.x.device)) for index in indices)

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same table on another device."""
        names = (*self._edge_fields, *self._leaf_fields)
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @staticmethod
    def finished(x0: Tensor, *, group: Tensor, leaf_prompt: Tensor) -> "Trajectory":
        """Samples [B, *L] that no rollout of ours made, so that there is no step to them."""
        none, number = x0[:0], x0.new_zeros(0)
        index = torch.zeros(0, dtype=torch.long, device=x0.device)
        return Trajectory(
            x=none, x_next=none, t=number, t_next=number, step=index, state=index, prompt=index, eta=number,
            logprob=number, leaves=torch.zeros(0, len(x0), dtype=torch.bool, device=x0.device), x0=x0,
            group=group.to(x0.device), leaf_prompt=leaf_prompt.to(x0.device),
        )  # fmt: skip

    @property
    def _edge_fields(self) -> tuple[str, ...]:
        return _EDGE_FIELDS if self.mean is None else (*_EDGE_FIELDS, "mean")

    @property
    def _leaf_fields(self) -> tuple[str, ...]:
        return _LEAF_FIELDS if self.visited is None else (*_LEAF_FIELDS, "visited")

    @staticmethod
    def cat(parts: Sequence["Trajectory"]) -> "Trajectory":
        """Put rollouts under each other; leaves become block-diagonal, prompt and group numbers stay as they are."""
        names = [name for name in (*parts[0]._edge_fields, *parts[0]._leaf_fields) if name != "leaves"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        leaves = torch.zeros(
            len(joined["logprob"]), len(joined["x0"]), dtype=torch.bool, device=joined["logprob"].device
        )
        edge = leaf = state = 0
        for part in parts:
            leaves[edge : edge + len(part), leaf : leaf + part.num_leaves] = part.leaves
            joined["state"][edge : edge + len(part)] += state
            state += int(part.state.max()) + 1 if len(part) else 0
            edge, leaf = edge + len(part), leaf + part.num_leaves
        return Trajectory(leaves=leaves, calls=sum(part.calls for part in parts), **joined)


_LEAF_FIELDS = ("x0", "group", "leaf_prompt")
_EDGE_FIELDS = tuple(f.name for f in fields(Trajectory) if f.name not in (*_LEAF_FIELDS, "mean", "visited", "calls"))


def minibatch_indices(
    num: int, *, size: int | None = None, count: int | None = None, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Split 0..num-1 into index tensors: ``size`` each (the last may be smaller) or ``count`` near-equal parts.

    With a generator the order is shuffled. No index is dropped; more parts than entries give fewer parts.
    """
    if (size is None) == (count is None):
        raise ValueError("give either the size of a minibatch or the count of minibatches, not both or neither.")
    if (size or count or 0) < 1:
        raise ValueError(f"a minibatch needs at least one edge, got size={size}, count={count}.")
    order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
    parts = torch.split(order, size) if size is not None else order.tensor_split(min(count or 1, max(num, 1)))
    return (part for part in parts if len(part))
