"""The update phase: from a credited batch to optimiser steps, with gradients that do not depend on how the work is cut.

Symbols: E edges of this process, N edges of an optimiser step over all processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowrl.algorithms.aggregate import merge_metrics
from flowrl.algorithms.policy_gradient import distinct_states
from flowrl.engine import Engine, together
from flowrl.metrics import RunningMean
from flowrl.policy import Policy
from flowrl.types import Algorithm, Batch
from samplers import Plan, stable_seed


class UpdateError(RuntimeError):
    """Training cannot go on: gradients stay non-finite."""


@dataclass(kw_only=True)
class Updater:
    """Everything an optimiser step needs; `skipped` counts steps in a row that were left out as non-finite."""

    policy: Policy
    algorithm: Algorithm
    optimizer: torch.optim.Optimizer
    engine: Engine
    updates: int
    """Optimiser steps an iteration."""
    micro_batch: int | None
    """Stored states in one forward and backward pass; None = all of an update."""
    max_grad_norm: float | None
    max_skipped: int
    skipped: int = 0

    def run(self, batch: Batch, update_of: Tensor) -> dict[str, float]:
        """All optimiser steps of an iteration, edge i in step `update_of[i]`; returns metrics over all processes."""
        metrics = [self._step(batch, torch.nonzero(update_of == u).flatten()) for u in range(self.updates)]
        mean = RunningMean()
        for m in metrics:  # a step that was left without edges has fewer of them
            mean.add(m)
        out = mean.means()
        out["ratio_first_update"] = metrics[0].get("ratio_max_dev", math.nan)
        out["ratio_max_dev"] = max(m.get("ratio_max_dev", 0.0) for m in metrics)
        for count in ("skipped_updates", "empty_updates"):
            out[count] = sum(m[count] for m in metrics)
        return out

    def _step(self, batch: Batch, mine: Tensor) -> dict[str, float]:
        """One optimiser step on the edges `mine` of this process."""
        total = int(self.engine.sum(torch.tensor(float(len(mine)))).item())
        self.optimizer.zero_grad(set_to_none=False)
        parts, counts = [], []
        with together(self.engine), self.policy.role("train"):
            for part in self._micro_batches(batch, mine):
                loss = self.algorithm.loss(self.policy, part)
                (loss.value * (len(part.trajectory) / total)).backward()
                parts.append(loss.metrics)
                counts.append(len(part.trajectory))
        self._sum_gradients()
        parameters = self.policy.trainable_parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        merged = self._merge({k: v.item() for k, v in merge_metrics(parts, counts).items()}, sum(counts))
        merged |= {"grad_norm": norm.item(), "skipped_updates": 0.0, "empty_updates": float(norm == 0)}
        if not torch.isfinite(norm):
            return self._skip(merged)
        self.skipped = 0
        # Without credit or KL the gradient is exactly 0; Adam's momentum and weight decay would still move the weights.
        if norm > 0:
            self.optimizer.step()
            self.policy.update_average()
        return merged

    def _micro_batches(self, batch: Batch, mine: Tensor) -> Iterator[Batch]:
        """The edges `mine` in portions of `micro_batch` states; siblings stay together: they need one evaluation."""
        assert batch.advantages is not None
        mine = mine.to(batch.trajectory.x.device)
        states, of_edge = distinct_states(replace(batch, trajectory=batch.trajectory.select(mine)))
        size = self.micro_batch or len(states)
        for start in range(0, len(states), size or 1):
            index = mine[(of_edge >= start) & (of_edge < start + size)]
            yield replace(batch, trajectory=batch.trajectory.select(index), advantages=batch.advantages[index])

    def _sum_gradients(self) -> None:
        """Add up the processes' gradients in one flat buffer."""
        if self.engine.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.policy.trainable_parameters()]
        flat = self.engine.sum(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(self.policy.trainable_parameters(), flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = g.view_as(p).clone()

    def _merge(self, metrics: dict[str, float], count: int) -> dict[str, float]:
        """Metrics over the edges of all processes: the largest of each `*_max*`, else the mean over edges."""
        if self.engine.world == 1:
            return metrics
        told = [json.loads(text) for text in self.engine.gather_text(json.dumps([metrics, count]))]
        told = [(m, n) for m, n in told if n]
        merged: dict[str, float] = {}
        for name in told[0][0] if told else ():
            values = [(m[name], n) for m, n in told]
            mean = sum(v * n for v, n in values) / sum(n for _, n in values)
            merged[name] = max(v for v, _ in values) if "_max" in name else mean
        return merged

    def _skip(self, metrics: dict[str, float]) -> dict[str, float]:
        """Leave weights, averages and optimiser untouched; give up after too many such steps in a row."""
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise UpdateError(
                f"the gradient was not finite in {self.skipped} optimiser steps in a row; metrics of the last: "
                f"{metrics}. The weights are those before the first of them. Lower optimizer.lr or "
                "algorithm.clip_range, or train in float32."
            )
        return metrics | {"skipped_updates": 1.0}


def deal(
    batch: Batch, plan: Plan, slots: Sequence[int], num_prompts: int, roots_each: int, updates: int, key: int
) -> Tensor:
    """Which optimiser step each edge [E] goes into: every step gets an equal share of each depth's states.

    Siblings go together, since they need one evaluation. A function of (key, prompt's slot, place in the tree) whatever
    the number of processes; `key` changes with the iteration.
    """
    trajectory = batch.trajectory
    slot = torch.tensor(list(slots), dtype=torch.long)
    out = torch.full((len(trajectory),), -1)
    for step in plan.stochastic_steps:
        states = roots_each * plan.nodes(step)  # of one prompt
        generator = torch.Generator().manual_seed(stable_seed(key, step))
        hand = torch.randperm(num_prompts * states, generator=generator) % updates
        rows = torch.nonzero(trajectory.step.cpu() == step).flatten()
        prompt, node = trajectory.prompt.cpu()[rows], trajectory.node.cpu()[rows]
        out[rows] = hand[slot[prompt] * states + node - prompt * states]
    return out


def learning_rate_factor(update: int, updates: int, schedule: str, warmup: int, floor: float) -> float:
    """What the learning rate is multiplied by in an update: linear warm-up, then constant, linear or cosine decay."""
    if update < warmup:
        return (update + 1) / warmup
    along = (update - warmup) / max(1, updates - warmup)
    if schedule == "linear":
        return floor + (1 - floor) * (1 - along)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))
    return 1.0
