"""The parts that methods compose, where Flow-GRPO and MixGRPO do not reach: trees and weighted edges."""

import torch

from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.algorithms.mix_grpo import MixGRPO
from flowrl.algorithms.policy_gradient import clipped_policy_gradient, group_credit
from samplers import Plan, branch_at
from tests.algorithms.toy import ToyPolicy, collect


class Tree(FlowGRPO):
    """Two splits in two, and stochastic steps between them."""

    def plan(self, times, iteration, samples_per_prompt, seed) -> Plan:
        return branch_at(times, [0, 2], [2, 2])


def test_credit_of_a_tree_ignores_what_has_no_verdict():
    """R1: it is the credit of the tree without that leaf, also on the edges that it shares with others."""
    algorithm = Tree(num_steps=5)
    batch = collect(algorithm, ToyPolicy())
    batch.rewards[5] = float("nan")
    valid = ~batch.rewards.isnan()
    settings = {"std": "group", "eps": 1e-4, "clip": 5.0}
    credit = group_credit(batch, **settings)
    alive = (batch.trajectory.leaves & valid).any(1)
    batch.trajectory, batch.rewards = batch.trajectory.keep_leaves(valid), batch.rewards[valid]
    assert torch.equal(credit[alive], group_credit(batch, **settings))
    assert (credit[~alive] == 0).all()


def test_a_tree_is_on_policy_at_first():
    algorithm, policy = Tree(num_steps=5), ToyPolicy()
    loss = algorithm.loss(policy, collect(algorithm, policy))
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6


def test_weights_scale_the_edges_but_not_the_kl():
    algorithm, policy = MixGRPO(num_steps=6, window=3), ToyPolicy()
    batch = collect(algorithm, policy)
    with torch.no_grad():
        policy.bias += 0.05
    settings = {"clip_range": 0.02, "kl_form": "exact"}
    step = (algorithm.kernel, algorithm.eta)
    weight = torch.arange(len(batch.trajectory)).float()
    found = clipped_policy_gradient(policy, batch, *step, kl_coef=0.5, weight=weight, **settings)
    ratio = clipped_policy_gradient(policy, batch, *step, weight=weight, **settings).value
    torch.testing.assert_close(found.value, ratio + 0.5 * found.metrics["kl"])
    batch.advantages = batch.advantages * weight
    torch.testing.assert_close(clipped_policy_gradient(policy, batch, *step, **settings).value, ratio)
