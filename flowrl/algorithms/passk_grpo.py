"""Pass@k training (arXiv:2508.10751, arXiv:2503.19595): the reward is that one of k answers is right.

| symbol | here |
|---|---|
| k | k |
| N_rollout | data.samples_per_prompt |
| A_pos, A_neg, in closed form over all sets of k | credit; k: null takes the best answer alone |
"""

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, best_only, pass_at_k
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.algorithms.token_policy_gradient import AnswerCredit
from flowrl.types import TokenBatch


class PassKGRPO(AnswerCredit):
    """Pass@k training (arXiv:2508.10751): answers are worth what they add to a set of k, which keeps them different.

    Without k, only the best answer of a group has an advantage, its lead over the second (arXiv:2503.19595).
    """

    clip_range: fields.ClipRange = (0.2, 0.28)
    aggregate: fields.Aggregate = "token_mean"
    k: Annotated[
        int | None,
        Field(description="Answers of which one must be right; null: the best of the group alone.", ge=1),
    ] = 4
    right: Annotated[float, Field(description="Rewards from which an answer is right; only with k.")] = 0.5
    adv_eps: fields.AdvEps = 1e-6
    unbiased: fields.Unbiased = True

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.k is not None and not (self.adv_eps == 1e-6 and self.unbiased):
            raise ValueError("adv_eps and unbiased belong to k=null, whose std is one of rewards; leave them out.")
        return self

    @property
    def fewest_samples(self) -> int:
        """One more than k: with k answers there is but one set of them."""
        return (self.k or 1) + 1

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """Of each answer over all sets of k of its group, or of the best one."""
        group = batch.group.cpu()
        largest = int(torch.unique(group, return_counts=True)[1].max())
        if largest <= (self.k or 1):
            raise AlgorithmError(
                f"samples_per_prompt={largest} leaves no choice of k={self.k} answers among them, so that none adds "
                "anything to the others; raise data.samples_per_prompt (2 k or more), or lower algorithm.k."
            )
        if self.k is None:
            return best_only(rewards, group, eps=self.adv_eps, unbiased=self.unbiased)
        return pass_at_k(rewards, group, self.k, self.right)
