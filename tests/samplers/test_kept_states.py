"""States that a rollout keeps for training, and steps along their mean velocity."""

import pytest
import torch

from samplers import (
    branch_at,
    dance_sde,
    deterministic,
    euler,
    linear_times,
    noise_source,
    rollout,
    rows,
    shifted_times,
    window,
)
from tests.samplers.toys import ToyNet, gaussian_velocity

SHAPE = (2, 3)
NET = ToyNet(SHAPE)
TIMES = shifted_times(6, 3.0)


def walk(plan, net=NET, num=4, micro_batch=None, order=None, **kwargs):
    roots = torch.arange(num) if order is None else order
    noise = noise_source(SHAPE, seed=0, iteration=0, prompt=roots)
    x = noise(torch.arange(num), torch.zeros(num).long(), -1)
    return rollout(
        net, x, plan, dance_sde, eta=0.5, prompt=roots // 2, group=roots // 2, noise=noise, micro_batch=micro_batch,
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_what_is_kept_is_what_the_velocity_was_asked(solver):
    asked = []

    def net(x, t, prompt):
        v = NET(x, t, prompt)
        asked.append((float(t[0]), x.clone(), v.clone()))
        return v

    plan = deterministic(TIMES, solver=solver).with_kept([4, 0, 1])
    r = walk(plan, net)
    assert r.visited.shape == (4, 3, 2, *SHAPE) and plan.kept == (0, 1, 4)
    for place, step in enumerate(plan.kept):
        x, v = [(x, v) for t, x, v in asked if t == float(plan.grid()[step])][-1]  # heun's step before asks there too
        torch.testing.assert_close(r.visited[:, place, 0], x, rtol=0, atol=0)
        torch.testing.assert_close(r.visited[:, place, 1], v, rtol=0, atol=0)


def test_keeping_costs_no_call_and_changes_no_sample():
    with_states, without = walk(deterministic(TIMES).with_kept(range(6))), walk(deterministic(TIMES))
    assert with_states.calls == without.calls == 24 and len(with_states) == 0
    torch.testing.assert_close(with_states.x0, without.x0, rtol=0, atol=0)
    assert without.visited is None


def test_states_depend_neither_on_batching_nor_on_order():
    plan = deterministic(TIMES, solver="dpmpp_2m").with_kept([1, 3])
    whole, order = walk(plan), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(walk(plan, micro_batch=3).visited, whole.visited, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(walk(plan, order=order).visited, whole.visited[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.reorder_leaves(order).visited, whole.visited[order], rtol=0, atol=0)


def test_in_a_tree_every_leaf_has_the_states_of_its_own_way():
    """Before the split siblings share a state, behind it each keeps its own: that which its edge led to."""
    r = walk(branch_at(linear_times(4), [1], 3).with_kept([0, 2]), num=2)
    assert r.visited.shape[:2] == (6, 2)
    before, behind = r.visited[:, 0, 0].view(2, 3, *SHAPE), r.visited[:, 1, 0]
    assert torch.equal(before, before[:, :1].expand_as(before))
    at_split = r.select(r.step == 1)
    torch.testing.assert_close(behind, at_split.x_next[at_split.leaves.int().argmax(0)], rtol=0, atol=0)


def test_pruned_samples_take_their_states_along():
    plan = deterministic(TIMES).with_kept([0, 3])
    keep = torch.tensor([True, False, True, True])
    pruned = walk(plan, prune=lambda step, x0, root, member: keep if step == 2 else None)
    torch.testing.assert_close(pruned.visited, walk(plan).visited[keep], rtol=1e-6, atol=1e-6)


def test_kept_steps_must_exist_rise_and_belong_to_one_way():
    with pytest.raises(ValueError, match=r"steps \[6\] lie outside this grid, whose steps are 0 to 5"):
        deterministic(TIMES).with_kept([6])
    with pytest.raises(ValueError, match="different steps in rising order"):
        deterministic(TIMES).with_kept([2, 2])
    with pytest.raises(ValueError, match="tails walk other steps"):
        window(TIMES, 0, 2).with_strides((1, 2)).with_kept([1])
    with pytest.raises(ValueError, match="mean velocity of its whole length"):
        deterministic(TIMES, solver="average").with_kept([1])
    with pytest.raises(ValueError, match="whose steps are 0 to 2"):
        deterministic(TIMES, until=3).with_kept([3])


def mean_velocity(x, t, prompt, t_next, mean=2.0, std=0.5):
    """(x_t - x_r) / (t - r) of the exact ODE for data N(mean, std^2), which keeps a state's standard deviations."""
    t, r = rows(t, x), rows(t_next, x)
    width, width_next = (((1 - s) * std).square().add(s**2).sqrt() for s in (t, r))
    return (x - ((1 - r) * mean + width_next / width * (x - (1 - t) * mean))) / (t - r)


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_along_the_mean_velocity_have_no_error(steps):
    """A mean velocity ends where the ODE of the velocity itself ends, in however few steps."""
    few = walk(deterministic(linear_times(steps), solver="average"), mean_velocity)
    many = walk(deterministic(linear_times(2_000), solver="heun"), lambda x, t, prompt: gaussian_velocity(x, t))
    torch.testing.assert_close(few.x0, many.x0, rtol=0, atol=2e-3)
    assert few.calls == 4 * steps
    coarse = walk(deterministic(linear_times(steps), solver="euler"), lambda x, t, prompt: gaussian_velocity(x, t))
    assert (coarse.x0 - many.x0).abs().max() > 0.1


def test_only_the_ode_steps_of_that_solver_are_told_where_they_end():
    """Stochastic steps are made of the velocity at their beginning, whatever the solver of the others."""
    told = []

    def net(x, t, prompt, t_next=None):
        told.append((float(t[0]), None if t_next is None else t_next.tolist()))
        return NET(x, t, prompt)

    walk(window(linear_times(4), 1, 1).with_solver("average"), net, micro_batch=3)
    # Four roots in portions of three and one, times 1, 0.75, 0.5 and 0.25.
    expected = [(1.0, 0.75), (0.75, None), (0.5, 0.25), (0.25, 0.0)]
    assert told == [(t, r if r is None else [r] * n) for t, r in expected for n in (3, 1)]
    r = walk(deterministic(linear_times(1), solver="average"), net)
    x = noise_source(SHAPE, seed=0, iteration=0, prompt=torch.arange(4))(torch.arange(4), torch.zeros(4).long(), -1)
    t = torch.ones(4)
    torch.testing.assert_close(r.x0, euler(x, NET(x, t, torch.arange(4) // 2), t, 0 * t), rtol=0, atol=0)
