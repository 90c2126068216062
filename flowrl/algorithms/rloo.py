"""RLOO (arXiv:2402.14740): REINFORCE with the mean reward of the other answers as the baseline.

| symbol | here |
|---|---|
| R_i - mean of R_j, j not i | baseline: leave_one_out, std: none |
| grad log pi(y), an answer is one action | objective: reinforce, aggregate: seq_mean_token_sum |
| beta, KL in the reward | kl_in_reward |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class RLOO(GRPO):
    """RLOO (arXiv:2402.14740): the baseline knows nothing of the answer itself, so that the gradient is unbiased.

    Note: the loss has no ratio, so that it wants one update an iteration; for more, set objective=clip.
    """

    baseline: fields.Baseline = "leave_one_out"
    std: fields.AdvStd = "none"
    objective: fields.ObjectiveName = "reinforce"
    aggregate: fields.Aggregate = "seq_mean_token_sum"
