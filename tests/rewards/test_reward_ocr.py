"""OCR with the real reader and its real weights, on rendered text; the formulas by hand."""

import math
import random

import pytest
import torch

from rewards import RewardError, RewardHub, Sample
from rewards.ocr import OCR, contain, levenshtein, ned, normalise, target_text
from tests.rewards.makers import noise, text


@pytest.fixture(scope="module")
def hub():
    pytest.importorskip("rapidocr")
    with RewardHub({"use": "ocr", "threads": 1}, device="cpu") as made:
        yield made


def asking(words, target, **fields):
    return text(words, prompt=f'a sign that says "{target}"', **fields)


def test_rendered_text_is_read_and_scored(hub):
    samples = [
        asking("Hello World", "Hello World"),
        asking("OPEN 24h", "Open 24H"),
        asking("first line\nsecond", "first line second"),
        asking("cat", "dog"),
        text("Hello", meta={"text": "Hello"}, prompt='not "this"'),
        Sample(media=torch.ones(3, 128, 128), prompt='an empty "page"'),
    ]
    result = hub(samples)
    assert result.total.tolist() == pytest.approx([1, 1, 1, 0, 1, 0])
    assert result.info[0]["ocr"] == {"read": "Hello World", "target": "Hello World"}


def test_what_is_missing_and_what_is_too_much_cost(hub):
    result = hub([asking("Hello", "Hello World"), asking("Hello World", "Hello")])
    assert result.total.tolist() == pytest.approx([0.5, 0.5])
    assert result.parts["ocr"]["contain"].tolist() == pytest.approx([0.5, 1.0])


def test_repeating_the_target_wins_under_contain_and_not_under_ned(hub):
    """The known hack: "Hello World" two and a half times is perfect for Flow-GRPO's formula, and 10 of 25 for ours."""
    result = hub([asking("Hello World\nHello World\nHello", "Hello World")])
    assert result.parts["ocr"]["contain"].item() == 1.0
    assert result.total.item() == pytest.approx(0.4)


def test_colours_are_not_swapped_on_the_way_to_the_reader(hub):
    """Red on cyan of equal brightness reads the same; what is checked is that a coloured sign is read at all."""
    sample = asking("STOP", "STOP", points=60)
    coloured = (
        sample.media * torch.tensor([0.1, 0.2, 0.9])[:, None, None] + torch.tensor([0.8, 0.0, 0.0])[:, None, None]
    )
    assert hub([Sample(media=coloured.clamp(0, 1), prompt=sample.prompt)]).total.item() == 1.0


@pytest.mark.parametrize(
    "fields", [{"prompt": "no quotes"}, {"meta": {"text": ""}}, {"meta": {"text": None}}, {"prompt": '" "'}]
)
def test_without_a_target_there_is_no_verdict(hub, fields):
    result = hub([noise(size=64, **fields)])
    assert result.total.isnan().all()
    assert result.info[0]["ocr"]["error"].startswith('no text to look for: set meta["text"]')


def test_contain_mode_scores_by_flow_grpos_formula():
    pytest.importorskip("rapidocr")
    with RewardHub({"use": "ocr", "mode": "contain", "threads": 1}) as hub:
        assert hub([asking("Hello World", "Hello")]).total.item() == 1.0


def test_targets():
    assert target_text(noise(prompt='a "cat" and “a dog”')) == "cat a dog"
    assert target_text(noise(prompt="it's the dogs' sign")) == ""
    assert target_text(noise(prompt='a "cat"', meta={"text": "dog"})) == "dog"
    assert target_text(noise(prompt="", meta={"text": 42})) == "42"


def test_formulas_by_hand():
    """kitten -> sitting costs 3; the longer has 7 letters."""
    assert levenshtein("kitten", "sitting") == 3
    assert ned("Kitten ", "sit\nting") == pytest.approx(1 - 3 / 7)
    assert ned("", "abc") == 0
    assert contain("xxabcxx", "A B C") == 1
    assert contain("abd", "abc") == pytest.approx(2 / 3)
    assert contain("wholly different and long", "abc") == 0
    assert contain("", "abc") == 0
    assert normalise(" A\tb\n") == "ab"


def test_levenshtein_is_a_metric_and_agrees_with_the_recursive_definition():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    words = ["".join(rng.choices("ab", k=rng.randrange(6))) for _ in range(24)]
    for a, b in zip(words, words[1:], strict=False):
        assert levenshtein(a, b) == slow(a, b) == levenshtein(b, a)


def test_a_wrong_mode_and_a_forgotten_load_are_explained():
    with pytest.raises(RewardError, match='expected "ned" or "contain"'):
        OCR(mode="fuzzy")
    with pytest.raises(RewardError, match="not loaded"):
        OCR().score([noise(size=64, prompt='"a"')])


def test_missing_models_are_refused_and_never_downloaded(tmp_path, monkeypatch):
    rapidocr = pytest.importorskip("rapidocr")
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        RewardError, match=r'one det model in the RapidOCR wheel, found none .*pip install -e "\.\[ocr\]"'
    ):
        RewardHub("ocr").warmup()


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr", None)  # what Python itself does to make an import fail
    with pytest.raises(RewardError, match=r'needs RapidOCR and onnxruntime: pip install -e "\.\[ocr\]"'):
        RewardHub("ocr").warmup()


def test_scores_are_within_the_declared_range():
    assert OCR.range == (0.0, 1.0)
    assert not math.isnan(ned("", ""))
