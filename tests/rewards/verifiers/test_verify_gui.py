"""Actions on a screen."""

import pytest

from rewards.verifiers import NoVerdict
from rewards.verifiers.gui import gui, word_f1

CLICK = {"action": "click", "box": [10, 20, 30, 40]}


@pytest.mark.parametrize(
    ("response", "type_", "argument"),
    [
        ('{"action": "click", "coordinate": [10, 40]}', 1, 1),
        ('<answer>[{"action": "click", "point": [15, 25]}]</answer>', 1, 1),
        ('{"name": "tap", "arguments": {"x": 15, "y": 25}}', 1, 1),
        ('{"action": "click", "bbox": [0, 0, 40, 60]}', 1, 1),  # its centre
        ("click(x=15, y=25)", 1, 1),
        ("click(15, 25)", 1, 1),
        ("click(start_box='(15,25)')", 1, 1),
        ("click(point=[15, 25])", 1, 1),
        ("first click(1, 1), then\nclick(15, 25)", 1, 1),
        ("click(9, 25)", 1, 0),
        ("click()", 1, 0),
        ('{"action": "click"}', 1, 0),
        ('{"action": "click", "coordinate": "NaN"}', 1, 0),
        ('{"action": "click", "coordinate": {"x": 1}}', 1, 0),
        ('{"action": ["click"]}', 0, 0),
        ("type(text='15, 25')", 0, 0),
        ("<think>click(15, 25)</think>", 0, 0),
        ("I would click there", 0, 0),
    ],
)
def test_clicks(response, type_, argument):
    verdict = gui(response, CLICK)
    assert verdict.parts == {"type": type_, "argument": argument} and verdict.value == argument


def test_partial_credit_for_the_type():
    assert gui("click(0, 0)", CLICK, type_share=0.2).value == pytest.approx(0.2)
    assert gui("click(15, 25)", CLICK, type_share=0.2).value == 1
    assert gui("scroll(15, 25)", CLICK, type_share=0.2).value == 0


def test_text_and_other_arguments():
    right = {"action": "type", "text": "Hello world"}
    assert gui("type(text='hello  world')", right).value == 1
    assert gui("type('hello world')", right).value == 1
    assert gui('{"action": "input_text", "value": "hello world"}', right).value == 1
    assert gui("type(text='hello there')", right).value == 0
    assert gui("type(text='hello there')", right, text_f1=0.5).value == 1
    assert gui("scroll(direction='down')", {"action": "scroll", "direction": "Down"}).value == 1
    assert gui("scroll(direction='up')", {"action": "scroll", "direction": "down"}).value == 0
    assert gui("scroll()", {"action": "scroll", "direction": "down"}).value == 0
    assert gui("press_back()", {"action": "press_back"}).value == 1


def test_scales():
    assert gui("click(50, 150)", CLICK, scale="norm1000", image_size=[400, 200]).value == 1
    assert gui("click(50, 150)", CLICK).value == 0


def test_word_f1():
    assert word_f1("a b", "b c") == 0.5
    assert word_f1("a a", "a") == pytest.approx(2 / 3)
    assert (word_f1("", ""), word_f1("", "a")) == (1, 0)


@pytest.mark.parametrize("action", ["click", {}, {"box": [1, 2, 3, 4]}, {"action": "click", "box": [1, 2]}])
def test_what_is_right_must_be_clear(action):
    with pytest.raises(NoVerdict):
        gui("click(1, 2)", action)
