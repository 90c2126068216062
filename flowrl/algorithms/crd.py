"""CRD, centred reward distillation (arXiv:2603.14128): the policy's implicit rewards are fitted to the real ones.

| symbol | here |
|---|---|
| r_i, implicit reward of a sample | minus the rise of its self-normalised error, `scaled_square`, over that of v_old |
| a_i = clip(A_i) / (2 A_max) + 1/2 | score in [0, 1]; A_max = adv_clip |
| centring, which cancels a prompt's normaliser | `centre`, among the samples of a prompt at one time and noise |
| tau; uniform, soft and hard centring | temperature: null, a positive number, 0 |
| beta | beta |
| KL weight m + a (1 - m), in units of kl_coef | kl_floor + a (kl_coef - kl_floor) |
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from flowrl.algorithms.forward_process import Decay, DrawsPerSample, ForwardProcess, ShareDraws
from flowrl.algorithms.matching import noised, scaled_square, unit_sum, velocities
from flowrl.types import Batch, Loss, Needs, Policy


class CRD(ForwardProcess):
    """CRD (arXiv:2603.14128): A_max / beta mean (beta r_c - a_c)^2, r_c and a_c centred within the prompt.

    At first r = 0, and the gradient is that of advantage-weighted matching; it ends where beta r has reached a.
    Note: the public code centres over a whole micro-batch of several prompts, and times; here a prompt's samples share
    time and noise, and are centred among themselves.
    Note: public hard centring tests a sign that scores in [0, 1] never have; here temperature 0 is the limit of small
    ones: a sample is compared with the best, and with the worst.
    Note: the public code follows with two policies; here one gives v_old, and the trained one draws the samples
    (`on_policy`), as there in the first 75 iterations.
    Note: 20 times of a grid of 10, as published, are each taken twice; here each is taken once.
    Note: the cross-entropy's factor 8 A_max / beta is ours: both fits start with the same gradient.
    """

    beta: Annotated[float, Field(description="Scale of the implicit reward; large: small moves.", gt=0)] = 1.0
    fit: Annotated[
        Literal["square", "cross_entropy"],
        Field(description="How beta r_c meets a_c: squared difference, or cross-entropy of their sigmoids."),
    ] = "square"
    temperature: Annotated[
        float | None,
        Field(
            description="null: centred by the prompt's mean. Else by means with weights exp(a / tau) and "
            "exp(-a / tau), averaging the two losses; 0: by the best and the worst.",
            ge=0,
        ),
    ] = None
    on_policy: Annotated[bool, Field(description="The trained policy draws the samples, not the old one.")] = True
    draws_per_sample: DrawsPerSample = 10
    share_draws: ShareDraws = True
    kl_coef: Annotated[
        float, Field(description="Weight of mean (v - v_ref)^2 at the best sample, v_ref of the initial weights.", ge=0)
    ] = 0.1
    kl_floor: Annotated[float, Field(description="The same at the worst sample.", ge=0)] = 1e-4
    kl_guidance: Annotated[
        float, Field(description="Guidance of v_ref; above 1: two calls, and it is distilled into the policy.", ge=1)
    ] = 4.5
    decay: Decay = ((0, 0.25), (149.8, 0.999))

    @model_validator(mode="after")
    def _floor_is_below(self) -> Self:
        if self.kl_floor > self.kl_coef > 0:
            raise ValueError(
                f"kl_floor={self.kl_floor:g} is above kl_coef={self.kl_coef:g}: the weight rises from the worst sample "
                "(kl_floor) to the best (kl_coef); lower kl_floor."
            )
        return self

    @property
    def needs(self) -> Needs:
        """No log-probs; the old policy, and the initial weights, with a guidance of their own, for a distance."""
        far = self.kl_coef > 0
        teachers, guidance = ((None,), self.kl_guidance) if far else ((), 1.0)
        return super().needs._replace(on_policy=self.on_policy, reference=False, teachers=teachers, guidance=guidance)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The fit of the rows within their units, and the weighted distance."""
        assert batch.advantages is not None and batch.draws is not None
        at = noised(batch)
        v = velocities(policy, at, old=True)
        assert v.old is not None
        implicit = scaled_square(v.old - at.target) - scaled_square(v.current - at.target)
        if self.needs.teachers:
            with torch.no_grad(), policy.teacher(None, self.kl_guidance):
                v = v._replace(reference=policy.velocity(at.x, at.t, at.cond).float())
        score = (batch.advantages / (2 * self.adv_clip) + 0.5).clamp(0, 1)
        unit = batch.draws.unit
        parts = [self._fit(implicit, score, weight, unit) for weight in centres(score, unit, self.temperature)]
        loss = torch.stack(parts).mean(0)
        found = self.total(loss, v, batch, self.kl_floor + score * (self.kl_coef - self.kl_floor))
        return Loss(found.value, found.metrics | {"implicit_reward_abs": implicit.detach().abs().mean()})

    def _fit(self, implicit: Tensor, score: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
        """Loss [N] of implicit rewards and scores, both centred by the weighted mean of their unit."""
        # Cut from the graph, as in the public code; for the plain mean that changes nothing (the residuals sum to 0).
        found = self.beta * (implicit - unit_sum(weight * implicit.detach(), unit))
        wanted = score - unit_sum(weight * score, unit)
        if self.fit == "square":
            return self.adv_clip / self.beta * (found - wanted).square()
        goal = wanted.sigmoid()
        return 8 * self.adv_clip / self.beta * binary_cross_entropy_with_logits(found, goal, reduction="none")


def centres(score: Tensor, unit: Tensor, temperature: float | None) -> list[Tensor]:
    """Weights [N] of the means that samples are compared with, each summing to 1 in a unit: one, or best and worst."""
    if temperature is None:
        return [torch.reciprocal(unit_sum(torch.ones_like(score), unit))]
    return [_softmax(score, unit, temperature), _softmax(-score, unit, temperature)]


def _softmax(value: Tensor, unit: Tensor, temperature: float) -> Tensor:
    """exp(value / temperature) over its sum within each unit [N]; at 0 the largest values share the weight."""
    names, of_row = torch.unique(unit, return_inverse=True)
    best = value.new_full((len(names),), -torch.inf).scatter_reduce(0, of_row, value, "amax")
    below = value - best[of_row]
    weight = (below / temperature).exp() if temperature > 0 else (below == 0).to(value)
    return weight / unit_sum(weight, unit)
