"""SSIM against a brute force over windows, the others in closed form; references from tensors and files."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardHub, Sample
from rewards.media import to_pil
from rewards.similarity import l1, psnr, ssim, structural_similarity
from tests.rewards.makers import flat, noise

REWARDS = [ssim, psnr, l1]


FOLDER = tempfile.TemporaryDirectory()


def metas():
    """For the conformance tests, whose samples are square: the path of a picture."""
    path = Path(FOLDER.name) / "reference.png"
    if not path.exists():
        to_pil(noise(seed=77, size=96).media).save(path)
    return {"reference": str(path)}


def compared(reward, media, reference):
    return reward([Sample(media=media, meta={"reference": reference})])


def score(reward, media, reference):
    return compared(reward, media, reference).value.item()


# ------------------------------------------------------------------------------------------------ formulas


def ssim_by_hand(a, b):
    """Window by window, in numpy and in two dimensions at once; the covariance from its definition."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for one, other in zip(a, b, strict=True):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                p, q = one[top : top + 11, left : left + 11], other[top : top + 11, left : left + 11]
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                cov = (weights * (p - mean_p) * (q - mean_q)).sum()
                light = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
                found.append(light * (2 * cov + 0.03**2) / (var_p + var_q + 0.03**2))
    return np.mean(found)


@pytest.mark.parametrize("size", [11, 17])
def test_ssim_is_the_formula_window_by_window(size):
    a, b = noise(1, size).media.double(), noise(2, size).media.double()
    for other in (b, (a + 0.3 * b) / 1.3, 1 - a):
        assert structural_similarity(a, other).item() == pytest.approx(
            ssim_by_hand(a.numpy(), other.numpy()), abs=1e-12
        )


def test_ssim_of_plain_pictures_in_closed_form():
    """Without any variance only the light term is left."""
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert score(ssim, flat(0.2, 0.2, 0.2).media, flat(0.6, 0.6, 0.6).media) == pytest.approx(expected, rel=1e-4)


def test_psnr_and_l1_in_closed_form():
    """One colour of three is off by 0.3: mean square 0.03, mean 0.1."""
    a, b = flat(0.5, 0.5, 0.2).media, flat(0.5, 0.5, 0.5).media
    assert score(psnr, a, b) == pytest.approx(10 * np.log10(1 / 0.03), rel=1e-5)
    assert score(l1, a, b) == pytest.approx(-0.1, rel=1e-5)
    black, white = flat(0, 0, 0).media, flat(1, 1, 1).media
    assert score(psnr, black, white) == pytest.approx(0, abs=1e-5)
    assert score(l1, black, white) == -1


def test_equal_pictures_get_the_most():
    media = noise(size=32).media
    assert [score(reward, media, media) for reward in REWARDS] == pytest.approx([1, 60, 0])


def test_rounding_to_bytes_is_below_the_cap_of_psnr():
    """Uniform rounding error: (1/255)^2 / 12, so 58.9 dB."""
    media = noise(size=64).media
    assert score(psnr, media, (media * 255).round() / 255) == pytest.approx(58.92, abs=0.1)


@pytest.mark.parametrize("reward", REWARDS)
def test_gradients_are_those_of_finite_differences(reward):
    media, reference = noise(3, 12).media.double().requires_grad_(), noise(4, 12).media.double()
    assert torch.autograd.gradcheck(lambda image: compared(reward, image, reference).value, (media,), fast_mode=True)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_gradient_leads_to_the_reference(reward):
    media, reference = noise(3, 24).media, noise(4, 24).media
    start = score(reward, media, reference)
    for _ in range(30):
        leaf = media.clone().requires_grad_()
        compared(reward, leaf, reference).value.sum().backward()
        media = (media + 0.02 * leaf.grad.sign()).clamp(0, 1)
    assert score(reward, media, reference) > start
    assert (media - reference).abs().mean() < (noise(3, 24).media - reference).abs().mean()


# ------------------------------------------------------------------------------------------------ references


def test_a_reference_may_be_a_file(tmp_path):
    media = (noise(size=24).media * 255).round() / 255
    to_pil(media).save(tmp_path / "reference.png")
    Image.fromarray(np.full((24, 24), 51, np.uint8)).save(tmp_path / "grey.png")
    for given in (tmp_path / "reference.png", str(tmp_path / "reference.png")):
        assert score(l1, media, given) == pytest.approx(0, abs=1e-7)
    assert score(l1, flat(0.2, 0.2, 0.2, size=24).media, tmp_path / "grey.png") == pytest.approx(0, abs=1e-6)


def test_a_reference_of_another_size_is_resized_as_pil_does_it():
    large = noise(size=48).media
    small = np.asarray(to_pil(large).resize((24, 24), Image.Resampling.BICUBIC))
    resized = torch.from_numpy(small.copy()).permute(2, 0, 1) / 255
    assert score(l1, resized, large) == pytest.approx(0, abs=0.004)


def test_a_reference_of_another_shape_or_none_at_all_gives_no_verdict_and_a_reason(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    image = noise(size=32).media
    samples = [
        Sample(media=image, meta={"reference": noise(size=32).media}),
        Sample(media=image, meta={"reference": torch.rand(3, 32, 48)}),
        Sample(media=image, meta={"reference": str(tmp_path / "missing.png")}),
        Sample(media=image, meta={"reference": tmp_path / "text.png"}),
        Sample(media=image[:, :8, :8], meta={"reference": image}),
        Sample(media=image),
    ]
    with RewardHub("similarity.ssim") as hub, pytest.warns(UserWarning, match="'reference', which reward"):
        result = hub(samples)
    assert result.total.isnan().tolist() == [False] + [True] * 5
    reasons = [info["similarity.ssim"].get("error", "") for info in result.info]
    told = ["", "crop the reference to", "missing.png does not exist", "text.png cannot be read", "smaller than the"]
    for reason, expected in zip(reasons, [*told, "meta has no 'reference'"], strict=True):
        assert expected in reason


@pytest.mark.parametrize(
    "given, told",
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "float"),
        (torch.zeros(8, 8, 3), "permute"),
        (255 * torch.ones(3, 8, 8), r"spans \[255, 255\]"),
        (torch.full((3, 8, 8), torch.nan), "spans"),
        (7, "is a int; expected the path"),
    ],
)
def test_what_can_be_no_reference_gives_no_verdict_and_a_reason(given, told):
    scores = l1([Sample(media=noise(size=8).media, meta={"reference": given})])
    assert scores.value.isnan().all() and re.search(told, scores.info[0]["error"])


def test_samples_may_differ_in_size_and_frames_share_their_reference():
    reference = noise(size=32).media
    samples = [Sample(media=noise(1, size).media, meta={"reference": reference}) for size in (16, 32)]
    alone = [l1([sample]).value.item() for sample in samples]
    assert l1(samples).value.tolist() == pytest.approx(alone)
    video = Sample(media=torch.stack([reference, 1 - reference]), meta={"reference": reference})
    with RewardHub({"use": "similarity.l1", "frames": 2}) as hub:
        expected = -(1 - 2 * reference).abs().mean().item() / 2
        assert hub([video]).total.item() == pytest.approx(expected, rel=1e-4)
