"""Plans that end before t = 0, for what goes on from there with a graph."""

import pytest
import torch

from samplers import Plan, deterministic, linear_times, noise_source, rollout, subset


def walk(plan):
    index = torch.arange(6)
    noise = noise_source((3,), seed=0, iteration=0, prompt=index)
    x = noise(index, torch.zeros_like(index), -1)
    return x, rollout(lambda x, t, i: x.sin() + t[:, None], x, plan, prompt=index, group=index)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_two_rollouts_after_one_another_are_one(solver):
    """The state after `until` steps is that of the whole walk: going on from it by Euler's steps ends where it does."""
    times = linear_times(5)
    for until in range(6):
        plan = deterministic(times, solver=solver, until=until)
        x, part = walk(plan)
        if until == 0:
            assert torch.equal(part.x0, x)
        assert part.calls == plan.calls(6)
        if solver == "euler":
            state = part.x0
            for now, then in zip(times[until:-1], times[until + 1 :], strict=True):
                state = state - (now - then) * (state.sin() + now)
            torch.testing.assert_close(state, walk(deterministic(times))[1].x0)


def test_all_steps_are_the_whole_plan():
    for solver in ("euler", "dpmpp_2m", "heun"):
        whole = deterministic(linear_times(5), solver=solver)
        part = deterministic(linear_times(5), solver=solver, until=5)
        assert torch.equal(walk(whole)[1].x0, walk(part)[1].x0) and whole.calls() == part.calls()


def test_calls_are_those_of_the_steps_that_are_walked():
    assert [deterministic(linear_times(5), until=n).calls(3) for n in range(6)] == [0, 3, 6, 9, 12, 15]
    assert deterministic(linear_times(5), solver="heun", until=2).calls() == 4


def test_an_end_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="until=6 .* choose from 0 to 5"):
        deterministic(linear_times(5), until=6)
    stochastic = subset(linear_times(5), [2])
    with pytest.raises(ValueError, match="until=2 .* choose from 3 to 5"):
        Plan(times=stochastic.times, stochastic=stochastic.stochastic, fanout=stochastic.fanout, until=2)
    with pytest.raises(ValueError, match="until=3 ends before several tails"):
        Plan(times=linear_times(4), stochastic=(False,) * 4, fanout=(1,) * 4, strides=(1, 2), until=3)
