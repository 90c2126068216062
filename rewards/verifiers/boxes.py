"""Where is it? One box (grounding) or all of them (detection), by their intersection over union with the right ones.

A response lists boxes as JSON, {"bbox_2d": [x1, y1, x2, y2], "label": "dog"}, or as bare lists or tuples of four
numbers; `meta["answer"]` does the same, in pixels of the image. Boxes that a response repeats count once.

`threshold`, the IoU from which on a box is found, is a number, several (their scores are averaged), or a schedule over
the training: "dynamic", or [[until, IoU], ...] with the progress up to which, inclusive, an IoU is asked for. From a
fixed 0.99 there is nothing to learn at first; the schedule begins where there is (V-Triune, arXiv:2505.18129).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rewards.types import RewardContractError
from rewards.verifiers._assign import assign
from rewards.verifiers._geometry import Box, Scale, distinct, factors, iou, parse_boxes, right_boxes, scaled
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import NoVerdict, Verdict, verifier

DYNAMIC = ((0.10, 0.85), (0.25, 0.95), (1.0, 0.99))
"""V-Triune's schedule of the IoU."""
VTRIUNE = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
"""The thresholds over which V-Triune averages."""
_MOST_BOXES = 300

Threshold = float | Literal["dynamic", "average"] | Sequence[float] | Sequence[Sequence[float]]


@verifier(wants=("image_size", "model_size"))
def grounding(
    response: str,
    answer: Any,
    mode: Literal["iou", "hit", "above"] = "iou",
    threshold: Threshold = 0.5,
    scale: Scale = "abs",
    image_size: Sequence[float] | None = None,
    model_size: Sequence[float] | None = None,
    progress: float | None = None,
) -> Verdict:
    """How well the response's one box fits the right one; 0 for none, or for several.

    mode        iou: the IoU (VLM-R1, arXiv:2504.07615); hit: 1 from the threshold on; above: the IoU from there on
    threshold   see this file's head; several are averaged
    scale       abs, norm1000 or model_input: what the model's numbers are; the sizes come from the metadata

    Parts: iou.
    """
    if mode not in ("iou", "hit", "above"):
        raise RewardContractError(f"grounding: mode is {mode!r}; expected iou, hit or above")
    right = right_boxes(answer)
    if len(right) != 1:
        raise NoVerdict(f"the right answer has {len(right)} boxes; grounding is for one")
    bars = thresholds(threshold, progress) if mode != "iou" else ()
    given = _given(response, factors(scale, image_size, model_size))
    overlap = float(iou(given, right)[0, 0]) if given is not None and len(given) == 1 else 0.0
    worth = 1.0 if mode == "hit" else overlap
    value = overlap if mode == "iou" else worth * float(np.mean([overlap >= bar for bar in bars]))
    return Verdict(value, {"iou": overlap})


@verifier(wants=("image_size", "model_size"))
def detection(
    response: str,
    answer: Any,
    threshold: Threshold = 0.5,
    weights: Sequence[float] = (0.7, 0.0, 0.3),
    labels: bool = True,
    count_penalty: float = 1.0,
    length_factor: bool = False,
    scale: Scale = "abs",
    image_size: Sequence[float] | None = None,
    model_size: Sequence[float] | None = None,
    progress: float | None = None,
) -> Verdict:
    """How well the response's boxes are the right ones, each matched with at most one of them (VLM-R1, V-Triune).

        (w_loc loc + w_lab lab + w_comp comp) / (w_loc + w_lab + w_comp)

    Pairs are those of the largest total IoU (Hungarian method), and count from the threshold on: m of them.
    loc = sum of their IoU / |right|, lab = pairs with the same label / |right|, comp = 1 - (miss + false) / 2 with
    miss = 1 - m / |right| and false = 1 - m / |given|. 1 where there is nothing to find and nothing is given, and 0
    where only one of the two is so, or no boxes can be read.

    threshold      see this file's head; "average" is V-Triune's list of them
    weights        (w_loc, w_lab, w_comp)
    labels         a box of another label is never matched, where the right ones have labels
    count_penalty  the score is multiplied with this to the power of | |given| - |right| |; V-Triune has 0.6
    length_factor  the score is multiplied with min(1, |right| / |given|) (VLM-R1's odLength)
    scale          as in grounding

    Parts: loc, lab, comp, f1 (2 m / (|given| + |right|)); of several thresholds their means.
    """
    if len(weights) != 3 or min(weights) < 0 or sum(weights) <= 0:
        raise RewardContractError(f"detection: weights are {weights!r}; expected (loc, lab, comp), none below 0")
    right, by = distinct(right_boxes(answer)), factors(scale, image_size, model_size)
    given, bars = _given(response, by), thresholds(threshold, progress)
    if given is None or not given or not right or len(given) > _MOST_BOXES:
        value = float(given == right == [])
        return Verdict(value, dict.fromkeys(("loc", "lab", "comp", "f1"), value), {"boxes": given and len(given)})
    same = np.array([[_same_label(one, other) for other in right] for one in given])
    overlap = iou(given, right) * (same if labels else 1)
    rows, columns = (np.array(side) for side in zip(*assign(-overlap), strict=True))
    matched, agree = overlap[rows, columns], same[rows, columns]
    parts = [_score(matched[matched >= bar], agree[matched >= bar], len(given), len(right)) for bar in bars]
    means = {key: float(np.mean([part[key] for part in parts])) for key in parts[0]}
    value = float(np.dot(weights, [means["loc"], means["lab"], means["comp"]]) / sum(weights))
    value *= count_penalty ** abs(len(given) - len(right))
    if length_factor:
        value *= min(1.0, len(right) / len(given))
    return Verdict(value, means, {"boxes": len(given)})


def thresholds(threshold: Threshold, progress: float | None) -> tuple[float, ...]:
    """The IoUs that are asked for now; RewardContractError if they are no numbers in (0, 1]."""
    if threshold == "dynamic":
        threshold = DYNAMIC
    if threshold == "average":
        threshold = VTRIUNE
    listed = [threshold] if isinstance(threshold, int | float) else list(threshold)
    if listed and all(isinstance(each, Sequence) and not isinstance(each, str) for each in listed):
        listed = [staged(progress, listed)]  # type: ignore[arg-type]
    good = [each for each in listed if isinstance(each, int | float) and 0 < each <= 1]
    if not good or len(good) < len(listed):
        raise RewardContractError(
            f"threshold is {threshold!r}; expected an IoU above 0 and at most 1, a list of them, "
            "dynamic, average, or [[until, IoU], ...]"
        )
    return tuple(map(float, good))


def staged(progress: float | None, stages: Sequence[Sequence[float]]) -> float:
    """The value of the first stage (until, value) that `progress` has not left; of the last one after all of them."""
    if progress is None:
        raise RewardContractError(
            "a threshold that changes over the training needs its progress. Mend: call Verifiers(...)(answers, "
            "progress=step / steps), or give a fixed threshold"
        )
    return next((float(value) for until, value in stages if progress <= until), float(stages[-1][1]))


def _given(response: str, by: tuple[float, float]) -> list[Box] | None:
    said = answer_of(response, phrases=False)
    found = None if said is None else parse_boxes(said)
    return None if found is None else [scaled(box, by) for box in distinct(found)]


def _same_label(given: Box, right: Box) -> bool:
    if right.label is None:
        return True
    return given.label is not None and given.label.strip().casefold() == right.label.strip().casefold()


def _score(matched: np.ndarray, agree: np.ndarray, given: int, right: int) -> dict[str, float]:
    found = len(matched)
    miss, false = 1 - found / right, 1 - found / given
    return {
        "loc": float(matched.sum()) / right,
        "lab": float(agree.sum()) / right,
        "comp": 1 - (miss + false) / 2,
        "f1": 2 * found / (given + right),
    }
