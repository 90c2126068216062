"""Micro-batches must not show: weighted gradients and metrics equal those of the whole update."""

import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from flowrl.algorithms.aggregate import Mode, aggregate, mass, merge_metrics, of_answers, share
from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.update import Updater
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
    counts = [dict.fromkeys(loss.metrics, len(p)) for (loss, _), p in zip(done, parts, strict=True)]
    merged = merge_metrics([loss.metrics for loss, _ in done], counts)
    assert merged.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(merged[name], value.to(merged[name]), rtol=1e-4, atol=1e-7, msg=name)


def test_extremes_merge_as_such_and_means_by_what_they_are_means_of():
    parts = [{"x_max": 3.0, "x_min": 1.0, "x": 1.0}, {"x_max": 2.0, "x_min": -1.0, "x": 5.0}]
    told = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]
    found = merge_metrics(told, [dict.fromkeys(part, num) for part, num in zip(parts, (3.0, 1.0), strict=True)])
    assert {name: float(value) for name, value in found.items()} == {"x_max": 3, "x_min": -1, "x": 2}


def test_processes_merge_as_micro_batches_do():
    parts = [{"x_max": 3.0, "x_min": 1.0, "x": 1.0}, {"x_max": 2.0, "x_min": -1.0, "x": 5.0}]
    counts = [dict.fromkeys(part, num) for part, num in zip(parts, (3.0, 1.0), strict=True)]
    told = [json.dumps(pair) for pair in zip(parts, counts, strict=True)]
    updater = SimpleNamespace(engine=SimpleNamespace(world=2, gather_text=lambda text: told))
    assert Updater._merge(updater, parts[0], counts[0]) == {"x_max": 3, "x_min": -1, "x": 2}


# ------------------------------------------------------------------------------------------------ means over answers

MODES = get_args(Mode)


def table(num=9, places=6, seed=0):
    """Losses and masks of answers with holes, one of them without any token."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(num, places, generator=generator, dtype=torch.float64)
    mask = torch.rand(num, places, generator=generator) < 0.6
    mask[3] = False
    return loss, mask


def horizon_of(mode):
    return 10 if mode == "seq_mean_token_sum_norm" else None


def test_means_have_the_known_values():
    loss = torch.tensor([[-1.2, -0.6065307], [1.1051710, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    expected = {
        "token_mean": -0.2337866, "seq_mean_token_mean": 0.1009528, "seq_mean_token_sum": -0.3506799,
        "seq_mean_token_sum_norm": -0.1753399, "token_sum": -0.7013597,
    }  # fmt: skip
    found = {mode: float(aggregate(loss, mask, mode, 2 if mode.endswith("norm") else None)) for mode in MODES}
    assert found == {mode: pytest.approx(value, abs=1e-7) for mode, value in expected.items()}


@pytest.mark.parametrize("mode", MODES)
def test_means_equal_the_loop(mode):
    loss, mask = table()
    sums = [sum(x for x, m in zip(row, kept, strict=True) if m) for row, kept in zip(loss, mask, strict=True)]
    lengths = mask.sum(1).tolist()
    alive = [i for i, length in enumerate(lengths) if length]
    expected = {
        "token_mean": sum(sums) / sum(lengths),
        "seq_mean_token_mean": sum(sums[i] / lengths[i] for i in alive) / len(alive),
        "seq_mean_token_sum": sum(sums) / len(alive),
        "seq_mean_token_sum_norm": sum(sums) / len(alive) / 10,
        "token_sum": sum(sums),
    }[mode]
    assert len(alive) == 8
    torch.testing.assert_close(aggregate(loss, mask, mode, horizon_of(mode)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_add_up_to_the_whole(mode, size):
    """Value and gradient, whatever the cut, and though a part has no token that counts."""
    loss, mask = table()
    loss.requires_grad_()
    horizon, total = horizon_of(mode), mass(mask)
    whole = aggregate(loss, mask, mode, horizon)
    (expected,) = torch.autograd.grad(whole, loss)
    parts = torch.randperm(9, generator=torch.Generator().manual_seed(1)).split(size)
    torch.testing.assert_close(sum(mass(mask[p]) for p in parts), total)
    added = sum(share(mask[p], total, mode) * aggregate(loss[p], mask[p], mode, horizon) for p in parts)
    torch.testing.assert_close(added, whole)
    torch.testing.assert_close(torch.autograd.grad(added, loss)[0], expected)
    assert (expected[~mask] == 0).all() and (expected[mask] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_count_may_be_anything(mode):
    loss, mask = table()
    wild = loss.where(mask, torch.nan)
    torch.testing.assert_close(
        aggregate(wild, mask, mode, horizon_of(mode)), aggregate(loss, mask, mode, horizon_of(mode))
    )


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_zero(mode):
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(torch.ones(2, 3), nothing, mode, horizon_of(mode)) == 0
    assert mass(nothing).tolist() == [0, 0]
    assert share(nothing, mass(nothing), mode) == (1 if mode == "token_sum" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_answers_can_be_averaged_as_their_tokens_are(mode):
    _, mask = table()
    values = torch.arange(9, dtype=torch.float64).square()
    found = aggregate(of_answers(values, mask, mode, horizon_of(mode)), mask, mode, horizon_of(mode))
    alive, lengths = mask.any(1), mask.sum(1)
    expected = values[alive].mean()
    if mode == "token_mean":
        expected = (values * lengths).sum() / lengths.sum()
    if mode == "token_sum":
        expected = values[alive].sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("mode", "horizon"), [("seq_mean_token_sum_norm", None), ("token_mean", 100)])
def test_a_horizon_is_for_one_mean(mode, horizon):
    with pytest.raises(ValueError, match=f"aggregate={mode} with horizon={horizon}: set algorithm.horizon"):
        aggregate(*table(), mode, horizon)
