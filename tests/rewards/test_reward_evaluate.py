"""Evaluation: what is known in advance about scores, judges and data must come out."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flowrl.shapes.preferences import write_preferences
from rewards import RewardError, Scores, declare
from rewards.evaluate import evaluate
from rewards.preferences import read_preferences
from rewards.types import RewardContractError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Preferences of the built-in world."""
    folder = tmp_path_factory.mktemp("world") / "set"
    write_preferences(folder, 96, seed=0)
    return read_preferences(folder)


def grey(folder, name, level):
    """A picture whose red channel is its score."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level, 0, 0)).save(folder / name)
    return name


def native(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(folder / "data.jsonl")


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """60 prompts of two pairs each; the better one is brighter in 3 of 4 pairs, every fifth pair is a tie."""
    folder, rows = tmp_path_factory.mktemp("levels"), []
    for number in range(120):
        low = grey(folder, f"{number}_0.png", 100)
        high = grey(folder, f"{number}_1.png", 101 + number % 7 if number % 5 == 0 else 150 + number % 40)
        label = 0 if number % 5 == 0 else 1 if number % 4 else -1
        row = {"prompt": f"p{number // 2}", "a": high, "b": low, "label": label, "category": str(number % 3)}
        rows.append(row if number % 2 else row | {"a": low, "b": high, "label": -label})
    return native(folder, rows)


@declare(deterministic=True)
def red(samples):
    return [round(sample.media[0].mean().item() * 255) for sample in samples]


def backwards(samples):
    return [-score for score in red(samples)]


def flat(samples):
    return [7.0] * len(samples)


def one(entry, data, **options):
    return evaluate([entry], data, device="cpu", **options).results[0]


# ------------------------------------------------------------------------------------------------ accuracies


def test_accuracy_of_a_known_reward(levels):
    result = one(red, levels)
    untied = [n for n in range(120) if n % 5]
    assert result.accuracy.value == pytest.approx(sum(n % 4 != 0 for n in untied) / len(untied))
    assert (result.accuracy.count, result.accuracy.prompts, result.pairs) == (96, 60, 120)
    assert result.accuracy.low < result.accuracy.value < result.accuracy.high
    assert result.score_ties == 0 and result.nan_frac == 0
    assert set(result.slices) == {"category=0", "category=1", "category=2"}
    shares = [each.value * each.count for each in result.slices.values()]
    assert sum(shares) == pytest.approx(result.accuracy.value * 96)


def test_reversed_scores_give_one_minus_the_accuracy(levels):
    right, wrong = evaluate([red, backwards], levels, device="cpu").results
    assert wrong.accuracy.value == pytest.approx(1 - right.accuracy.value, abs=1e-12)
    for key, each in right.slices.items():
        assert wrong.slices[key].value == pytest.approx(1 - each.value, abs=1e-12)
    assert right.temperature > 0 and wrong.temperature == math.inf
    assert wrong.brier <= 0.25 and wrong.nll == pytest.approx(math.log(2)), "a coin, and no worse"


def test_equal_scores_are_a_coin(levels):
    result = one(flat, levels)
    assert result.accuracy.value == 0.5 and result.score_ties == 1
    assert (result.accuracy.low, result.accuracy.high) == (0.5, 0.5)
    assert result.temperature == math.inf and result.nll == pytest.approx(math.log(2))
    assert result.ties_exact_max == pytest.approx(24 / 120), "all are called ties"


def test_ties_are_found_by_a_threshold_fitted_on_other_prompts(levels):
    """Ties differ by at most 7, the others by at least 50: a threshold between finds all of them."""
    result = one(red, levels, dev=0.3)
    assert 7 <= result.ties_exact_threshold < 50 and 7 <= result.ties_half_threshold < 50
    test_pairs = result.ties_exact.count
    assert 0 < test_pairs < 120 and result.ties_half.count == test_pairs
    right = 24 + sum(n % 4 != 0 for n in range(120) if n % 5)
    assert result.ties_exact_max == pytest.approx(right / 120)
    assert result.ties_half.value == result.ties_exact.value, "no one-sided tie is left"


def test_nothing_is_fitted_without_other_prompts(levels):
    result = one(red, levels, dev=0.0)
    assert math.isnan(result.ties_exact.value) and math.isnan(result.brier) and result.accuracy.count == 96


def test_the_built_in_world_knows_which_rewards_to_trust(world):
    entries = ["shapes", "shapes_clip", "pixel.jpeg_size"]
    shapes, clip, size = evaluate(entries, world, device="cpu").results
    assert shapes.accuracy.value > 0.95 and shapes.nan_frac == pytest.approx(1 / 8), "signs are not of its grammar"
    assert "not a sentence" in shapes.errors[0]
    assert clip.accuracy.value > 0.8 and clip.nan_frac == 0
    assert 0.3 < size.accuracy.value < 0.75
    assert size.slices["category=noise"].value == 0, "noise makes large files"
    assert size.slices["category=missing"].value > 0.9, "an object more does too"
    assert shapes.slices["category=tie"].count == 0 == shapes.slices["category=text"].count


def test_ocr_reads_signs_and_nothing_else(world):
    pytest.importorskip("rapidocr")
    signs = [pair for pair in world.pairs if pair.category == "text"][:6]
    others = [pair for pair in world.pairs if pair.category != "text"][:6]
    result = one({"use": "ocr", "threads": 1}, replace(world, pairs=(*signs, *others)))
    assert result.slices["category=text"].value == 1 and result.pairs == 6 and result.nan_frac == 0.5


def test_pairs_of_one_prompt_are_no_further_evidence(levels):
    """Four times the same pairs of each prompt: an interval by prompt stays what it was, one by pair would halve."""
    once, often = one(red, levels), one(red, replace(levels, pairs=levels.pairs * 4))
    assert often.accuracy.count == 4 * once.accuracy.count
    assert (often.accuracy.low, often.accuracy.high) == pytest.approx((once.accuracy.low, once.accuracy.high))
    assert once.accuracy.high - once.accuracy.low > 0.1


def test_a_seed_repeats_everything_but_the_time(levels):
    def figures(seed):
        row = evaluate([red], levels, device="cpu", seed=seed).table()[0]
        return {key: value for key, value in row.items() if key not in ("seconds", "load_seconds", "memory_gb")}

    assert figures(1) == figures(1) != figures(2)


# ------------------------------------------------------------------------------------------------ scoring


def test_an_item_is_scored_once_however_many_pairs_it_is_in(tmp_path):
    for number in range(4):
        grey(tmp_path, f"{number}.png", 50 * number)
    rows = [
        {"prompt": "p", "a": f"{i}.png", "b": f"{j}.png", "label": 1 if i > j else -1}
        for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    seen, sizes = [], []

    def counting(samples):
        seen.extend(red(samples))
        sizes.append(len(samples))
        return red(samples)

    told = []
    result = one(counting, native(tmp_path, rows), batch_size=3, progress=lambda *step: told.append(step))
    assert sorted(seen) == [0, 50, 100, 150] and sizes == [3, 1] and result.accuracy.value == 1
    assert told == [("counting", 3, 4), ("counting", 4, 4)]
    assert result.seconds > 0


class Reluctant:
    """No verdict on dark pictures; an exception on the very dark ones."""

    def __init__(self, limit=100):
        self.limit = limit
        self.loaded = False

    def load(self, device, dtype):
        self.loaded = True

    def unload(self):
        self.loaded = False

    def score(self, samples):
        assert self.loaded
        if any(sample.media[0].mean() * 255 < self.limit / 2 for sample in samples):
            raise ValueError("too dark to see")
        return [math.nan if score < self.limit else score for score in red(samples)]


def test_pairs_without_a_verdict_are_out_and_counted(tmp_path):
    for name, level in (("a", 10), ("b", 80), ("c", 150), ("d", 200)):
        grey(tmp_path, f"{name}.png", level)
    pairs = [("c", "d", -1), ("d", "c", 1), ("a", "d", 1), ("b", "c", 1)]
    rows = [{"prompt": a, "a": f"{a}.png", "b": f"{b}.png", "label": label} for a, b, label in pairs]
    reward = Reluctant()
    with pytest.warns(UserWarning, match="too dark"):
        result = one({"use": reward, "name": "eyes"}, native(tmp_path, rows))
    assert result.name == "eyes" and result.nan_frac == 0.5 and result.pairs == 2 and result.accuracy.value == 1
    assert any("too dark to see" in error for error in result.errors) and not reward.loaded
    assert [math.isnan(delta) for delta in result.deltas] == [False, False, True, True]


def test_a_picture_that_cannot_be_read_costs_its_pairs_only(tmp_path):
    grey(tmp_path, "a.png", 10), grey(tmp_path, "b.png", 20)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [{"prompt": "p", "a": a, "b": "a.png", "label": 1} for a in ("b.png", "cut.png")]
    report = evaluate([red, {"use": Darker(), "name": "judge"}], native(tmp_path, rows), device="cpu")
    for result in report.results:
        assert result.nan_frac == 0.5 and "cut.png" in result.errors[0]
    assert [result.accuracy.value for result in report.results] == [1, 0]


def test_a_bug_stops_and_says_so(levels):
    def wrong(samples):
        return [1.0]

    with pytest.raises(RewardContractError, match="returned 1 scores"):
        one(wrong, levels)


def test_dims_are_judged_by_the_parts_of_the_same_name(tmp_path):
    """VQ follows the red channel and MQ minus it, as the labels do; Overall sums up."""
    grey(tmp_path, "a.png", 10), grey(tmp_path, "b.png", 200)
    base = {"prompt": "p", "a": "a.png", "b": "b.png"}
    labels = {"Overall": -1, "VQ": -1, "MQ": 1, "TA": 1}
    data = native(tmp_path, [base | {"dim": dim, "label": label} for dim, label in labels.items()])

    def several(samples):
        value = torch.tensor(red(samples), dtype=torch.float32)
        return Scores(value=value, parts={"VQ": value, "MQ": -value})

    result = one(several, data)
    assert result.parts == {"VQ": "VQ", "MQ": "MQ"} and result.pairs == 1 and result.accuracy.value == 1
    assert {key: each.value for key, each in result.slices.items()} == {
        "dim=Overall": 1, "dim=VQ": 1, "dim=MQ": 1, "dim=TA": 0,
    }  # fmt: skip


def test_rankings_and_leaderboards(tmp_path):
    """Generators x, y, z draw ever darker; people agree with red, but for one prompt that they see the other way."""
    rows = []
    for prompt in range(4):
        items = [grey(tmp_path, f"{prompt}{model}.png", level) for model, level in (("x", 200), ("y", 100), ("z", 50))]
        rank = [3, 2, 1] if prompt == 0 else [1, 2, 3]
        rows.append({"prompt": f"p{prompt}", "items": items, "rank": rank, "models": ["x", "y", "z"]})
    result = one(red, native(tmp_path, rows))
    assert result.rank_score.value == pytest.approx(3 / 4) and result.rank_score.count == 4
    assert result.spearman.value == pytest.approx((3 - 1) / 4) == result.kendall.value
    board = result.leaderboard
    assert board.reward == {"x": 1, "y": 0.5, "z": 0} and board.people == {"x": 0.75, "y": 0.5, "z": 0.25}
    assert board.spearman == pytest.approx(1) and board.kendall == pytest.approx(1)
    assert one(flat, native(tmp_path, rows)).leaderboard.reward == {"x": 0.5, "y": 0.5, "z": 0.5}


# ------------------------------------------------------------------------------------------------ judges


class Darker:
    """Prefers the darker picture, by its red channel; a bias for the first place is added."""

    def __init__(self, bias=0.0, slope=0.02):
        self.bias, self.slope, self.asked = bias, slope, 0

    def prefers(self, first, second):
        self.asked += 1
        lead = 255 * (second.media[0].mean() - first.media[0].mean()).item()
        return min(1.0, max(0.0, 0.5 + self.bias + self.slope * lead))


def test_a_judge_is_shown_both_orders_and_asked_again(levels):
    judge = Darker()
    result = one({"use": judge}, levels)
    reward = one(backwards, levels)
    assert result.kind == "judge" and judge.asked == 120 * 2 + 100
    assert result.accuracy.value == reward.accuracy.value
    assert result.order_flips == 0 and result.repeats == 1 and math.isnan(reward.order_flips)


def test_a_judge_with_a_favourite_side_flips_and_still_counts_without_it(levels):
    """Ties lie within 7 of each other, which the bias outweighs: 24 of 120 flip."""
    result = one({"use": Darker(bias=0.4, slope=0.01)}, levels)
    assert result.order_flips == pytest.approx(24 / 120)
    biased = one({"use": Darker(bias=0.2), "name": "biased"}, levels)
    assert biased.accuracy.value == one({"use": Darker()}, levels).accuracy.value


class Moody(Darker):
    """Prefers what is shown first the first and second time that it is asked, and the other one the third time."""

    def prefers_batch(self, pairs):
        self.asked += 1
        return [float(self.asked != 3)] * len(pairs)


def test_a_judge_that_does_not_repeat_itself_is_found(levels):
    result = one({"use": Moody()}, levels, batch_size=240)
    assert result.order_flips == 1 and result.repeats == 0 and result.accuracy.value == 0.5


class Failing(Darker):
    """Fails on a whole batch, and on pairs with a certain prompt."""

    def prefers(self, first, second):
        if first.prompt == "p3":
            raise OSError("connection lost")
        return super().prefers(first, second)

    def prefers_batch(self, pairs):
        return [self.prefers(*pair) for pair in pairs]


def test_a_judge_that_fails_loses_only_those_pairs(levels):
    result = one({"use": Failing()}, levels)
    assert result.nan_frac == pytest.approx(2 / 120) and "connection lost" in result.errors[0]


def test_judges_and_rewards_that_cannot_be_evaluated(levels):
    class Sure(Darker):
        def prefers(self, first, second):
            return 3.0

    with pytest.raises(RewardContractError, match="answered 3; expected the probability"):
        one({"use": Sure()}, levels)
    with pytest.raises(RewardError, match="no option 'slop'.*did you mean 'slope'"):
        one({"use": Darker, "slop": 1}, levels)
    with pytest.raises(RewardError, match="is an object already"):
        one({"use": Darker(), "slope": 1}, levels)
    with pytest.raises(RewardError, match="compares the samples of a group.*evaluate its judge"):
        one({"use": "pairs", "judge": "pixel.contrast"}, levels)
    with pytest.raises(RewardError, match="two rewards are called 'red'"):
        evaluate([red, red], levels)
    with pytest.raises(RewardError, match="no reward is given"):
        evaluate([], levels)
    with pytest.raises(RewardError, match="dev is 1"):
        one(red, levels, dev=1)
    with pytest.raises(RewardError, match="batch_size is 0"):
        one(red, levels, batch_size=0)


def test_a_judge_of_pictures_refuses_videos(tmp_path):
    for name in ("a", "b"):
        grey(tmp_path / name, "0.png", 10)
    data = native(tmp_path, [{"prompt": "p", "a": "a", "b": "b", "label": 1}])
    with pytest.raises(RewardContractError, match="does not judge videos"):
        one({"use": Darker()}, data)
    assert one(red, data).accuracy.value == 0.5, "a reward for pictures sees their frames"


# ------------------------------------------------------------------------------------------------ reports


def test_entries_are_those_of_a_config(levels):
    entries = {"pixel.redness": 0.5, "pixel.contrast": 0}
    report = evaluate(entries, levels, device="cpu")
    assert [result.name for result in report.results] == ["pixel.redness", "pixel.contrast"]
    gated = {"use": "pixel.redness", "weight": 0, "norm": "rank", "gate": {"min": 3}, "name": "r"}
    assert one(gated, levels).accuracy.value == report.results[0].accuracy.value


def test_the_report_as_rows_json_and_markdown(levels):
    report = evaluate([red, {"use": flat, "name": "a|b"}], levels, device="cpu")
    rows = report.table()
    assert [row["reward"] for row in rows] == ["red", "a|b"]
    assert rows[0]["accuracy_low"] < rows[0]["accuracy"] < rows[0]["accuracy_high"] and rows[0]["rank_score"] is None
    data = json.loads(report.to_json())
    assert data["results"][1]["temperature"] is None and data["results"][0]["accuracy"]["count"] == 96
    assert (data["pairs"], data["tied_labels"], data["prompts"]) == (120, 24, 60) and "deltas" not in data["results"][0]
    text = report.to_markdown()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert f"| red | 120 | {rows[0]['accuracy']:.3f} [" in text and "a\\|b" in text and "order flips" not in text
    assert {line.replace("\\|", "").count("|") for line in table[:3]} == {table[0].count("|")}
    assert "| category=0 |" in text
