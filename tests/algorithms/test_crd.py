"""CRD: implicit rewards and centring by hand, within a prompt and a time; the fit, where it ends, and its distance."""

import math

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.crd import CRD, centres
from flowrl.algorithms.matching import unit_sum
from tests.algorithms.toy import ToyPolicy, asked, collect, gradient, live, scattered

SMALL = {"num_steps": 6, "draws_per_sample": 3, "kl_coef": 0.0}


def flat(grads):
    return torch.cat([g.flatten() for g in grads]).float()


def implicit_rewards(policy, batch):
    """r [N] with its graph: errors over their own mean size, float64."""
    at = asked(policy, batch)
    new, old = at.current - at.target, at.old - at.target
    return old.square().mean(1) / old.abs().mean(1) - new.square().mean(1) / new.detach().abs().mean(1)


def groups_of(batch):
    return [torch.nonzero(batch.draws.unit == unit).flatten() for unit in batch.draws.unit.unique()]


def weights_by_hand(a, tau):
    if tau is None:
        return [torch.full_like(a, 1 / len(a))]
    if tau == 0:
        return [(a == end).double() / (a == end).sum() for end in (a.max(), a.min())]
    return [torch.softmax(sign * a / tau, 0) for sign in (1, -1)]


@pytest.mark.parametrize("fit", ["square", "cross_entropy"])
@pytest.mark.parametrize("tau", [None, 0.0, 0.05])
def test_loss_and_gradient_by_hand(fit, tau):
    algorithm, policy = CRD(**SMALL, beta=0.7, fit=fit, temperature=tau), scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    r = implicit_rewards(policy, batch)
    terms = []
    for rows in groups_of(batch):
        a = (batch.advantages[rows].double().clamp(-5, 5) / 10 + 0.5).clamp(0, 1)
        for w in weights_by_hand(a, tau):
            found, wanted = 0.7 * (r[rows] - (w * r[rows].detach()).sum()), a - (w * a).sum()
            if fit == "square":
                terms.append(5 / 0.7 * (found - wanted) ** 2)
            else:
                p, q = wanted.sigmoid(), found.sigmoid()
                terms.append(-40 / 0.7 * (p * q.log() + (1 - p) * (1 - q).log()))
    expected = torch.cat(terms).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    by_hand = flat(torch.autograd.grad(expected, (policy.bias, policy.gain)))
    torch.testing.assert_close(grad, by_hand, rtol=2e-3, atol=1e-4)


def test_centring_is_within_the_prompt_and_the_time():
    """What happens to one prompt, or at one time, is no other's business: a constant there changes nothing at all."""
    algorithm = CRD(**SMALL)
    batch = live(collect(algorithm, ToyPolicy()))
    unit, group = batch.draws.unit, batch.draws.key[:, 0]
    for rows in groups_of(batch):
        assert len(group[rows].unique()) == len(batch.draws.t[rows].unique()) == 1
        assert len(rows) == 8
    score = torch.rand(len(unit), generator=torch.Generator().manual_seed(0)).double()
    (weight,) = centres(score, unit, None)
    centred = score - unit_sum(weight * score, unit)
    assert unit_sum(centred, unit).abs().max() < 1e-12
    shifted = score + 3.0 * (group == 1)
    torch.testing.assert_close(shifted - unit_sum(weight * shifted, unit), centred)
    assert (shifted - shifted.mean() - (score - score.mean())).abs().min() > 0.1, "which a mean over all would not do"


def test_a_prompts_reward_level_changes_nothing():
    algorithm, policy = CRD(**SMALL), scattered()
    batch = collect(algorithm, policy)
    _, expected = gradient(algorithm, policy, batch)
    batch.rewards = batch.rewards + 10.0 * (batch.trajectory.group == 2)
    batch.advantages = algorithm.credit(batch)
    _, found = gradient(algorithm, policy, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_for_the_plain_mean_it_does_not_matter_that_it_is_cut_from_the_graph():
    """The residuals of a unit sum to 0, so that a common part of the implicit rewards has no gradient."""
    algorithm, policy = CRD(**SMALL), scattered()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    r, terms = implicit_rewards(policy, batch), []
    for rows in groups_of(batch):
        a = batch.advantages[rows].double() / 10 + 0.5
        terms.append(5 * (r[rows] - r[rows].mean() - a + a.mean()) ** 2)
    expected = flat(torch.autograd.grad(torch.cat(terms).mean(), (policy.bias, policy.gain)))
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def test_the_soft_centres_lie_between_the_mean_and_the_hard_ones():
    score, unit = torch.tensor([0.1, 0.9, 0.4, 0.9, 0.2, 0.3]).double(), torch.tensor([0, 0, 0, 0, 1, 1])
    (plain,) = centres(score, unit, None)
    torch.testing.assert_close(plain, torch.tensor([0.25] * 4 + [0.5] * 2).double())
    for soft in centres(score, unit, 1e6):
        torch.testing.assert_close(soft, plain, rtol=1e-5, atol=0)
    best, worst = centres(score, unit, 0.0)
    torch.testing.assert_close(best, torch.tensor([0, 0.5, 0, 0.5, 0, 1]).double())  # equals share
    torch.testing.assert_close(worst, torch.tensor([1, 0, 0, 0, 1, 0]).double())
    for hard, soft in zip((best, worst), centres(score, unit, 1e-3), strict=True):
        torch.testing.assert_close(soft, hard, rtol=0, atol=1e-12)
    middle = centres(score, unit, 0.1)[0]
    assert unit_sum(plain * score, unit)[0] < unit_sum(middle * score, unit)[0] < unit_sum(best * score, unit)[0]


def test_hard_centring_is_neither_the_mean_nor_anything_soft():
    policy = scattered()
    batch = collect(CRD(**SMALL), policy)
    grads = [gradient(CRD(**SMALL, temperature=tau), policy, batch)[1] for tau in (None, 0.0, 0.1, 1e-5)]
    torch.testing.assert_close(grads[1], grads[3], rtol=1e-4, atol=1e-5)
    assert (grads[1] - grads[0]).abs().max() > 0.01 and (grads[1] - grads[2]).abs().max() > 0.01


@pytest.mark.parametrize(("fit", "beta"), [("square", 0.3), ("square", 3.0), ("cross_entropy", 0.3)])
def test_first_gradient_is_advantage_weighted_matching(fit, beta):
    """r = 0: 2 A_max (a - mean a) = A less its mean, times the gradient of the self-normalised error."""
    algorithm, policy = CRD(**SMALL, fit=fit, beta=beta, adv_clip=50.0), ToyPolicy()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    at = asked(policy, batch)
    e = at.current - at.target
    error = e.square().mean(1) / e.detach().abs().mean(1)
    expected = flat(torch.autograd.grad((batch.advantages * error).mean(), (policy.bias, policy.gain)))
    torch.testing.assert_close(grad, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("fit", ["square", "cross_entropy"])
def test_the_fit_ends_where_the_implicit_reward_is_the_reward(fit):
    """beta (r_i - mean r) = a_i - mean a has no gradient left, and larger implicit rewards are pulled back."""
    algorithm = CRD(**SMALL, beta=2.0, fit=fit)
    unit, score = torch.zeros(4, dtype=torch.long), torch.tensor([0.1, 0.5, 0.6, 0.9])
    (weight,) = centres(score, unit, None)
    for factor, sign in ((1.0, 0), (0.5, -1), (2.0, 1)):
        r = (factor * score / 2.0 + 7.0).requires_grad_()
        (grad,) = torch.autograd.grad(algorithm._fit(r, score, weight, unit).sum(), r)
        if sign:
            assert torch.equal(grad.sign(), sign * (score - score.mean()).sign())
        else:
            torch.testing.assert_close(grad, torch.zeros(4), rtol=0, atol=1e-5)


def test_the_distance_weighs_good_samples_more():
    given = {**SMALL, "kl_coef": 0.4, "kl_floor": 0.1, "kl_guidance": 1.0}
    policy = scattered()
    batch = collect(CRD(**given), policy)
    loss, _ = gradient(CRD(**given), policy, batch)
    bare, _ = gradient(CRD(**SMALL), policy, batch)
    at = asked(policy, batch)
    a = (batch.advantages / 10 + 0.5).clamp(0, 1)
    m = 0.1 / 0.4
    expected = (0.4 * (m + a * (1 - m)) * (at.current - at.initial).square().mean(1)).mean()
    assert float(loss.value.detach() - bare.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert float(loss.metrics["kl"]) == pytest.approx(
        float((at.current - at.initial).square().mean().detach()), rel=1e-4
    )


def test_what_it_asks_of_a_run():
    needs = CRD().needs
    assert needs.old and needs.on_policy and not needs.logprobs and not needs.reference
    assert needs.teachers == (None,) and needs.guidance == 4.5
    assert CRD(kl_coef=0.0).needs.teachers == () and CRD(kl_coef=0.0).needs.guidance == 1.0
    assert not CRD(on_policy=False).needs.on_policy
    policy = ToyPolicy()
    batch = collect(CRD(**SMALL), policy)
    gradient(CRD(**SMALL), policy, batch)
    assert policy.calls["teacher"] == policy.calls["reference"] == 0
    gradient(CRD(num_steps=6, draws_per_sample=3), policy, batch)
    assert policy.calls["teacher"] == len(batch.rows)


def test_the_old_policy_follows_as_published():
    for n in (0, 40, 149, 200):
        assert CRD().old_decay(n) == pytest.approx(min(0.25 + 0.005 * n, 0.999), abs=1e-6)


def test_a_sample_alone_in_its_unit_teaches_nothing_and_is_finite():
    algorithm, policy = CRD(**SMALL), ToyPolicy()
    batch = collect(algorithm, policy, num_prompts=1)
    batch.rewards[1:] = math.nan
    batch.advantages = algorithm.credit(batch)
    batch = live(batch)
    assert len(batch.rows) == 3
    loss, grad = gradient(algorithm, policy, batch)
    assert float(loss.value.detach()) == 0 and grad.abs().max() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_floor": 0.2}, "kl_floor=0.2 is above kl_coef=0.1.*lower kl_floor"),
        ({"temperature": -0.1}, "greater than or equal to 0"),
        ({"beta": 0.0}, "greater than 0"),
        ({"kl_guidance": 0.5}, "greater than or equal to 1"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(given, message):
    with pytest.raises(ValidationError, match=message):
        CRD(**given)
