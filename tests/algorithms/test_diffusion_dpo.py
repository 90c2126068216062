"""Diffusion-DPO: its loss in errors of the noise, and against models that predict it."""

import torch

from flowrl.algorithms.diffusion_dpo import DiffusionDPO
from flowrl.algorithms.matching import mean_square, noised
from tests.algorithms.test_preference import brute, moved
from tests.algorithms.toy import collect, gradient, live


def test_the_loss_is_that_of_the_paper_in_errors_of_the_noise():
    algorithm, policy = DiffusionDPO(num_steps=5, pairing="all", draws_per_sample=3, beta=40.0), moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    loss, found = gradient(algorithm, policy, batch)
    expected = brute(algorithm, policy, batch, lambda at, v: at.noise - (at.x + (1 - at.t[:, None]) * v))
    torch.testing.assert_close(loss.value, expected)
    grads = torch.autograd.grad(expected, (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-5)


def test_the_noise_is_that_of_the_variance_preserving_state():
    """x_vp = alpha x0 + sigma eps, alpha = (1 - t) s, sigma = t s, s = 1 / |(1 - t, t)|: one eps, one error of it."""
    algorithm, policy = DiffusionDPO(num_steps=5), moved()
    batch = live(collect(algorithm, policy))
    at, algebra = noised(batch), DiffusionDPO(num_steps=5, beta=1.0)
    t = at.t[:, None]
    size = ((1 - t) ** 2 + t**2).sqrt()
    alpha, sigma = (1 - t) / size, t / size
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    v = policy.velocity(at.x, at.t, at.cond)
    x_vp, x0_hat = at.x / size, at.x - t * v
    eps_hat = (x_vp - alpha * x0_hat) / sigma
    expected = mean_square(at.noise - eps_hat)
    torch.testing.assert_close(algebra.strength(at.t) * mean_square(at.target - v), expected, rtol=1e-3, atol=1e-5)


def test_noisy_rows_have_no_weight():
    assert DiffusionDPO().strength(torch.tensor([1.0, 0.0])).tolist() == [0.0, 5000.0]
    assert DiffusionDPO().time_sampling == "uniform"
