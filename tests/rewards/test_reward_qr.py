"""QR codes that OpenCV writes, and what is left of them when they are broken, wrong or not there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rewards import RewardError, RewardHub, Sample
from rewards.qr import QR
from tests.rewards.makers import flat, noise, text

cv2 = pytest.importorskip("cv2")


def code(words, pixels=8, colour=(0.0, 0.0, 0.0)):
    """A code on white, with some space around it: [3,H,W]."""
    squares = torch.from_numpy(cv2.QRCodeEncoder.create().encode(words)).float() / 255
    large = F.pad(squares.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1), (24,) * 4, value=1.0)
    dark = torch.tensor(colour)[:, None, None]
    return dark + (1 - dark) * large.expand(3, *large.shape)


def broken(words):
    """A code whose corners are there, and whose rest is grey."""
    media = code(words).clone()
    middle = media.shape[-1] // 2
    media[:, middle - 20 : middle + 70, middle - 20 : middle + 50] = 0.5
    return media


@pytest.fixture(scope="module")
def hub():
    with RewardHub("qr", device="cpu") as made:
        yield made


def test_the_four_steps(hub):
    samples = [
        Sample(media=code("https://a.example/x"), prompt='a QR code for "https://a.example/x"'),
        Sample(media=code("something else"), prompt='a QR code for "https://a.example/x"'),
        Sample(media=broken("hello World"), prompt='a QR code for "hello World"'),
        flat(1, 1, 1, size=96),
        noise(size=96),
        text("hello World", 128, 16),
    ]
    samples[3:] = [Sample(media=sample.media, meta={"text": "hello World"}) for sample in samples[3:]]
    result = hub(samples)
    assert result.total.tolist() == pytest.approx([1, 0.3, 0.1, 0, 0, 0])
    assert result.parts["qr"]["strict"].tolist() == [1, 0, 0, 0, 0, 0]
    assert [info["qr"]["read"] for info in result.info] == [
        ["https://a.example/x"], ["something else"], [""], [], [], []
    ]  # fmt: skip


def test_strict_mode_wants_the_exact_text():
    with RewardHub({"use": "qr", "mode": "strict"}) as hub:
        samples = [Sample(media=code("Hello"), meta={"text": target}) for target in ("Hello", "hello", "Hello ")]
        assert hub(samples).total.tolist() == [1, 0, 0]


def test_one_right_code_of_two_is_enough(hub):
    pair = torch.cat([code("left"), code("right")], -1)
    result = hub([Sample(media=pair, meta={"text": "right"})])
    assert result.total.item() == 1
    assert sorted(result.info[0]["qr"]["read"]) == ["left", "right"]


@pytest.mark.parametrize("colour", [(0.6, 0.0, 0.1), (0.0, 0.2, 0.5)])
def test_coloured_codes_and_noise_on_them(hub, colour):
    media = code("hello World", colour=colour)
    dirty = (media + 0.15 * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert hub([Sample(media=dirty, meta={"text": "hello World"})]).total.item() == 1


def test_letters_of_other_scripts_survive(hub):
    assert hub([Sample(media=code("Grüße, 世界"), meta={"text": "Grüße, 世界"})]).total.item() == 1


def test_without_a_target_there_is_no_verdict(hub):
    result = hub([Sample(media=code("x"), prompt="a QR code")])
    assert result.total.isnan().all() and "no text to look for" in result.info[0]["qr"]["error"]


def test_the_decoded_squares_are_those_that_were_written():
    """The picture that the tests draw is the encoder's, so that a failure above is the reward's."""
    squares = cv2.QRCodeEncoder.create().encode("abc")
    drawn = code("abc", pixels=1)[0, 24:-24, 24:-24].numpy()
    assert np.array_equal(drawn * 255, squares)


def test_wrong_options_and_what_is_missing_are_explained(monkeypatch):
    import sys

    with pytest.raises(RewardError, match='expected "dense" or "strict"'):
        QR(mode="soft")
    with pytest.raises(RewardError, match="not loaded"):
        QR().score([noise(size=32, prompt='"a"')])
    monkeypatch.setitem(sys.modules, "cv2", None)  # what Python itself does to make an import fail
    with pytest.raises(RewardError, match=r'needs OpenCV: pip install -e "\.\[video\]"'):
        RewardHub("qr").warmup()
