"""Flow-DPO (arXiv:2501.13918): the velocity's error at the chosen sample falls, against the reference and the rejected.

| symbol | here |
|---|---|
| y_w, y_l | the rows of a pair with credit +1 and -1, at one t with one eps |
| beta_t = beta, or beta (1 - t)^2 | beta, beta_schedule |
| v_ref | the initial weights, or what refresh_every and sft_iterations make of them |
| offline | data.samples: stored, samples_per_prompt: 2, prompts: a folder of pairs |
| online, with the reference refreshed | refresh_every |
| OPA-DPO (arXiv:2501.09695): align to the preferred, freeze, compare own pairs | sft_iterations, then refresh_every |
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.preference import Preference


class FlowDPO(Preference):
    """Flow-DPO (arXiv:2501.13918): -log sigmoid(-(beta_t / 2) [(e_w - e_w_ref) - (e_l - e_l_ref)]), e = mean (u - v)^2.

    Diffusion-DPO's loss in flow coordinates has beta_t = beta (1 - t)^2, which leaves the noisy times, where a picture
    is laid out, without a weight; the paper found it worse, and keeps beta constant. beta 100 is that of SD3.5-M in
    Flow-GRPO's scripts (512 px, LoRA, lr 3e-4); it multiplies a mean, so it does not grow with resolution.

    Note: a group whose rewards are all equal gives no pair; that code makes one of two arbitrary samples.
    Note: OPA-DPO is of language models, whose preferred answers experts revise, and has a loss on changed pictures and
    an anchor besides. Here the preferred are the best of the policy's own samples; `anchor` is a mean error, not a log
    sigmoid.
    """

    beta_schedule: Annotated[
        Literal["constant", "one_minus_t_sq"],
        Field(description="beta_t: beta, or beta (1 - t)^2, the exact translation of Diffusion-DPO's."),
    ] = "constant"

    def strength(self, t: Tensor) -> Tensor:
        """`beta`, times (1 - t)^2 where that is the schedule, [N]."""
        return torch.full_like(t, self.beta) if self.beta_schedule == "constant" else self.beta * (1 - t) ** 2
