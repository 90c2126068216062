"""Which prompts a curriculum wants, by hand and by what is drawn; how its name is read."""

import functools
import math
from collections import Counter

import pytest
import torch

from flowrl.curriculum import available, curriculum, easy_first, learnable
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


# ------------------------------------------------------------------------------------------------ names


def test_a_name_stands_for_a_function_of_this_file():
    assert available() == ["learnable", "easy_first"]
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
