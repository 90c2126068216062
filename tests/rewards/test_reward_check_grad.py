"""The gradient probe finds what is wrong with a gradient, each kind by a reward that has that fault alone."""

import json

import pytest
import torch
import torch.nn.functional as F

from rewards import RewardContractError, RewardError, Sample, Scores, declare
from rewards.check_grad import check_grad, smooth_samples
from rewards.media import clamp
from tests.rewards.makers import noise

CHECKS = ("finite", "non-zero", "cosine", "slope", "zero pixels", "at bounds", "saturated")


def reward(value):
    """A differentiable reward whose score of one picture is `value(media)`."""

    @declare(differentiable=True)
    def made(samples):
        return torch.stack([value(sample.media) for sample in samples])

    return made


def failing(report):
    return {check.name for check in report.checks if not check.ok}


@pytest.mark.parametrize("name", ["pixel.brightness", "pixel.contrast", "pixel.redness"])
def test_statistics_of_pixels_are_right_and_compared_in_fp64(name):
    report = check_grad(name, device="cpu")
    assert report.ok and report.dtype == "float64" and report.device == "cpu"
    assert [check.name for check in report.checks] == list(CHECKS)
    assert report["cosine"].value == pytest.approx(1, abs=1e-6) and report["slope"].value == pytest.approx(1, abs=1e-4)
    assert report["zero pixels"].value == 0 and report["saturated"].value == 1


def test_a_real_network_in_fp32():
    report = check_grad("shapes_clip", device="cpu")
    assert report.ok and report.dtype == "float32" and report.samples == 2
    assert report["cosine"].value > 0.999 and report["slope"].value == pytest.approx(1, abs=0.01)
    assert report.step[0] < 1e-2  # it is steep: the largest step would say how bent it is


def test_a_detached_factor_keeps_the_direction_and_halves_the_slope():
    """x * x.detach() has the gradient x where x^2 has 2 x."""
    report = check_grad(reward(lambda x: (x * x.detach()).mean()), device="cpu")
    assert report["cosine"].value == pytest.approx(1, abs=1e-6)
    assert failing(report) == {"slope"} and report["slope"].value == pytest.approx(2, rel=1e-3)
    assert ".detach()" in report.to_markdown()


def test_a_gradient_that_points_elsewhere():
    """The score is that of red, the gradient that of green: their directions share nothing."""
    report = check_grad(reward(lambda x: x[1].mean() + (x[0] - x[1]).mean().detach()), device="cpu", directions=200)
    assert {"cosine", "slope"} <= failing(report)
    assert abs(report["cosine"].value) < 0.2 and report["slope"].value == pytest.approx(0, abs=1e-6)


def test_not_finite():
    report = check_grad(reward(lambda x: x.mean() + (x - x).norm(2).sqrt()), device="cpu")
    assert "finite" in failing(report) and report["finite"].value == 0 and "sqrt" in report["finite"].mend
    assert json.loads(report.to_json())["ok"] is False


def test_zero_everywhere():
    report = check_grad(reward(lambda x: (255 * x).round().mean()), device="cpu")
    assert {"non-zero", "zero pixels"} <= failing(report) and report["zero pixels"].value == 1
    assert not report.ok


def test_zero_for_one_sample_only():
    report = check_grad(
        reward(lambda x: F.relu(x.mean() - 0.5)), [Sample(media=torch.full((3, 8, 8), v)) for v in (0.1, 0.9)]
    )
    assert "non-zero" in failing(report) and report["non-zero"].value == 0.5


def test_pixels_that_are_cut_off_are_counted_and_no_fault():
    report = check_grad(reward(lambda x: x[..., :32, :32].mean()), device="cpu")
    assert report.ok and report["zero pixels"].value == 0.75


def test_a_hard_clamp_blocks_saturated_pixels():
    hard = check_grad(reward(lambda x: (1 + x.clamp(0, 1)).square().mean()), device="cpu")
    assert {"saturated"} <= failing(hard) <= {"saturated", "at bounds"}  # torch 2.15 blocks the bounds too, 2.5 did not
    assert hard["saturated"].value == 0
    assert "rewards.media.clamp" in hard.to_markdown()
    soft = check_grad(reward(lambda x: (1 + clamp(x)).square().mean()), device="cpu")
    assert soft.ok


def test_a_clamp_on_one_side_is_enough_and_a_natural_zero_is_none():
    one_sided = check_grad(reward(lambda x: (1 + x.clamp(min=0)).square().mean()), device="cpu")
    assert failing(one_sided) == {"saturated"} and one_sided["saturated"].value == pytest.approx(0.5, abs=0.05)
    natural = check_grad(reward(lambda x: x.square().mean()), device="cpu")
    assert natural.ok and natural["at bounds"].value == pytest.approx(0.5, abs=0.05)


def test_pixels_at_the_bounds_can_be_blocked_too():
    report = check_grad(reward(lambda x: torch.where((x > 0) & (x < 1), x, x.detach()).mean()), device="cpu")
    assert failing(report) == {"at bounds", "saturated"} and report["at bounds"].value == 0


def test_fp32_inside_is_noticed_although_the_answer_is_fp64():
    inside = reward(lambda x: x.float().square().mean().double() * 2)
    report = check_grad(inside, device="cpu")
    assert report.dtype == "float32" and report.ok


def test_a_reward_of_images_on_videos_is_compared_through_its_frames():
    """2 of 8 frames are looked at."""
    samples = smooth_samples("video")
    long = [Sample(media=torch.cat([s.media, s.media.flip(0)]), prompt=s.prompt) for s in samples]
    report = check_grad({"use": "pixel.brightness", "frames": 2}, long, device="cpu")
    assert report.ok and report.dtype == "float32" and report["zero pixels"].value == 0.75


def test_a_reward_of_videos_gets_some_made_up():
    @declare(differentiable=True, media={"video"})
    def steady(samples):
        return torch.stack([-(s.media[1:] - s.media[:-1]).square().mean() for s in samples])

    report = check_grad(steady, device="cpu")
    assert report.ok and report.dtype == "float64"


def test_own_samples_with_metadata():
    with pytest.raises(RewardError, match="needs 'reference' in the metadata.*--data"):
        check_grad("similarity.l1", device="cpu")
    samples = [noise(i, meta={"reference": noise(i + 9).media}) for i in range(3)]
    report = check_grad("similarity.l1", samples, device="cpu")
    assert report.samples == 3 and report["finite"].ok and report["non-zero"].ok
    assert check_grad("similarity.psnr", samples, device="cpu").ok


def test_samples_are_left_alone():
    samples = [noise(0)]
    before = samples[0].media.clone()
    check_grad("pixel.contrast", samples, device="cpu")
    assert torch.equal(samples[0].media, before) and samples[0].media.grad is None


def test_options_weights_and_parts_do_not_disturb():
    @declare(differentiable=True)
    def scaled(samples, factor=1.0):
        value = factor * torch.stack([s.media.mean() for s in samples])
        return Scores(value=value, parts={"half": value.detach() / 2})

    entry = {"use": scaled, "factor": 3.0, "weight": 0, "norm": "rank", "name": "mine"}
    report = check_grad(entry, device="cpu")
    assert report.ok and report.reward == "mine" and report.dtype == "float64"
    assert check_grad([entry], device="cpu") == report


def test_what_has_no_gradient_is_refused():
    with pytest.raises(RewardError, match="'pixel.jpeg_size' is not differentiable.*flowrl reward list"):
        check_grad("pixel.jpeg_size", device="cpu")
    with pytest.raises(RewardContractError, match="does not reach Sample.media"):
        check_grad(reward(lambda x: x.detach().mean()), device="cpu")
    with pytest.raises(RewardError, match="no samples are given"):
        check_grad("pixel.contrast", [], device="cpu")
    with pytest.raises(RewardError, match="one reward at a time; 2"):
        check_grad(["pixel.contrast", "pixel.redness"], device="cpu")


def test_no_verdict_is_an_error_that_says_why():
    @declare(differentiable=True)
    def picky(samples):
        value = torch.stack([s.media.mean() if s.prompt else s.media.mean() * float("nan") for s in samples])
        return Scores(value=value, info=[{} if s.prompt else {"error": "no prompt, no verdict"} for s in samples])

    with pytest.raises(RewardError, match="'picky' has no verdict on sample 1: no prompt, no verdict"):
        check_grad(picky, [noise(0), noise(1, prompt="")], device="cpu")


def test_json_and_markdown():
    report = check_grad(reward(lambda x: (255 * x).round().mean()), device="cpu")
    data = json.loads(report.to_json())
    assert data["ok"] is False and {c["name"] for c in data["checks"]} == set(CHECKS) and data["step"] == [0.01, 0.01]
    assert next(c for c in data["checks"] if c["name"] == "slope")["value"] is None
    text = report.to_markdown()
    assert text.startswith("Gradient of made on cpu: NOT ok") and "| non-zero | 0 | 1 | FAILS |" in text
    with pytest.raises(KeyError):
        report["no such check"]
