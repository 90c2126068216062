"""The formula by brute force, pixel by pixel; the reward on clips that hang together and on clips that do not."""

import pytest
import torch

from rewards import RewardError, RewardHub, Sample
from rewards.flow import OpticalFlow
from rewards.temporal_consistency import TemporalConsistency, agreement, warp
from tests.rewards.makers import noise
from tests.rewards.test_reward_flow import SIDE, clip, flow_of


@pytest.fixture(scope="module")
def reward():
    made = TemporalConsistency(side=SIDE)
    made.load(torch.device("cpu"), torch.float32)
    return made


def smooth_flow(seed, height, width, scale):
    """A flow [1,2,H,W] that changes little from pixel to pixel."""
    coarse = scale * torch.randn((1, 2, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


# ------------------------------------------------------------------------------------------------ formula


def bilinear(image, x, y):
    """image [C,H,W] at one place within it, by the four pixels around."""
    height, width = image.shape[-2:]
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    u, v = x - left, y - top
    upper = (1 - u) * image[:, top, left] + u * image[:, top, left + 1]
    lower = (1 - u) * image[:, top + 1, left] + u * image[:, top + 1, left + 1]
    return (1 - v) * upper + v * lower


def agreement_by_hand(a, b, f, g):
    height, width = a.shape[-2:]
    inside = visible = 0
    alike = error = 0.0
    for y in range(height):
        for x in range(width):
            there = (x + f[0, y, x].item(), y + f[1, y, x].item())
            if not (0 <= there[0] <= width - 1 and 0 <= there[1] <= height - 1):
                continue
            inside += 1
            back = bilinear(g, *there)
            limit = 0.01 * (f[:, y, x].square().sum() + back.square().sum()) + 0.5
            if (f[:, y, x] + back).square().sum() < limit:
                visible += 1
                distance = (a[:, y, x] - bilinear(b, *there)).abs().mean().item()
                alike, error = alike + 1 - distance, error + distance
    pixels = height * width
    return alike / max(inside, pixels / 2), error / visible, visible / pixels


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.0])
def test_agreement_is_the_formula_pixel_by_pixel(scale):
    """Small flows, flows that are visible in part, and flows of which most leave the picture."""
    a, b = torch.rand((2, 1, 3, 12, 16), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f, g = smooth_flow(2, 12, 16, scale), -smooth_flow(2, 12, 16, scale) + smooth_flow(3, 12, 16, 0.3)
    found = agreement(a, b, f, g)
    score, error, visible = agreement_by_hand(a[0], b[0], f[0], g[0])
    assert 0 < visible < 1
    assert [x.item() for x in found] == pytest.approx([score, error, visible])


def test_a_warp_by_whole_pixels_is_a_shift():
    frames = noise(size=10, frames=2).media
    flow = torch.tensor([3.0, -2.0])[None, :, None, None].expand(2, 2, 10, 10)
    moved, inside = warp(frames, flow)
    assert inside[0, 2:, :7].all() and inside.sum() == 2 * 8 * 7
    torch.testing.assert_close(moved[:, :, 2:, :7], frames[:, :, :8, 3:])


def test_sending_pixels_out_of_the_picture_does_not_pay():
    """One column stays and agrees perfectly: 1 / 8 of the picture, so at most 1/4 of the score."""
    frames = torch.full((1, 3, 8, 8), 0.5)
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0, :, 1:] = 100
    assert agreement(frames, frames, flow, torch.zeros(1, 2, 8, 8)).score.item() == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------------ reward


def test_a_translated_texture_is_consistent_and_shuffled_frames_are_not(reward):
    moving = clip([(6, 4)] * 7)
    shuffled = Sample(media=moving.media[[0, 5, 2, 7, 1, 4, 6, 3]], fps=8.0)
    strangers = Sample(media=torch.cat([clip([(0, 0)], seed=seed).media[:1] for seed in range(4)]), fps=8.0)
    found = reward.score([moving, shuffled, strangers, noise(size=SIDE, frames=6)])
    assert found.value[0] > 0.93
    assert found.value[1] < 0.8
    assert found.value[2:].max() < 0.5
    assert found.parts["visible"][0] > 0.85 and found.parts["error"][0] < 0.03
    assert found.parts["speed"][0].item() == pytest.approx(52**0.5, rel=0.05)


def test_a_frozen_clip_is_perfect_and_its_speed_says_that_it_is_frozen(reward):
    frozen, moving = reward.score([clip([(0, 0)] * 4)]), reward.score([clip([(3, 4)] * 4)])
    assert frozen.value.item() == pytest.approx(1)
    assert frozen.parts["speed"].item() < 1e-4 and moving.parts["speed"].item() == pytest.approx(5, rel=0.05)


def test_flicker_and_a_jump_cut_cost(reward):
    steady = clip([(2, 1)] * 7)
    light = torch.tensor([1.0, 0.9] * 4)[:, None, None, None]
    flicker, cut = Sample(media=steady.media * light, fps=8.0), clip([(2, 1)] * 7, cut=4)
    scores = reward.score([steady, flicker, cut]).value.tolist()
    assert scores[0] > max(scores[1:]) + 0.03


def test_gradients_are_those_of_finite_differences_with_the_flow_held(reward):
    """DIS sees bytes and has no gradient; warp and distance do. In float64, along a random direction.

    The light goes down, so that no pixel agrees exactly: |x| has no gradient at 0.
    """
    media = clip([(2, 1)] * 2).media.double() * torch.tensor([1.0, 0.9, 0.8])[:, None, None, None]
    first, second = media[:-1], media[1:]
    flow = OpticalFlow("test", "dis", SIDE, None)
    flow.load(torch.device("cpu"))
    forward, backward = (flow(a.float(), b.float()).double() for a, b in ((first, second), (second, first)))

    def score(clip):
        return agreement(clip[:-1], clip[1:], forward, backward).score.mean()

    direction = torch.randn(media.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = media.clone().requires_grad_()
    score(leaf).backward()
    step = 1e-7
    slope = (score(media + step * direction) - score(media - step * direction)) / (2 * step)
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3)

    asked = media.float().requires_grad_()
    reward.score([Sample(media=asked, fps=8.0)]).value.sum().backward()
    torch.testing.assert_close(asked.grad, leaf.grad.float(), rtol=1e-3, atol=1e-7)


def test_one_frame_has_no_verdict(reward):
    found = reward.score([clip([]), clip([(1, 1)])])
    assert found.value.isnan().tolist() == [True, False]
    assert found.info[0]["error"] == "one frame has no neighbour"


def test_wrong_options_are_explained():
    with pytest.raises(RewardError, match="temporal_consistency: estimator is 'x'"):
        TemporalConsistency(estimator="x")
    with pytest.raises(RewardError, match="fps is -1"):
        TemporalConsistency(fps=-1)
    with pytest.raises(RewardError, match="temporal_consistency' is not loaded"):
        TemporalConsistency().score([clip([(1, 1)])])


def test_both_directions_of_the_flow_are_asked_for():
    """Backwards the content moves the other way."""
    media = clip([(4, -2)]).media
    flow = flow_of("dis")
    there, back = flow(media[:1], media[1:]), flow(media[1:], media[:1])
    centre = (slice(None), slice(None), slice(32, -32), slice(32, -32))
    assert (there + back)[centre].abs().mean() < 0.05


def test_the_hub_finds_it():
    with RewardHub({"use": "temporal_consistency", "side": SIDE}) as hub:
        assert hub([clip([(3, 2)] * 3)]).total.item() > 0.9
