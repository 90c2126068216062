"""BranchGRPO: what its trees cost, credit against recursion over the tree, pruning, Mix, and the noise of a split."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.advantages import edge_advantages, leaf_mean
from flowrl.algorithms.branch_grpo import BranchGRPO, fused_rewards
from flowrl.algorithms.flow_grpo import FlowGRPO
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, train

NAN = float("nan")
SMALL = {"num_steps": 6, "splits": (0, 2, 3), "split_noise": 2.0, "prune_every": 5}


def grown(k=8, num_prompts=2, iteration=0, **changes):
    """An algorithm with small trees (fanout 2 at steps 0, 2, 3 of 6: 8 leaves), and a batch of it."""
    algorithm = BranchGRPO(**{**SMALL, **changes})
    return algorithm, collect(algorithm, ToyPolicy(), iteration, num_prompts, k)


def children_of(batch):
    """For each edge, the edges that leave from the very state it ends in: the tree, read off the stored latents."""
    edges = batch.trajectory
    same = (edges.x_next[:, None] == edges.x[None]).all(2) & (edges.step[None] == edges.step[:, None] + 1)
    return [row.nonzero().flatten().tolist() for row in same]


def walk(batch, combine):
    """Value of each edge's child, from the leaves up; combine(children) folds their (log-prob, value) pairs."""
    below, rewards = children_of(batch), iter(batch.rewards.tolist())
    values = {}

    def value(edge):
        if not below[edge]:
            values[edge] = next(rewards)
        else:
            values[edge] = combine([(float(batch.trajectory.logprob[c]), value(c)) for c in below[edge]])
        return values[edge]

    for edge in (batch.trajectory.step == 0).nonzero().flatten().tolist():
        value(edge)
    return torch.tensor([values[edge] for edge in range(len(batch.trajectory))], dtype=torch.float64)


def by_probability(scale):
    def combine(children):
        known = [(logprob, value) for logprob, value in children if value == value]
        if not known:
            return NAN
        weight = torch.tensor([scale * logprob for logprob, _ in known], dtype=torch.float64).softmax(0)
        return float(sum(w * value for w, (_, value) in zip(weight, known, strict=True)))

    return combine


def trees_of(batch):
    """Number of the tree of each edge, by its prompt: one tree a prompt here."""
    return batch.trajectory.prompt


def trained(batch):
    """(step, leaf) of the edges that are trained on, behind the last split, where an edge has one leaf."""
    edges = batch.trajectory
    kept = ~batch.advantages.isnan() & (edges.leaves.sum(1) == 1)
    return {(int(edges.step[e]), int(edges.leaves[e].int().argmax())) for e in kept.nonzero().flatten()}


def test_defaults_are_the_published_recipes():
    record = BranchGRPO().model_dump()
    expected = {"num_steps": 20, "shift": 3.0, "sde": "dance_sde", "eta": 0.3, "clip_range": 1e-3, "adv_clip": 5.0}
    expected |= {"splits": (0, 3, 6, 9), "fanout": 2, "split_noise": 4.0, "prune_every": 30, "kl_coef": 0.0}
    assert {name: record[name] for name in expected} == expected


# ------------------------------------------------------------------------------------------------ cost


def test_the_published_tree_costs_what_is_published():
    """203 calls and 218 edges for 16 leaves: 12.69 and 13.625 a leaf. The last 16 edges are ODE steps, not stored."""
    plan = BranchGRPO().plan(linear_times(20), 0, 16, 0)
    assert plan.leaves_per_root == 16
    assert plan.calls() == 203
    assert sum(plan.nodes(step + 1) for step in range(20)) == 218 == 16 * 13.625
    assert plan.num_edges() == 218 - 16
    policy = ToyPolicy()
    batch = collect(BranchGRPO(), policy, num_prompts=2, k=16)
    assert policy.calls["current"] == batch.trajectory.calls == 2 * 203
    assert len(batch.trajectory) == 2 * (218 - 16)
    assert len(batch.trajectory.state.unique()) == 2 * (1 + 2 * 3 + 4 * 3 + 8 * 3 + 16 * 9)


def test_pruning_the_last_five_depths_leaves_the_published_share():
    """8.625 edges a leaf are trained on; the last of the five depths is the ODE step."""
    batch = collect(BranchGRPO(prune_steps=(15, 16, 17, 18)), ToyPolicy(), num_prompts=2, k=16)
    assert int((~batch.advantages.isnan()).sum()) == 16 * 8.625 * 2


def test_an_update_evaluates_each_state_once():
    algorithm, batch = grown()
    policy = ToyPolicy()
    gradient(algorithm, policy, batch)
    assert policy.calls["current"] == len(batch.trajectory.state.unique()) < len(batch.trajectory)


# ------------------------------------------------------------------------------------------------ credit


def test_one_split_at_the_start_is_grpo_from_shared_noise():
    branch = BranchGRPO(
        num_steps=5, splits=(0,), fanout=8, split_noise=1.0, adv_floor=0.0, adv_eps=1e-4, unbiased=False
    )
    grpo = FlowGRPO(num_steps=5, shift=3.0, sde="dance_sde", eta=0.3, shared_noise=True, adv_std="group")
    batch = collect(branch, ToyPolicy())
    assert grpo.plan(linear_times(5), 0, 8, 0) == batch.plans[0]
    torch.testing.assert_close(batch.advantages, grpo.credit(batch), rtol=1e-6, atol=1e-7)


def test_depth_wise_credit_of_a_linear_rollout_is_grpos():
    algorithm = FlowGRPO(num_steps=5, adv_std="group")
    batch = collect(algorithm, ToyPolicy())
    edges = batch.trajectory
    found = edge_advantages(leaf_mean(batch.rewards, edges.leaves), edges.prompt, edges.step)
    torch.testing.assert_close(found.float(), batch.advantages, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("missing", [(), (3,), (0, 1, 9)])
def test_credit_is_the_depth_wise_z_score_of_recursive_means(missing):
    algorithm, batch = grown(adv_floor=0.0)
    batch.rewards[list(missing)] = NAN
    below, edges = batch.trajectory.leaves, batch.trajectory
    value = torch.stack([batch.rewards[row].nanmean() for row in below])
    expected = torch.full_like(value, NAN)
    for tree in trees_of(batch).unique():
        for step in edges.step.unique():
            cell = ((trees_of(batch) == tree) & (edges.step == step) & ~value.isnan()).nonzero().flatten()
            # torch.std divides by n - 1
            expected[cell] = (value[cell] - value[cell].mean()) / (value[cell].std() + 1e-8)
    torch.testing.assert_close(algorithm.credit(batch), expected.float(), equal_nan=True)
    if not missing:
        plain = walk(batch, lambda children: sum(value for _, value in children) / len(children))
        torch.testing.assert_close(plain, value, rtol=1e-12, atol=0)


def test_several_trees_of_a_prompt_are_compared_each_by_itself():
    algorithm, batch = grown(k=16)
    before = batch.advantages
    batch.rewards[8:16] = 100 * batch.rewards[8:16] - 7
    after = algorithm.credit(batch)
    first = batch.trajectory.leaves[:, :8].any(1)
    assert torch.equal(after[first], before[first])
    # The same z-scores, but for the floor and eps, which count less at a hundred times the scale.
    torch.testing.assert_close(after[~first], before[~first], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("missing", [(), (5,), (4, 5), range(8)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 40.0])
def test_probability_fusion_is_the_recursion(scale, missing):
    _, batch = grown()
    batch.rewards[list(missing)] = NAN
    found = fused_rewards(batch.trajectory, batch.rewards, scale)
    torch.testing.assert_close(found, walk(batch, by_probability(scale)), rtol=1e-10, atol=1e-12, equal_nan=True)
    if not missing:
        assert (found - fused_rewards(batch.trajectory, batch.rewards)).abs().max() > 1e-3


def test_probability_fusion_of_equally_probable_siblings_is_the_mean():
    _, batch = grown()
    edges = replace(batch.trajectory, logprob=torch.full_like(batch.trajectory.logprob, -0.7))
    torch.testing.assert_close(fused_rewards(edges, batch.rewards, 30.0), leaf_mean(batch.rewards, edges.leaves))


def test_a_large_fusion_scale_follows_the_most_probable_child():
    _, batch = grown()
    found = fused_rewards(batch.trajectory, batch.rewards, 1e9)
    torch.testing.assert_close(found, walk(batch, lambda children: max(children)[1]))


def test_the_credit_takes_the_fusion_it_is_told():
    algorithm, batch = grown(fusion="probability", fusion_scale=5.0)
    plain = algorithm.model_copy(update={"fusion": "mean"}).credit(batch)
    value = walk(batch, by_probability(5.0))
    expected = edge_advantages(
        value, trees_of(batch), batch.trajectory.step, eps=1e-8, std_floor=1e-3, unbiased=True
    ).clamp(-5, 5)
    torch.testing.assert_close(batch.advantages, expected.float())
    assert (plain - batch.advantages).abs().max() > 0.1


def test_two_nodes_differ_by_their_sign_alone_unless_there_is_a_floor():
    gap = 1e-5
    sharp, batch = grown(adv_floor=0.0)
    # The trees' two halves differ by `gap` in the mean, and nothing else does.
    batch.rewards = torch.tensor([0.0, gap]).double().repeat_interleave(4).repeat(2)
    top = batch.trajectory.step == 0
    half = batch.trajectory.leaves[top].int().argmax(1) % 8 // 4 * 2 - 1
    torch.testing.assert_close(sharp.credit(batch)[top], 0.5**0.5 * half, rtol=1e-2, atol=0)
    floored = sharp.model_copy(update={"adv_floor": 1e-3})
    torch.testing.assert_close(floored.credit(batch)[top], gap / 2 / 1e-3 * half, rtol=1e-3, atol=0)


def test_credit_is_cut_and_without_std_it_is_the_plain_difference():
    algorithm, batch = grown(adv_std="none", adv_clip=1e9)
    value = leaf_mean(batch.rewards, batch.trajectory.leaves)
    top = (batch.trajectory.step == 1) & (batch.trajectory.prompt == 0)
    torch.testing.assert_close(batch.advantages[top].double(), value[top] - value[top].mean(), rtol=1e-5, atol=1e-6)
    cut = algorithm.model_copy(update={"adv_clip": 0.01}).credit(batch)
    torch.testing.assert_close(cut, batch.advantages.clamp(-0.01, 0.01))


def test_before_the_first_split_there_is_nothing_to_compare():
    algorithm, batch = grown(splits=(1, 3, 4))
    prefix = batch.trajectory.step == 0
    assert (batch.advantages[prefix] == 0).all() and (batch.advantages[~prefix] != 0).all()
    dropped = algorithm.model_copy(update={"drop_zero": True}).credit(batch)
    assert torch.equal(dropped.isnan(), prefix)


# ------------------------------------------------------------------------------------------------ pruning


def test_pruned_depths_slide_towards_the_last_split_and_stop():
    algorithm = BranchGRPO(prune_steps=(14, 15, 16, 17, 18))
    first = {i: algorithm.pruned_steps(i)[0] for i in (0, 29, 30, 59, 60, 149, 150, 10_000)}
    assert first == {0: 14, 29: 14, 30: 13, 59: 13, 60: 12, 149: 10, 150: 9, 10_000: 8}  # depth 9, the last split's
    assert algorithm.pruned_steps(60) == (12, 13, 14, 15, 16)
    assert BranchGRPO(prune_steps=(14,), prune_stop=12).pruned_steps(10_000) == (12,)
    assert BranchGRPO(prune_steps=(4,)).pruned_steps(10_000) == (4,)
    assert BranchGRPO().pruned_steps(100) == ()


def test_pruned_edges_leave_and_the_others_keep_their_credit():
    plain, batch = grown(iteration=7)
    pruned = plain.model_copy(update={"prune_steps": (4,)})
    found = pruned.credit(batch)
    gone = batch.trajectory.step == 3
    assert torch.equal(found.isnan(), gone)
    assert torch.equal(found[~gone], batch.advantages[~gone])
    assert torch.equal(pruned.model_copy(update={"prune_until": 7}).credit(batch), batch.advantages)
    assert torch.equal(pruned.model_copy(update={"prune_until": 8}).credit(batch).isnan(), gone)


def test_parent_top_keeps_the_best_child_of_every_last_split():
    _, batch = grown(width="parent_top", num_steps=8)
    best = [2 * pair + int(r[1] > r[0]) for pair, r in enumerate(batch.rewards.view(-1, 2))]
    assert trained(batch) == {(s, leaf) for s in (4, 5, 6) for leaf in best} | {(3, leaf) for leaf in range(16)}
    assert not batch.advantages[batch.trajectory.step <= 3].isnan().any()


@pytest.mark.parametrize(("share", "best", "worst"), [(0.5, 2, 2), (0.4, 2, 1), (0.01, 1, 1), (1.0, 4, 4)])
def test_extreme_keeps_the_best_and_worst_of_each_tree(share, best, worst):
    _, batch = grown(k=16, width="extreme", width_share=share)
    kept = set()
    for start in range(0, 32, 8):
        order = sorted(range(start, start + 8), key=lambda leaf: batch.rewards[leaf])
        kept |= {*order[:worst], *order[-best:]}
    assert {leaf for step, leaf in trained(batch) if step == 4} == kept


@pytest.mark.parametrize("width", ["parent_top", "extreme"])
def test_width_pruning_leaves_something_of_every_tree_with_a_verdict(width):
    algorithm, batch = grown(width=width, width_share=0.01)
    batch.rewards[8:] = NAN
    batch.rewards[1:7] = NAN
    credit = algorithm.credit(batch)
    late = batch.trajectory.step > 3
    first, second = (batch.trajectory.leaves[:, part].any(1) for part in (slice(8), slice(8, 16)))
    assert (~credit[late & first].isnan()).any()
    assert credit[second].isnan().all()


def test_pruning_everything_is_refused_for_every_iteration():
    """At first, after sliding, and where only steps without anything to compare would be left."""
    with pytest.raises(ValidationError, match="nothing to learn from"):
        BranchGRPO(num_steps=4, splits=(0,), prune_steps=(0, 1, 2))
    with pytest.raises(ValidationError, match="nothing to learn from.*Prune fewer"):
        BranchGRPO(num_steps=4, splits=(1,), prune_steps=(1, 2))
    sliding = {"num_steps": 6, "splits": (1, 2), "mix_window": 0, "prune_steps": (3, 4), "prune_stop": 1}
    with pytest.raises(ValidationError, match="moved by 2 at iteration 60"):
        BranchGRPO(**sliding)
    algorithm = BranchGRPO(**{**sliding, "prune_stop": 2})
    for iteration in (0, 30, 60, 10_000):
        left = set(algorithm.plan(linear_times(6), iteration, 4, 0).stochastic_steps)
        assert left - set(algorithm.pruned_steps(iteration))


# ------------------------------------------------------------------------------------------------ Mix and noise


def test_the_mix_window_slides_with_the_iterations():
    algorithm = BranchGRPO(num_steps=10, splits=(0, 4), mix_window=3, mix_every=5)
    seen = []
    for iteration in range(50):
        plan = algorithm.plan(linear_times(10), iteration, 4, 0)
        start = iteration // 5 % 7  # stops 0 to 6: the last step is never stochastic
        assert set(plan.stochastic_steps) == {0, 4, start, start + 1, start + 2}
        assert plan.fanout == (2, 1, 1, 1, 2, 1, 1, 1, 1, 1)
        seen.append(start)
    assert set(seen) == set(range(7)) and seen[35] == 0
    assert BranchGRPO(mix_window=0).plan(linear_times(20), 5, 16, 0).stochastic_steps == (0, 3, 6, 9)


def test_mix_trains_the_window_and_the_splits():
    _, batch = grown(num_steps=8, mix_window=2, mix_every=1, iteration=4)
    assert batch.trajectory.step.unique().tolist() == [0, 2, 3, 4, 5]
    assert (batch.advantages != 0).all()


def dance_step(batch, policy, eta):
    """DanceGRPO's published step, dx = v ds - eta^2 / 2 score ds with the score of its clean estimate."""
    edges = batch.trajectory
    t, h = edges.t.double()[:, None], (edges.t - edges.t_next).double()[:, None]
    x = edges.x.double()
    v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)).detach().double()
    score = -(x - (1 - t) * (x - t * v)) / t**2
    return x - h * v + 0.5 * eta**2 * score * h, eta * h.sqrt()


def test_the_noise_of_a_split_is_in_its_log_prob():
    policy, algorithm = ToyPolicy(), BranchGRPO(num_steps=6, splits=(0, 2, 3))
    batch = collect(algorithm, policy, num_prompts=100)
    edges = batch.trajectory
    is_split = torch.isin(edges.step, torch.tensor([0, 2, 3]))
    torch.testing.assert_close(edges.eta, torch.where(is_split, 1.2, 0.3))
    mean, std = dance_step(batch, policy, edges.eta.double()[:, None])
    expected = torch.distributions.Normal(mean, std).log_prob(edges.x_next.double()).mean(1)
    torch.testing.assert_close(edges.logprob.double(), expected, rtol=1e-4, atol=1e-5)
    noise = (edges.x_next.double() - mean) / std
    for step in range(5):
        drawn = noise[edges.step == step]
        assert drawn.std() == pytest.approx(1, abs=4 / (2 * drawn.numel()) ** 0.5)
        assert drawn.mean() == pytest.approx(0, abs=4 / drawn.numel() ** 0.5)


def test_the_first_update_is_on_policy_with_pruning_and_fusion():
    algorithm, batch = grown(width="extreme", fusion="probability", prune_steps=(1,))
    loss, grad = gradient(algorithm, ToyPolicy(), live(batch))
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6
    assert grad.abs().min() > 0


# ------------------------------------------------------------------------------------------------ refusals, learning


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"splits": (0, 19)}, r"splits=\[0, 19\] must name different steps from 0 to 18"),
        ({"splits": (3, 3)}, "different"),
        ({"splits": (-1,)}, "from 0"),
        ({"splits": ()}, "at least 1"),
        ({"prune_steps": (19,)}, r"prune_steps=\[19\].*last always follows the ODE"),
        ({"fanout": 1}, "greater than or equal to 2"),
        ({"split_noise": 0.0}, "greater than 0"),
        ({"sde": "cps", "eta": 0.5}, r"times split_noise=4, but eta=2 is impossible.*\(0, 1\]"),
        ({"mix_window": 20}, "mix_window=20 reaches past the end.*leaves 19 steps"),
        ({"prune_stop": -1}, "greater than or equal to 0"),
        ({"width_share": 0.0}, "greater than 0"),
        ({"width": "top"}, "parent_top"),
        ({"combine": "gdpo"}, "combine=gdpo compares samples.*leave combine at sum"),
        ({"baseline": "leave_one_out"}, "leave baseline at mean"),
        ({"adv_std": "global"}, "choose group.*or none"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        BranchGRPO(**fields)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (1, "at least 2"),
        (12, "samples_per_prompt=12 is no multiple of the 16 leaves.*change it, the splits or the fanout"),
    ],
)
def test_groups_that_do_not_hold_whole_trees_are_refused(k, message):
    with pytest.raises(ValueError, match=message):
        BranchGRPO().plan(linear_times(20), 0, k, 0)


def test_credit_says_what_is_missing():
    algorithm, batch = grown()
    batch.rewards = None
    with pytest.raises(ValueError, match="score the samples first"):
        algorithm.credit(batch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "probability", "prune_steps": (4,)},
        {"width": "extreme"},
        {"mix_window": 2, "mix_every": 5},
    ],
    ids=["tree", "fusion and depths", "width", "mix"],
)
def test_it_learns(changes):
    algorithm = BranchGRPO(**{**SMALL, "eta": 0.5, **changes})
    _, records = train(algorithm, iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
