"""Plans with several tails, noise factors and shortened tails: costs and grids counted by hand, and honest errors."""

import pickle
import re

import pytest
import torch

from samplers import Plan, all_steps, branch_at, compress_tail, deterministic, linear_times, shifted_times, subset

TIMES = shifted_times(25, 3.0)
TEN = linear_times(10)


def one_step(k=3, solver="euler", width=4, strides=(1, 2, 3)):
    """G2RPO's plan: ten steps, one of them stochastic, `width` noises, a tail for each stride."""
    return subset(TEN, [k], solver=solver).with_fanout({k: width}).with_strides(strides)


# ---- strides


def test_tails_take_every_stride_th_time_and_end_at_zero():
    """Behind step 3 of 10 the times are .6 .5 .4 .3 .2 .1 0: six steps."""
    one, two, three = one_step().tails
    assert one == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert two == pytest.approx([0.6, 0.4, 0.2, 0.0])
    assert three == pytest.approx([0.6, 0.3, 0.0])
    (four,) = one_step(strides=(4,)).tails
    assert four == pytest.approx([0.6, 0.2, 0.0])  # a remainder makes the last step shorter


def test_a_plan_without_strides_has_one_tail_that_is_the_rest_of_the_grid():
    plan = subset(TEN, [2, 5])
    assert plan.strides == (1,) and plan.head == 6 and plan.tails == (plan.times[6:],)
    assert deterministic(TEN).head == 0 and deterministic(TEN).tails == (deterministic(TEN).times,)
    assert subset(TEN, [9]).head == 10 and subset(TEN, [9]).tails == ((0.0,),)


def test_costs_of_several_tails():
    """4 shared calls up to the step, 4 nodes, each with 6 + 3 + 2 calls behind it; one edge a noise."""
    plan = one_step()
    assert plan.leaves_per_root == 12 and plan.num_edges(5) == 5 * 4
    assert plan.calls() == 4 + 4 * (6 + 3 + 2) and plan.calls(5) == 5 * plan.calls()


def test_costs_of_several_tails_by_heun():
    """ODE steps cost two calls, but those that end at 0: 2 * 3 before, 1 at the step, 11 + 5 + 3 behind it."""
    assert one_step(solver="heun").calls() == 2 * 3 + 1 + 4 * (11 + 5 + 3)
    assert one_step(solver="dpmpp_2m").calls() == one_step().calls()


def test_several_tails_in_a_tree():
    """By hand: 1 + 2*2 calls in the head (steps 0, 1, 2), then 6 nodes with 7 and 4 steps left."""
    plan = branch_at(TEN, [0, 2], [2, 3], rest="ode").with_strides((1, 2))
    assert plan.leaves_per_root == 12 and plan.num_edges() == 2 + 6
    assert plan.calls() == 1 + 2 + 2 + 6 * (7 + 4)


def test_strides_and_noise_are_part_of_the_value():
    plan = one_step().with_noise({3: 2.0})
    assert plan == one_step().with_noise({3: 2.0}) and hash(plan) == hash(one_step().with_noise({3: 2.0}))
    assert plan != one_step() and plan != plan.with_strides((1, 2)) and pickle.loads(pickle.dumps(plan)) == plan
    assert plan.with_solver("heun").strides == (1, 2, 3) and plan.with_strides([1]).strides == (1,)


# ---- noise factors


def test_noise_is_one_unless_told():
    assert all_steps(TEN).noise == (1.0,) * 10
    assert all_steps(TEN).with_noise({0: 4.0, 3: 0.5}).noise == (4.0, 1.0, 1.0, 0.5, *[1.0] * 6)
    assert all_steps(TEN).with_noise({0: 4.0}).with_noise({1: 2.0}).noise[:3] == (4.0, 2.0, 1.0)
    assert all_steps(TEN).with_noise({0: 4.0}).with_fanout({0: 2}).noise[0] == 4.0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: one_step(strides=()), "strides=(): give different whole numbers of at least 1, such as (1, 2)"),
        (lambda: one_step(strides=(0, 1)), "strides=(0, 1): give different whole numbers"),
        (lambda: one_step(strides=(2, 2)), "strides=(2, 2): give different whole numbers"),
        (lambda: deterministic(TEN).with_strides((1, 2)), "without a stochastic step would walk the same ODE several"),
        (lambda: all_steps(TEN).with_strides((1, 2)), "make equal tails of the 1 steps behind the last stochastic one"),
        (lambda: one_step(strides=(6, 7)), "leave out strides above 6, or put the stochastic step earlier"),
        (lambda: Plan(times=(1, 0.5, 0), stochastic=(True, False), fanout=(1, 1), noise=(1.0,)), "and noise 1; give"),
    ],
)
def test_bad_tails_and_factors_say_what_and_why(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


# ---- MixGRPO-Flash's shortened tail


def test_flash_takes_the_published_number_of_evaluations():
    """Window of 4 in 25 steps at place l, 0.4 of the steps behind it: 16 on average in the paper."""
    found = [deterministic(compress_tail(TIMES, start + 3, 0.4)).calls() for start in range(15)]
    assert found == [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18, 19, 19, 20]
    assert sum(found) / 15 == pytest.approx(15.6)
    assert deterministic(compress_tail(TIMES, 3, 0.2)).calls() == 7


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 25])
def test_every_tail_ends_at_zero_and_keeps_three_points_where_the_grid_has_them(share, num_steps):
    grid = shifted_times(num_steps, 3.0).tolist()
    for step in range(num_steps):
        short = compress_tail(grid, step, share)
        left = num_steps - step  # points behind the step
        kept = len(short) - 1 - step
        assert list(short[: step + 2]) == grid[: step + 2]  # the stochastic step itself ends where it did
        assert short[-1] == 0.0 and all(b < a for a, b in zip(short, short[1:], strict=False))
        assert min(3, left) <= kept <= left and kept <= max(3, left * share + 1e-6)


def test_a_share_of_one_changes_nothing():
    for step in range(25):
        assert compress_tail(TIMES, step, 1.0) == pytest.approx(TIMES.tolist(), abs=1e-7)


def test_points_are_equally_spaced_in_the_grids_index():
    """On equal steps the tail has equal steps again; on the shifted grid it is the public code's up to 0.002."""
    short = compress_tail(TEN, 3, 0.6)  # 4 points from .6 to 0
    assert short[4:] == pytest.approx([0.6, 0.4, 0.2, 0.0])
    for step in range(3, 24):
        tail = torch.tensor(compress_tail(TIMES, step, 0.4)[step + 1 :])
        u = torch.linspace(1 - (step + 1) / 25, 0, len(tail))
        assert (tail - 3 * u / (1 + 2 * u)).abs().max() < 2e-3


@pytest.mark.parametrize("step, share", [(3, 0.0), (3, -0.1), (3, 1.1), (10, 0.4), (-1, 0.4)])
def test_an_impossible_tail_is_refused(step, share):
    with pytest.raises(ValueError, match=r"share lies in \(0, 1\], and the step must exist"):
        compress_tail(TEN, step, share)
