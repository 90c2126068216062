"""GSPO (arXiv:2507.18071): ratio, clip and loss are of whole answers, as the reward is.

| symbol | here |
|---|---|
| s_i = (pi(y) / pi_old(y))^(1 / abs(y)) | objective: gspo |
| clip range 3e-4, 4e-4 | clip_range |
| A_i | mean, std |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class GSPO(GRPO):
    """GSPO (arXiv:2507.18071): answers are clipped as a whole, by the geometric mean of their tokens' ratios.

    Note: it is the paper's GSPO-token, which is the same where an answer has one advantage.
    """

    objective: fields.ObjectiveName = "gspo"
    clip_range: fields.ClipRange = (3e-4, 4e-4)
