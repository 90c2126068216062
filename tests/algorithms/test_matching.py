"""The forward process: states, keys, times and errors, against what they are defined as."""

import pytest
import torch

from flowrl.algorithms.diffusion_nft import DiffusionNFT
from flowrl.algorithms.matching import (
    every_sample,
    mean_square,
    member_of,
    noise_of,
    noised,
    scaled_square,
    unit_mean,
    unit_sum,
    velocities,
)
from flowrl.update import deal
from samplers import keyed_noise, shifted_times
from tests.algorithms.toy import DIM, ToyPolicy, collect, live


def drawn(batch, count=4, sampling="grid", low=0.0, high=1.0, shift=1.0, share=False):
    times = shifted_times(10, 3.0)
    return every_sample(batch, count, sampling, low=low, high=high, times=times, shift=shift, share=share)


@pytest.fixture(scope="module")
def batch():
    return collect(DiffusionNFT(), ToyPolicy(), num_prompts=3, k=5)


def test_states_lie_between_the_sample_and_the_keyed_noise(batch):
    at = noised(batch)
    for row in (0, 7, len(batch.rows) - 1):
        place, member, number = batch.draws.key[row].tolist()
        noise = keyed_noise((DIM,), seed=0, iteration=0, prompt=place, member=member, step=number)
        x0, t = batch.trajectory.x0[batch.draws.sample[row]], batch.draws.t[row]
        torch.testing.assert_close(at.x[row], (1 - t) * x0 + t * noise, rtol=0, atol=0)
        torch.testing.assert_close(at.target[row], noise - x0, rtol=0, atol=0)
        # The target is the velocity: a step of dt along it stays on the straight line.
        torch.testing.assert_close(at.x[row] - t * at.target[row], x0)


def test_errors_of_velocity_noise_and_sample_are_one_error(batch):
    """|eps - eps_hat|^2 = (1-t)^2 |u - v|^2 and |x0 - x0_hat|^2 = t^2 |u - v|^2."""
    at = noised(batch)
    v = torch.randn(at.x.shape, generator=torch.Generator().manual_seed(0))
    error, t = mean_square(at.target - v), at.t[:, None]
    noise_error, sample_error = mean_square(at.noise - (at.x + (1 - t) * v)), mean_square(at.x0 - (at.x - t * v))
    torch.testing.assert_close(noise_error, (1 - at.t) ** 2 * error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sample_error, at.t**2 * error, rtol=1e-4, atol=1e-6)


def test_only_finished_samples_are_stored(batch):
    assert len(batch.trajectory) == 0 and batch.trajectory.x.numel() == 0
    assert batch.trajectory.x0.shape == (15, DIM)
    assert batch.draws.t.shape == (60,) and batch.draws.key.shape == (60, 3), "noise is named, not kept"


def test_each_sample_has_its_own_times_and_noises(batch):
    draws = drawn(batch)
    assert len(draws) == 60 and len(torch.unique(draws.key, dim=0)) == 60 and len(draws.unit.unique()) == 60
    for sample in range(15):
        assert len(draws.t[draws.sample == sample].unique()) == 4
    assert torch.isin(draws.t, shifted_times(10, 3.0)).all() and (draws.t > 0).all()
    assert len(noise_of(batch, draws).unique(dim=0)) == 60


def test_shared_draws_are_one_unit_of_the_whole_group(batch):
    draws = drawn(batch, share=True)
    assert len(draws.unit.unique()) == 3 * 4
    for unit in draws.unit.unique():
        mine = draws.unit == unit
        assert mine.sum() == 5 and len(draws.t[mine].unique()) == 1
        assert len(batch.trajectory.group[draws.sample[mine]].unique()) == 1
        assert len(noise_of(batch, draws.select(mine)).unique(dim=0)) == 1


@pytest.mark.parametrize("sampling", ["grid", "uniform", "logit_normal"])
def test_draws_are_a_function_of_identity(batch, sampling):
    first, again = drawn(batch, sampling=sampling), drawn(batch, sampling=sampling)
    assert torch.equal(first.t, again.t) and torch.equal(first.key, again.key)
    batch_later = collect(DiffusionNFT(), ToyPolicy(), iteration=1, num_prompts=3, k=5)
    assert not torch.equal(drawn(batch_later, sampling=sampling).t, first.t)


def test_times_have_the_distribution_that_is_named():
    many = collect(DiffusionNFT(), ToyPolicy(), num_prompts=40, k=10)
    uniform = drawn(many, count=5, sampling="uniform", low=0.2, high=0.7)
    assert uniform.t.min() >= 0.2 and uniform.t.max() <= 0.7
    share = (uniform.t.double().sort().values - 0.2) / 0.5
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.03  # Kolmogorov-Smirnov
    strata = ((uniform.t.view(-1, 5) - 0.2) / 0.1).long().clamp(max=4).sort(1).values
    assert torch.equal(strata, torch.arange(5).expand_as(strata)), "one time in each fifth"
    normal = drawn(many, count=5, sampling="logit_normal")
    logit = torch.logit(normal.t.double()).sort().values
    expected = torch.distributions.Normal(0.0, 1.0).cdf(logit)
    assert (expected - torch.linspace(0, 1, len(logit), dtype=torch.float64)).abs().max() < 0.03
    shifted = drawn(many, count=5, sampling="uniform", shift=3.0)
    assert shifted.t.median() == pytest.approx(0.75, abs=0.02), "above 1 is towards noise"


def test_units_are_summed_once():
    unit, values = torch.tensor([4, 0, 4, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert unit_sum(values, unit).tolist() == [4, 2, 4, 4] and unit_mean(values, unit).tolist() == [2, 2, 2, 4]


def test_scaled_error_is_divided_by_a_constant():
    difference = torch.randn(3, 2, 4, requires_grad=True)
    found = scaled_square(difference)
    size = difference.abs().flatten(1).mean(1)
    torch.testing.assert_close(found, mean_square(difference) / size)
    (gradient,) = torch.autograd.grad(found.sum(), difference)
    torch.testing.assert_close(gradient, 2 * difference / 8 / size.detach()[:, None, None])
    assert scaled_square(torch.zeros(1, 4)).tolist() == [0.0]


def test_the_old_policy_is_asked_only_where_it_differs(batch):
    policy = ToyPolicy()
    at = noised(batch)
    policy.old_is_current = True
    same = velocities(policy, at, old=True)
    assert torch.equal(same.old, same.current) and not same.old.requires_grad and same.reference is None
    assert policy.calls["old"] == 0 and policy.calls["current"] == len(at.x)
    policy.old_is_current = False
    with torch.no_grad():
        policy.bias += 0.5
    other = velocities(policy, at, old=True, reference=True)
    assert policy.calls["old"] == policy.calls["reference"] == len(at.x)
    torch.testing.assert_close(other.old, same.old)
    assert not torch.allclose(other.current, other.old)


def test_members_are_counted_within_groups_that_stand_together(batch):
    assert member_of(batch).tolist() == [*range(5)] * 3


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_updates_get_equal_parts_and_whole_units(batch, updates, share):
    whole = collect(DiffusionNFT(draws_per_sample=6, share_draws=share), ToyPolicy(), num_prompts=3, k=5)
    step = deal(whole, range(3), 3, 5, updates, key=7)
    assert torch.bincount(step).tolist() == [90 // updates] * updates
    for unit in whole.draws.unit.unique():
        assert len(step[whole.draws.unit == unit].unique()) == 1
    # A process that holds the last prompt alone deals its rows the same.
    mine = whole.leaf_prompt[whole.draws.sample] == 2
    alone = whole.select(mine)
    assert torch.equal(deal(alone, [2], 3, 5, updates, key=7), step[mine])


def test_samples_without_a_verdict_leave(batch):
    lost = collect(DiffusionNFT(), ToyPolicy(), num_prompts=3, k=5)
    lost.rewards[4] = torch.nan
    lost.advantages = DiffusionNFT().credit(lost)
    assert torch.equal(lost.advantages.isnan(), lost.draws.sample == 4)
    assert len(live(lost).rows) == len(lost.rows) - 4
