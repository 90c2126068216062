"""Parsers of judges' answers, on answers as models write them: good ones, and ones that must not become a score."""

import json
import math
import time
from dataclasses import fields
from pathlib import Path

import pytest

from rewards import RewardError
from rewards._answers import (
    MOST_CHARACTERS,
    PARSERS,
    Choice,
    Levels,
    Numbers,
    Pattern,
    Reply,
    ScoreLines,
    Step,
    Unreadable,
    Winner,
    answer_of,
)
from rewards._template import KEYS, modes, read_template

POINT = read_template("unifiedreward", "point_v1").parser
ASPECTS = read_template("unifiedreward", "point_v2").parser
PAIR = read_template("unifiedreward", "pair").parser
THINK = read_template("unifiedreward", "think").parser
FLEX = read_template("unifiedreward", "flex").parser
EDIT = read_template("unifiedreward", "edit").parser


def unreadable(parser, text, match=None):
    with pytest.raises(Unreadable, match=match):
        parser(Reply(text))


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4),
        ("Final Score: 1", 1),
        ("Final Score: 5", 5),
        ("The dog is missing.\n\nFinal Score: 2.75\n", 2.75),
        ("**Final Score:** 4", 4),
        ("**Final Score**: 4", 4),
        ("**Final Score: 4**", 4),
        ("### Final Score: 4", 4),
        ("- Final Score: 4", 4),
        ("final score: 4", 4),
        ("Final Score = 4", 4),
        ("  Final Score :  4  ", 4),
        ("Final Score: 4/5", 4),
        ("Final Score: 4 / 5", 4),
        ("Final Score: 4 out of 5", 4),
        ("Final Score: 4.", 4),
        ("Final Score: 4.0.", 4),
        ("Final Score (1-5): 3.2", 3.2),
        ("Final Score (1 - 5): 3.2", 3.2),
        ("Final Score (1 to 5): 3.2", 3.2),
        ("Final Score: 4\r\n", 4),
        ("Final Score: 4\n\nOverall it is good.\n\nFinal Score: 4.0", 4),
        ("<think>Perhaps\nFinal Score: 2\n</think>\nFinal Score: 4", 4),
        ("Perhaps\nFinal Score: 2\n</think>\nFinal Score: 4", 4),  # the chat template wrote <think> itself
        ("Scores go from (1-5), and {this} is `code`.\nFinal Score: 3", 3),
    ],
)
def test_a_score_is_read(text, score):
    verdict = POINT(Reply(text))
    assert verdict.parts == {"score": score}
    assert verdict.fraction == pytest.approx((score - 1) / 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot rate this image.",
        "I'm sorry, but I can't help with that.",
        "4",
        "Score: 4",
        "My Final Score: 4",
        "The Final Score: is 4",
        "Final Score:",
        "Final Score: X",
        "Final Score: (1-5)",
        "Final Score: 1-5",
        "Final Score (1-5)",
        "Final Score: <number>",
        "Final Score: four",
        "Final Score: 4 or 5",
        "Final Score: 4, maybe",
        "Final Score: 3\nFinal Score: 4",
        "Final Score: 0",
        "Final Score: 6",
        "Final Score: -3",
        "Final Score: 80",
        "Final Score: 4/10",
        "Final Score: 1e0",
        "Final Score: NaN",
        "Final Score: inf",
        "Final Score: ٤",
        "Final Score: " + "9" * 5000,
        "<think>Final Score: 4",
        "<think>Final Score: 4</think>",
        "Final Score: 4\n<think>no, wait",
    ],
)
def test_no_score_is_made_up(text):
    unreadable(POINT, text)


def test_the_reason_says_what_was_expected_and_what_is_there():
    unreadable(POINT, "hello", "expected a line 'Final Score: <number>', once: it is not there")
    unreadable(POINT, "Final Score: 3\nFinal Score: 4", "it says 3 and 4")
    many = "\n".join(f"Final Score: {number}" for number in range(3000))
    unreadable(POINT, many, "it says 0 and 1 and 2 and more$")
    unreadable(POINT, "Final Score: 9", "says 9, which is not between 1 and 5")


@pytest.mark.parametrize("parser", [POINT, PAIR, THINK, FLEX, EDIT, Pattern(pattern=r"RATING = (\d)", scale=(0, 9))])
def test_where_nothing_is_found_the_last_line_is_quoted(parser):
    unreadable(parser, "It is fine.\n\n  I would say four.  \n \n", "; the answer ends in 'I would say four.'$")
    unreadable(parser, "It is fine.\n" + "x" * 1000, "; the answer ends in 'x{76}\\.\\.\\.$")
    unreadable(parser, " \n", "; the answer is empty$")


def test_aspects_are_all_needed_and_their_mean_is_the_score():
    text = (
        'Word-wise Scores: [["a", 0.1], ["dog", 2.0]]\n\nAlignment Score (1-5): 3.5000\n'
        "Coherence Score (1-5): 4.2500\nStyle Score (1-5): 2.0000"
    )
    verdict = ASPECTS(Reply(text))
    assert verdict.parts == {"alignment": 3.5, "coherence": 4.25, "style": 2.0}
    assert verdict.fraction == pytest.approx(((3.5 + 4.25 + 2) / 3 - 1) / 4)
    unreadable(ASPECTS, text.replace("Style", "Physics"), "'Style Score: <number>'")
    unreadable(ASPECTS, text.replace("2.0000", "5.5"), "5.5, which is not between")
    video = read_template("unifiedreward", "point_v2_video").parser
    assert list(video(Reply(text.replace("Coherence", "Physics"))).parts) == ["alignment", "physics", "style"]


# ------------------------------------------------------------------------------------------------ which is better


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Image 1 is better", 1),
        ("Image 2 is better.", 0),
        ("Image 1 is better than Image 2.", 1),
        ("**Image 2 is better than Image 1.**", 0),
        ("Image 1 is sharper, image 2 has the dog.\n\nImage 2 is better.", 0),
        ("Both images are equally good.", 0.5),
        ("both are equally good", 0.5),
        ("Video 2 is better than Video 1.", 0),
        ("Image 1 is better\nImage 1 is better.", 1),
    ],
)
def test_a_choice_is_read(text, value):
    assert PAIR(Reply(text)).fraction == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Neither of them.",
        "Image 3 is better",
        "Image 1 is not better",
        "I think image 1 is better",
        "Image 1 is better or Image 2 is better",
        "Image 1 is better\nImage 2 is better",
        "Image 1 is better than Image 1.",
        "Image 12 is better",
    ],
)
def test_no_choice_is_made_up(text):
    unreadable(PAIR, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>Image 2 is better\nin colour: 7 to 8</think><answer>Image 1 is better</answer>", 1),
        ("<think>\n1. ...\n</think>\n<answer>\nImage 2 is better\n</answer>", 0),
        ("so </think><answer>Image 2 is better.</answer>", 0),
        ("<answer>**Image 2 is better**</answer> done", 0),
    ],
)
def test_thinking_is_left_out(text, value):
    assert THINK(Reply(text)).fraction == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>Image 1 is better", "never ends"),
        ("<think>hm</think>Image 1 is better", "expected one <answer>"),
        ("<think>hm <answer>Image 1 is better</answer>", "never ends"),
        ("<think>hm</think><answer>Image 1 is better", "expected one <answer>"),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", "expected one <answer>"),
        ("<answer>Image 1 is better</answer></answer>", "expected one <answer>"),
        ("<answer></answer>", "is not there"),
        ("<answer>equal</answer>", "is not there"),
        ("</answer>Image 1 is better<answer>", "expected one <answer>"),
    ],
)
def test_thinking_without_an_answer_is_none(text, reason):
    unreadable(THINK, text, reason)


def flex(winner="Image 1", *categories):
    return {"prompt": "a {dog}", "categories": [{"name": "A", "cat_winner": c} for c in categories], "winner": winner}


@pytest.mark.parametrize(
    ("answer", "winner", "share"),
    [
        (flex("Image 1", "Image 1", "Image 2", "Image 2"), 1, 1 / 3),
        (flex("Image 2", "Image 2", "Image 2", "Image 2"), 0, 0),
        (flex("image 2 ", "IMAGE 1"), 0, 1),
        (flex("tie", "Image 1", "tie"), 0.5, 0.75),
        (flex("Video 1", "Video 2", "Video 1"), 1, 0.5),
    ],
)
@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "Here it is:\n{}\nDone.", "```\n{}```", "```json\n{}",
                                  "```json \r\n\r\n{}\r\n```\r\n", "It {is} here: ```\t\n\n{}```"])  # fmt: skip
def test_winners_are_blended(answer, winner, share, form):
    verdict = FLEX(Reply(form.replace("{}", json.dumps(answer, indent=1))))
    assert verdict.parts == pytest.approx({"winner": winner, "categories": share})
    assert verdict.fraction == pytest.approx((winner + share) / 2)


def test_the_blend_is_the_users_and_is_not_a_category():
    parser = Winner(first=["image 1"], second=["image 2"], blend=0.25)
    assert parser(Reply(json.dumps(flex("Image 1", "Image 2", "Image 2")))).fraction == 0.75


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Image 1 is better", "no JSON object"),
        ("}{", "no JSON object"),
        (json.dumps(flex("Image 1")), '"categories" is \\[\\]'),
        (json.dumps({"winner": "Image 1"}), '"categories" is None'),
        (json.dumps({"categories": [{"cat_winner": "Image 1"}]}), '"winner" is None'),
        (json.dumps(flex("Image 1/2", "Image 1")), "\"winner\" is 'Image 1/2'"),
        (json.dumps(flex("Image 1", "Image 3")), '"cat_winner" is'),
        (json.dumps(flex("Image 1", None)), '"cat_winner" is None'),
        (json.dumps({"categories": ["Image 1"], "winner": "Image 1"}), '"cat_winner" is None'),
        (json.dumps(flex("Image 1", "Image 1"))[:-12], "no JSON object"),
        ("{" * 3 + "}" * 3, "no JSON object"),
        (json.dumps(flex("Image 1", "Image 1")) * 2, "no JSON object"),
        ("```json\n{}\n```\n```json\n{}\n```", "2 blocks"),
        ('{"winner": "Image 1", "winner": "Image 2", "categories": [{"cat_winner": "Image 1"}]}', "twice"),
        ("[" * 50_000 + "{" + "]" * 50_000 + "}", "no JSON object"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "no JSON object|is None"),
    ],
)
def test_no_winner_is_made_up(text, reason):
    unreadable(FLEX, text, reason)


# ------------------------------------------------------------------------------------------------ lists of numbers


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ('{"reasoning": "done {well}", "score": [20, 12.5]}', (20, 12.5)),
        ('{\n\n"reasoning" : "...",\n"score" : [25, 0],\n}', (25, 0)),  # the comma of the upstream form
        ('```json\n{"score": [1, 2]}\n```', (1, 2)),
        ('Sure.\n{"score": [0, 25.0]}', (0, 25)),
    ],
)
def test_an_edit_is_as_good_as_its_worse_half(text, pair):
    verdict = EDIT(Reply(text))
    assert verdict.parts == {"instruction": pair[0], "preservation": pair[1]}
    assert verdict.fraction == min(pair) / 25
    assert Numbers(names=["a", "b"], scale=(0, 25), combine="mean")(Reply(text)).fraction == sum(pair) / 50


@pytest.mark.parametrize(
    "score",
    ["[20]", "[20, 20, 20]", "20", '["20", "20"]', "[true, 1]", "[null, 1]", "[26, 1]", "[-1, 1]", "[NaN, 1]",
     "[Infinity, 1]", "[1e999, 1]", f"[{'9' * 400}, 1]", f"[-{'9' * 400}, 1]", f"[{'9' * 5000}, 1]",
     "[[1, 2], [1, 2]]", "[...]", "{}"],
)  # fmt: skip
def test_no_numbers_are_made_up(score):
    unreadable(EDIT, '{"score": ' + score + "}")


def test_a_pattern_of_ones_own():
    parser = Pattern(pattern=r"^RATING = (\S+)$", scale=(0, 10))
    assert parser(Reply("so\nRATING = 7.5\n")).fraction == 0.75
    unreadable(parser, "RATING = seven", "'seven', which is no number")
    unreadable(parser, "RATING = 7\nRATING = 8", "says 7 and 8")
    unreadable(parser, "RATING = 11", "not between 0 and 10")
    unreadable(parser, "no rating", "is not there")


# ------------------------------------------------------------------------------------------------ probabilities

YES_NO = Levels(levels={"Yes": 1, "No": 0})
QUALITY = read_template("deqa", "level").parser


def step(token, **chances):
    return Step(token, tuple((name.replace("_", " "), math.log(p)) for name, p in chances.items()))


def test_the_expected_level_is_normalised_over_the_words():
    verdict = YES_NO(Reply("Yes", steps=(step("Yes", Yes=0.6, No=0.2, Maybe=0.1),)))
    assert verdict.fraction == pytest.approx(0.6 / 0.8)
    assert verdict.parts == pytest.approx({"level": 0.75, "mass": 0.8})


def test_spellings_of_a_word_count_together():
    verdict = YES_NO(Reply("No", steps=(step(" No", Yes=0.1, yes=0.05, _YES=0.05, _No=0.5, no=0.1, None_=0.1),)))
    assert verdict.parts["mass"] == pytest.approx(0.8)
    assert verdict.fraction == pytest.approx(0.2 / 0.8)


def test_levels_by_hand():
    """(5 * .2 + 4 * .4 + 3 * .2 + 2 * 0 + 1 * .1) / .9 = 3.3 / .9"""
    verdict = QUALITY(Reply("good", steps=(step("good", excellent=0.2, good=0.4, fair=0.2, bad=0.1, fine=0.05),)))
    assert verdict.parts["level"] == pytest.approx(3.3 / 0.9)
    assert verdict.fraction == pytest.approx((3.3 / 0.9 - 1) / 4)


def test_the_word_may_stand_where_the_template_says():
    words = [step(token, **{token.strip(): 0.9, "bad": 0.05}) for token in ("The", " quality", " of", " the", " image")]
    tail = (step(" is", is_=1.0), step(" poor", _poor=0.75, _fair=0.25), step(".", _bad=1.0))
    assert QUALITY(Reply("", steps=(*words, *tail))).parts["level"] == pytest.approx(2.25)
    with pytest.raises(Unreadable, match="is none of excellent"):
        QUALITY(Reply("", steps=(words[1], *tail)))


@pytest.mark.parametrize("text", ["I cannot", "Maybe", "There is no doubt: Yes", "Nothing", ""])
def test_another_answer_has_no_expectation(text):
    steps = tuple(step(token, **{token: 0.5, "Yes": 0.3}) for token in text.split())
    told = f"ends in '{''.join(text.split())}'" if text else "is empty"
    with pytest.raises(Unreadable, match=f"the answer is none of yes, no; the answer {told}$"):
        YES_NO(Reply(text, steps=steps))


def test_impossible_words_have_no_expectation():
    with pytest.raises(Unreadable, match="no probability"):
        YES_NO(Reply("Yes", steps=(Step("Yes", (("Yes", -math.inf), ("Maybe", -0.1))),)))


# ------------------------------------------------------------------------------------------------ limits and options

HOSTILE = {
    "spaces": " " * 100_000,
    "a label and spaces": "Final Score" + " " * 100_000 + "x",
    "braces": "{" * 100_000,
    "brackets": "[" * 100_000,
    "open and close": "{}" * 50_000,
    "fences": "```json\n" * 12_000,
    "a fence and lines": "```" + "\n" * 100_000,
    "a fence, spaces and lines": "```json" + " \r\n" * 30_000 + "{",
    "commas": "{" + ", " * 50_000 + "}",
    "digits": "Final Score: " + "1" * 100_000,
    "tags": "<answer>" * 12_000,
    "thinking": "<think>" * 14_000,
    "stars": "*" * 100_000,
    "lines": "Final Score: 4 or\n" * 5_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_settled_in_no_time(name):
    for parser in (POINT, ASPECTS, PAIR, THINK, FLEX, EDIT):
        start = time.process_time()  # which a busy machine does not change
        unreadable(parser, HOSTILE[name])
        assert time.process_time() - start < 1


def test_a_book_is_not_read():
    unreadable(POINT, "Final Score: 4\n" + "x" * MOST_CHARACTERS, "are not read")


def test_without_tags_and_thinking_it_is_the_text():
    assert answer_of("a <b> {c}") == "a <b> {c}"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Levels(levels={True: 1, False: 0}), "YAML reads Yes and No as true and false; put them in quotes"),
        (lambda: Levels(levels={"Yes": 1}), "levels is"),
        (lambda: Levels(levels={"Yes": 1, "No": 1}), "levels is"),
        (lambda: Levels(levels={"Yes": 1, "yes ": 0}), "levels is"),
        (lambda: Levels(levels={"Yes": 1, "No": "0"}), "levels is"),
        (lambda: Levels(levels={"a": 10**400, "b": 0}), "levels is"),
        (lambda: Levels(levels={"a": 1, "b": 0}, after="x"), "after is"),
        (lambda: ScoreLines(labels={}, scale=(1, 5)), "labels is"),
        (lambda: ScoreLines(labels={"a": "A"}, scale=(5, 1)), "scale is"),
        (lambda: ScoreLines(labels={"a": "A"}, scale=(1, 2, 3)), "scale is"),
        (lambda: ScoreLines(labels={"a": "A"}, scale=(0, 10**400)), "scale is"),
        (lambda: Choice(first=["x"], second=["X"]), "no phrase twice"),
        (lambda: Choice(first="x", second=["y"]), "first is 'x'; expected a list"),
        (lambda: Choice(first=[], second=["y"]), "first is"),
        (lambda: Winner(first=["x"], second=["y"], blend=2), "blend is 2"),
        (lambda: Numbers(names=[], scale=(0, 1)), "names is"),
        (lambda: Numbers(names=["a"], scale=(0, 1), combine="max"), "combine is 'max'"),
        (lambda: Pattern(pattern="(", scale=(0, 1)), "no regular expression"),
        (lambda: Pattern(pattern="a", scale=(0, 1)), "one group"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(make, reason):
    with pytest.raises(RewardError, match=reason):
        make()


def test_the_page_about_judges_names_all_there_is():
    page = (Path(__file__).parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert set(KEYS) <= set(rows), "keys of a template"
    for name, form in PARSERS.items():
        assert not [option.name for option in fields(form) if f"`{option.name}" not in rows[name]], name
    for mode in (mode for reward in ("judge", "unifiedreward", "deqa") for mode in modes(reward)):
        assert f"`{mode}`" in page, mode


@pytest.mark.parametrize("reward", ["judge", "unifiedreward", "deqa"])
def test_every_shipped_template_is_sound(reward):
    assert modes(reward)
    for mode in modes(reward):
        template = read_template(reward, mode)
        assert template.source and (reward == "deqa" or mode == "edit_quality" or "{prompt}" in template.user)
        with pytest.raises(Unreadable):
            template.parser(Reply("I'm sorry, I cannot judge this."))
