"""KL forms against torch.distributions, and how they relate."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowrl.algorithms.kl import Step, step_kl
from samplers import cps, dance_sde, ddim, diffusion, flow_sde, linear_times


def steps(kernel, num=6):
    generator = torch.Generator().manual_seed(0)
    x, v, v_ref = torch.randn(3, num, 3, 2, 4, generator=generator, dtype=torch.float64)
    times = linear_times(num + 1).double()
    t, t_next = times[:num], times[1 : num + 1]
    current, reference = (Step(u, kernel(x, u, t, t_next, 0.5)) for u in (v, v_ref))
    return current, reference, t, t_next


@pytest.mark.parametrize("kernel", [flow_sde, dance_sde, cps, ddim])
def test_exact_is_the_kl_of_two_normals_per_dimension(kernel):
    current, reference, t, t_next = steps(kernel)
    (p, std), (q, _) = current.transition, reference.transition
    expected = kl_divergence(Normal(p, std.expand_as(p)), Normal(q, std.expand_as(q))).flatten(1).mean(1)
    torch.testing.assert_close(step_kl(current, reference, t - t_next, "exact"), expected)


@pytest.mark.parametrize("kernel", [flow_sde, dance_sde, cps, ddim])
def test_flow_grpo_divides_by_g_and_is_exact_times_h(kernel):
    current, reference, t, t_next = steps(kernel)
    g = diffusion(current.transition, t, t_next)
    by_hand = ((current.transition.mean - reference.transition.mean) ** 2 / (2 * g**2)).flatten(1).mean(1)
    found = step_kl(current, reference, t - t_next, "flow_grpo")
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found / step_kl(current, reference, t - t_next, "exact"), t - t_next)


def test_plain_distances():
    current, reference, t, t_next = steps(flow_sde)
    for form, a, b in (
        ("velocity_mse", current.velocity, reference.velocity),
        ("latent_mse", current.transition.mean, reference.transition.mean),
    ):
        expected = torch.stack([torch.nn.functional.mse_loss(i, j) for i, j in zip(a, b, strict=True)])
        torch.testing.assert_close(step_kl(current, reference, t - t_next, form), expected)


def test_unknown_form_is_named():
    current, reference, t, t_next = steps(flow_sde)
    with pytest.raises(ValueError, match="k3.*velocity_mse"):
        step_kl(current, reference, t - t_next, "k3")
