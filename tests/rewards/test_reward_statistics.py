"""Statistics of preferences against closed forms, brute force, and by hand."""

import itertools
import math

import numpy as np
import pytest

from rewards.statistics import (
    NO_TIES,
    brier,
    ece,
    exact_credit,
    fit_temperature,
    fit_threshold,
    half_credit,
    interval,
    kendall,
    mean,
    nll,
    order_credit,
    rank_score,
    sigmoid,
    spearman,
    split,
)

RNG = np.random.default_rng(0)


def drawn(count, ties=0.3, decimals=1):
    """Rounded deltas, so that some are equal and some are 0, and labels."""
    return RNG.normal(size=count).round(decimals), RNG.choice([-1.0, 0.0, 1.0], size=count, p=[0.35, ties, 0.65 - ties])


def test_credit_without_ties_by_hand():
    delta, label = np.array([2.0, 2.0, 0.0, -1.0, 5.0]), np.array([1.0, -1.0, 1.0, -1.0, 0.0])
    assert order_credit(delta, label)[:4].tolist() == [1, 0, 0.5, 1]
    assert math.isnan(order_credit(delta, label)[4]) and mean(order_credit(delta, label)) == 2.5 / 4


def test_reversed_and_equal_scores():
    delta, label = drawn(200)
    right, wrong = mean(order_credit(delta, label)), mean(order_credit(-delta, label))
    assert right + wrong == pytest.approx(1, abs=1e-12)
    assert mean(order_credit(np.zeros(200), label)) == 0.5


def three_ways(delta, label, threshold):
    """(a pair's label, what the scores say) in words; equal scores are for neither side, and a tie only if allowed."""
    for d, truth in zip(delta.tolist(), label.tolist(), strict=True):
        said = "tie" if abs(d) <= threshold else "a" if d > 0 else "b" if d < 0 else "nothing"
        yield {1: "a", -1: "b", 0: "tie"}[truth], said


@pytest.mark.parametrize("threshold", [NO_TIES, 0.0, 0.3, 1.0, 9.0])
def test_credits_with_ties_say_what_the_papers_say(threshold):
    delta, label = drawn(300)
    pairs = list(three_ways(delta, label, threshold))
    half = [1 if truth == said else 0.5 if "tie" in (truth, said) else 0 for truth, said in pairs]
    assert half_credit(delta, label, threshold).tolist() == half
    assert exact_credit(delta, label, threshold).tolist() == [float(truth == said) for truth, said in pairs]


@pytest.mark.parametrize("credit", [half_credit, exact_credit])
@pytest.mark.parametrize("count", [1, 2, 7, 60, 400])
def test_the_fitted_threshold_is_the_best_of_all(credit, count):
    for _ in range(5):
        delta, label = drawn(count)
        tried = [NO_TIES, *sorted(set(np.abs(delta).tolist()))]
        scores = [credit(delta, label, t).mean() for t in tried]
        assert fit_threshold(delta, label, credit) == tried[int(np.argmax(scores))]


def test_no_pairs_fit_no_ties():
    assert fit_threshold(np.zeros(0), np.zeros(0), exact_credit) == NO_TIES
    assert math.isnan(mean(np.zeros(0)))


# ------------------------------------------------------------------------------------------------ calibration


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        assert sigmoid(np.array([-700.0, -1.0, 0.0, 700.0])).tolist() == pytest.approx([0, 1 / (1 + math.e), 0.5, 1])


def test_the_temperature_is_that_of_the_labels():
    delta = RNG.normal(size=200_000) * 4
    target = (RNG.random(200_000) < 1 / (1 + np.exp(-delta / 2.5))).astype(float)
    assert fit_temperature(delta, target) == pytest.approx(2.5, rel=0.02)


def test_the_temperature_minimises_the_nll():
    delta, label = drawn(300)
    delta += 0.3 * label
    target = (label + 1) / 2
    best = fit_temperature(delta, target)
    grid = best * np.exp(np.linspace(-2, 2, 401))
    losses = [nll(sigmoid(delta / t), target) for t in grid]
    assert abs(int(np.argmin(losses)) - 200) <= 1


def test_scores_that_do_not_help_and_scores_that_are_always_right():
    delta, target = np.array([1.0, 2.0, -1.0, -3.0]), np.array([1.0, 1.0, 0.0, 0.0])
    assert fit_temperature(-delta, target) == math.inf and fit_temperature(np.zeros(4), target) == math.inf
    assert fit_temperature(delta, target) == pytest.approx(np.abs(delta).mean() / 10)


def test_brier_and_nll_by_hand():
    chance, target = np.array([0.8, 0.5]), np.array([1.0, 0.0])
    assert brier(chance, target) == pytest.approx((0.04 + 0.25) / 2)
    assert nll(chance, target) == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)
    assert nll(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-12), rel=1e-4)


def test_ece_of_calibrated_and_of_overconfident_chances():
    chance = np.repeat([0.55, 0.75, 0.95, 0.25], 100)
    target = np.concatenate([np.arange(100) < round(100 * p) for p in (0.55, 0.75, 0.95, 0.25)]).astype(float)
    assert ece(chance, target) == pytest.approx(0, abs=1e-12)
    assert ece(1 - chance, 1 - target) == pytest.approx(0, abs=1e-12), "which of two is called a does not matter"
    assert ece(np.full(100, 0.95), (np.arange(100) < 70).astype(float)) == pytest.approx(0.25)
    assert ece(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0 and math.isnan(ece(np.zeros(0), np.zeros(0)))


# ------------------------------------------------------------------------------------------------ ranks


def slow_ranks(x):
    return [sum(y < v for y in x) + (sum(y == v for y in x) - 1) / 2 for v in x]


def slow_kendall(x, y):
    counts = {"concordant": 0, "discordant": 0, "x": 0, "y": 0}
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = x[i] - x[j], y[i] - y[j]
        counts["concordant"] += a * b > 0
        counts["discordant"] += a * b < 0
        counts["x"] += a != 0
        counts["y"] += b != 0
    norm = math.sqrt(counts["x"] * counts["y"])
    return (counts["concordant"] - counts["discordant"]) / norm if norm else math.nan


def test_rank_correlations_against_the_definitions():
    for count in (2, 3, 5, 20):
        x, y = RNG.integers(0, 6, count).tolist(), RNG.integers(0, 6, count).tolist()
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(np.corrcoef(slow_ranks(x), slow_ranks(y))[0, 1])
            assert kendall(x, y) == pytest.approx(slow_kendall(x, y))
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8), "1 - 6 * 2 / (4 * 15)"
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(kendall([1, 1], [1, 2]))


def test_the_rank_score_counts_inversions():
    assert rank_score([9, 5, 1], [1, 2, 3]) == 1 and rank_score([1, 5, 9], [1, 2, 3]) == 0
    assert rank_score([9, 1, 5], [1, 2, 3]) == pytest.approx(2 / 3)
    assert rank_score([1, 9, 5], [1, 1, 1]) == 1, "equal ranks are never inverted"
    assert rank_score([5, 5, 5], [1, 2, 3]) == 0.5
    assert math.isnan(rank_score([1], [1]))


# ------------------------------------------------------------------------------------------------ intervals


def test_the_interval_of_independent_prompts_is_the_closed_form():
    values = (RNG.random(1000) < 0.7).astype(float)
    low, high = interval(values, range(1000), seed=0, resamples=4000)
    half = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 1000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten equal pairs a prompt hold no more than one."""
    values = (RNG.random(100) < 0.6).astype(float)
    prompts = [f"prompt {i}" for i in range(100)]
    one = interval(values, prompts, seed=3)
    ten = interval(np.repeat(values, 10), [p for p in prompts for _ in range(10)], seed=3)
    apart = interval(np.repeat(values, 10), range(1000), seed=3)
    assert ten == one and apart[1] - apart[0] < 0.5 * (one[1] - one[0])


def test_an_interval_repeats_with_its_seed_and_leaves_out_nan():
    values, prompts = RNG.random(50), [i // 2 for i in range(50)]
    found = interval(values, prompts, seed=1)
    assert found == interval(values, prompts, seed=1) != interval(values, prompts, seed=2)
    more = np.concatenate([values, [math.nan, math.nan]])
    assert interval(more, [*prompts, 0, "of nothing else"], seed=1) == found
    assert all(map(math.isnan, interval(np.ones(5), ["the same"] * 5, seed=0)))


def test_the_split_is_by_prompt_and_knows_no_order():
    prompts = [f"prompt {i % 40}" for i in range(200)]
    fitting = split(prompts, 0.25, seed=0)
    chosen = {p for p, taken in zip(prompts, fitting, strict=True) if taken}
    assert len(chosen) == 10 and not chosen & {p for p, taken in zip(prompts, fitting, strict=True) if not taken}
    assert split(prompts[::-1], 0.25, seed=0).tolist() == fitting[::-1].tolist()
    assert split(prompts, 0.25, seed=1).tolist() != fitting.tolist()
    assert not split(prompts, 0.0, seed=0).any()
