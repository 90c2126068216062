"""The edge table: selection, pruning, joining and minibatches."""

from dataclasses import fields

import pytest
import torch

from samplers import Trajectory, branch_at, dance_sde, linear_times, minibatch_indices, noise_source, rollout
from tests.samplers.toys import ToyNet


def tree(seed=0):
    """Two roots, two leaves after step 0, four after step 2; T = 4 with the last step ODE."""
    roots = torch.arange(2)
    noise = noise_source((3,), seed=seed, iteration=0, prompt=roots)
    plan = branch_at(linear_times(4), [0, 2]).with_kept([1, 3])
    x = noise(roots, roots * 0, -1)
    return rollout(ToyNet((3,)), x, plan, dance_sde, eta=0.5, prompt=roots + 10, group=roots, noise=noise)


def same(a, b):
    """Equal but for the calls counted, and for the numbers that states go by (which only tell them apart)."""
    names = [f.name for f in fields(Trajectory) if f.name not in ("calls", "state", "mean")]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_shapes_order_and_leaves_of_a_small_tree():
    r = tree()
    assert len(r) == 16 and r.num_leaves == 8 and r.calls == 2 * (1 + 2 + 2 + 4)
    assert r.step.tolist() == [0] * 4 + [1] * 4 + [2] * 8
    assert r.prompt.tolist() == [10, 10, 11, 11] * 2 + [10] * 4 + [11] * 4
    pairs = torch.eye(4).repeat_interleave(2, 1).bool()
    assert torch.equal(r.leaves[:4], pairs) and torch.equal(r.leaves[4:8], pairs)
    assert torch.equal(r.leaves[8:], torch.eye(8).bool())
    assert r.group.tolist() == [0] * 4 + [1] * 4 and r.leaf_prompt.tolist() == [10] * 4 + [11] * 4
    assert r.x.dtype == r.x0.dtype == r.logprob.dtype == torch.float32


def test_credit_is_a_matrix_product():
    """An edge's advantage is the mean over its leaves: (1 + 3) / 2 = 2 for the first edge."""
    r = tree()
    advantages = torch.tensor([1.0, 3, 5, 7, 0, 0, 0, 8])
    credit = (r.leaves.float() @ advantages) / r.leaves.sum(1)
    assert credit[:4].tolist() == [2, 6, 0, 4] and credit[8:].tolist() == advantages.tolist()


def test_select_takes_masks_and_indices():
    r = tree()
    by_mask, by_index = r.select(r.step == 1), r.select(torch.tensor([4, 5, 6, 7]))
    assert same(by_mask, by_index) and len(by_mask) == 4 and by_mask.num_leaves == 8
    assert r.select(torch.tensor([3, 0])).logprob.tolist() == r.logprob[[3, 0]].tolist()


def test_keep_leaves_drops_edges_that_lead_nowhere():
    r = tree()
    kept = r.keep_leaves(torch.tensor([1, 0, 0, 0, 0, 0, 1, 1]).bool())
    assert kept.num_leaves == 3 and kept.group.tolist() == [0, 1, 1]
    assert kept.step.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert kept.leaves.tolist() == [[1, 0, 0], [0, 1, 1]] * 2 + [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert torch.equal(kept.x0, r.x0[[0, 6, 7]])


def test_pruning_in_two_steps_is_pruning_at_once():
    r = tree()
    first, second = torch.arange(8) < 6, torch.arange(8) % 2 == 0
    assert same(r.keep_leaves(first).keep_leaves(second[first]), r.keep_leaves(first & second))
    assert same(r.keep_leaves(torch.ones(8).bool()), r)


def test_cat_is_block_diagonal_and_keeping_one_block_undoes_it():
    a, b = tree(0), tree(1)
    both = Trajectory.cat([a, b])
    assert len(both) == 32 and both.num_leaves == 16 and both.calls == a.calls + b.calls
    assert not both.leaves[:16, 8:].any() and not both.leaves[16:, :8].any()
    assert same(both.keep_leaves(torch.arange(16) < 8), a) and same(both.keep_leaves(torch.arange(16) >= 8), b)


def test_edges_share_a_node_exactly_where_they_share_a_state():
    a, b = tree(0), tree(1)
    for r in (a, Trajectory.cat([a, b])):
        same_node = r.state[:, None] == r.state
        same_state = (r.x[:, None] == r.x).all(-1)
        assert torch.equal(same_node, same_state) and same_node.sum() > len(r)


@pytest.mark.parametrize("how", [{"size": 5}, {"count": 3}, {"count": 100}, {"size": 100}])
def test_minibatches_hold_every_edge_once(how):
    r = tree()
    parts = list(r.minibatches(**how, generator=torch.Generator().manual_seed(0)))
    assert sorted(torch.cat([p.logprob for p in parts]).tolist()) == sorted(r.logprob.tolist())
    assert all(p.leaves.shape == (len(p), 8) for p in parts)


def test_minibatch_sizes_and_order():
    assert [i.tolist() for i in minibatch_indices(5, size=2)] == [[0, 1], [2, 3], [4]]
    assert [len(i) for i in minibatch_indices(10, count=4)] == [3, 3, 2, 2]
    assert list(minibatch_indices(0, count=4)) == [] == list(minibatch_indices(0, size=4))
    one, two = (list(minibatch_indices(9, size=9, generator=torch.Generator().manual_seed(5))) for _ in range(2))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], torch.arange(9))


@pytest.mark.parametrize("how, words", [({}, "not both or neither"), ({"size": 0}, "at least one edge")])
def test_bad_minibatches_are_refused(how, words):
    with pytest.raises(ValueError, match=words):
        tree().minibatches(**how)


def test_moving_keeps_everything():
    r = tree()
    assert same(r.to("cpu"), r) and r.to("meta").x.device.type == "meta"
