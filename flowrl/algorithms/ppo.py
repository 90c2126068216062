"""PPO with a value head (arXiv:1707.06347), and what VC-PPO and VAPO changed for long answers.

| symbol | here |
|---|---|
| V, the critic | a value head on the policy's last hidden states; batch.values when the answers came |
| A, GAE | credit; gamma, lam |
| decoupled GAE (VC-PPO, arXiv:2503.01491) | lam for the policy, lam_critic for the critic's targets |
| lam = 1 - 1 / (alpha l) (VAPO, arXiv:2504.05118) | lam_alpha |
| value pretraining (VC-PPO) | critic_warmup |
| positive-example LM loss (VAPO) | positive_sft_coef |
| value clip | value_clip |
| V_MC, the mean reward of K continuations from a state (VinePPO, arXiv:2410.01679) | values, continuations, every |
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import adaptive_lambda, gae, stretch_advantages
from flowrl.algorithms.fields import Count
from flowrl.algorithms.token_policy_gradient import Terms, TokenReturns
from flowrl.types import Needs, TokenBatch, TokenPolicy, TokenStats


class PPO(TokenReturns):
    """PPO (arXiv:1707.06347): advantages by GAE against a critic that learns with the policy, whitened over the batch.

    VC-PPO is lam: 0.95 with a critic_warmup, VAPO lam_alpha: 0.05 besides, clip_range: [0.2, 0.28] and
    positive_sft_coef: 0.1.
    Note: the critic is a head of the policy, not a network of its own: value_coef says how much it moves the weights
    that both share. During critic_warmup it moves them as well, the policy's terms weighing nothing.

    VinePPO is values: monte_carlo: no critic; from a state every so many tokens the policy writes K answers to the end,
    and the mean of their rewards is the state's value, unbiased. It costs as many times the writing.
    Note: its states are the beginnings of reasoning steps; here they are evenly spaced, which needs no parsing of text.
    Note: kl_in_reward is not part of these values.
    """

    _OF_HEAD: ClassVar = ("gamma", "lam", "lam_critic", "lam_alpha", "value_coef", "value_clip", "critic_warmup")

    aggregate: fields.Aggregate = "token_mean"
    values: Annotated[
        Literal["head", "monte_carlo"],
        Field(description="Who expects: a value head that learns, or the mean of answers written on from the state."),
    ] = "head"
    continuations: Annotated[Count, Field(description="monte_carlo only: answers written on from each state.")] = 4
    every: Annotated[Count, Field(description="monte_carlo only: tokens from one state to the next.")] = 16
    lam: Annotated[
        float, Field(description="lambda of the policy's advantages; 1 trusts the rewards alone.", ge=0, le=1)
    ] = 1.0
    lam_critic: Annotated[float, Field(description="lambda of the critic's targets.", ge=0, le=1)] = 1.0
    lam_alpha: Annotated[
        float | None, Field(description="VAPO: lambda = 1 - 1 / (lam_alpha tokens) instead of lam; null: lam.", gt=0)
    ] = None
    value_coef: Annotated[float, Field(description="Weight of the critic's squared error.", gt=0)] = 0.5
    value_clip: Annotated[
        float | None, Field(description="An expectation moves by at most this in an iteration; null: by any.", gt=0)
    ] = 0.5
    critic_warmup: Annotated[int, Field(description="First iterations, in which the critic alone learns.", ge=0)] = 0

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        known = type(self).model_fields
        given = [name for name in self._OF_HEAD if getattr(self, name) != known[name].default]
        if self.values == "monte_carlo" and given:
            raise ValueError(f"values=monte_carlo has no critic, to which {', '.join(given)} belongs; leave it out.")
        return self

    @property
    def needs(self) -> Needs:
        """A value head, or continuations."""
        if self.values == "head":
            return super().needs._replace(value=True)
        return super().needs._replace(continuations=self.continuations, state_every=self.every)

    def trained(self, batch: TokenBatch) -> Tensor:
        """Besides, of continuations: with a value at the answer's first token of the policy's own."""
        trained = super().trained(batch)
        if self.values == "head":
            return trained
        mask = batch.tokens.mask.cpu()
        first = mask & (mask.long().cumsum(1) == 1)
        return trained & (first & _expected(batch).isfinite()).any(1)

    def returns(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """Generalised advantages by lam, or a lambda of each answer's length; without a critic, from state to state."""
        mask = batch.tokens.mask.cpu()
        if self.values == "monte_carlo":
            return stretch_advantages(rewards, _expected(batch), mask)
        lam = (
            self.lam if self.lam_alpha is None else adaptive_lambda(batch.tokens.lengths.cpu().double(), self.lam_alpha)
        )
        return gae(rewards, _expected(batch), mask, self.gamma, lam)

    def targets(self, batch: TokenBatch) -> Tensor:
        """What the critic should have expected before each token, float64 [N,S]; 0 off the mask."""
        assert batch.rewards is not None
        mask, values = batch.tokens.mask.cpu(), _expected(batch)
        rewards = self.token_rewards(batch, batch.rewards)
        return (gae(rewards, values, mask, self.gamma, self.lam_critic) + values).where(mask, 0.0)

    def terms(
        self, policy: TokenPolicy, batch: TokenBatch, stats: TokenStats, reference: Tensor | None
    ) -> tuple[Terms, dict[str, Tensor]]:
        """The policy's terms, of weight 0 in the warm-up, and half the squared error of a critic."""
        terms, metrics = super().terms(policy, batch, stats, reference)
        if self.values == "monte_carlo":
            return terms, metrics
        if batch.iteration < self.critic_warmup:
            terms = {name: (0.0, table) for name, (_, table) in terms.items()}
        assert stats.value is not None and batch.values is not None
        target, mask = self.targets(batch).to(stats.value), batch.tokens.mask
        error = (stats.value - target).square()
        if self.value_clip is not None:
            before = batch.values.to(stats.value)
            kept = before + (stats.value - before).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (kept - target).square())
        terms["value_loss"] = self.value_coef, 0.5 * error
        metrics["value_mean"], metrics["return_mean"] = stats.value.detach()[mask].mean(), target[mask].mean()
        return terms, metrics


def _expected(batch: TokenBatch) -> Tensor:
    """Values [N,S] in float64 on the CPU."""
    if batch.values is None:
        raise ValueError("ppo needs batch.values, what was expected; see needs.value and needs.continuations.")
    return batch.values.detach().cpu().double()
