"""What forward-process methods have in common: memory, verdicts, units, calls, the way a step leads, and learning."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.awm import AWM
from flowrl.algorithms.crd import CRD
from flowrl.algorithms.dgpo import DGPO
from flowrl.algorithms.diffusion_nft import DiffusionNFT
from flowrl.algorithms.flow_rwr import FlowRWR
from flowrl.algorithms.forward_process import ForwardProcess
from flowrl.algorithms.schedule import plans_of
from flowrl.costs import cost
from samplers import shifted_times
from tests.algorithms.toy import DIM, ToyPolicy, asked, collect, gradient, live, scattered, train

SMALL = {"num_steps": 6, "draws_per_sample": 3}
ALL = {
    "awm": AWM(**SMALL, kl_coef=0.0),
    "crd": CRD(**SMALL, kl_coef=0.0),
    "crd hard": CRD(**SMALL, kl_coef=0.0, temperature=0.0),
    "dgpo": DGPO(**SMALL, kl_coef=0.0, anchor="old"),
    "nft": DiffusionNFT(**SMALL),
    "rwr": FlowRWR(**SMALL, temperature=0.3),
    "rwr best": FlowRWR(**SMALL, weights="best"),
}
every = pytest.mark.parametrize("name", ALL)
WITH_OLD = [name for name, algorithm in ALL.items() if algorithm.needs.old]
with_old = pytest.mark.parametrize("name", WITH_OLD)


@every
def test_only_finished_samples_are_stored(name):
    batch = collect(ALL[name], ToyPolicy())
    stored = [getattr(batch.trajectory, part) for part in ("x", "x_next", "logprob", "t")]
    assert all(not tensor.numel() for tensor in stored) and batch.trajectory.mean is None
    assert batch.trajectory.x0.shape == (32, DIM) and batch.media is None
    assert len(batch.rows) == len(batch.advantages) == 32 * 3
    assert ALL[name].kernel is None and not any(plan.num_stochastic for plan in batch.plans)


@every
def test_a_sample_without_a_verdict_is_as_if_never_drawn(name):
    algorithm, policy = ALL[name], scattered()
    batch = collect(algorithm, policy)
    gone = batch.draws.sample == 3
    batch.rewards[3] = float("nan")
    batch.advantages = algorithm.credit(batch)
    assert batch.advantages[gone].isnan().all()
    _, found = gradient(algorithm, policy, live(batch))
    others = replace(batch, draws=batch.draws.select(~gone))
    there = torch.arange(32) != 3
    place = there.cumsum(0) - 1  # of the samples that are left
    others.trajectory = replace(batch.trajectory, group=batch.trajectory.group[there])
    others.rewards, others.place = batch.rewards[there], place
    others.advantages = algorithm.credit(others)
    others.trajectory = batch.trajectory
    _, expected = gradient(algorithm, policy, live(others))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.abs().max() > 0


@every
def test_equal_rewards_teach_nothing(name):
    algorithm, policy = ALL[name], ToyPolicy()
    batch = collect(algorithm, policy, reward=lambda x0: torch.full((len(x0),), 0.7).double())
    if name == "rwr best":
        assert batch.advantages.isnan().all()
    else:
        assert gradient(algorithm, policy, live(batch))[1].abs().max() < 1e-7


@every
def test_a_step_lowers_the_errors_of_good_samples_against_those_of_bad_ones(name):
    algorithm, policy = ALL[name], ToyPolicy()
    batch = live(collect(algorithm, policy))

    def error():
        with torch.no_grad():
            at = asked(policy, batch)
        return (batch.advantages * (at.current - at.target).square().mean(1)).mean()

    before, (_, grad) = error(), gradient(algorithm, policy, batch)
    with torch.no_grad():
        policy.bias -= 1e-3 * grad[:2] / grad.norm()
        policy.gain -= 1e-3 * grad[2] / grad.norm()
    assert error() < before - 1e-5


@every
def test_units_may_be_dealt_to_micro_batches(name):
    """The loss of all rows is the mean of the parts' losses by their rows, however units are put together."""
    algorithm, policy = ALL[name], scattered()
    batch = live(collect(algorithm, policy))
    whole, grad = gradient(algorithm, policy, batch)
    units = batch.draws.unit.unique()
    parts = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))].tensor_split(3)
    value, total = 0.0, torch.zeros(3)
    for part in parts:
        rows = torch.isin(batch.draws.unit, part)
        loss, own = gradient(algorithm, policy, batch.select(rows))
        value, total = value + float(loss.value.detach() * rows.sum()), total + own * rows.sum()
    assert value / len(batch.rows) == pytest.approx(float(whole.value.detach()), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(total / len(batch.rows), grad, rtol=1e-3, atol=1e-5)


@every
def test_metrics_are_detached_numbers(name):
    algorithm, policy = ALL[name], scattered()
    loss, grad = gradient(algorithm, policy, live(collect(algorithm, policy)))
    assert grad.isfinite().all() and grad.abs().min() > 0
    assert all(not value.requires_grad and value.isfinite() for value in loss.metrics.values())
    assert "ratio_max_dev" not in loss.metrics, "that is the anchor of stored steps, which there are none of"


@with_old
@pytest.mark.parametrize("moved", [False, True])
def test_the_old_policy_is_asked_only_while_it_is_another(name, moved):
    """While the two are one, its velocity is the trained policy's own, and the loss is the same."""
    algorithm, policy = ALL[name], ToyPolicy()
    batch = live(collect(algorithm, policy))
    policy.old_is_current = False
    asked_both, grad = gradient(algorithm, policy, batch)
    assert policy.calls["old"] == len(batch.rows)
    policy.old_is_current = not moved
    if moved:
        policy.follow(0.0)
    found, again = gradient(algorithm, policy, batch)
    assert policy.calls["old"] == len(batch.rows) * (1 + moved)
    torch.testing.assert_close(found.value, asked_both.value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-6)


COSTS = {
    **ALL,
    "awm kl": AWM(**SMALL),
    "crd kl": CRD(**SMALL, kl_guidance=1.0),
    "dgpo reference": DGPO(**SMALL, kl_coef=0.0),
    "nft decay": DiffusionNFT(**SMALL, decay=0.5, kl_coef=1e-4),
    "one draw": AWM(num_steps=4, draws_per_sample=1, time_sampling="uniform"),
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("iteration", [0, 1])
def test_calls_are_those_of_the_formula(name, iteration):
    """Rollout: samples x steps (`dpmpp_2m` asks once a step); train, old, distances: once a draw that is trained on."""
    algorithm, policy, p, k = COSTS[name], ToyPolicy(), 4, 8
    batch = live(collect(algorithm, policy, iteration, p, k))
    assert policy.calls["current"] == p * k * algorithm.num_steps
    moved = algorithm.needs.old and iteration > 0 and algorithm.old_decay(iteration - 1) > 0
    policy.old_is_current = not moved
    gradient(algorithm, policy, batch)
    plans = plans_of(algorithm, shifted_times(algorithm.num_steps, 3.0), iteration, k, 0)
    found = cost(algorithm, plans, prompts=p, samples_per_prompt=k, guided=False, updates=1, iteration=iteration)
    rows = (p if name == "rwr best" else p * k) * algorithm.draws_per_sample
    assert (found.samples, found.rows, found.stored) == (p * k, rows, 0)
    assert (found.rollout, found.train) == (p * k * algorithm.num_steps, rows)
    asked_of = {"old": found.old, "reference": found.reference, "teacher": found.teacher}
    assert policy.calls == {"current": found.rollout + found.train, **asked_of}
    assert (found.old > 0) == moved
    assert (found.reference + found.teacher > 0) == (algorithm.needs.reference or bool(algorithm.needs.teachers))


LEARN = {
    **ALL,
    "awm uniform": AWM(**SMALL, kl_coef=0.0, weighting="uniform"),
    "crd soft": CRD(**SMALL, kl_coef=0.0, temperature=0.1),
    "crd cross-entropy": CRD(**SMALL, kl_coef=0.0, fit="cross_entropy"),
    "dgpo reference": DGPO(num_steps=6, draws_per_sample=3),
    "nft decay": DiffusionNFT(**SMALL, beta=1.0, decay=0.3),
    "nft euler": DiffusionNFT(**SMALL, solver="euler"),
}


@pytest.mark.parametrize("name", LEARN)
def test_it_learns(name):
    policy, records = train(LEARN[name], iterations=40, lr=0.025, updates=4)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.4
    assert last > -0.6
    assert (policy.bias > 0.5).all()


@pytest.mark.parametrize("cls", [AWM, CRD, DGPO, DiffusionNFT], ids=lambda cls: cls.__name__)
def test_a_distance_to_the_initial_weights_holds_the_policy_back(cls):
    free, _ = train(cls(**SMALL, kl_coef=0.0), iterations=15, lr=0.05)
    held, records = train(cls(**SMALL, kl_coef=20.0), iterations=15, lr=0.05)
    assert held.bias.abs().max() < 0.6 * free.bias.abs().max()
    assert records[0]["kl"] == 0 and records[-1]["kl"] > 0


def test_shared_draws_are_a_unit_and_the_others_are_alone():
    for algorithm, rows in ((ALL["dgpo"], 8), (ALL["crd"], 8), (ALL["nft"], 1), (ALL["awm"], 1)):
        draws = collect(algorithm, ToyPolicy()).draws
        for unit in draws.unit.unique():
            mine = draws.unit == unit
            assert mine.sum() == rows
            assert len(draws.t[mine].unique()) == len(draws.key[mine].unique(dim=0)) == 1
            assert draws.sample[mine].unique().numel() == rows


@pytest.mark.parametrize("cls", [DGPO, CRD])
def test_a_group_that_is_compared_cannot_be_torn_apart(cls):
    with pytest.raises(ValidationError, match="share_draws=false gives each sample a time and a noise of its own"):
        cls(share_draws=False)


def test_a_range_with_too_few_grid_times_is_refused_before_the_run():
    algorithm = DiffusionNFT(num_steps=6, draws_per_sample=4, time_range=(0.5, 1.0))
    algorithm.plan(shifted_times(6, 3.0), 0, 8, 0)  # shifted to noise, four of them are there
    with pytest.raises(ValueError, match=r"only 3 times of the grid of num_steps=6 lie in time_range=\[0.51, 1.0\]"):
        DiffusionNFT(num_steps=6, draws_per_sample=4, time_range=(0.51, 1.0), shift=1.0).plan(
            shifted_times(6, 3.0), 0, 8, 0
        )


@pytest.mark.parametrize("cls", [AWM, CRD, DGPO, DiffusionNFT], ids=lambda cls: cls.__name__)
def test_groups_of_one_are_refused(cls):
    assert issubclass(cls, ForwardProcess)
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        cls().plan(shifted_times(cls().num_steps, 3.0), 0, 1, 0)


@pytest.mark.parametrize("decay", [-0.1, 1.5, [[0, 0.5], [10, 2.0]]])
def test_a_decay_lies_between_copying_and_standing_still(decay):
    with pytest.raises(ValidationError, match=r"a decay lies in \[0, 1\]"):
        AWM(decay=decay)
