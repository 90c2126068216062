"""The total, by hand: weights, normalisation, gates, and what a missing verdict does to it."""

import math

import pytest
import torch

from rewards import RewardError
from rewards.combine import combine, make_rule, normalised, ranks

NAN = math.nan
GROUP = torch.tensor([0, 0, 0, 1, 1])


def total(scores, renormalise=False, group=GROUP, **rules):
    made = {
        name: make_rule(name, **{"weight": 1.0, "norm": None, "gate": None, "score_range": None, **rule})
        for name, rule in rules.items()
    }
    return combine({k: torch.tensor(v) for k, v in scores.items()}, made, group, renormalise=renormalise)


def same(a, b):
    torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float32), equal_nan=True)


def test_weighted_sum():
    same(
        total({"a": [1.0, 2, 3, 4, 5], "b": [1.0, 0, 1, 0, 1]}, a={"weight": 2.0}, b={"weight": -0.5}),
        [1.5, 4, 5.5, 8, 9.5],
    )


def test_affine_is_minus_shift_over_scale():
    """MixGRPO's PickScore: (22 - 18) / 8 = 0.5."""
    same(total({"a": [22.0, 18, 26, 14, 20]}, a={"norm": {"affine": [18, 8]}}), [0.5, 0, 1, -0.5, 0.25])


def test_unit_maps_the_range_to_zero_and_one():
    same(total({"a": [1.0, 5, 3, 2, 4]}, a={"norm": "unit", "score_range": (1, 5)}), [0, 1, 0.5, 0.25, 0.75])
    same(total({"a": [1.0, 5, 3, 2, 4]}, a={"norm": {"unit": [1, 5]}}), [0, 1, 0.5, 0.25, 0.75])


def test_rank_within_the_group_with_ties_and_missing_verdicts():
    """Group 0: 3 < 7 < 9 of three verdicts -> 0, 1/2, 1. Group 1: a tie of two -> both 1/2. Alone -> 1/2."""
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    score = torch.tensor([7.0, 3, NAN, 9, 5, 5, 1])
    same(ranks(score, group), [0.5, 0, NAN, 1, 0.5, 0.5, 0.5])


def test_rank_does_not_depend_on_the_order_of_the_samples():
    score, group = torch.randn(24), torch.arange(24) % 3
    order = torch.randperm(24)
    torch.testing.assert_close(ranks(score, group)[order], ranks(score[order], group[order]))


def test_one_missing_weighted_verdict_is_a_missing_total():
    same(total({"a": [1.0, NAN, 3, 4, 5], "b": [1.0, 1, NAN, 1, 1]}, a={}, b={"weight": 2.0}), [3, NAN, NAN, 6, 7])


def test_a_logged_reward_neither_counts_nor_spoils():
    same(total({"a": [1.0, 2, 3, 4, 5], "b": [NAN] * 5}, a={}, b={"weight": 0}), [1, 2, 3, 4, 5])


def test_renormalise_lets_the_others_stand_in():
    """Weights 1 and 3; without b the sum of weights is kept: a * 4 / 1. Nobody answered: still nothing."""
    got = total({"a": [1.0, 1, NAN, NAN, 2], "b": [1.0, NAN, 2, NAN, 2]}, a={}, b={"weight": 3.0}, renormalise=True)
    same(got, [4, 4, 8, NAN, 8])


def test_renormalise_counts_a_negative_weight_by_its_size():
    """Weights 1 and -3 have the size 4: alone a counts 4 / 1, and b 4 / 3; together they are what they were."""
    got = total({"a": [1.0, 1, NAN, NAN, 2], "b": [1.0, NAN, 2, NAN, 2]}, a={}, b={"weight": -3.0}, renormalise=True)
    same(got, [-2, 4, -8, NAN, -4])


def test_a_gate_lowers_the_total_and_never_raises_it():
    scores = {"a": [1.0, 2, -3, 4, 5], "ok": [0.2, 0.3, 0.2, NAN, 0.9]}
    same(total(scores, a={}, ok={"weight": 0, "gate": {"min": 0.3}}), [0, 2, -3, NAN, 5])
    same(total(scores, a={}, ok={"weight": 0, "gate": {"min": 0.3, "floor": -2}}), [-2, 2, -3, NAN, 5])


def test_a_gate_without_a_verdict_stays_missing_under_renormalise():
    same(
        total({"a": [1.0] * 5, "ok": [NAN] * 5}, a={}, ok={"weight": 0, "gate": {"min": 0}}, renormalise=True),
        [NAN] * 5,
    )


def test_equal_rewards_in_a_group_give_bitwise_equal_totals():
    """R8: a group without differences must reach the advantages without any."""
    rules = {"a": {"norm": {"affine": [0.1, 0.3]}, "weight": 0.7}, "b": {"norm": "rank", "weight": 0.1}}
    got = total({"a": [0.3, 0.3, 0.3, 1, 2], "b": [1.0, 1, 1, 2, 3]}, **rules)
    assert got[0] == got[1] == got[2]


def test_gradients_reach_the_scores():
    score = torch.tensor([1.0, 2, 3, 4, 5], requires_grad=True)
    rule = make_rule("a", 2.0, {"affine": [0, 4]}, None, None)
    combine({"a": score}, {"a": rule}, GROUP).sum().backward()
    assert score.grad.tolist() == [0.5] * 5
    assert normalised(score, rule, GROUP).requires_grad


def test_all_weights_zero_is_nothing_to_train_on():
    with pytest.raises(RewardError, match="nothing to train on"):
        total({"a": [1.0] * 5}, a={"weight": 0})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"norm": "unit"}, r"declares no range; give it: `norm: \{unit: \[low, high\]\}`"),
        ({"norm": "zscore"}, "norm is 'zscore'; expected none, rank, unit"),
        ({"norm": {"affine": [1, 0]}}, "scale > 0"),
        ({"norm": {"unit": [1, 1]}}, "low < high"),
        ({"norm": {"affine": [1]}}, "norm is"),
        ({"norm": {"affine": [1, 2], "unit": [0, 1]}}, "norm is"),
        ({"gate": 0.3}, r"gate is 0.3; expected \{min: 0.3\}"),
        ({"gate": {"max": 1}}, "gate is"),
        ({"weight": "1"}, "weight is '1'; expected a number"),
        ({"weight": True}, "weight is True"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule, message):
    with pytest.raises(RewardError, match=message):
        total({"a": [1.0] * 5}, a=rule)


def test_a_group_that_spreads_less_than_min_std_is_worth_its_mean():
    """Group 0 has std sqrt(2/3)/10 = 0.0816, group 1 std 0.5; population std of the verdicts."""
    scores = {"a": [1.0, 1.1, 1.2, 4, 5]}
    same(total(scores, a={"min_std": 0.09}), [1.1, 1.1, 1.1, 4, 5])
    same(total(scores, a={"min_std": 0.08}), [1.0, 1.1, 1.2, 4, 5])
    same(total({"a": [1.0, NAN, 1.2, 4, 5]}, a={"min_std": 0.11, "weight": 2.0}), [2.2, NAN, 2.2, 8, 10])
    same(total(scores, a={"min_std": 0.09, "norm": "rank"}), [0.5, 0.5, 0.5, 0, 1])
    same(total({"a": [NAN, NAN, NAN, 4, 5]}, a={"min_std": 0.6}), [NAN, NAN, NAN, 4.5, 4.5])


def test_noise_of_a_reward_does_not_become_an_advantage():
    """The other reward's differences lead where this one's are below its noise."""
    both = total({"a": [1.0, 1.001, 0.999, 1, 3], "b": [0.0, 1, 2, 0, 0]}, a={"min_std": 0.01}, b={})
    same(both, [1.0, 2, 3, 1, 3])


def test_min_std_must_be_a_number_of_at_least_zero():
    for bad in (-1, "much", True, NAN):
        with pytest.raises(RewardError, match="min_std"):
            make_rule("a", 1.0, None, None, None, bad)
