"""KL forms against torch.distributions, and how they relate."""

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from flowrl.algorithms.kl import Step, adapted_kl_coef, estimate, step_kl, token_kl
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


# ------------------------------------------------------------------------------------------------------------ tokens


def two_policies(num=6, words=5):
    generator = torch.Generator().manual_seed(0)
    logits, other = 0.5 * torch.randn(2, num, words, generator=generator, dtype=torch.float64)
    return Categorical(logits=logits.requires_grad_()), Categorical(logits=other), logits


def expectation(policy, reference, form):
    """Sum over all words of probability times estimate, the probability cut from the graph: the mean of a step."""
    words = torch.arange(policy.probs.shape[1])[:, None].expand(-1, policy.probs.shape[0])
    each = token_kl(policy.log_prob(words), reference.log_prob(words), form)
    return (policy.probs.detach().T * each).sum(0)


@pytest.mark.parametrize("form", ["k1", "k3", "k1+", "k3+"])
def test_estimates_are_unbiased(form):
    policy, reference, _ = two_policies()
    torch.testing.assert_close(expectation(policy, reference, form), kl_divergence(policy, reference))


@pytest.mark.parametrize("form", ["k1", "k2", "k3", "k1+", "k3+"])
def test_their_gradients_are_those_of_which_kl(form):
    """k2 and the forms with +: of KL(pi || ref). k1: none. k3: of KL(ref || pi)."""
    policy, reference, logits = two_policies()
    (found,) = torch.autograd.grad(expectation(policy, reference, form).sum(), logits, retain_graph=True)
    forward, backward = (
        torch.autograd.grad(kl_divergence(*pair).sum(), logits, retain_graph=True)[0]
        for pair in ((policy, reference), (reference, policy))
    )
    expected = {"k1": torch.zeros_like(forward), "k3": backward}.get(form, forward)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_plus_is_another_gradient_for_the_same_value():
    logprob, reference = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprob.requires_grad_()
    for form in ("k1", "k3"):
        torch.testing.assert_close(token_kl(logprob, reference, form + "+"), token_kl(logprob, reference, form))
        slopes = [torch.autograd.grad(token_kl(logprob, reference, f).sum(), logprob)[0] for f in (form + "+", "k2")]
        assert torch.equal(*slopes)


def test_the_ratio_corrects_for_who_drew():
    """E_mu [pi / mu k3] = KL(pi || ref), and so its gradient."""
    policy, reference, logits = two_policies()
    other = Categorical(logits=torch.zeros(6, 5, dtype=torch.float64))
    words = torch.arange(5)[:, None].expand(-1, 6)
    ratio = (policy.log_prob(words) - other.log_prob(words)).exp()
    each = token_kl(policy.log_prob(words), reference.log_prob(words), "k3", ratio)
    mean = (other.probs.T * each).sum(0)
    torch.testing.assert_close(mean, kl_divergence(policy, reference))
    found, expected = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
                       for x in (mean, kl_divergence(policy, reference)))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_wild_tokens_stay_bounded():
    logprob = torch.tensor([-1e4, -50.0, 0.0], requires_grad=True)
    for form in ("k1", "k2", "k3", "k3+"):
        kl = token_kl(logprob, torch.tensor([0.0, 0.0, -60.0]), form)
        (slope,) = torch.autograd.grad(kl.sum(), logprob)
        assert kl.isfinite().all() and slope.isfinite().all() and kl.abs().max() <= 200
    assert token_kl(logprob, torch.zeros(3), "k3").max() == 10


def test_an_unknown_token_form_is_named():
    with pytest.raises(ValueError, match="'k4'; choose k1, k2, k3"):
        token_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_the_reference_of_an_estimate_learns_where_it_may():
    a, b = torch.tensor([0.3], requires_grad=True), torch.tensor([-0.2], requires_grad=True)
    estimate(a, b, "k3").sum().backward()
    assert float(a.grad) == pytest.approx(-float(b.grad)) and b.grad != 0


@pytest.mark.parametrize(("kl", "factor"), [(0.1, 1.0), (0.11, 1.01), (0.5, 1.02), (0.0, 0.98)])
def test_the_coefficient_follows_its_target(kl, factor):
    assert adapted_kl_coef(0.2, kl, target=0.1, tokens=1000, horizon=10_000) == pytest.approx(0.2 * factor)
