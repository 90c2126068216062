"""Schedules and rankings of one group: how many pairs, who meets whom, and strengths that are the likeliest."""

import itertools
import math

import pytest
import torch

from rewards import RewardError, Sample
from rewards.pairs import Pairs
from rewards.tournament import RIDGE, Schedule, bradley_terry, expected_wins, play
from tests.rewards.makers import flat


@pytest.mark.parametrize("size", [2, 3, 4, 7, 12])
def test_everybody_meets_everybody_once(size):
    assert Schedule.parse("all").pairs(range(size), "key", {}) == list(itertools.combinations(range(size), 2))
    assert Schedule.parse("all").count(size) == size * (size - 1) // 2


@pytest.mark.parametrize(("size", "k"), [(5, 1), (7, 2), (12, 3), (12, 5)])
def test_in_a_ring_everybody_meets_2k_others(size, k):
    pairs = Schedule.parse(f"ring:{k}").pairs(range(size), "key", {})
    assert len(set(pairs)) == len(pairs) == size * k == Schedule.parse(f"ring:{k}").count(size)
    assert {sum(i in pair for pair in pairs) for i in range(size)} == {2 * k}
    assert pairs != Schedule.parse(f"ring:{k}").pairs(range(size), "another", {})


def test_a_ring_of_half_the_group_is_all():
    assert Schedule.parse("ring:9").pairs(range(6), "key", {}) == Schedule.parse("all").pairs(range(6), "key", {})


@pytest.mark.parametrize("size", [2, 5, 8, 9])
def test_swiss_rounds_repeat_no_pair_and_pair_neighbours(size):
    """The judge prefers the higher number. In round 2 winners meet winners."""
    rounds, strength = [], torch.arange(size)

    def ask(pairs):
        rounds.append(pairs)
        return [float(strength[i] > strength[j]) for i, j in pairs]

    played = play(Schedule.parse("swiss:3"), {0: range(size)}, 0, ask)
    assert len(set(played)) == len(played) <= Schedule.parse("swiss:3").count(size)
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in rounds), "one game a round"
    assert len(rounds[0]) == size // 2
    if size == 8:
        points = {row: sum(row == max(pair) for pair in rounds[0]) for row in range(8)}
        assert all(points[i] == points[j] for i, j in rounds[1])


def test_a_pair_without_a_verdict_counts_half_a_point_each_in_the_ranking():
    """8 play, one pair of the first round has no verdict: 3 have 1 point, 2 have 1/2, 3 have 0. Neighbours then meet:
    two winners; the third and an unjudged one; the other unjudged one and a loser; two losers.
    """
    for seed in range(20):
        rounds = []

        def ask(pairs, rounds=rounds, seed=seed):
            rounds.append(pairs)
            return [math.nan if place == seed % 4 else 1.0 for place in range(len(pairs))]

        play(Schedule.parse("swiss:2"), {0: range(8)}, seed, ask)
        points = {row: 1 - side for pair in rounds[0] for side, row in enumerate(pair)}
        points |= dict.fromkeys(rounds[0][seed % 4], 0.5)
        met = sorted(sorted((points[i], points[j])) for i, j in rounds[1])
        assert met == [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]


def test_swiss_with_few_calls_finds_the_best():
    """4 rounds of 16: at most 32 pairs instead of 120, and the best is found in each of 20 draws."""
    for seed in range(20):
        strength = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        results = {}

        def ask(pairs, strength=strength, results=results):
            results |= {(i, j): float(strength[i] > strength[j]) for i, j in pairs}
            return [results[pair] for pair in pairs]

        pairs = play(Schedule.parse("swiss:4"), {0: range(16)}, seed, ask)
        assert 28 <= len(pairs) <= 32, "at the end two may be left who have met"
        assert bradley_terry(pairs, [results[p] for p in pairs], 16).argmax() == strength.argmax()


@pytest.mark.parametrize("bad", ["ring", "ring:0", "ring:-1", "swiss", "all:2", "", None, 3])
def test_other_words_are_no_schedule(bad):
    with pytest.raises(RewardError, match="expected all, ring:k"):
        Schedule.parse(bad)


# ------------------------------------------------------------------------------------------------ Bradley-Terry


def test_two_samples_have_a_closed_form():
    """w wins of n games: the strength difference d solves w = n sigmoid(d) + ridge d / 2."""
    strength = bradley_terry([(0, 1)] * 4, [1, 1, 1, 0], 2)
    d = (strength[0] - strength[1]).item()
    assert 4 / (1 + math.exp(-d)) + RIDGE * d / 2 == pytest.approx(3, abs=1e-9)
    assert strength.sum().item() == pytest.approx(0, abs=1e-12)


def test_strengths_are_the_likeliest_by_autograd():
    generator = torch.Generator().manual_seed(0)
    pairs = list(itertools.combinations(range(6), 2))[::2] + [(0, 5), (2, 3)]
    won = torch.rand(len(pairs), generator=generator).round(decimals=1)
    strength = bradley_terry(pairs, won.tolist(), 6).requires_grad_()
    i, j = torch.tensor(pairs).T
    logit = strength[i] - strength[j]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, won.double(), reduction="sum")
    (loss + RIDGE / 2 * (strength**2).sum()).backward()
    assert strength.grad.abs().max() < 1e-8


def test_true_strengths_are_recovered_from_expected_results():
    true = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)
    pairs = list(itertools.combinations(range(5), 2))
    won = [torch.sigmoid(true[i] - true[j]).item() for i, j in pairs]
    torch.testing.assert_close(bradley_terry(pairs, won, 5, ridge=1e-9), true, rtol=0, atol=1e-5)
    assert bradley_terry(pairs, won, 5).argsort().tolist() == [0, 1, 2, 3, 4]


def test_expected_wins_by_hand():
    strength = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(expected_wins(strength), torch.tensor([0.25, 0.75], dtype=torch.float64))
    three = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(expected_wins(three), torch.full((3,), 0.5, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ in the reward


class Brighter:
    """Prefers the brighter picture; with a bias for the one that is shown first."""

    def __init__(self, bias: float = 0.0):
        self.bias, self.calls = bias, 0

    def prefers(self, first: Sample, second: Sample) -> float:
        self.calls += 1
        return float(torch.sigmoid(20 * (first.media.mean() - second.media.mean()) + self.bias))


def group(*levels):
    return [flat(level, level, level) for level in levels]


def test_bradley_terry_ranks_what_a_ring_alone_cannot():
    samples = group(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    rates = {
        value: Pairs(Brighter(), schedule="ring:2", value=value, margin=0.0).score(samples).value
        for value in ("win_rate", "bradley_terry")
    }
    assert rates["bradley_terry"].argsort().tolist() == list(range(8))
    assert len(rates["win_rate"].unique()) < 8, "win rates of four games are tied"
    assert (rates["bradley_terry"] > 0).all() and (rates["bradley_terry"] < 1).all()


def test_swiss_saves_calls():
    judge = Brighter()
    value = Pairs(judge, schedule="swiss:3", both_orders=False, margin=0.0).score(group(*torch.linspace(0, 1, 8))).value
    assert judge.calls == 12 and value.argmax() == 7


def test_flips_count_the_pairs_where_the_side_decided():
    """The bias of 1 decides pairs that are less than 1/20 apart: neighbours only."""
    scores = Pairs(Brighter(bias=1.0), margin=0.0).score(group(0.10, 0.14, 0.30, 0.34))
    assert scores.parts["flips"].tolist() == [1, 1, 1, 1]
    assert Pairs(Brighter(), margin=0.0).score(group(0.1, 0.2)).parts["flips"].tolist() == [0, 0]
    assert "flips" not in Pairs(Brighter(), both_orders=False).score(group(0.1, 0.2)).parts
    assert "flips" not in Pairs("pixel.brightness").score(group(0.1, 0.2)).parts


def test_bradley_terry_leaves_out_what_was_never_judged():
    class Picky(Brighter):
        def prefers(self, first, second):
            return None if 0.9 < max(first.media.mean(), second.media.mean()) else super().prefers(first, second)

    value = Pairs(Picky(), value="bradley_terry", margin=0.0).score(group(0.1, 0.95, 0.5)).value
    assert value.isnan().tolist() == [False, True, False] and value[2] > value[0]
