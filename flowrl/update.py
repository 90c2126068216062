"""The update phase: from a credited batch to optimiser steps, with gradients that do not depend on how the work is cut.

A row is what the loss is a mean over: a stored edge of the rollout, a draw of the forward process, or an answer.

Symbols: R rows of this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.algorithms.aggregate import merge_metrics
from flowrl.algorithms.policy_gradient import roots_of
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.engine import Engine, together
from flowrl.metrics import RunningMean
from flowrl.policy import Trained
from flowrl.types import AnyBatch, Draws, Loss, TokenBatch
from samplers import stable_seed


class UpdateError(RuntimeError):
    """Training cannot go on: gradients stay non-finite."""


@dataclass(kw_only=True)
class Updater:
    """Everything an optimiser step needs; `skipped` counts steps in a row that were left out as non-finite."""

    policy: Trained
    algorithm: Any
    optimizer: torch.optim.Optimizer
    engine: Engine
    updates: int
    """Optimiser steps an iteration."""
    micro_batch: int | None
    """Stored states, draws or answers in one forward and backward pass; None = all of an update."""
    max_grad_norm: float | None
    max_skipped: int
    skipped: int = 0

    def run(self, batch: AnyBatch, update_of: Tensor) -> dict[str, float]:
        """All optimiser steps of an iteration, row i in step `update_of[i]`; returns metrics over all processes."""
        metrics = [self._step(batch, torch.nonzero(update_of == u).flatten()) for u in range(self.updates)]
        mean = RunningMean()
        for m in metrics:  # a step that was left without edges has fewer of them
            mean.add(m)
        out = mean.means()
        if any("ratio_max_dev" in m for m in metrics):
            out["ratio_first_update"] = metrics[0].get("ratio_max_dev", math.nan)
            out["ratio_max_dev"] = max(m.get("ratio_max_dev", 0.0) for m in metrics)
        for count in ("skipped_updates", "empty_updates"):
            out[count] = sum(m[count] for m in metrics)
        return out

    def _step(self, batch: AnyBatch, mine: Tensor) -> dict[str, float]:
        """One optimiser step on the rows `mine` of this process."""
        with together(self.engine):
            mass = self.algorithm.mass(batch.select(mine.to(_device_of(batch))))
        total = self.engine.sum(mass)
        self.optimizer.zero_grad(set_to_none=False)
        parts, counts, sound = [], [], True
        with together(self.engine), self.policy.role("train"):
            for part in self._micro_batches(batch, mine):
                loss = _checked(self.algorithm.loss(self.policy, part))
                sound &= bool(loss.value.isfinite())
                (loss.value * self.algorithm.share(part, total)).backward()
                parts.append(loss.metrics)
                counts.append({name: loss.counts.get(name, float(len(part.rows))) for name in loss.metrics})
        self._sum_gradients()
        parameters = self.policy.trainable_parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        whole = {name: sum(count.get(name, 0.0) for count in counts) for part in parts for name in part}
        merged = self._merge({k: v.item() for k, v in merge_metrics(parts, counts).items()}, whole)
        merged |= {"grad_norm": norm.item(), "skipped_updates": 0.0, "empty_updates": float(norm == 0)}
        if not torch.isfinite(norm):
            return self._skip(merged, sound)
        self.skipped = 0
        # Without credit or KL the gradient is exactly 0; Adam's momentum and weight decay would still move the weights.
        if norm > 0:
            self.optimizer.step()
            self.policy.update_average()
        return merged

    def _micro_batches(self, batch: AnyBatch, mine: Tensor) -> Iterator[AnyBatch]:
        """The rows `mine` in portions of about `micro_batch` evaluations; what needs one pass stays together."""
        mine = mine.to(_device_of(batch))
        if not len(mine):
            return
        portion = torch.zeros_like(mine)
        if self.micro_batch and getattr(batch, "velocity", None) is None:
            unit, evaluations = self._units(batch, mine)
            names, unit = torch.unique(unit, return_inverse=True)
            portion = unit // max(1, self.micro_batch * len(names) // evaluations)
        for number in range(int(portion.max()) + 1):
            yield batch.select(mine[portion == number]).to(self.policy.device)

    def _units(self, batch: AnyBatch, mine: Tensor) -> tuple[Tensor, int]:
        """Rows of which unit stay together, and how often the policy is asked for all of them."""
        needs = self.algorithm.needs
        if isinstance(batch, TokenBatch):
            return batch.group[mine] if needs.whole_groups else mine, len(mine)
        if batch.draws is not None:
            return batch.draws.unit[mine], len(mine)
        state = batch.trajectory.state[mine]
        return roots_of(batch)[mine] if needs.whole_samples else state, len(state.unique())

    def _sum_gradients(self) -> None:
        """Add up the processes' gradients in one flat buffer."""
        if self.engine.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.policy.trainable_parameters()]
        flat = self.engine.sum(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(self.policy.trainable_parameters(), flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = g.view_as(p).clone()

    def _merge(self, metrics: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Metrics over all processes: the largest of `*_max*`, the smallest of `*_min*`, else the mean."""
        if self.engine.world == 1:
            return metrics
        told = [json.loads(text) for text in self.engine.gather_text(json.dumps([metrics, counts]))]
        merged: dict[str, float] = {}
        for name in dict.fromkeys(name for m, _ in told for name in m):
            known = [(m[name], n[name]) for m, n in told if name in m and not math.isnan(m[name]) and n[name] > 0]
            values = known or [(math.nan, 1.0)]
            mean = sum(v * n for v, n in values) / sum(n for _, n in values)
            each = [v for v, _ in values]
            merged[name] = max(each) if "_max" in name else min(each) if "_min" in name else mean
        return merged

    def _skip(self, metrics: dict[str, float], sound: bool) -> dict[str, float]:
        """Leave weights, averages and optimiser untouched; give up after too many such steps in a row."""
        advice = (
            "Lower optimizer.lr or algorithm.clip_range, or train in float32."
            if sound
            else "The loss itself was not finite: look at the algorithm's credit and weight, and at the velocity."
        )
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise UpdateError(
                f"the gradient was not finite in {self.skipped} optimiser steps in a row; metrics of the last: "
                f"{metrics}. The weights are those before the first of them. {advice}"
            )
        return metrics | {"skipped_updates": 1.0}


def _device_of(batch: AnyBatch) -> torch.device:
    """Where the table of rows lies."""
    return batch.tokens.ids.device if isinstance(batch, TokenBatch) else batch.trajectory.x0.device


def _checked(loss: object) -> Loss:
    """A loss that can be differentiated, with metrics that can be merged."""
    if not isinstance(loss, Loss) or not isinstance(loss.value, Tensor) or loss.value.dim():
        raise AlgorithmError(
            f"loss() returned {type(loss).__name__}; return flowrl.types.Loss(value, metrics) whose value is one "
            "number: the mean over the rows of the batch."
        )
    return loss._replace(metrics={name: torch.as_tensor(value) for name, value in loss.metrics.items()})


def deal(
    batch: AnyBatch, slots: Sequence[int], num_prompts: int, samples_per_prompt: int, updates: int, key: int,
    whole_samples: bool = False,
) -> Tensor:  # fmt: skip
    """Which optimiser step each row goes into: every step gets an equal share of each depth's states, or of the draws.

    Siblings go together, since they need one evaluation; with `whole_samples` all that grew from one root does; the
    draws of a unit do. Answers are dealt one by one, or (`whole_samples`) those to a prompt together. A function of
    (key, prompt's slot, place in the tree or group) whatever the number of processes; `key` changes with the iteration.
    """
    if isinstance(batch, TokenBatch):
        assert batch.place is not None
        if whole_samples:
            return _hands(num_prompts, updates, key, 0)[batch.place // samples_per_prompt]
        return _hands(num_prompts * samples_per_prompt, updates, key, 0)[batch.place]
    if batch.draws is not None:
        return _deal_draws(batch.draws, num_prompts, updates, key)
    trajectory, plans = batch.trajectory, batch.plans
    width = plans[0].leaves_per_root
    each = samples_per_prompt // width
    mine = roots_of(batch).cpu()
    root = torch.tensor(list(slots), dtype=torch.long)[mine // each] * each + mine % each
    if whole_samples:
        return _hands(num_prompts * each, updates, key, 0)[root]
    out = torch.full((len(trajectory),), -1)
    leaf = trajectory.leaves.int().argmax(1).cpu() % width
    plan_of = torch.arange(num_prompts * each) % len(plans)
    dealt = 0  # the next step's first state goes where the last one's left off: plans of one step each add up evenly
    for step in sorted({step for plan in plans for step in plan.stochastic_steps}):
        nodes = torch.tensor([plan.nodes(step) if plan.stochastic[step] else 0 for plan in plans])[plan_of]
        hand = (_hands(int(nodes.sum()), updates, key, step) + dealt) % updates
        dealt += int(nodes.sum())
        rows = torch.nonzero(trajectory.step.cpu() == step).flatten()
        place = leaf[rows] * nodes[root[rows]] // width  # of the state among those of its root
        out[rows] = hand[(nodes.cumsum(0) - nodes)[root[rows]] + place]
    return out


def _deal_draws(draws: Draws, num_prompts: int, updates: int, key: int) -> Tensor:
    """Each prompt's units in turn, in an order and from a first step of its own."""
    first_step = _hands(num_prompts, updates, key, 0)
    names, unit = torch.unique(draws.unit.cpu(), return_inverse=True)
    first_row = torch.full_like(names, len(draws)).scatter_reduce(0, unit, torch.arange(len(unit)), "amin")
    keys = draws.key.cpu()[first_row]
    hand = torch.empty_like(names)
    for slot in keys[:, 0].unique().tolist():
        mine = torch.nonzero(keys[:, 0] == slot).flatten()
        # By key, not by number: unit numbers say nothing on another process.
        mine = mine[[i for i, _ in sorted(enumerate(keys[mine].tolist()), key=lambda pair: pair[1])]]
        hand[mine] = (_hands(len(mine), len(mine), key, slot + 1) + first_step[slot]) % updates
    return hand[unit]


def _hands(count: int, updates: int, key: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(stable_seed(key, step))
    return torch.randperm(count, generator=generator) % updates


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
