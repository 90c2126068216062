"""A gradient through the total: the right one, to the pixels alone, and never NaN because of somebody else."""

import math

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, Sample, Scores, declare
from rewards.pixel import brightness, redness
from tests.rewards.makers import batch, flat, noise

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
REDNESS = torch.tensor([1.0, -0.5, -0.5])[:, None, None]


def asking(samples):
    """The samples, with media that ask for a gradient."""
    for sample in samples:
        sample.media.requires_grad_()
    return samples


def gradients(samples):
    return torch.stack([sample.media.grad for sample in samples])


@declare(differentiable=True)
def mean(samples):
    return torch.stack([sample.media.mean() for sample in samples])


@declare(differentiable=True)
def root_over(samples):
    """sqrt(m) / m: on black 0 / 0, with an infinite derivative."""
    level = torch.stack([sample.media.mean() for sample in samples])
    return level.sqrt() / level


def with_black():
    return [noise(0, 8), flat(0, 0, 0, size=8), noise(2, 8)]


def test_the_gradient_is_the_weighted_sum_of_the_rewards_own():
    """d total / d pixel = (2 / 4 luma - 0.5 redness) / (H W), by hand."""
    entries = [
        {"use": "pixel.brightness", "weight": 2.0, "norm": {"affine": [1, 4]}},
        {"use": "pixel.redness", "weight": -0.5},
    ]
    with RewardHub(entries) as hub:
        samples = asking(batch(4))
        found, plain = hub.differentiate(samples), hub(samples)
    found.total.sum().backward()
    expected = ((2 / 4) * LUMA - 0.5 * REDNESS).expand(4, 3, 32, 32) / 32**2
    torch.testing.assert_close(gradients(samples), expected, rtol=1e-5, atol=0)
    assert torch.equal(found.total, plain.total) and found.total.dtype == torch.float32
    assert list(found.scores) == ["pixel.brightness", "pixel.redness"]
    for name, score in found.scores.items():
        assert torch.equal(score, plain.scores[name]) and not score.requires_grad


def test_norm_unit_divides_by_the_range():
    with RewardHub({"use": "pixel.redness", "norm": "unit"}) as hub:
        samples = asking([noise()])
        hub.differentiate(samples).total.sum().backward()
    torch.testing.assert_close(samples[0].media.grad, (REDNESS / 2 / 32**2).expand(3, 32, 32))


def test_without_a_request_for_gradients_the_total_is_the_same_and_has_no_graph():
    with RewardHub("pixel.contrast") as hub:
        assert not hub.differentiate(batch(2)).total.requires_grad
        with torch.no_grad():
            found = hub.differentiate(asking(batch(2)))
        assert torch.equal(found.total, hub(batch(2)).total)


def test_a_reward_of_weight_zero_takes_no_part():
    def never(samples):
        raise AssertionError("asked")

    with RewardHub(["pixel.brightness", {"use": never, "weight": 0}]) as hub:
        assert list(hub.differentiate(asking([noise()])).scores) == ["pixel.brightness"]


class Unloadable:
    """Differentiable, and never to be loaded by a check."""

    differentiable = True

    def load(self, device, dtype):
        raise AssertionError("loaded")

    def score(self, samples):
        return mean(samples)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["pixel.jpeg_size"], r"'pixel.jpeg_size': it is not differentiable and has weight 1. Mend: weight: 0.*"),
        (
            [{"use": Unloadable(), "norm": "rank"}],
            r"'Unloadable': norm: rank is flat.*Mend: norm: none, unit or affine",
        ),
        ([{"use": Unloadable(), "gate": {"min": 0.3}}], r"'Unloadable': a gate is a step.*Mend: remove `gate`"),
        ([mean, {"use": Unloadable(), "weight": 0, "gate": {"min": 0.3}}], "'Unloadable': a gate is a step"),
        (
            ["pixel.jpeg_size", {"use": Unloadable(), "gate": {"min": 0}, "norm": "rank"}],
            "'pixel.jpeg_size': it is not .*'Unloadable': norm: rank.*'Unloadable': a gate",
        ),
        (["pixel.jpeg_size"], "Differentiable rewards of this package: .*pixel.brightness, pixel.contrast, pixel.red"),
    ],
)
def test_what_has_no_gradient_is_refused_at_the_start_with_every_obstacle_and_its_mend(entries, message):
    with RewardHub(entries) as hub:
        with pytest.raises(RewardError, match=message):
            hub.check_differentiable()
        with pytest.raises(RewardError, match=message):
            hub.differentiate([noise()])


def test_the_check_passes_without_loading():
    with RewardHub([{"use": Unloadable(), "norm": {"affine": [0, 2]}}, {"use": "ocr", "weight": 0}]) as hub:
        hub.check_differentiable()


def test_a_gradient_that_does_not_reach_the_pixels_is_a_broken_promise():
    weight = torch.ones(1, requires_grad=True)

    @declare(differentiable=True, name="detached")
    def detached(samples):
        return torch.stack([sample.media.detach().mean() for sample in samples])

    @declare(differentiable=True, name="its own")
    def its_own(samples):
        return weight * torch.stack([sample.media.detach().mean() for sample in samples])

    @declare(differentiable=True, name="muted")
    @torch.no_grad()
    def muted(samples):
        return mean(samples)

    for reward in (detached, its_own, muted):
        with (
            RewardHub(reward) as hub,
            pytest.raises(RewardContractError, match="does not reach Sample.media. Mend") as e,
        ):
            hub.differentiate(asking(batch(2)))
        assert f"reward {reward.name!r}" in str(e.value)


def test_weights_of_a_reward_are_frozen_wherever_they_hide_and_stay_in_the_graph():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4), torch.nn.SiLU())

    @declare(differentiable=True)
    def judge(images, prompts):
        return network(images).sum(1)

    samples, plain = asking([noise(s, 8) for s in range(3)]), asking([noise(s, 8) for s in range(3)])
    judge(torch.stack([s.media for s in plain]), []).sum().backward()
    network.zero_grad()
    with RewardHub(judge) as hub:
        hub.differentiate(samples).total.sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    torch.testing.assert_close(gradients(samples), gradients(plain))


def test_what_lies_upstream_of_the_media_is_the_callers_and_learns():
    theta = torch.tensor(0.5, requires_grad=True)
    with RewardHub(mean) as hub:
        hub.differentiate([Sample(media=theta * noise(s).media) for s in range(2)]).total.sum().backward()
    assert theta.requires_grad
    torch.testing.assert_close(theta.grad, sum(noise(s).media.mean() for s in range(2)))


def test_a_sample_without_a_verdict_does_not_poison_the_others():
    """Its own derivative is infinite: without care it is NaN, in the shared weight too."""
    theta = torch.tensor(1.0, requires_grad=True)
    (poisoned,) = torch.autograd.grad(
        root_over([Sample(media=theta * s.media) for s in with_black()])[[0, 2]].sum(), theta
    )
    assert poisoned.isnan()
    (wanted,) = torch.autograd.grad(root_over([Sample(media=theta * s.media) for s in with_black()[::2]]).sum(), theta)
    with RewardHub(root_over) as hub:
        found = hub.differentiate([Sample(media=theta * sample.media) for sample in with_black()])
    assert found.total.isnan().tolist() == [False, True, False]
    assert "NaN" in found.info[1]["root_over"]["error"]
    found.total[~found.total.isnan()].sum().backward()
    torch.testing.assert_close(theta.grad, wanted)


def test_under_renormalise_the_other_reward_still_teaches_that_sample():
    """Weights 1 and 3: alone, brightness stands in with all of 4."""
    with RewardHub([root_over, {"use": "pixel.brightness", "weight": 3.0}], renormalise=True) as hub:
        samples = asking(with_black())
        found = hub.differentiate(samples)
    found.total.sum().backward()
    assert found.total.isfinite().all()
    torch.testing.assert_close(samples[1].media.grad, (4 * LUMA / 8**2).expand(3, 8, 8))
    assert gradients(samples).isfinite().all()


def test_broken_pixels_and_failures_are_missing_verdicts_with_their_reason():
    @declare(differentiable=True)
    def picky(samples):
        if any(sample.prompt == "prompt 1" for sample in samples):
            raise ValueError("no face")
        return mean(samples)

    samples = batch(4)
    samples[2].media[0, 0, 0] = math.nan
    with RewardHub(picky) as hub, pytest.warns(UserWarning, match="no face"):
        found = hub.differentiate(asking(samples))
    assert found.total.isnan().tolist() == [False, True, True, False]
    assert [entry["picky"].get("error") for entry in found.info] == [
        None, "ValueError: no face", "media has pixels that are NaN or infinite", None,
    ]  # fmt: skip
    found.total.nansum().backward()
    for row in (0, 3):
        torch.testing.assert_close(samples[row].media.grad, torch.full((3, 32, 32), 1 / (3 * 32**2)))
    assert samples[1].media.grad is None or samples[1].media.grad.count_nonzero() == 0


def test_a_batch_without_any_verdict_needs_no_graph():
    with RewardHub(declare(differentiable=True, name="mute")(lambda samples: [None] * len(samples))) as hub:
        assert hub.differentiate(asking(batch(2))).total.isnan().all()


def test_infinity_is_no_verdict_and_sends_no_gradient():
    @declare(differentiable=True, name="log")
    def log(samples):
        return mean(samples).log()

    samples = asking(with_black())
    with RewardHub(log) as hub:
        found = hub.differentiate(samples)
    assert found.total.isnan().tolist() == [False, True, False]
    found.total.nansum().backward()
    assert samples[1].media.grad.count_nonzero() == 0 and gradients(samples).isfinite().all()


def test_a_video_is_judged_by_frames_and_only_these_get_a_gradient():
    """4 of 8 frames: 1, 3, 5, 7, a quarter each."""
    samples = asking([noise(frames=8)])
    with RewardHub("pixel.brightness") as hub:
        found = hub.differentiate(samples)
        assert torch.equal(found.total, hub(samples).total)
    found.total.sum().backward()
    expected = torch.zeros(8, 3, 32, 32)
    expected[1::2] = LUMA / 32**2 / 4
    torch.testing.assert_close(samples[0].media.grad, expected)


def test_batches_are_cut_and_change_no_gradient():
    sizes = []

    @declare(differentiable=True)
    def squares(images, prompts):
        sizes.append(len(images))
        return images.square().mean((1, 2, 3))

    whole, cut = asking(batch(5)), asking(batch(5))
    with RewardHub(squares) as hub:
        hub.differentiate(whole).total.sum().backward()
    with RewardHub({"use": squares, "batch_size": 2}) as hub:
        hub.differentiate(cut).total.sum().backward()
    assert sizes == [5, 2, 2, 1]
    assert torch.equal(gradients(whole), gradients(cut))


def test_media_of_different_sizes_keep_their_graphs_in_a_function_of_columns():
    @declare(differentiable=True)
    def squares(images, prompts):
        return images.square().mean((1, 2, 3))

    samples = asking([noise(0, 8), noise(1, 16)])
    with RewardHub(squares) as hub:
        hub.differentiate(samples).total.sum().backward()
    for sample in samples:
        torch.testing.assert_close(sample.media.grad, 2 * sample.media.detach() / sample.media.numel())


def test_half_precision_media_get_a_total_and_a_verdict_in_full_precision():
    media = noise().media.to(torch.bfloat16).requires_grad_()
    with RewardHub("pixel.brightness") as hub:
        found = hub.differentiate([Sample(media=media)])
    found.total.sum().backward()
    assert found.total.dtype == torch.float32 and media.grad.dtype == torch.bfloat16
    torch.testing.assert_close(media.grad.float(), (LUMA / 32**2).expand(3, 32, 32), rtol=2**-8, atol=0)


def test_remembered_verdicts_have_no_gradient_and_are_not_used():
    with RewardHub({"use": "pixel.brightness", "cache": 10}) as hub:
        samples = asking(batch(2))
        hub(samples)
        assert hub.differentiate(samples).total.requires_grad


def test_parts_are_for_the_log():
    @declare(differentiable=True)
    def parted(samples):
        return Scores(value=brightness(samples), parts={"redness": redness(samples)})

    samples = asking(batch(2))
    with RewardHub(parted) as hub:
        found = hub.differentiate(samples)
    assert not found.parts["parted"]["redness"].requires_grad
    torch.testing.assert_close(found.parts["parted"]["redness"], redness(samples).detach())


def test_out_of_memory_with_a_graph_stops_and_leaves_the_batch_size_alone():
    sizes = []

    @declare(differentiable=True)
    def greedy(samples):
        sizes.append(len(samples))
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no")
        return mean(samples)

    with RewardHub(greedy) as hub:
        with pytest.raises(RewardError, match="with a graph through 4 samples. Mend: differentiate fewer"):
            hub.differentiate(asking(batch(4)))
        hub(batch(4))
    assert sizes == [4, 4]


def test_no_samples():
    with RewardHub("pixel.brightness") as hub:
        assert hub.differentiate([]).total.shape == (0,)


class Pair:
    """Image and text features of four numbers, by fixed random projections; the image's has a weight to freeze."""

    differentiable = True

    def load(self, device, dtype):
        generator = torch.Generator().manual_seed(0)
        self.image = torch.nn.Parameter(torch.randn(4, 3 * 8 * 8, generator=generator))
        self.scale = 7.0

    def image_features(self, media):
        return torch.nn.functional.normalize(torch.tanh(media.flatten(1) @ self.image.T), dim=1)

    def text_features(self, texts):
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def score(self, samples):
        images = self.image_features(torch.stack([sample.media for sample in samples]))
        return (images * self.text_features([sample.prompt for sample in samples])).sum(1)


def test_features_come_from_the_one_weighted_reward_that_has_them():
    reward = Pair()
    entries = [{"use": reward, "name": "mine", "batch_size": 2}, "pixel.redness", {"use": Pair(), "weight": 0}]
    with RewardHub(entries) as hub:
        embedder = hub.embedder()
        assert embedder.name == "mine" and not hasattr(reward, "image")  # not loaded yet
        media = torch.rand(5, 3, 8, 8, requires_grad=True)
        features = embedder.image_features(media)
        assert embedder.scale == 7.0
        texts = embedder.text_features(["a", "b", "c"])
    torch.testing.assert_close(features, reward.image_features(media))
    assert texts.shape == (3, 4) and not texts.requires_grad
    features[:, 0].sum().backward()
    assert media.grad.abs().amax((1, 2, 3)).min() > 0
    assert not reward.image.requires_grad and reward.image.grad is None


def test_features_of_a_video_are_the_mean_of_its_frames():
    with RewardHub({"use": Pair(), "frames": 2}) as hub:
        embedder, video = hub.embedder(), torch.rand(3, 4, 3, 8, 8)
        expected = (embedder.image_features(video[:, 1]) + embedder.image_features(video[:, 3])) / 2
        torch.testing.assert_close(embedder.image_features(video), expected)
        torch.testing.assert_close(embedder.image_features(video[:, :1]), embedder.image_features(video[:, 0]))


class Half(Pair):
    """Without texts."""

    text_features = None


class Flat(Pair):
    """Features of the whole batch in one row, and no graph."""

    def image_features(self, media):
        return super().image_features(media).detach()

    def text_features(self, texts):
        return super().text_features(texts).mean(0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [Half(), "pixel.brightness"],
            "'Half' has no text_features; 'pixel.brightness' has no image_features and no text_features. Mend",
        ),
        ([Pair(), {"use": Pair(), "name": "other"}], "several rewards .*: 'Pair', 'other'. Give all but one weight: 0"),
    ],
)
def test_none_or_several_rewards_with_features_are_refused(entries, message):
    with RewardHub(entries) as hub, pytest.raises(RewardError, match=message):
        hub.embedder()


def test_features_that_break_the_contract_are_refused():
    with RewardHub(Flat()) as hub:
        embedder = hub.embedder()
        with pytest.raises(
            RewardContractError, match=r"text_features returned Tensor \[4\]; expected a tensor \[2, D\]"
        ):
            embedder.text_features(["a", "b"])
        with pytest.raises(RewardContractError, match="reward 'Flat' .* does not reach Sample.media"):
            embedder.image_features(torch.rand(1, 3, 8, 8, requires_grad=True))
