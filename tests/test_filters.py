"""What filters keep, against brute force; how many prompts are drawn again; how the config is read."""

import math
import statistics
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from flowrl import filters as f
from flowrl.algorithms.advantages import group_advantages
from flowrl.filters import FilterError, Refill, build, times
from flowrl.history import ALIKE
from flowrl.types import Batch, Draws, Prompt, TokenBatch, Tokens
from samplers import all_steps, flow_sde, noise_source, rollout, stable_seed

NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def table(groups):
    """Rewards and groups of {group: rewards}."""
    rewards = [r for group in groups.values() for r in group]
    return tensor(*rewards), torch.tensor([name for name, group in groups.items() for _ in group])


def some(seed=0, groups=7, binary=False):
    """A table in mixed order, with groups of 1 to 8 samples, odd numbers and a few NaN; as {group: {place: reward}}."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (groups,), generator=generator).tolist()
    group = torch.tensor([5 * name - 3 for name, size in enumerate(sizes) for _ in range(size)])
    group = group[torch.randperm(len(group), generator=generator)]
    rewards = torch.randn(len(group), generator=generator, dtype=torch.float64)
    if binary:
        rewards = (rewards > 0.3).double()
    rewards[torch.rand(len(group), generator=generator) < 0.1] = NAN
    members = defaultdict(dict)
    for place, (name, reward) in enumerate(zip(group.tolist(), rewards.tolist(), strict=True)):
        if not math.isnan(reward):
            members[name][place] = reward
    return rewards, group, members


def groups_of(keep, group):
    """The groups of which something is kept, and a check that they are kept whole."""
    names = {name for name in set(group.tolist()) if keep[group == name].any()}
    assert all(keep[group == name].all() for name in names)
    return names


SEEDS = range(8)

# ------------------------------------------------------------------------------------------------ whole groups


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("binary", [False, True])
def test_informative_groups_have_different_rewards(seed, binary):
    rewards, group, members = some(seed, binary=binary)
    wanted = {name for name, known in members.items() if len(set(known.values())) > 1}
    assert groups_of(f.informative(rewards, group), group) == wanted


@pytest.mark.parametrize(
    ("rewards", "live"),
    [
        (torch.full((12,), 0.7), False),  # in float32 its std is 1.2e-7
        (torch.full((8,), 0.1), False),
        (torch.full((12,), 0.1, dtype=torch.float64), False),  # even in float64 it need not be 0
        (tensor(0.5, 0.5 + 1e-6), False),
        (tensor(0.5, 0.5 + 1e-4), True),
        (tensor(1000, 1000 + 1e-4), False),
        (tensor(0, 0, 0, 1), True),
        (tensor(1), False),
        (tensor(1, NAN), False),
        (tensor(NAN, NAN), False),
    ],
)
def test_rounding_is_no_difference(rewards, live):
    assert f.informative(rewards, torch.zeros(len(rewards), dtype=torch.long)).tolist() == [live] * len(rewards)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_informative_has_an_advantage_and_the_rest_has_none(seed):
    rewards, group, _ = some(seed, binary=True)
    keep = f.informative(rewards, group)
    advantages = group_advantages(rewards, group).value
    for name in group.unique():
        assert bool(keep[group == name].any()) == bool((advantages[group == name] != 0).any())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high"), [(0.01, 0.99), (0.2, 0.5), (-1, 1), (0, 0.9)])
def test_a_band_of_means(seed, low, high):
    rewards, group, members = some(seed, binary=True)
    wanted = {name for name, known in members.items() if low < statistics.fmean(known.values()) < high}
    assert groups_of(f.band(rewards, group, {}, low, high), group) == wanted


def test_a_band_of_another_fact():
    """Group 0 is right every second time, group 1 always; the rewards say nothing of that."""
    rewards, group = table({0: [0.3, 0.4], 1: [0.3, 0.4], 2: [NAN, NAN]})
    facts = {"right": tensor(0, 1, 1, 1, 0, 1)}
    assert f.band(rewards, group, facts, of="right").tolist() == [True, True, False, False, False, False]
    with pytest.raises(FilterError, match=r"no fact 'rihgt' \(did you mean 'right'\?\); known are right"):
        f.band(rewards, group, facts, of="rihgt")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_band_of_stds(seed):
    rewards, group, members = some(seed)
    spread = {name: statistics.pstdev(known.values()) for name, known in members.items() if len(known) > 1}
    for low, high in ((0.0, math.inf), (0.5, 1.0)):
        wanted = {name for name, std in spread.items() if low < std < high}
        assert groups_of(f.std_band(rewards, group, low, high), group) == wanted


def test_equal_rewards_have_no_std():
    rewards, group = table({0: [0.1] * 12, 1: [0.1, 0.2]})  # in float64 numpy's std of the first is 1.4e-17
    assert groups_of(f.std_band(rewards, group), group) == {1}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_groups_with_the_largest_std(seed, share):
    rewards, group, members = some(seed)
    spread = {name: statistics.pstdev(known.values()) for name, known in members.items() if len(known) > 1}
    kept = groups_of(f.top_std(rewards, group, share), group)
    assert len(kept) == max(1, math.floor(share * len(spread) + 1e-9))
    assert min(spread[name] for name in kept) > max((spread[n] for n in spread.keys() - kept), default=-1)


def test_ties_of_std_fall_to_the_lower_group_and_a_share_is_not_rounded_down():
    rewards, group = table({name: [0, 1] for name in range(10)})
    assert groups_of(f.top_std(rewards, group, 0.3), group) == {0, 1, 2}  # 10 * 0.3 is a little more than 3,
    assert groups_of(f.top_std(rewards, group, 0.7), group) == set(range(7))  # 10 * 0.7 a little less than 7


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prune", [0.0, 0.25, 0.5, 0.875, 0.99])
def test_the_largest_advantages_of_a_group(seed, prune):
    rewards, group, members = some(seed)
    keep = f.largest_advantage(rewards, group, prune)
    size = group_advantages(rewards, group, eps=0).value.abs()
    assert not keep[rewards.isnan()].any()
    for name, known in members.items():
        kept = [place for place in known if keep[place]]
        gone = [place for place in known if not keep[place]]
        assert len(kept) == max(1, math.floor(len(known) * (1 - prune) + 1e-9)), name
        assert not gone or size[kept].min() >= size[gone].max()


def test_a_share_of_a_tenth_of_ten_is_one():
    """Of [0 ... 8, 20] the mean is 5.6, and 20 is farthest from it; 10 * (1 - 0.9) is 0.99...98 in floating point."""
    rewards, group = table({0: [*range(9), 20], 1: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]})
    assert torch.nonzero(f.largest_advantage(rewards, group, 0.9)).flatten().tolist() == [9, 10]
    assert f.largest_advantage(rewards, group, 0.7).sum() == 6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("best", "worst"), [(1, 1), (2, 0), (0, 3), (5, 5)])
def test_best_and_worst(seed, best, worst):
    rewards, group, members = some(seed)
    keep = f.best_worst(rewards, group, best, worst)
    for known in members.values():
        ranked = sorted(known, key=lambda place: known[place])
        assert (
            {p for p in known if keep[p]} == {*ranked[:worst], *ranked[len(ranked) - best :]}
            if (len(known) >= best + worst)
            else set(known)
        )


def expected(rewards, how, power=2.0):
    """The chance of each sample of one group, by the definition."""
    best, worst = max(rewards), min(rewards)
    weights = {
        "pow": [abs(r) ** power for r in rewards],
        "max_min": [float(r in (best, worst)) for r in rewards],
        "max_random": [0.4 if r == best else 0.1 for r in rewards],
    }[how]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(("how", "power"), [("pow", 2.0), ("pow", 1.0), ("max_min", 2.0), ("max_random", 2.0)])
def test_pf_ppo_draws_in_proportion(how, power):
    """Counts lie next to w K, are w K on average, and 0 where w is."""
    groups = {4: [0.5, -1.0, 0.0, 2.0, 1.5, 0.1, NAN, 2.0], 9: [1.0, 0.0, 0.0], 2: [3.0]}
    rewards, group = table(groups)
    runs = 2000
    counts = torch.stack([f.pf_ppo(rewards, group, stable_seed(7, i), how, power) for i in range(runs)])
    mean = counts.double().mean(0)
    for name, values in groups.items():
        places = torch.nonzero((group == name) & ~rewards.isnan()).flatten()
        known = [v for v in values if not math.isnan(v)]
        assert (counts[:, places].sum(1) == len(known)).all()
        for place, chance in zip(places.tolist(), expected(known, how, power), strict=True):
            share = chance * len(known)
            assert counts[:, place].min() >= math.floor(share + 1e-9 - 1e-8)
            assert counts[:, place].max() <= math.ceil(share - 1e-9)
            error = math.sqrt((share % 1) * (1 - share % 1) / runs)
            assert abs(mean[place] - share) <= 4.5 * error + 1e-9
    assert counts[:, torch.nonzero(rewards.isnan()).flatten()].sum() == 0


def test_pf_ppo_without_any_weight_draws_evenly():
    rewards, group = table({0: [0.0, 0.0, 0.0]})
    assert f.pf_ppo(rewards, group, 3).tolist() == [1, 1, 1]


def test_pf_ppo_is_a_function_of_its_key_and_of_the_group():
    groups = {name: [0.3, 0.7, 0.1, 0.2, 0.6] for name in range(30)}
    rewards, group = table(groups)
    once = f.pf_ppo(rewards, group, 5)
    assert torch.equal(once, f.pf_ppo(rewards, group, 5))
    assert not torch.equal(once, f.pf_ppo(rewards, group, 6))
    assert len({tuple(once[group == name].tolist()) for name in range(30)}) > 1
    half = torch.isin(group, torch.arange(15, 30))  # and does not depend on the other groups
    assert torch.equal(once[half], f.pf_ppo(rewards[half], group[half], 5))


def test_the_last_sample_without_weight_is_never_drawn():
    for key in range(500):
        assert f.pf_ppo(tensor(0.1, 0.7, 0.3, 0.0), torch.zeros(4, dtype=torch.long), key)[3] == 0


def test_answers_by_what_is_known_of_them():
    rewards, group = table({0: [1, 0, 1], 1: [0, 0, 1]})
    facts = {"truncated": tensor(0, 1, 0, 0, 1, 0), "tokens": tensor(5, 9, 8, 3, 9, 10)}
    assert f.not_truncated(rewards, group, facts).tolist() == [True, False, True, True, False, True]
    over = {"over_turns": torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])}
    assert f.within_turns(rewards, group, over).tolist() == [True, True, False, True, True, True]
    assert f.short_enough(rewards, group, facts, 8).tolist() == [True, False, True, True, False, False]
    with pytest.raises(FilterError, match=r"no fact 'truncated'; nothing but the reward is known"):
        f.not_truncated(rewards, group, {})


# ------------------------------------------------------------------------------------------------ all of them

EACH = [
    {"use": "informative"},
    {"use": "band", "low": -0.5, "high": 0.5},
    {"use": "band", "low": 0.2, "high": 0.8, "of": "right"},
    {"use": "std_band", "low": 0.7},
    {"use": "top_std", "share": 0.4},
    {"use": "largest_advantage", "prune": 0.5},
    {"use": "best_worst", "best": 1, "worst": 2},
    {"use": "pf_ppo"},
    {"use": "not_truncated"},
    {"use": "within_turns"},
    {"use": "short_enough", "most": 6},
]


def facts_of(rewards, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, len(rewards), generator=generator, dtype=torch.float64)
    return {
        "right": (draw[0] > 0.5).double(),
        "truncated": (draw[1] > 0.7).double(),
        "over_turns": (draw[1] < 0.2).double(),
        "tokens": (10 * draw[2]).ceil(),
    }


def test_there_is_a_filter_of_each_kind_here():
    assert {entry["use"] for entry in EACH} == set(f.available())


@pytest.mark.parametrize("entry", EACH, ids=lambda entry: entry["use"])
def test_the_order_of_the_groups_does_not_matter(entry):
    """Whole groups come in another order; for all but the draw, which goes sample by sample, the samples too."""
    for seed in SEEDS:
        rewards, group, members = some(seed)
        for name in (name for name, known in members.items() if len(known) == 2):
            rewards[group == name] = NAN  # two are equally far from their mean: a tie, which falls to the earlier one
        facts = facts_of(rewards, seed)
        generator = torch.Generator().manual_seed(seed)
        by_group = torch.randn(100, generator=generator)[group + 3].argsort(stable=True)
        orders = [by_group] if entry["use"] == "pf_ppo" else [by_group, torch.randperm(len(group), generator=generator)]
        kept = build([entry]).keep(rewards, group, facts, key=1)
        for order in orders:
            moved = {name: fact[order] for name, fact in facts.items()}
            again = build([entry]).keep(rewards[order], group[order], moved, key=1)
            assert torch.equal(again.counts, kept.counts[order])
            assert again.metrics == kept.metrics


@pytest.mark.parametrize("entry", EACH, ids=lambda entry: entry["use"])
def test_what_has_no_verdict_is_never_kept(entry):
    for seed in SEEDS:
        rewards, group, _ = some(seed)
        kept = build([entry]).keep(rewards, group, facts_of(rewards, seed), key=seed)
        assert not kept.samples[rewards.isnan()].any() and kept.counts.dtype == torch.int64
        assert set(kept.groups.tolist()) == set(group[kept.samples].tolist())
        assert torch.equal(kept.in_groups, torch.isin(group, kept.groups))


def test_one_filter_after_the_other():
    """The first takes group 1 away, the second group 0's truncated 9; of what is left the best two stay."""
    rewards, group = table({0: [1, 9, 3, 5], 1: [2, 2, 2, 2], 2: [0, 1, NAN, 7]})
    facts = {"truncated": tensor(0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)}
    entries = [{"use": "informative"}, {"use": "not_truncated"}, {"use": "best_worst", "best": 2, "worst": 0}]
    kept = build(entries).keep(rewards, group, facts)
    assert kept.counts.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert kept.groups.tolist() == [0, 2]
    assert kept.in_groups.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    drawn = build([{"use": "best_worst", "best": 1, "worst": 1}, {"use": "pf_ppo", "how": "max_min"}])
    assert drawn.keep(rewards, group).counts[:4].tolist() == [1, 1, 0, 0]


def test_the_order_in_the_config_counts():
    rewards, group = table({0: [0, 1, 1], 1: [0, 1, 0]})
    facts = {"truncated": tensor(1, 0, 0, 0, 0, 0)}
    cut, live = {"use": "not_truncated"}, {"use": "informative"}
    assert build([cut, live]).keep(rewards, group, facts).groups.tolist() == [1]
    assert build([live, cut]).keep(rewards, group, facts).groups.tolist() == [0, 1]


def test_the_first_groups_of_more_than_are_wanted():
    rewards, group = table({8: [0, 1], 3: [0, 1], 5: [1, 1], 6: [1, 0]})
    kept = build([{"use": "informative"}]).keep(rewards, group)
    assert kept.groups.tolist() == [3, 6, 8]
    assert kept.first(2).groups.tolist() == [3, 6]
    assert kept.first(2).counts.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert kept.first(9).counts.tolist() == kept.counts.tolist()


def test_metrics_count_what_taught_nothing_on_both_sides():
    groups = {0: [0, 1], 1: [1, 1], 2: [0, 0], 3: [0.1, 0.1], 4: [NAN, NAN], 5: [1, NAN], 6: [0, 1], 7: [0, 0]}
    kept = build([{"use": "informative"}]).keep(*table(groups))
    assert kept.metrics == {"kept_samples": 4 / 16, "kept_groups": 2 / 8, "dead_low": 3 / 8, "dead_high": 1 / 8}
    strict = build([{"use": "informative"}], passing=0.05).keep(*table(groups))
    assert (strict.metrics["dead_low"], strict.metrics["dead_high"]) == (2 / 8, 2 / 8)


def test_without_filters_all_with_a_verdict_stay():
    kept = build([]).keep(*table({0: [1, NAN], 1: [2, 2]}))
    assert kept.counts.tolist() == [1, 0, 1, 1] and kept.metrics["kept_groups"] == 1
    nothing = build([]).keep(tensor(), torch.zeros(0, dtype=torch.long))
    assert nothing.counts.shape == (0,) and nothing.metrics["kept_groups"] == 0


def test_one_rule_for_equal_rewards():
    from flowrl.algorithms.advantages import STD_FLOOR

    assert ALIKE == STD_FLOOR


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"use": "informativ"}, "data.filters[0] (informativ): there is no such filter (did you mean 'informative'?)"),
        ({"use": "build"}, "there is no such filter"),
        (
            {"use": "band", "lo": 0.1},
            "(band): there is no option 'lo' (did you mean 'low'?); its options are low, high",
        ),
        ({"use": "informative", "low": 0.1}, "there is no option 'low'; it has none"),
        ({"use": "best_worst", "best": 1}, "(best_worst): worst must be set; put it beside `use`, as in worst: 1"),
        ({"use": "band", "low": 0.9, "high": 0.1}, "low=0.9, high=0.1: low is less than high"),
        ({"use": "band", "low": "much"}, "(band) raises TypeError: '<' not supported"),
        ({"use": "band", "low": "much"}, "Mend the function, or what its options are set to: low='much'."),
        ({"use": "top_std", "share": 1.5}, "share=1.5: a share is in (0, 1]"),
        ({"use": "std_band", "low": -1}, "low is at least 0"),
        ({"use": "largest_advantage", "prune": 1}, "prune=1: the share that goes is in [0, 1)"),
        ({"use": "best_worst", "best": 0, "worst": 0}, "none is negative, and one at least 1"),
        ({"use": "pf_ppo", "how": "random"}, "how='random': choose pow, max_min or max_random"),
        ({"use": "pf_ppo", "power": 0}, "power=0: more than 0"),
        ({"use": "short_enough", "most": 0}, "most=0: at least 1 token"),
        ({"low": 0.1}, "write {use: informative}"),
        ("informative", "is 'informative'; write {use: informative}"),
        ({"use": "nowhere.at_all:mine"}, "(nowhere.at_all:mine): "),
        ({"use": "flowrl.filters:Kept"}, "expected a function (rewards, group, ...) -> keep, found type"),
    ],
)
def test_what_cannot_work_is_refused_with_the_place(entry, part):
    with pytest.raises(FilterError) as caught:
        build([entry])
    assert str(caught.value).startswith("data.filters[0]") and part in str(caught.value)


def test_a_missing_fact_is_told_with_the_place():
    """Pictures have no tokens: the filter is known when the config is read, but not that it has nothing to look at."""
    made = build([{"use": "informative"}, {"use": "not_truncated"}])
    with pytest.raises(FilterError, match=r"data.filters\[1\] \(not_truncated\): the samples have no fact 'truncated'"):
        made.keep(*table({0: [0, 1]}))


def test_a_filter_in_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def above(rewards, group, low=0.5): return rewards > low\n"
        "def twice(rewards, group, facts): return 2 * facts['wanted'].long()\n"
        "def keyed(rewards, group, key): return (torch.arange(len(group)) + key) % 2\n"
        "def any_of_it(rewards, group, **options): return rewards > options['low']\n"
        "def wrong(rewards, group): return rewards\n"
        "def negative(rewards, group): return -torch.ones(len(group), dtype=torch.long)\n"
        "def short(rewards, group): return rewards[:1] > 0\n"
        "def few(rewards): return rewards > 0\n"
        "def fails(rewards, group): return {}['unknown']\n"
        "def later(rewards, group): return rewards > 1 / (6 - len(group))\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards, group = table({0: [0.2, 0.6], 1: [0.9, 0.4]})
    facts = {"wanted": tensor(1, 0, 1, 1)}

    def counts(**entry):
        return build([entry]).keep(rewards, group, facts, key=1).counts.tolist()

    assert counts(use="./mine.py:above") == [0, 1, 1, 0] == counts(use="./mine.py:any_of_it", low=0.5)
    assert counts(use="./mine.py:above", low=0.3) == [0, 1, 1, 1]
    assert counts(use="./mine.py:twice") == [2, 0, 2, 2] and counts(use="./mine.py:keyed") == [1, 0, 1, 0]
    for name, told in (("wrong", "torch.float64 [4]"), ("negative", "torch.int64 [4]"), ("short", "torch.bool [1]")):
        with pytest.raises(FilterError) as caught:
            build([{"use": f"./mine.py:{name}"}])
        assert f"(./mine.py:{name}) returned {told}; return bools, or counts" in str(caught.value)
    with pytest.raises(FilterError, match="expected a function"):
        build([{"use": "./mine.py:few"}])
    with pytest.raises(FilterError) as caught:
        build([{"use": "informative"}, {"use": "./mine.py:fails"}])
    line = f"({tmp_path / 'mine.py'}:10). Mend the function."
    assert str(caught.value) == f"data.filters[1] (./mine.py:fails) raises KeyError: 'unknown' {line}"
    assert isinstance(caught.value.__cause__, KeyError)
    later = build([{"use": "./mine.py:later"}])  # only where there are more samples than in the example
    with pytest.raises(FilterError, match=r"data.filters\[0\] \(./mine.py:later\) raises ZeroDivisionError: "):
        later.keep(*table({0: [0, 1], 1: [1, 0], 2: [0, 0]}))
    with pytest.raises(FilterError, match=r"no 'abov' \(did you mean 'above'\?\)"):
        build([{"use": "./mine.py:abov"}])


# ------------------------------------------------------------------------------------------------ rows

PROMPTS = [Prompt(id=i, text=f"p{i}") for i in range(3)]
K = 4


def flow_batch(split=False):
    """A real rollout of a toy flow, three prompts of four samples; `split`: two roots a prompt that part in two."""
    plan = all_steps(torch.linspace(1, 0, 5))
    plan = plan.with_fanout({1: 2}) if split else plan
    roots = 2 if split else K
    prompt = torch.arange(3).repeat_interleave(roots)
    member = torch.arange(roots).repeat(3) * plan.leaves_per_root
    noise = noise_source((2,), seed=0, iteration=0, prompt=prompt, member=member)
    start = noise(torch.arange(len(prompt)), torch.zeros(len(prompt), dtype=torch.long), -1)
    edges = rollout(lambda x, t, p: -x, start, plan, flow_sde, prompt=prompt, group=prompt, eta=0.7, noise=noise)
    rewards = edges.x0.norm(dim=1).double()
    return Batch(
        prompts=PROMPTS, cond={}, trajectory=edges, leaf_prompt=edges.leaf_prompt, rewards=rewards,
        place=torch.arange(3 * K),
    )  # fmt: skip


def brute_times(batch, counts):
    """Row by row: the largest count among the samples below an edge."""
    return [max(counts[i] for i, below in enumerate(row) if below) for row in batch.trajectory.leaves.tolist()]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("entry", EACH, ids=lambda entry: entry["use"])
def test_a_flow_run_goes_through_each_filter(entry, split):
    batch = flow_batch(split)
    kept = build([entry]).keep(batch.rewards, batch.group, facts_of(batch.rewards), key=2)
    rows = times(batch, kept.counts)
    assert rows.tolist() == brute_times(batch, kept.counts.tolist())
    chosen = replace(batch, advantages=torch.arange(len(batch.rows)).double()).select(
        torch.arange(len(rows)).repeat_interleave(rows)
    )
    assert len(chosen.rows) == rows.sum() == len(chosen.advantages)
    assert Counter(chosen.advantages.tolist()) == {float(i): n for i, n in enumerate(rows.tolist()) if n}
    reached = chosen.trajectory.leaves.any(0) if len(chosen.rows) else torch.zeros(3 * K, dtype=torch.bool)
    assert reached[kept.samples].all()
    if not split:
        assert torch.equal(reached, kept.samples)


def test_a_flow_run_without_live_groups_trains_on_nothing():
    batch = flow_batch()
    batch.rewards = torch.full_like(batch.rewards, 0.3)
    kept = build([{"use": "informative"}]).keep(batch.rewards, batch.group)
    assert times(batch, kept.counts).tolist() == [0] * len(batch.rows) and kept.metrics["dead_low"] == 1


def test_draws_follow_their_samples():
    batch = flow_batch()
    sample = torch.tensor([3, 0, 0, 11, 5])
    key = torch.zeros(5, 3, dtype=torch.long)
    batch.draws = Draws(sample=sample, t=torch.rand(5), key=key, unit=torch.arange(5))
    counts = torch.arange(12) % 3
    assert times(batch, counts).tolist() == [0, 0, 0, 2, 2]


def answers_batch(place):
    ids = torch.arange(1, 1 + 2 * len(place)).view(-1, 2)
    tokens = Tokens(
        ids=ids, present=ids > 0, mask=ids > 0, logprob=torch.zeros(len(place), 2), prompt=place // K,
        inputs=(None,) * len(place),
    )  # fmt: skip
    return TokenBatch(prompts=PROMPTS, tokens=tokens, group=place // K, place=place)


@pytest.mark.parametrize("entry", EACH, ids=lambda entry: entry["use"])
def test_processes_keep_together_what_one_keeps(entry):
    """Each process asks for the whole table and takes its own rows, whatever rows those are."""
    rewards, group = table({0: [0.1, 0.9, 0.4, 0.2], 1: [0.3, 0.3, 0.3, 0.3], 2: [0.0, 1.0, NAN, 0.6]})
    kept = build([entry]).keep(rewards, group, facts_of(rewards), key=4)
    whole = times(answers_batch(torch.arange(12)), kept.counts)
    assert torch.equal(whole, kept.counts)
    parts = torch.tensor([0, 1, 2, 3, 8]), torch.tensor([11, 10, 9, 4, 5, 6, 7])
    together = torch.zeros(12, dtype=torch.long)
    for place in parts:
        again = build([entry]).keep(rewards.clone(), group.clone(), facts_of(rewards), key=4)
        together[place] = times(answers_batch(place), again.counts)
    assert torch.equal(together, whole)


# ------------------------------------------------------------------------------------------------ refill


def run(refill, shares):
    """The tries of a run in which the i-th try keeps a share of its prompts."""
    for share in shares:
        count = refill.wants()
        if not count:
            break
        refill.saw(count, round(share * count))
    return refill.tries


def test_enough_at_once_is_one_try():
    refill = Refill(wanted=8, max_tries=5)
    assert run(refill, [1.0] * 9) == [(8, 8)] and refill.wants() == 0 and refill.warning is None
    assert refill.metrics == {"refill_tries": 1.0, "refill_drawn": 8.0, "refill_missing": 0.0}


def test_the_next_try_draws_what_the_share_so_far_asks_for():
    """By hand: of 40 are 30 kept, 10 / 0.75 * 1.25 = 16.7; of these 17 are 8 kept, 2 / (38 / 57) * 1.25 = 3.75."""
    refill = Refill(wanted=40, max_tries=5)
    refill.saw(refill.wants(), 30)
    assert refill.wants() == 17
    refill.saw(17, 8)
    assert refill.wants() == 4
    refill.saw(4, 4)
    assert refill.wants() == 0 and (refill.drawn, refill.kept) == (61, 42)
    assert Refill(wanted=40, max_tries=5, least=24, tries=[(40, 30)]).wants() == 24


def test_tries_are_bounded_and_what_was_found_is_trained_on():
    refill = Refill(wanted=8, max_tries=3)
    assert run(refill, [0.25] * 9) == [(8, 2), (8, 2), (8, 2)]
    assert refill.wants() == 0 and refill.warning is None and refill.metrics["refill_missing"] == 2 / 8


def test_nothing_at_all_is_a_warning():
    refill = Refill(wanted=8, max_tries=3)
    assert refill.warning is None
    assert run(refill, [0.0] * 9) == [(8, 0)] * 3
    assert "kept none of 24 groups in 3 tries" in refill.warning and "data.max_tries" in refill.warning


@pytest.mark.parametrize("wanted", [1, 7, 64])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_refill_ends_and_never_asks_for_too_much(wanted, share):
    generator = torch.Generator().manual_seed(int(100 * share) + wanted)
    for _ in range(50):
        refill = Refill(wanted=wanted, max_tries=12, least=min(wanted, 2))
        while count := refill.wants():
            assert min(wanted, 2) <= count <= wanted
            refill.saw(count, int((torch.rand(count, generator=generator) < share).sum()))
        assert refill.kept >= wanted or len(refill.tries) == 12
        assert refill.kept - wanted < wanted  # the last try alone can bring more than are wanted


@pytest.mark.parametrize("numbers", [(0, 1, 1), (4, 0, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_refills(numbers):
    wanted, max_tries, least = numbers
    with pytest.raises(FilterError, match=f"wanted={wanted} groups, max_tries={max_tries}, least={least}"):
        Refill(wanted=wanted, max_tries=max_tries, least=least)
