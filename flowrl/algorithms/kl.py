"""How far the current policy is from the reference, per edge: forms for steps, and forms for tokens.

Steps, whose Gaussians are known. Shapes: mean, v [E,*L]; h [E].

    exact         mean_d (mu - mu_ref)^2 / (2 std^2)      KL of the two Gaussians, divided by the latent dims D
    flow_grpo     mean_d (mu - mu_ref)^2 / (2 g^2)        std = g sqrt(h), so it is `exact` times h
    velocity_mse  mean_d (v - v_ref)^2
    latent_mse    mean_d (mu - mu_ref)^2

Note: flow_grpo is what that paper's code computes for SD3 and FLUX (the paper has the h). With the cps kernel the same
code divides by the full std; that is `exact` here.

Tokens, of which only the log-probs of the chosen ones are known: estimates of KL(pi || ref) from a token that pi drew
(http://joschu.net/blog/kl-approx.html), with d = log ref - log pi.

    k1      -d                 unbiased, may be negative; its gradient has the expectation 0
    k2      d^2 / 2            biased; its gradient is, in expectation, that of the KL
    k3      exp(d) - 1 - d     unbiased, not negative; its gradient is that of the KL the other way round
    k1+     value of k1, gradient of k2
    k3+     value of k3, gradient of k2
"""

from typing import Literal, NamedTuple

from torch import Tensor

from flowrl.algorithms.objectives import MAX_LOG_RATIO
from samplers import Transition, gaussian_kl

KLForm = Literal["flow_grpo", "exact", "velocity_mse", "latent_mse"]
TokenKLForm = Literal["k1", "k2", "k3", "k1+", "k3+"]

# One token that the reference finds impossible must not be all of the penalty.
_MAX_KL = 10.0


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


def token_kl(logprob: Tensor, reference: Tensor, form: TokenKLForm, ratio: Tensor | None = None) -> Tensor:
    """Distance of log-probs from those of the reference, each of the chosen tokens and of one shape; its gradient too.

    With `ratio` = pi / mu, with its gradient, it is unbiased although another policy mu drew the token (DeepSeek-V3.2's
    correction, as in TRL). d is cut to [-20, 20] and k3 to at most 10. ValueError for an unknown form.
    """
    reference = reference.detach()
    value = estimate(logprob, reference, form.removesuffix("+"))
    if form.endswith("+"):
        slope = estimate(logprob, reference, "k2")
        value = slope - slope.detach() + value.detach()
    return value if ratio is None else value * ratio


def adapted_kl_coef(coef: float, kl: float, target: float, tokens: int, horizon: int) -> float:
    """The coefficient after an iteration whose KL was `kl` (arXiv:1909.08593): it rises where that is above `target`.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon), with n the number of what was counted in the iteration.
    """
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * tokens / horizon)


def estimate(logprob: Tensor, reference: Tensor, form: str) -> Tensor:
    """k1, k2 or k3 of tokens, with the gradients of both; see `token_kl`."""
    difference = (reference - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if form == "k1":
        return -difference
    if form == "k2":
        return 0.5 * difference.square()
    if form == "k3":
        return (difference.expm1() - difference).clamp(max=_MAX_KL)
    raise ValueError(f"unknown KL form {form!r}; choose k1, k2, k3, k1+ or k3+.")


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
