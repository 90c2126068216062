"""Flow-GRPO (arXiv:2505.05470), its fast variant and its CPS variant (arXiv:2509.05952): GRPO on a flow model's SDE.

| symbol | here |
|---|---|
| T; T' of evaluation | num_steps; the config's evaluation.num_steps (denoising reduction: 10 against 40) |
| a, noise level | eta |
| sigma_t sqrt(dt) | std of `samplers.flow_sde` |
| G group size | data.samples_per_prompt |
| A_i | credit |
| epsilon | clip_range |
| beta | kl_coef |
"""

from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import all_or_window, check_group_size, check_window, share_noise, training_times
from samplers import Plan


class FlowGRPO(PolicyGradient):
    """Flow-GRPO (arXiv:2505.05470): every step but the last is an SDE step, and PPO is done on all of them.

    With a window, Flow-GRPO-Fast: SDE and training in a few steps at random, the ODE elsewhere.
    Note: the last step follows the ODE, as in the authors' later code; at first its noise stayed in the image.
    Note: the paper divides by the std of the group, its code (and this default) by that of the whole batch.
    """

    adv_std: fields.AdvStd = "global"
    kl_coef: fields.KLCoef = 0.04
    kl_form: fields.KLForm = "flow_grpo"
    window: fields.Window = None
    window_range: fields.WindowRange = None
    shared_noise: fields.SharedNoise = False

    @model_validator(mode="after")
    def _possible(self) -> "FlowGRPO":
        check_window(self.num_steps, self.window, self.window_range)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last, or a random window that is the same for everyone in this iteration."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        plan = all_or_window(grid, iteration, self.window, self.window_range, seed)
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan
