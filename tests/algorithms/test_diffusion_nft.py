"""DiffusionNFT: its expansion, its first gradient, its brake, its decay schedules, and how many times it asks whom."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.diffusion_nft import DiffusionNFT, branches
from tests.algorithms.toy import ToyPolicy, asked, collect, gradient, scattered

SMALL = {"num_steps": 6, "draws_per_sample": 3}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_it_is_weighted_regression_with_a_quadratic_brake(beta, share):
    """(t^2 / w) [|e|^2 / beta + 2 (2r - 1) <e, d> + beta |d|^2], means over dims, where both normalisers are w.

    They are equal where e > beta |d| and d sums to 0: then mean |e +- beta d| = mean e, so that w = t mean e.
    """
    generator = torch.Generator().manual_seed(0)
    n, dims = 7, 12
    e = 2 + torch.rand(n, dims, generator=generator).double()
    d = torch.randn(n, dims, generator=generator).double().clamp(-1.9, 1.9)
    d = 0.9 * (d - d.mean(1, keepdim=True))
    assert (e > beta * d.abs()).all()
    t = torch.linspace(0.1, 1, n).double()
    target = torch.randn(n, dims, generator=generator).double()
    v_old = target + e
    found = branches(v_old + d, v_old, target, t, torch.full((n,), share).double(), beta)
    square, inner, brake = (e * e).mean(1), (e * d).mean(1), (d * d).mean(1)
    expected = t**2 / (t * e.mean(1)) * (square / beta + 2 * (2 * share - 1) * inner + beta * brake)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert inner.abs().min() > 1e-3


def test_the_two_branches_by_hand():
    """The error of x0 under v+ and v-, each over its own mean size, mixed by r; brute force over rows."""
    algorithm, policy = DiffusionNFT(**SMALL, beta=0.6, adv_clip=2.0, kl_coef=0.5), scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    at, terms = asked(policy, batch), []
    for i, (a, t) in enumerate(zip(batch.advantages.tolist(), batch.draws.t.tolist(), strict=True)):
        r = min(max(a / 4 + 0.5, 0.0), 1.0)
        x0 = batch.trajectory.x0[batch.draws.sample[i]].double()
        x = x0 + t * at.target[i]
        sides = []
        for v in (0.4 * at.old[i] + 0.6 * at.current[i], 1.6 * at.old[i] - 0.6 * at.current[i]):
            miss = x - t * v - x0
            sides.append((miss**2).mean() / miss.detach().abs().mean())
        distance = (at.current[i] - at.initial[i]).square().mean()
        terms.append(2.0 * (r * sides[0] + (1 - r) * sides[1]) / 0.6 + 0.5 * distance)
    expected = torch.stack(terms).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(expected, (policy.bias, policy.gain))])
    torch.testing.assert_close(grad, by_hand.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_first_gradient_is_advantage_weighted_matching_whatever_beta(beta):
    """d = 0: Z_c 2 (2r - 1) t^2 / w <e, grad v> = A t^2 / w grad |v - u|^2, Z_c (2r - 1) being A."""
    algorithm, policy = DiffusionNFT(**SMALL, beta=beta), ToyPolicy()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    at = asked(policy, batch)
    e, t = at.current - at.target, batch.draws.t.double()
    error = t**2 * e.square().mean(1) / (t * e.detach().abs().mean(1))
    expected = torch.autograd.grad((batch.advantages * error).mean(), (policy.bias, policy.gain))
    expected = torch.cat([g.flatten() for g in expected]).float()
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("share", "lowest"), [(0.0, 2.0), (1.0, -2.0), (0.5, None)])
def test_the_brake_stops_every_move_even_away_from_a_bad_sample(share, lowest):
    """With e = 1 everywhere and d = c, the branches are |1 +- beta c|: a bad sample's ends at c = 1 / beta.

    Undecided, r = 1/2, any c in between is as good. Plain regression on a bad sample, -(1 + c)^2, has no end.
    """
    v_old, target = torch.zeros(1, 8).double(), torch.full((1, 8), -1.0).double()
    t, r, beta = torch.ones(1).double(), torch.tensor([share]).double(), 0.5
    along = torch.linspace(-20, 20, 4001).double()
    values = torch.cat([branches(v_old + c, v_old, target, t, r, beta) for c in along])
    if lowest is None:
        flat = values[along.abs() < 1.99]
        torch.testing.assert_close(flat, torch.full_like(flat, 1 / beta))
    else:
        assert float(along[values.argmin()]) == pytest.approx(lowest, abs=0.02)
    assert values[0] > values.min() + 1 and values[-1] > values.min() + 1


def test_a_small_beta_moves_further():
    moved = {}
    for beta in (0.1, 3.0):
        algorithm, policy = DiffusionNFT(**SMALL, beta=beta), ToyPolicy()
        batch = collect(algorithm, policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = algorithm.loss(policy, batch)
            loss.value.backward()
            optimizer.step()
        moved[beta] = float(loss.metrics["old_distance"])
    assert moved[3.0] < 0.2 * moved[0.1]


def test_the_decay_schedules_of_the_official_code():
    rising = DiffusionNFT(decay=[[0, 0], [500, 0.5]])
    late = DiffusionNFT(decay=[[75, 0], [208.2, 0.999]])
    for n in (0, 1, 74, 75, 76, 200, 208, 209, 499, 500, 3000):
        assert rising.old_decay(n) == pytest.approx(min(0.001 * n, 0.5))
        assert late.old_decay(n) == pytest.approx(min(max(0.0075 * (n - 75), 0.0), 0.999))
        assert DiffusionNFT().old_decay(n) == 0
    for algorithm in (rising, late):
        assert DiffusionNFT.model_validate_json(algorithm.model_dump_json()) == algorithm


def test_what_it_asks_of_a_run():
    needs = DiffusionNFT().needs
    assert needs.old and not (needs.on_policy or needs.logprobs or needs.reference or needs.means)
    assert DiffusionNFT(kl_coef=1e-4).needs.reference
    assert DiffusionNFT(combine="gdpo").needs.scores


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "greater than 0"),
        ({"adv_clip": 0.0}, "would erase every advantage"),
        ({"decay": [[5, 0.1], [5, 0.2]]}, "rising order"),
        ({"num_steps": 3}, "draws_per_sample=4 different times of a grid of num_steps=3 do not exist"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(given, message):
    with pytest.raises(ValidationError, match=message):
        DiffusionNFT(**given)
