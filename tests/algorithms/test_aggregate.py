"""Micro-batches must not show: weighted gradients and metrics equal those of the whole update."""

import pytest
import torch

from flowrl.algorithms.aggregate import masked_mean, merge_metrics
from flowrl.algorithms.flow_grpo import FlowGRPO
from tests.algorithms.toy import ToyPolicy, collect, gradient, select


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
    done = [gradient(algorithm, policy, select(batch, p), len(p) / num) for p in parts]
    torch.testing.assert_close(sum(grad for _, grad in done), expected, rtol=1e-5, atol=1e-7)
    merged = merge_metrics([loss.metrics for loss, _ in done], [len(p) for p in parts])
    assert merged.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(merged[name], value.to(merged[name]), rtol=1e-4, atol=1e-7, msg=name)


def test_masked_mean_does_not_touch_masked_entries():
    value = torch.tensor([[1.0, float("nan"), 3.0], [float("inf"), 4.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_mean(value, mask, dim=1).tolist() == [2, 4]
    mean = masked_mean(value, mask)
    mean.backward()
    assert float(mean.detach()) == pytest.approx(8 / 3)
    torch.testing.assert_close(value.grad, mask / 3)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((3,), float("nan")), torch.zeros(3, dtype=torch.bool)) == 0
