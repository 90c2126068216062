"""OPO (arXiv:2505.23585): on-policy REINFORCE with the baseline of least variance.

| symbol | here |
|---|---|
| b = sum l_i r_i / sum l_i | credit; l is the answer's tokens |
| exact on-policy, no KL, no entropy bonus | objective: reinforce, one update an iteration |
"""

from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, length_weighted
from flowrl.algorithms.token_policy_gradient import AnswerCredit, check_groups, fact
from flowrl.types import TokenBatch


class OPO(AnswerCredit):
    """OPO (arXiv:2505.23585): rewards less their mean weighted by length.

    Note: the loss has no ratio, so that it wants one update an iteration; for more, set objective=clip.
    """

    objective: fields.ObjectiveName = "reinforce"
    aggregate: fields.Aggregate = "token_mean"

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """r - sum(l r) / sum(l) over the group."""
        check_groups(batch)
        return length_weighted(rewards, batch.group.cpu(), fact(batch, "tokens").nan_to_num())
