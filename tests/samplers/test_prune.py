"""Pruning masks."""

import torch

from samplers import at_steps, best_and_worst

NAN = float("nan")


def test_best_and_worst_of_every_group():
    rewards = torch.tensor([1.0, 5, 3, 2, 9, 7, 8, 6])
    group = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])
    assert best_and_worst(rewards, group, 1, 1).tolist() == [True, True, False, False, True, False, False, True]
    assert best_and_worst(rewards, group, 2).tolist() == [False, True, True, False, True, False, True, False]


def test_groups_may_be_interleaved():
    rewards, group = torch.tensor([1.0, 5, 3, 2]), torch.tensor([7, 2, 7, 2])
    assert best_and_worst(rewards, group, 1).tolist() == [False, True, True, False]


def test_ties_go_to_the_earlier_leaf_and_no_leaf_counts_twice():
    rewards, group = torch.zeros(4), torch.zeros(4).long()
    assert best_and_worst(rewards, group, 1, 1).tolist() == [True, True, False, False]


def test_no_verdict_is_never_kept():
    rewards, group = torch.tensor([NAN, 1, 2, NAN]), torch.zeros(4).long()
    assert best_and_worst(rewards, group, 1, 1).tolist() == [False, True, True, False]
    assert best_and_worst(rewards, group, 5, 5).tolist() == [False, True, True, False]


def test_at_steps():
    step = torch.tensor([0, 0, 3, 5])
    assert at_steps(step, [0, 5]).tolist() == [True, True, False, True]
    assert at_steps(step, []).tolist() == [False] * 4
