"""Win rates from pairs: against brute force, with judges of both kinds, and with every way a pair can fail."""

import itertools
import math
import sys
from types import ModuleType

import pytest
import torch

from flowrl.shapes.scenes import draw, render
from rewards import RewardContractError, RewardError, RewardHub, Sample, build, declare
from rewards.pairs import PairJudge, Pairs
from rewards.shapes import parse
from tests.rewards.faults import FaultServer, answer, hang, reply
from tests.rewards.makers import noise
from tests.rewards.stopwatch import Stopwatch

nan = math.nan


def grey(level, **fields):
    """A flat grey picture: its brightness is its level."""
    return Sample(media=torch.full((3, 4, 4), level), **fields)


def group(levels, number=0):
    return [grey(level, group=number) for level in levels]


def level(sample):
    return sample.media.mean().item()


class Judge:
    """A judge of pairs: its answer is `chance` of the two levels; it remembers what it was shown."""

    def __init__(self, chance=lambda a, b: float(a > b) + 0.5 * (a == b)):
        self.chance, self.shown = chance, []

    def prefers(self, first, second):
        self.shown.append((level(first), level(second)))
        return self.chance(level(first), level(second))


class Scorer:
    """A judge of single samples: their level, NaN for black; remembers every sample that it was asked about."""

    def __init__(self):
        self.seen = []

    def score(self, samples):
        self.seen += [level(sample) for sample in samples]
        return [level(sample) or None for sample in samples]


def brute_force(levels, margin=0.0):
    """Win rates by the definition, one pair after the other; 0 stands for a sample without a score."""
    rates = []
    for i, a in enumerate(levels):
        points = [
            1.0 if a - b > margin else 0.0 if b - a > margin else 0.5
            for j, b in enumerate(levels)
            if j != i and a != 0 and b != 0
        ]
        rates.append(sum(points) / len(points) if points else nan)
    return torch.tensor(rates)


def equal(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-6, equal_nan=True)


# ------------------------------------------------------------------------------------------------ win rates


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("margin", [0.0, 0.13, 0.3])
@pytest.mark.parametrize("missing", [0, 1])
def test_win_rates_are_those_of_the_definition(size, margin, missing):
    levels = (torch.rand(size, generator=torch.Generator().manual_seed(size)) * 0.9 + 0.1).tolist()
    levels[:missing] = [0.0] * missing
    expected = brute_force(levels, margin)
    equal(Pairs(Scorer(), margin=margin).score(group(levels)).value, expected)

    def lead(a, b):
        return None if a == 0 or b == 0 else (a - b) / 2 + 0.5

    for both_orders in (True, False):
        judge = Pairs(Judge(lead), margin=margin / 2, both_orders=both_orders)
        equal(judge.score(group(levels)).value, expected)


@pytest.mark.parametrize("judge", [Scorer, Judge])
def test_without_a_margin_the_order_of_win_rates_is_the_order_of_the_scores(judge):
    levels = (torch.randperm(12, generator=torch.Generator().manual_seed(3)).float() + 1) / 20
    value = Pairs(judge(), margin=0.0).score(group(levels.tolist())).value
    equal(value, levels.argsort().argsort() / 11)


def test_the_margin_itself_is_still_a_tie():
    levels = [0.25, 0.5, 0.75]  # differences are exact
    equal(Pairs(Scorer(), margin=0.25).score(group(levels)).value, [0.25, 0.5, 0.75])
    judge = Judge(lambda a, b: 0.5 + (a - b) / 2)
    equal(Pairs(judge, margin=0.125).score(group(levels)).value, [0.25, 0.5, 0.75])
    equal(Pairs(Scorer(), margin=0.2499).score(group(levels)).value, [0.0, 0.5, 1.0])


def test_parts_count_the_pairs_and_hold_the_scores():
    scores = Pairs(Scorer(), margin=0.2).score(group([0.25, 0.375, 1.0, 0.0]))
    equal(scores.value, [0.25, 0.25, 1.0, nan])
    equal(scores.parts["wins"], [0.0, 0.0, 2.0, nan])
    equal(scores.parts["ties"], [1.0, 1.0, 0.0, nan])
    equal(scores.parts["losses"], [1.0, 1.0, 0.0, nan])
    equal(scores.parts["unjudged"], [1.0, 1.0, 1.0, nan])
    equal(scores.parts["score"], [0.25, 0.375, 1.0, nan])


def test_only_samples_of_one_group_are_compared_however_they_are_mixed():
    levels, groups = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.5], [4, 9, 4, 9, 4, 9, 2]
    samples = [grey(a, group=g) for a, g in zip(levels, groups, strict=True)]
    judge = Judge()
    result = Pairs(judge).score(samples)
    equal(result.value, [0.0, 1.0, 0.5, 0.5, 1.0, 0.0, nan])
    assert result.info[6] == {"error": "its group has no other sample to compare it with"}
    of = {level(sample): sample.group for sample in samples}
    assert len(judge.shown) == 2 * 2 * 3
    assert all(of[a] == of[b] for a, b in judge.shown)


def test_a_sample_alone_has_no_win_rate_but_its_score():
    scores = Pairs(Scorer()).score([grey(0.5)])
    assert scores.value.isnan().all()
    assert scores.parts["wins"].isnan().all()
    assert scores.parts["score"].tolist() == [0.5]


# ------------------------------------------------------------------------------------------------ who is shown what


def test_a_preference_for_one_side_cancels_when_both_orders_are_shown():
    biased = Judge(lambda a, b: 0.9)
    assert Pairs(biased, margin=0.0).score(group([0.1, 0.2, 0.3, 0.4])).value.tolist() == [0.5] * 4
    by_number = Pairs(biased, margin=0.0, both_orders=False).score(group([0.1, 0.2, 0.3, 0.4]))
    equal(by_number.value, [1.0, 2 / 3, 1 / 3, 0.0])


def test_the_mean_of_both_answers_decides():
    answers = {(0.25, 0.75): 0.4, (0.75, 0.25): 0.7}  # the second is better by 0.35 - 0.5
    scored = Pairs(Judge(lambda a, b: answers[a, b]), margin=0.14).score(group([0.25, 0.75]))
    assert scored.value.tolist() == [0.0, 1.0]
    assert Pairs(Judge(lambda a, b: answers[a, b]), margin=0.16).score(group([0.25, 0.75])).value.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("size", [2, 5, 6])
def test_every_pair_is_shown_once_or_once_each_way_round(size):
    levels = [(i + 1) / 8 for i in range(size)]
    pairs = list(itertools.combinations(levels, 2))
    once, twice = Judge(), Judge()
    Pairs(once, both_orders=False).score(group(levels))
    Pairs(twice).score(group(levels))
    assert once.shown == pairs
    assert len(once.shown) == size * (size - 1) / 2
    assert sorted(twice.shown) == sorted([*pairs, *((b, a) for a, b in pairs)])


def test_a_judge_of_single_samples_sees_each_once():
    judge = Scorer()
    levels = [0.1, 0.2, 0.3, 0.4, 0.5]
    Pairs(judge).score(group(levels) + group([0.6, 0.7], 1))
    assert judge.seen == pytest.approx([*levels, 0.6, 0.7])


def test_a_judge_that_takes_many_pairs_gets_all_of_a_call_at_once():
    class Batched(Judge):
        calls = 0

        def prefers_batch(self, pairs):
            self.calls += 1
            return torch.tensor([Judge.prefers(self, a, b) for a, b in pairs])

        def prefers(self, first, second):
            raise AssertionError("asked one by one")

    judge = Batched()
    equal(Pairs(judge).score(group([0.1, 0.3, 0.2]) + group([0.5, 0.4], 1)).value, [0.0, 1.0, 0.5, 1.0, 0.0])
    assert judge.calls == 1
    assert len(judge.shown) == 8
    assert Pairs(judge).score([grey(0.5)]).value.isnan().all()
    assert judge.calls == 1, "nothing to ask"


# ------------------------------------------------------------------------------------------------ some of the pairs


def shown_pairs(size, per_sample, number=0, **options):
    judge = Judge()
    levels = [(i + 1) / 16 for i in range(size)]
    Pairs(judge, both_orders=False, schedule="all" if per_sample is None else f"ring:{per_sample}", **options).score(
        group(levels, number)
    )
    return [(round(a * 16) - 1, round(b * 16) - 1) for a, b in judge.shown]


@pytest.mark.parametrize("size", [2, 3, 7, 8, 12])
@pytest.mark.parametrize("per_sample", [1, 2, 3, 6])
def test_a_subset_gives_every_sample_the_same_number_of_pairs(size, per_sample):
    pairs = shown_pairs(size, per_sample)
    meetings = torch.bincount(torch.tensor(pairs).flatten(), minlength=size)
    assert len(set(pairs)) == len(pairs)
    assert all(i < j for i, j in pairs)
    assert meetings.tolist() == [min(2 * per_sample, size - 1)] * size
    assert len(pairs) == min(per_sample * size, size * (size - 1) // 2)


def test_a_subset_depends_on_seed_and_group_alone():
    chosen = shown_pairs(12, 2)
    assert chosen == shown_pairs(12, 2)
    assert chosen != shown_pairs(12, 2, seed=1)
    assert chosen != shown_pairs(12, 2, number=1)
    alone, judge = shown_pairs(12, 2, number=5), Judge()
    others = group([0.9, 0.95], 3)
    Pairs(judge, both_orders=False, schedule="ring:2").score(others + group([(i + 1) / 16 for i in range(12)], 5))
    assert [(round(a * 16) - 1, round(b * 16) - 1) for a, b in judge.shown[1:]] == alone


def test_win_rates_of_a_subset_are_means_over_its_pairs():
    levels = [(i + 1) / 16 for i in range(9)]
    scores = Pairs(Judge(), schedule="ring:2").score(group(levels))
    met = shown_pairs(9, 2)
    wins = torch.tensor([sum(i == b for a, b in met) / sum(i in pair for pair in met) for i in range(9)])
    equal(scores.value, wins)


# ------------------------------------------------------------------------------------------------ no verdict


def test_a_pair_that_fails_has_no_verdict_and_says_why():
    def chance(a, b):
        if {a, b} == {0.25, 0.5}:
            raise ValueError("cannot be read")
        return float(a > b)

    scores = Pairs(Judge(chance)).score(group([0.25, 0.5, 1.0]))
    assert scores.value.tolist() == [0.0, 0.0, 1.0]
    assert scores.parts["unjudged"].tolist() == [1.0, 1.0, 0.0]
    assert scores.parts["ties"].tolist() == [0.0, 0.0, 0.0]
    assert scores.info[0] == {"unjudged": [{"against": 1, "error": "ValueError: cannot be read"}]}
    assert scores.info[1] == {"unjudged": [{"against": 0, "error": "ValueError: cannot be read"}]}
    assert scores.info[2] == {}


@pytest.mark.parametrize("nothing", [nan, None])
def test_one_of_two_orders_without_an_answer_is_no_verdict(nothing):
    judge = Judge(lambda a, b: nothing if (a, b) == (0.5, 0.25) else float(a > b))
    scores = Pairs(judge).score(group([0.25, 0.5, 1.0]))
    assert scores.value.tolist() == [0.0, 0.0, 1.0]
    assert scores.info[0]["unjudged"] == [{"against": 1, "error": "the judge returned NaN, None or an infinity"}]


def test_one_of_two_orders_that_fails_is_no_verdict():
    def chance(a, b):
        if (a, b) == (0.5, 0.25):
            raise ValueError("cannot be read")
        return float(a > b)

    scores = Pairs(Judge(chance)).score(group([0.25, 0.5, 1.0]))
    assert scores.value.tolist() == [0.0, 0.0, 1.0]
    assert scores.info[0]["unjudged"] == [{"against": 1, "error": "ValueError: cannot be read"}]


def test_a_sample_without_a_judged_pair_has_no_verdict():
    scores = Pairs(Judge(lambda a, b: nan if 0.25 in (a, b) else float(a > b))).score(group([0.5, 0.25, 1.0]))
    equal(scores.value, [0.0, nan, 1.0])
    assert scores.info[1]["error"].startswith("none of its 2 pairs has a verdict; the first: the judge returned NaN")
    assert "error" not in scores.info[0]


def test_a_sample_that_a_judge_cannot_score_leaves_the_others_their_verdicts():
    def fragile(samples):
        if any(level(sample) == 0.25 for sample in samples):
            raise ValueError("no face")
        return [level(sample) for sample in samples]

    with pytest.warns(UserWarning, match=r"'pairs \(judge fragile\)' failed on sample 1 .* No verdict there"):
        result = RewardHub({"use": "pairs", "judge": fragile})(group([0.5, 0.25, 1.0]))
    equal(result.total, [0.0, nan, 1.0])
    assert result.info[0]["pairs"]["unjudged"] == [{"against": 1, "error": "no score: ValueError: no face"}]
    assert "ValueError: no face" in result.info[1]["pairs"]["error"]


def broken_pair_judge(error):
    def chance(a, b):
        raise error

    return Judge(chance)


def broken_score_judge(error):
    def judge(samples):
        raise error

    return judge


@pytest.mark.filterwarnings("ignore:.*No verdict there.*")
@pytest.mark.parametrize("make", [broken_pair_judge, broken_score_judge])
def test_a_judge_that_always_fails_is_an_error_of_the_reward(make):
    judge = make(ValueError("server is down"))
    with pytest.raises(RewardError, match="server is down"):
        RewardHub({"use": "pairs", "judge": judge}).warmup()
    with pytest.raises(RewardError, match="server is down"):
        RewardHub({"use": "pairs", "judge": judge, "on_error": "raise"})(group([0.1, 0.2]))
    result = RewardHub({"use": "pairs", "judge": judge})(group([0.1, 0.2]))
    assert result.total.isnan().all()
    assert all("server is down" in entry["pairs"]["error"] for entry in result.info)


TOLD = {"media": ["image"], "scope": "sample", "needs": [], "range": [0, 1], "deterministic": False}


def served(then):
    """A server of one reward, `there`; `then` is what becomes of questions."""

    def fault(exchange):
        info = {"version": 1, "rewards": {"there": TOLD}, "limits": {"max_samples": 256}}
        (reply(info) if exchange.request.method == "GET" else then)(exchange)

    return FaultServer(fault)


def asking(server, on_error="nan", deadline=0.5, **more):
    options = {"url": f"{server.url}/there", "deadline": deadline, "retries": 0, **more}
    return RewardHub({"use": "pairs", "judge": "remote", "judge_options": options, "on_error": on_error})


@pytest.mark.filterwarnings("ignore:.*No verdict there.*")
def test_a_server_that_hangs_costs_one_deadline_however_many_groups_there_are():
    samples = [sample for number in range(4) for sample in group([0.1, 0.2, 0.3], number)]
    with served(hang()) as server, asking(server) as hub:
        watch = Stopwatch()
        result = hub(samples)
        assert watch.stop() < 0.5 + 1.0  # four deadlines would be 2 s
        assert sum(request.method == "POST" for request in server.requests) == 1
    assert result.total.isnan().all()
    assert all(entry["pairs"]["failed"] is True for entry in result.info)
    assert all("none of its 2 pairs has a verdict" in entry["pairs"]["error"] for entry in result.info)
    with served(hang()) as server, asking(server, "raise") as hub, pytest.raises(RewardError, match="no score: "):
        hub(samples)


@pytest.mark.filterwarnings("ignore:.*No verdict there.*")
def test_who_has_a_verdict_from_the_others_has_not_failed():
    """Requests of two samples: the first is answered, the one of the third sample and the lonely fourth hangs."""
    right = answer(lambda request: {"value": [0.25, 0.75]})
    waits = iter([right, hang()])
    samples = group([0.1, 0.2, 0.3]) + group([0.4], 1)
    with served(lambda exchange: next(waits)(exchange)) as server:
        with asking(server, request_size=2, max_concurrency=1) as hub:
            result = hub(samples)
    equal(result.total, [0.0, 1.0, nan, nan])
    assert ["failed" in entry["pairs"] for entry in result.info] == [False, False, True, False]
    assert "error" not in result.info[0]["pairs"] and len(result.info[0]["pairs"]["unjudged"]) == 1


def test_a_judge_that_has_no_verdict_on_made_up_pictures_passes_the_warm_up():
    RewardHub({"use": "pairs", "judge": Judge(lambda a, b: nan)}).warmup()
    RewardHub({"use": "pairs", "judge": "shapes"}).warmup()


@pytest.mark.parametrize("make", [broken_pair_judge, broken_score_judge])
@pytest.mark.parametrize("bug", [TypeError("a bug"), NameError("a bug"), RewardContractError("a bug")])
def test_a_bug_in_the_judge_stops_the_run_whatever_the_policy_is(make, bug):
    with pytest.raises(RewardError, match="a bug"):
        RewardHub({"use": "pairs", "judge": make(bug)})(group([0.1, 0.2]) + group([0.1, 0.2], 1))


@pytest.mark.parametrize("error", [RuntimeError("too many"), torch.OutOfMemoryError("too many")])
def test_a_batch_that_fails_is_asked_pair_by_pair(error):
    class Fragile(Judge):
        def prefers_batch(self, pairs):
            raise error

    with pytest.warns(UserWarning, match=r"judge 'Fragile' fails on 6 pairs at once \(\w+Error: too many\)"):
        equal(Pairs(Fragile()).score(group([0.1, 0.3, 0.2])).value, [0.0, 1.0, 0.5])


def test_out_of_memory_is_tried_again_with_fewer_groups():
    class Small(Judge):
        def prefers(self, first, second):
            answer = super().prefers(first, second)
            if len(self.shown) == 3:
                raise torch.OutOfMemoryError("once")
            return answer

    judge = Small()
    with pytest.warns(UserWarning, match="ran out of memory with 4 samples; batch_size is now 2"):
        result = RewardHub({"use": "pairs", "judge": judge})(group([0.1, 0.2]) + group([0.4, 0.3], 1))
    assert result.total.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert len(judge.shown) == 3 + 2 + 2


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (1.5, "judge 'Judge': prefers returned 1.5; expected the probability .* sigmoid"),
        (-0.1, "prefers returned -0.1; expected the probability"),
        (True, "'Judge.prefers' returned bool True"),
        ("first", "'Judge.prefers' returned str 'first'"),
    ],
)
def test_an_answer_that_is_no_probability_is_a_bug(answer, message):
    with pytest.raises(RewardContractError, match=message):
        Pairs(Judge(lambda a, b: answer)).score(group([0.1, 0.2]))


def test_a_batch_of_the_wrong_length_is_a_bug():
    judge = Judge()
    judge.prefers_batch = lambda pairs: [0.5]
    with pytest.raises(
        RewardContractError, match=r"prefers_batch returned 1 answers for 6 pairs\. Mend: return one for"
    ):
        Pairs(judge).score(group([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin is -0.1; expected a number of at least 0 and finite"),
        ({"margin": nan}, "margin is nan"),
        ({"margin": True}, "margin is True"),
        ({"margin": 0.5, "judge": Judge()}, "margin is 0.5; expected .* below 0.5: a probability is at most"),
        ({"schedule": "ring:0"}, "schedule is 'ring:0'; expected all, ring:k"),
        ({"schedule": "often"}, "schedule is 'often'"),
        ({"schedule": "swiss:2"}, "scores each sample once"),
        ({"value": "elo"}, "value is 'elo'; expected win_rate or bradley_terry"),
        ({"both_orders": 1}, "both_orders is 1; expected true or false"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"judge_options": "strict"}, "judge_options is 'strict'; expected a section"),
        ({"judge": "shaps"}, r"pairs: judge 'shaps' .*no reward 'shaps' \(did you mean 'shapes'"),
        ({"judge": "shapes", "judge_options": {"levle": "default"}}, "no option 'levle' .did you mean 'level'"),
        ({"judge": "pairs"}, "judge 'pairs' .* it compares whole groups itself"),
        ({"judge": 3}, r"judge 'int' \(a reward, or what has prefers\(first, second\)\): 3 is a int"),
        ({"judge": Judge, "judge_options": {"chanse": 1}}, "no option 'chanse' .did you mean 'chance'"),
        ({"judge": Judge(), "judge_options": {"chance": 1}}, "an object already; .* the options chance"),
    ],
)
def test_impossible_options_are_refused_at_once(options, message):
    with pytest.raises(RewardError, match=message):
        Pairs(**options)


def test_a_judge_lacking_an_option_is_refused():
    class Needy(Judge):
        def __init__(self, url):
            super().__init__()

    with pytest.raises(
        RewardError, match="judge 'Needy' .*missing a required argument: 'url'; give it in judge_options"
    ):
        Pairs(Needy)


# ------------------------------------------------------------------------------------------------ in the hub


def test_a_judge_can_be_named_like_any_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("judges")
    module.Judge = Judge
    monkeypatch.setitem(sys.modules, "judges", module)
    (tmp_path / "mine.py").write_text(
        "class Brighter:\n    def __init__(self, sign=1):\n        self.sign = sign\n"
        "    def prefers(self, first, second):\n"
        "        return float(self.sign * first.media.mean() > self.sign * second.media.mean())\n"
        "def level(samples, sign=1):\n    return [sign * sample.media.mean().item() for sample in samples]\n"
    )
    entries = [
        {"use": "pairs", "judge": "pixel.brightness"},
        {"use": "pairs", "judge": "judges:Judge", "name": "module"},
        {"use": "pairs", "judge": "./mine.py:Brighter", "judge_options": {"sign": -1}, "name": "darker"},
        {"use": "pairs", "judge": "./mine.py:level", "judge_options": {"sign": -1}, "name": "level"},
    ]
    with RewardHub(entries) as hub:
        scores = hub(group([0.3, 0.9, 0.6])).scores
    assert scores["pairs"].tolist() == scores["module"].tolist() == [0.0, 1.0, 0.5]
    assert scores["darker"].tolist() == scores["level"].tolist() == [1.0, 0.0, 0.5]


def test_the_hub_keeps_groups_whole_and_in_order_whatever_the_batch_size():
    levels, groups = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7], [0, 1, 0, 1, 0, 1]
    samples = [grey(a, group=g) for a, g in zip(levels, groups, strict=True)]
    for size in (None, 1, 4):
        result = RewardHub({"use": "pairs", "judge": "pixel.brightness", "batch_size": size})(samples)
        equal(result.total, [0.0, 1.0, 0.5, 0.5, 1.0, 0.0])
        equal(result.parts["pairs"]["wins"], [0.0, 2.0, 1.0, 1.0, 2.0, 0.0])


def test_the_judge_says_where_it_runs_what_it_judges_and_what_it_needs():
    class Film(Judge):
        media, needs, device = frozenset({"video"}), ("text",), "cpu"
        placed = None

        def load(self, device, dtype):
            self.placed = (device, dtype)

        def unload(self):
            self.placed = None

    judge = Film()
    reward = build("pairs", {"judge": judge})
    assert (reward.media, reward.needs, reward.device, reward.scope) == ({"video"}, ("text",), "cpu", "group")
    assert isinstance(judge, PairJudge)
    with RewardHub({"use": reward, "dtype": "bfloat16"}) as hub:
        films = [noise(seed, 8, frames=2, meta={"text": "a"}) for seed in range(2)]
        assert sorted(hub(films).total.tolist()) == [0.0, 1.0]
        assert judge.placed == (torch.device("cpu"), torch.bfloat16)
        with pytest.warns(UserWarning, match="meta has no 'text'"):
            assert hub([*films, noise(2, 8, frames=2)]).total.isnan().all()
    assert judge.placed is None


def test_a_judge_of_single_samples_is_loaded_and_let_go():
    class Loaded(Scorer):
        places = ()

        def load(self, device, dtype):
            self.places += (str(device),)

        def unload(self):
            self.places += ("gone",)

    judge = Loaded()
    with RewardHub({"use": "pairs", "judge": judge}) as hub:
        hub(group([0.1, 0.2]))
        hub(group([0.1, 0.2]))
    assert judge.places == ("cpu", "gone")


def test_a_video_is_judged_frame_by_frame_where_the_judge_knows_images():
    def film(*levels):
        return Sample(media=torch.stack([grey(a).media for a in levels]))

    films = [film(0.2, 0.9, 0.9), film(0.5, 0.6, 0.95)]  # one frame won of three, two won
    result = RewardHub({"use": "pairs", "judge": "pixel.brightness", "margin": 0.0, "frames": 3})(films)
    equal(result.total, [1 / 3, 2 / 3])


def test_scores_next_to_each_other_become_ties_instead_of_full_advantages():
    samples = group([0.500, 0.501, 0.502, 0.503])
    assert RewardHub({"use": "pairs", "judge": "pixel.brightness"})(samples).total.tolist() == [0.5] * 4


def test_by_default_the_checker_of_the_built_in_world_judges():
    scenes = draw([parse(words) for words in ("a red circle", "a red square", "two squares")], seed=0)
    samples = [Sample(media=picture, prompt="a red circle") for picture in render(scenes)]
    result = RewardHub("pairs")(samples)
    assert result.total.tolist() == [1.0, 0.5, 0.0]
    assert result.parts["pairs"]["score"].tolist() == RewardHub("shapes")(samples).total.tolist()


def test_a_function_as_judge_may_declare_what_it_needs():
    @declare(needs=("text",))
    def lengths(samples):
        return [len(sample.meta["text"]) for sample in samples]

    samples = [noise(seed, meta={"text": "a" * seed}, group=1) for seed in (3, 1, 2)]
    assert RewardHub({"use": "pairs", "judge": lengths})(samples).total.tolist() == [1.0, 0.0, 0.5]
