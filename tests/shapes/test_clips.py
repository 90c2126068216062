"""The renderer of clips frame by frame, the tracks against their sentences, the splits against their meaning."""

import random

import pytest
import torch

from flowrl.shapes.clips import LANES, MARGIN, RADIUS, SWITCH, TINT, Tracks, compositions, draw, prompts, render
from rewards.motion import CATEGORIES, DIRECTIONS, EVENTS, FRAMES, SHAPES, SIZE, TRAVEL, Clip, parse
from rewards.shapes import BACKGROUND, COLORS
from rewards.shapes import SHAPES as ALL_SHAPES

EVERYTHING = [clip for category in CATEGORIES for wordings in compositions(category) for clip in wordings]


def test_a_drawn_actor_is_where_its_track_says_and_nowhere_when_it_is_not_shown():
    red, blue = torch.tensor(COLORS["red"]), torch.tensor(COLORS["blue"])
    xy = torch.tensor([[[[8.0, 8.0], [12.0, 8.0]], [[20.0, 24.0], [20.0, 20.0]]]])
    shown = torch.tensor([[[True, True], [True, False]]])
    video = render(Tracks(torch.tensor([[0, 1]]), xy, torch.full((1, 2), 5.0), torch.stack([red, blue])[None], shown))
    assert video.shape == (1, 2, 3, SIZE, SIZE)
    assert torch.allclose(video[0, 0, :, 8, 8], red) and torch.allclose(video[0, 0, :, 24, 20], blue)
    assert torch.allclose(video[0, 1, :, 8, 12], red) and torch.allclose(video[0, 1, :, 8, 4], torch.tensor(BACKGROUND))
    assert torch.equal(video[0, 1, :, 16:], torch.full((3, 16, SIZE), BACKGROUND))


def test_tracks_are_what_their_sentence_asks():
    tracks = draw(EVERYTHING, seed=3)
    for i, clip in enumerate(EVERYTHING):
        assert int((tracks.shape[i] >= 0).sum()) == len(clip.actors)
        for k, actor in enumerate(clip.actors):
            assert ALL_SHAPES[int(tracks.shape[i, k])] == actor.shape
            assert (tracks.rgb[i, k] - torch.tensor(COLORS[actor.color])).abs().max() <= TINT + 1e-6
            assert RADIUS[0] <= float(tracks.radius[i, k]) <= RADIUS[1]
            steps = tracks.xy[i, k].diff(dim=0)
            assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-4)  # straight, at constant speed
            shown = tracks.shown[i, k].tolist()
            if actor.does in EVENTS:
                assert not steps.any() and shown == sorted(shown, reverse=actor.does == "disappears")
                first = SWITCH[0] <= (shown if actor.does == "appears" else [not s for s in shown]).index(True)
                assert first and 3 <= sum(shown) <= FRAMES - 3
            else:
                travel = steps.sum(0)
                along = float(travel @ torch.tensor(DIRECTIONS[actor.does], dtype=torch.float32))
                low, high = TRAVEL[actor.speed]
                assert low < along < high and float(travel.norm()) == pytest.approx(along, abs=1e-4) and all(shown)


def test_actors_stay_in_the_picture_and_out_of_each_others_way():
    tracks = draw(EVERYTHING, seed=4)
    present = tracks.shape >= 0
    assert tracks.xy[present].min() >= MARGIN - 1e-4 and tracks.xy[present].max() <= SIZE - MARGIN + 1e-4
    two = present.all(1)
    apart = (tracks.xy[two, 0] - tracks.xy[two, 1]).abs().amax(-1)  # of the two axes, the one across their ways
    assert apart.min() >= LANES[1] - LANES[0] - 2.0 > 2 * RADIUS[1]


def test_a_seed_draws_the_same_clips_again():
    clips = prompts("train")[:20]
    assert all(torch.equal(a, b) for a, b in zip(draw(clips, 5), draw(clips, 5), strict=True))
    assert not torch.equal(draw(clips, 5).xy, draw(clips, 6).xy)


# ------------------------------------------------------------------------------------------------ splits


def meaning(clip: Clip) -> frozenset[object]:
    """The same for all sentences that ask for the same clips."""
    return frozenset(clip.actors)


def test_no_composition_is_in_both_splits_in_whichever_wording():
    train, held_out = prompts("train"), prompts("held_out")
    assert not {meaning(c) for c in train} & {meaning(c) for c in held_out}
    for split in (train, held_out):
        two = [meaning(c) for c in split if len(c.actors) == 2]
        assert len(two) == 2 * len(set(two))  # both wordings of a pair are in the same split


def test_the_splits_are_all_prompts_once_and_a_quarter_is_held_out():
    train, held_out = prompts("train"), prompts("held_out")
    assert set(train) | set(held_out) == set(EVERYTHING)
    assert len(train) + len(held_out) == len(EVERYTHING) == len({clip.prompt for clip in EVERYTHING})
    for category in CATEGORIES:
        held, whole = (sum(c.category == category for c in clips) for clips in (held_out, EVERYTHING))
        assert held / whole == pytest.approx(0.25, abs=0.02)


def test_every_word_is_trained_on():
    """Held out are compositions, not words."""
    actors = [actor for clip in prompts("train") for actor in clip.actors]
    assert {a.shape for a in actors} == set(SHAPES) and {a.color for a in actors} == set(COLORS)
    assert {a.does for a in actors} == {*DIRECTIONS, *EVENTS} and {a.speed for a in actors} == set(TRAVEL)


def test_every_prompt_is_parsed_back():
    assert [parse(clip.prompt) for clip in EVERYTHING] == EVERYTHING


def test_splits_do_not_depend_on_the_random_state():
    before = prompts("held_out")
    random.seed(123)
    assert prompts("held_out") == before


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown split"):
        prompts("test")
    with pytest.raises(ValueError, match="unknown category"):
        compositions("three")
