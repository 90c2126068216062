"""Several tails, noise factors, state numbers and kept means of a rollout, against loops written out by hand."""

import re

import pytest
import torch
from torch.distributions import Normal

from samplers import (
    Trajectory,
    all_steps,
    branch_at,
    cps,
    dance_sde,
    flow_sde,
    gaussian_logprob,
    keyed_noise,
    noise_source,
    rollout,
    shifted_times,
    subset,
    window,
)
from tests.samplers.toys import ToyNet, gaussian_velocity

TIMES = shifted_times(8, 3.0)
SHAPE = (2, 3, 3)
NET = ToyNet(SHAPE)
ETA = 0.6
STRIDES = (1, 2, 4)
PLANS = {
    "one step": subset(TIMES, [2]).with_fanout({2: 3}).with_strides(STRIDES),
    "from the start": subset(TIMES, [0]).with_fanout({0: 2}).with_strides((1, 3)),
    "tree": branch_at(TIMES, [0, 2], [2, 3], rest="ode").with_strides((1, 2)),
    "window": window(TIMES, 1, 3, solver="dpmpp_2m").with_fanout({1: 2}).with_strides((1, 2)),
    "heun": window(TIMES, 2, 2, solver="heun").with_fanout({2: 2}).with_strides((2, 3)),
    "noise": window(TIMES, 1, 3).with_fanout({1: 2}).with_noise({1: 1.7, 3: 0.4}).with_strides((1, 2)),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def walk(plan, kernel=flow_sde, roots=4, net=NET, **options):
    """Roots 0, 1, ...; prompts and groups 0, 0, 1, 1, ..."""
    index = torch.arange(roots)
    noise = noise_source(SHAPE, seed=0, iteration=0, prompt=index)
    options = {"eta": ETA, "noise": noise, **options}
    return rollout(net, noise(index, index * 0, -1), plan, kernel, prompt=index // 2, group=index // 2, **options)


def closed_form(x, t, prompt):
    return gaussian_velocity(x, t, mean=1.0)


# ---- tails


def by_euler(x, times, prompt, before):
    for now, then in zip(times, times[1:], strict=False):
        x = x + (then - now) * NET(x, torch.full((len(x),), now), prompt)
    return x


def by_heun(x, times, prompt, before):
    for now, then in zip(times, times[1:], strict=False):
        v = NET(x, torch.full((len(x),), now), prompt)
        if then > 0:
            v = (v + NET(x + (then - now) * v, torch.full((len(x),), then), prompt)) / 2
        x = x + (then - now) * v
    return x


def by_dpmpp_2m(x, times, prompt, before):
    """As printed: lambda = log((1 - t) / t), D from the last two clean estimates; first order at the end."""
    t_before, x0_before = before
    for now, then in zip(times, times[1:], strict=False):
        x0 = x - now * NET(x, torch.full((len(x),), now), prompt)
        if then == 0:
            return x0
        lam = [torch.tensor((1 - s) / s).log() for s in (t_before, now, then)]
        h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
        d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        x = then / now * x - (1 - then) * (torch.exp(-h) - 1) * d
        t_before, x0_before = now, x0
    return x


LOOPS = {"euler": by_euler, "heun": by_heun, "dpmpp_2m": by_dpmpp_2m}


@pytest.mark.parametrize("solver", LOOPS)
def test_each_tail_is_the_solvers_loop_on_its_own_grid(solver):
    """From where the stochastic step ended; the multistep solver goes on from that step's clean estimate."""
    plan = PLANS["one step"].with_solver(solver)
    r = walk(plan)
    now, then = TIMES[2].item(), TIMES[3:].tolist()
    x0 = r.x - now * NET(r.x, r.t, r.prompt)
    for place, stride in enumerate(STRIDES):
        times = then[:-1:stride] + [0.0]
        expected = LOOPS[solver](r.x_next, times, r.prompt, (now, x0))
        assert torch.allclose(r.x0[place :: len(STRIDES)], expected, atol=2e-5), stride
    assert (r.x0[0] - r.x0[1]).abs().max() > 1e-4


@every_plan
def test_tails_are_told_apart_by_the_plan_with_one_of_them(plan):
    """A tail gives what it gives alone, at the places of its samples; noise is keyed by the place, so it is given."""
    r = walk(plan, net=closed_form)
    num = len(plan.strides)
    for place, stride in enumerate(plan.strides):
        noise = noise_source(SHAPE, seed=0, iteration=0, prompt=torch.arange(4))
        alone = walk(
            plan.with_strides((stride,)),
            net=closed_form,
            noise=lambda root, member, step, noise=noise: noise(root, member * num, step),
        )
        assert torch.allclose(r.x0[place::num], alone.x0, atol=1e-6)
        assert torch.equal(r.logprob, alone.logprob)


@every_plan
def test_leaves_stand_by_root_node_and_tail(plan):
    r, width, num = walk(plan), plan.leaves_per_root, len(plan.strides)
    assert r.num_leaves == 4 * width
    assert r.group.tolist() == r.leaf_prompt.tolist() == [root // 2 for root in range(4) for _ in range(width)]
    last = r.select(r.step == plan.head - 1)
    nodes = width // num
    for edge in range(len(last)):  # nodes of the last stochastic step in order, each with all its tails
        assert last.leaves[edge].nonzero().flatten().tolist() == list(range(edge * num, (edge + 1) * num))
        assert last.prompt[edge] == edge // nodes // 2
    assert (r.leaves.sum(1) % num == 0).all()


@every_plan
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_calls_are_those_of_the_plan(plan, micro_batch):
    seen, stored = [], []
    r = walk(
        plan,
        net=lambda x, t, p: seen.append(len(x)) or NET(x, t, p),
        stored_velocity=lambda x, t, p: stored.append(len(x)) or NET(x, t, p),
        micro_batch=micro_batch,
    )
    assert sum(seen) + sum(stored) == r.calls == plan.calls(4)
    assert sum(stored) == 4 * sum(plan.nodes(step) for step in plan.stochastic_steps)
    assert len(r) == plan.num_edges(4)


@pytest.mark.parametrize("solver", LOOPS)
def test_every_tail_ends_in_the_data(solver):
    """Velocity of the point mass at 1 is (x - 1) / t: one Euler step of any length to 0 ends there exactly."""
    plan = PLANS["one step"].with_solver(solver)
    r = walk(plan, net=lambda x, t, p: (x - 1) / t.view(-1, 1, 1, 1))
    assert torch.allclose(r.x0, torch.ones_like(r.x0), atol=1e-5)


def test_pruning_on_the_way_takes_a_node_with_all_its_tails():
    """The third node of every root leaves at its birth, so none of its tails is paid for."""
    plan = PLANS["one step"]
    whole = walk(plan, net=closed_form)
    alive = torch.arange(whole.num_leaves) % 9 < 6

    def prune(step, x0, root, member):
        return alive[root * 9 + member] if step == 3 else None

    pruned, after = walk(plan, net=closed_form, prune=prune), whole.keep_leaves(alive)
    for name in ("x", "x_next", "logprob", "leaves", "x0", "group", "state"):
        assert torch.equal(getattr(pruned, name), getattr(after, name)), name
    behind = [len(tail) - 1 for tail in plan.tails]
    assert whole.calls - pruned.calls == 4 * (sum(behind) - len(behind))  # each tail's first state was evaluated


# ---- several plans


def test_rollouts_of_several_plans_make_one_table_in_the_order_of_their_roots():
    """Roots 0, 2 follow one plan, 1 and 3 another; each has the samples and edges that its plan gives it alone."""
    plans, width = (PLANS["one step"], subset(TIMES, [4]).with_fanout({4: 9})), 9
    tables, orders = [], []
    for first, plan in enumerate(plans):
        roots = torch.arange(first, 4, 2)
        noise = noise_source(SHAPE, seed=0, iteration=0, prompt=roots)
        index = torch.arange(2)
        x = noise(index, index * 0, -1)
        tables.append(
            rollout(closed_form, x, plan, flow_sde, eta=ETA, prompt=roots, group=roots, noise=noise, keep_mean=True)
        )
        orders.append((roots[:, None] * width + torch.arange(width)).flatten())
    table = Trajectory.cat(tables).reorder_leaves(torch.cat(orders).argsort())
    assert table.group.tolist() == [root for root in range(4) for _ in range(width)]
    assert table.calls == plans[0].calls(2) + plans[1].calls(2) and len(table) == 2 * 3 + 2 * 9
    for root in range(4):
        plan = plans[root % 2]
        noise = noise_source(SHAPE, seed=0, iteration=0, prompt=torch.tensor([root]))
        zero = torch.zeros(1, dtype=torch.long)
        alone = rollout(
            closed_form, noise(zero, zero, -1), plan, flow_sde, eta=ETA, prompt=zero + root, group=zero, noise=noise
        )
        mine = table.select(table.prompt == root)
        assert torch.equal(table.x0[root * width : (root + 1) * width], alone.x0)
        assert torch.equal(mine.logprob, alone.logprob) and torch.equal(mine.step, alone.step)
        assert torch.equal(mine.leaves[:, root * width : (root + 1) * width], alone.leaves)
        assert mine.leaves.sum() == alone.leaves.sum()
    assert table.mean is not None and len(table.mean) == len(table)
    states = {number: table.x[table.state == number] for number in table.state.tolist()}
    assert sorted(states) == list(range(4)) and all((x == x[0]).all() for x in states.values())


# ---- state numbers


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_states_are_numbered_as_they_are_evaluated(plan, dtype, micro_batch):
    """What `stored_velocity` saw as its n-th state is the x, t and prompt of the edges with state n."""
    seen = []

    def record(x, t, prompt):
        seen.append((x, t, prompt))
        return NET(x, t, prompt)

    r = walk(plan, storage_dtype=dtype, micro_batch=micro_batch, stored_velocity=record)
    x, t, prompt = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(x[r.state], r.x.float()) and torch.equal(t[r.state], r.t)
    assert torch.equal(prompt[r.state], r.prompt)
    assert sorted(set(r.state.tolist())) == list(range(len(x)))


def test_numbers_outlive_pruning_and_selection():
    seen = []
    plan = all_steps(TIMES)
    r = walk(
        plan,
        stored_velocity=lambda x, t, p: seen.append(x) or NET(x, t, p),
        prune=lambda step, x0, root, member: root != 1 if step == 4 else None,
    )
    assert r.num_leaves == 3 and torch.equal(torch.cat(seen)[r.state], r.x)
    part = r.select(torch.tensor([7, 2, 5]))
    assert torch.equal(torch.cat(seen)[part.state], part.x)


def test_a_caller_may_keep_the_graph_of_stored_states():
    weight, kept = torch.ones((), requires_grad=True), []

    def record(x, t, prompt):
        with torch.enable_grad():
            kept.append(weight * NET(x, t, prompt))
        return kept[-1].detach()

    r = walk(PLANS["tree"], stored_velocity=record)
    assert not any(getattr(r, name).requires_grad for name in ("x", "x_next", "logprob", "x0"))
    v = torch.cat(kept)
    (grad,) = torch.autograd.grad(v[r.state].sum(), weight)
    assert grad.item() == pytest.approx(NET(r.x, r.t, r.prompt).sum().item(), rel=1e-4)


# ---- means and noise factors


@pytest.mark.parametrize("kernel", [flow_sde, cps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_means_are_where_the_noise_was_added(kernel, dtype):
    plan = PLANS["noise"]
    r = walk(plan, kernel, keep_mean=True, storage_dtype=dtype, eta=0.5)
    assert r.mean is not None and r.mean.dtype == torch.float32 and r.mean.shape == r.x.shape
    std = kernel(r.x, r.x * 0, r.t, r.t_next, r.eta).std
    roots = r.leaves.int().argmax(1) // plan.leaves_per_root
    members = r.leaves.int().argmax(1) % plan.leaves_per_root
    for edge in range(len(r)):
        key = {"prompt": int(roots[edge]), "member": int(members[edge]), "step": int(r.step[edge])}
        z = keyed_noise(SHAPE, seed=0, iteration=0, **key)
        expected = (r.mean[edge] + std[edge] * z).to(dtype)
        assert torch.equal(r.x_next[edge], expected)


def test_means_are_kept_only_where_asked_for_and_stay_with_their_edges():
    plan = PLANS["tree"]
    assert walk(plan).mean is None
    r = walk(plan, keep_mean=True)
    part = r.select(torch.tensor([3, 0]))
    assert r.mean is not None and part.mean is not None and torch.equal(part.mean, r.mean[[3, 0]])
    assert torch.equal(r.keep_leaves(torch.arange(r.num_leaves) < 6).to("cpu").mean, r.mean[r.leaves[:, :6].any(1)])


def test_a_noise_factor_is_part_of_std_and_log_prob():
    """dance_sde: std = eta factor sqrt(t - t_next), mean = x - h [v + g^2 / (2 t) eps], written out."""
    plan = all_steps(TIMES).with_noise({1: 3.0, 4: 0.5})
    r = walk(plan, dance_sde, keep_mean=True)
    factor = torch.tensor(plan.noise)[r.step]
    assert torch.allclose(r.eta, ETA * factor)
    g, h, t = (v.view(-1, 1, 1, 1) for v in (ETA * factor, r.t - r.t_next, r.t))
    v = NET(r.x, r.t, r.prompt)
    mean = r.x - h * (v + g**2 / (2 * t) * (r.x + (1 - t) * v))
    assert torch.allclose(r.mean, mean, atol=1e-5)
    expected = Normal(mean, (g * h.sqrt()).expand_as(mean)).log_prob(r.x_next).flatten(1).mean(1)
    assert torch.allclose(r.logprob, expected, atol=1e-4)
    spread = ((r.x_next - r.mean) / h.sqrt()).flatten(1).std(1)
    assert spread[r.step == 1].min() > 2 * spread[r.step == 4].max()


@every_plan
@pytest.mark.parametrize("kernel", [flow_sde, dance_sde, cps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ratio_before_training_is_one(plan, kernel, dtype):
    """Recomputed from the table alone, with the eta that it holds."""
    eta = 0.35 if kernel is cps else ETA
    r = walk(plan, kernel, storage_dtype=dtype, eta=eta)
    x = r.x.float()
    again = gaussian_logprob(r.x_next, kernel(x, NET(x, r.t, r.prompt), r.t, r.t_next, r.eta))
    assert (again - r.logprob).exp().sub(1).abs().max() <= 1e-6


def test_a_factor_that_silences_a_stochastic_step_is_refused():
    with pytest.raises(ValueError, match=re.escape("eta is not positive at the stochastic steps [3]")):
        walk(all_steps(TIMES).with_noise({3: 0.0}))
    walk(subset(TIMES, [2]).with_noise({3: 0.0}))  # step 3 follows the ODE anyway
