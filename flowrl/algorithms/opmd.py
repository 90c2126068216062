"""OPMD, online policy mirror descent in the form of Trinity-RFT (arXiv:2505.17826), after Kimi k1.5 (arXiv:2501.12599).

| symbol | here |
|---|---|
| r - mean r | mean: group, std: none |
| tau | tau |
| -A log pi / (1 + tau) | objective: reinforce |
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages
from flowrl.algorithms.grpo import GRPO
from flowrl.types import TokenBatch


class OPMD(GRPO):
    """OPMD (arXiv:2505.17826): -A log pi / (1 + tau), whoever drew the answer.

    The first order of mirror descent's regularised squared loss, which stays meaningful off policy.
    """

    std: fields.AdvStd = "none"
    objective: fields.ObjectiveName = "reinforce"
    aggregate: fields.Aggregate = "token_mean"
    tau: Annotated[float, Field(description="Strength of what holds the policy where it was; it divides A.", ge=0)] = (
        1.0
    )

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """Those of the group, divided by 1 + tau."""
        found = super().advantages(batch, rewards)
        return found._replace(value=found.value / (1 + self.tau))
