"""Figures about answers, against counting by hand and by trying all ways."""

import itertools
import math

import pytest
import torch

from flowrl.vlm.metrics import REFLECTION, pass_at_k, reflection, text_metrics

nan = math.nan


def table(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("right", "count", "k"),
    [(r, n, k) for n in (1, 2, 5, 7) for r in range(n + 1) for k in range(1, n + 1)],
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right, count, k):
    draws = list(itertools.combinations(range(count), k))
    assert pass_at_k(right, count, k) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_answers_does_not_overflow():
    assert pass_at_k(1, 100_000, 1) == pytest.approx(1e-5)
    assert pass_at_k(1, 5000, 2500) == pytest.approx(0.5)


@pytest.mark.parametrize(("right", "count", "k"), [(1, 2, 3), (1, 2, 0), (3, 2, 1), (-1, 2, 1)])
def test_pass_at_k_refuses_what_is_not_defined(right, count, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(right, count, k)


def test_reflection_counts_whole_words():
    assert reflection(["Wait, I verify it", "the waiter saw a yeti", "RE-CHECK", "", "not yet"]).tolist() == [
        1,
        0,
        1,
        0,
        1,
    ]
    assert len(REFLECTION) == 15 and reflection(f"so {word}." for word in REFLECTION).mean() == 1


def test_all_figures_of_a_small_batch():
    found = text_metrics(
        table(1.0, 0.2, 0.9, nan, 0.0, 0.1),
        torch.tensor([7, 7, 7, 7, 3, 3]),
        {
            "tokens": table(10, 20, 30, 40, 50, 60), "truncated": table(0, 0, 1, 1, 1, 0),
            "reflects": table(1, 1, 0, 1, 0, 0), "forced": table(0, 0, 0, 0, 1, 1),
            "over_turns": table(0, 0, 0, 0, 0, 1),
            "calls": table(2, 0, 0, 0, 1, 3), "failed_calls": table(1, 0, 0, 0, 0, 0),
            "entropy": table(1, 1, 1, 1, 1, 1),
        },
        sources=["a", "b", "a", "b", "a", "a"], passes=(1, 2, 3, 4), seconds=4.0,
    )  # fmt: skip
    assert found == pytest.approx({
        "text/reward/a": 0.5, "text/reward/b": 0.2,
        "text/pass@1": (2 / 3 + 0) / 2, "text/pass@2": (1 + 0) / 2, "text/pass@3": 1.0,
        "text/groups/all_right": 0.0, "text/groups/all_wrong": 0.5,
        "text/tokens/all": 35.0, "text/tokens/right": 20.0, "text/tokens/wrong": 130 / 3,
        "text/truncated/all": 0.5, "text/truncated/right": 0.5, "text/truncated/wrong": 1 / 3,
        "text/forced": 1 / 3, "text/over_turns": 1 / 6, "text/calls": 1.0, "text/failed_calls": 1 / 6,
        "text/reflection/ratio": 0.5, "text/reflection/in_correct": 0.5, "text/reflection/in_incorrect": 1 / 3,
        "text/reflection/correct_in_reflective": 0.5, "text/reflection/correct_in_nonreflective": 1 / 3,
        "text/tokens_per_second": 52.5,
    })  # fmt: skip


def test_what_is_empty_is_left_out():
    found = text_metrics(table(1.0, 1.0), torch.tensor([0, 0]), {"tokens": table(1, 2), "reflects": table(0, 0)})
    assert not any(math.isnan(value) for value in found.values())
    assert "text/tokens/wrong" not in found and "text/reflection/in_incorrect" not in found
    assert "text/reflection/correct_in_reflective" not in found and "text/forced" not in found
    assert found["text/groups/all_right"] == 1 and "text/pass@4" not in found
    assert text_metrics(table(nan), torch.tensor([0]), {"tokens": table(3)}) == {"text/tokens/all": 3}
    assert text_metrics(table(), torch.tensor([], dtype=torch.long), {}) == {}


def test_another_score_may_say_what_is_right():
    found = text_metrics(
        table(0.9, 0.9), torch.tensor([0, 0]), {"tokens": table(1, 5)}, right=table(0, 1), sources=["s", "s"]
    )
    assert found["text/tokens/right"] == 5 and found["text/tokens/wrong"] == 1 and found["text/reward/s"] == 0.9
    assert text_metrics(table(0.9), torch.tensor([0]), {}, threshold=1.0)["text/pass@1"] == 0


def test_an_answer_is_right_from_the_threshold_on():
    found = text_metrics(table(0.5, 0.49), torch.tensor([0, 1]), {}, threshold=0.5)
    assert found["text/pass@1"] == found["text/groups/all_right"] == found["text/groups/all_wrong"] == 0.5


@pytest.mark.parametrize(("rewards", "right", "wrong"), [((1, 0, 0), 0, 0), ((1, 1, 0), 0, 0), ((0, 0, 0), 0, 1)])
def test_one_answer_keeps_a_group_from_being_all_alike(rewards, right, wrong):
    found = text_metrics(table(*rewards), torch.zeros(3, dtype=torch.long), {})
    assert (found["text/groups/all_right"], found["text/groups/all_wrong"]) == (right, wrong)


def test_the_order_of_the_answers_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rewards, group = torch.rand(64, generator=generator, dtype=torch.float64), torch.arange(64) // 8
    facts = {name: torch.rand(64, generator=generator).double() for name in ("tokens", "calls", "reflects")}
    order = torch.randperm(64, generator=generator)
    sources = [f"s{i % 3}" for i in range(64)]
    first = text_metrics(rewards, group, facts, sources=sources)
    shuffled = {name: fact[order] for name, fact in facts.items()}
    assert first == text_metrics(rewards[order], group[order], shuffled, sources=[sources[i] for i in order.tolist()])
