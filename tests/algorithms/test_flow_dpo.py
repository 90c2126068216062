"""Flow-DPO: the two forms of beta_t."""

import pytest
import torch

from flowrl.algorithms.diffusion_dpo import DiffusionDPO
from flowrl.algorithms.flow_dpo import FlowDPO
from tests.algorithms.test_preference import brute, moved
from tests.algorithms.toy import collect, gradient, live

T = torch.tensor([0.0, 0.25, 0.5, 1.0])


def test_beta_is_constant_or_falls_with_the_noise():
    assert FlowDPO(beta=8.0).strength(T).tolist() == [8, 8, 8, 8]
    assert FlowDPO(beta=8.0, beta_schedule="one_minus_t_sq").strength(T).tolist() == [8, 4.5, 2, 0]


def test_the_falling_beta_is_the_loss_on_errors_of_the_noise():
    """eps_hat = x + (1 - t) v: Diffusion-DPO written out in eps is Flow-DPO with beta (1 - t)^2, value and gradient."""
    algorithm = FlowDPO(num_steps=5, pairing="all", draws_per_sample=2, beta=6.0, beta_schedule="one_minus_t_sq")
    policy = moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    loss, found = gradient(algorithm, policy, batch)
    expected = brute(algorithm, policy, batch, lambda at, v: at.noise - (at.x + (1 - at.t[:, None]) * v))
    torch.testing.assert_close(loss.value, expected)
    grads = torch.autograd.grad(expected, (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)
    same = DiffusionDPO(num_steps=5, pairing="all", draws_per_sample=2, beta=6.0, time_sampling="logit_normal")
    torch.testing.assert_close(same.loss(policy, batch).value, loss.value, rtol=0, atol=0)


def test_a_stronger_beta_holds_the_policy_closer():
    """The pull of a pair that is already told apart falls with its logit, which grows with beta."""
    policy, pulls = moved(0.02), {}
    batch = live(collect(FlowDPO(num_steps=5), policy))
    with torch.no_grad():  # make every pair agree with the policy
        logit = FlowDPO(num_steps=5, beta=1.0).compare(policy, batch).logit
        batch.advantages = batch.advantages * logit.sign()
    for beta in (1.0, 1e3, 1e5):
        pulls[beta] = gradient(FlowDPO(num_steps=5, beta=beta), policy, batch)[1].norm() / beta
    assert pulls[1.0] > pulls[1e3] > pulls[1e5]


def test_the_defaults_are_those_of_the_published_recipe():
    algorithm = FlowDPO()
    assert (algorithm.beta, algorithm.beta_schedule, algorithm.time_sampling) == (100.0, "constant", "logit_normal")
    assert (algorithm.pairing, algorithm.draws_per_sample, algorithm.refresh_every) == ("best_worst", 1, None)
    with pytest.raises(ValueError, match="one_minus_t_sq"):
        FlowDPO(beta_schedule="cosine")
