"""Which of its steps a sample is trained on: how many, how they are drawn, and on what the draw depends."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from flowrl.algorithms.dance_grpo import DanceGRPO
from flowrl.algorithms.filtering import random_steps
from samplers import branch_at
from tests.algorithms.toy import ToyPolicy, collect

PROMPTS, K = 3, 4


@pytest.fixture(scope="module")
def batch():
    return collect(DanceGRPO(num_steps=11), ToyPolicy(), num_prompts=PROMPTS, k=K)


def drawn(batch, share=0.6):
    """For each sample, the steps that it keeps."""
    keep, edges = random_steps(batch, share), batch.trajectory
    return [tuple(edges.step[keep & edges.leaves[:, leaf]].tolist()) for leaf in range(edges.num_leaves)]


@pytest.mark.parametrize("share", ["0.01", "0.1", "0.29", "0.3", "0.55", "0.6", "0.7", "0.99", "1"])
@pytest.mark.parametrize("num_steps", [2, 6, 11, 16])
def test_the_share_is_exact(share, num_steps):
    """int(share (T - 1)) in exact fractions: in floats 0.3 x 10 may come out below 3."""
    batch = collect(DanceGRPO(num_steps=num_steps), ToyPolicy(), num_prompts=2, k=2)
    expected = max(1, int(Fraction(share) * (num_steps - 1)))
    assert [len(set(steps)) for steps in drawn(batch, float(share))] == [expected] * 4


def test_every_sample_iteration_and_seed_draws_its_own(batch):
    draws = [steps for now in (batch, replace(batch, iteration=1), replace(batch, seed=1)) for steps in drawn(now)]
    assert len(draws) == 3 * PROMPTS * K
    assert len(set(draws)) > 0.8 * len(draws)  # of 210 possible draws
    assert drawn(batch) == drawn(batch)


def test_all_steps_are_drawn_equally_often(batch):
    count = torch.zeros(10)
    for iteration in range(200):
        keep = random_steps(replace(batch, iteration=iteration), 0.6)
        count += torch.bincount(batch.trajectory.step[keep], minlength=10)
    drawn_of, share = 200 * PROMPTS * K, 0.6
    sigma = (drawn_of * share * (1 - share)) ** 0.5
    assert ((count - share * drawn_of).abs() < 4.5 * sigma).all()


def test_it_depends_neither_on_the_process_nor_on_the_order_of_the_edges(batch):
    edges, whole = batch.trajectory, random_steps(batch, 0.6)
    for mine in (edges.prompt == 0, edges.prompt > 0):
        part = replace(batch, trajectory=edges.select(mine))
        assert torch.equal(random_steps(part, 0.6), whole[mine])
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))
    shuffled = replace(batch, trajectory=edges.select(order))
    assert torch.equal(random_steps(shuffled, 0.6), whole[order])


def test_a_shared_edge_counts_for_the_first_sample_below_it():
    class Tree(DanceGRPO):
        def plan(self, times, iteration, samples_per_prompt, seed):
            return branch_at(times, [2], 4)

    batch = collect(Tree(num_steps=7, step_share=1.0), ToyPolicy(), num_prompts=2, k=4)
    keep, edges = random_steps(batch, 0.5), batch.trajectory
    of_sample = [edges.leaves.int().argmax(1) == leaf for leaf in range(8)]
    assert [int(own.sum()) for own in of_sample] == [6, 4, 4, 4] * 2
    assert [int(keep[own].sum()) for own in of_sample] == [3, 2, 2, 2] * 2
