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
from flowrl.algorithms.advantages import discounted
from flowrl.algorithms.token_policy_gradient import TokenReturns
from flowrl.types import TokenBatch


class ReinforcePP(TokenReturns):
    """REINFORCE++ (arXiv:2501.03262): the discounted return of each token, whitened over all tokens of the batch.

    Note: the paper's KL penalty, kl_in_reward, is 0 by default.
    """

    aggregate: fields.Aggregate = "token_mean"

    def returns(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """G_t = r_t + gamma G_{t+1}."""
        return discounted(rewards, batch.tokens.mask.cpu(), self.gamma)
