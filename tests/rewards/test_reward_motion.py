"""The checker of the moving world against clips whose truth is known: drawn, spoilt, and judged by their numbers."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from flowrl.shapes.clips import Tracks as Drawn
from flowrl.shapes.clips import compositions, draw, render
from rewards import RewardError, RewardHub, Sample
from rewards.motion import (
    CATEGORIES,
    DIRECTIONS,
    EVENTS,
    FRAMES,
    LEVELS,
    SHAPES,
    SIZE,
    TRAVEL,
    Actor,
    Clip,
    Motion,
    _motion,
    colors_of,
    judge,
    parse,
    track,
)
from rewards.shapes import BACKGROUND, COLORS
from rewards.shapes import SHAPES as ALL_SHAPES

EVERYTHING = [clip for category in CATEGORIES for wordings in compositions(category) for clip in wordings]


def asked(prompt: str) -> Clip:
    clip = parse(prompt)
    assert clip is not None, prompt
    return clip


def verdict(video: Tensor, prompt: str, level: str = "default") -> dict[str, float]:
    """All scores of one clip [F,3,32,32]."""
    clip = asked(prompt)
    return {k: float(v) for k, v in judge(track(video[None], colors_of([clip])), [clip], level)._asdict().items()}


def one(*actors: tuple[str, str, list[tuple[float, float] | None]], radius: float = 4.8) -> Tensor:
    """A clip [F,3,32,32] of actors (shape, colour, centre in every frame or None)."""
    frames = len(actors[0][2])
    xy, shown = torch.zeros(1, len(actors), frames, 2), torch.zeros(1, len(actors), frames, dtype=torch.bool)
    for k, (_, _, path) in enumerate(actors):
        for f, place in enumerate(path):
            if place is not None:
                xy[0, k, f], shown[0, k, f] = torch.tensor(place), True
    shape = torch.tensor([[ALL_SHAPES.index(s) for s, _, _ in actors]])
    rgb = torch.tensor([[COLORS[c] for _, c, _ in actors]])
    return render(Drawn(shape, xy, torch.full(shape.shape, radius), rgb, shown))[0]


def line(x: float, y: float, dx: float = 0.0, dy: float = 0.0, frames: int = FRAMES) -> list[tuple[float, float]]:
    """Centres from (x, y) to (x + dx, y + dy)."""
    return [(x + dx * i / (frames - 1), y + dy * i / (frames - 1)) for i in range(frames)]


# ------------------------------------------------------------------------------------------------ grammar


@pytest.mark.parametrize(
    ("prompt", "clip"),
    [
        ("A red circle moves left.", Clip("move", (Actor("circle", "red", "left"),))),
        ("a  blue triangle moves up   fast", Clip("speed", (Actor("triangle", "blue", "up", "fast"),))),
        ("a green triangle disappears", Clip("event", (Actor("triangle", "green", "disappears"),))),
        (
            "a red circle moves left and a blue triangle appears",
            Clip("two", (Actor("circle", "red", "left"), Actor("triangle", "blue", "appears"))),
        ),
    ],
)
def test_sentences_are_read(prompt, clip):
    assert parse(prompt) == clip


@pytest.mark.parametrize(
    "prompt",
    ["", "a red circle", "a red square moves left", "a red circle moves", "a circle moves left",
     "a red circle appears fast", "a red circle moves left and a red triangle moves up", "a red circle moves left and",
     "two red circles move left"],
)  # fmt: skip
def test_other_sentences_are_not(prompt):
    assert parse(prompt) is None


# ------------------------------------------------------------------------------------------------ drawn clips


def doing(drawn: Drawn, i: int) -> set[tuple[str, str, str, bool]]:
    """What the actors of a drawn clip do, read from its numbers: shape, colour, verb, and whether it goes far."""
    found = set()
    for k in range(drawn.shape.shape[1]):
        if int(drawn.shape[i, k]) >= 0:
            rgb = drawn.rgb[i, k].tolist()
            color = min(COLORS, key=lambda name: math.dist(COLORS[name], rgb))
            shown = drawn.shown[i, k].tolist()
            dx, dy = (drawn.xy[i, k, -1] - drawn.xy[i, k, 0]).tolist()
            if not all(shown):
                does = "appears" if shown[-1] else "disappears"
            else:
                does = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
            found.add((ALL_SHAPES[int(drawn.shape[i, k])], color, does, math.hypot(dx, dy) > 10.5))
    return found


def is_true(clip: Clip, actors: set[tuple[str, str, str, bool]]) -> bool:
    """Whether what is drawn is exactly what is asked, by words."""
    open_speed = {(shape, color, does) for shape, color, does, _ in actors}
    wanted = {(a.shape, a.color, a.does) for a in clip.actors}
    speeds = {(a.shape, a.color, a.does, a.speed == "fast") for a in clip.actors if a.speed}
    return open_speed == wanted and speeds <= actors


@pytest.mark.parametrize("level", LEVELS)
def test_drawn_clips_are_right_for_their_own_sentence_and_for_no_other(level):
    """Every sentence once with its own clip; then with clips of sentences that differ from it in one or more words."""
    drawn = draw(EVERYTHING, seed=1)
    video = render(drawn)
    own = judge(track(video, colors_of(EVERYTHING)), EVERYTHING, level)
    assert own.strict.min() == 1 and own.soft.min() == 1
    near = random.Random(0).sample(range(len(EVERYTHING)), 700)
    others = [random.Random(i).choice(siblings(EVERYTHING[i])) for i in near]
    found = judge(track(video[near], colors_of(others)), others, level)
    truth = torch.tensor([is_true(clip, doing(drawn, i)) for i, clip in zip(near, others, strict=True)])
    assert torch.equal(found.strict == 1, truth)
    assert 0 < int(truth.sum()) < 100
    assert found.soft[~truth].max() < 0.97


def siblings(clip: Clip) -> list[Clip]:
    """The sentences that differ from one in the first actor alone."""
    rest = clip.actors[1:]
    actor = clip.actors[0]
    verbs = EVENTS if actor.does in EVENTS else DIRECTIONS
    speeds = [None] if actor.does in EVENTS else list(TRAVEL)
    firsts = [Actor(s, c, d, v) for s in SHAPES for c in COLORS for d in verbs for v in speeds]
    taken = {a.color for a in rest}
    changed = [f for f in firsts if f != actor and f.color not in taken]
    one_word = [f for f in changed if (f.shape == actor.shape) + (f.color == actor.color) + (f.does == actor.does) >= 2]
    return [Clip(clip.category, (first, *rest)) for first in one_word]


def test_an_independent_tracker_finds_the_same_centres_and_ways():
    """Against numpy: the centre of the pixels that are not background, and polyfit."""
    clips = compositions("speed")
    chosen = [wordings[0] for wordings in clips[:40]]
    drawn = draw(chosen, seed=2)
    video = render(drawn)
    found = track(video, colors_of(chosen))
    axis = np.arange(SIZE) + 0.5
    weight = 1 - (video - BACKGROUND).abs().sum(2).eq(0).double().numpy()
    weight = weight * np.abs(video.numpy() - BACKGROUND).sum(2)
    x = (weight.sum(2) * axis).sum(-1) / weight.sum((2, 3))
    y = (weight.sum(3) * axis).sum(-1) / weight.sum((2, 3))
    torch.testing.assert_close(found.xy[:, 0], torch.tensor(np.stack([x, y], -1)).float(), atol=0.1, rtol=0)
    travel, wobble = _motion(found.xy[:, 0], torch.ones(len(chosen), FRAMES))
    for i in range(len(chosen)):
        fits = [np.polyfit(np.arange(FRAMES), v[i], 1, full=True) for v in (x, y)]
        expected = [fit[0][0] * (FRAMES - 1) for fit in fits]
        assert travel[i].tolist() == pytest.approx(expected, abs=0.1)
        rest = math.sqrt(sum(float(fit[1].sum()) for fit in fits) / FRAMES)
        assert float(wobble[i]) == pytest.approx(rest, abs=0.05)


def test_frames_where_nothing_is_seen_do_not_count_for_the_way():
    xy = torch.tensor([[[5.0, 9.0], [16.0, 16.0], [9.0, 9.0], [11.0, 9.0]]])
    travel, wobble = _motion(xy, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    assert travel[0].tolist() == pytest.approx([6.0, 0.0], abs=1e-4) and float(wobble) == pytest.approx(0, abs=1e-3)


# ------------------------------------------------------------------------------------------------ partial credit


def test_credit_for_the_way_grows_with_every_step_towards_it():
    """A circle that goes 16, 8, 4, 2, 0 pixels to the right, or some to the left."""
    scores = [verdict(one(("circle", "red", line(16 - d / 2, 16, d))), "a red circle moves right fast")
              for d in (-16, -8, -2, 0, 2, 4, 8, 16)]  # fmt: skip
    soft = [s["soft"] for s in scores]
    assert soft == sorted(soft) and all(a < b for a, b in zip(soft, soft[1:], strict=False)) and soft[-1] == 1
    assert [s["strict"] for s in scores] == [0.0] * 7 + [1.0]


def test_direction_speed_and_straightness_are_each_needed():
    fast, slow = line(8, 16, 16), line(13, 16, 6)
    assert verdict(one(("circle", "red", fast)), "a red circle moves right fast")["strict"] == 1
    assert verdict(one(("circle", "red", fast)), "a red circle moves right slowly")["strict"] == 0
    assert verdict(one(("circle", "red", slow)), "a red circle moves right slowly")["strict"] == 1
    assert verdict(one(("circle", "red", slow)), "a red circle moves right fast")["strict"] == 0
    assert verdict(one(("circle", "red", slow)), "a red circle moves right")["strict"] == 1
    slanted = one(("circle", "red", line(8, 10, 14, 12)))
    assert verdict(slanted, "a red circle moves right")["strict"] == 0
    zigzag = [(x, y + 3 * (-1) ** i) for i, (x, y) in enumerate(fast)]
    assert verdict(one(("circle", "red", zigzag)), "a red circle moves right")["strict"] == 0
    assert verdict(one(("circle", "red", fast[::-1])), "a red circle moves right")["strict"] == 0


def test_an_actor_that_is_missing_for_a_frame_is_not_right_but_nearly():
    gap = [*line(8, 16, 16)]
    gap[4] = None
    score = verdict(one(("circle", "red", gap)), "a red circle moves right")
    assert score["strict"] == 0 and score["shown"] == pytest.approx(8 / 9, abs=1e-3) and score["way"] == 1


@pytest.mark.parametrize(("does", "other"), [("appears", "disappears"), ("disappears", "appears")])
def test_events_need_their_order_and_stillness(does, other):
    there = line(16, 16)
    path = [place if (i >= 4) == (does == "appears") else None for i, place in enumerate(there)]
    video = one(("triangle", "green", path))
    assert verdict(video, f"a green triangle {does}")["soft"] == 1
    wrong = verdict(video, f"a green triangle {other}")
    assert wrong["strict"] == 0 and wrong["shown"] <= 5 / 9
    assert verdict(one(("triangle", "green", there)), f"a green triangle {does}")["strict"] == 0
    blinking = [None if i in (4, 5) else place for i, place in enumerate(there)]
    assert verdict(one(("triangle", "green", blinking)), f"a green triangle {does}")["strict"] == 0
    drifting = [place if path[i] else None for i, place in enumerate(line(8, 16, 16))]
    assert verdict(one(("triangle", "green", drifting)), f"a green triangle {does}")["strict"] == 0


def test_what_nobody_asked_for_costs():
    right = ("circle", "red", line(8, 8, 16))
    alone, crowded = one(right), one(right, ("triangle", "blue", line(16, 24)))
    twice = one(right, ("circle", "red", line(8, 24, 16)))
    good, bad, double = (verdict(video, "a red circle moves right") for video in (alone, crowded, twice))
    assert good["strict"] == 1 and bad["strict"] == 0 and double["strict"] == 0
    assert bad["clean"] < 0.5 and double["soft"] < bad["soft"] < good["soft"] == 1


def test_two_actors_share_the_credit():
    video = one(("circle", "red", line(8, 8, 16)), ("triangle", "blue", line(24, 24, -16)))
    both = verdict(video, "a red circle moves right and a blue triangle moves left")
    half = verdict(video, "a red circle moves right and a blue triangle moves right")
    assert both["strict"] == both["soft"] == 1 and half["strict"] == 0 and 0.5 < half["soft"] < 0.8


def test_the_order_of_the_words_does_not_matter():
    video = one(("circle", "red", line(8, 8, 16)), ("triangle", "blue", line(24, 24, -16)))
    video = (video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    first = verdict(video, "a red circle moves right and a blue triangle moves left")
    again = verdict(video, "a blue triangle moves left and a red circle moves right")
    assert first == pytest.approx(again, abs=1e-5)


def test_stricter_refuses_dirt_that_default_lets_pass():
    clean = one(("circle", "red", line(8, 16, 16)))
    grain = clean + 0.045 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    prompt = "a red circle moves right"
    assert verdict(clean, prompt, "stricter")["strict"] == 1
    assert verdict(grain, prompt)["strict"] == 1 and verdict(grain, prompt, "stricter")["strict"] == 0
    dirty = clean + 0.15 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert verdict(dirty, prompt)["strict"] == 0 and verdict(dirty, prompt)["soft"] < 0.8


# ------------------------------------------------------------------------------------------------ reward


def samples() -> list[Sample]:
    """Clips of several lengths and sizes, each right for its prompt."""
    short = one(("circle", "red", line(8, 16, 16, frames=5)))
    large = one(("triangle", "blue", line(16, 24, 0, -16))).repeat_interleave(4, -1).repeat_interleave(4, -2)
    two = one(("circle", "red", line(8, 8, 16)), ("triangle", "blue", line(24, 24, -16)))
    return [
        Sample(media=short, prompt="a red circle moves right fast"),
        Sample(media=large, prompt="a blue triangle moves up"),
        Sample(media=two, prompt="a red circle moves right and a blue triangle moves left"),
    ]


def test_the_reward_scores_clips_of_every_length_and_size():
    result = RewardHub("motion", device="cpu")(samples())
    assert result.total.tolist() == [1.0, 1.0, 1.0]
    scores = Motion().score(samples())
    assert set(scores.parts) == {"strict", "soft", "shown", "look", "way", "clean", "stricter"}
    assert all(torch.equal(part, torch.ones(3)) for part in scores.parts.values())


def test_blank_clips_score_nothing():
    blank = torch.full((FRAMES, 3, SIZE, SIZE), BACKGROUND)
    for clip in (compositions(category)[0][0] for category in CATEGORIES):
        score = verdict(blank, clip.prompt)
        assert score["strict"] == 0 and score["soft"] <= (0.2 if clip.category == "event" else 0)


def test_there_is_no_verdict_without_a_sentence_a_second_frame_or_finite_pixels():
    good = samples()[2]
    broken = good.media.clone()
    broken[3, 0, 5, 5] = math.nan
    asked_of = [good, Sample(media=good.media, prompt="a red circle"), Sample(media=good.media[:1], prompt=good.prompt)]
    scores = Motion().score([*asked_of, Sample(media=broken, prompt=good.prompt)])
    assert scores.value[0] == 1 and scores.value[1:].isnan().all()
    assert [bool(info.get("error")) for info in scores.info] == [False, True, True, True]


@pytest.mark.parametrize("options", [{"score": "hard"}, {"level": "none"}, {"clean": 2.0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(RewardError, match=f"motion: {next(iter(options))}"):
        Motion(**options)


def test_score_strict_trains_on_the_strict_score():
    soft, strict = Motion().score(samples()), Motion(score="strict").score(samples())
    assert torch.equal(strict.value, soft.parts["strict"])
