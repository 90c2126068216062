"""Diffusion-ART (arXiv:2610.12572): a group's rewards become one direction, which tilts the frozen velocity.

| symbol | here |
|---|---|
| p, which draws the samples x_1 ... x_K of a prompt; v_old, its velocity | the policy at the rollout |
| p* = p exp(r / tau), the tilted distribution | r is the advantage; 1 / tau = `strength` |
| (x_t, t), states that the ODE came through; v_old(x_t, t) | `trajectory.visited`, at `draws_per_sample` of the steps |
| g = Cov(r, x0 given x_t), the direction | `direction`, over the group |
| v* = v_old - g / (tau t) | the target |

Tilting changes the mean of x0 given x_t by g / tau to first order, since d/ds E[x0 e^(s r)] / E[e^(s r)] at s = 0 is a
covariance; and x0 = x_t - t v turns a change of x0 into one of v, divided by -t.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import Advantages, win_rates
from flowrl.algorithms.forward_process import GroupCredit
from flowrl.algorithms.matching import Velocities, mean_square
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.types import Batch, Draws, Loss, Needs, Policy
from samplers import Plan, denoised, rows, stable_seed

_STEPS = -7


class DiffusionART(GroupCredit):
    """Diffusion-ART (arXiv:2610.12572): mean |v - v*|^2 at states that ODE rollouts visited, v* tilted and frozen."""

    draws_per_sample: Annotated[
        fields.Count, Field(description="States of each sample's way that are trained on, at steps drawn anew.")
    ] = 4
    time_range: Annotated[
        tuple[float, float], Field(description="Lowest and highest time of these states; 0 is clean.")
    ] = (0.0, 1.0)
    feedback: Annotated[
        Literal["reward", "pairwise"],
        Field(description="The reward itself, or how much of its group a sample beats (1, 0, a tie 0.5)."),
    ] = "reward"
    strength: Annotated[float, Field(description="1 / tau: how far the target is tilted.", gt=0)] = 1.0
    temperature: Annotated[
        float | None,
        Field(description="w", gt=0),
    ] = None
    centre: Literal["group", "model"] = "group"

    @property
    def needs(self) -> Needs:
        """No log-probs and no old policy, whose velocities the rollout kept."""
        return super().needs._replace(on_policy=True)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE, which keeps the states of the steps that this iteration trains on."""
        plan = super().plan(times, iteration, samples_per_prompt, seed)
        assert isinstance(plan, Plan)
        low, high = self.time_range
        inside = [step for step, t in enumerate(plan.times[:-1]) if low <= t <= high]
        if len(inside) < self.draws_per_sample:
            raise AlgorithmError(
                f"draws_per_sample={self.draws_per_sample}, but only {len(inside)} of num_steps={self.num_steps} begin "
                f"in time_range={list(self.time_range)}; take fewer draws, more steps or a wider range."
            )
        order = sorted(inside, key=lambda step: stable_seed(seed, iteration, step, _STEPS))
        return plan.with_kept(order[: self.draws_per_sample])

    def draws(self, batch: Batch) -> Draws | None:
        """Each sample at the kept steps; those of a prompt at one step are a unit. The key's number is the step."""
        plan, group = batch.plans[0], batch.trajectory.group
        step = torch.tensor(plan.kept, device=group.device).repeat(len(group))
        sample = torch.arange(len(group), device=group.device).repeat_interleave(len(plan.kept))
        key = torch.stack([group[sample], torch.zeros_like(step), step], 1)
        unit = torch.unique(key, dim=0, return_inverse=True)[1]
        return Draws(sample=sample, t=plan.grid(group.device)[step], key=key, unit=unit)

    def sample_advantages(self, batch: Batch) -> Advantages:
        """Advantages of the samples [B]; pairwise, those of their win rates in the group."""
        if self.feedback == "pairwise":
            group = batch.trajectory.group
            rates = {name: win_rates(score, group).value for name, score in batch.scores.items()}
            batch = replace(batch, rewards=win_rates(batch.rewards, group).value, scores=rates)
        return super().sample_advantages(batch)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss of the rows, mean (v - v*)^2, and how far v* is from v_old (rms) as `tilt`."""
        draws, trajectory = batch.draws, batch.trajectory
        assert draws is not None and trajectory.visited is not None and batch.advantages is not None
        kept = torch.tensor(batch.plans[0].kept, device=draws.key.device)
        x, v_old = trajectory.visited[draws.sample, torch.searchsorted(kept, draws.key[:, 2].contiguous())].unbind(1)
        x0, t = trajectory.x0[draws.sample], draws.t
        g = torch.empty_like(x)
        for unit in draws.unit.unique():
            mine = draws.unit == unit
            estimate = denoised(x, v_old, t)[mine] if self.centre == "model" else None
            g[mine] = direction(x[mine], t[mine], x0[mine], batch.advantages[mine], self.temperature, estimate)
        tilt = -self.strength / rows(t, x) * g
        cond = batch.cond_at(batch.leaf_prompt[draws.sample])
        reference = None
        if self.kl_coef > 0:
            with torch.no_grad(), policy.reference():
                reference = policy.velocity(x, t, cond).float()
        v = Velocities(policy.velocity(x, t, cond).float(), v_old, reference)
        found = self.total(mean_square(v.current - v_old - tilt), v, batch)
        return found._replace(metrics={**found.metrics, "tilt": mean_square(tilt).mean().sqrt()})


def direction(
    x: Tensor, t: Tensor, x0: Tensor, advantages: Tensor, temperature: float | None, estimate: Tensor | None
) -> Tensor:
    """Cov(A, x0 | x_t) [K,*L]"""
    flat, data, a = x.flatten(1), x0.flatten(1), advantages
    s2 = data.var(0, correction=0).mean().clamp(min=1e-6)
    d = ((flat[:, None] - (1 - t)[:,None,None] * data[None]).square().sum(2))
    T = temperature if temperature is not None else float("inf")
    w = torch.softmax(-d / (2 * t[:,None]**2 * T), 1)
    c = w @ data if estimate is None else estimate.flatten(1)
    g = (w * a) @ data - (w @ a)[:, None] * c
    wide = (1 - t) ** 2 * s2
    shrink = t**2 / (wide + t**2) if temperature is None else (wide / T + t**2) / (wide + t**2)
    return (g * shrink[:,None]).view_as(x)
