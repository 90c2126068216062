"""What direct gradients share: a differentiable reward is ascended through decoder and network, without log-probs.

A method is a `DirectGradient` with a loss. The rollout only brings the states that its gradient starts from: nothing of
it is stored, and no reward sees it. A row is one evaluation of the network with its graph, so that
`optimizer.micro_batch` counts what takes the memory.

Symbols: N judged pictures, K trained evaluations for one of them, *L latent dimensions.
"""

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.deterministic import Deterministic
from flowrl.algorithms.matching import mean_square
from flowrl.types import Batch, Cond, Loss, Needs, Policy

Margin = Annotated[
    float | None,
    Field(description="A picture whose reward reaches it is good enough: loss ReLU(margin - r); null: loss -r."),
]


class DirectGradient(Deterministic):
    """What the family shares: no reward of the rollout is asked for, and leaving the base model can cost something."""

    kl_coef: Annotated[
        float,
        Field(description="Weight of mean (v - v_ref)^2, v_ref of the initial weights; 0 saves their forward.", ge=0),
    ] = 0.0

    @property
    def needs(self) -> Needs:
        """Rewards with a gradient, in the loss; none of the rollout's samples."""
        return Needs(logprobs=False, rewards=False, gradient=True, reference=self.kl_coef > 0)

    def credit(self, batch: Batch) -> Tensor:
        """0 for each row [N]: the reward comes with the loss, and recorded ones are not trained on."""
        return torch.zeros(len(batch.rows), device=batch.trajectory.x0.device)

    @abstractmethod
    def shortfall(self, reward: Tensor) -> Tensor:
        """What is to fall, [N], for rewards [N] with a graph: NaN stays NaN."""

    def distance(self, policy: Policy, v: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Mean (v - v_ref)^2 [N] at states x [N,*L] without a graph and times t [N], v [N,*L] the policy's there.

        0 if kl_coef is, but with a graph, so that a batch without any verdict has a gradient, of 0.
        """
        if not self.kl_coef:
            return 0 * v.flatten(1).sum(1)
        with torch.no_grad(), policy.reference():
            reference = policy.velocity(x, t, cond).float()
        return mean_square(v - reference)

    def total(self, reward: Tensor, kl: Tensor) -> Loss:
        """The loss of rewards [N] with their graph and distances [M], and what is told of both."""
        seen = reward.detach()
        metrics = {"reward/mean": seen.nanmean(), "no_verdict": seen.isnan().float().mean()}
        if self.kl_coef:
            metrics["kl"] = kl.detach().mean()
        return Loss(mean_of_judged(self.shortfall(reward)) + (self.kl_coef or 1.0) * kl.mean(), metrics)


def below(margin: float | None, reward: Tensor) -> Tensor:
    """What rewards [N] lack to the margin, at least 0; -r where there is none. NaN stays NaN."""
    return -reward if margin is None else torch.relu(margin - reward)


def mean_of_judged(value: Tensor) -> Tensor:
    """Mean over all N values, of which those without a verdict (NaN) add nothing, neither value nor gradient.

    Divided by N, not by the number of verdicts: then micro-batches add up to the whole batch however they are cut.
    """
    return torch.where(value.isnan(), torch.zeros_like(value), value).mean()
