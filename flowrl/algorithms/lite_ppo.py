"""Lite PPO (arXiv:2508.08221): of all tricks for GRPO, the two that were enough.

| symbol | here |
|---|---|
| group mean, batch std | mean: group, std: global |
| token-level loss | aggregate: token_mean |
| epsilon | clip_range |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class LitePPO(GRPO):
    """Lite PPO (arXiv:2508.08221): the mean of the group, the std of the batch, and every token weighs the same."""

    std: fields.AdvStd = "global"
    aggregate: fields.Aggregate = "token_mean"
