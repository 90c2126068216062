"""DPO on answers (arXiv:2305.18290): pairs of the policy's own answers to a prompt, the better against the worse.

| symbol | here |
|---|---|
| y_w, y_l | answers of a group whose rewards differ; pairing, min_margin |
| log pi(y) - log ref(y) | sum over the answer's tokens, or their mean with length_normalised |
| beta | beta |
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.pairing import PairsOfGroups
from flowrl.algorithms.preference_terms import dpo
from flowrl.algorithms.token_policy_gradient import ResetReference
from flowrl.types import Loss, Needs, TokenBatch, TokenPolicy, held_to


class Pairs(NamedTuple):
    """M pairs of answers under the trained policy and its reference; w the chosen, l the rejected, [M] each."""

    chosen: Tensor
    """log pi - log ref of w, with its graph."""
    rejected: Tensor
    """The same of l."""
    logprob: Tensor
    """log pi of w, summed over its tokens, with its graph."""
    lengths: Tensor
    """Tokens of w."""
    margin: Tensor
    """How much higher the reward of w is."""
    shift: Tensor
    """The credit of w, which is equal for all answers of an iteration where a method compares with it."""


class TokenDPO(ResetReference, PairsOfGroups):
    """DPO (arXiv:2305.18290) on the policy's own answers: -log sigmoid(beta (log-ratio_w - log-ratio_l)) of pairs.

    Own answers, because better ones of another model are told apart at once and teach nothing; and pairs of right and
    wrong, with a wide margin. reward_accuracies should rise; its level does not compare between runs.
    The reference is the initial weights, or with `reset_every` the policy as it was last.
    Note: answers of a few tokens collapse under it; length_normalised, with a larger beta, holds up better.
    """

    beta: Annotated[
        float, Field(description="Strength of a pair; larger for long answers, smaller for short ones.", gt=0)
    ] = 0.1
    length_normalised: Annotated[
        bool, Field(description="Log-ratios are means over the tokens, not sums: long answers count for no more.")
    ] = False

    @property
    def fewest_samples(self) -> int:
        """A pair."""
        return 2

    @property
    def needs(self) -> Needs:
        """A model that writes, a reference, and a prompt's answers in one call."""
        return self.with_reference(Needs(tokens=True, whole_groups=True))

    def credit(self, batch: TokenBatch) -> Tensor:
        """Pairs that an answer wins less those that it loses, fp32 [R]; NaN, out of training, for those in no pair."""
        assert batch.rewards is not None and batch.place is not None
        pairs = self._pairs(batch)
        count = torch.zeros(2, len(batch.rewards), dtype=torch.float64)
        for side in (0, 1):
            count[side].index_add_(0, pairs[:, side], torch.ones(len(pairs), dtype=torch.float64))
        balance = (count[0] - count[1]).where(count.sum(0) > 0, torch.nan)
        return balance[batch.place.cpu()].to(batch.tokens.ids.device, torch.float32)

    def mass(self, batch: TokenBatch) -> Tensor:
        """Pairs, float64 [1]."""
        return torch.tensor([len(self._pairs(batch))], dtype=torch.float64)

    def share(self, batch: TokenBatch, total: Tensor) -> float:
        """By pairs."""
        return len(self._pairs(batch)) / max(float(total[0]), 1.0)

    def compare(self, policy: TokenPolicy, batch: TokenBatch) -> Pairs:
        """Trained policy and reference at the pairs of the batch, which holds whole groups."""
        assert batch.rewards is not None and batch.advantages is not None
        tokens, pairs = batch.tokens, self._pairs(batch).to(batch.tokens.ids.device)
        with torch.no_grad(), held_to(policy, self.needs):
            reference = policy.evaluate(tokens).logprob
        logprob = policy.evaluate(tokens).logprob
        ratio = (logprob - reference).where(tokens.mask, 0.0).sum(1)
        if self.length_normalised:
            ratio = ratio / tokens.lengths.clamp(min=1)
        chosen, rejected = pairs.T
        rewards = batch.rewards.to(pairs.device)
        return Pairs(
            ratio[chosen], ratio[rejected], logprob.where(tokens.mask, 0.0).sum(1)[chosen], tokens.lengths[chosen],
            rewards[chosen] - rewards[rejected], batch.advantages[chosen].to(ratio),
        )  # fmt: skip

    def pair_loss(self, found: Pairs) -> Tensor:
        """Loss [M] of the pairs."""
        return dpo(found.chosen, found.rejected, self.beta)

    def loss(self, policy: TokenPolicy, batch: TokenBatch) -> Loss:
        """Mean over the pairs; reward_accuracies is the share of them that the policy orders as the rewards do."""
        found = self.compare(policy, batch)
        loss = self.pair_loss(found)
        implicit = self.beta * (found.chosen - found.rejected).detach()
        metrics = {
            "policy_loss": loss.detach().mean(),
            "reward_accuracies": (implicit.sign() + 1).mean() / 2,
            "implicit_margin": implicit.mean(),
            "implicit_chosen": self.beta * found.chosen.detach().mean(),
            "implicit_rejected": self.beta * found.rejected.detach().mean(),
            "reward_margin": found.margin.mean(),
        }
        # A part without any pair has nothing to teach.
        return Loss(loss.sum() / max(1, len(loss)), metrics, dict.fromkeys(metrics, float(len(loss))))

    def _pairs(self, batch: TokenBatch) -> Tensor:
        """Indices (better, worse) [M,2] of the answers, on the CPU: all while credit is given, then the batch's rows.

        Answers in no pair have left by then, which changes nothing for those of their group that are in one.
        """
        assert batch.rewards is not None
        return self.pairs(batch.rewards, batch.group)
