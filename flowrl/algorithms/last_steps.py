"""Samples whose last steps have a graph: the rollout stops before its end, and the loss finishes and judges them.

Symbols: T steps, K of them with a graph, n samples, *L latent dimensions.
"""

import math
from abc import abstractmethod
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowrl.algorithms import fields
from flowrl.algorithms.direct_gradient import DirectGradient
from flowrl.algorithms.matching import member_of, noise_of
from flowrl.types import Batch, Cond, Draws, Loss, Needs, Policy
from samplers import Plan, denoised, deterministic, dpmpp_2m, euler, rows, stable_seed

Mode = Literal["refl", "draft", "draft_lv", "alignprop"]
_STEPS = -5
"""Key of the random number of steps."""
_FIRST = 1 << 16
"""Number of the first noise that is added: those of a rollout's steps have smaller ones."""


class LastSteps(DirectGradient):
    """The hyperparameters of the family: which steps keep their graph. A method adds what is to fall, `shortfall`.

    Note: AlignProp and DRaFT were published with stochastic DDIM steps; these are of the ODE. With dpmpp_2m the first
    trained step is first order, since the rollout does not hand over what the solver remembers.
    """

    mode: Annotated[Mode, Field(description="Which steps keep their graph, and where they start.")] = "draft"
    last_steps: Annotated[
        int | tuple[int, int] | None,
        Field(
            description="How many steps the rollout leaves to the loss, or [low, high] to draw from in each iteration; "
            "null: draft and draft_lv 1, refl [1, T/4], alignprop its own distribution of about 0.16 T."
        ),
    ] = None
    renoise: Annotated[
        fields.Count, Field(description="draft_lv only: further steps from a sample's x0, each with noise of its own.")
    ] = 2  # fmt: skip
    checkpoint: Annotated[
        bool, Field(description="Keep only the states between the trained steps: evaluates each of them a second time.")
    ] = False

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        low, high = self._range
        if not 1 <= low <= high <= self.num_steps:
            told = self.last_steps if isinstance(self.last_steps, int) else list(self.last_steps or ())
            raise ValueError(
                f"last_steps={told} must lie between 1 and num_steps={self.num_steps}; 1 is the last step alone, "
                f"{self.num_steps} the whole chain."
            )
        if self.mode == "draft_lv" and high > 1:
            raise ValueError(
                f"last_steps={self.last_steps}, but draft_lv takes the last step only: leave it out, or set mode=draft."
            )
        if self.solver not in ("euler", "dpmpp_2m"):
            raise ValueError(
                f"solver={self.solver!r}: a trained step evaluates the velocity once, at its beginning; choose 'euler' "
                "or 'dpmpp_2m'."
            )
        return self

    @property
    def needs(self) -> Needs:
        """Each row is evaluated once, twice with a distance to the initial weights; `checkpoint` doubles that."""
        evaluations = (2 if self.kl_coef > 0 else 1) * (2 if self.checkpoint else 1)
        return super().needs._replace(evaluations=evaluations, own_rollout=True)

    @property
    def _range(self) -> tuple[int, int]:
        """Fewest and most steps that are left to the loss."""
        if isinstance(self.last_steps, tuple):
            return self.last_steps
        if self.last_steps is not None:
            return self.last_steps, self.last_steps
        return 1, {"refl": max(1, self.num_steps // 4), "alignprop": max(1, self.num_steps - 1)}.get(self.mode, 1)

    def steps_left(self, iteration: int, seed: int) -> int:
        """How many steps the rollout of this iteration leaves to the loss."""
        low, high = self._range
        generator = torch.Generator().manual_seed(stable_seed(seed, iteration, _STEPS))
        if self.mode == "alignprop" and self.last_steps is None:
            without = math.floor(self.num_steps * (0.84 + 0.1 * torch.randn((), generator=generator).item()))
            return min(max(self.num_steps - without, low), high)
        return int(torch.randint(low, high + 1, (), generator=generator).item())

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE from noise to where the loss takes over."""
        until = self.num_steps - self.steps_left(iteration, seed)
        return deterministic(self.grid(times), solver=self.solver, until=until)

    def draws(self, batch: Batch) -> Draws:
        """One row for each evaluation, those of a sample in their order and one unit."""
        assert batch.times is not None
        left = self.steps_left(batch.iteration, batch.seed)
        grid = self.grid(batch.times)[self.num_steps - left :].float().cpu()
        spans = torch.stack([grid[:-1], grid[1:]])
        if self.mode == "refl":
            spans = torch.stack([grid[:1], torch.zeros(1)])
        elif self.mode == "draft_lv":
            spans = spans.repeat(1, 1 + self.renoise)
        t, t_next = spans
        group, device = batch.trajectory.group.cpu(), batch.trajectory.x0.device
        sample = torch.arange(len(group)).repeat_interleave(len(t))
        number = torch.arange(len(t)).repeat(len(group))
        key = torch.stack([group[sample], member_of(batch)[sample], _FIRST + number], 1)
        return Draws(
            sample=sample.to(device), t=t.repeat(len(group)).to(device), t_next=t_next.repeat(len(group)).to(device),
            key=key.to(device), unit=sample.to(device),
        )  # fmt: skip

    @abstractmethod
    def shortfall(self, reward: Tensor) -> Tensor:
        """What is to fall, [N], for rewards [N] with a graph: NaN stays NaN."""

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """What is missing in the rewards of the pictures that the rows lead to, mean over these."""
        assert batch.draws is not None and batch.critic is not None
        each = int((batch.draws.unit == batch.draws.unit[0]).sum())
        of_sample = torch.argsort(batch.draws.unit, stable=True).view(-1, each)
        finish = self._again if self.mode == "draft_lv" else self._walk
        x0, sample, kl = finish(policy, batch, of_sample)
        judged = batch.critic(x0, [batch.prompts[index] for index in batch.leaf_prompt[sample].tolist()])
        loss = self.total(judged.total, kl)
        loss.metrics.update({f"score/{name}": score.nanmean() for name, score in judged.scores.items()})
        return loss

    def _walk(self, policy: Policy, batch: Batch, of_sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the rollout's end to x0 [n,*L] along the rows `of_sample` [n,K]; their samples [n], distances [n K]."""
        draws = batch.draws
        assert draws is not None and draws.t_next is not None
        sample = draws.sample[of_sample[:, 0]]
        x, cond = batch.trajectory.x0[sample].float(), batch.cond_at(batch.leaf_prompt[sample])
        before: tuple[Tensor, Tensor] | None = None
        distances = []
        for step in of_sample.unbind(1):
            t, t_next = draws.t[step], draws.t_next[step]
            v = self._velocity(policy, x, t, cond)
            distances.append(self._distance(policy, v, x, t, cond))
            if self.solver == "dpmpp_2m":
                x, before = dpmpp_2m(x, v, t, t_next, before), (denoised(x, v, t), t)
            else:
                x = euler(x, v, t, t_next)
        return x, sample, torch.cat(distances)

    def _again(self, policy: Policy, batch: Batch, of_sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0 [n(1 + renoise),*L] by the last step, and by the other rows from that x0 noised anew; their samples."""
        assert batch.draws is not None
        x0, sample, distance = self._walk(policy, batch, of_sample[:, :1])
        again = batch.draws.select(of_sample[:, 1:].flatten())
        start, cond = x0.detach().repeat_interleave(self.renoise, 0), batch.cond_at(batch.leaf_prompt[again.sample])
        t = rows(again.t, start)
        x = (1 - t) * start + t * noise_of(batch, again).to(start)
        v = self._velocity(policy, x, again.t, cond)
        x0 = torch.cat([x0, denoised(x, v, again.t)])
        distance = torch.cat([distance, self._distance(policy, v, x, again.t, cond)])
        return x0, torch.cat([sample, again.sample]), distance

    def _distance(self, policy: Policy, v: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The distance at states as they are, by a velocity of its own: the chain that led to them takes no part."""
        given = x.detach()
        return self.distance(policy, self._velocity(policy, given, t, cond) if self.kl_coef else v, given, t, cond)

    def _velocity(self, policy: Policy, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity [n,*L] with its graph, or with what makes it again."""
        if self.checkpoint:
            again: Tensor = checkpoint(policy.velocity, x, t, cond, use_reentrant=False)
            return again.float()
        return policy.velocity(x, t, cond).float()
