"""What forward-process methods share: how samples are noised, what a sample is worth, where the old policy is.

A method is a `ForwardProcess` with a loss, or a `Matching` where it needs no advantages and no old policy. It trains on
finished samples alone: no step of the rollout is stored.
"""

from abc import abstractmethod
from typing import Annotated, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import Advantages, combined_advantages, group_advantages
from flowrl.algorithms.deterministic import Deterministic
from flowrl.algorithms.matching import TimeSampling, Velocities, every_sample, grid_times, mean_square, samples_of_rows
from flowrl.algorithms.schedule import AlgorithmError, check_group_size
from flowrl.schedules import Schedule, value_at, values
from flowrl.types import Batch, Draws, Loss, Needs, Policy
from samplers import Plan


def _decays(schedule: float | tuple[tuple[float, float], ...]) -> float | tuple[tuple[float, float], ...]:
    if not all(0 <= value <= 1 for value in values(schedule)):
        raise ValueError(f"a decay lies in [0, 1] (0 copies the trained weights, 1 never moves), got {schedule}.")
    return schedule


Decay = Annotated[
    Schedule,
    AfterValidator(_decays),
    Field(
        description="How slowly the policy that draws the samples follows, a number or [[iteration, value], ...]; "
        "0: it is the trained one."
    ),
]


def _shared(share: bool) -> bool:
    if not share:
        raise ValueError(
            "share_draws=false gives each sample a time and a noise of its own, but this method compares the samples "
            "of a group at the same ones; leave it out."
        )
    return share


ShareDraws = Annotated[
    bool,
    AfterValidator(_shared),
    Field(description="The samples of a prompt have times and noises in common, at which they are compared: true."),
]
DrawsPerSample = Annotated[fields.Count, Field(description="Times that each sample is noised to, an iteration.")]
TimeSamplingName = Annotated[
    TimeSampling,
    Field(description="Where: at times of the rollout's own grid, uniform, or logit-normal; the latter two shifted."),
]
TimeRange = Annotated[
    tuple[float, float], Field(description="Lowest and highest of these times, before the shift; 0 is clean.")
]


class Matching(Deterministic):
    """The forward process: at how many times a sample is trained on, and where these lie."""

    draws_per_sample: DrawsPerSample = 4
    time_sampling: TimeSamplingName = "grid"
    time_range: TimeRange = (0.0, 1.0)
    time_shift: Annotated[float, Field(description="Above 1 pushes uniform and logit-normal times to noise.", gt=0)] = (
        1.0
    )
    share_draws: Annotated[bool, Field(description="The samples of a prompt have times and noises in common.")] = False

    @model_validator(mode="after")
    def _times_exist(self) -> Self:
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"time_range={list(self.time_range)} must be rising and lie in [0, 1]; 1 is pure noise.")
        if self.time_sampling == "grid" and self.draws_per_sample > self.num_steps:
            raise ValueError(
                f"draws_per_sample={self.draws_per_sample} different times of a grid of num_steps={self.num_steps} do "
                "not exist; take fewer, more steps, or time_sampling=uniform."
            )
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE; its grid must have as many times in `time_range` as a sample is noised to."""
        if self.time_sampling == "grid":
            found = len(grid_times(self.grid(times), *self.time_range))
            if found < self.draws_per_sample:
                raise AlgorithmError(
                    f"draws_per_sample={self.draws_per_sample}, but only {found} times of the grid of "
                    f"num_steps={self.num_steps} lie in time_range={list(self.time_range)}; take fewer draws, a wider "
                    "range, or time_sampling=uniform."
                )
        return super().plan(times, iteration, samples_per_prompt, seed)

    def draws(self, batch: Batch) -> Draws | None:
        """Each sample at `draws_per_sample` times."""
        assert batch.times is not None
        low, high = self.time_range
        return every_sample(
            batch, self.draws_per_sample, self.time_sampling, low=low, high=high, times=self.grid(batch.times),
            shift=self.time_shift, share=self.share_draws,
        )  # fmt: skip

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch; see `flowrl.types.Algorithm`."""


class GroupCredit(Deterministic):
    """What a sample is worth: its reward against those of its prompt's group."""

    combine: fields.CombineHow = "sum"
    adv_std: fields.AdvStd = "group"
    adv_eps: fields.AdvEps = 1e-4
    adv_floor: fields.AdvFloor = 0.0
    adv_clip: fields.AdvClip = 5.0
    kl_coef: Annotated[
        float,
        Field(description="Weight of mean (v - v_ref)^2, v_ref of the initial weights; 0 saves their forward.", ge=0),
    ] = 0.0

    @property
    def needs(self) -> Needs:
        """No log-probs; the initial weights for a distance to them."""
        return Needs(logprobs=False, reference=self.kl_coef > 0, scores=self.combine != "sum")

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE; a group needs two samples to be compared."""
        check_group_size(samples_per_prompt)
        return super().plan(times, iteration, samples_per_prompt, seed)

    def sample_advantages(self, batch: Batch) -> Advantages:
        """Advantages of the samples [B] of all processes, against those of their prompt's group."""
        assert batch.rewards is not None
        group = batch.trajectory.group
        how = {"std": self.adv_std, "eps": self.adv_eps, "std_floor": self.adv_floor, "clip": self.adv_clip}
        if self.combine == "sum":
            return group_advantages(batch.rewards, group, **how)  # type: ignore[arg-type]
        known = {k: v.where(batch.rewards.isfinite().to(v.device), torch.nan) for k, v in batch.scores.items()}
        return combined_advantages(known, batch.weights, group, self.combine, **how)  # type: ignore[arg-type]

    def credit(self, batch: Batch) -> Tensor:
        """Each row gets its sample's advantage, fp32 [N]; NaN without a verdict."""
        found = self.sample_advantages(batch)
        value = found.value.where(found.valid, torch.nan)
        return value[samples_of_rows(batch)].to(batch.trajectory.x0.device, torch.float32)

    def total(self, loss: Tensor, v: Velocities, batch: Batch, kl_weight: Tensor | None = None) -> Loss:
        """The mean of a loss [N] and of the distance to the initial weights, with the metrics that all methods log.

        `kl_weight` [N] stands in for `kl_coef`.
        """
        assert batch.advantages is not None
        if v.old is None:
            raise AlgorithmError("total() logs the distance to the old policy: ask velocities(..., old=True) for it.")
        metrics = {
            "policy_loss": loss.detach().mean(),
            "old_distance": mean_square(v.current.detach() - v.old).mean(),
            "adv_abs": batch.advantages.abs().mean(),
        }
        if v.reference is not None:
            kl = mean_square(v.current - v.reference)
            metrics["kl"] = kl.detach().mean()
            loss = loss + (self.kl_coef if kl_weight is None else kl_weight) * kl
        return Loss(loss.mean(), metrics)

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch; see `flowrl.types.Algorithm`."""


def _probabilities(schedule: float | tuple[tuple[float, float], ...]) -> float | tuple[tuple[float, float], ...]:
    if not all(0 <= value <= 1 for value in values(schedule)):
        raise ValueError(f"a probability lies in [0, 1], got {schedule}.")
    return schedule


class ForwardProcess(Matching, GroupCredit):
    """The hyperparameters of the family: the forward process, group advantages, and a policy that follows behind.

    With `inject` stored samples stand among a prompt's own, the curriculum of Pair-GRPO (FocusDiff, arXiv:2506.05501):
    prompts that differ in a word come together (`data.together`) and are one group, each with its true picture and, as
    a bad example, its twin's; its pi(n) is [[50, 1], [450, 0.25], [1200, 0]].
    Note: a coin is tossed for each prompt, where the paper tosses one for both twins.
    Note: the paper trains an autoregressive generator, where an injected picture gets a log-prob and a ratio of 1. No
    trajectory of a flow led to it, so that only a loss on finished samples can take it.
    """

    decay: Decay = 0.0
    inject: Annotated[
        Schedule,
        AfterValidator(_probabilities),
        Field(
            description="Probability that a prompt's two stored pictures stand among its samples, a number or "
            "[[iteration, value], ...]; 0: never."
        ),
    ] = 0.0

    @property
    def needs(self) -> Needs:
        """No log-probs; the old policy, the initial weights for a distance to them, stored samples to inject."""
        return super().needs._replace(old=True, stored=2 if max(values(self.inject)) > 0 else 0)

    def injection(self, iteration: int) -> float:
        """`inject` at this iteration."""
        return value_at(self.inject, iteration)

    def old_decay(self, iteration: int) -> float:
        """`decay` after this iteration."""
        return value_at(self.decay, iteration)

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch; see `flowrl.types.Algorithm`."""
