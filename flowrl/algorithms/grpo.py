"""GRPO (arXiv:2402.03300): an answer's reward against those of the other answers to the same prompt, PPO's clip.

| symbol | here |
|---|---|
| G, group size | data.samples_per_prompt |
| A_i = (r_i - mean r) / std r | mean, std, adv_eps, unbiased |
| epsilon | clip_range |
| beta, D_KL | kl_coef, kl_form |
| 1 / G sum of 1 / abs(o_i) sum | aggregate: seq_mean_token_mean |
"""

from typing import Self

from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, batch_advantages
from flowrl.algorithms.token_policy_gradient import AnswerCredit, check_groups
from flowrl.types import Needs, TokenBatch


class GRPO(AnswerCredit):
    """GRPO (arXiv:2402.03300) for answers; mean, std, objective and aggregate make most of its relatives out of it.

    Note: the paper holds the policy at the initial weights with kl_coef 0.04; for models that see, GLM-4.1V
    (arXiv:2507.01006) and others found it in the way, and it costs a forward, so that it is 0 here.
    Note: the std divides by n - 1, as in the public codes; the paper does not say.
    """

    mean: fields.Mean = "group"
    baseline: fields.Baseline = "mean"
    std: fields.AdvStd = "group"
    adv_eps: fields.AdvEps = 1e-6
    adv_floor: fields.AdvFloor = 0.0
    adv_clip: fields.AdvClip = None
    unbiased: fields.Unbiased = True
    combine: fields.CombineHow = "sum"

    @model_validator(mode="after")
    def _one_reward(self) -> Self:
        if self.combine != "sum" and self.kl_in_reward > 0:
            raise ValueError(
                f"kl_in_reward is taken off one reward, but combine={self.combine} takes each by itself; set kl_coef."
            )
        if self.mean == "none" and self.baseline != "mean":
            raise ValueError("baseline=leave_one_out leaves an answer out of a mean, but mean=none has none.")
        return self

    @property
    def fewest_samples(self) -> int:
        """One, where an answer is compared with those to other prompts, or with none."""
        return 2 if "group" in (self.mean, self.std) else 1

    @property
    def needs(self) -> Needs:
        """Each reward by itself where they are not summed up."""
        return super().needs._replace(scores=self.combine != "sum")

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """(r - mean) / (std + eps), each of the group, of the batch, or left out."""
        if self.mean == "group":
            check_groups(batch)
        return batch_advantages(
            rewards, batch.scores, batch.weights, batch.group.cpu(), self.combine,
            mean=self.mean, baseline=self.baseline, std=self.std, eps=self.adv_eps, unbiased=self.unbiased,
            std_floor=self.adv_floor, clip=self.adv_clip,
        )  # fmt: skip
