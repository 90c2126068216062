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
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import adaptive_lambda, gae
from flowrl.algorithms.token_policy_gradient import Terms, TokenReturns
from flowrl.types import Needs, TokenBatch, TokenPolicy, TokenStats


class PPO(TokenReturns):
    """PPO (arXiv:1707.06347): advantages by GAE against a critic that learns with the policy, whitened over the batch.

    VC-PPO is lam: 0.95 with a critic_warmup, VAPO lam_alpha: 0.05 besides, clip_range: [0.2, 0.28] and
    positive_sft_coef: 0.1.
    Note: the critic is a head of the policy, not a network of its own: value_coef says how much it moves the weights
    that both share. During critic_warmup it moves them as well, the policy's terms weighing nothing.
    """

    aggregate: fields.Aggregate = "token_mean"
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

    @property
    def needs(self) -> Needs:
        """A value head."""
        return super().needs._replace(value=True)

    def returns(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """Generalised advantages by lam, or by a lambda of each answer's length."""
        mask = batch.tokens.mask.cpu()
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
        """The policy's terms, of weight 0 in the warm-up, and half the critic's squared error."""
        terms, metrics = super().terms(policy, batch, stats, reference)
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
        raise ValueError("ppo needs batch.values, what the value head expected; see needs.value.")
    return batch.values.detach().cpu().double()
