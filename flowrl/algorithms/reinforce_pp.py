"""REINFORCE++ (arXiv:2501.03262): no groups; the returns of all tokens of the batch are normalised together.

| symbol | here |
|---|---|
| G_t, gamma | credit, gamma |
| (A - mean) / std over the batch's tokens | credit |
| beta, KL in the token's reward | kl_in_reward |
| epsilon | clip_range |
"""

from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, discounted, whiten
from flowrl.algorithms.token_policy_gradient import TokenPolicyGradient, token_rewards
from flowrl.types import TokenBatch


class ReinforcePP(TokenPolicyGradient):
    """REINFORCE++ (arXiv:2501.03262): the discounted return of each token, whitened over all tokens of the batch.

    Note: the paper's KL penalty, kl_in_reward, is 0 by default.
    """

    aggregate: fields.Aggregate = "token_mean"
    gamma: fields.Gamma = 1.0

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """The rewards as they are."""
        valid = rewards.isfinite()
        return Advantages(rewards.where(valid, 0.0), valid, valid.new_ones(len(batch.group.unique())))

    def credit(self, batch: TokenBatch) -> Tensor:
        """Whitened returns [R,S] of the tokens."""
        found = self.advantages(batch, self.own_rewards(batch))
        rewards = token_rewards(batch, found, self.kl_in_reward)
        mask = batch.tokens.mask.cpu() & found.valid[batch.place.cpu()][:, None]
        white = whiten(discounted(rewards, mask, self.gamma), mask, batch.total)
        return self.trained(batch, white, found.valid)
