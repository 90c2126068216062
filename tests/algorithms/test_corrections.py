"""Answers of a foreign engine: the weights against their cases, what is left out, and what they are for."""

import math
from typing import get_args

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from flowrl.algorithms.corrections import (
    Rejection,
    importance_weights,
    off_policy_sequences,
    proximal_logprob,
    rejected,
    weight_metrics,
)

MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])
LOG_W = torch.tensor([[math.log(0.25), math.log(3.0), 9.0, math.log(1.5)], [math.log(1.2), 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("tis", [[0.25, 2.0, 0, 1.5], [1.2, 0, 0, 0]]),
        ("mis", [[0.25, 0, 0, 1.5], [1.2, 0, 0, 0]]),
        ("icepop", [[0, 0, 0, 1.5], [1.2, 0, 0, 0]]),
    ],
)
def test_weights_of_tokens_by_cases(mode, expected):
    found = importance_weights(LOG_W.clone().requires_grad_(), MASK, mode, "token", 0.5, 2.0)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("level", "weight"), [("sequence", 0.25 * 3 * 1.5), ("geometric", (0.25 * 3 * 1.5) ** (1 / 3))]
)
@pytest.mark.parametrize(("mode", "high"), [("tis", 1.0), ("mis", 1.0), ("mis", 2.0), ("icepop", 2.0)])
def test_weights_of_answers_are_products_over_their_tokens(level, weight, mode, high):
    found = importance_weights(LOG_W, MASK, mode, level, 0.5, high)
    whole = [min(w, high) if mode == "tis" else w * (w <= high) for w in (weight, 1.2)]
    torch.testing.assert_close(found, MASK * torch.tensor(whole)[:, None])


def test_weights_at_a_bound_are_kept():
    log_weight = torch.tensor([[-0.7, 1.6, -0.70001, 1.60001]], dtype=torch.float64)
    low, high = log_weight[0, :2].exp().tolist()
    mask = torch.ones_like(log_weight, dtype=torch.bool)
    for mode, kept in (("icepop", [True, True, False, False]), ("mis", [True, True, True, False])):
        found = importance_weights(log_weight, mask, mode, "token", low, high)
        assert torch.equal(found, log_weight.exp() * torch.tensor(kept)), mode


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_of_wild_engines_are_finite(level):
    log_weight = torch.tensor([[1e4, -1e4, torch.inf], [30.0, 30.0, 30.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert importance_weights(log_weight.nan_to_num(1e6), mask, "tis", level, 0.0, 1e30).isfinite().all()


def test_truncation_only_lowers_what_the_weights_correct():
    """E_mu [w f] = E_pi [f] where nothing is cut; the point of it all."""
    generator = torch.Generator().manual_seed(0)
    pi, mu = (Categorical(logits=torch.randn(5, generator=generator, dtype=torch.float64)) for _ in range(2))
    f = torch.randn(5, generator=generator, dtype=torch.float64)
    log_weight = (pi.probs / mu.probs).log()[None]
    weight = importance_weights(log_weight, torch.ones(1, 5, dtype=torch.bool), "tis", "token", 0.0, 1e9)[0]
    torch.testing.assert_close((mu.probs * weight * f).sum(), (pi.probs * f).sum())


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (-1.0, 2.0), (1.0, 1.0)])
def test_bounds_that_leave_nothing_are_refused(low, high):
    with pytest.raises(ValueError, match="0 <= low < high"):
        importance_weights(LOG_W, MASK, "icepop", "token", low, high)


def test_unknown_modes_and_levels_are_named():
    with pytest.raises(ValueError, match="'clip'; choose tis, mis or icepop"):
        importance_weights(LOG_W, MASK, "clip", "token", 0, 2)
    with pytest.raises(ValueError, match="'word'; choose token, sequence or geometric"):
        importance_weights(LOG_W, MASK, "tis", "word", 0, 2)


@pytest.mark.parametrize("how", get_args(Rejection))
def test_rejections_equal_the_loop(how):
    generator = torch.Generator().manual_seed(0)
    log_weight = 0.5 * torch.randn(30, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(30, 6, generator=generator) < 0.6
    statistic, form = how.split("_")
    distance = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(x) - 1 - x}[form]
    low, high = (-0.2, 0.3) if form == "k1" else (0.02, 0.2)
    expected = []
    for row, kept in zip(log_weight.tolist(), mask.tolist(), strict=True):
        d = [distance(x) for x, m in zip(row, kept, strict=True) if m]
        value = {"sum": sum(d), "mean": sum(d) / max(len(d), 1), "max": max(d, default=0.0)}[statistic]
        expected.append(bool(d) and not low <= value <= high)
    found = rejected(log_weight, mask, how, low, high)
    assert found.tolist() == expected and 0 < found.sum() < 30


def test_k1_bounds_the_ratio_the_right_way_round():
    """Above the upper bound is an answer that the trained policy likes better than the engine did."""
    liked = torch.tensor([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert (
        rejected(liked, mask, "mean_k1", -10.0, 0.5).all() and not rejected(-liked, mask, "mean_k1", -10.0, 0.5).any()
    )


def test_answers_at_a_bound_are_kept():
    log_weight = torch.tensor([[-0.25], [0.5], [-0.26], [0.51]])
    found = rejected(log_weight, torch.ones(4, 1, dtype=torch.bool), "mean_k1", -0.25, 0.5)
    assert found.tolist() == [False, False, True, True]


def test_only_bad_and_far_answers_are_left_out():
    log_ratio = torch.tensor([[-1.0, -0.5, 7.0], [-1.0, -0.5, 7.0], [-0.1, 0.0, 7.0], [1.0, 1.0, 7.0]])
    mask = torch.tensor([True, True, False]).expand(4, 3)
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 3)
    assert off_policy_sequences(log_ratio, mask, advantages, 0.5).tolist() == [True, False, False, False]


def test_the_proximal_policy_lies_between():
    behaviour, current = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0], requires_grad=True)
    found = proximal_logprob(behaviour, current, version=3, behaved=2, now=6)
    assert found.tolist() == pytest.approx([-1.5, -1.75]) and not found.requires_grad
    assert torch.equal(proximal_logprob(behaviour, current, 2, 2, 2), behaviour)


def test_metrics_are_estimates_over_the_engines_tokens():
    """As many tokens of each kind as the engine's probabilities say: the estimates are then the exact numbers."""
    counts = torch.tensor([50, 30, 15, 5])
    mu = Categorical(probs=counts.double() / 100)
    pi = Categorical(probs=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    words = torch.arange(4).repeat_interleave(counts)
    log_weight = (pi.log_prob(words) - mu.log_prob(words))[None]
    mask = torch.ones_like(log_weight, dtype=torch.bool)
    weights = importance_weights(log_weight, mask, "mis", "token", 0.0, 1.5)
    found = {name: float(value) for name, value in weight_metrics(log_weight, mask, weights).items()}
    chi2 = float((pi.probs.square() / mu.probs).sum()) - 1
    assert found == {
        "is_weight_mean": pytest.approx(1), "is_weight_max": pytest.approx(2), "is_weight_min": pytest.approx(0.8),
        "is_kl": pytest.approx(float(kl_divergence(mu, pi))), "is_chi2": pytest.approx(chi2),
        "is_log_ppl_diff": pytest.approx(float(kl_divergence(mu, pi))), "is_masked_frac": pytest.approx(0.05),
    }  # fmt: skip


def test_the_perplexities_differ_by_what_the_engine_likes_better():
    """perplexity = exp(-mean log-prob): of pi_old and of the engine, over the tokens that count."""
    generator = torch.Generator().manual_seed(0)
    old, engine = -2 * torch.rand(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    found = weight_metrics(old - engine, mask, mask.double())["is_log_ppl_diff"]
    torch.testing.assert_close(found, (-old[mask].mean()).exp().log() - (-engine[mask].mean()).exp().log())
