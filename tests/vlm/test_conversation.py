"""Answers in several turns: which tokens count, exactly, on rollouts that follow a script; then with a real model."""

import json
import math
from functools import partial

import pytest
import torch
from PIL import Image

from flowrl.models.pipeline import ModelError
from flowrl.vlm.collate import Inputs
from flowrl.vlm.conversation import STOPS, converse, facts
from flowrl.vlm.generate import begin, tokens_of
from flowrl.vlm.tools import CLOSE, OPEN, ToolResult, Zoom, build_tools

PICTURE = "<image>"


class Words:
    """A tokenizer of words, in place of a model: what it knows grows with what it reads."""

    def __init__(self):
        self.words = []

    def encode(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return torch.tensor([self.words.index(word) for word in text.split()], dtype=torch.int64)

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids.tolist() if self.words[i] != "<eos>")

    def foreign(self, text, pictures, template):
        if any(min(picture.size) < 2 for picture in pictures):
            raise ModelError("the processor does not take it")
        filled = template.replace("{images}", f"{PICTURE} " * len(pictures)).replace("{text}", text)
        media = {"pixel_values": torch.ones(len(pictures), 3)} if pictures else {}
        return Inputs(ids=self.encode(filled), media=media)


def scripted(words, turns, asked=None):
    """`write` of a model that says in each turn what the script has for it: text, and how the turn ends."""
    places = {}

    def write(rows):
        made = []
        for row in rows:
            place = places.get(row.key, 0)
            places[row.key] = place + 1
            text, end = turns[row.key[0]][place]
            ids = words.encode(text)
            made.append(row.wrote(ids, -torch.arange(1.0, len(ids) + 1), end))
            if asked is not None:
                asked.append(row.key[0])
        return made

    return write


def talk(scripts, tools=("zoom", "calculator"), pictures=None, asked=None, **options):
    """The conversation that a script of turns [N] makes."""
    words = Words()
    rows = [begin(Inputs(ids=words.encode("how many ?")), key=(i,)) for i in range(len(scripts))]
    seen = pictures or [[Image.new("RGB", (32, 32))] for _ in scripts]
    talks = converse(rows, seen, words, scripted(words, scripts, asked), build_tools(tools), **options)
    return talks, words


def add(expression):
    """A call in as many words as JSON has."""
    return f"{OPEN} {json.dumps({'name': 'calculator', 'arguments': {'expression': expression}})} {CLOSE}"


def looks(box, index=0):
    return f"{OPEN} {json.dumps({'name': 'zoom', 'arguments': {'bbox_2d': box, 'index': index}})} {CLOSE}"


def test_exactly_the_tools_words_are_masked():
    one, two = add("2+3"), add("7*6")
    scripts = [
        [(f"let me see {one}", "stop"), (f"and {two}", "stop"), ("so 42 <eos>", "eos")],
        [("it is 3 <eos>", "eos")],
        [(f"hmm {two}", "stop"), ("well well well", "length")],
    ]
    talks, words = talk(scripts, turns=3)
    tokens = tokens_of([t.row for t in talks], prompt=[0, 0, 0])
    said = " ".join(f"<tool_response> {n} </tool_response>" for n in (5,))
    chosen = [f"let me see {one}", said, f"and {two}", "<tool_response> 42 </tool_response>", "so 42 <eos>"]
    expected = [bool(1 - i % 2) for i, part in enumerate(chosen) for _ in part.split()]
    assert words.decode(tokens.ids[0]) == " ".join(chosen).removesuffix(" <eos>")
    assert tokens.mask[0].tolist() == expected and tokens.present[0].all()
    assert tokens.mask[1].tolist() == [True] * 4 + [False] * (len(expected) - 4)
    first, third = len(f"hmm {two}".split()), 3
    assert tokens.mask[2].tolist()[: first + 3 + third] == [True] * first + [False] * 3 + [True] * third
    assert (tokens.present.sum(1) == torch.tensor([len(expected), 4, first + 6])).all()
    assert (tokens.logprob[~tokens.mask] == 0).all() and (tokens.logprob[tokens.mask] < 0).all()
    assert tokens.logprob[0, len(chosen[0].split()) + 3] == -1, (
        "the second turn's own first log-prob stays with its token"
    )


def test_what_is_known_of_the_answers():
    scripts = [
        [(f"a {add('1')}", "stop"), (f"b c {add('x')}", "stop"), ("d <eos>", "eos")],
        [("<eos>", "eos")],
        [("cut off", "length")],
        [(add("1"), "stop"), (add("2"), "stop"), (f"still {add('3')}", "stop")],
    ]
    talks, _ = talk(scripts, turns=3)
    known = facts(talks)
    assert {name: fact.dtype for name, fact in known.items()} == dict.fromkeys(known, torch.float64)
    assert known["calls"].tolist() == [2, 0, 0, 2] and known["failed_calls"].tolist() == [1, 0, 0, 0]
    assert known["truncated"].tolist() == [0, 0, 1, 0] and known["over_turns"].tolist() == [0, 0, 0, 1]
    position = known["tool_position"].tolist()
    assert position[0] == 1 and position[3] == 0 and all(math.isnan(p) for p in position[1:3])
    assert talks[0].turns == (f"a {add('1')}", f"b c {add('x')}", "d") and talks[0].text == "\n".join(talks[0].turns)
    assert "<tool_response>" not in talks[0].text


def test_a_row_that_used_its_turns_up_ends_with_its_own_call():
    talks, words = talk([[(add("1"), "stop"), (add("2"), "stop")]], turns=2)
    assert talks[0].over_turns and talks[0].calls == 1 and words.decode(talks[0].row.ids).endswith(add("2"))


def test_one_turn_is_no_conversation():
    talks, _ = talk([[(add("1"), "stop")], [("3 <eos>", "eos")]], turns=1)
    assert [t.over_turns for t in talks] == [True, False] and [t.calls for t in talks] == [0, 0]
    assert talks[0].row.mask.all() and talks[0].tool_position is None
    with pytest.raises(ValueError, match="turns=0"):
        talk([[]], turns=0)


def test_only_rows_that_asked_write_again():
    asked = []
    scripts = [[(add("1"), "stop"), ("x <eos>", "eos")], [("y <eos>", "eos")], [(add("2"), "stop"), ("z <eos>", "eos")]]
    talk(scripts, turns=5, asked=asked)
    assert asked == [0, 1, 2, 0, 2]


def test_pictures_are_appended_and_can_be_looked_at_again():
    whole = Image.new("RGB", (32, 32), "red")
    whole.paste("blue", (16, 16, 32, 32))
    scripts = [[(looks([8, 8, 32, 32]), "stop"), (looks([8, 8, 24, 24], index=1), "stop"), ("blue <eos>", "eos")]]
    talks, words = talk(scripts, turns=3, pictures=[[whole]])
    (row,) = [t.row for t in talks]
    assert [picture.size for picture in talks[0].pictures] == [(32, 32), (24, 24), (16, 16)]
    assert talks[0].pictures[2].getcolors() == [(256, (0, 0, 255))], "a crop of the crop"
    first = len(looks([8, 8, 32, 32]).split())
    assert words.decode(row.ids[first : first + 3]) == f"<tool_response> {PICTURE} </tool_response>"
    assert not row.mask[first : first + 3].any() and row.mask[first + 3]
    assert [start for start, _ in row.inputs.later] == [first, first + 3 + len(looks([8, 8, 24, 24], index=1).split())]


def test_several_calls_of_a_turn_are_answered_in_order():
    both = f"{add('1+1')} {add('1+2')}"
    talks, words = talk([[(f"x {both} <eos>", "eos"), ("y <eos>", "eos")]], turns=2)
    said = words.decode(talks[0].row.ids).split("</tool_call> <tool_response>")[1]
    assert said.startswith(" 2 </tool_response> <tool_response> 3 </tool_response>")
    assert talks[0].calls == 2 and talks[0].tool_position == 1


@pytest.mark.parametrize(
    "turn",
    [
        CLOSE, f"{OPEN} {CLOSE}", f"{OPEN} NaN {CLOSE}", f"{OPEN} " + "[" * 100_000 + f" {CLOSE}",
        looks([0, 0, 4, 4], index=7), looks("__import__"), f'{OPEN} {{"name": "sh"}} {CLOSE}', add("9**9**9"),
    ],
)  # fmt: skip
def test_a_hostile_call_is_answered_with_an_error_and_the_answer_goes_on(turn):
    (one,), words = talk([[(turn, "stop"), ("3 <eos>", "eos")]], turns=2)
    assert (one.calls, one.failed_calls, one.turns[-1]) == (1, 1, "3")
    assert "<tool_response> error:" in words.decode(one.row.ids)
    assert len(words.decode(one.row.ids)) < len(turn) + 400, "the model's own text is not repeated whole"


def test_a_turn_that_was_cut_off_calls_nothing():
    (one,), _ = talk([[(f"{add('1')}", "length")]], turns=3)
    assert one.truncated and one.calls == 0 and not one.over_turns


def test_a_token_may_hold_more_than_the_stop_text():
    (one,), _ = talk([[(f"{add('1+1')}.", "stop"), ("2 <eos>", "eos")]], turns=2)
    assert one.calls == 1 and one.failed_calls == 0


def test_a_picture_that_the_processor_refuses_is_an_error_of_the_tool():
    def speck(arguments, pictures):
        return ToolResult(pictures=(Image.new("RGB", (1, 1)),))

    call = f'{OPEN} {{"name": "speck"}} {CLOSE}'
    (one,), words = talk([[(call, "stop"), ("2 <eos>", "eos")]], tools=[speck], turns=2)
    assert one.failed_calls == 1 and len(one.pictures) == 1 and "cannot be shown" in words.decode(one.row.ids)


def test_a_template_may_stand_around_and_be_text():
    template = "<turn> user {text} {images} </turn>"
    (one,), words = talk([[(add("1+1"), "stop"), ("2 <eos>", "eos")]], turns=2, template=template)
    assert "<turn> user 2 </turn>" in words.decode(one.row.ids)


@pytest.mark.slow
def test_with_a_real_model_the_log_probs_of_all_turns_are_those_of_one_forward(tmp_path):
    """Its turns are real draws, but for the calls, which a model with random weights does not make."""
    from flowrl.vlm import tiny
    from flowrl.vlm.collate import asked
    from flowrl.vlm.generate import write
    from flowrl.vlm.model import ImageTextModel
    from flowrl.vlm.policy import TextPolicy

    model = ImageTextModel.load(tiny.build("qwen2_vl", tmp_path / "model"), dtype=torch.float32)
    policy = TextPolicy(model, temperature=0.7, seed=0)
    pictures = [[Image.effect_noise((56, 56), 60).convert("RGB")], [Image.effect_noise((56, 28), 60).convert("RGB")]]
    rows = [
        begin(model.prepare(asked("What is it?" + "?" * i, shown)), key=(0, 0, i, 0))
        for i, shown in enumerate(pictures)
    ]
    calls = iter([looks([0, 0, 28, 28]), add("1+1")])

    def and_calls(rows):
        """The first turn: real tokens, and then a call."""
        drawn = write(model, rows, limit=3, temperature=0.7)
        if len(rows[0].ids):
            return drawn
        ids = [torch.tensor(model.encode(next(calls))) for _ in rows]
        return [row.wrote(i, torch.zeros(len(i)), "stop") for row, i in zip(drawn, ids, strict=True)]

    talks = converse(rows, pictures, model, and_calls, {"zoom": Zoom(), **build_tools(["calculator"])}, turns=2)
    assert [len(t.pictures) for t in talks] == [2, 1] and [t.failed_calls for t in talks] == [0, 0]
    tokens = tokens_of([t.row for t in talks], prompt=[0, 1])
    with torch.no_grad():
        stats = policy.evaluate(tokens)
    real = tokens.logprob != 0
    assert real.sum() == 12 and (stats.logprob - tokens.logprob)[real].abs().max() < 1e-5
    assert (stats.logprob[~tokens.mask] == 0).all()
    stopped = partial(write, model, limit=40, temperature=0.7, stops=STOPS)
    assert len(converse(rows, pictures, model, stopped, {}, turns=2)) == 2
