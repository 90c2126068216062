"""MixGRPO: the paper's defaults and the window's way through training."""

import pytest
from pydantic import ValidationError

from flowrl.algorithms.mix_grpo import MixGRPO
from samplers import linear_times

TIMES = linear_times(25)


def starts(algorithm, iterations, seed=0):
    plans = [algorithm.plan(TIMES, iteration, 4, seed) for iteration in range(iterations)]
    for plan in plans:
        first = plan.stochastic_steps[0]
        assert plan.stochastic_steps == tuple(range(first, first + algorithm.window))
    return [plan.stochastic_steps[0] for plan in plans]


def dwells(places):
    """How long the window stays at each place, in order."""
    runs = []
    for i, place in enumerate(places):
        if i == 0 or place != places[i - 1]:
            runs.append([place, 0])
        runs[-1][1] += 1
    return [tuple(run) for run in runs]


def public_state_machine(iterations, width=4, stride=1, every=25, num_steps=25):
    """The authors' counter, with the window kept whole: it turns back after the last place where all of it fits."""
    left, counter, last, places = 0, 0, num_steps - 1 - width, []
    for _ in range(iterations):
        places.append(left)
        counter += 1
        if counter == every:
            counter, left = 0, left + stride
            if left > last:
                left = 0
    return places


def test_defaults_are_the_papers():
    record = MixGRPO().model_dump()
    expected = {"num_steps": 25, "window": 4, "stride": 1, "shift_every": 25, "eta": 0.7, "clip_range": 1e-4}
    assert {name: record[name] for name in expected} == expected
    assert (record["strategy"], record["roll_back"], record["adv_std"], record["kl_coef"]) == (
        "progressive",
        True,
        "group",
        0,
    )


def test_progressive_is_the_public_schedule():
    assert starts(MixGRPO(), 700) == public_state_machine(700)
    assert starts(MixGRPO(shift_every=20), 500) == public_state_machine(500, every=20)


def test_without_roll_back_the_window_stays_at_the_end():
    places = starts(MixGRPO(shift_every=2, roll_back=False), 60)
    assert places[:42] == [i // 2 for i in range(42)]
    assert set(places[42:]) == {20}


def test_decay_dwells_as_published():
    found = dwells(starts(MixGRPO(strategy="decay", shift_every=10), 120))
    published = [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2]
    assert found[:21] == list(enumerate(published))


def test_exp_decay_dwells_as_published():
    found = dwells(starts(MixGRPO(strategy="exp_decay"), 500))
    assert found[:21] == list(enumerate([25] * 14 + [23, 21, 19, 17, 16, 14, 13]))


def test_exp_decay_keeps_its_shape_on_short_grids():
    """The published threshold of 13 would lie beyond the end of 10 steps."""
    algorithm = MixGRPO(strategy="exp_decay", num_steps=10, window=1)
    places = [algorithm.plan(linear_times(10), i, 4, 0).stochastic_steps[0] for i in range(220)]
    assert dwells(places)[:9] == [(0, 25), (1, 25), (2, 25), (3, 25), (4, 25), (5, 23), (6, 21), (7, 19), (8, 17)]


def test_random_draws_every_place():
    places = starts(MixGRPO(strategy="random"), 300)
    assert set(places) == set(range(21))
    assert places != starts(MixGRPO(strategy="random"), 300, seed=1)


def test_frozen_is_flash_star():
    assert set(starts(MixGRPO(strategy="frozen"), 100)) == {0}


def test_shared_noise_branches_at_the_window():
    plan = MixGRPO().plan(TIMES, 60, 12, 0)
    assert plan.stochastic_steps == (2, 3, 4, 5)
    assert plan.fanout == (1, 1, 12, *[1] * 22)
    assert MixGRPO(shared_noise=False).plan(TIMES, 60, 12, 0).leaves_per_root == 1


def test_the_solver_is_that_of_the_ode_steps():
    assert MixGRPO(solver="dpmpp_2m").plan(TIMES, 0, 12, 0).solver == "dpmpp_2m"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 25}, "window of 25 steps does not fit into num_steps=25.*window <= 24"),
        ({"num_steps": 4}, "window <= 3"),
        ({"window": 0}, "at least 1"),
        ({"stride": 0}, "at least 1"),
        ({"shift_every": 0}, "at least 1"),
        ({"strategy": "backwards"}, "progressive"),
        ({"solver": "rk4"}, "euler"),
        ({"sde": "cps", "eta": 1.5}, r"eta in \(0, 1\]"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        MixGRPO(**fields)
