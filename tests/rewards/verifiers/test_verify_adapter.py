"""Verifiers as one reward: names, signatures, routing, weights, gates, and what happens when one fails."""

import math
import warnings

import pytest
import torch

import rewards
from rewards import RewardContractError, RewardError
from rewards.resolve import offered
from rewards.verifiers import Answer, NoVerdict, Verdict, Verifiers, available, build, resolve, verifier
from rewards.verifiers.math import Math
from rewards.verifiers.yes_no import yes_no


def answers(*responses, **meta):
    return [Answer(response, meta=meta) for response in responses]


def has(response, answer, worth=1.0):
    return worth * float(answer in response)


# ------------------------------------------------------------------------------------------------ names


def test_they_are_no_rewards_of_media():
    assert not [name for name in rewards.available() if "verif" in name]
    with pytest.raises(RewardError, match="no reward 'verifiers.math'"):
        rewards.build("verifiers.math")
    import rewards.verifiers.numeric as module

    assert offered(module) == {}


def test_every_name_resolves():
    names = available()
    assert {"verifiers.math", "verifiers.yes_no", "verifiers.boxes.grounding", "verifiers.judge"} <= set(names)
    assert len(names) == len(set(names)) >= 27
    assert all(callable(resolve(name)) for name in names)
    assert resolve("verifiers.math") is Math and resolve("rewards.verifiers.yes_no:yes_no") is yes_no


def test_every_verifier_declares_its_range_and_says_what_it_is():
    for name in available():
        assert resolve(name).__doc__ and resolve(name).range[0] < resolve(name).range[1], name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("verifiers.maths", r"did you mean 'verifiers.math'.*There are: .*verifiers.boxes.grounding"),
        ("math", "did you mean 'verifiers.math'"),
        ("verifiers.boxes", "did you mean 'verifiers.boxes"),
        ("verifiers.extract", "no verifier 'verifiers.extract'"),
        ("./nowhere.py:f", "does not exist"),
    ],
)
def test_a_wrong_name_says_what_there_is(name, message):
    with pytest.raises(RewardError, match=message):
        build(name)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def shouts(response, word='!'):\n    return float(word in response)\n")
    result = Verifiers([{"use": f"{path}:shouts", "word": "?"}])(answers("a!", "a?"))
    assert result.scores["shouts"].tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------ signatures


def test_parameters_say_what_they_are():
    seen = {}

    @verifier(range=None, wants=("options",))
    def mine(response, gold, prompt, tokens, truncated, meta, options=None, factor=2.0, progress=None, **rest):
        seen.update(locals())
        return factor

    meta = {"gold": 3, "options": ["x"], "other": 1}
    answer = Answer("r", prompt="p", meta=meta, tokens=7, truncated=True)
    Verifiers([{"use": mine, "factor": 5.0}])([answer], progress=0.5)
    assert seen == {
        "response": "r", "gold": 3, "prompt": "p", "tokens": 7, "truncated": True, "meta": meta, "options": ["x"],
        "factor": 5.0, "progress": 0.5, "rest": {"other": 1}, "seen": seen,
    }  # fmt: skip
    assert build(mine).needs == ("gold",)


def test_an_option_of_the_config_beats_the_metadata():
    entry = {"use": "verifiers.multiple_choice", "options": ["x", "y"]}
    assert Verifiers([entry])(answers("y", answer="B", options=["y", "x"])).total.item() == 1


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        (lambda answer: 1.0, {}, "expected\n?.*response, answer"),
        (has, {"wort": 2.0}, "no option 'wort' .did you mean 'worth'"),
        (has, {"response": "x"}, "no option 'response'"),
        (Math(symbolic=False), {"strict": True}, "is an object already"),
        (3, {}, "is a int; a verifier is a function"),
    ],
)
def test_what_is_no_verifier(use, options, message):
    with pytest.raises(RewardError, match=message):
        build(use, options)


def test_a_mark_must_fit_the_signature():
    with pytest.raises(RewardContractError, match="wants optoins"):
        verifier(wants=("optoins",))(has)
    with pytest.raises(RewardContractError, match="expected a tuple"):
        verifier(wants="options")


def test_an_answer_is_text():
    with pytest.raises(RewardContractError, match="Answer.response is a list"):
        Answer([1, 2])
    with pytest.raises(RewardContractError, match="Answer.tokens"):
        Answer("x", tokens=1.5)
    with pytest.raises(RewardContractError, match="item 0 is a str"):
        Verifiers([has])(["x"])


# ------------------------------------------------------------------------------------------------ verdicts


def test_none_and_exceptions_are_no_verdict():
    def moody(response):
        if response == "raise":
            raise KeyError("x")
        if response == "unsure":
            raise NoVerdict("who knows")
        return None if response == "none" else math.nan if response == "nan" else 1.0

    grade = Verifiers([moody], max_nan_frac=None)
    with pytest.warns(UserWarning, match=r"'moody' fails on 1 of 5 answers, first with KeyError: 'x' \(test_verify"):
        result = grade(answers("fine", "raise", "unsure", "none", "nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        grade(answers("raise"))
    assert result.total[0] == 1 and result.total[1:].isnan().all()
    told = [info["moody"].get("error") for info in result.info]
    assert told[1].startswith("KeyError: 'x' (test_verify_adapter.py:")
    assert told[:1] + told[2:] == [None, "who knows", *["the reward returned NaN, None or an infinity"] * 2]
    assert result.nan_frac == {"moody": pytest.approx(0.8)}
    with pytest.raises(RewardError, match="fails on 1 of 2 answers, first with KeyError"):
        Verifiers([{"use": moody, "on_error": "raise"}])(answers("fine", "raise"))


def test_a_score_outside_of_the_declared_range_is_told_once():
    @verifier(range=(0, 1))
    def wide(response):
        return 7.0 if response == "far" else 1.0

    grade = Verifiers([wide])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grade(answers("near"))
    with pytest.warns(UserWarning, match="'wide' gives 7, but declares a range of 0 to 1"):
        assert grade(answers("near", "far")).total.tolist() == [1, 7]


def test_options_are_of_the_kind_that_is_annotated():
    lax = build("verifiers.numeric.within", {"tolerance": "1e-3"})  # what YAML makes of 1e-3
    assert lax.score([Answer("1.0005", meta={"answer": 1}), Answer("1.01", meta={"answer": 1})]).value.tolist() == [
        1,
        0,
    ]
    for name, options, told in (
        ("numeric.within", {"tolerance": "lots"}, "tolerance is 'lots': Input should be a valid number"),
        ("numeric.within", {"strict": "maybe"}, "strict is 'maybe': Input should be a valid boolean"),
        ("boxes.grounding", {"mode": "hitt"}, "mode is 'hitt': Input should be 'iou', 'hit' or 'above'"),
    ):
        with pytest.raises(RewardError, match=told):
            build(f"verifiers.{name}", options)


def test_what_questions_lack_is_known_before_they_are_answered():
    grade = Verifiers([{"use": has, "when": {"source": "a"}}])

    def of(*metas):
        return grade.gaps([Answer("", prompt=f"question {n}", meta=meta) for n, meta in enumerate(metas)])

    assert of({"source": "a", "answer": "x"}, {"source": "a"}) == []
    (told,) = of({"source": "a", "anwser": "x"})
    assert told == "no question has 'answer' (did you mean 'anwser'?), which is read by 'has'"
    (told,) = of({"source": "a", "answer": "x"}, {"source": "b", "answer": "x"})
    assert "no weighted verifier is for number 1, 'question 1', whose metadata have {'source': 'b'}" in told
    told = of({"sorce": "a", "answer": "x"})
    assert "no question has 'source' (did you mean 'sorce'?)" in told[0] and len(told) == 2


def test_missing_metadata_is_no_verdict():
    result = Verifiers([has])([*answers("yes", answer="yes"), *answers("yes")])
    assert result.total[0] == 1 and result.total[1].isnan()
    assert result.info[1]["has"]["error"] == "the metadata have no answer"


@pytest.mark.parametrize(
    ("returned", "message"), [(True, "use float"), ("1", "use float"), ([1.0], "list"), (Verdict(True), "use float")]
)
def test_a_wrong_return_is_a_bug(returned, message):
    with pytest.raises(RewardContractError, match=message):
        Verifiers([lambda response: returned])(answers("x"))


def test_bugs_raise():
    def broken(response):
        return nothing  # noqa: F821

    with pytest.raises(NameError):
        Verifiers([broken])(answers("x"))


def test_parts_and_info():
    def both(response):
        return Verdict(0.5, {"length": len(response)}, {"read": response})

    result = Verifiers([both])(answers("a", "abc"))
    assert result.parts["both"]["length"].tolist() == [1, 3]
    assert [info["both"]["read"] for info in result.info] == ["a", "abc"]


class Batch:
    """All at once, and it stumbles over one."""

    range = (0.0, 2.0)
    needs = ("answer",)

    def __init__(self, stumbles="bad"):
        self.stumbles, self.calls, self.closed = stumbles, [], False

    def score(self, answers):
        self.calls.append(len(answers))
        if any(answer.response == self.stumbles for answer in answers):
            raise ValueError("stumbled")
        return [2.0] * len(answers)

    def unload(self):
        self.closed = True


def test_a_class_is_asked_at_once_and_one_by_one_when_it_fails():
    batch = Batch()
    with Verifiers([{"use": batch, "norm": "unit", "name": "batch"}]) as judge:
        assert judge(answers("a", "b", answer=1)).total.tolist() == [1, 1]
        result = judge(answers("a", "bad", answer=1))
    assert result.total[0] == 1 and "stumbled" in result.info[1]["batch"]["error"]
    assert batch.calls == [2, 2, 1, 1] and batch.closed
    assert Verifiers([{"use": Batch, "stumbles": "a"}])(answers("b", answer=1)).total.item() == 2


def test_a_run_without_verdicts_stops():
    judge = Verifiers([{"use": "verifiers.yes_no"}])
    with pytest.raises(RewardError, match="no verdict on 100%.*neither yes nor no"):
        for _ in range(3):
            judge(answers("yes", answer="maybe"))


# ------------------------------------------------------------------------------------------------ routing


def sourced(source, response="yes", group=0, **meta):
    return Answer(response, group=group, meta={"source": source, "answer": "yes", **meta})


def test_routing_by_source():
    judge = Verifiers(
        [
            {"use": has, "name": "math", "when": {"source": ["algebra", "geometry"]}},
            {"use": has, "name": "boxes", "when": {"source": "coco"}, "worth": 3.0},
            {"use": len_, "weight": 0.1},
        ]
    )
    result = judge([sourced("algebra"), sourced("coco"), sourced("geometry", "no")])
    assert result.total.tolist() == pytest.approx([1.3, 3.3, 0.2])
    assert result.scores["math"].isnan().tolist() == [False, True, False]
    assert result.asked["boxes"].tolist() == [False, True, False]
    assert "boxes" not in result.info[0] and result.nan_frac == {"math": 0, "boxes": 0, "len_": 0}


def len_(response):
    return float(len(response))


def test_a_failed_verifier_only_costs_those_it_is_for():
    def fails(response):
        raise ValueError("no")

    judge = Verifiers([{"use": fails, "when": {"source": "a"}}, has], max_nan_frac=None)
    assert judge([sourced("a"), sourced("b")]).total.isnan().tolist() == [True, False]
    lenient = Verifiers([{"use": fails, "when": {"source": "a"}}, has], max_nan_frac=None, renormalise=True)
    assert lenient([sourced("a"), sourced("b")]).total.tolist() == [2, 1]  # has stands in for both weights


def test_a_source_nobody_judges_is_a_mistake():
    judge = Verifiers([{"use": has, "when": {"source": "a"}}, {"use": len_, "weight": 0}])
    with pytest.raises(RewardContractError, match=r"no weighted verifier is for number 1.*\{'source': 'b'\}"):
        judge([sourced("a"), sourced("b")])


def test_when_means_all_of_it():
    judge = Verifiers([{"use": len_, "when": {"source": "a", "hard": True}}, {"use": has}])
    assert judge([sourced("a", hard=True), sourced("a")]).total.tolist() == [4, 1]


def test_ranks_stay_within_a_group():
    judge = Verifiers([{"use": len_, "norm": "rank", "when": {"source": ["a", "b"]}}])
    given = [sourced("a", "x", 0), sourced("b", "xxxx", 1), sourced("a", "xx", 0), sourced("b", "xxxxx", 1)]
    assert judge(given).total.tolist() == [0, 0, 1, 1]


def test_a_gate_and_a_condition():
    """R = R_acc + R_fmt + 1[R_acc > 0] R_tool (DeepEyes), and a gate on the whole total."""
    entries = [
        {"use": has, "name": "right"},
        {"use": len_, "name": "tool", "weight": 10, "only_where": {"right": 0.5}},
    ]
    assert Verifiers(entries)([sourced("a", "yes"), sourced("a", "no")]).total.tolist() == [31, 0]
    gated = Verifiers([{"use": len_}, {"use": has, "weight": 0, "gate": {"min": 0.5, "floor": -1}}])
    assert gated([sourced("a", "yes"), sourced("a", "no")]).total.tolist() == [3, -1]


def test_a_condition_holds_from_the_least_score_on():
    entries = [{"use": has, "name": "right"}, {"use": len_, "only_where": {"right": 1}}]
    assert Verifiers(entries)([sourced("a", "yes")]).total.item() == 4


def test_a_condition_counts_as_nothing_whatever_the_norm():
    entries = [
        {"use": has, "name": "right"},
        {"use": len_, "norm": {"affine": [5, 2]}, "only_where": {"right": 1}},
    ]
    assert Verifiers(entries)([sourced("a", "no")]).total.item() == 0


def test_a_condition_without_verdict_is_no_verdict():
    entries = [
        {"use": has, "name": "right", "weight": 0, "when": {"source": ["a", "c"]}},
        {"use": len_, "only_where": {"right": 0.5}},
    ]
    result = Verifiers(entries)([sourced("a"), sourced("b"), Answer("x", meta={"source": "c"})])
    assert result.total[:2].tolist() == [3, 0]  # where the condition is not asked, it is not met
    assert result.total[2].isnan()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no verifier is given; there are: verifiers"),
        ([{"weight": 1}], "needs `use: name`"),
        ([has, has], "two verifiers are called 'has'"),
        ([{"use": has, "weight": 0}], "every verifier has weight 0"),
        ([{"use": has, "when": "a"}], "expected {source: "),
        ([{"use": has, "only_where": {"rigth": 1}}], "only_where names 'rigth'"),
        ([{"use": has}, {"use": len_, "only_where": {"has": "x"}}], "expected {name of another entry"),
        ([{"use": has}, {"use": len_, "norm": "rank", "only_where": {"has": 1}}], "norm: rank would misread"),
        ([{"use": has, "on_error": "zero"}], "There is no 0"),
        ([{"use": has, "norm": "unit"}], "declares no range"),
        ([{"use": "verifiers.yes_no", "whn": {}}], "no option 'whn'"),
    ],
)
def test_wrong_entries_say_so(entries, message):
    with pytest.raises(RewardError, match=message):
        Verifiers(entries)


def test_names_with_weights():
    judge = Verifiers({"verifiers.yes_no": 2.0, "verifiers.format.tags": 0.0})
    result = judge([sourced("a")])
    assert result.total.item() == 2 and list(result.scores) == ["verifiers.yes_no", "verifiers.format.tags"]
    assert judge.rules["verifiers.yes_no"].weight == 2
    assert len(judge([]).total) == 0


def test_combine_alone_gives_the_same_total():
    judge = Verifiers([{"use": has, "when": {"source": "a"}}, {"use": len_, "norm": "rank"}])
    result = judge([sourced("a", "yes", 0), sourced("b", "no", 1), sourced("a", "n", 0), sourced("b", "yes", 1)])
    again = judge.combine(result.scores, result.asked, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(result.total, again)
