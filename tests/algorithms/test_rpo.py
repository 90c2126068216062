"""RPO: labels that are drawn, the reference side that is imitated whatever they say."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flowrl.algorithms.matching import noised
from flowrl.algorithms.rpo import RPO
from tests.algorithms.test_preference import moved
from tests.algorithms.toy import ToyPolicy, collect, gradient, live


def of_gap(gap, count=2000, **settings):
    """Credit of the better rows of `count` draws of one pair whose rewards differ by `gap`."""
    algorithm = RPO(num_steps=5, draws_per_sample=count, **settings)
    batch = collect(
        algorithm, ToyPolicy(), num_prompts=1, k=2, reward=lambda x: torch.tensor([0.3, 0.3 + gap]).double()
    )
    credit = batch.advantages
    assert torch.equal(credit[::2], -credit[1::2]) and set(credit.tolist()) <= {1.0, -1.0}
    return credit[::2]


@pytest.mark.parametrize(("gap", "gain"), [(0.1, 1.0), (0.1, 10.0), (1.5, 1.0)])
def test_labels_are_bernoulli_with_the_sigmoid_of_the_gap(gap, gain):
    chosen = of_gap(gap, label_gain=gain) > 0
    p = 1 / (1 + math.exp(-gap * gain))
    assert chosen.double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(chosen)))


def test_a_clear_gap_is_never_mistaken():
    assert (of_gap(0.5, label_gain=1e4) == 1).all()


def test_labels_are_a_function_of_the_seed():
    algorithm = RPO(num_steps=5, pairing="all", draws_per_sample=4)
    batch = collect(algorithm, ToyPolicy())
    assert torch.equal(batch.advantages, algorithm.credit(batch))
    assert not torch.equal(batch.advantages, algorithm.credit(replace(batch, seed=1)))
    assert not torch.equal(batch.advantages, algorithm.credit(replace(batch, iteration=1)))


def test_loss_and_gradient_by_hand():
    """mean(m_ref) - mean[y log sigmoid(D) + (1 - y) log sigmoid(-D)], D = (q_ref - m_ref) - (q_gen - m_gen)."""
    algorithm, policy = RPO(num_steps=5, pairing="all", draws_per_sample=2), moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    at = noised(batch)
    m = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean(1)
    with torch.no_grad(), policy.reference():
        q = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean(1)
    rewards = batch.rewards[batch.draws.sample]
    assert (rewards[::2] > rewards[1::2]).all(), "the better of two stands where the reference stands"
    delta = (q - m)[::2] - (q - m)[1::2]
    y = (batch.advantages[::2] > 0).float()
    assert 0 < y.mean() < 1, "labels of both kinds"
    expected = m[::2].mean() - (y * F.logsigmoid(delta) + (1 - y) * F.logsigmoid(-delta)).mean()
    loss, found = gradient(algorithm, policy, batch)
    torch.testing.assert_close(loss.value, expected)
    grads = torch.autograd.grad(expected, (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)
