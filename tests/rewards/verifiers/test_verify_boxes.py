"""Boxes: matching against brute force, IoU against torchvision, and the faults of other implementations."""

import itertools
import json

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from rewards import RewardContractError
from rewards.verifiers import Answer, NoVerdict, Verifiers
from rewards.verifiers._assign import assign
from rewards.verifiers._geometry import Box, iou, parse_boxes
from rewards.verifiers.boxes import DYNAMIC, VTRIUNE, detection, grounding, staged, thresholds

# ------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize("tied", [False, True])
def test_assignment_is_the_best_of_all(tied):
    draw = np.random.default_rng(0)
    for _ in range(300):
        rows, columns = map(int, draw.integers(1, 6, 2))
        cost = draw.integers(-2, 3, (rows, columns)).astype(float) if tied else draw.normal(size=(rows, columns))
        pairs = assign(cost)
        assert len(pairs) == min(rows, columns) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
        wide = cost if rows <= columns else cost.T
        all_of_them = itertools.permutations(range(wide.shape[1]), wide.shape[0])
        best = min(sum(wide[i, j] for i, j in enumerate(each)) for each in all_of_them)
        assert sum(cost[pair] for pair in pairs) == pytest.approx(best)


def test_greedy_would_lose():
    gain = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert sum(gain[pair] for pair in assign(-gain)) == pytest.approx(1.65)


def test_iou_is_torchvisions():
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.rand(20, 4, generator=draw).sort().values[:, [0, 1, 2, 3]] for _ in range(2))
    boxes = [[Box(tuple(row)) for row in each.double().tolist()] for each in (first, second)]
    np.testing.assert_allclose(iou(*boxes), box_iou(first.double(), second.double()).numpy(), atol=1e-12)
    assert iou([Box((1, 1, 1, 1))], [Box((1, 1, 1, 1))]) == 0


# ------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3, 4]",
        "[[1, 2, 3, 4]]",
        '{"bbox_2d": [1, 2, 3, 4]}',
        'Here: ```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n``` done',
        'I see [{"bbox": [1.0, 2, 3, 4]}] there',
        "(1,2),(3,4)",
        "(1, 2, 3, 4)",
        "the box is [1,2,3,4].",
        "```\n[1, 2, 3, 4]\n```",
    ],
)
def test_ways_to_write_one_box(text):
    assert parse_boxes(text) == [Box((1.0, 2.0, 3.0, 4.0))]


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[]", []),
        ("nothing", None),
        ("[3, 2, 1, 4]", []),
        ("[1, 2, 3]", None),
        ('[{"bbox_2d": [1, 2, 3, NaN]}]', []),
        ('[{"bbox_2d": [1, 2, 3, 1e999]}]', []),
        ('[{"bbox_2d": [1, 2, 3, true]}]', []),
        ('[{"bbox_2d": "abcd"}]', []),
        ('{"a": 1}', None),
        ("[1, 2, 3, 4] and [5, 6, 7, 8]", [Box((1, 2, 3, 4)), Box((5, 6, 7, 8))]),
        ('[{"bbox_2d": [0, 0, 1, 1], "label": "cat"}]', [Box((0, 0, 1, 1), "cat")]),
    ],
)
def test_what_is_no_box(text, boxes):
    assert parse_boxes(text) == boxes


# ------------------------------------------------------------------------------------------------ grounding

RIGHT = [0, 0, 10, 10]


def test_grounding_is_the_iou():
    verdict = grounding("<answer>[0, 0, 10, 5]</answer>", RIGHT)
    assert verdict.value == verdict.parts["iou"] == pytest.approx(0.5)
    assert grounding("[0, 0, 10, 10], [0, 0, 10, 10]", RIGHT).value == 1  # twice the same is one
    assert grounding("[0, 0, 10, 10], [0, 0, 10, 9]", RIGHT).value == 0  # which one?
    assert grounding("<think>[0, 0, 10, 10]</think>", RIGHT).value == 0
    assert grounding("no", RIGHT).value == 0


@pytest.mark.parametrize(("mode", "low", "high"), [("iou", 0.4, 0.6), ("hit", 0, 1), ("above", 0, 0.6)])
def test_modes(mode, low, high):
    assert grounding("[0, 0, 10, 4]", RIGHT, mode=mode).value == pytest.approx(low)
    assert grounding("[0, 0, 10, 6]", RIGHT, mode=mode).value == pytest.approx(high)
    assert grounding("[0, 0, 10, 5]", RIGHT, mode="hit", threshold=0.5).value == 1


def test_scales():
    right, size = [100, 50, 200, 100], [400, 200]
    assert grounding("[250, 250, 500, 500]", right, scale="norm1000", image_size=size).value == pytest.approx(1)
    given = grounding("[50, 25, 100, 50]", right, scale="model_input", image_size=size, model_size=[200, 100])
    assert given.value == pytest.approx(1)
    with pytest.raises(NoVerdict, match=r"needs meta\['image_size'\]"):
        grounding("[1, 2, 3, 4]", right, scale="norm1000")
    with pytest.raises(RewardContractError, match="scale is 'mm'"):
        grounding("[1, 2, 3, 4]", right, scale="mm", image_size=size)


@pytest.mark.parametrize("gold", ["nothing", 5, [[1, 2, 3, 4], [5, 6, 7, 8]], []])
def test_grounding_needs_one_right_box(gold):
    with pytest.raises(NoVerdict):
        grounding("[1, 2, 3, 4]", gold)


def test_the_right_box_may_be_a_tensor_or_text():
    for gold in (torch.tensor(RIGHT), np.array(RIGHT), "[0, 0, 10, 10]", {"bbox_2d": RIGHT}, tuple(RIGHT)):
        assert grounding("[0, 0, 10, 10]", gold).value == 1


# ------------------------------------------------------------------------------------------------ detection


def listed(*boxes):
    return json.dumps([{"bbox_2d": list(corners), "label": label} for corners, label in boxes])


CAT, DOG = ((0, 0, 10, 10), "cat"), ((20, 20, 30, 30), "dog")


def gold(*boxes):
    return json.loads(listed(*boxes))


def test_detection_edges():
    assert detection("[]", []).value == 1
    assert detection("[]", gold(CAT)).value == 0
    assert detection(listed(CAT), []).value == 0
    assert detection("no boxes", []).value == 0
    assert detection("no boxes", gold(CAT)).value == 0
    assert detection(listed(DOG, CAT), gold(CAT, DOG)).value == 1


def test_detection_by_hand():
    """One of two found with IoU 0.8, and one false box: loc = .4, miss = false = 1/2, comp = 1/2."""
    near = ((0, 0, 10, 8), "cat")
    verdict = detection(listed(near, ((50, 50, 60, 60), "dog")), gold(CAT, DOG))
    assert verdict.parts == pytest.approx({"loc": 0.4, "lab": 0.5, "comp": 0.5, "f1": 0.5})
    assert verdict.value == pytest.approx(0.7 * 0.4 + 0.3 * 0.5)
    heavy = detection(listed(near, ((50, 50, 60, 60), "dog")), gold(CAT, DOG), weights=(1, 1, 2))
    assert heavy.value == pytest.approx((0.4 + 0.5 + 2 * 0.5) / 4)


def test_the_counter_example_to_max_iou_first():
    """IoU 1.0 and 0.68: V-Triune's matcher and its copy credit the last pair with the largest IoU."""
    other = ((0, 0, 10, 6.8), "cat")
    verdict = detection(listed(CAT, other), gold(CAT, ((0, 0, 10, 10.0), "cat"), DOG)[:1] + gold(DOG), threshold=0.5)
    assert verdict.parts["loc"] == pytest.approx(0.5)  # CAT alone, with 1.0; the dog is not found
    two = gold(((0, 0, 10, 10), "a"), ((100, 0, 110, 10), "a"))
    swapped = listed(((100, 0, 110, 6.8), "a"), ((0, 0, 10, 10), "a"))
    assert detection(swapped, two).parts["loc"] == pytest.approx((1.0 + 0.68) / 2)


def test_the_order_does_not_matter():
    boxes = [CAT, DOG, ((5, 5, 15, 15), "cat"), ((21, 20, 31, 30), "dog")]
    values = {detection(listed(*each), gold(*boxes[:3])).value for each in itertools.permutations(boxes)}
    assert len({round(value, 12) for value in values}) == 1


def test_labels_forbid_a_match():
    wrong = listed((CAT[0], "dog"))
    assert detection(wrong, gold(CAT)).value == 0
    free = detection(wrong, gold(CAT), labels=False)
    assert free.value == 1 and free.parts["lab"] == 0
    assert detection(listed((CAT[0], " Cat")), gold(CAT)).value == 1
    assert detection("[0, 0, 10, 10]", [[0, 0, 10, 10]]).value == 1  # right ones without labels take any


def test_spam_costs():
    spam = listed(CAT, *(((i, 50, i + 1, 60), "cat") for i in range(9)))
    plain = detection(spam, gold(CAT))
    assert plain.value == pytest.approx(0.7 + 0.3 * (1 - 0.9 / 2))
    assert detection(spam, gold(CAT), count_penalty=0.6).value == pytest.approx(plain.value * 0.6**9)
    assert detection(spam, gold(CAT), length_factor=True).value == pytest.approx(plain.value / 10)


@pytest.mark.parametrize(("count", "found"), [(300, 1), (301, 0)])
def test_too_many_boxes_are_not_looked_at(count, found):
    boxes = listed(CAT, *(((i, 50, i + 1, 60), "cat") for i in range(count - 1)))
    assert detection(boxes, gold(CAT)).parts["loc"] == found


def test_an_overlap_of_the_threshold_is_found():
    half = listed(((0, 0, 10, 5), "cat"))
    assert [detection(half, gold(CAT), threshold=bar).parts["f1"] for bar in (0.5, 0.51)] == [1, 0]


def test_repeated_boxes_count_once():
    assert detection(listed(CAT, CAT, CAT), gold(CAT)).value == 1


def test_thresholds_are_averaged():
    near = listed(((0, 0, 10, 8.2), "cat"))  # IoU 0.82
    alone = [detection(near, gold(CAT), threshold=each).value for each in VTRIUNE]
    assert detection(near, gold(CAT), threshold="average").value == pytest.approx(sum(alone) / len(VTRIUNE))
    assert detection(near, gold(CAT), threshold=[0.5, 0.9]).value == pytest.approx((alone[0] + 0) / 2)


# ------------------------------------------------------------------------------------------------ dynamic IoU


@pytest.mark.parametrize(
    ("progress", "bar"), [(0, 0.85), (0.1, 0.85), (0.1001, 0.95), (0.25, 0.95), (0.2501, 0.99), (1, 0.99), (1.5, 0.99)]
)
def test_the_dynamic_iou(progress, bar):
    assert staged(progress, DYNAMIC) == bar
    assert thresholds("dynamic", progress) == (bar,)
    assert thresholds([[0.1, 0.85], [0.25, 0.95], [1, 0.99]], progress) == (bar,)


def test_the_adapter_hands_the_progress_on():
    entry = {"use": "verifiers.boxes.grounding", "mode": "hit", "threshold": "dynamic"}
    judge = Verifiers([entry])
    answers = [Answer("[0, 0, 10, 9]", meta={"answer": RIGHT})]
    assert [judge(answers, progress=p).total.item() for p in (0.05, 0.2, 0.9)] == [1, 0, 0]
    with pytest.raises(RewardContractError, match="progress=step / steps"):
        judge(answers)


@pytest.mark.parametrize("bad", ["often", 0, 1.2, [], [0.5, "x"], [0.5, [1, 0.9]]])
def test_wrong_thresholds_say_so(bad):
    with pytest.raises(RewardContractError, match="threshold is"):
        detection("[0, 0, 1, 1]", [[0, 0, 1, 1]], threshold=bad, progress=0.5)
