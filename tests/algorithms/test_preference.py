"""What preference methods share: pairs, rows, the logistic loss against brute force, references, counted calls."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.diffusion_dpo import DiffusionDPO
from flowrl.algorithms.flow_dpo import FlowDPO
from flowrl.algorithms.matching import every_pair, mean_square, noised
from flowrl.algorithms.preference import better
from flowrl.algorithms.rpo import RPO
from flowrl.algorithms.schedule import AlgorithmError, plans_of
from flowrl.costs import cost
from flowrl.update import deal
from samplers import shifted_times
from tests.algorithms.toy import DIM, ToyPolicy, collect, gradient, live, train

every = pytest.mark.parametrize("cls", [FlowDPO, DiffusionDPO, RPO], ids=lambda cls: cls.__name__)
FAST = {"num_steps": 5}


def moved(by=0.2):
    """A policy that is not what it was."""
    policy = ToyPolicy()
    with torch.no_grad():
        policy.bias += torch.tensor([by, -by / 2])
        policy.gain += by / 3
    return policy


def brute(algorithm, policy, batch, error=lambda at, v: at.target - v):
    """-log sigmoid(beta_t / 2 [(l - l_ref) - (w - w_ref)]) pair by pair, with `error` between target and velocity."""
    at = noised(batch)
    with policy.reference():
        reference = policy.velocity(at.x, at.t, at.cond)
    now, before = (mean_square(error(at, v)) for v in (policy.velocity(at.x, at.t, at.cond), reference))
    terms = []
    for unit in batch.draws.unit.unique():
        rows = torch.nonzero(batch.draws.unit == unit).flatten().tolist()
        chosen, rejected = sorted(rows, key=lambda row: -batch.advantages[row].item())
        inside = -algorithm.beta / 2 * ((now[chosen] - before[chosen]) - (now[rejected] - before[rejected]))
        terms.append(torch.log1p((-inside).exp()))
    return torch.stack(terms).mean()


# ------------------------------------------------------------------------------------------------ rows


@pytest.fixture(scope="module")
def batch():
    algorithm = FlowDPO(**FAST, pairing="all", draws_per_sample=3)
    return collect(algorithm, ToyPolicy(), num_prompts=3, k=4)


def test_the_sides_of_a_pair_share_time_and_noise_and_a_unit(batch):
    draws = batch.draws
    assert len(draws) == 3 * (4 * 3 // 2) * 3 * 2, "groups, pairs of four that all differ, draws, sides"
    assert torch.equal(draws.t[::2], draws.t[1::2]) and torch.equal(draws.key[::2], draws.key[1::2])
    assert torch.equal(draws.unit[::2], draws.unit[1::2]) and len(draws.unit.unique()) == len(draws) // 2
    at = noised(batch)
    assert torch.equal(at.noise[::2], at.noise[1::2]) and at.noise[::2].unique(dim=0).shape[0] == len(draws) // 2
    group = batch.trajectory.group[draws.sample]
    assert torch.equal(group[::2], group[1::2]) and torch.equal(group, draws.key[:, 0])
    assert torch.equal(batch.advantages, torch.tensor([1.0, -1.0]).repeat(len(draws) // 2))
    rewards = batch.rewards[draws.sample]
    assert (rewards[::2] > rewards[1::2]).all()


def test_times_of_a_pair_are_stratified_and_each_pair_has_its_own(batch):
    algorithm = FlowDPO(**FAST, pairing="all", draws_per_sample=4, time_sampling="uniform", time_range=(0.2, 0.6))
    t = algorithm.draws(batch).t[::2].view(-1, 4).sort(1).values
    edges = torch.linspace(0.2, 0.6, 5)
    assert ((t >= edges[:-1] - 1e-6) & (t <= edges[1:] + 1e-6)).all()
    assert len(t[:, 0].unique()) == len(t)
    shared = algorithm.model_copy(update={"share_draws": True}).draws(batch)
    for place in range(3):
        mine = shared.key[:, 0] == place
        assert len(shared.t[mine].unique()) == len(shared.key[mine].unique(dim=0)) == 4
    assert len(shared.unit.unique()) == len(shared) // 2, "they stay pairs"


def test_draws_are_a_function_of_seed_iteration_and_place(batch):
    algorithm = FlowDPO(**FAST, pairing="all", pairs_per_group=2)
    first = algorithm.draws(batch)
    again = algorithm.draws(batch)
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in ("sample", "t", "key", "unit"))
    for change in ({"seed": 1}, {"iteration": 1}):
        other = algorithm.draws(replace(batch, **change))
        assert not torch.equal(first.t, other.t) and not torch.equal(first.sample, other.sample)
    # A process that holds the last group alone draws the same for it.
    some = batch.trajectory.group == 2
    trajectory = batch.trajectory.keep_leaves(some)
    alone = algorithm.draws(replace(batch, trajectory=trajectory, rewards=batch.rewards[some]))
    mine = first.key[:, 0] == 2
    assert torch.equal(alone.t, first.t[mine]) and torch.equal(alone.key, first.key[mine])
    assert torch.equal(alone.sample + 8, first.sample[mine])


def test_no_more_pairs_than_asked_for_and_each_of_those_found(batch):
    found = {tuple(p) for p in FlowDPO(**FAST, pairing="all")._pairs(batch).tolist()}
    for limit in (1, 2, 5, 6, 99):
        some = FlowDPO(**FAST, pairing="all", pairs_per_group=limit)._pairs(batch)
        assert {tuple(p) for p in some.tolist()} <= found and len(some) == len(some.unique(dim=0)) == 3 * min(limit, 6)


def test_pairs_are_never_cut_by_updates_or_micro_batches(batch):
    update_of = deal(batch, range(3), 3, 4, 4, key=7)
    assert torch.equal(update_of[::2], update_of[1::2])
    counts = torch.bincount(update_of)
    assert counts.max() - counts.min() <= 2 * 3


def test_no_pair_means_no_rows():
    indices = torch.zeros(0, 2, dtype=torch.long)
    batch = collect(FlowDPO(**FAST), ToyPolicy(), num_prompts=2, k=2)
    draws = every_pair(batch, indices, 2, "grid", low=0.0, high=1.0, times=shifted_times(5, 3.0))
    assert (len(draws), draws.sample.shape, draws.key.shape, draws.unit.shape) == (0, (0,), (0, 3), (0,))
    assert draws.t.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ ties, verdicts


@every
def test_ties_give_no_pair(cls):
    algorithm = cls(**FAST)
    for pairing in ("best_worst", "all", "margin"):
        algorithm = cls(**FAST, pairing=pairing)
        batch = collect(
            algorithm, ToyPolicy(), num_prompts=3, k=4, reward=lambda x: torch.full((len(x),), 0.25).double()
        )
        assert len(batch.draws) == len(algorithm.credit(batch)) == 0
    mixed = collect(
        algorithm, ToyPolicy(), num_prompts=3, k=4,
        reward=lambda x: torch.arange(len(x)).double() * (torch.arange(len(x)) >= 8),
    )  # fmt: skip
    assert mixed.draws.key[:, 0].unique().tolist() == [2]
    loss = algorithm.loss(ToyPolicy(), live(mixed))
    assert loss.metrics["no_pair_frac"] == pytest.approx(2 / 3) and loss.metrics["pairs_per_group"] == pytest.approx(2)


def test_the_margin_keeps_close_pairs_out():
    batch = collect(FlowDPO(**FAST), ToyPolicy(), num_prompts=2, k=3)
    batch.rewards = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.1, 0.2]).double()
    assert FlowDPO(**FAST, pairing="margin", min_margin=0.25)._pairs(batch).tolist() == [[2, 0], [2, 1]]
    assert FlowDPO(**FAST, min_margin=0.25)._pairs(batch).tolist() == [[2, 0]]


@every
def test_a_sample_without_a_verdict_is_in_no_pair(cls):
    batch = collect(cls(**FAST), ToyPolicy(), num_prompts=2, k=4)
    algorithm = cls(**FAST, pairing="all")
    batch.rewards[[1, 4, 5, 6]] = math.nan
    draws = algorithm.draws(batch)
    assert set(draws.sample.tolist()) == {0, 2, 3}, "the second group has one verdict, so nothing to compare"
    batch.draws = draws
    assert algorithm.credit(batch).isfinite().all()
    batch.rewards[0] = math.nan  # lost on the way
    credit = algorithm.credit(batch)
    lost = torch.isin(draws.unit, draws.unit[draws.sample == 0])
    assert torch.equal(credit.isnan(), lost) and lost.any() and not lost.all()


# ------------------------------------------------------------------------------------------------ the loss


@every
def test_at_the_reference_the_loss_is_ln_2(cls):
    algorithm, policy = cls(**FAST, anchor=0.0), ToyPolicy()
    loss, grad = gradient(algorithm, policy, live(collect(algorithm, policy)))
    assert loss.value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.metrics["implicit_accuracy"] == 0.5 and loss.metrics["implicit_margin"] == 0
    assert loss.metrics["gap_chosen"] == loss.metrics["gap_rejected"] == 0
    assert grad.abs().max() > 0


def test_loss_and_gradient_are_those_of_the_formula_pair_by_pair():
    algorithm, policy = FlowDPO(**FAST, pairing="all", draws_per_sample=2, beta=3.0), moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    loss, found = gradient(algorithm, policy, batch)
    expected = brute(algorithm, policy, batch)
    torch.testing.assert_close(loss.value, expected)
    grads = torch.autograd.grad(expected, (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)


def test_the_monitors_by_hand():
    algorithm, policy = FlowDPO(**FAST, pairing="all", beta=3.0), moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    at = noised(batch)
    with torch.no_grad():
        now = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean(1)
        with policy.reference():
            before = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean(1)
    gap_w, gap_l = (now - before)[::2], (now - before)[1::2]
    found = algorithm.loss(policy, batch).metrics
    torch.testing.assert_close(found["gap_chosen"], gap_w.mean())
    torch.testing.assert_close(found["gap_rejected"], gap_l.mean())
    assert found["implicit_accuracy"] == pytest.approx((gap_w < gap_l).float().mean().item())
    assert 0 < found["implicit_accuracy"] < 1
    torch.testing.assert_close(found["implicit_margin"], (-1.5 * (gap_w - gap_l)).mean())
    rewards = batch.rewards[batch.draws.sample]
    torch.testing.assert_close(found["reward_margin"], (rewards[::2] - rewards[1::2]).mean())
    assert found["pairs_per_group"] == 6 and found["no_pair_frac"] == 0


@every
def test_a_step_down_the_gradient_prefers_the_chosen(cls):
    algorithm, policy = cls(**FAST, pairing="all", draws_per_sample=4, anchor=0.0), ToyPolicy()
    batch = live(collect(algorithm, policy))
    loss, grad = gradient(algorithm, policy, batch)
    with torch.no_grad():
        step = 1e-3 * grad / grad.norm()
        policy.bias -= step[:DIM]
        policy.gain -= step[DIM]
    after = algorithm.loss(policy, batch)
    assert after.value < loss.value and after.metrics["implicit_margin"] > 0
    assert after.metrics["gap_chosen"] < after.metrics["gap_rejected"]


def test_the_anchor_is_flow_matching_on_the_better_sample():
    policy = moved()
    plain, anchored = (FlowDPO(**FAST, pairing="all", anchor=a) for a in (0.0, 0.7))
    batch = live(collect(plain, policy))
    at = noised(batch)
    error = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean(1)[::2].mean()
    a, b = (algorithm.loss(policy, batch) for algorithm in (plain, anchored))
    torch.testing.assert_close(b.value - a.value, 0.7 * error)
    torch.testing.assert_close(b.metrics["anchor"], error.detach())
    assert a.metrics["policy_loss"] == b.metrics["policy_loss"] and "anchor" not in a.metrics


def test_micro_batches_change_no_gradient():
    algorithm, policy = FlowDPO(**FAST, pairing="all", anchor=0.3), moved()
    batch = live(collect(algorithm, policy, num_prompts=2, k=4))
    _, whole = gradient(algorithm, policy, batch)
    parts = [torch.nonzero(batch.draws.unit % 3 == part).flatten() for part in range(3)]
    summed = sum(gradient(algorithm, policy, batch.select(p), len(p) / len(batch.rows))[1] for p in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_which_row_is_better():
    unit = torch.tensor([5, 5, 2, 2, 9, 9])
    found = better(torch.tensor([1.0, 0.0, -2.0, -1.0, math.nan, 0.0]).double(), unit)
    assert found[:4].tolist() == [1, -1, -1, 1] and found[4:].isnan().all()


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"refresh_every": 1}, [0, 1, 2, 3, 4, 5]),
        ({"refresh_every": 3}, [2, 5]),
        ({"sft_iterations": 2}, [0, 1]),
        ({"sft_iterations": 2, "refresh_every": 2}, [0, 1, 3, 5]),
        ({"sft_iterations": 0}, []),
    ],
)
def test_when_the_policy_becomes_the_reference(settings, copies):
    algorithm = FlowDPO(**settings)
    assert [i for i in range(6) if algorithm.old_decay(i) == 0] == copies
    assert {algorithm.old_decay(i) for i in range(6)} <= {0.0, 1.0}
    follows = settings != {"sft_iterations": 0}
    assert (algorithm.needs.old, algorithm.needs.reference) == (follows, not follows)
    assert algorithm.needs.on_policy, "the reference never draws the samples"


def test_a_refreshed_reference_is_the_policy_as_it_was():
    """With `refresh_every` the gap is to `old()`: after `follow(0)` the loss is ln 2 again, wherever the policy is."""
    algorithm, policy = FlowDPO(**FAST, pairing="all", refresh_every=2), moved()
    batch = live(collect(algorithm, policy))
    before = algorithm.loss(policy, batch)
    assert before.metrics["gap_chosen"] != 0
    fixed = algorithm.model_copy(update={"refresh_every": None})
    torch.testing.assert_close(before.value, fixed.loss(policy, batch).value), "not refreshed yet"
    policy.follow(0.0)
    assert algorithm.loss(policy, batch).value.item() == pytest.approx(math.log(2), abs=1e-6)
    assert fixed.loss(policy, batch).value.item() != pytest.approx(math.log(2), abs=1e-3)


def test_first_the_chosen_are_imitated_then_compared():
    algorithm, policy = FlowDPO(**FAST, pairing="all", sft_iterations=1), moved()
    batch = collect(algorithm, policy, iteration=0)
    assert torch.equal(batch.advantages.isnan(), torch.arange(len(batch.draws)) % 2 == 1), "the rejected leave"
    batch = live(batch)
    calls = dict(policy.calls)
    loss, found = gradient(algorithm, policy, batch)
    assert policy.calls == calls | {"current": calls["current"] + len(batch.draws)}, "no reference is asked"
    at = noised(batch)
    expected = (at.target - policy.velocity(at.x, at.t, at.cond)).square().mean()
    torch.testing.assert_close(loss.value, expected)
    grads = torch.autograd.grad(expected, (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]))
    policy.follow(algorithm.old_decay(0))
    after = live(collect(algorithm, policy, iteration=1))
    assert algorithm.loss(policy, after).value.item() == pytest.approx(math.log(2), abs=1e-6)
    assert set(after.advantages.tolist()) == {1.0, -1.0}


# ------------------------------------------------------------------------------------------------ cost, learning


@pytest.mark.parametrize("iteration", [0, 1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"refresh_every": 1}, {"refresh_every": 3}, {"sft_iterations": 2}],
    ids=lambda s: "-".join(s) or "plain",
)
def test_calls_are_those_that_are_announced(settings, iteration):
    algorithm = FlowDPO(**FAST, pairing="all", pairs_per_group=3, draws_per_sample=2, **settings)
    policy = moved()
    policy.old_is_current = iteration == 0 or algorithm.old_decay(iteration - 1) == 0
    batch = collect(algorithm, policy, iteration, num_prompts=4, k=6)
    assert len(batch.trajectory) == 0, "only x0 is stored"
    assert policy.calls["current"] == 4 * 6 * 5
    algorithm.loss(policy, live(batch))
    plans = plans_of(algorithm, shifted_times(5, 3.0), iteration, 6, 0)
    found = cost(
        algorithm, plans, prompts=4, samples_per_prompt=6, guided=False, updates=1, update="auto", iteration=iteration
    )
    imitates = iteration < algorithm.sft_iterations
    rows = 4 * 3 * 2 * (1 if imitates else 2)
    assert (found.rollout, found.train, found.rows, found.stored) == (120, rows, rows, 0)
    assert policy.calls["current"] == 120 + found.train
    assert policy.calls["old"] == found.old and policy.calls["reference"] == found.reference
    assert found.reference == (0 if algorithm.needs.old else rows)


@every
def test_it_learns(cls):
    algorithm = cls(**FAST, pairing="all", pairs_per_group=6, draws_per_sample=2, beta=20.0)
    algorithm = algorithm.model_copy(update={"label_gain": 5.0}) if cls is RPO else algorithm
    _, records = train(algorithm, 40, lr=0.02)
    first, last = (sum(r["reward"] for r in records[s]) / 5 for s in (slice(0, 5), slice(-5, None)))
    assert first < -1.8 and last > first + 0.6


def test_the_recipe_of_imitation_and_refreshing_learns():
    algorithm = FlowDPO(**FAST, pairing="all", pairs_per_group=6, beta=20.0, sft_iterations=8, refresh_every=5)
    policy, records = train(algorithm, 40, lr=0.02)
    means = [sum(r["reward"] for r in records[s : s + 8]) / 8 for s in (0, 16, 32)]
    assert all(b > a for a, b in pairwise(means)) and means[-1] > means[0] + 0.5
    assert policy.calls["reference"] == 0 and policy.calls["old"] > 0


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pairing": "all", "min_margin": 0.1}, "no effect on pairing=all; set pairing=margin"),
        ({"pairs_per_group": 3}, "no effect on pairing=best_worst.*set pairing=all"),
        ({"beta": 0.0}, "greater than 0"),
        ({"refresh_every": 0}, "at least 1"),
        ({"sft_iterations": -1}, "greater than or equal to 0"),
        ({"time_sampling": "grid", "draws_per_sample": 9, "num_steps": 8}, "draws_per_sample=9"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        FlowDPO(**settings)


@every
def test_a_group_of_one_has_no_pair(cls):
    with pytest.raises((ValueError, AlgorithmError), match="samples_per_prompt=1.*at least 2"):
        cls(**FAST).plan(shifted_times(5, 3.0), 0, 1, 0)
