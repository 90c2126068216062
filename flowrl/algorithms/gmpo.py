"""GMPO (arXiv:2507.20673): the geometric mean of an answer's ratios where GRPO has the arithmetic one.

| symbol | here |
|---|---|
| prod (rho_t clipped)^(1 / abs(o)) | objective: gmpo |
| (e^-0.4, e^0.4) | clip_range, of log-ratios |
| A_i | mean, std |
"""

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.grpo import GRPO


class GMPO(GRPO):
    """GMPO (arXiv:2507.20673): single wild ratios weigh little in a geometric mean, so that the clip may be wide."""

    objective: fields.ObjectiveName = "gmpo"
    clip_range: fields.ClipRange = 0.4
