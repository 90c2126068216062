"""DDPO (arXiv:2305.13301): policy gradient on ancestral sampling, rewards normalised by each prompt's own past.

| symbol | here |
|---|---|
| T | num_steps |
| p_theta(x_{t-1} | x_t, c) | `samplers.ddim` at eta = 1 |
| mean and std of a prompt's rewards | running, over data.history of them |
| DDPO_IS, importance sampling with a trust region | clip_range |
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.advantages import running_advantages
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import check_group_size, training_times
from flowrl.types import Batch, Needs
from samplers import Plan, all_steps

_UNREAD = ("combine", "baseline", "adv_std", "adv_floor", "unbiased")


class DDPO(PolicyGradient):
    """DDPO (arXiv:2305.13301): every step but the last is ancestral, rewards are normalised by running statistics.

    Note: the public code trains the last step too, whose std is near 0; here it follows the ODE.
    Note: the public code draws a prompt for each sample; here, as everywhere, a prompt has a group of at least two.
    """

    num_steps: fields.NumSteps = 50
    sde: fields.SDE = "ddim"
    eta: fields.Eta = 1.0
    adv_eps: fields.AdvEps = 1e-6
    min_count: Annotated[
        int, Field(description="Rewards of a prompt below which the whole batch's statistics are taken.", ge=2)
    ] = 16

    @model_validator(mode="after")
    def _possible(self) -> "DDPO":
        unread = [name for name in _UNREAD if getattr(self, name) != type(self).model_fields[name].default]
        if unread:
            raise ValueError(
                f"{', '.join(unread)} would change nothing: ddpo compares the sum of the rewards with the running mean "
                "and std of its prompt; leave it out, or take name=flow_grpo with sde=ddim."
            )
        return self

    @property
    def needs(self) -> Needs:
        """The rewards that the prompts got before."""
        return super().needs._replace(history=self.min_count)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last."""
        check_group_size(samples_per_prompt)
        return all_steps(training_times(times, self.num_steps, self.shift))

    def credit(self, batch: Batch) -> Tensor:
        """Each reward against the running mean and std of its prompt.

        Raises ValueError where a history cannot hold the min_count rewards that its statistics ask for.
        """
        if batch.rewards is None or batch.history is None:
            raise ValueError("credit needs batch.rewards and batch.history; set data.history to min_count or more.")
        if batch.history.size < self.min_count:
            raise ValueError(
                f"data.history={batch.history.size} keeps fewer rewards of a prompt than algorithm.min_count="
                f"{self.min_count}, so that its own statistics are never taken; raise the first or lower the second."
            )
        buffers = [batch.history.rewards(prompt.id) for prompt in batch.groups]
        found = running_advantages(
            batch.rewards, batch.trajectory.group, buffers, min_count=self.min_count, eps=self.adv_eps,
            clip=self.adv_clip,
        )  # fmt: skip
        return self.edge_credit(batch, found)
