"""GPG (arXiv:2504.02546): the plain policy gradient with GRPO's baseline, and no shrinking by groups that agree.

| symbol | here |
|---|---|
| A = alpha (r - mean r) / F_norm | credit; F_norm = 1, or the std with std: group |
| alpha = B / (answers of groups that differ) | credit |
| -A log pi | objective: reinforce |
"""

from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, undiluted
from flowrl.algorithms.grpo import GRPO
from flowrl.types import TokenBatch


class GPG(GRPO):
    """GPG (arXiv:2504.02546): -A log pi with A scaled up by the share of answers that teach nothing.

    Note: the loss has no ratio, so that it wants one update an iteration.
    """

    std: fields.AdvStd = "none"
    objective: fields.ObjectiveName = "reinforce"
    aggregate: fields.Aggregate = "token_mean"

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """Those of the group, times alpha."""
        return undiluted(super().advantages(batch, rewards), batch.group.cpu())
