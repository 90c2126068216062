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
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import Advantages, win_rates
from flowrl.algorithms.forward_process import GroupCredit, TimeRange
from flowrl.algorithms.matching import Velocities, mean_square
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.types import Batch, Draws, Loss, Needs, Policy
from samplers import Plan, rows, stable_seed

_STEPS = -7


class DiffusionART(GroupCredit):
    """Diffusion-ART (arXiv:2610.12572): mean |v - v*|^2 at states that ODE rollouts visited, v* tilted and frozen.

    The rollout keeps those states and its own velocities there: 2 latents a state, and no call of the old policy.
    Note: derived from the paper's idea, not from its code. Ours are: a covariance of the advantages; the factor that
    takes it from t = 1 to x_t (`direction`), exact for Gaussian data, where the sum over the group ignores x_t; weights
    with a temperature instead; steps drawn anew in each iteration, equal for all prompts.
    """

    draws_per_sample: Annotated[
        fields.Count, Field(description="States of each sample's way that are trained on, at steps drawn anew.")
    ] = 4
    time_range: TimeRange = (0.0, 1.0)
    feedback: Annotated[
        Literal["reward", "pairwise"],
        Field(description="The reward itself, or the share of its group that a sample beats (1, 0, a tie 0.5)."),
    ] = "reward"
    strength: Annotated[float, Field(description="1 / tau: how far the target is tilted, in advantages.", gt=0)] = 1.0
    temperature: Annotated[
        float | None,
        Field(
            description="Softens how probable it is that a state came from each sample; 1 is exact, but in many "
            "dimensions one sample then has all the weight. null: equal weights, one direction for a prompt.",
            gt=0,
        ),
    ] = None

    @property
    def needs(self) -> Needs:
        """No log-probs and no old policy: the rollout keeps what it says."""
        return super().needs._replace(on_policy=True, own_rollout=True)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE, which keeps the states of the steps that this iteration trains on; AlgorithmError for too few."""
        plan = super().plan(times, iteration, samples_per_prompt, seed)
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
        """Advantages of the samples [B] of all processes; with pairwise feedback those of their win rates."""
        assert batch.rewards is not None
        if self.feedback == "pairwise":
            group = batch.trajectory.group
            rates = {name: win_rates(score, group).value for name, score in batch.scores.items()}
            batch = replace(batch, rewards=win_rates(batch.rewards, group).value, scores=rates)
        return super().sample_advantages(batch)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss of the rows, mean (v - v*)^2; `tilt` is mean (v* - v_old)^2."""
        draws, trajectory = batch.draws, batch.trajectory
        assert draws is not None and trajectory.visited is not None and batch.advantages is not None
        kept = torch.tensor(batch.plans[0].kept, device=draws.key.device)
        x, v_old = trajectory.visited[draws.sample, torch.searchsorted(kept, draws.key[:, 2].contiguous())].unbind(1)
        x0, t, g = trajectory.x0[draws.sample], draws.t, torch.empty_like(x)
        for unit in torch.bincount(draws.unit).nonzero().flatten():
            mine = draws.unit == unit
            g[mine] = direction(x[mine], t[mine], x0[mine], batch.advantages[mine], self.temperature)
        tilt = -self.strength / rows(t, x) * g
        cond = batch.cond_at(batch.leaf_prompt[draws.sample])
        initial = None
        if self.kl_coef > 0:
            with torch.no_grad(), policy.reference():
                initial = policy.velocity(x, t, cond).float()
        v = Velocities(policy.velocity(x, t, cond).float(), v_old, initial)
        found = self.total(mean_square(v.current - v_old - tilt), v, batch)
        return found._replace(metrics={**found.metrics, "tilt": mean_square(tilt).mean()})


def direction(x: Tensor, t: Tensor, x0: Tensor, advantages: Tensor, temperature: float | None) -> Tensor:
    """Cov(A, x0 given x_t) [N,*L] at states x [N,*L] and times t [N], from a group's samples x0 [K,*L] and A [K].

    State i weighs sample j by N(x_i; (1 - t) x0_j, t^2)^(1/T), normalised over j; without a temperature T equally. For
    T > 1 that covariance is too wide, by the factor (a + t^2) / (a / T + t^2), a = (1 - t)^2 s^2, if the samples are
    Gaussian with variance s^2 (their own, mean over the dimensions) and A is linear: it is divided out. Equal weights
    then give t^2 / (a + t^2) times the covariance of the group, a factor that is 1 at t = 1 and falls with the noise.
    """
    state, sample, now = x.flatten(1), x0.flatten(1), t[:, None]
    signal = (1 - now).square() * sample.var(0, correction=0).mean()
    if temperature is None:
        covariance, sharpness = (advantages - advantages.mean()) @ sample / len(sample), 0.0
    else:
        away = (state[:, None] - (1 - now)[:, None] * sample).square().sum(2)
        weight, sharpness = (-away / (2 * now.square() * temperature)).softmax(1), 1 / temperature
        covariance = (weight * advantages) @ sample - (weight @ advantages)[:, None] * (weight @ sample)
    narrower = (signal * sharpness + now.square()) / (signal + now.square())
    return (narrower * covariance).view_as(x)
