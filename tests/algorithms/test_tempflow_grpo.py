"""TempFlow-GRPO: one branching step a root, exact credit, and gradients that do not fade or explode over time."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.tempflow_grpo import TempFlowGRPO
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, train

NAN = float("nan")


def plans(algorithm, iteration=0, k=8):
    return algorithm.plan(linear_times(algorithm.num_steps), iteration, k, 0)


def step_of_root(batch, each):
    """The step at which each root of `each` samples branched."""
    edges = batch.trajectory
    roots = edges.leaves.int().argmax(1) // each
    return [edges.step[roots == root].unique().tolist() for root in range(edges.num_leaves // each)]


def test_defaults_are_the_papers():
    record = TempFlowGRPO().model_dump()
    expected = {"num_steps": 10, "eta": 0.7, "clip_range": 1e-4, "adv_clip": 5.0, "kl_coef": 0.0, "noise_weight": True}
    assert {name: record[name] for name in expected} == expected
    assert {p.stochastic_steps for p in plans(TempFlowGRPO())} == {(k,) for k in range(5)}


def test_each_plan_branches_at_its_only_stochastic_step():
    algorithm = TempFlowGRPO(num_steps=6, steps=(1, 3), branches=4)
    for iteration in range(4):
        found = plans(algorithm, iteration)
        assert [p.stochastic_steps for p in found] == [((1, 3)[(iteration + i) % 2],) for i in range(2)]
        for plan in found:
            (k,) = plan.stochastic_steps
            assert plan.fanout == tuple(4 if step == k else 1 for step in range(6))


def test_prompts_take_turns_and_meet_every_step():
    algorithm = TempFlowGRPO(num_steps=6, steps=(0, 1, 2))
    met = [step_of_root(collect(algorithm, ToyPolicy(), iteration), 8) for iteration in range(3)]
    assert met[0] == [[0], [1], [2], [0]]
    for prompt in range(4):
        assert sorted(met[iteration][prompt][0] for iteration in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("k", range(5))
def test_a_prompt_costs_its_prefix_once_and_g_tails(k):
    policy = ToyPolicy()
    batch = collect(TempFlowGRPO(num_steps=6, steps=(k,)), policy, num_prompts=3)
    assert policy.calls["current"] == batch.trajectory.calls == 3 * (k + 1 + 8 * (6 - k - 1))
    assert len(batch.trajectory) == 3 * 8
    assert len(batch.trajectory.state.unique()) == 3


def test_branches_differ_by_the_noise_of_their_step_alone():
    batch = collect(TempFlowGRPO(num_steps=6, steps=(2,)), ToyPolicy(), num_prompts=2)
    starts = batch.trajectory.x.view(2, 8, 2)
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert len(batch.trajectory.x_next.unique(dim=0)) == len(batch.trajectory.x0.unique(dim=0)) == 16


@pytest.mark.parametrize(("compare", "size"), [("branches", 4), ("prompt", 8)])
def test_credit_is_the_z_score_of_the_branch(compare, size):
    algorithm = TempFlowGRPO(num_steps=6, branches=4, compare=compare, adv_floor=0.0)
    batch = collect(algorithm, ToyPolicy())
    groups = batch.rewards.view(-1, size)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    leaf = batch.trajectory.leaves.int().argmax(1)
    assert (batch.trajectory.leaves.sum(1) == 1).all() and leaf.sort().values.tolist() == list(range(32))
    torch.testing.assert_close(batch.advantages, expected.flatten()[leaf].float())


def test_a_branch_without_a_verdict_is_as_if_never_drawn():
    algorithm = TempFlowGRPO(num_steps=6, branches=4, adv_floor=0.0)
    batch = collect(algorithm, ToyPolicy())
    batch.rewards[2] = NAN
    credit = algorithm.credit(batch)[batch.trajectory.leaves.int().argmax(1).argsort()]
    known = batch.rewards[[0, 1, 3]]
    expected = (known - known.mean()) / (known.std(correction=0) + 1e-4)
    torch.testing.assert_close(credit[:4], torch.tensor([*expected[:2], NAN, expected[2]]).float(), equal_nan=True)
    assert not credit[4:].isnan().any()


def test_a_floor_keeps_late_differences_small():
    algorithm = TempFlowGRPO(num_steps=6)
    batch = collect(algorithm, ToyPolicy())
    batch.rewards = 0.5 + 1e-5 * torch.arange(32).double()
    assert algorithm.credit(batch).abs().max() < 0.05
    assert algorithm.model_copy(update={"adv_floor": 0.0, "adv_eps": 1e-8}).credit(batch).abs().max() > 1


# ------------------------------------------------------------------------------------------------ the noise's weight


def flow_std(times, k, eta):
    """sigma_k sqrt(dt_k) as published: eta sqrt(t / (1 - t)) sqrt(dt), and eta at t = 1."""
    t, h = times[k], times[k] - times[k + 1]
    return eta if t == 1 else eta * (t / (1 - t)) ** 0.5 * h**0.5


def test_the_weight_is_the_std_over_its_mean_over_the_steps():
    algorithm = TempFlowGRPO(num_steps=6, steps=(0, 1, 3), eta=0.6)
    batch = collect(algorithm, ToyPolicy())
    std = {k: flow_std(batch.plans[0].times, k, 0.6) for k in (0, 1, 3)}
    mean = sum(std.values()) / 3
    expected = torch.tensor([std[int(k)] / mean for k in batch.trajectory.step])
    torch.testing.assert_close(algorithm.weight(batch), expected, rtol=1e-5, atol=0)
    part = replace(batch, trajectory=batch.trajectory.select(torch.tensor([5, 0])))
    torch.testing.assert_close(algorithm.weight(part), expected[[5, 0]], rtol=1e-5, atol=0)
    assert algorithm.model_copy(update={"noise_weight": False}).weight(batch) is None


class Watched(ToyPolicy):
    """Keeps the velocity that a loss asked for, so that its gradient can be read."""

    def velocity(self, x, t, cond):
        self.seen = super().velocity(x, t, cond).detach().requires_grad_()
        return self.seen


def pull(algorithm, steps=8):
    """|d loss / d v| / |A eps| of an edge for each branching step k, on a linear grid; eps is the edge's own noise."""
    grid, found = linear_times(steps), []
    for iteration in range(len(algorithm.steps)):
        policy = Watched()
        batch = collect(algorithm, policy, iteration, num_prompts=1)
        assert batch.plans[0].times == tuple(grid.tolist())
        edge = replace(batch, trajectory=batch.trajectory.select(torch.tensor([3])), advantages=batch.advantages[3:4])
        algorithm.loss(policy, edge).value.backward()
        t = edge.trajectory
        eps = (t.x_next - algorithm.kernel(t.x, policy.seen.detach(), t.t, t.t_next, t.eta).mean) / flow_std(
            grid.tolist(), int(t.step), algorithm.eta
        )
        found.append(float(policy.seen.grad.norm() / (edge.advantages.abs() * eps.norm() / 2)))
    return found


def test_weighted_gradients_are_flat_in_time():
    """|d logp / d v| = (1 + eta^2 / 2) dt / std |eps| / D: times std it is the same at all t but 1, where it is dt."""
    eta, h = 0.7, 1 / 8
    algorithm = TempFlowGRPO(num_steps=8, shift=1.0, steps=(0, 1, 2, 3, 4, 5, 6), eta=eta)
    grid = linear_times(8).tolist()
    mean = sum(flow_std(grid, k, eta) for k in range(7)) / 7
    expected = [h / mean] + [(1 + eta**2 / 2) * h / mean] * 6
    assert pull(algorithm) == pytest.approx(expected, rel=1e-3)
    plain = pull(algorithm.model_copy(update={"noise_weight": False}))
    expected = [factor * mean / flow_std(grid, k, eta) for k, factor in enumerate(expected)]
    assert plain == pytest.approx(expected, rel=1e-3)
    assert plain[6] > 2 * plain[1]


# ------------------------------------------------------------------------------------------------ refusals, learning


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": (0, 9)}, r"steps=\[0, 9\] must name different steps from 0 to 8"),
        ({"steps": (1, 1)}, "different"),
        ({"steps": ()}, "at least one"),
        ({"branches": 1}, "greater than or equal to 2"),
        ({"compare": "batch"}, "branches"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        TempFlowGRPO(**fields)


@pytest.mark.parametrize(
    ("k", "message"),
    [(1, "at least 2"), (8, "samples_per_prompt=8 is no multiple of branches=3.*set branches to null")],
)
def test_groups_that_cannot_branch_are_refused(k, message):
    with pytest.raises(ValueError, match=message):
        plans(TempFlowGRPO(branches=3), k=k)


@pytest.mark.parametrize("changes", [{}, {"branches": 4, "compare": "prompt"}], ids=["branches", "prompt"])
def test_it_learns(changes):
    _, records = train(TempFlowGRPO(num_steps=6, **changes), iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
