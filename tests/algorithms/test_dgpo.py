"""DGPO: the group's preference loss by hand, its gradient two ways, one sum a group, and the clip of single samples."""

import math

import pytest
import torch

from flowrl.algorithms.dgpo import DGPO, outwards, surplus
from flowrl.algorithms.matching import unit_sum
from tests.algorithms.toy import ToyPolicy, asked, collect, gradient, live, scattered, train

SMALL = {"num_steps": 6, "draws_per_sample": 3, "kl_coef": 0.0, "clip_range": 10.0}
anchors = pytest.mark.parametrize("anchor", ["reference", "old"])


def errors(policy, batch, anchor):
    """d and d_ref [N], float64; d with its graph."""
    at = asked(policy, batch)
    before = at.initial if anchor == "reference" else at.old
    return (at.current - at.target).square().mean(1), (before - at.target).square().mean(1)


def groups_of(batch):
    return [torch.nonzero(batch.draws.unit == unit).flatten() for unit in batch.draws.unit.unique()]


def flat(grads):
    return torch.cat([g.flatten() for g in grads]).float()


def test_defaults_are_the_published_recipe():
    record = DGPO().model_dump()
    expected = {
        "beta": 10.0, "clip_range": 0.05, "kl_coef": 1e-3, "draws_per_sample": 4, "adv_std": "global", "num_steps": 10,
        "time_range": (0.4, 1.0), "anchor": "reference",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert [DGPO().old_decay(i) for i in (0, 100, 300, 900)] == pytest.approx([0, 0.1, 0.3, 0.3])


@anchors
@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_loss_and_gradient_are_those_of_the_preference(anchor, beta):
    """-log sigmoid(-S) / beta of each group, with S summed by hand and differentiated by autograd."""
    algorithm, policy = DGPO(**SMALL, anchor=anchor, beta=beta), scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    d, before = errors(policy, batch, anchor)
    terms = []
    for rows in groups_of(batch):
        s = sum(beta * batch.advantages[i].double() * (d[i] - before[i]) for i in rows) / len(rows)
        terms.append(-torch.nn.functional.logsigmoid(-s) / beta)
    expected = torch.stack(terms).mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(
        grad, flat(torch.autograd.grad(expected, (policy.bias, policy.gain))), rtol=1e-3, atol=1e-5
    )


@anchors
def test_gradient_is_that_of_the_papers_surrogate(anchor):
    """mean sigmoid(S) A d with S cut from the graph: beta times it is the gradient of -log sigmoid(-S)."""
    algorithm, policy = DGPO(**SMALL, anchor=anchor), scattered()
    batch = collect(algorithm, policy)
    _, grad = gradient(algorithm, policy, batch)
    d, before = errors(policy, batch, anchor)
    parts = []
    for rows in groups_of(batch):
        a = batch.advantages[rows].double()
        weight = torch.sigmoid((algorithm.beta * a * (d[rows] - before[rows])).mean()).detach()
        parts.append(weight * a * d[rows])
    expected = torch.autograd.grad(torch.cat(parts).mean(), (policy.bias, policy.gain))
    torch.testing.assert_close(grad, flat(expected), rtol=1e-3, atol=1e-5)


def test_a_group_is_summed_exactly_once():
    """S is that of the whole group whatever the order of its rows, and does not grow with their number."""
    rise, a = torch.tensor([0.3, -0.2, 0.1, 0.5, -0.4, 0.2]), torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 1.0])
    unit = torch.tensor([7, 3, 7, 3, 3, 7])
    found = surplus(rise, a, unit, 10.0)
    seven, three = 10 * (0.3 + 0.05 + 0.2) / 3, 10 * (0.2 + 1.0 + 0.8) / 3
    torch.testing.assert_close(found, torch.tensor([seven, three, seven, three, three, seven]))
    twice = surplus(rise.repeat(2), a.repeat(2), unit.repeat(2), 10.0)
    torch.testing.assert_close(twice, found.repeat(2))


def test_advantages_of_a_unit_cancel_and_so_do_common_rises():
    algorithm = DGPO(**SMALL)
    batch = live(collect(algorithm, ToyPolicy()))
    assert unit_sum(batch.advantages, batch.draws.unit).abs().max() < 1e-5
    rise = torch.rand(len(batch.rows), generator=torch.Generator().manual_seed(0))
    before, after = (surplus(r, batch.advantages, batch.draws.unit, 10.0) for r in (rise, rise + 3.0))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_at_the_anchor_it_is_half_of_advantage_weighted_matching():
    algorithm, policy = DGPO(**SMALL, beta=1000.0), ToyPolicy()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    assert float(loss.value.detach()) == pytest.approx(math.log(2) / 1000)
    d, _ = errors(policy, batch, "old")
    expected = torch.autograd.grad((batch.advantages * d).mean() / 2, (policy.bias, policy.gain))
    torch.testing.assert_close(grad, flat(expected), rtol=1e-3, atol=1e-5)


def test_beta_lets_go_of_a_group_that_is_told_apart():
    """Many steps on one batch: a large beta stops where S is low enough, a small one goes on."""
    moved = {}
    for beta in (1.0, 300.0):
        algorithm, policy = DGPO(**SMALL, beta=beta), ToyPolicy()
        batch = collect(algorithm, policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.2)
        for _ in range(40):
            optimizer.zero_grad()
            algorithm.loss(policy, batch).value.backward()
            optimizer.step()
        moved[beta] = float(policy.bias.detach().norm())
    assert moved[300.0] < 0.5 * moved[1.0]


def test_the_clip_stops_rows_that_went_too_far_and_only_those():
    log_ratio = torch.tensor([1.2, 1.2, 0.9, 0.9, 1.0, 1.0]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert outwards(log_ratio, advantages, 0.05).tolist() == [True, False, False, True, False, False]
    assert outwards(log_ratio, advantages, (0.2, 0.1)).tolist() == [True, False, False, False, False, False]


def test_clipped_rows_count_in_the_value_and_have_no_gradient():
    algorithm, policy = DGPO(**{**SMALL, "clip_range": 0.02}), scattered()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    free, _ = gradient(DGPO(**SMALL), policy, batch)
    torch.testing.assert_close(loss.value, free.value)
    d, before = errors(policy, batch, "reference")
    _, old = errors(policy, batch, "old")
    a, beyond, terms = batch.advantages.double(), 0, []
    for rows in groups_of(batch):
        s = 0.0
        for i in rows:
            ratio = float((old[i] - d[i].detach()).exp())
            stopped = (a[i] > 0 and ratio > 1.02) or (a[i] < 0 and ratio < 0.98)
            beyond += int(stopped)
            s = s + algorithm.beta * a[i] * ((d[i].detach() if stopped else d[i]) - before[i]) / len(rows)
        terms.append(torch.nn.functional.softplus(s) / algorithm.beta)
    assert float(loss.metrics["clip_frac"]) == pytest.approx(beyond / len(batch.rows)) and 0 < beyond < len(batch.rows)
    expected = torch.autograd.grad(torch.stack(terms).mean(), (policy.bias, policy.gain))
    torch.testing.assert_close(grad, flat(expected), rtol=1e-3, atol=1e-5)


def test_a_group_that_lost_a_sample_is_a_mean_over_the_rest():
    algorithm, policy = DGPO(**SMALL), scattered()
    batch = collect(algorithm, policy)
    batch.rewards[:3] = float("nan")
    batch.advantages = algorithm.credit(batch)
    batch = live(batch)
    assert sorted({len(rows) for rows in groups_of(batch)}) == [5, 8]
    loss, _ = gradient(algorithm, policy, batch)
    d, before = (e.detach() for e in errors(policy, batch, "reference"))
    s = [float((10 * batch.advantages[rows] * (d[rows] - before[rows])).mean()) for rows in groups_of(batch)]
    sizes = [len(rows) for rows in groups_of(batch)]
    expected = sum(n * math.log1p(math.exp(x)) / 10 for n, x in zip(sizes, s, strict=True)) / sum(sizes)
    assert float(loss.value.detach()) == pytest.approx(expected, rel=1e-4)


@anchors
def test_the_initial_weights_are_asked_only_where_they_count(anchor):
    algorithm, policy = DGPO(**SMALL, anchor=anchor), ToyPolicy()
    batch = collect(algorithm, policy)
    loss, _ = gradient(algorithm, policy, batch)
    assert algorithm.needs.reference == (anchor == "reference")
    assert policy.calls["reference"] == len(batch.rows) * (anchor == "reference")
    assert "kl" not in loss.metrics
    assert DGPO(anchor="old").needs.reference, "for the distance"


def test_clipping_happens_in_training():
    _, records = train(DGPO(**{**SMALL, "clip_range": 1e-3}), iterations=5, lr=0.02, updates=4)
    assert all(0 < record["clip_frac"] < 1 for record in records)
