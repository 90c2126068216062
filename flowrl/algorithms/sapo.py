"""SAPO (arXiv:2511.20347): a soft gate around ratio 1 where GRPO has a hard clip; Qwen3-VL was trained with it.

| symbol | here |
|---|---|
| f(r) = 4 / tau sigmoid(tau (r - 1)) | objective: sapo |
| tau_pos, tau_neg | tau_pos, tau_neg |
| A_i | mean, std |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class SAPO(GRPO):
    """SAPO (arXiv:2511.20347): a token's gradient fades as its ratio leaves 1, faster for bad answers than for good.

    `clip_range` has no effect here but on what clip_frac counts.
    """

    objective: fields.ObjectiveName = "sapo"
