"""On-policy distillation (DiffusionOPD, arXiv:2605.15055): teachers correct the student's own steps.

| symbol | here |
|---|---|
| x_k, t_k, the student's own trajectory | the stored stochastic steps |
| mu_theta, mu_T: where a step of student or teacher leads from x_k | mean of the kernel's step |
| teachers, one a domain | teachers: exported weights by the prompts' `domain_key` |
| guidance of a teacher | teacher_guidance; above the student's it is distilled into the student |
| w_k | std of the step (kl: true), or 1 |
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.kl import Step, step_kl
from flowrl.algorithms.policy_gradient import current_step
from flowrl.algorithms.schedule import all_or_window, check_window, training_times
from flowrl.types import Batch, Hyperparameters, Loss, Needs, Policy, Prompt
from samplers import Kernel, Plan, Transition, gaussian_logprob

DEFAULT = "default"
"""The domain of prompts that name none."""
_LEAST_ETA = 1e-3
"""The variance falls with eta^2: below this the rounding of two means, squared, shows in their distance."""


class OPD(Hyperparameters):
    """DiffusionOPD (arXiv:2605.15055): mean (mu - mu_T)^2 / (2 w^2) on the student's own trajectory, no reward needed.

    Rewards are only watched. One optimiser step a rollout is the published use.
    Note: the ODE form of the paper trains on deterministic steps too; here the stored, stochastic ones are trained on.
    Note: a batch may mix domains, where the paper's holds one: each prompt has its own teacher.
    """

    num_steps: fields.NumSteps = 10
    shift: fields.Shift = None
    sde: fields.SDE = "flow_sde"
    eta: fields.Eta = 0.7
    window: fields.Window = None
    window_range: fields.WindowRange = None
    teachers: Annotated[
        dict[str, str | None],
        Field(
            description="By domain a run or exported weights; null: the initial weights, with teacher_guidance.",
            min_length=1,
        ),
    ] = {DEFAULT: None}
    teacher_guidance: Annotated[
        float | dict[str, float],
        Field(
            description="Guidance of the teachers, one number or one by domain; 1 for weights trained without guidance."
        ),
    ] = 4.5
    domain_key: Annotated[
        str, Field(description="Metadata of a prompt that names its domain; prompts without one take `default`.")
    ] = "domain"
    kl: Annotated[bool, Field(description="Divide by the step's variance (the KL of the two steps), or not.")] = True

    @model_validator(mode="after")
    def _possible(self) -> Self:
        fields.check_eta(self.sde, self.eta)
        check_window(self.num_steps, self.window, self.window_range)
        if self.kl and self.eta < _LEAST_ETA:
            raise ValueError(
                f"eta={self.eta:g} with kl: true divides by a variance so small that rounding decides the loss; "
                f"set kl: false, or eta to {_LEAST_ETA:g} or more (0.7 is usual)."
            )
        guidance = self.teacher_guidance
        if isinstance(guidance, dict) and set(guidance) != set(self.teachers):
            raise ValueError(
                f"teacher_guidance is for {', '.join(guidance) or 'nobody'}, the teachers for "
                f"{', '.join(self.teachers)}; give one number for all, or one for each of these."
            )
        low = [name for name in self.teachers if not 1 <= self._guidance(name) < math.inf]
        if low:
            raise ValueError(f"teacher_guidance of {', '.join(low)} must be at least 1 (1 = no guidance) and finite.")
        return self

    def _guidance(self, domain: str) -> float:
        return self.teacher_guidance[domain] if isinstance(self.teacher_guidance, dict) else self.teacher_guidance

    @property
    def needs(self) -> Needs:
        """The teachers, and the empty prompt's conditions where one of them is guided."""
        return Needs(
            teachers=tuple(dict.fromkeys(self.teachers.values())),
            guidance=max(self._guidance(domain) for domain in self.teachers),
        )

    @property
    def kernel(self) -> Kernel:
        """The step named by `sde`."""
        return fields.resolve_kernel(self.sde)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """All steps but the last, or a random window."""
        grid = training_times(times, self.num_steps, self.shift)
        return all_or_window(grid, iteration, self.window, self.window_range, seed)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that have no teacher (ValueError), before a run starts."""
        self._domains(prompts)

    def credit(self, batch: Batch) -> Tensor:
        """0 for each edge [E]: no reward is trained on, and samples without a verdict are trained on too."""
        return torch.zeros(len(batch.trajectory), device=batch.trajectory.x.device)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Distance of the student's steps from those of each prompt's teacher, mean over the edges.

        distill_kl and distill_mse are mean_d (mu - mu_T)^2 / (2 std^2) and mean_d (v - v_T)^2 whatever `kl` is;
        ratio_max_dev is how far the student is from the policy that drew the samples, and 0 at first.
        """
        student = current_step(policy, batch, self.kernel)
        teacher = self._teach(policy, replace(batch, velocity=None), student)
        distance = step_kl(student, teacher, batch.trajectory.t, "exact" if self.kl else "latent_mse")
        loss = distance.mean() if self.kl else distance.mean() / 2
        return Loss(loss, self._watch(batch, student, teacher) | {"policy_loss": loss.detach()})

    @torch.no_grad()
    def _watch(self, batch: Batch, student: Step, teacher: Step) -> dict[str, Tensor]:
        edges = batch.trajectory
        log_ratio = gaussian_logprob(edges.x_next, student.transition) - edges.logprob
        return {
            "distill_kl": step_kl(student, teacher, edges.t, "exact").mean(),
            "distill_mse": step_kl(student, teacher, edges.t, "velocity_mse").mean(),
            "ratio_max_dev": log_ratio.expm1().abs().max(),
        }

    @torch.no_grad()
    def _teach(self, policy: Policy, batch: Batch, student: Step) -> Step:
        """What each edge's teacher would do there; the std is the student's, since it does not depend on weights."""
        edges = batch.trajectory
        velocity, mean = torch.empty_like(student.velocity), torch.empty_like(student.transition.mean)
        domains = self._domains(batch.prompts)
        for domain in dict.fromkeys(domains):
            mine = torch.tensor([d == domain for d in domains], device=edges.prompt.device)[edges.prompt]
            if mine.any():
                with policy.teacher(self.teachers[domain], self._guidance(domain)):
                    step = current_step(policy, replace(batch, trajectory=edges.select(mine)), self.kernel)
                velocity[mine], mean[mine] = step.velocity, step.transition.mean
        return Step(velocity, Transition(mean, student.transition.std))

    def _domains(self, prompts: Sequence[Prompt]) -> list[str]:
        """The domain of each prompt; ValueError if one has no teacher."""
        named = [prompt.metadata.get(self.domain_key) for prompt in prompts]
        domains = [DEFAULT if name is None else str(name) for name in named]
        for prompt, name, domain in zip(prompts, named, domains, strict=True):
            if domain not in self.teachers:
                kind = f"without a {self.domain_key!r}" if name is None else f"with {self.domain_key!r}: {name!r}"
                raise ValueError(
                    f"the prompt {prompt.text!r}, {kind} in its metadata, has no teacher; there are teachers for "
                    f"{', '.join(self.teachers)}. Add algorithm.teachers.{domain}, or change the metadata."
                )
        return domains
