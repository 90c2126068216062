"""ReDA: the W1 distance of a batch's rewards against brute force, its gradient, and where it stops."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.reda import ReDA, quantiles
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, train
from tests.algorithms.toy_critic import critic, near_one_if_right


def test_the_loss_is_the_cheapest_matching():
    """W1 of two sets of equal size is the smallest mean distance over all ways to pair them."""
    reference = (0.1, 0.35, 0.4, 0.9)
    reward = torch.tensor([0.5, -0.2, 0.8, 0.41], dtype=torch.float64)
    partners = quantiles(reference, 4)
    cheapest = min((reward - partners[list(order)]).abs().mean() for order in itertools.permutations(range(4)))
    assert float(ReDA(reference=reference).shortfall(reward).mean()) == pytest.approx(float(cheapest), rel=1e-12)


def test_partners_are_quantiles():
    reference = torch.rand(11, generator=torch.Generator().manual_seed(0)).double().sort().values
    expected = torch.quantile(reference, (torch.arange(32).double() + 0.5) / 32)
    torch.testing.assert_close(quantiles(tuple(reference.tolist()), 32), expected)
    assert quantiles((0.7,), 3).tolist() == [0.7] * 3 and len(quantiles((0.7, 0.8), 0)) == 0


def test_the_gradient_pulls_from_both_sides():
    """Its sign is that of reward - partner, and nothing is asked of a batch that has the distribution."""
    reward = torch.tensor([0.9, 0.1, 0.4], requires_grad=True)
    algorithm = ReDA(reference=(0.3, 0.3, 0.3))
    (pull,) = torch.autograd.grad(algorithm.shortfall(reward).sum(), reward)
    assert pull.tolist() == [1.0, -1.0, 1.0]
    same = quantiles((0.0, 0.5, 1.0), 5).requires_grad_()
    (pull,) = torch.autograd.grad(ReDA(reference=(0.0, 0.5, 1.0)).shortfall(same).sum(), same)
    assert (pull == 0).all()


def test_who_has_no_verdict_takes_nobody_s_place():
    reward = torch.tensor([0.9, torch.nan, 0.1, 0.4])
    found = ReDA(reference=(0.0, 0.5, 1.0)).shortfall(reward)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2, 3]], ReDA(reference=(0.0, 0.5, 1.0)).shortfall(reward[[0, 2, 3]]))


def test_missing_verdicts_spoil_no_gradient():
    algorithm = ReDA(num_steps=4, reference=(-0.5, 0.0))
    batch = live(collect(algorithm, ToyPolicy(), critic=critic(near_one_if_right)))
    loss, found = gradient(algorithm, ToyPolicy(), batch)
    assert loss.value.isfinite() and found.isfinite().all() and 0 < loss.metrics["no_verdict"] < 1


def test_learning_on_the_toy_stops_at_the_reference():
    """The toy's reward is -|x0 - 1|^2, at best about -0.5 on average; curated ones lie between -1.5 and -1."""
    policy, records = train(ReDA(num_steps=4, reference=(-1.5, -1.0)), 60, 0.05, k=16, critic=critic())
    best, greedy = train(ReDA(num_steps=4, reference=(0.0,)), 60, 0.05, k=16, critic=critic())
    assert greedy[-1]["reward/mean"] > -0.7 > -1.0 > records[-1]["reward/mean"] > records[0]["reward/mean"] + 0.4
    assert records[-1]["loss"] < records[0]["loss"] - 0.3 and policy.bias.sum() < best.bias.sum()


@pytest.mark.parametrize("reference", [(), (0.5, 0.1), (0.0, float("inf")), (float("nan"),)])
def test_impossible_references_are_refused(reference):
    with pytest.raises(ValidationError, match="reference"):
        ReDA(reference=reference)
