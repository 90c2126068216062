"""How far the current step is from the reference's, per edge: four published forms. Shapes: mean, v [E,*L]; h [E].

    exact         mean_d (mu - mu_ref)^2 / (2 std^2)      KL of the two Gaussians, divided by the latent dims D
    flow_grpo     mean_d (mu - mu_ref)^2 / (2 g^2)        std = g sqrt(h), so it is `exact` times h
    velocity_mse  mean_d (v - v_ref)^2
    latent_mse    mean_d (mu - mu_ref)^2

Note: flow_grpo is what that paper's code computes for SD3 and FLUX (the paper has the h). With the cps kernel the same
code divides by the full std; that is `exact` here.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from samplers import Transition, gaussian_kl

KLForm = Literal["flow_grpo", "exact", "velocity_mse", "latent_mse"]


class Step(NamedTuple):
    """What a policy would do at the stored edges: velocity [E,*L] and the Gaussian of the next state."""

    velocity: Tensor
    transition: Transition


def step_kl(current: Step, reference: Step, h: Tensor, form: KLForm) -> Tensor:
    """Distance [E] of two steps of length h = t - t_next [E]."""
    if form == "exact":
        return gaussian_kl(current.transition, reference.transition)
    if form == "flow_grpo":
        return gaussian_kl(current.transition, reference.transition) * h
    if form == "velocity_mse":
        return _mse(current.velocity, reference.velocity)
    if form == "latent_mse":
        return _mse(current.transition.mean, reference.transition.mean)
    raise ValueError(f"unknown KL form {form!r}; choose flow_grpo, exact, velocity_mse or latent_mse.")


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
