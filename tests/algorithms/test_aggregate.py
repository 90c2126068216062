"""Micro-batches must not show: weighted gradients and metrics equal those of the whole update."""

import pytest
import torch

from flowrl.algorithms.aggregate import merge_metrics
from flowrl.algorithms.flow_grpo import FlowGRPO
from tests.algorithms.toy import ToyPolicy, collect, gradient


def moved_policy_and_batch():
    """Off-policy and half clipped, so that every term of the loss counts."""
    algorithm, policy = FlowGRPO(num_steps=5, clip_range=0.02, kl_coef=0.5), ToyPolicy()
    batch = collect(algorithm, policy)
    with torch.no_grad():
        policy.bias += 0.05
    return algorithm, policy, batch


@pytest.mark.parametrize("size", [1, 7, 50])
def test_micro_batches_do_not_change_gradient_or_metrics(size):
    algorithm, policy, batch = moved_policy_and_batch()
    num = len(batch.trajectory)
    whole, expected = gradient(algorithm, policy, batch)
    parts = torch.randperm(num, generator=torch.Generator().manual_seed(0)).split(size)
    done = [gradient(algorithm, policy, batch.select(p), len(p) / num) for p in parts]
    torch.testing.assert_close(sum(grad for _, grad in done), expected, rtol=1e-5, atol=1e-7)
    merged = merge_metrics([loss.metrics for loss, _ in done], [len(p) for p in parts])
    assert merged.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(merged[name], value.to(merged[name]), rtol=1e-4, atol=1e-7, msg=name)
