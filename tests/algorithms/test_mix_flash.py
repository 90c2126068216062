"""MixGRPO-Flash: the tail behind the window, its solver, and where the window may go."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.mix_grpo import MixGRPO
from flowrl.algorithms.schedule import plans_of
from flowrl.config import load_config
from samplers import flow_sde, linear_times, noise_source, rollout, shifted_times
from tests.algorithms import toy
from tests.samplers.toys import gaussian_velocity

TIMES = linear_times(25)
GRID = shifted_times(25, 3.0)
FLASH = {"tail": 0.4, "solver": "dpmpp_2m", "shift": 3.0}
SHORT = {"num_steps": 10, "window": 3, "shift_every": 1, "tail": 0.4, "solver": "dpmpp_2m"}


def plan_at(start, **fields):
    """The plan whose window begins at `start`; every sample by itself, so that a plan's calls are a sample's."""
    algorithm = MixGRPO(shift_every=1, shared_noise=False, **{**FLASH, **fields})
    plan = algorithm.plan(TIMES, start, 12, 0)
    assert plan.stochastic_steps == tuple(range(start, start + 4))
    return plan


def finished(plan, num=2000):
    """Samples of the plan by the exact velocity of N(2, .5^2)."""
    generator, index = torch.Generator().manual_seed(0), torch.arange(num)

    def noise(root, member, step):
        return torch.randn(len(root), 1, generator=generator)

    x = torch.randn(num, 1, generator=generator)
    options = {"eta": 0.7, "prompt": index, "group": index, "noise": noise}
    return rollout(lambda x, t, p: gaussian_velocity(x, t), x, plan, flow_sde, **options).x0


# ------------------------------------------------------------------------------------------------ the tail


def test_evaluations_of_a_sample_are_the_published_ones():
    found = [plan_at(start).calls() for start in range(15)]
    assert found == [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18, 19, 19, 20]
    assert sum(found) / len(found) == pytest.approx(15.6)


def test_flash_star_takes_seven():
    algorithm = MixGRPO(strategy="frozen", tail=0.2, solver="dpmpp_2m", shift=3.0, shared_noise=False)
    assert {algorithm.plan(TIMES, iteration, 12, 0).calls() for iteration in (0, 20, 299)} == {7}


def test_a_group_with_shared_noise_costs_less():
    """Place 3 has 13 steps: 3 before the window and its first state are evaluated once, 9 for each of the 12."""
    plan = MixGRPO(shift_every=1, **FLASH).plan(TIMES, 3, 12, 0)
    assert plan.leaves_per_root == 12 and plan.calls() == 3 + 1 + 12 * 9


@pytest.mark.parametrize("tail", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("start", range(21))
def test_the_window_is_untouched_and_every_tail_ends_at_zero(start, tail):
    plan = plan_at(start, tail=tail)
    end = start + 4
    assert plan.times[: end + 1] == pytest.approx(GRID[: end + 1].tolist())
    assert plan.times[-1] == 0 and len(plan.times) - end >= min(3, 25 - end + 1)
    assert len(plan.times) <= 26


def test_without_a_tail_the_grid_is_whole():
    assert plan_at(5, tail=1.0).times == pytest.approx(GRID.tolist())


@pytest.mark.parametrize("start", [0, 4, 8, 13, 15, 18, 20])
def test_samples_follow_the_data_wherever_the_window_is(start):
    """25 Euler steps give 2 and .45; a coarse tail is narrower, but never a tail that stops early (mean 1.59)."""
    x0 = finished(plan_at(start))
    assert abs(x0.mean() - 2) < 0.03
    assert 0.31 < x0.std() < 0.55
    assert x0.std() > finished(plan_at(start, solver="euler")).std() - 0.01


def test_the_tail_goes_on_from_the_windows_clean_estimates():
    """The first step behind the window is second order at once: written out, with the estimate of its last step."""
    plan, index = plan_at(2), torch.arange(5)
    noise = noise_source((3,), seed=0, iteration=0, prompt=index)
    asked = []

    def velocity(x, t, prompt):
        asked.append((x, t[0].item()))
        return gaussian_velocity(x, t, mean=1.0)

    options = {"eta": 0.7, "prompt": index, "group": index, "noise": noise}
    rollout(velocity, noise(index, index * 0, -1), plan, flow_sde, **options)
    (x_window, t_window), (x, t), (x_next, t_next) = asked[5:8]
    assert [t_window, t, t_next] == pytest.approx(list(plan.times[5:8]))
    clean = [y - s * gaussian_velocity(y, torch.full((5,), s), mean=1.0) for y, s in ((x_window, t_window), (x, t))]
    lam = [torch.tensor((1 - s) / s).log() for s in (t_window, t, t_next)]
    slope = (clean[1] - clean[0]) / (lam[1] - lam[0])
    first = t_next / t * x + (1 - t_next / t) * clean[1]
    second = first + (1 - t_next / t) * 0.5 * (lam[2] - lam[1]) * slope
    assert torch.allclose(x_next, second, atol=1e-5)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("iteration", [0, 3, 6])
@pytest.mark.parametrize("shared", [True, False])
def test_a_shortened_rollout_trains_the_window_alone(iteration, shared):
    algorithm = MixGRPO(**SHORT, shared_noise=shared)
    policy = toy.ToyPolicy()
    batch = toy.collect(algorithm, policy, iteration)
    assert set(batch.trajectory.step.tolist()) == {iteration, iteration + 1, iteration + 2}
    loss, gradient = toy.gradient(algorithm, policy, batch)
    assert loss.metrics["ratio_max_dev"] < 1e-5 and gradient.norm() > 0


# ------------------------------------------------------------------------------------------------ the window's places


def places(iterations, **fields):
    algorithm = MixGRPO(**fields)
    return [algorithm.plan(TIMES, i, 12, 0).stochastic_steps[0] for i in range(iterations)]


def test_last_start_is_the_last_place():
    assert places(12, last_start=3, shift_every=2) == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    assert places(12, last_start=3, shift_every=2, roll_back=False) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert places(5, last_start=5, shift_every=1, stride=2) == [0, 2, 4, 5, 0]
    assert set(places(200, last_start=3, strategy="random")) == {0, 1, 2, 3}
    assert set(places(30, last_start=0, shift_every=1)) == {0}
    assert places(60, last_start=20, shift_every=1) == places(60, shift_every=1)


def test_a_last_start_that_sticks_out_is_refused():
    MixGRPO(last_start=20)
    with pytest.raises(ValidationError, match="last_start=21 sticks out of num_steps=25.*choose last_start <= 20"):
        MixGRPO(last_start=21)


def test_decay_falls_to_its_end_at_the_last_place():
    """With six steps to visit, the straight line from 10 to 1 ends at step 5, not at step 23."""
    stays = places(200, last_start=2, strategy="decay", shift_every=10, roll_back=False, window=4)
    assert [stays.count(0), stays.count(1)] == [10, int(10 * 0.8 + 0.2)]


@pytest.mark.parametrize("tail", [0.0, -0.2, 1.2])
def test_a_tail_is_a_share(tail):
    with pytest.raises(ValidationError, match="tail"):
        MixGRPO(tail=tail)


# ------------------------------------------------------------------------------------------------ several rewards


def test_rewards_are_normalised_one_by_one_unless_told():
    """A reward on a scale of 1000 counts no more than one on a scale of 1: the mean of their group scores, by hand."""
    algorithm = MixGRPO(**SHORT)
    batch = toy.collect(algorithm, toy.ToyPolicy())
    generator = torch.Generator().manual_seed(0)
    small, large = torch.rand(2, 32, generator=generator, dtype=torch.float64)
    batch.scores, batch.weights = {"small": small, "large": 1000 * large}, {"small": 2.0, "large": 1.0}
    batch.rewards = 2 * small + 1000 * large

    def scores(values):
        by_prompt = values.view(4, 8)
        return ((by_prompt - by_prompt.mean(1, keepdim=True)) / by_prompt.std(1, keepdim=True)).flatten()

    found = algorithm.sample_advantages(batch).value
    assert torch.allclose(found.double(), (2 * scores(small) + scores(large)) / 3, atol=1e-5)
    summed = MixGRPO(**SHORT, combine="sum").sample_advantages(batch).value
    assert torch.allclose(summed.double(), scores(batch.rewards), atol=1e-5)


def test_the_ready_config_is_the_papers_flash():
    root = Path(__file__).parents[2]
    config = load_config(root / "configs/sd3/mix_grpo_flash_ocr.yaml", ["data.prompts=shapes"])
    algorithm = config.algorithm.build()
    assert (algorithm.tail, algorithm.solver, algorithm.shift_every, algorithm.shift) == (0.4, "dpmpp_2m", 20, 3.0)
    whole = load_config(root / "configs/sd3/mix_grpo_ocr.yaml", ["data.prompts=shapes"]).algorithm.build()
    plans = [plans_of(a, TIMES, 0, 12, 0)[0] for a in (algorithm, whole)]
    assert [plan.calls() for plan in plans] == [1 + 12 * 10, 1 + 12 * 24]  # the first state is the group's
