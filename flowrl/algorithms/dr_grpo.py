"""Dr.GRPO (arXiv:2503.20783): GRPO without the two divisions that bias it, by the std and by the answer's length.

| symbol | here |
|---|---|
| A_i = R_i - mean R | mean: group, std: none |
| sum over tokens, not its mean | aggregate: seq_mean_token_sum_norm, horizon |
| epsilon | clip_range |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class DrGRPO(GRPO):
    """Dr.GRPO (arXiv:2503.20783): no std, and every answer's sum is divided by one constant, `horizon`.

    Long wrong answers are then not let off lightly, nor easy and hard questions weighed up.
    Note: where a config does not say otherwise `horizon` is the longest answer, generation.max_new_tokens; without a
    config it is 1024. It only scales the loss. Other code divides by the padded width, which changes from batch to
    batch.
    """

    std: fields.AdvStd = "none"
    aggregate: fields.Aggregate = "seq_mean_token_sum_norm"
    horizon: fields.Horizon = 1024
