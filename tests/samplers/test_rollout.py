"""The rollout's promises: ratio 1, independence of batching and order, counted costs, honest errors."""

import re

import pytest
import torch

from samplers import (
    all_steps,
    branch_at,
    cps,
    dance_sde,
    ddim,
    deterministic,
    euler,
    flow_sde,
    gaussian_logprob,
    keyed_noise,
    linear_times,
    noise_source,
    rollout,
    shifted_times,
    subset,
    wan_sde,
    window,
)
from tests.samplers.toys import ToyNet, gaussian_velocity

KERNELS = [flow_sde, dance_sde, wan_sde, cps, ddim]
TIMES = shifted_times(8, 3.0)
PLANS = {
    "linear": all_steps(TIMES),
    "window": window(TIMES, 2, 3),
    "subset": subset(TIMES, [1, 4, 6]),
    "tree": branch_at(TIMES, [0, 3], [2, 3]),
    "mixed tree": branch_at(TIMES, [1, 4], 2, rest="ode", solver="dpmpp_2m"),
    "shared prefix": window(TIMES, 3, 2, solver="heun").with_fanout({3: 4}),
}
SHAPE = (2, 3, 3)
NET = ToyNet(SHAPE)


def walk(plan, kernel=flow_sde, num=4, order=None, net=NET, **kwargs):
    """Roll out ``num`` roots with prompts 0, 0, 1, 1, ...; ``order`` permutes them before anything else."""
    roots = torch.arange(num) if order is None else order
    options = {"eta": 0.6, "noise": noise_source(SHAPE, seed=0, iteration=0, prompt=roots), **kwargs}
    x = noise_source(SHAPE, seed=0, iteration=0, prompt=roots)(torch.arange(num), torch.zeros(num).long(), -1)
    return rollout(net, x, plan, kernel, prompt=roots // 2, group=roots // 2, **options)


def log_ratio(r, kernel, eta=0.6, net=NET):
    x = r.x.float()
    return gaussian_logprob(r.x_next, kernel(x, net(x, r.t, r.prompt), r.t, r.t_next, eta)) - r.logprob


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_update_ratio_is_one(kernel, name, dtype):
    r = walk(PLANS[name], kernel, storage_dtype=dtype)
    assert r.x.dtype == r.x_next.dtype == dtype and r.x0.dtype == r.logprob.dtype == torch.float32
    assert log_ratio(r, kernel).abs().max() <= 1e-6
    parts = list(r.minibatches(size=5, generator=torch.Generator().manual_seed(0)))
    assert max(log_ratio(part, kernel).abs().max() for part in parts) <= 1e-6


@pytest.mark.parametrize("name", PLANS)
def test_costs_and_sizes_are_those_of_the_plan(name):
    plan, seen = PLANS[name], []

    def counting(x, t, prompt):
        seen.append(len(x))
        return NET(x, t, prompt)

    r = walk(plan, net=counting)
    assert r.calls == sum(seen) == plan.calls(4)
    assert len(r) == plan.num_edges(4) and r.num_leaves == 4 * plan.leaves_per_root
    assert set(r.step.tolist()) == set(plan.stochastic_steps)
    assert torch.equal(r.t, plan.grid()[r.step]) and torch.equal(r.t_next, plan.grid()[r.step + 1])


def test_every_edge_continues_the_one_before_it():
    r = walk(PLANS["tree"])
    for step in range(1, 7):
        now, before = r.select(r.step == step), r.select(r.step == step - 1)
        parent = (now.leaves[:, None] & before.leaves).any(-1).long().argmax(1)
        assert torch.equal(now.x, before.x_next[parent])


def test_siblings_share_their_parent_and_differ_in_noise():
    r = walk(PLANS["shared prefix"], num=2)
    first = r.select(r.step == 3)
    assert torch.equal(first.x[:4], first.x[:1].expand(4, *SHAPE))
    assert torch.pdist(first.x_next[:4].flatten(1)).min() > 0.1


def test_children_use_the_noise_of_their_own_key():
    """Rebuilt by hand: member = first leaf below the root; the children of step 3 are members 0, 1, 2 and 3, 4, 5."""
    plan = branch_at(TIMES, [0, 3], [2, 3])
    r = walk(plan, dance_sde, num=1)
    edges = r.select(r.step == 3)
    mean, std = dance_sde(edges.x, NET(edges.x, edges.t, edges.prompt), edges.t, edges.t_next, 0.6)
    for member in range(6):
        z = keyed_noise(SHAPE, seed=0, iteration=0, prompt=0, member=member, step=3)
        assert torch.allclose(edges.x_next[member], mean[member] + std[member] * z, atol=1e-6)


def closed_form(x, t, prompt):
    return gaussian_velocity(x, t, mean=1.0)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("micro_batch", [1, 3, 1000])
def test_micro_batches_change_nothing(name, micro_batch):
    one, two = walk(PLANS[name], net=closed_form), walk(PLANS[name], net=closed_form, micro_batch=micro_batch)
    assert torch.equal(one.x0, two.x0) and torch.equal(one.logprob, two.logprob) and one.calls == two.calls
    assert torch.allclose(walk(PLANS[name]).x0, walk(PLANS[name], micro_batch=micro_batch).x0, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_the_order_of_the_roots_changes_only_the_order(name):
    plan, order = PLANS[name], torch.tensor([2, 0, 3, 1])
    one, two = walk(plan, net=closed_form), walk(plan, net=closed_form, order=order)
    width = plan.leaves_per_root
    leaf = (order[:, None] * width + torch.arange(width)).flatten()
    assert torch.equal(two.x0, one.x0[leaf]) and torch.equal(two.leaf_prompt, one.leaf_prompt[leaf])
    for step in plan.stochastic_steps:
        a, b = one.select(one.step == step), two.select(two.step == step)
        row = a.leaves.int()[:, leaf].argmax(1).argsort()
        assert torch.equal(b.leaves, a.leaves[:, leaf][row]) and torch.equal(b.logprob, a.logprob[row])


def test_a_root_alone_gives_what_it_gives_in_company():
    together = walk(PLANS["tree"], net=closed_form)
    alone = walk(PLANS["tree"], net=closed_form, num=1, order=torch.tensor([3]))
    assert torch.equal(alone.x0, together.x0[18:])


def test_a_window_shares_its_prefix_with_the_ode():
    plan, steps = window(TIMES, 3, 2), []
    r = walk(plan, net=lambda x, t, p: steps.append(x) or NET(x, t, p))
    ode = []
    walk(deterministic(TIMES), None, net=lambda x, t, p: ode.append(x) or NET(x, t, p))
    assert all(torch.equal(a, b) for a, b in zip(steps[:4], ode[:4], strict=True))
    assert torch.equal(r.select(r.step == 3).x, ode[3])


def test_a_linear_rollout_is_the_loop_one_would_write():
    r = walk(all_steps(TIMES), dance_sde, num=3)
    prompt = torch.arange(3) // 2
    x = torch.stack([keyed_noise(SHAPE, seed=0, iteration=0, prompt=p, member=0, step=-1) for p in range(3)])
    for step in range(8):
        t, t_next = TIMES[step].expand(3), TIMES[step + 1].expand(3)
        v = NET(x, t, prompt)
        z = [keyed_noise(SHAPE, seed=0, iteration=0, prompt=p, member=0, step=step) for p in range(3)]
        mean, std = dance_sde(x, v, t, t_next, 0.6)
        x = mean + std * torch.stack(z) if step < 7 else euler(x, v, t, t_next)
    assert torch.allclose(r.x0, x, atol=1e-6)


def test_samples_of_a_tree_follow_the_data():
    """The marginal of every leaf is the data N(2, .5^2), whatever was shared on the way."""
    num, plan = 400, branch_at(shifted_times(20, 3.0), [0, 5])
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(num)
    r = rollout(
        lambda x, t, p: gaussian_velocity(x, t),
        torch.randn(num, 1, generator=generator),
        plan,
        flow_sde,
        eta=0.7,
        prompt=index,
        group=index,
        noise=lambda root, member, step: torch.randn(len(root), 1, generator=generator),
    )
    # 20 steps are a little too narrow: about 0.46, see test_kernels.
    assert abs(r.x0.mean() - 2) < 0.06 and abs(r.x0.std() - 0.46) < 0.03


def test_eta_may_differ_per_step():
    eta = torch.linspace(0.2, 0.9, 8)
    r = walk(all_steps(TIMES), dance_sde, eta=eta)
    assert log_ratio(r, dance_sde, eta[r.step]).abs().max() <= 1e-6
    g = torch.tensor([dance_sde(r.x, r.x, r.t, r.t_next, 1.0).std.flatten()[i] for i in (0, 27)])
    assert g[0] != g[1]


def test_sum_is_mean_times_the_latent_dims():
    one, two = walk(all_steps(TIMES)), walk(all_steps(TIMES), reduction="sum")
    assert torch.allclose(one.logprob * 18, two.logprob, rtol=1e-5)


def test_an_ode_plan_needs_neither_kernel_nor_noise_and_stores_no_edges():
    r = walk(deterministic(TIMES), None, noise=None, eta=0.0)
    assert len(r) == 0 and r.x.shape == (0, *SHAPE) and r.leaves.shape == (0, 4) and r.num_leaves == 4
    assert r.leaf_prompt.tolist() == [0, 0, 1, 1] and list(r.minibatches(size=2)) == []


def test_no_graph_is_kept():
    weight = torch.ones((), requires_grad=True)
    r = walk(all_steps(TIMES), net=lambda x, t, p: weight * NET(x, t, p))
    assert not r.x0.requires_grad and not r.logprob.requires_grad


def test_store_moves_the_table():
    assert walk(all_steps(TIMES), store="cpu").x.device.type == "cpu"


def test_half_precision_velocity_is_lifted():
    r = walk(all_steps(TIMES), net=lambda x, t, p: NET(x, t, p).bfloat16())
    assert r.x0.dtype == torch.float32
    assert log_ratio(r, flow_sde, net=lambda x, t, p: NET(x, t, p).bfloat16()).abs().max() <= 1e-6


# ---- pruning on the way


@pytest.mark.parametrize("name", ["linear", "tree", "mixed tree"])
def test_pruning_on_the_way_is_pruning_afterwards_for_less(name):
    plan = PLANS[name]
    whole = walk(plan, net=closed_form)
    alive = torch.arange(whole.num_leaves) % 2 == 0
    width = plan.leaves_per_root

    def prune(step, x0, root, member):
        return alive[root * width + member] if step == 6 else None

    pruned, after = walk(plan, net=closed_form, prune=prune), whole.keep_leaves(alive)
    for field in ("x", "x_next", "logprob", "leaves", "x0", "group", "leaf_prompt", "step", "prompt"):
        assert torch.equal(getattr(pruned, field), getattr(after, field)), field
    assert pruned.calls == plan.calls(4) - int((~alive).sum())


def test_a_pruned_subtree_takes_its_edges_along():
    plan = PLANS["tree"]
    r = walk(plan, num=1, prune=lambda step, x0, root, member: member < 3 if step == 1 else None)
    assert r.num_leaves == 3 and (r.step == 0).sum() == 1 and r.leaves.any(1).all()


def test_the_hook_sees_the_clean_estimate():
    seen = {}
    walk(deterministic(TIMES), None, net=closed_form, prune=lambda step, x0, *_: seen.__setitem__(step, x0))
    assert (seen[7] - walk(deterministic(TIMES), None, net=closed_form).x0).abs().max() < 1e-6
    assert (seen[0] - 1).abs().max() < 1e-6  # from pure noise, the best guess is the mean of the data


# ---- errors


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: walk(all_steps(TIMES), eta=0.0), "eta is not positive at the stochastic steps [0, 1, 2, 3, 4, 5, 6]"),
        (lambda: walk(window(TIMES, 2, 1), eta=[0.5] * 2 + [0.0] + [0.5] * 5), "at the stochastic steps [2]"),
        (lambda: walk(all_steps(TIMES), eta=[0.5, 0.5]), "eta has 2 entries for 8 steps"),
        (lambda: walk(subset(TIMES, [7]), cps), "never add noise in a step that ends at t = 0"),
        (lambda: walk(all_steps(TIMES), None), "need a kernel (say flow_sde) and a noise source"),
        (lambda: walk(all_steps(TIMES), noise=None), "need a kernel (say flow_sde) and a noise source"),
        (lambda: walk(all_steps(TIMES), net=lambda x, t, p: x[:, :1]), "velocity returned (4, 1, 3, 3) for a state of"),
        (lambda: walk(all_steps(TIMES), noise=lambda r, m, s: torch.ones(1)), "noise returned (1,) for (4, 2, 3, 3)"),
        (
            lambda: walk(all_steps(TIMES), prune=lambda step, x0, root, member: torch.zeros(len(root)).bool()),
            "prune dropped every node at step 0",
        ),
    ],
)
def test_errors_name_the_cause(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_short_prompt_or_group_is_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="one prompt and one group per root"):
        rollout(NET, x, deterministic(linear_times(2)), prompt=torch.zeros(2).long(), group=torch.zeros(3).long())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", PLANS)
def test_a_rollout_on_the_accelerator_is_the_one_on_the_cpu(name):
    plan, roots = PLANS[name], torch.arange(4)
    noise = noise_source(SHAPE, seed=0, iteration=0, prompt=roots)
    x = noise(roots, roots * 0, -1)
    options = {"eta": 0.6, "prompt": roots, "group": roots, "noise": noise}
    cpu = rollout(closed_form, x, plan, flow_sde, **options)
    gpu = rollout(closed_form, x.cuda(), plan, flow_sde, **options, store="cpu")
    assert torch.allclose(cpu.x0, gpu.x0, atol=1e-4) and torch.allclose(cpu.logprob, gpu.logprob, atol=1e-4)
    assert torch.equal(cpu.leaves, gpu.leaves)
    still_there = rollout(closed_form, x.cuda(), plan, flow_sde, **options)
    assert all(part.x.is_cuda for part in still_there.minibatches(count=3)) and still_there.leaves.is_cuda
