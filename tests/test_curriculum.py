"""Which prompts a curriculum wants, by hand and by what is drawn; how its name is read."""

import functools
import math
from collections import Counter

import pytest
import torch

from flowrl.algorithms.advantages import group_advantages
from flowrl.curriculum import (
    available,
    curriculum,
    easy_first,
    extra_samples,
    greso,
    history_resampling,
    learnable,
    rlcs,
    staged,
)
from flowrl.data import DataError, PromptSampler
from flowrl.history import PromptHistory
from flowrl.resolve import ResolveError
from flowrl.types import Prompt


def prompts(count, **metadata):
    return [Prompt(id=i, text=f"p{i}", metadata={k: v[i] for k, v in metadata.items()}) for i in range(count)]


def history(groups, size=32):
    """A history of {prompt: [group, ...]}; prompts are numbered up to the largest."""
    made = PromptHistory(size, max(groups) + 1)
    for prompt, rewards in groups.items():
        for group in rewards:
            made.add(prompt, torch.tensor(group, dtype=torch.float64), 0)
    return made


NONE = PromptHistory(0, 100)

# ------------------------------------------------------------------------------------------------ learnable


def test_learnable_is_the_variance_of_success():
    """By hand: of K = 4 the unbiased p (1 - p) are 1/4, 1/3, 0, 0, their mean is 7/48; weight = .1 + .9 s² / mean."""
    past = history({0: [[1, 0, 0, 0]], 1: [[1, 1, 0, 0]], 2: [[1, 1, 1, 1]], 3: [[0, 0, 0, 0]]})
    weights = learnable(past, prompts(4), 1)
    assert weights.tolist() == pytest.approx([0.1 + 0.9 * 12 / 7, 0.1 + 0.9 * 16 / 7, 0.1, 0.1], rel=1e-12)


def test_learnable_does_not_depend_on_the_scale_of_the_reward():
    groups = {0: [[1.0, 0.0, 0.5]], 1: [[0.2, 0.1, 0.9]], 2: [[3.0, 3.0, 3.0]]}
    scaled = {i: [[26 - 200 * r for r in group] for group in rewards] for i, rewards in groups.items()}
    a, b = (learnable(history(g), prompts(3), 0) for g in (groups, scaled))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_learnable_looks_inside_the_groups():
    """A prompt that was learned between two groups differs between them, but teaches nothing any more."""
    past = history({0: [[0, 0, 0], [1, 1, 1]], 1: [[0, 1, 0], [0, 0, 1]]})
    assert past.spread(0) > past.spread(1)
    assert learnable(past, prompts(2), 0).tolist() == pytest.approx([0.1, 1.9])


@pytest.mark.parametrize("explore", [0.1, 0.4, 1.0])
def test_the_share_of_exploration_is_that_of_the_draws(explore):
    past = history({0: [[0, 1]], 1: [[0, 0]], 2: [[1, 1]], 3: [[0.4, 0.5]]})
    weights = learnable(past, prompts(4), 0, explore=explore)
    assert weights.sum().item() == pytest.approx(4)
    assert weights.min().item() == pytest.approx(explore)


def test_unseen_prompts_come_first():
    past = history({i: [[0, 1]] for i in range(0, 40, 2)} | {39: []})
    data = prompts(40)
    sampler = PromptSampler(data, 20)
    for iteration in range(50):
        assert {p.id for p in sampler(iteration, learnable(past, data, iteration))} == set(range(1, 40, 2))


def test_every_prompt_is_seen_once_before_any_comes_again():
    past, data = PromptHistory(32, 30), prompts(30)
    sampler = PromptSampler(data, 6, seed=3)
    for iteration in range(5):
        for prompt in sampler(iteration, learnable(past, data, iteration)):
            past.add(prompt.id, torch.tensor([0.0, 1.0]), iteration)
    assert [past.seen(i) for i in range(30)] == [1] * 30


def test_seen_without_a_verdict_is_wanted_little_but_not_never():
    past = history({0: [[math.nan, math.nan]], 1: [[0, 1]], 2: [[1.0]]})
    assert learnable(past, prompts(3), 0).tolist() == pytest.approx([0.1, 1.0, 0.1])


@pytest.mark.parametrize("groups", [{0: [[0, 0]], 1: [[1, 1]]}, {0: [[0.5]], 1: [[0.1]]}])
def test_where_nothing_can_be_told_apart_all_are_wanted_alike(groups):
    first, second = learnable(history(groups), prompts(2), 0).tolist()
    assert first == second > 0


def test_learnable_finds_the_prompts_that_teach():
    """A run in small: prompt i succeeds with chance i / 20, and the ones in the middle are drawn most."""
    generator = torch.Generator().manual_seed(0)
    data, past, drawn = prompts(21), PromptHistory(32, 21), Counter()
    sampler = PromptSampler(data, 4, seed=1)
    for iteration in range(300):
        for prompt in sampler(iteration, learnable(past, data, iteration)):
            drawn[prompt.id] += 1
            past.add(prompt.id, (torch.rand(8, generator=generator) < prompt.id / 20).double(), iteration)
    middle, ends = sum(drawn[i] for i in range(8, 13)) / 5, (drawn[0] + drawn[20]) / 2
    assert middle > 5 * ends
    assert min(drawn[0], drawn[20]) > 3  # and yet the ends are looked at again


def test_learnable_needs_a_history_and_a_share():
    with pytest.raises(DataError, match=r"data.history=1 keeps fewer than two; set data.history to a few times"):
        learnable(PromptHistory(1, 2), prompts(2), 0)
    with pytest.raises(ValueError, match="explore=0"):
        learnable(PromptHistory(8, 2), prompts(2), 0, explore=0)


# ------------------------------------------------------------------------------------------------ easy_first


def test_easy_first_lets_in_the_easiest_share():
    """Ten prompts, start = 0.1, over = 9: one more each iteration, from the easiest to the hardest."""
    difficulty = [3, 1, 4, 1.5, 9, 2, 6, 5, -1, 70]
    for iteration in range(12):
        weights = easy_first(NONE, prompts(10, difficulty=difficulty), iteration, over=9).tolist()
        wanted = sorted(difficulty)[: iteration + 1]
        assert {d for d, w in zip(difficulty, weights, strict=True) if w > 0} == set(wanted)
        assert set(weights) <= {0.0, 1.0}


def test_equal_difficulties_come_together_and_there_always_are_some():
    data = prompts(6, difficulty=[1, 1, 1, 2, 2, 3])
    found = [easy_first(NONE, data, i, over=10, start=0.01).tolist() for i in range(11)]
    assert found[0] == [1, 1, 1, 0, 0, 0]
    assert found[6] == [1, 1, 1, 1, 1, 0]
    assert found[10] == [1] * 6


def test_easy_first_draws_from_easy_to_hard():
    data = prompts(100, difficulty=list(range(100)))
    sampler = PromptSampler(data, 10)
    drawn = [[p.id for p in sampler(i, easy_first(NONE, data, i, over=50))] for i in range(60)]
    assert sorted(drawn[0]) == list(range(10))
    assert all(max(ids) < 100 * (0.1 + 0.9 * i / 50) for i, ids in enumerate(drawn[:50]))
    assert max(max(ids) for ids in drawn[50:]) > 90


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({}, "is missing. Write a number into every line"),
        ({"dificulty": 2}, "is missing (did you mean 'dificulty'?)"),
        ({"difficulty": "hard"}, "is 'hard', not a finite number"),
        ({"difficulty": True}, "is True, not a finite number"),
        ({"difficulty": None}, "is None, not a finite number"),
        ({"difficulty": math.inf}, "is inf, not a finite number"),
    ],
)
def test_easy_first_needs_a_number_on_every_prompt(metadata, part):
    data = [Prompt(id=0, text="a", metadata={"difficulty": 1}), Prompt(id=1, text="b", metadata=metadata)]
    with pytest.raises(DataError) as caught:
        easy_first(NONE, data, 0)
    assert "prompt 1 ('b'): its metadata 'difficulty' " + part in str(caught.value)
    assert "remove data.curriculum" in str(caught.value)


@pytest.mark.parametrize("options", [{"over": 0}, {"start": 0.0}, {"start": 1.5}])
def test_impossible_paces(options):
    with pytest.raises(ValueError, match="over is at least 1 iteration"):
        easy_first(NONE, prompts(1, difficulty=[1]), 0, **options)


# ------------------------------------------------------------------------------------------------ rlcs


def test_rlcs_merges_what_was_graded_with_what_was_seen():
    """By hand, in 4 levels. p: graded .9; (.2 + .5) / 2 = .35; online .25 alone; 0; (.4 + 2 * .7) / 3 = .6.

    Levels: {0}, {.25, .35}, {.6}, {.9}; their means .0, .3, .6, .9; u = 0, .84, .96, .36, .6 on average.
    """
    past = history({1: [[1, 0]], 2: [[1, 0, 0, 0]], 3: [[0, 0], [0, 0]], 4: [[1, 0, 1, 0, 1], [1, 1, 1, 1, 0]]})
    data = [
        Prompt(id=i, text="p", metadata={} if graded is None else {"pass_rate": graded})
        for i, graded in enumerate([0.9, 0.2, None, 0, 0.4])
    ]
    assert past.pass_rate(4) == pytest.approx(0.7)
    weights = rlcs(past, data, 5, bins=4)
    wanted = [0.1 + 0.9 * u / 0.6 for u in (0.36, 0.84, 0.84, 0.0, 0.96)]
    assert weights.tolist() == pytest.approx(wanted, rel=1e-12)


def test_rlcs_draws_the_middle_and_what_is_unknown_first():
    data = prompts(11, pass_rate=[i / 10 for i in range(11)])
    weights = rlcs(PromptHistory(0, 12), [*data, Prompt(id=11, text="new")], 0)
    assert weights[:11].argmax() == 5 and weights[11] > 1e6 * weights[:11].max()
    assert weights[:11].tolist() == pytest.approx(weights[:11].flip(0).tolist(), abs=0.3)  # .1 lies in [.1, .2)
    assert weights.min() >= 0.1
    assert rlcs(PromptHistory(0, 2), prompts(2, pass_rate=[0, 1]), 0).tolist() == [1, 1]  # nothing can be told apart


@pytest.mark.parametrize(
    ("graded", "part"),
    [(1.5, "its metadata 'pass_rate' is 1.5; write the share"), ("half", "is 'half', not a finite number")],
)
def test_rlcs_needs_shares(graded, part):
    with pytest.raises(DataError) as caught:
        rlcs(NONE, prompts(1, pass_rate=[graded]), 0)
    assert "data.curriculum=rlcs: prompt 0 ('p0')" in str(caught.value) and part in str(caught.value)
    with pytest.raises(ValueError, match="rlcs: bins=0"):
        rlcs(NONE, prompts(1), 0, bins=0)


# ------------------------------------------------------------------------------------------------ greso


def test_greso_weighs_by_the_streak():
    """Within the first epoch both p are 0.5: 0.5^z, from 0.01 up; a group that differed begins anew."""
    alike = {0: [[1, 1]] * 1, 1: [[0, 0]] * 3, 2: [[0, 0], [0, 1]], 3: [[1, 1]] * 9, 4: [[0, 1]]}
    past = PromptHistory(4, 100)
    for prompt, groups in alike.items():
        for group in groups:
            past.add(prompt, torch.tensor(group, dtype=torch.float64), 0)
    weights = greso(past, prompts(6), 0)
    assert weights[:5].tolist() == [0.5, 0.125, 1, 0.01, 1] and weights[5] > 1e6
    assert greso(past, prompts(1), 0, start=0.9).tolist() == [0.9]


def tuned(easy_ratio, hard_ratio, iterations, num_prompts=10, size=20):
    """Both p after iterations that each had such shares of dead groups, by the weights of two prompts."""
    past = PromptHistory(0, num_prompts)
    past.add(8, torch.ones(2), 0), past.add(9, torch.zeros(2), 0)
    for iteration in range(iterations):
        for i in range(size):
            dead = 1.0 if i < easy_ratio * size else 0.0 if i >= size - hard_ratio * size else None
            group = [0.0, 1.0] if dead is None else [dead, dead]
            past.add(i % (num_prompts - 2), torch.tensor(group, dtype=torch.float64), iteration)
    return greso(past, prompts(10), iterations)[8:].tolist()


def test_greso_tunes_each_side_towards_its_target():
    """Targets 1/12 and 1/6: 10 % right is too many and 10 % wrong too few. The first iteration is the first epoch."""
    assert tuned(0.1, 0.1, 1) == [0.5, 0.5]
    assert tuned(0.1, 0.1, 2) == pytest.approx([0.49, 0.51])
    assert tuned(0.1, 0.1, 12) == pytest.approx([0.39, 0.61])
    assert tuned(0.05, 0.3, 12) == pytest.approx([0.61, 0.39])
    assert tuned(0.1, 0.1, 200) == pytest.approx([0.05, 0.95])
    assert tuned(0.0, 0.0, 3, size=4) == pytest.approx([0.51, 0.51])  # an epoch of 10 takes 3 iterations of 4


def test_greso_reaches_its_target_in_a_run():
    """Prompts that are always or never solved make 60 %; of what is drawn they become about 1/12 + 1/6."""
    generator = torch.Generator().manual_seed(0)
    chance = [1.0] * 60 + [0.0] * 60 + [0.5] * 80
    data, past, dead = prompts(200), PromptHistory(0, 200), []
    sampler = PromptSampler(data, 20)
    for iteration in range(400):
        chosen = sampler(iteration, greso(past, data, iteration))
        groups = [(torch.rand(8, generator=generator) < chance[p.id % 200]).double() for p in chosen]
        for prompt, group in zip(chosen, groups, strict=True):
            past.add(prompt.id, group, iteration)
        dead.append([sum(bool((g == side).all()) for g in groups) / 20 for side in (1, 0)])
    first, last = (torch.tensor(part).mean(0) for part in (dead[:10], dead[200:]))
    assert first.tolist() == pytest.approx([0.3, 0.3], abs=0.02)
    assert last[0] < 0.13 and last[1] < 0.2
    assert last[0] == pytest.approx(1 / 12, abs=0.05) and last[1] == pytest.approx(1 / 6, abs=0.05)


def test_greso_needs_shares():
    with pytest.raises(ValueError, match="greso: {'easy': 2"):
        greso(NONE, prompts(1), 0, easy=2)


# ------------------------------------------------------------------------------------------------ history_resampling


def test_what_was_all_right_goes_and_the_rest_comes_in_epochs():
    past = history({0: [[1, 1]], 1: [[0, 0]], 2: [[0, 1], [0, 1]], 3: [[1, 1], [1, 0]], 4: [[0, 1]]})
    weights = history_resampling(past, prompts(5), 3)
    assert weights[0] == 0 and (weights[[1, 4]] == 1).all() and (0 < weights[[2, 3]]).all()
    assert (weights[[2, 3]] < 1e-9).all()
    assert history_resampling(history({0: [[1, 1]], 1: [[1, 1]]}), prompts(2), 0).tolist() == [1, 1]


def test_history_resampling_goes_through_epochs_of_what_is_left():
    """12 prompts, 3 of them solved: the first epoch has 12, each later one the other 9, once each."""
    data, past, drawn = prompts(12), PromptHistory(0, 12), []
    sampler = PromptSampler(data, 3)
    for iteration in range(4 + 3 + 3):
        for prompt in sampler(iteration, history_resampling(past, data, iteration)):
            drawn.append(prompt.id)
            past.add(prompt.id, torch.ones(4) if prompt.id < 3 else torch.tensor([0.0, 1.0, 0.0, 0.0]), iteration)
    assert sorted(drawn[:12]) == list(range(12))
    assert sorted(drawn[12:21]) == sorted(drawn[21:]) == list(range(3, 12))


# ------------------------------------------------------------------------------------------------ staged


def test_stages_by_difficulty():
    data = prompts(4, difficulty=[0.1, 0.5, 0.9, 0.3])
    stages = [{"start": 0, "low": 0, "high": 0.3}, {"start": 10, "low": 0.3, "high": 1}]
    found = [staged(NONE, data, i, stages).tolist() for i in (0, 9, 10, 99)]
    assert found == [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_stages_by_kind():
    data = [Prompt(id=i, text="q", metadata={"kind": kind}) for i, kind in enumerate(["yes_no", "choice", "open"])]
    stages = [{"start": i * 5, "values": kinds} for i, kinds in enumerate([["yes_no"], ["yes_no", "choice"], ["open"]])]
    weigh = curriculum({"use": "staged", "by": "kind", "stages": stages})
    assert [weigh(NONE, data, i).tolist() for i in (0, 5, 10)] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ([{"start": 0, "low": 0.6, "high": 0.7}], "no prompt has a metadata 'difficulty' that belongs to the stage"),
        ([{"start": 0, "low": 0.1}], "write {start: 0, low: 0, high: 0.5}, or {start: 0, values: [yes_no]}"),
        ([{"start": 0, "low": 0, "high": 1, "values": [1]}], "a stage is {'start'"),
        ([0.3], "a stage is 0.3"),
        ([], "stages start at []; begin with 0"),
        ([{"start": 2, "values": [1]}], "stages start at [2]"),
        ([{"start": 0, "values": [1]}, {"start": 0, "values": [1]}], "let them rise"),
    ],
)
def test_impossible_stages(stages, part):
    with pytest.raises(DataError) as caught:
        staged(NONE, prompts(2, difficulty=[0.1, 0.9]), 0, stages)
    assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------ extra samples

EIGHTHS = torch.tensor([0, 1, 2, 3, 4, 6, 8]) / 8


def test_the_tables_of_dars():
    """All in all, of N = 8: the numbers of the paper's code."""
    assert (8 + extra_samples(EIGHTHS, 8, 32)).tolist() == [32, 18, 11, 9, 8, 8, 8]
    assert (8 + extra_samples(EIGHTHS, 8, 48, "hard")).tolist() == [48, 24, 12, 9, 8, 8, 8]


def test_equal_makes_the_advantages_of_hard_prompts_weigh_the_same():
    """With as many samples as it says, of which a share u is right, sum |r - mean| is what it is at u = 1/2."""
    for right in (1, 2, 5, 10, 50):
        total = 200 + int(extra_samples(torch.tensor([right / 200], dtype=torch.float64), 200, 10**9))
        rewards = (torch.arange(total) < right / 200 * total).double()
        advantages = group_advantages(rewards, torch.zeros(total, dtype=torch.long), std="none", eps=1.0)
        assert advantages.value.abs().sum() == pytest.approx(100, rel=0.03)


def test_no_verdict_and_bounds():
    assert extra_samples(torch.tensor([math.nan, 0.0]), 4, 4).tolist() == [0, 0]
    assert extra_samples(torch.zeros(0), 4, 8).shape == (0,)
    for options in ({"samples": 0, "most": 4}, {"samples": 8, "most": 4}):
        with pytest.raises(ValueError, match="at least 1 sample"):
            extra_samples(EIGHTHS, **options)
    with pytest.raises(ValueError, match="choose equal or hard"):
        extra_samples(EIGHTHS, 4, 8, "soft")


# ------------------------------------------------------------------------------------------------ names


def test_options_are_a_mapping():
    past, data = history({0: [[0, 1]], 1: [[1, 1]]}), prompts(2, difficulty=[1, 2])
    weigh = curriculum({"use": "learnable", "explore": 0.4})
    assert torch.equal(weigh(past, data, 0), learnable(past, data, 0, explore=0.4))
    assert torch.equal(curriculum({"use": "easy_first"})(past, data, 5), easy_first(past, data, 5))


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (
            {"use": "learnable", "explor": 1},
            "has no option 'explor' (did you mean 'explore'?); its options are explore",
        ),
        ({"use": "history_resampling", "over": 1}, "has no option 'over'; it has none"),
        ({"use": "staged"}, "missing a required argument: 'stages'; write {use: staged, stages: ...}"),
        ("staged", "missing a required argument: 'stages'"),
        ({"explore": 1}, "write {use: learnable, explore: 0.2}, or a name"),
        ({"use": "lernable"}, "'lernable' is not known (did you mean 'learnable'?)"),
    ],
)
def test_wrong_options_are_told(entry, part):
    with pytest.raises(ResolveError) as caught:
        curriculum(entry)
    assert part in str(caught.value)


def test_a_name_stands_for_a_function_of_this_file():
    assert available() == ["learnable", "easy_first", "rlcs", "greso", "history_resampling", "staged"]
    past, data = history({0: [[0, 1]], 1: [[1, 1]]}), prompts(2, difficulty=[1, 2])
    assert torch.equal(curriculum("learnable")(past, data, 0), learnable(past, data, 0))
    assert torch.equal(curriculum("flowrl.curriculum:easy_first")(past, data, 5), easy_first(past, data, 5))


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import functools, torch\n"
        "from flowrl.curriculum import easy_first\n"
        "slowly = functools.partial(easy_first, over=500)\n"
        "def newest(history, prompts, iteration):\n"
        "    return torch.tensor([1.0 + p.id for p in prompts])\n"
        "def forgot(history, prompts, iteration): pass\n"
        "def few(history): return torch.ones(1)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    data = prompts(20, difficulty=list(range(20)))
    assert curriculum("./mine.py:newest")(NONE, data, 0).tolist() == list(range(1, 21))
    slowly = functools.partial(easy_first, over=500)
    assert torch.equal(curriculum("./mine.py:slowly")(NONE, data, 250), slowly(NONE, data, 250))
    with pytest.raises(DataError, match=r"./mine.py:forgot returned NoneType None; return a tensor of 20 weights"):
        curriculum("./mine.py:forgot")(NONE, data, 0)
    for name in ("few", "number"):
        with pytest.raises(ResolveError, match=rf"mine.py:{name}' is no curriculum: expected a function \(history, "):
            curriculum(f"./mine.py:{name}")
    with pytest.raises(ResolveError, match=r"name the function in the file too, as ./mine.py:attr"):
        curriculum("./mine.py")
    with pytest.raises(ResolveError, match=r"there is no 'newst' \(did you mean 'newest'\?\)"):
        curriculum("./mine.py:newst")


@pytest.mark.parametrize("name", ["lernable", "curriculum", "DataError", "nowhere"])
def test_an_unknown_name_says_what_there_is(name):
    with pytest.raises(ResolveError, match=r"is not known.*There are: learnable, easy_first"):
        curriculum(name)
