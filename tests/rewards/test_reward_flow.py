"""Flow against known shifts; the two rewards against their formulas by hand, on clips that move as they are told."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rewards import RewardError, RewardHub, Sample, traits_of
from rewards.flow import Magnitude, OpticalFlow, Spikes, magnitudes
from rewards.scorer import modules_of

SIDE = 128


def texture(seed=0, size=400):
    """Blurred noise [3,size,size] in [0,1]: something to hold on to at every place."""
    noise = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(seed))
    at = torch.arange(-8, 9).float()
    bell = torch.exp(-at.square() / 18)
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        noise = F.conv2d(noise, (bell / bell.sum()).view(shape).expand(3, 1, *_long(shape)), groups=3, padding="same")
    return ((noise[0] - noise.min()) / (noise.max() - noise.min())).clamp(0, 1)


def _long(shape):
    return tuple(17 if side == -1 else 1 for side in shape[2:])


def clip(steps, seed=0, size=SIDE, fps=8.0, cut=None):
    """A window of `size` over a texture that goes steps[f] = (x, y) whole pixels; from frame `cut` on over another."""
    worlds = [texture(seed), texture(seed + 100)]
    x, y = 120, 120
    frames = []
    for number, (dx, dy) in enumerate([(0, 0), *steps]):
        x, y = x + dx, y + dy
        frames.append(worlds[cut is not None and number >= cut][:, y : y + size, x : x + size])
    return Sample(media=torch.stack(frames), fps=fps)


def loaded(reward):
    reward.load(torch.device("cpu"), torch.float32)
    return reward


def flow_of(estimator, **options):
    flow = OpticalFlow("test", estimator, options.pop("side", SIDE), options.pop("weights", None))
    flow.load(torch.device("cpu"))
    return flow


@pytest.fixture(scope="module")
def magnitude():
    return loaded(Magnitude(side=SIDE))


@pytest.fixture(scope="module")
def spikes():
    return loaded(Spikes(side=SIDE))


@pytest.fixture(scope="module")
def raft(tmp_path_factory):
    """A random RAFT of torchvision, as the file that torchvision publishes it in."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("raft") / "raft_small.pth"
    network = raft_small(weights=None)
    torch.save(network.state_dict(), file)
    return file, network.eval()


# ------------------------------------------------------------------------------------------------ flow


@pytest.mark.parametrize("estimator, error", [("dis", 0.05), ("farneback", 0.3)])
@pytest.mark.parametrize("step", [(5, 2), (-3, 4)])
def test_a_known_shift_is_recovered(estimator, error, step):
    """A window that goes to the right sees its content go to the left; in pixels, away from the border."""
    media = clip([step]).media
    flow = flow_of(estimator)(media[:1], media[1:])
    assert flow.shape == (1, 2, SIDE, SIDE) and flow.dtype == torch.float32
    inner = flow[0, :, 16:-16, 16:-16].flatten(1)
    assert inner.median(1).values.tolist() == pytest.approx([-step[0], -step[1]], abs=error)


def test_opencv_gets_the_luma_of_the_frames():
    """Luma by hand, in numpy; a channel order that is swapped would show in the flow of a coloured clip."""
    import cv2

    media = clip([(3, 1)]).media * torch.tensor([0.2, 1.0, 0.5])[:, None, None]
    grey = [np.rint(255 * np.tensordot([0.299, 0.587, 0.114], image, 1)).astype(np.uint8) for image in media.numpy()]
    wanted = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    found = flow_of("dis")(media[:1], media[1:])[0].permute(1, 2, 0).numpy()
    assert np.abs(found - wanted).mean() < 0.01  # a byte may round the other way


def test_magnitudes_by_hand():
    """A hundred pixels: 98 still, one moves (3, 4), one (6, 8). Mean 0.15; the farthest five: 15 / 5."""
    flow = torch.zeros(1, 2, 10, 10)
    flow[0, :, 0, 0], flow[0, :, 5, 5] = torch.tensor([3.0, 4.0]), torch.tensor([-6.0, 8.0])
    assert magnitudes(flow).tolist() == pytest.approx([0.15], abs=1e-5)
    assert magnitudes(flow, "top5").tolist() == pytest.approx([3.0], abs=1e-5)


# ------------------------------------------------------------------------------------------------ magnitude


def test_magnitude_is_in_pixels_per_frame_at_the_side(magnitude):
    sample = clip([(3, 4)] * 4)
    assert magnitude.score([sample]).value.tolist() == pytest.approx([5], rel=0.05)
    doubled = loaded(Magnitude(side=2 * SIDE))
    assert doubled.score([sample]).value.tolist() == pytest.approx([10], rel=0.05)


def test_neither_resolution_nor_frame_rate_counts(magnitude):
    """The same second of video: every frame, every other one, and at twice the size."""
    full = clip([(1, 0)] * 8, fps=8.0)
    half = Sample(media=full.media[::2], fps=4.0)
    large = Sample(media=F.interpolate(full.media, scale_factor=2, mode="bilinear"), fps=8.0)
    unknown = Sample(media=full.media)
    assert magnitude.score([full, half, large, unknown]).value.tolist() == pytest.approx([1] * 4, rel=0.08)


def test_the_shorter_side_is_what_is_resized(magnitude):
    wide = clip([(0, 4)] * 2, size=SIDE)
    wide = Sample(media=torch.cat([wide.media, wide.media.flip(-1)], -1), fps=8.0)
    assert magnitude.score([wide]).value.tolist() == pytest.approx([4], rel=0.05)


def test_a_frozen_clip_does_not_move(magnitude):
    result = magnitude.score([clip([(0, 0)] * 4)])
    assert result.value.item() < 1e-5
    assert result.parts["peak"].item() < 1e-5


def test_top5_sees_a_small_object(magnitude):
    """A patch of 4 % of the picture that goes 4 pixels a frame over a background at rest."""
    frames = texture(1)[:, :SIDE, :SIDE].expand(4, 3, SIDE, SIDE).clone()
    for number, image in enumerate(frames):
        image[:, 40:66, 40 + 4 * number : 66 + 4 * number] = texture(2)[:, :26, :26]
    sample = Sample(media=frames, fps=8.0)
    assert magnitude.score([sample]).value.item() < 1
    assert loaded(Magnitude(statistic="top5", side=SIDE)).score([sample]).value.item() > 2.5


# ------------------------------------------------------------------------------------------------ spikes


def by_hand(speeds, k, floor):
    median = float(np.median(speeds))
    limit = k * max(median, floor)
    return -sum(max(0, 1 - limit / m) for m in speeds if m) / len(speeds) - max(0, 1 - median / floor)


@pytest.mark.parametrize("speeds", [(1, 1, 1), (1, 1, 9, 1), (0.1, 0.1, 4, 0.1), (0, 0, 0), (0, 8, 0, 8), (2, 3, 40)])
def test_the_formula_by_hand(speeds, monkeypatch):
    """The sum of the head, on speeds that are given; the speeds themselves are tested above."""
    reward = Spikes(k=2.5, floor=0.4)
    monkeypatch.setattr(reward, "_speeds", lambda sample, statistic: torch.tensor([float(m) for m in speeds]))
    found = reward.score([Sample(media=torch.zeros(len(speeds) + 1, 3, 8, 8))])
    assert found.value.tolist() == pytest.approx([by_hand(speeds, 2.5, 0.4)], abs=1e-5)
    assert found.value.item() == pytest.approx(-(found.parts["spike"] + found.parts["still"]).item())
    assert found.parts["speed"].item() == pytest.approx(float(np.median(speeds)))
    assert found.parts["peak"].item() == max(speeds)


def test_a_jump_cut_is_a_spike_and_steady_movement_is_none(spikes):
    steady, jump, cut = clip([(2, 1)] * 7), clip([(2, 1)] * 3 + [(40, -30)] + [(2, 1)] * 3), clip([(2, 1)] * 7, cut=4)
    found = spikes.score([steady, jump, cut])
    assert found.value[0] > -1e-3
    assert found.value[1] < -0.02 and found.value[2] < -0.02
    assert found.parts["still"].tolist() == [0, 0, 0]
    assert found.value.min() >= -1 / 7, "one step in seven costs no more than that"


def test_fast_is_not_a_spike(spikes):
    assert spikes.score([clip([(8, 6)] * 7)]).value.item() == pytest.approx(0, abs=1e-3)


def test_a_frozen_video_loses_by_the_floor_and_one_jump_does_not_help_it(spikes):
    still = (0, 0)
    frozen, nudged = clip([still] * 7), clip([still] * 3 + [(9, 0)] + [still] * 3)
    moving, jumping = clip([(2, 1)] * 7), clip([(2, 1)] * 3 + [(40, -30)] + [(2, 1)] * 3)
    scores = spikes.score([moving, jumping, frozen, nudged]).value.tolist()
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    assert scores[2] == pytest.approx(-1, abs=1e-4)


def test_below_the_floor_the_score_falls_with_the_speed_and_without_a_step():
    """The same clip at ever lower frame rates is ever slower."""
    media = clip([(1, 0)] * 4).media
    samples = [Sample(media=media, fps=fps) for fps in (8.0, 4.0, 3.0, 2.0, 1.0, 0.5)]
    scores = loaded(Spikes(side=SIDE, floor=0.5)).score(samples).value.tolist()
    assert scores == pytest.approx([0, 0, -0.25, -0.5, -0.75, -0.875], abs=0.05)


def test_too_few_frames_have_no_verdict(magnitude, spikes):
    for reward, fewest, told in ((magnitude, 2, "one frame"), (spikes, 4, "fewer than 4 frames")):
        samples = [clip([(2, 1)] * (fewest - 2)), clip([(2, 1)] * (fewest - 1))]
        found = reward.score(samples)
        assert found.value.isnan().tolist() == [True, False]
        assert told in found.info[0]["error"] and found.info[1] == {}


# ------------------------------------------------------------------------------------------------ RAFT


def test_raft_gives_the_flow_of_torchvisions_network(raft):
    file, network = raft
    media = clip([(3, 1)], size=132).media
    flow = flow_of("raft", weights=str(file))
    padded = F.pad(media, (0, 4, 0, 4), mode="replicate") * 2 - 1
    with torch.no_grad():
        wanted = network(padded[:1], padded[1:])[-1][..., :132, :132]
        torch.testing.assert_close(flow(media[:1], media[1:]), wanted)


def test_offload_finds_the_network(raft):
    reward = loaded(Magnitude(estimator="raft", weights=str(raft[0])))
    (network,) = modules_of(reward)
    assert network.state_dict().keys() == raft[1].state_dict().keys()
    reward.unload()
    assert modules_of(reward) == []


def test_with_raft_gradients_reach_the_pixels_and_with_opencv_they_are_not_promised(raft):
    reward = loaded(Magnitude(estimator="raft", side=SIDE, weights=str(raft[0])))
    assert traits_of(reward).differentiable and traits_of(reward).device is None
    assert not traits_of(Magnitude()).differentiable and traits_of(Magnitude()).device == "cpu"
    media = clip([(3, 1)]).media.requires_grad_()
    with RewardHub({"use": reward}, device="cpu") as hub:
        hub.differentiate([Sample(media=media, fps=8.0)]).total.sum().backward()
    assert media.grad.isfinite().all() and media.grad.abs().amax((1, 2, 3)).min() > 0


def test_weights_that_are_not_rafts_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"nothing.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match="are not of this network"):
        flow_of("raft", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(RewardError, match="there is no file .*missing.pth; give `weights` the path"):
        flow_of("raft", weights=str(tmp_path / "missing.pth"))


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Magnitude(estimator="raft"), "needs weights.*raft_small_C_T_V2"),
        (lambda: Magnitude(weights="raft.pth"), "estimator dis has no weights"),
        (lambda: Magnitude(estimator="lucas"), "expected dis, farneback or raft"),
        (lambda: Magnitude(statistic="max"), "expected mean or top5"),
        (lambda: Magnitude(side=64), "at least 128"),
        (lambda: Magnitude(fps=0), "fps is 0"),
        (lambda: Spikes(k=1), "above 1"),
        (lambda: Spikes(floor=0), "frozen videos win"),
    ],
)
def test_wrong_options_are_explained(make, told):
    with pytest.raises(RewardError, match=told):
        make()


def test_a_forgotten_load_and_a_missing_package_are_explained(monkeypatch):
    import sys

    with pytest.raises(RewardError, match="flow.magnitude' is not loaded"):
        Magnitude().score([clip([(1, 0)])])
    monkeypatch.setitem(sys.modules, "cv2", None)  # what Python itself does to make an import fail
    with pytest.raises(RewardError, match=r'needs OpenCV: pip install -e "\.\[video\]"'):
        loaded(Magnitude())


def test_they_are_found_by_their_names_and_refuse_images():
    with RewardHub([{"use": "flow.magnitude", "side": SIDE}, {"use": "flow.spikes", "side": SIDE}]) as hub:
        result = hub([clip([(3, 4)] * 4)])
        assert result.scores["flow.magnitude"].item() == pytest.approx(5, rel=0.05)
        assert math.isclose(result.scores["flow.spikes"].item(), 0, abs_tol=1e-3)
        with pytest.raises(RewardError, match="judges videos"):
            hub([Sample(media=torch.rand(3, SIDE, SIDE))])
