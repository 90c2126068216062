"""Tools: what they answer, and that nothing that a model may write stops a run or makes it wait."""

import json
import math
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from flowrl.vlm.tools import (
    CLOSE,
    MOST_CALLS,
    OPEN,
    BadCall,
    Calculator,
    Call,
    ToolError,
    ToolResult,
    Zoom,
    build_tools,
    parse_calls,
    run_calls,
)  # fmt: skip


def gradient(width=40, height=30):
    """A picture in which every pixel is different."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, x + y], -1).astype(np.uint8))


def call(name="zoom", **arguments):
    return f"{OPEN} {json.dumps({'name': name, 'arguments': arguments})} {CLOSE}"


def quick(function, *args, limit=1.0, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    assert time.perf_counter() - start < limit
    return result


# ------------------------------------------------------------------------------------------------ zoom


def zoomed(box, pictures=None, options=None, **more):
    result = Zoom(**(options or {}))({"bbox_2d": box, **more}, pictures or [gradient()])
    assert (result.text, result.error, len(result.pictures)) == ("", False, 1)
    return np.array(result.pictures[0])


def test_zoom_is_the_part_of_the_picture():
    whole = np.array(gradient())
    assert (zoomed([4, 5, 20, 25]) == whole[5:25, 4:20]).all()
    assert (zoomed([4.9, 5.1, 19.2, 24.01]) == whole[5:25, 4:20]).all(), "every pixel that the box touches"
    assert (zoomed([-7, -1e8, 1e8, 12]) == whole[:12]).all(), "what is outside is cut off"


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([20, 15, 22, 17], slice(12, 20), slice(17, 25)),  # around the middle
        ([0, 0, 1, 1], slice(0, 8), slice(0, 8)),  # in a corner
        ([39, 29, 40, 30], slice(22, 30), slice(32, 40)),
        ([10, 5, 30, 6], slice(1, 9), slice(10, 30)),  # one side alone
    ],
)
def test_a_small_box_is_widened_within_the_picture(box, rows, columns):
    assert (zoomed(box) == np.array(gradient())[rows, columns]).all()


def test_a_picture_smaller_than_the_least_crop_is_shown_whole():
    tiny = gradient(5, 3)
    assert (zoomed([1, 1, 2, 2], [tiny]) == np.array(tiny)).all()


def test_zoom_enlarges_but_never_shrinks():
    assert zoomed([0, 0, 20, 10], options={"enlarge_to": 60}).shape == (30, 60, 3)
    assert zoomed([0, 0, 20, 10], options={"enlarge_to": 12}).shape == (10, 20, 3)


def test_zoom_reads_thousandths_where_the_model_writes_them():
    assert (
        zoomed([250, 500, 1000, 1000], options={"scale": "norm1000"}) == np.array(gradient(40, 30))[15:30, 10:40]
    ).all()


def test_zoom_takes_the_picture_that_is_asked_for():
    first, second = gradient(), Image.new("RGB", (40, 30), "red")
    assert (zoomed([0, 0, 10, 10], [first, second], index=1) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"bbox_2d": None}, {"bbox_2d": "1,2,3,4"}, {"bbox_2d": [1, 2, 3]}, {"bbox_2d": [1, 2, 3, "4"]},
        {"bbox_2d": [0, 0, True, 5]}, {"bbox_2d": [0, 0, math.nan, 5]}, {"bbox_2d": [0, 0, math.inf, 5]},
        {"bbox_2d": [0, 0, 10**400, 5]}, {"bbox_2d": [9, 0, 3, 5]}, {"bbox_2d": [3, 3, 3, 3]},
        {"bbox_2d": [40, 0, 50, 9]}, {"bbox_2d": [-9, 0, 0, 9]}, {"bbox_2d": [[1, 2], [3, 4], 5, 6]},
        {"bbox_2d": [0, 0, 9, 9], "index": 1}, {"bbox_2d": [0, 0, 9, 9], "index": -1},
        {"bbox_2d": [0, 0, 9, 9], "index": "0"}, {"bbox_2d": [0, 0, 9, 9], "index": True},
    ],
)  # fmt: skip
def test_zoom_says_what_is_wrong_with_a_box(arguments):
    with pytest.raises(BadCall, match="bbox_2d|index"):
        Zoom()(arguments, [gradient()])


def test_zoom_refuses_strips_and_a_prompt_without_pictures():
    with pytest.raises(BadCall, match="too thin"):
        Zoom(min_side=1)({"bbox_2d": [0, 0, 500, 1]}, [Image.new("RGB", (600, 600))])
    with pytest.raises(BadCall, match="no picture"):
        Zoom()({"bbox_2d": [0, 0, 5, 5]}, [])


# ------------------------------------------------------------------------------------------------ calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4)", "14"), ("1/3", "0.333333333333"), ("2^10 - 1", "1023"), ("7 / 2", "3.5"), ("-0", "0"),
        ("\\frac{3}{4}", "0.75"), ("sqrt(2)", "1.41421356237"), ("20%", "0.2"), ("10^14 + 1", "100000000000001"),
        ("2^100", "1.26765060023e+30"), ("10^400", "1.00000000000e+400"), ("0.1 + 0.2", "0.3"),
    ],
)  # fmt: skip
def test_calculator_computes(expression, value):
    assert Calculator()({"expression": expression}, []) == ToolResult(value)


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "9^9^9^9", "__import__('os').system('ls')", "x + 1", "(1, 2)", "", "1/0", "(" * 1_000_000,
        "1+" * 900,
        "1000000!", "print(1)", "lambda: 0", "\0", None, 3, ["1"],
    ],
)  # fmt: skip
def test_calculator_refuses_quickly_what_is_no_number(expression):
    with pytest.raises(BadCall):
        quick(Calculator(), {"expression": expression}, [])


# ------------------------------------------------------------------------------------------------ reading calls


def test_a_turn_that_ends_with_a_call():
    assert parse_calls("let me look " + call(bbox_2d=[1, 2, 3, 4]) + "\n ") == [Call("zoom", {"bbox_2d": [1, 2, 3, 4]})]
    assert parse_calls(f'{OPEN}{{"name": "calculator"}}{CLOSE}') == [Call("calculator", {})]


def test_calls_at_the_end_are_one_request_and_those_before_other_text_are_none():
    two = call("a", n=1) + " \n" + call("b", n=2)
    assert parse_calls(two) == [Call("a", {"n": 1}), Call("b", {"n": 2})]
    assert parse_calls(call("early") + " or rather " + two) == [Call("a", {"n": 1}), Call("b", {"n": 2})]


@pytest.mark.parametrize("text", ["", "no call", call() + " the answer is 3", f"{OPEN} {{}}", "<tool_call"])
def test_a_turn_that_does_not_end_with_a_call(text):
    assert parse_calls(text) == []


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ("", "not JSON"), ("zoom", "not JSON"), ("{'name': 'zoom'}", "not JSON"), ('{"name": "zoom"', "not JSON"),
        ('{"name": "zoom", "arguments": {"x": NaN}}', "not JSON"), ('{"name": "z", "n": -Infinity}', "not JSON"),
        ('{"name": "zoom", "arguments": {"x": ' + "9" * 5000 + "}}", "not JSON"), ("[" * 5000, "not JSON"),
        ("[" * 15_000 + "]" * 4000, "not JSON"), ("3", "no object"), ("null", "no object"),
        ('[{"name": "zoom"}]', "no object"),
        ("{}", "no object"), ('{"name": 3}', "no object"), ('{"name": "zoom", "arguments": [1]}', '"arguments"'),
        ('{"name": "zoom", "arguments": null}', '"arguments"'), ("[" * 1_000_000, "1000000 characters"),
    ],
)  # fmt: skip
def test_a_broken_call_is_told(inside, problem):
    (found,) = quick(parse_calls, f"{OPEN} {inside} {CLOSE}")
    assert problem in found.problem and len(found.problem) < 200


def test_hostile_turns_are_read_in_bounded_time():
    (many,) = quick(parse_calls, call() * 20_000)
    assert str(MOST_CALLS) in many.problem
    assert len(quick(parse_calls, call() * MOST_CALLS)) == MOST_CALLS
    assert quick(parse_calls, OPEN * 100_000) == []
    (closed,) = quick(parse_calls, CLOSE * 100_000)
    assert closed.problem
    (stray,) = quick(parse_calls, "x" * 1_000_000 + CLOSE)
    assert OPEN in stray.problem


# ------------------------------------------------------------------------------------------------ running calls


def echo(arguments, pictures):
    return ToolResult(f"{arguments['n']} of {len(pictures)}")


def run(calls, tools, seconds=5.0, **options):
    return run_calls([(each, []) for each in calls], tools, seconds=seconds, **options)


def test_results_come_in_order_whatever_takes_longest():
    def slow(arguments, pictures):
        time.sleep(0.02 * (5 - arguments["n"]))
        return ToolResult(str(arguments["n"]))

    assert [r.text for r in run([Call("slow", {"n": n}) for n in range(5)], {"slow": slow})] == list("01234")


def test_calls_run_side_by_side_up_to_a_limit():
    now, most, lock = 0, 0, threading.Lock()

    def wait(arguments, pictures):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return ToolResult("done")

    results = quick(run, [Call("wait", {})] * 24, {"wait": wait}, at_once=8, limit=1.1)
    assert {r.text for r in results} == {"done"} and 2 <= most <= 8


def test_a_call_that_hangs_becomes_an_error_and_holds_nobody_up():
    release = threading.Event()

    def hang(arguments, pictures):
        release.wait(30)
        return ToolResult("too late")

    calls = [Call("hang", {}), Call("echo", {"n": 1}), Call("hang", {}), Call("echo", {"n": 2})]
    results = quick(run, calls, {"hang": hang, "echo": echo}, seconds=0.3, at_once=1, limit=5)
    release.set()
    assert [r.error for r in results] == [True, False, True, False]
    assert "longer than 0.3 seconds" in results[0].text and results[3].text == "2 of 0"


@pytest.mark.filterwarnings("ignore:tool")
def test_whatever_a_tool_does_is_told_to_the_model():
    def raises(arguments, pictures):
        raise RuntimeError("secret path")

    def complains(arguments, pictures):
        raise BadCall("n must be 3")

    def returns_text(arguments, pictures):
        return "12"

    def stops(arguments, pictures):
        raise SystemExit

    tools = {f.__name__: f for f in (raises, complains, returns_text, stops)}
    names = ["raises", "complains", "returns_text", "stops", "zom"]
    texts = [r.text for r in run([Call(name, {}) for name in names], tools, seconds=0.5) if r.error]
    assert texts[0] == "error: raises failed (RuntimeError)" and "secret" not in texts[0]
    assert texts[1] == "error: n must be 3" and "returned a str" in texts[2] and "failed (SystemExit)" in texts[3]
    assert "there is no tool 'zom'; there are raises" in texts[4]


def test_a_fault_of_a_tool_is_a_warning_once_for_each_kind(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from flowrl.vlm.tools import BadCall, ToolResult\n"
        "def unit(arguments):\n"
        "    return arguments.unit\n"
        "def faulty(arguments, pictures):\n"
        "    if arguments.get('bad'):\n        raise BadCall('not so')\n"
        "    if arguments.get('text'):\n        return 12\n"
        "    return ToolResult({'kg': 'kilogram'}[arguments['unit']] if 'unit' in arguments else unit(arguments))\n"
    )
    tools = build_tools([f"{file}:faulty"])
    calls = [Call("faulty", {})] * 5 + [Call("faulty", {"unit": 3}), Call("faulty", {"text": True})] * 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = run(calls, tools) + run(calls, tools)
        run([Call("faulty", {"bad": True}), Call("faulty", {"unit": "kg"}), Call("zom", {}), Call(problem="no")], tools)
    assert all(result.error for result in results) and len(results) == 18
    attribute, key, kind = sorted(str(warning.message) for warning in told)  # one of each kind, of eighteen calls
    assert f"tool 'faulty' failed: AttributeError: 'dict' object has no attribute 'unit' ({file}:3)." in attribute
    assert f"tool 'faulty' failed: KeyError: 3 ({file}:9)." in key and "let it raise flowrl.vlm.tools.BadCall" in key
    assert "tool 'faulty' failed: it returned a int and no ToolResult." in kind


def test_a_long_name_is_not_repeated_whole():
    (result,) = run([Call("z" * 100_000, {})], {})
    assert result.error and len(result.text) < 200


def test_a_tool_gets_copies_that_it_may_change():
    def greedy(arguments, pictures):
        arguments.clear()
        pictures.clear()
        return ToolResult("ok")

    given, seen = {"n": 1}, [gradient()]
    run_calls([(Call("greedy", given), seen)], {"greedy": greedy}, seconds=5)
    assert given == {"n": 1} and len(seen) == 1


def test_no_calls_no_results():
    assert run([], {}) == []


# ------------------------------------------------------------------------------------------------ from the config


def test_tools_of_a_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from flowrl.vlm.tools import ToolResult\n"
        "def weigh(arguments, pictures):\n    return ToolResult('12 kg')\n"
        "class Shout:\n    name = 'shout'\n    def __init__(self, mark='!'):\n        self.mark = mark\n"
        "    def __call__(self, arguments, pictures):\n        return ToolResult(arguments['text'] + self.mark)\n"
    )
    tools = build_tools(
        ["calculator", {"use": "zoom", "min_side": 4}, f"{file}:weigh", {"use": f"{file}:Shout", "mark": "?"}]
    )
    assert list(tools) == ["calculator", "zoom", "weigh", "shout"]
    calls = [Call("weigh", {}), Call("shout", {"text": "no"}), Call("zoom", {"bbox_2d": [0, 0, 1, 1]})]
    weight, shout, crop = run_calls([(each, [gradient()]) for each in calls], tools, seconds=5)
    assert (weight.text, shout.text, crop.pictures[0].size) == ("12 kg", "no?", (4, 4))


def test_a_tool_that_fails_when_it_is_made_is_told_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Shop:\n    name = 'shop'\n    def __init__(self, path):\n        self.stock = open(path)\n")
    with pytest.raises(ToolError, match=r"Shop' could not be made: FileNotFoundError: .*stock.csv.*mine.py:4\)"):
        build_tools([{"use": f"{file}:Shop", "path": "no/stock.csv"}])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["zom"], "there is no tool 'zom' .did you mean 'zoom'.*there are zoom, calculator"),
        ([{"use": "zoom", "min": 4}], "does not take these options.*'min'"),
        ([{"use": "zoom", "min_side": 0}], "min_side=0"),
        ([{"use": "zoom", "scale": "pixels"}], "write abs or norm1000"),
        ([{"min_side": 4}], "needs `use: name`"),
        (["zoom", "zoom"], "two tools are called 'zoom'"),
        ([{"use": echo, "n": 3}], "takes no options; remove n"),
        (["no.such.module:tool"], "cannot import"),
        (["math:pi"], r"is a float; give a function \(arguments, pictures\) -> ToolResult"),
        (["json:loads"], r"tool 'json:loads' takes \(s, .*the form \(arguments, pictures\) -> ToolResult, both"),
        ([lambda arguments: None], r"takes \(arguments\): too many positional arguments"),
        ([lambda arguments, *, pictures: None], "too many positional arguments"),
        ([lambda arguments, pictures, unit: None], "missing a required argument: 'unit'"),
    ],
)
def test_a_tool_that_cannot_be_used_is_told(entries, message):
    with pytest.raises(ToolError, match=message):
        build_tools(entries)
