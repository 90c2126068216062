"""Plans: published window schedules, costs counted by hand, and messages a person can act on."""

import pickle
import re

import pytest
import torch

from samplers import (
    Plan,
    all_steps,
    branch_at,
    deterministic,
    linear_times,
    random_subset,
    random_window,
    shifted_times,
    sliding_window,
    subset,
    window,
    window_dwell,
    window_start,
)

TIMES = shifted_times(25, 3.0)
STRATEGIES = ["progressive", "random", "decay", "exp_decay", "frozen"]


def starts(iterations, **kwargs):
    return [window_start(i, num_steps=25, **kwargs) for i in iterations]


def stays(strategy, **kwargs):
    """Run lengths of the window's starts over one sweep."""
    sequence = starts(range(700), strategy=strategy, roll_back=False, **kwargs)
    return [sequence.count(start) for start in sorted(set(sequence))][:-1]


def test_all_steps_leaves_the_last_to_the_ode():
    plan = all_steps(TIMES)
    assert plan.stochastic == (True,) * 24 + (False,)
    assert plan.num_stochastic == 24 and plan.leaves_per_root == 1
    assert plan.calls(3) == 75 and plan.num_edges(3) == 72
    assert torch.equal(plan.grid(), TIMES)


def test_window_and_subset_and_deterministic():
    assert window(TIMES, 3, 4).stochastic_steps == (3, 4, 5, 6)
    assert subset(TIMES, [9, 1, 4]).stochastic_steps == (1, 4, 9)
    assert deterministic(TIMES, "heun").num_stochastic == 0
    assert deterministic(TIMES, "heun").calls() == 2 * 24 + 1
    assert window(TIMES, 0, 24, solver="heun").calls() == 25


# ---- MixGRPO's window


def test_decay_dwell_times():
    got = [window_dwell(s, num_steps=25, shift_every=10, strategy="decay") for s in range(24)]
    assert got == [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1]


def test_exponential_decay_dwell_times():
    got = [window_dwell(s, num_steps=25, strategy="exp_decay") for s in range(24)]
    assert got == [25] * 14 + [23, 21, 19, 17, 16, 14, 13, 12, 11, 10]


def test_progressive_window_moves_every_25_iterations_and_rolls_back():
    assert starts([0, 24, 25, 49, 50, 499]) == [0, 0, 1, 1, 2, 19]
    assert starts([500, 524, 525, 549, 550]) == [20, 20, 0, 0, 1]
    assert starts([525, 10_000], roll_back=False) == [20, 20]


def test_progressive_window_without_overlap():
    assert starts(range(0, 175, 25), stride=4) == [0, 4, 8, 12, 16, 20, 0]


def test_a_stride_that_does_not_fit_still_reaches_the_last_trainable_step():
    sweep = [window_start(i, num_steps=25, width=5, stride=5, shift_every=1) for i in range(6)]
    assert sweep == [0, 5, 10, 15, 19, 0]


@pytest.mark.parametrize("strategy, shift_every", [("progressive", 25), ("decay", 10), ("exp_decay", 25)])
def test_the_window_stays_as_long_as_the_dwell_says(strategy, shift_every):
    dwell = [window_dwell(s, num_steps=25, shift_every=shift_every, strategy=strategy) for s in range(20)]
    assert stays(strategy, shift_every=shift_every) == dwell


def test_random_starts_are_inclusive_at_both_ends_and_even():
    drawn = starts(range(4200), strategy="random")
    assert set(drawn) == set(range(21))
    assert all(120 < drawn.count(start) < 285 for start in range(21))
    assert drawn[:50] == starts(range(50), strategy="random") != starts(range(50), strategy="random", seed=1)


def test_frozen_never_moves():
    assert set(starts(range(0, 1000, 37), strategy="frozen")) == {0}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("width, stride", [(1, 1), (4, 1), (4, 4), (5, 3), (24, 2)])
@pytest.mark.parametrize("roll_back", [True, False])
def test_windows_are_never_empty_or_cut_and_leave_the_last_step_alone(strategy, width, stride, roll_back):
    seen = set()
    for iteration in range(0, 130):
        plan = sliding_window(TIMES, iteration, width, stride, 3, strategy, roll_back=roll_back)
        steps = plan.stochastic_steps
        assert len(steps) == width and steps == tuple(range(steps[0], steps[0] + width)) and steps[-1] <= 23
        seen.update(steps)
    if strategy not in ("frozen",):
        assert seen == set(range(24)), "every step but the last is trained at some time"


# ---- random windows and subsets


def test_flow_grpo_fast_window_is_inclusive_at_both_ends():
    drawn = [random_window(linear_times(10), i, size=2, low=0, high=5).stochastic_steps for i in range(400)]
    assert set(drawn) == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert {random_window(linear_times(10), i).stochastic_steps for i in range(200)} == set(drawn)
    assert {random_window(linear_times(10), i, 3, 2, 5).stochastic_steps for i in range(9)} == {(2, 3, 4)}


def test_random_subset_may_have_gaps_and_depends_on_the_iteration_only():
    drawn = [random_subset(linear_times(10), i, [1, 2, 3, 7], 2).stochastic_steps for i in range(300)]
    assert len(set(drawn)) == 6 and all(len(steps) == 2 for steps in drawn)
    assert drawn == [random_subset(linear_times(10), i, [7, 3, 2, 1], 2).stochastic_steps for i in range(300)]


# ---- trees


def test_branch_grpo_tree_costs_203_calls():
    """By hand, T = 20 and two children at 0, 3, 6, 9: 1 + 3*2 + 3*4 + 3*8 + 10*16 = 203 calls, 12.69 per leaf."""
    plan = branch_at(shifted_times(20, 3.0), (0, 3, 6, 9), 2)
    assert plan.leaves_per_root == 16 and plan.calls() == 203 and plan.calls(5) == 1015
    # The last step is an ODE step here, so 16 of the published 218 edges are not there.
    assert plan.num_edges() == 218 - 16


def test_branching_steps_alone_may_be_stochastic():
    plan = branch_at(linear_times(10), [3], 6, rest="ode")
    assert plan.stochastic_steps == (3,) and plan.calls() == 4 + 6 * 6 and plan.num_edges() == 6


def test_fanout_may_differ_per_step():
    plan = branch_at(linear_times(6), [0, 2], [3, 2])
    assert plan.fanout == (3, 1, 2, 1, 1, 1) and plan.leaves_per_root == 6 and plan.calls() == 1 + 3 + 3 + 6 * 3


def test_a_shared_prefix_is_paid_once():
    """12 samples of one noise, window at 5..8 of 25: 6 shared calls, then 12 * 19, instead of 12 * 25."""
    plan = window(TIMES, 5, 4).with_fanout({5: 12})
    assert plan.leaves_per_root == 12 and plan.calls() == 6 + 12 * 19 and plan.num_edges() == 48


# ---- the value itself


def test_a_plan_is_a_value():
    plan = window(TIMES, 5, 4)
    assert plan == window(TIMES.tolist(), 5, 4) and hash(plan) == hash(window(TIMES, 5, 4))
    assert plan != window(TIMES, 6, 4) and plan.with_solver("heun").solver == "heun"
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan == Plan(times=TIMES, stochastic=torch.tensor(plan.stochastic), fanout=list(plan.fanout))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: deterministic([1.0]), "at least two entries"),
        (lambda: deterministic([1.0, 0.5, 0.1]), "exactly 0 (data), got 1 to 0.1; a grid that stops early"),
        (lambda: deterministic([1000.0, 500.0, 0.0]), "Divide timesteps by 1000"),
        (lambda: deterministic([1.0, 0.5, 0.5, 0.0]), "step 1 goes 0.5 -> 0.5; sort the grid"),
        (lambda: deterministic([1.0, float("nan"), 0.0]), "step 0 goes 1 -> nan"),
        (
            lambda: Plan(times=(1, 0), stochastic=(True, False), fanout=(1,)),
            "2 times make 1 steps, but stochastic has 2",
        ),
        (lambda: Plan(times=(1, 0), stochastic=(True,), fanout=(0,)), "fanout at step 0 is 0; 1 means no branching"),
        (lambda: deterministic([1.0, 0.0]).with_fanout({0: 4}), "its 4 children would be identical; branch at a stoch"),
        (lambda: all_steps(TIMES).with_fanout({25: 2}), "cannot branch at steps [25]: the plan has steps 0 to 24"),
        (lambda: deterministic(TIMES, "dpm"), "unknown ODE solver 'dpm'; choose one of euler, heun, dpmpp_2m"),
        (lambda: window(TIMES, 23, 4), "a window of 4 steps from step 23 does not lie in steps 0 to 24"),
        (lambda: all_steps([1.0, 0.0]), "needs two steps"),
        (lambda: subset(TIMES, [3, -1]), "steps [-1] lie outside"),
        (lambda: branch_at(TIMES, [30]), "steps [30] lie outside"),
        (lambda: branch_at(TIMES, [0, 3], [2]), "2 branching steps need 2 fan-outs"),
        (lambda: random_window(linear_times(10), 0, 4, 2, 5), "does not fit into steps [2, 5) of 10"),
        (lambda: random_subset(TIMES, 0, [1, 2], 3), "cannot draw 3 stochastic steps out of 2"),
        (lambda: sliding_window(linear_times(4), 0), "the width at most num_steps - 1"),
        (lambda: sliding_window(TIMES, 0, shift_every=0), "shift_every and min_every are at least 1"),
        (
            lambda: sliding_window(TIMES, 0, strategy="sideways"),
            "unknown window strategy 'sideways'; choose one of prog",
        ),
    ],
)
def test_bad_plans_say_what_why_and_how_to_fix(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
