"""CISPO (MiniMax-M1, arXiv:2506.13585): importance weights are clipped, and no token loses its gradient.

| symbol | here |
|---|---|
| sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi | objective: cispo |
| no lower bound, eps_high | clip_range: [1.0, high] |
| 1 / sum abs(o_i) | aggregate: token_mean |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class CISPO(GRPO):
    """CISPO (arXiv:2506.13585): rare words that turn a thought around keep teaching after the ratio has moved.

    Note: the paper tells no eps_high; weights up to 5 are what other code recommends.
    """

    objective: fields.ObjectiveName = "cispo"
    clip_range: fields.ClipRange = (1.0, 4.0)
    aggregate: fields.Aggregate = "token_mean"
