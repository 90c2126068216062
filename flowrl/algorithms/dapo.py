"""DAPO (arXiv:2503.14476): four changes to GRPO for long chains of thought.

| symbol | here |
|---|---|
| epsilon_low, epsilon_high (clip-higher) | clip_range |
| token-level loss | aggregate: token_mean |
| dynamic sampling | data.filters: [{use: informative}], data.max_tries |
| soft overlong punishment | a reward, verifiers' length |
| overlong filtering | mask_truncated |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class DAPO(GRPO):
    """DAPO (arXiv:2503.14476): more room upwards than downwards, every token of the batch weighs the same, no KL.

    Note: its dynamic sampling and soft overlong punishment are the data's and the rewards' business, not the loss's.
    Note: the dual clip at 10 is that of its public recipe; the paper has none.
    """

    objective: fields.ObjectiveName = "dual_clip"
    clip_range: fields.ClipRange = (0.2, 0.28)
    dual_clip: fields.DualClip = 10.0
    aggregate: fields.Aggregate = "token_mean"
