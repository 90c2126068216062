"""Flow-DPPO (arXiv:2606.11025): no clipping; steps that have diverged and would diverge further are masked.

| symbol | here |
|---|---|
| D, divergence of a step from the old policy's | mean_d (mu - mu_old)^2 / (2 std^2), the exact KL over the dims |
| delta | trust |
| A, not clipped | credit; adv_clip is beyond what a group can reach |
"""

from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import all_or_window, check_group_size, check_window, share_noise, training_times
from samplers import Plan


class FlowDPPO(PolicyGradient):
    """Flow-DPPO (arXiv:2606.11025): the trust region is the divergence of the step, not one sample's ratio.

    Note: the paper masks above delta, its code from delta on; so does this.
    """

    eta: fields.Eta = 1.2
    objective: fields.ObjectiveName = "dppo"
    trust: fields.Trust = 1e-5
    adv_std: fields.AdvStd = "global"
    adv_clip: fields.AdvClip = 100.0
    window: fields.Window = 2
    window_range: fields.WindowRange = None
    shared_noise: fields.SharedNoise = False

    @model_validator(mode="after")
    def _possible(self) -> "FlowDPPO":
        check_window(self.num_steps, self.window, self.window_range)
        return self

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """A random window, or all steps but the last."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        plan = all_or_window(grid, iteration, self.window, self.window_range, seed)
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan
