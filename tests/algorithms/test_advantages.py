"""Advantages against plain numpy loops, and what must not move them: order, missing verdicts, jitter, scale."""

import math

import numpy as np
import pytest
import torch

from flowrl.algorithms.advantages import group_advantages, to_edges
from samplers import branch_at, dance_sde, linear_times, noise_source, rollout
from tests.samplers.toys import gaussian_velocity

NAN = float("nan")


def some_rewards(num=60, groups=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (num,), generator=generator) * 1000 - 3
    rewards = torch.randn(num, generator=generator, dtype=torch.float64)
    rewards[torch.rand(num, generator=generator) < 0.1] = NAN
    return rewards, group


def by_loop(rewards, group, std, eps, unbiased):
    rewards, group = rewards.numpy(), group.numpy()
    valid = ~np.isnan(rewards)
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        mates = rewards[valid & (group == group[i])]
        if not valid[i] or len(mates) < 2:
            continue
        ddof = int(unbiased)
        scale = {"group": mates.std(ddof=ddof) + eps, "global": rewards[valid].std(ddof=ddof) + eps, "none": 1.0}[std]
        out[i] = (rewards[i] - mates.mean()) / scale
    return out


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_equals_the_loop(std, unbiased, eps):
    rewards, group = some_rewards()
    found = group_advantages(rewards, group, std, eps, unbiased)
    np.testing.assert_allclose(found.value.numpy(), by_loop(rewards, group, std, eps, unbiased), rtol=1e-12, atol=1e-14)
    assert found.value.dtype == torch.float64
    assert torch.equal(found.valid, ~rewards.isnan())


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_order_does_not_matter_to_the_last_bit(std):
    rewards, group = some_rewards(num=400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    here = group_advantages(rewards, group, std)
    there = group_advantages(rewards[order], group[order], std)
    assert torch.equal(here.value[order], there.value)
    assert torch.equal(here.zero_std_frac, there.zero_std_frac)


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("missing", [NAN, float("inf"), -float("inf")])
def test_no_verdict_is_as_if_never_drawn(std, missing):
    """R1: the others' advantages are those of a run without that sample, and its own is 0."""
    rewards = torch.tensor([0.1, missing, 0.7, 0.4, 0.2, 0.9], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    kept = torch.tensor([0, 2, 3, 4, 5])
    found = group_advantages(rewards, group, std)
    assert torch.equal(found.value[kept], group_advantages(rewards[kept], group[kept], std).value)
    assert found.value[1] == 0
    assert not found.valid[1]
    assert float(found.metrics["no_verdict_frac"]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("level", [0.0, 0.3, -1.0, 25.0, 1e4])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_jitter_is_exactly_nothing(std, level, eps):
    """R8: a group whose rewards differ by rounding teaches nothing; its neighbours still do."""
    jitter = 1e-7 * max(1.0, abs(level)) * torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    rewards = torch.cat([level + jitter, level + torch.arange(8.0).double()])
    found = group_advantages(rewards, torch.arange(2).repeat_interleave(8), std, eps)
    assert (found.value[:8] == 0).all()
    assert found.value[8:].abs().max() > 1
    assert float(found.zero_std_frac) == 0.5


def test_scale_and_shift_of_the_rewards_do_not_matter():
    rewards, group = some_rewards()
    here = group_advantages(rewards, group, eps=0.0).value
    torch.testing.assert_close(group_advantages(1000 * rewards + 50, group, eps=0.0).value, here, rtol=1e-9, atol=1e-9)


def test_small_groups_are_dead_and_counted():
    """R9: one sample, one verdict left, and no verdict at all."""
    rewards = torch.tensor([1.0, 0.2, NAN, NAN, NAN, 0.0, 1.0])
    found = group_advantages(rewards, torch.tensor([0, 1, 1, 2, 2, 3, 3]), unbiased=True, eps=0.0)
    assert (found.value[:5] == 0).all()
    assert found.value[5:].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert found.live.tolist() == [False, False, False, True]
    assert int(found.metrics["live_groups"]) == 1


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("level", [0.5, NAN])
def test_constant_rewards_teach_nothing(std, level):
    """R11: the trainer can see that no group is alive and skip the update."""
    found = group_advantages(torch.full((6,), level), torch.tensor([0, 0, 0, 1, 1, 1]), std, eps=0.0)
    assert (found.value == 0).all()
    assert float(found.zero_std_frac) == 1


def test_clip_cuts_both_sides():
    rewards = torch.zeros(200)
    rewards[0], rewards[100] = 1, -1
    found = group_advantages(rewards, torch.arange(2).repeat_interleave(100), clip=5.0)
    assert (found.value.max(), found.value.min()) == (5, -5)


def test_nothing_at_all():
    found = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert len(found.value) == 0
    assert float(found.zero_std_frac) == 1


def test_unknown_std_mode_is_named():
    with pytest.raises(ValueError, match="batch.*group, global or none"):
        group_advantages(torch.zeros(2), torch.zeros(2), "batch")


def test_linear_edges_get_their_samples_advantage():
    advantages = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = torch.eye(5, dtype=torch.bool).repeat(3, 1)
    assert torch.equal(to_edges(advantages, leaves), advantages.repeat(3))


def tree():
    plan = branch_at(linear_times(5), [0, 2], [3, 2])
    roots = torch.arange(2)
    noise = noise_source((4,), seed=0, iteration=0, prompt=roots)
    x_init = noise(roots, torch.zeros_like(roots), -1)
    velocity = lambda x, t, prompt: gaussian_velocity(x, t)  # noqa: E731
    return rollout(velocity, x_init, plan, dance_sde, eta=0.3, prompt=roots, group=roots, noise=noise)


def test_tree_edges_get_the_mean_of_their_subtree():
    edges = tree()
    advantages = torch.arange(float(edges.num_leaves), dtype=torch.float64)
    credit = to_edges(advantages, edges.leaves)
    for edge in range(len(edges)):
        assert float(credit[edge]) == pytest.approx(float(advantages[edges.leaves[edge]].mean()))
    # The six leaves of the first root are 0..5, and its three first edges lead to two of them each.
    assert credit[:3].tolist() == pytest.approx([0.5, 2.5, 4.5])


def test_tree_credit_leaves_out_what_has_no_verdict():
    """R1 on a tree: credit is that of the tree pruned by the missing samples, and 0 where nothing is left."""
    edges = tree()
    valid = torch.ones(edges.num_leaves, dtype=torch.bool)
    valid[[0, 1, 5]] = False
    advantages = torch.arange(1.0, edges.num_leaves + 1, dtype=torch.float64) * valid
    credit = to_edges(advantages, edges.leaves, valid)
    pruned = edges.keep_leaves(valid)
    alive = (edges.leaves & valid).any(1)
    assert torch.equal(credit[alive], to_edges(advantages[valid], pruned.leaves))
    assert (~alive).any()
    assert (credit[~alive] == 0).all()
