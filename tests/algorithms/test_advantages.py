"""Credit against plain numpy loops, and what must not move it: order, missing verdicts, jitter, scale."""

import itertools
import math

import numpy as np
import pytest
import torch

from flowrl.algorithms.advantages import (
    adaptive_lambda,
    best_only,
    combined_advantages,
    discounted,
    earlier_tools,
    edge_advantages,
    gae,
    group_advantages,
    keep_nonzero,
    leaf_mean,
    length_weighted,
    monte_carlo_values,
    pass_at_k,
    running_advantages,
    sure_first,
    to_edges,
    undiluted,
    whiten,
    win_rates,
)
from samplers import branch_at, dance_sde, linear_times, noise_source, rollout
from tests.samplers.toys import gaussian_velocity

NAN = float("nan")


def some_rewards(num=60, groups=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (num,), generator=generator) * 1000 - 3
    rewards = torch.randn(num, generator=generator, dtype=torch.float64)
    rewards[torch.rand(num, generator=generator) < 0.1] = NAN
    return rewards, group


def by_loop(rewards, group, std, eps, unbiased, baseline="mean", floor=0.0):
    rewards, group = rewards.numpy(), group.numpy()
    valid = ~np.isnan(rewards)
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        mates = rewards[valid & (group == group[i])]
        if not valid[i] or len(mates) < 2:
            continue
        ddof = int(unbiased)
        spread = {"group": mates.std(ddof=ddof), "global": rewards[valid].std(ddof=ddof)}
        scale = 1.0 if std == "none" else max(spread[std], floor) + eps
        others = rewards[valid & (group == group[i]) & (np.arange(len(rewards)) != i)]
        out[i] = (rewards[i] - (mates if baseline == "mean" else others).mean()) / scale
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
@pytest.mark.parametrize("floor", [0.0, 0.9, 5.0])
def test_leave_one_out_and_floor_equal_the_loop(std, floor):
    """A floor of 0.9 lies among the stds of the groups."""
    rewards, group = some_rewards()
    found = group_advantages(rewards, group, std, 1e-4, baseline="leave_one_out", std_floor=floor)
    expected = by_loop(rewards, group, std, 1e-4, False, "leave_one_out", floor)
    np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_leave_one_out_has_no_expectation_to_lose():
    """Why RLOO: what is subtracted from a sample does not depend on its own reward."""
    rewards = torch.tensor([0.3, 0.1, 0.9, NAN])
    changed = torch.tensor([2.3, 0.1, 0.9, NAN])
    settings = {"group": torch.zeros(4), "std": "none"}
    rise = [
        float(group_advantages(r, **settings, baseline=b).value[0])
        for b in ("leave_one_out", "mean")
        for r in (changed, rewards)
    ]
    assert rise[0] - rise[1] == pytest.approx(2)
    assert rise[2] - rise[3] == pytest.approx(4 / 3)


def test_a_lone_sample_has_nothing_left_out():
    found = group_advantages(torch.tensor([3.0]), torch.zeros(1), baseline="leave_one_out", eps=0.0)
    assert (found.value.item(), found.live.item()) == (0, False)


def test_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="median.*mean or leave_one_out"):
        group_advantages(torch.zeros(2), torch.zeros(2), baseline="median")


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
    """R1 on a tree: credit is that of the tree pruned by the missing samples, and NaN where nothing is left."""
    edges = tree()
    valid = torch.ones(edges.num_leaves, dtype=torch.bool)
    valid[[0, 1, 5]] = False
    advantages = torch.arange(1.0, edges.num_leaves + 1, dtype=torch.float64) * valid
    credit = to_edges(advantages, edges.leaves, valid)
    pruned = edges.keep_leaves(valid)
    alive = (edges.leaves & valid).any(1)
    assert torch.equal(credit[alive], to_edges(advantages[valid], pruned.leaves))
    assert (~alive).any()
    assert credit[~alive].isnan().all()


def test_leaf_means_are_those_of_the_loop():
    """Whatever stands for no verdict, it is not counted; without any verdict below there is no mean."""
    edges = tree()
    rewards = torch.randn(edges.num_leaves, generator=torch.Generator().manual_seed(0))
    rewards[[0, 1, 5]] = torch.tensor([NAN, float("inf"), NAN])
    found = leaf_mean(rewards, edges.leaves)
    for edge in range(len(edges)):
        below = [r for r in rewards[edges.leaves[edge]].tolist() if math.isfinite(r)]
        assert float(found[edge]) == pytest.approx(np.mean(below) if below else NAN, nan_ok=True)
    assert found.isnan().any() and found.isfinite().any()


# ---------------------------------------------------------------------------------------------------- several rewards


def three_scores(num=60, seed=0):
    """Scores on three scales, each with missing verdicts of its own; a group of which the second says nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(num, generator=generator, dtype=torch.float64)  # noqa: E731
    group = torch.randint(6, (num,), generator=generator) * 10
    scores = {"a": draw(), "b": 30 + 100 * draw(), "c": 0.01 * draw()}
    scores["a"][3], scores["c"][4] = NAN, float("inf")
    scores["b"][group == 20] = 5.0
    return scores, group


WEIGHTS = {"a": 2.0, "b": 0.5, "c": -1.0}
ARGUMENTS = {"std": "group", "eps": 1e-4, "unbiased": True, "baseline": "mean", "std_floor": 0.0, "clip": None}


def combined_by_loop(scores, weights, group, how, eps, unbiased):
    group, scores = group.numpy(), {k: v.numpy() for k, v in scores.items()}
    valid = np.logical_and.reduce([np.isfinite(scores[k]) for k in weights])
    parts = {}
    for name in weights:
        known = torch.tensor(np.where(valid, scores[name], np.nan))
        parts[name] = by_loop(known, torch.tensor(group), "group", eps, unbiased)
    if how == "sum":
        total = sum(w * np.where(valid, scores[k], np.nan) for k, w in weights.items())
        return by_loop(torch.tensor(total), torch.tensor(group), "group", eps, unbiased)
    value = sum(w * parts[k] for k, w in weights.items())
    if how == "per_reward":
        return value / sum(abs(w) for w in weights.values())
    whitened = (value - value[valid].mean()) / (value[valid].std(ddof=int(unbiased)) + eps)
    return np.where(valid, whitened, 0)


@pytest.mark.parametrize("how", ["sum", "per_reward", "gdpo"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_combinations_equal_the_loop(how, unbiased):
    scores, group = three_scores()
    found = combined_advantages(scores, WEIGHTS, group, how, **(ARGUMENTS | {"unbiased": unbiased}))
    expected = combined_by_loop(scores, WEIGHTS, group, how, 1e-4, unbiased)
    np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert (~found.valid).nonzero().flatten().tolist() == [3, 4]
    assert found.live.all()


@pytest.mark.parametrize("how", ["sum", "per_reward", "gdpo"])
def test_combinations_do_not_see_the_order_of_samples(how):
    scores, group = three_scores(num=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    here = combined_advantages(scores, WEIGHTS, group, how, **ARGUMENTS)
    there = combined_advantages({k: v[order] for k, v in scores.items()}, WEIGHTS, group[order], how, **ARGUMENTS)
    assert torch.equal(here.value[order], there.value)
    assert torch.equal(here.live, there.live)


@pytest.mark.parametrize("how", ["per_reward", "gdpo"])
def test_normalised_rewards_forget_their_scale(how):
    """Where the sum is led by the largest reward."""
    scores, group = three_scores()
    louder = scores | {"c": 1e5 * scores["c"] + 3}
    arguments = ARGUMENTS | {"eps": 0.0}
    here, there = (combined_advantages(s, WEIGHTS, group, how, **arguments).value for s in (scores, louder))
    torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-9)
    led = [combined_advantages(s, WEIGHTS, group, "sum", **arguments).value for s in (scores, louder)]
    assert (led[0] - led[1]).abs().max() > 0.5


@pytest.mark.parametrize("how", ["sum", "per_reward"])
def test_one_reward_alone_is_the_group_advantage(how):
    scores, group = three_scores()
    found = combined_advantages(scores, {"a": 1.0, "b": 0.0}, group, how, **(ARGUMENTS | {"clip": 0.7}))
    expected = group_advantages(scores["a"], group, "group", 1e-4, True, 0.7)
    assert torch.equal(found.value, expected.value) and torch.equal(found.valid, expected.valid)
    assert found.value.abs().max() == 0.7


@pytest.mark.parametrize("how", ["sum", "per_reward", "gdpo"])
def test_scores_without_weight_are_ignored_verdicts_included(how):
    scores, group = three_scores()
    alone = combined_advantages({"a": scores["a"]}, {"a": 2.0}, group, how, **ARGUMENTS)
    silent = {**scores, "b": torch.full((60,), NAN)}
    found = combined_advantages(silent, {"a": 2.0, "b": 0.0}, group, how, **ARGUMENTS)
    assert torch.equal(found.value, alone.value) and torch.equal(found.valid, alone.valid)


@pytest.mark.parametrize("how", ["per_reward", "gdpo"])
def test_a_group_lives_by_any_of_its_rewards(how):
    """Group 0: both are constant; group 1: one; group 2: neither."""
    scores = {"a": torch.tensor([1.0, 1, 4, 4, 0, 2]), "b": torch.tensor([2.0, 2, 0, 1, 3, 1])}
    group = torch.arange(3).repeat_interleave(2)
    found = combined_advantages(scores, {"a": 1.0, "b": 0.5}, group, how, **ARGUMENTS)
    assert found.live.tolist() == [False, True, True]
    assert (found.value[:2] == 0).all() and (found.value[2:] != 0).all()


def test_the_whole_batch_does_not_wake_a_dead_group():
    """GDPO's last step subtracts the batch's mean, which is 0 but for rounding; a dead group's A is exactly 0."""
    scores, group = three_scores()
    for name in scores:
        scores[name][group == 20] = 0.3
    found = combined_advantages(scores, WEIGHTS, group, "gdpo", **ARGUMENTS)
    assert (found.value[group == 20] == 0).all()
    assert found.live.tolist() == [True, True, False, True, True, True]


def test_rewards_that_cancel_leave_the_sum_dead_but_not_the_parts():
    scores = {"a": torch.tensor([0.1, 1.3, 0.2]), "b": torch.tensor([1.9, 0.7, 1.8])}
    group, weights = torch.zeros(3), {"a": 1.0, "b": 1.0}
    assert not combined_advantages(scores, weights, group, "sum", **ARGUMENTS).live.any()
    parts = combined_advantages(scores, weights, group, "gdpo", **(ARGUMENTS | {"eps": 0.0}))
    assert parts.live.all()
    assert (parts.value == 0).all()  # R8: not the rounding of the parts, blown up to a std of 1


def test_gdpo_is_white_over_the_batch_and_cut_afterwards():
    scores, group = three_scores()
    found = combined_advantages(scores, WEIGHTS, group, "gdpo", **(ARGUMENTS | {"eps": 0.0}))
    value = found.value[found.valid]
    assert (float(value.mean()), float(value.std())) == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    cut = combined_advantages(scores, WEIGHTS, group, "gdpo", **(ARGUMENTS | {"eps": 0.0, "clip": 0.5}))
    assert torch.equal(cut.value, found.value.clamp(-0.5, 0.5))


def test_combinations_refuse_what_they_cannot_mean():
    scores, group = {"a": torch.zeros(2)}, torch.zeros(2)
    with pytest.raises(ValueError, match="no reward has a weight other than 0"):
        combined_advantages(scores, {"a": 0.0}, group, "sum", **ARGUMENTS)
    with pytest.raises(ValueError, match="weights name b, but only a was scored"):
        combined_advantages(scores, {"a": 1.0, "b": 1.0}, group, "sum", **ARGUMENTS)
    with pytest.raises(ValueError, match="'product'; choose sum, per_reward or gdpo"):
        combined_advantages(scores, {"a": 1.0}, group, "product", **ARGUMENTS)


# ------------------------------------------------------------------------------------------ running statistics, pairs


def running_by_loop(rewards, group, buffers, min_count, eps):
    names = sorted(set(group.tolist()))
    everyone = np.array([r for r in rewards.tolist() if math.isfinite(r)])
    out = []
    for r, g in zip(rewards.tolist(), group.tolist(), strict=True):
        values = np.array([x for x in buffers[names.index(g)].tolist() if math.isfinite(x)])
        values = values if len(values) >= min_count else everyone
        out.append((r - values.mean()) / (values.std() + eps) if math.isfinite(r) else 0.0)
    return out


def test_running_advantages_equal_the_loop():
    """DDPO: some prompts have been seen often enough, the others take the batch's statistics."""
    rewards, group = some_rewards()
    generator = torch.Generator().manual_seed(5)
    buffers = [
        torch.cat([torch.randn(8 * i, generator=generator, dtype=torch.float64), rewards[group == name]])
        for i, name in enumerate(group.unique())
    ]
    found = running_advantages(rewards, group, buffers, min_count=16, eps=1e-6)
    expected = running_by_loop(rewards, group, buffers, 16, 1e-6)
    np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert found.live.all() and torch.equal(found.valid, rewards.isfinite())
    order = torch.randperm(60, generator=generator)
    mixed = [buffer[torch.randperm(len(buffer), generator=generator)] for buffer in buffers]
    again = running_advantages(rewards[order], group[order], mixed, min_count=16, eps=1e-6)
    assert torch.equal(again.value, found.value[order])
    cut = running_advantages(rewards, group, buffers, min_count=16, eps=1e-6, clip=0.5)
    assert torch.equal(cut.value, found.value.clamp(-0.5, 0.5))


def test_one_sample_learns_from_its_prompts_past():
    """What group advantages cannot do: prompts with one sample, one constant past and one without a verdict now."""
    rewards = torch.tensor([1.0, 0.5, NAN], dtype=torch.float64)
    past = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5 + 1e-8, NAN]), torch.tensor([1.0, 2.0])]
    found = running_advantages(rewards, torch.arange(3), past, min_count=2, eps=0.0)
    assert found.value.tolist() == [1.0, 0.0, 0.0]
    assert found.live.tolist() == [True, False, False]
    assert found.valid.tolist() == [True, True, False]


def test_running_advantages_of_nothing_and_of_no_verdict():
    none = running_advantages(torch.zeros(0), torch.zeros(0), [], min_count=1)
    assert len(none.value) == 0 and float(none.zero_std_frac) == 1
    silent = running_advantages(torch.full((2,), NAN), torch.zeros(2), [torch.full((2,), NAN)], min_count=1)
    assert (silent.value == 0).all() and not silent.live.any()


def test_running_advantages_want_one_buffer_a_group():
    with pytest.raises(ValueError, match="1 buffers for 2 groups"):
        running_advantages(torch.zeros(2), torch.arange(2), [torch.zeros(3)], min_count=1)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_win_rates_equal_the_loop(margin):
    rewards, group = some_rewards()
    rewards = (4 * rewards).round() / 4
    found = win_rates(rewards, group, margin)
    tied = pairs = 0
    for i in range(60):
        others = [j for j in range(60) if j != i and group[j] == group[i] and not rewards[j].isnan()]
        if rewards[i].isnan() or not others:
            assert found.value[i].isnan()
            continue
        ahead = [float(rewards[i] - rewards[j]) for j in others]
        ties = sum(abs(a) <= margin for a in ahead)
        assert float(found.value[i]) == pytest.approx((sum(a > margin for a in ahead) + ties / 2) / len(others))
        tied, pairs = tied + ties, pairs + len(others)
    assert float(found.tie_frac) == pytest.approx(tied / pairs) and tied
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        win_rates(rewards[order], group[order], margin).value.nan_to_num(-1), found.value[order].nan_to_num(-1)
    )


def test_win_rates_of_a_ranking_are_evenly_spaced():
    """Whatever the gaps: this is what Pref-GRPO is for."""
    found = win_rates(torch.tensor([0.5, 0.5001, 0.6, -9.0]), torch.zeros(4))
    assert found.value.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 0])
    assert found.tie_frac == 0


def test_without_a_pair_there_is_no_win_rate():
    found = win_rates(torch.tensor([1.0, NAN, 2.0]), torch.tensor([0, 0, 1]))
    assert found.value.isnan().all() and found.tie_frac.isnan()


# ------------------------------------------------------------------------------------------------- edges on their own


@pytest.mark.parametrize("std", ["group", "none"])
def test_edge_advantages_equal_the_loop(std):
    """Groups are the edges of one group at one step, whatever their order."""
    values, group = some_rewards(num=120, groups=4)
    step = torch.randint(5, (120,), generator=torch.Generator().manual_seed(2))
    found = edge_advantages(values, group, step, std=std, eps=1e-4, std_floor=0.7, unbiased=True)
    expected = by_loop(values, 1000 * group + step, std, 1e-4, True, floor=0.7)
    expected[values.isnan().numpy()] = np.nan
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    again = edge_advantages(values[order], group[order], step[order], std=std, eps=1e-4, std_floor=0.7, unbiased=True)
    assert torch.equal(again.nan_to_num(9), found[order].nan_to_num(9))


def test_edges_alone_or_alike_get_nothing_and_silent_ones_stay_silent():
    values = torch.tensor([1.0, 2.0, 2.0, NAN, 3.0, 5.0])
    found = edge_advantages(values, torch.zeros(6), torch.tensor([0, 1, 1, 2, 2, 3]), eps=0.0)
    assert found[[0, 1, 2, 4, 5]].tolist() == [0] * 5
    assert found[3].isnan()


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e3])
def test_two_branches_are_a_sign_only_unless_there_is_a_floor(gap):
    """BranchGRPO's first depths: +-0.7071 whatever the gap; divided by a floor, a small gap stays small."""
    values, same = torch.tensor([0.2, 0.2 + gap], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    bare = edge_advantages(values, same, same, eps=1e-8, unbiased=True)
    assert bare.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-4)
    floored = edge_advantages(values, same, same, eps=0.0, unbiased=True, std_floor=1.0)
    scale = max(1.0, gap / math.sqrt(2))
    assert floored.tolist() == pytest.approx([-gap / 2 / scale, gap / 2 / scale], rel=1e-9)


def test_a_trees_depths_are_normalised_by_themselves():
    """BranchGRPO: node value = mean of its leaves, z-scored within its tree at its depth."""
    edges = tree()
    rewards = torch.randn(edges.num_leaves, generator=torch.Generator().manual_seed(0)).double()
    roots = edges.leaves.int().argmax(1) // (edges.num_leaves // 2)
    found = edge_advantages(leaf_mean(rewards, edges.leaves), roots, edges.step, eps=0.0, unbiased=True)
    for root in (0, 1):
        for step in edges.step.unique():
            here = (roots == root) & (edges.step == step)
            nodes = np.array([float(rewards[edges.leaves[e]].mean()) for e in here.nonzero().flatten()])
            np.testing.assert_allclose(found[here].numpy(), (nodes - nodes.mean()) / nodes.std(ddof=1), rtol=1e-9)


def test_edges_without_credit_leave_unless_none_would_be_left():
    credit = torch.tensor([0.0, 1.5, NAN, -0.0, -2.0])
    assert keep_nonzero(credit).nan_to_num(9).tolist() == [9, 1.5, 9, 9, -2]
    for nothing in (torch.zeros(3), torch.tensor([0.0, NAN]), torch.zeros(0)):
        assert keep_nonzero(nothing).isnan().all()


# ---------------------------------------------------------------------------------------------- estimators of answers

MIXED, GROUPS = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), torch.arange(2).repeat_interleave(4)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"std": "group", "eps": 1e-6, "unbiased": True}, 0.8660239),
        ({"std": "none"}, 0.5),
        ({"std": "global", "eps": 1e-6, "unbiased": True}, 1.0801211),
        ({"std": "none", "baseline": "leave_one_out"}, 0.6666667),
    ],
)
def test_the_known_vectors(how, expected):
    """GRPO, Dr.GRPO, Lite PPO, RLOO: two right and two wrong answers beside a group that is all right."""
    found = group_advantages(MIXED, GROUPS, **how)
    assert found.value.tolist() == pytest.approx([expected, -expected, -expected, expected, 0, 0, 0, 0], abs=1e-6)
    assert (found.value[4:] == 0).all()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.3])
def test_rewards_that_all_agree_have_no_std_to_be_divided_by(level):
    """Without a mean they would be divided by eps alone; without a std they are REINFORCE's own."""
    rewards = torch.full((8,), level)
    found = group_advantages(rewards, GROUPS, "global", eps=1e-6, mean="none")
    assert (found.value == 0).all() and not found.live.any()
    assert torch.equal(group_advantages(rewards, GROUPS, "none", mean="none").value, rewards.double())
    differ = group_advantages(MIXED, GROUPS, "global", eps=0.0, mean="none")
    np.testing.assert_allclose(differ.value.numpy(), MIXED.numpy() / MIXED.numpy().std())


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_other_means_equal_the_loop(std, unbiased):
    """All agree in one group: with the std of the group it stays dead, otherwise it is compared with the others."""
    rewards, group = some_rewards()
    rewards[group == group[0]] = 0.25
    valid = ~rewards.isnan()
    for mean, centre in (("batch", float(rewards[valid].mean())), ("none", 0.0)):
        found = group_advantages(rewards, group, std, 1e-4, unbiased, mean=mean)
        for i in range(60):
            mates = rewards[valid & (group == group[i])]
            spread = {"group": mates, "global": rewards[valid]}
            scale = 1.0 if std == "none" else float(spread[std].std(correction=int(unbiased))) + 1e-4
            dead = std == "group" and float(mates.max() - mates.min()) < 1e-6
            expected = 0.0 if dead or not valid[i] else (float(rewards[i]) - centre) / scale
            assert float(found.value[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_left_out_of_the_batch():
    rewards = torch.tensor([1.0, 0.0, 0.5, NAN, 2.0])
    found = group_advantages(rewards, torch.arange(5), "none", baseline="leave_one_out", mean="batch")
    others = [
        np.mean([r for j, r in enumerate((1.0, 0.0, 0.5, None, 2.0)) if r is not None and j != i]) for i in range(5)
    ]
    expected = [1.0 - others[0], -others[1], 0.5 - others[2], 0.0, 2.0 - others[4]]
    assert found.value.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mean", ["batch", "none"])
def test_a_batch_that_agrees_teaches_nothing_but_without_a_mean(mean):
    jitter = 0.7 + 1e-8 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    found = group_advantages(jitter, GROUPS, "none", mean=mean)
    assert (found.value == 0).all() if mean == "batch" else torch.equal(found.value, jitter.double())


def test_impossible_means_are_named():
    with pytest.raises(ValueError, match="'median'; choose group, batch or none"):
        group_advantages(MIXED, GROUPS, mean="median")
    with pytest.raises(ValueError, match="mean=none has none"):
        group_advantages(MIXED, GROUPS, mean="none", baseline="leave_one_out")


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("size", [8, 12])
def test_constant_floats_are_exactly_nothing(value, size):
    """.7 twelve times has a float32 std of 1.2e-7, which an eps of 1e-6 turns into an advantage of .1."""
    rewards, group = torch.full((size,), value), torch.zeros(size)
    lengths = torch.arange(size).double()
    for found in (
        group_advantages(rewards, group, eps=1e-6, unbiased=True), best_only(rewards, group),
        pass_at_k(rewards, group, 4), length_weighted(rewards, group, lengths),
        undiluted(group_advantages(rewards, group), group),
    ):  # fmt: skip
        assert (found.value == 0).all() and not found.live.any()


def test_the_best_alone_has_its_lead():
    found = best_only(torch.tensor([0.2, 0.9, 0.5, 0.4, NAN, 3.0]), torch.tensor([0, 0, 0, 0, 0, 1]))
    assert found.value.tolist() == pytest.approx([0, 1.3587277, 0, 0, 0, 0], abs=1e-6)
    assert found.live.tolist() == [True, False]
    assert best_only(torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3)).value.tolist() == [0, 0, 0]
    plain = best_only(torch.tensor([0.2, 0.9, 0.5]), torch.zeros(3), std=False)
    assert plain.value.tolist() == pytest.approx([0, 0.4, 0])


@pytest.mark.parametrize(("k", "right", "wrong"), [(4, 0.5222330, -0.1740777), (1, 1.7320508, -0.5773503)])
def test_pass_at_k_has_the_known_values(k, right, wrong):
    found = pass_at_k(torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0, NAN]), torch.zeros(9), k)
    assert found.value.tolist() == pytest.approx([right, *[wrong] * 3, right, *[wrong] * 3, 0], abs=1e-7)


def test_an_answer_at_the_threshold_is_right():
    at, above = (pass_at_k(torch.tensor([x, 0.0, 0.25, 0.0]), torch.zeros(4), 2, 0.5) for x in (0.5, 1.0))
    assert at.live.all() and torch.equal(at.value, above.value)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("right", [1, 2, 4, 5])
def test_pass_at_k_is_the_mean_over_all_sets(k, right):
    """Each answer's mean advantage in the sets of k that it is in, with those sets' own mean and std."""
    rewards = torch.tensor([1.0] * right + [0.0] * (5 - right), dtype=torch.float64)
    sets = list(itertools.combinations(range(5), k))
    passed = np.array([max(rewards[list(s)].tolist()) for s in sets])
    found = pass_at_k(rewards, torch.zeros(5), k)
    if passed.std() == 0:
        assert (found.value == 0).all() and not found.live.any()
        return
    score = (passed - passed.mean()) / passed.std()
    expected = [np.mean([x for x, s in zip(score, sets, strict=True) if i in s]) for i in range(5)]
    assert found.value.tolist() == pytest.approx(expected)
    assert float(found.value.sum()) == pytest.approx(0, abs=1e-12)


def test_too_few_answers_for_a_set():
    assert not pass_at_k(torch.tensor([1.0, 0.0, NAN]), torch.zeros(3), 3).live.any()


def test_the_length_weighted_baseline():
    """.6 for rewards 1 0 0 1 and lengths 4 2 6 8; in float32, in any order, with others in between."""
    rewards = torch.tensor([1.0, 7, 0, 0, NAN, 1, 8])
    group, lengths = torch.tensor([3, 1, 3, 3, 3, 3, 1]), torch.tensor([4.0, 1, 2, 6, 5, 8, 1])
    found = length_weighted(rewards, group, lengths)
    assert found.value.tolist() == pytest.approx([0.4, -0.5, -0.6, -0.6, 0, 0.4, 0.5])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(length_weighted(rewards[order], group[order], lengths[order]).value, found.value[order])


def test_groups_that_agree_do_not_dilute():
    found = undiluted(group_advantages(MIXED, GROUPS, "none"), GROUPS)
    assert found.value.tolist() == [1, -1, -1, 1, 0, 0, 0, 0]


def test_answers_without_a_verdict_are_on_neither_side_of_that_share():
    """5 verdicts, 3 of them in the live group: alpha = 5 / 3."""
    rewards = torch.tensor([1.0, 0, 0, NAN, 1, 1, NAN, NAN])
    found = undiluted(group_advantages(rewards, GROUPS, "none"), GROUPS)
    assert found.value.tolist() == pytest.approx([10 / 9, -5 / 9, -5 / 9, 0, 0, 0, 0, 0])


def test_early_tools_get_a_capped_bonus():
    """Group 0 by hand: p = 2, 6, -, l = 10, 20, 30; group 1 is dead."""
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0], dtype=torch.float64)
    group, position = torch.tensor([4, 4, 4, 2, 2]), torch.tensor([2.0, 6, NAN, 0, 9], dtype=torch.float64)
    lengths = torch.tensor([10.0, 20, 30, 5, 5])
    found = earlier_tools(advantages, group, position, lengths, coef=-2.0, cap=0.3)
    assert found.tolist() == pytest.approx([1 + 0.2, -0.5 - 0.15, -0.5, 0, 0])


def test_sure_answers_count_for_more():
    advantages, group = torch.tensor([1.0, -1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    found = sure_first(advantages, group, torch.tensor([0.5, 1.5, NAN, 0.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([2.0, -1 / 1.5, 2.0, 3.0])


def test_no_answer_is_so_sure_that_it_drowns_the_others():
    """Means of H are 0.375 and 3: factors of 3750 and 3 / 0.55 are 5, one of 3 / 0.65 stays what it is."""
    entropy = torch.tensor([1e-4, 0.74990, 0.55, 0.65, 7.8], dtype=torch.float64)
    found = sure_first(torch.ones(5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1]), entropy)
    assert found.tolist() == pytest.approx([5, 0.375 / 0.7499, 5, 3 / 0.65, 3 / 7.8])


# -------------------------------------------------------------------------------------------------- credit of tokens


def some_tokens(num=5, places=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num, places, generator=generator, dtype=torch.float64)
    mask = torch.rand(num, places, generator=generator) < 0.7
    mask[0] = True
    mask[1] = False
    return rewards.where(mask, 0.0), values, mask


def gae_by_sum(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} of one answer without holes."""
    values = [*values, 0.0]
    delta = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:])) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.99, 0.5)])
def test_gae_is_the_sum_over_what_is_on_the_mask(gamma, lam):
    rewards, values, mask = some_tokens()
    found = gae(rewards, values.where(mask, torch.nan).nan_to_num(7.0), mask, gamma, lam)
    for row in range(5):
        own = mask[row]
        expected = gae_by_sum(rewards[row][own].tolist(), values[row][own].tolist(), gamma, lam)
        assert found[row][own].tolist() == pytest.approx(expected, rel=1e-12)
    assert (found[~mask] == 0).all()


def test_a_lambda_for_each_answer():
    rewards, values, mask = some_tokens()
    lam = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9], dtype=torch.float64)
    found = gae(rewards, values, mask, 0.9, lam)
    for row in range(5):
        torch.testing.assert_close(found[row], gae(rewards, values, mask, 0.9, float(lam[row]))[row])


def test_returns_skip_what_is_off_the_mask():
    rewards, mask = torch.tensor([[1.0, 0, 0, 2.0, 0]]), torch.tensor([[True, False, True, True, False]])
    assert discounted(rewards, mask, 0.5).tolist() == [[1 + 0.5 * (0 + 0.5 * 2), 0, 1, 2, 0]]


def test_the_adaptive_lambda_of_long_answers_is_near_one():
    assert adaptive_lambda(torch.tensor([0, 20, 40, 2000]), 0.05).tolist() == pytest.approx([0, 0, 0.5, 0.99])


def test_monte_carlo_values_are_means_of_verdicts():
    """VinePPO: with them, gae at lam = 0 is V(s_{t+1}) - V(s_t), and the last one the reward less V."""
    found = monte_carlo_values(torch.tensor([[1.0, 0, NAN], [NAN, NAN, NAN], [1, 1, 0]]))
    assert found[[0, 2]].tolist() == pytest.approx([0.5, 2 / 3]) and found[1].isnan()
    values, rewards = torch.tensor([[0.5, 0.25, 2 / 3]]), torch.tensor([[0.0, 0.0, 1.0]])
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.0)
    assert found[0].tolist() == pytest.approx([-0.25, 2 / 3 - 0.25, 1 / 3])


def test_whitening_is_that_of_all_tokens():
    rewards, _, mask = some_tokens()
    found = whiten(rewards.where(mask, torch.nan), mask, lambda x: x)
    known = rewards[mask]
    torch.testing.assert_close(found[mask], (known - known.mean()) / (known.var() + 1e-8).sqrt())
    assert (found[~mask] == 0).all()


def test_whitening_adds_up_over_processes():
    """A process that is told the sums of the other one has the part of the whole; it asks twice, whatever it holds."""
    rewards, _, mask = some_tokens()
    whole = whiten(rewards, mask, lambda x: x)
    for mine, others in ((slice(0, 2), slice(2, 5)), (slice(2, 5), slice(0, 2))):
        known = rewards[others][mask[others]]
        mean = rewards[mask].mean()
        elsewhere = iter([torch.stack([mask[others].sum().double(), known.sum()]), (known - mean).square().sum()])
        found = whiten(rewards[mine], mask[mine], lambda x, elsewhere=elsewhere: x + next(elsewhere))
        torch.testing.assert_close(found, whole[mine])
        assert next(elsewhere, None) is None


def test_whitening_the_known_vector():
    """REINFORCE++-baseline: the advantages of Dr.GRPO over all eight answers."""
    value = group_advantages(MIXED, GROUPS, "none").value[:, None]
    found = whiten(value, torch.ones(8, 1, dtype=torch.bool), lambda x: x).flatten()
    assert found.tolist() == pytest.approx([1.3228756, -1.3228756, -1.3228756, 1.3228756, 0, 0, 0, 0], abs=1e-6)


def test_whitening_nothing():
    assert (whiten(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool), lambda x: x) == 0).all()
