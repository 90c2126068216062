"""What preference methods share: pairs out of groups, a reference, and the logistic loss of Diffusion-DPO's family.

A method is a `Preference` that says how much a pair weighs at each time. A pair gives two rows a draw, of one unit: the
chosen sample with credit +1, the rejected with -1, both noised with one noise to one time.

Symbols: N rows, B samples, M pairs; w chosen, l rejected; u = eps - x0 the velocity to match.
"""

from abc import abstractmethod
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.forward_process import Matching
from flowrl.algorithms.matching import (
    TimeSampling,
    every_pair,
    mean_square,
    noised,
    samples_of_rows,
    unit_mean,
    unit_sum,
    velocities,
)
from flowrl.algorithms.pairing import PairsOfGroups
from flowrl.algorithms.preference_terms import dpo, log_odds
from flowrl.algorithms.schedule import check_group_size
from flowrl.types import Batch, Draws, Loss, Needs, Policy
from samplers import Plan, stable_seed

TimeSamplingName = Annotated[
    TimeSampling,
    Field(description="Where: at times of the rollout's own grid, uniform, or logit-normal (shifted, these two)."),
]
_PAIRS = -6


class Comparison(NamedTuple):
    """The rows of a minibatch under the trained policy and the reference."""

    error: Tensor
    """mean_d (u - v)^2 of the trained policy, with its graph, [N]."""
    gap: Tensor
    """The same minus that of the reference: negative where the policy has come closer to the sample, [N]."""
    chosen: Tensor
    """-gap_w / 2, which stands for the log-ratio of the chosen sample; equal in both rows of a pair, [N]."""
    rejected: Tensor
    """The same of the rejected one, [N]."""
    beta: Tensor
    """beta_t [N]."""

    @property
    def logit(self) -> Tensor:
        """-(beta_t / 2) (gap_w - gap_l), the log-odds of the preference; equal in both rows of a pair, [N]."""
        return log_odds(self.chosen, self.rejected, self.beta)


class Preference(Matching, PairsOfGroups):
    """The hyperparameters of the family: which pairs, how strongly they count, and what the policy is compared with.

    The reference is the initial weights; with `refresh_every` or `sft_iterations` it is the policy as it was last.
    """

    pairs_per_group: Annotated[
        fields.Count | None, Field(description="At most so many pairs of a group, drawn at random; null: all found.")
    ] = None
    draws_per_sample: Annotated[fields.Count, Field(description="Times that each pair is noised to, an iteration.")] = 1
    time_sampling: TimeSamplingName = "logit_normal"
    share_draws: Annotated[
        bool, Field(description="All pairs of a prompt have times and noises in common; the sides of one always do.")
    ] = False
    beta: Annotated[
        float, Field(description="Strength of a pair, and of what holds the policy at the reference.", gt=0)
    ] = 100.0
    anchor: Annotated[
        float,
        Field(description="Weight of flow matching on the better sample: it keeps its likelihood from falling.", ge=0),
    ] = 0.0
    refresh_every: Annotated[
        fields.Count | None,
        Field(description="Iterations after which the policy becomes the reference; null: never."),
    ] = None
    sft_iterations: Annotated[
        int,
        Field(
            description="First iterations, of flow matching on the chosen samples; then the policy is the reference.",
            ge=0,
        ),
    ] = 0

    @model_validator(mode="after")
    def _pairs_exist(self) -> Self:
        if self.pairs_per_group is not None and self.pairing == "best_worst":
            raise ValueError("pairs_per_group has no effect on pairing=best_worst, which gives one; set pairing=all.")
        return self

    @property
    def needs(self) -> Needs:
        """No log-probs; the initial weights, or a reference that follows, which never draws the samples."""
        follows = self.refresh_every is not None or self.sft_iterations > 0
        return Needs(logprobs=False, reference=not follows, old=follows, on_policy=True, whole_units=True)

    def old_decay(self, iteration: int) -> float:
        """0, the policy becomes the reference, while it imitates and every `refresh_every` iterations; else 1."""
        done = iteration + 1 - self.sft_iterations
        return 0.0 if done <= 0 or (self.refresh_every is not None and done % self.refresh_every == 0) else 1.0

    def asks_old(self, iteration: int) -> bool:
        """Not while samples are imitated."""
        return self.needs.old and not self._imitates(iteration)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE; a pair needs two samples."""
        check_group_size(samples_per_prompt)
        return super().plan(times, iteration, samples_per_prompt, seed)

    def draws(self, batch: Batch) -> Draws | None:
        """Two rows for each pair and draw, the better sample first; a group without a difference has none."""
        assert batch.times is not None
        low, high = self.time_range
        return every_pair(
            batch, self._pairs(batch), self.draws_per_sample, self.time_sampling, low=low, high=high,
            times=self.grid(batch.times), shift=self.time_shift, share=self.share_draws,
        )  # fmt: skip

    def credit(self, batch: Batch) -> Tensor:
        """+1 for the chosen, -1 for the rejected row of each pair, fp32 [N]; NaN where a verdict is missing.

        While samples are imitated the rejected rows leave.
        """
        assert batch.rewards is not None and batch.draws is not None
        sign = self.preference(batch, batch.rewards[samples_of_rows(batch)])
        if self._imitates(batch.iteration):
            sign = sign.where(sign > 0, torch.nan)
        return sign.to(batch.trajectory.x0.device, torch.float32)

    def preference(self, batch: Batch, rewards: Tensor) -> Tensor:
        """Which row of each pair is chosen, +1 or -1 [N], by the rewards of the rows [N]."""
        assert batch.draws is not None
        return better(rewards, batch.draws.unit.to(rewards.device))

    @abstractmethod
    def strength(self, t: Tensor) -> Tensor:
        """beta_t [N]: what the velocity errors of the rows at times t [N] are multiplied with."""

    def compare(self, policy: Policy, batch: Batch) -> Comparison:
        """Trained policy and reference at the rows of the batch."""
        assert batch.advantages is not None and batch.draws is not None
        at = noised(batch)
        v = velocities(policy, at, old=self.needs.old, reference=self.needs.reference)
        before = v.old if self.needs.old else v.reference
        assert before is not None
        error = mean_square(v.current - at.target)
        gap = error - mean_square(before - at.target)
        chosen, rejected = (
            -unit_sum(side.clamp(min=0) * gap, batch.draws.unit) / 2 for side in (batch.advantages, -batch.advantages)
        )
        return Comparison(error, gap, chosen, rejected, self.strength(at.t))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Mean over the pairs of -log sigmoid(logit), plus `anchor` times the flow-matching loss of the better samples.

        implicit_accuracy is the share of pairs with a positive logit (1/2 where it is 0), gap_chosen and gap_rejected
        are how much farther the policy is from them than the reference: where both rise, likelihood is displaced.
        """
        if self._imitates(batch.iteration):
            return self._imitate(policy, batch)
        found = self.compare(policy, batch)
        loss = dpo(found.chosen, found.rejected, found.beta)
        metrics = {"policy_loss": loss.detach().mean()} | self._watch(batch, found)
        if self.anchor > 0:
            assert batch.rewards is not None and batch.draws is not None
            rewards = batch.rewards.to(found.error.device)[batch.draws.sample]
            # One of two rows is the better one: twice its mean over the rows is the mean over the pairs.
            anchor = 2 * found.error * (better(rewards, batch.draws.unit) > 0)
            metrics["anchor"] = anchor.detach().mean()
            loss = loss + self.anchor * anchor
        return Loss(loss.mean(), metrics)

    @torch.no_grad()
    def _watch(self, batch: Batch, found: Comparison) -> dict[str, Tensor]:
        assert batch.advantages is not None and batch.draws is not None and batch.rewards is not None
        sign = batch.advantages
        rewards = batch.rewards.to(sign.device)[batch.draws.sample]
        return {
            "implicit_accuracy": (found.logit.sign() + 1).mean() / 2,
            "implicit_margin": found.logit.mean(),
            "gap_chosen": found.gap[sign > 0].mean(),
            "gap_rejected": found.gap[sign < 0].mean(),
            "reward_margin": 2 * (rewards * better(rewards, batch.draws.unit)).mean(),
        } | self._watch_pairs(batch)

    def _watch_pairs(self, batch: Batch) -> dict[str, Tensor]:
        """Of the whole iteration, as far as this process has it."""
        group = batch.trajectory.group.cpu()
        paired = group[self._pairs(batch)[:, 0]]
        count = torch.tensor(float(len(set(group.tolist()))))
        return {"pairs_per_group": len(paired) / count, "no_pair_frac": 1 - len(set(paired.tolist())) / count}

    def _imitate(self, policy: Policy, batch: Batch) -> Loss:
        """Flow matching on the chosen samples."""
        at = noised(batch)
        error = mean_square(velocities(policy, at).current - at.target).mean()
        return Loss(error, {"policy_loss": error.detach()} | self._watch_pairs(batch))

    def _imitates(self, iteration: int) -> bool:
        return iteration < self.sft_iterations

    def _pairs(self, batch: Batch) -> Tensor:
        """Indices (better, worse) [M,2] of this process's pairs, on the CPU."""
        assert batch.rewards is not None
        group = batch.trajectory.group.cpu()
        pairs = self.pairs(batch.rewards, group)
        if self.pairs_per_group is None:
            return pairs
        kept = [pairs[:0]]
        for place in dict.fromkeys(group.tolist()):
            mine = pairs[group[pairs[:, 0]] == place]
            draw = torch.Generator().manual_seed(stable_seed(batch.seed, batch.iteration, place, _PAIRS))
            kept.append(mine[torch.randperm(len(mine), generator=draw)[: self.pairs_per_group].sort().values])
        return torch.cat(kept)


def better(rewards: Tensor, unit: Tensor) -> Tensor:
    """+1 for the row of each pair with the higher reward, -1 for the other [N]; NaN where one has no verdict."""
    lead = rewards - unit_mean(rewards, unit)
    return lead.sign().where(~lead.isnan(), torch.nan)  # the sign of NaN is 0
