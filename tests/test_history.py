"""What is remembered of a prompt, and that a checkpoint gives back every bit of it."""

import math
import statistics

import pytest
import torch

from flowrl import checkpoint
from flowrl.history import PromptHistory


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def filled(size=8, num_prompts=10, iterations=12, group=3):
    """A history with prompts of every kind: often seen, seen once, never, without any verdict."""
    history = PromptHistory(size, num_prompts)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(iterations):
        for prompt in (7, iteration % 4, 23):
            history.add(prompt, torch.rand(group, generator=generator, dtype=torch.float64), iteration)
        history.add(8, torch.full((group,), float(iteration % 5 > 1)), iteration)
    history.add(9, tensor(math.nan, math.nan), iterations)
    return history


def told(history):
    """Everything that can be asked, NaN as text so that it equals itself."""
    asked = (
        history.seen, history.last, history.mean, history.spread, history.group_variance, history.pass_rate,
        history.rated, history.streak,
    )  # fmt: skip
    numbers = [[str(ask(i)) for ask in asked] for i in range(history.num_prompts)]
    kept = [(history.rewards(i).tolist(), history.groups(i).tolist()) for i in range(history.num_prompts)]
    return numbers, kept, history.outcomes().tolist()


def test_it_keeps_the_newest_rewards_in_their_order():
    history = PromptHistory(5, 4)
    history.add(2, tensor(1, 2, 3), 0)
    history.add(2, tensor(4, 5, 6, 7), 6)
    assert history.rewards(2).tolist() == [3, 4, 5, 6, 7]
    assert history.groups(2).tolist() == [0, 1, 1, 1, 1]
    assert (history.seen(2), history.last(2)) == (2, 6)
    assert history.rewards(2).dtype == torch.float64


def test_a_group_that_is_larger_than_the_memory_leaves_its_last_rewards():
    history = PromptHistory(2, 1)
    history.add(0, tensor(1, 2, 3), 0)
    assert history.rewards(0).tolist() == [2, 3]


def test_an_unseen_prompt_has_nothing():
    history = filled()
    assert history.rewards(5).shape == (0,) and history.groups(5).shape == (0,)
    assert (history.seen(5), history.last(5)) == (0, -1)
    assert all(math.isnan(f(5)) for f in (history.mean, history.spread, history.group_variance))


def test_no_verdict_is_not_a_reward_but_the_group_was_seen():
    history = PromptHistory(8, 2)
    history.add(0, tensor(1, math.nan, 0), 0)
    history.add(1, tensor(math.nan, math.nan), 3)
    assert history.rewards(0).tolist() == [1, 0] and history.mean(0) == 0.5
    assert history.rewards(1).tolist() == [] and math.isnan(history.mean(1))
    assert (history.seen(1), history.last(1)) == (1, 3)


def test_further_groups_of_a_prompt_are_the_same_prompt():
    history = PromptHistory(8, 3)
    for prompt in (1, 4, 301):
        history.add(prompt, tensor(prompt), 0)
    assert history.rewards(1).tolist() == [1, 4, 301] == history.rewards(7).tolist()
    assert history.groups(1).tolist() == [0, 1, 2] and history.seen(4) == 3
    assert history.seen(0) == history.seen(2) == 0


def test_a_size_of_0_counts_without_keeping():
    history = PromptHistory(0, 2)
    history.add(1, tensor(1, 2), 4)
    assert history.rewards(1).tolist() == [] and (history.seen(1), history.last(1)) == (1, 4)


def test_mean_and_spread_are_those_of_what_is_remembered():
    history = filled()
    for prompt in (0, 3, 7):
        values = history.rewards(prompt).tolist()
        assert history.mean(prompt) == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert history.spread(prompt) == pytest.approx(statistics.pstdev(values), rel=1e-12)


def test_group_variance_is_pooled_within_the_groups():
    """By hand: [0, 2] has 2 around its mean, [10, 10, 13] has 6, a group of one has nothing; (2 + 6) / (6 - 3)."""
    history = PromptHistory(8, 1)
    for group in ([0, 2], [10, 10, 13], [100]):
        history.add(0, tensor(*group), 0)
    assert history.group_variance(0) == pytest.approx(8 / 3, rel=1e-12)


def test_group_variance_is_unbiased_for_binary_rewards_whatever_the_drift():
    """Its expectation is the mean of p (1 - p) over the groups, even where p differs between them."""
    generator = torch.Generator().manual_seed(1)
    chances, history = (0.2, 0.9), PromptHistory(8, 4000)
    for prompt in range(4000):
        for p in chances:
            history.add(prompt, (torch.rand(4, generator=generator) < p).double(), 0)
    found = tensor(*(history.group_variance(i) for i in range(4000)))
    error = found.std() / 4000**0.5
    assert abs(found.mean() - sum(p * (1 - p) for p in chances) / 2) < 4 * error
    assert error < 0.003


def test_equal_rewards_have_no_variance_not_even_that_of_rounding():
    history = PromptHistory(32, 1)
    for value in (0.1, 0.7):
        history.add(0, torch.full((12,), value, dtype=torch.float64), 0)
    assert history.group_variance(0) == 0.0 < history.spread(0)


def test_what_it_hands_out_cannot_change_it():
    history = PromptHistory(4, 1)
    given = tensor(1, 2)
    history.add(0, given, 0)
    given.zero_(), history.rewards(0).zero_()
    assert history.rewards(0).tolist() == [1, 2]


# ------------------------------------------------------------------------------------------------ passing


def past(*groups, passing=0.5):
    """A history of one prompt that saw these groups, one an iteration."""
    history = PromptHistory(4, 1, passing)
    for iteration, group in enumerate(groups):
        history.add(0, tensor(*group), iteration)
    return history


def test_the_pass_rate_follows_the_groups():
    """By hand: shares 1/2, 1, 0 give 0.5, then (0.5 + 1) / 2 = 0.75, then 0.375; without a verdict it stays."""
    groups = [(1, 0), (0.5, 0.9, 2), (math.nan, math.nan), (0.49, 0)]
    assert [past(*groups[:n]).pass_rate(0) for n in range(1, 5)] == [0.5, 0.75, 0.75, 0.375]
    assert [past(*groups[:n]).rated(0) for n in range(1, 5)] == [1, 2, 2, 3]
    assert past(*groups, passing=0.4).pass_rate(0) == 0.5 * (0.5 * 0.5 + 0.5) + 0.5 * 0.5


def test_the_pass_rate_is_a_sum_over_all_groups():
    """In closed form: 2^-n p_0 + sum_i 2^-(n-i+1) p_i, long after the rewards themselves are forgotten."""
    generator = torch.Generator().manual_seed(0)
    shares = (torch.randint(0, 9, (20,), generator=generator) / 8).tolist()
    history = PromptHistory(0, 1)
    for iteration, share in enumerate(shares):
        history.add(0, (torch.arange(8) < 8 * share).double(), iteration)
    first, *rest = shares
    n = len(rest)
    wanted = first / 2**n + sum(p / 2 ** (n - i) for i, p in enumerate(rest))
    assert history.pass_rate(0) == pytest.approx(wanted, rel=1e-12)


def test_nothing_is_known_before_the_first_verdict():
    history = past((math.nan, math.nan))
    assert math.isnan(history.pass_rate(0)) and history.rated(0) == 0 and history.seen(0) == 1
    assert PromptHistory(4, 3).streak(2) == 0 and math.isnan(PromptHistory(4, 3).pass_rate(2))


@pytest.mark.parametrize(
    ("groups", "streak"),
    [
        ([(1, 1)], 1),
        ([(1, 1), (1, 1, 1), (0.9, 0.9)], 3),
        ([(0, 0), (0, 0)], -2),
        ([(0, 0), (0, 0), (1, 1)], 1),
        ([(1, 1), (0, 0)], -1),
        ([(1, 1), (1, 0)], 0),
        ([(1, 1), (1, 0), (1, 1)], 1),
        ([(1, 1), (1,), (math.nan, 0), (1, 1)], 2),  # one verdict tells nothing
        ([(0.1, 0.1), (0.2, 0.2)], -2),
        ([(0.5, 0.5)], 1),  # the least that passes
        ([(0.3, 0.3 + 1e-8)], -1),
        ([(0.3, 0.3 + 1e-4)], 0),
    ],
)
def test_a_streak_is_of_groups_that_were_all_alike(groups, streak):
    assert past(*groups).streak(0) == streak


def test_float32_rewards_that_are_equal_are_alike():
    history = PromptHistory(8, 1)
    history.add(0, torch.full((12,), 0.7), 0)
    assert history.streak(0) == 1


def test_outcomes_count_the_groups_of_each_iteration():
    history = PromptHistory(4, 10)
    groups = {0: [(1, 1), (0, 1), (0, 0), (0.2, 0.2)], 3: [(math.nan, 1)], 4: [(1, 1), (1, 1), (0, 0), (1, 0)]}
    for iteration, rewards in groups.items():
        for prompt, group in enumerate(rewards):
            history.add(prompt, tensor(*group), iteration)
    assert history.outcomes().tolist() == [[0, 4, 1, 2], [4, 4, 2, 1]]
    assert PromptHistory(4, 1).outcomes().shape == (0, 4)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("size", [0, 2, 8, 100])
def test_a_checkpoint_gives_back_every_bit(tmp_path, size):
    history = filled(size)
    checkpoint.save(tmp_path, 12, history.state_dict(), {})
    again = PromptHistory(size, 10)
    again.load_state_dict(checkpoint.latest_valid(tmp_path).tensors)
    assert told(again) == told(history)
    assert history.streak(8) and 0 < history.pass_rate(8) < 1
    for one in (history, again):  # and both go on alike
        one.add(7, tensor(0.1, 0.2, 0.3), 13)
        one.add(5, tensor(0.5), 13)
    assert told(again) == told(history)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in history.state_dict().items())


def test_an_empty_history_can_be_saved(tmp_path):
    checkpoint.save(tmp_path, 0, PromptHistory(4, 2).state_dict(), {})
    again = filled(4, 10)
    again.load_state_dict(checkpoint.latest_valid(tmp_path).tensors)
    assert told(again) == told(PromptHistory(4, 10))


def test_the_state_does_not_depend_on_the_order_of_prompts():
    one, other = PromptHistory(4, 5), PromptHistory(4, 5)
    for history, order in ((one, (3, 0, 4)), (other, (4, 3, 0))):
        for prompt in order:
            history.add(prompt, tensor(prompt, 1), 2)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def test_the_state_of_another_run_is_refused():
    state = filled(8, 10).state_dict()
    with pytest.raises(ValueError, match=r"knows prompt 9, but data.prompts has only 5"):
        PromptHistory(8, 5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has 8 rewards of a prompt, more than data.history=4"):
        PromptHistory(4, 10).load_state_dict(state)
    del state["last"]
    with pytest.raises(ValueError, match="lacks last"):
        PromptHistory(8, 10).load_state_dict(state)


def test_impossible_histories():
    with pytest.raises(ValueError, match="size=-1"):
        PromptHistory(-1, 2)
    with pytest.raises(ValueError, match="num_prompts=0"):
        PromptHistory(1, 0)
    with pytest.raises(ValueError, match=r"prompt 1: rewards of shape \(2, 3\)"):
        PromptHistory(4, 2).add(1, torch.zeros(2, 3), 0)
