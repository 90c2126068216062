"""OCR with the real readers and their real weights, on rendered text; the formulas by hand.

Where there is no tesseract, a script of its name on the PATH stands for how it may behave as a process.
"""

import io
import math
import random
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError, RewardHub, Sample
from rewards.media import to_array, to_pil
from rewards.ocr import OCR, _rapidocr, contain, levenshtein, ned, normalise, target_text
from tests.rewards.makers import noise, text

pytestmark = pytest.mark.slow


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


def test_colours_are_not_swapped_on_the_way_to_the_reader():
    """Against RapidOCR's own reading of the PNG file. Its networks see faint red on grey better than faint blue."""
    pytest.importorskip("rapidocr")
    (reader,) = _rapidocr(1)
    ink, read = 1 - text("Hello World").media[0], {}
    for strength in (0.07, 0.08, 0.09):
        for channel in (0, 2):
            sign = torch.full((3, *ink.shape), 0.5)
            sign[channel] += strength * ink
            file = io.BytesIO()
            to_pil(sign).save(file, format="PNG")
            read[strength, channel] = reader(to_array(sign))
            assert read[strength, channel] == " ".join(reader.engine(file.getvalue()).txts or ())
    assert any(read[strength, 0] != read[strength, 2] for strength, _ in read), "no colour makes a difference"


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
    with pytest.raises(RewardError, match='expected "rapidocr" or "tesseract"'):
        OCR(engine="paddle")
    with pytest.raises(RewardError, match="threads is 0; expected a whole number of at least 1"):
        OCR(threads=0)
    with pytest.raises(RewardError, match="timeout is 0; expected a number of seconds above 0"):
        OCR(timeout=0)
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
    monkeypatch.setitem(sys.modules, "rapidocr", None)  # what Python itself does to make an import fail
    with pytest.raises(RewardError, match=r'needs RapidOCR and onnxruntime: pip install -e "\.\[ocr\]"'):
        RewardHub("ocr").warmup()


def test_scores_are_within_the_declared_range():
    assert OCR.range == (0.0, 1.0)
    assert not math.isnan(ned("", ""))


# ------------------------------------------------------------------------------------------------ several at once


def test_many_readers_score_as_one_does_and_in_order(hub):
    samples = [asking(words, "Hello 3") for words in ("Hello 1", "Hello 3", "good bye", "Hello", "", "Hello 3 3")]
    serial = hub(samples)
    with RewardHub({"use": "ocr", "threads": 3}, device="cpu") as three:
        parallel = three(samples)
    assert torch.equal(parallel.total, serial.total)
    assert parallel.info == serial.info
    assert len({info["ocr"]["read"] for info in serial.info}) > 3


def test_a_picture_of_512_pixels_takes_at_most_half_a_second_of_one_core():
    """So that two cores read at least four a second. CPU time, for a busy machine has none to give."""
    samples = [asking(f"Hello World\nline {number}", "Hello World", size=512, points=48) for number in range(6)]
    with RewardHub({"use": "ocr", "threads": 2}, device="cpu") as hub:
        hub(samples[:2])
        start = time.process_time()
        hub(samples)
        assert (time.process_time() - start) / len(samples) < 0.5


def test_no_reader_serves_two_pictures_at_once():
    """The real queue, around readers that notice."""
    reward, seen, guard = OCR(threads=2), [], threading.Lock()

    def reader(name):
        busy = threading.Lock()

        def read(image):
            assert busy.acquire(blocking=False), "two threads in one reader"
            time.sleep(0.01)
            busy.release()
            with guard:
                seen.append(name)
            return "cat"

        return read

    reward.load(torch.device("cpu"), torch.float32)
    while not reward._readers.empty():
        reward._readers.get()
    for name in "ab":
        reward._readers.put(reader(name))
    assert reward.score([noise(size=16, prompt='"cat"')] * 12).value.tolist() == [1] * 12
    assert sorted(set(seen)) == ["a", "b"] and len(seen) == 12
    reward.unload()


# ------------------------------------------------------------------------------------------------ tesseract

STAND_IN = """#!{python}
import os, sys, time
if "--list-langs" in sys.argv:
    print("List of available languages (2):", "eng", "deu", sep="\\n")
    sys.exit(0)
given = sys.stdin.buffer.read()
{body}
"""


@pytest.fixture
def tesseract(tmp_path, monkeypatch):
    """Puts a script called tesseract on the PATH; `body` is what it does with the bytes `given`."""

    def put(body):
        program = tmp_path / "tesseract"
        program.write_text(STAND_IN.format(python=sys.executable, body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return program

    return put


def by_tesseract(samples, **options):
    with RewardHub({"use": "ocr", "engine": "tesseract", **options}, device="cpu") as hub:
        return hub(samples)


def test_tesseract_gets_a_png_and_the_right_arguments_and_what_it_prints_is_read(tesseract, tmp_path):
    """Nothing but the picture itself goes in, and lines and form feeds of the output are only white space."""
    tesseract(
        f"open({str(tmp_path / 'given.png')!r}, 'wb').write(given)\n"
        "print(' '.join(sys.argv[1:]), os.environ['OMP_THREAD_LIMIT'], 'caf\\u00e9', sep='\\n', end='\\n\\f')"
    )
    sample = noise(size=40, prompt='"x"')
    result = by_tesseract([sample], language="deu+eng")
    assert result.info[0]["ocr"]["read"] == "stdin stdout -l deu+eng --psm 11 1 café"
    with Image.open(io.BytesIO((tmp_path / "given.png").read_bytes())) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), to_array(sample.media))


@pytest.mark.parametrize(
    "body, told",
    [
        ("print('Error in pixRead', file=sys.stderr); sys.exit(3)", "ended with status 3: Error in pixRead"),
        ("sys.exit(1)", "ended with status 1: it does not say why"),
        ("os.kill(os.getpid(), 11)", "ended with status -11"),
        ("time.sleep(30)", "did not end within 1 s"),
    ],
)
def test_a_picture_that_tesseract_fails_on_has_no_verdict(tesseract, body, told):
    tesseract(body)
    start = time.perf_counter()
    result = by_tesseract([noise(size=16, prompt='"x"')], timeout=1)
    assert result.total.isnan().all() and told in result.info[0]["ocr"]["error"]
    assert time.perf_counter() - start < 5


def test_one_failure_leaves_the_other_pictures_alone(tesseract):
    """Dark pictures fail; their neighbours are read, once each."""
    tesseract("sys.exit(1) if len(given) < 150 else print('x')")
    dark = Sample(media=torch.zeros(3, 16, 16), prompt='"x"')
    result = by_tesseract([noise(size=16, prompt='"x"'), dark, noise(1, size=16, prompt='"x"')])
    assert torch.equal(result.total.isnan(), torch.tensor([False, True, False]))
    assert result.total[[0, 2]].tolist() == [1, 1]


def test_garbage_is_text_and_silence_is_none(tesseract):
    tesseract("sys.stdout.buffer.write(bytes(range(128, 256)))")
    assert by_tesseract([noise(size=16, prompt='"x"')]).total.item() == 0
    tesseract("pass")
    result = by_tesseract([noise(size=16, prompt='"x"')])
    assert result.total.item() == 0 and result.info[0]["ocr"]["read"] == ""


def test_what_is_missing_names_the_command_that_installs_it(tesseract, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RewardError, match="on the PATH: apt-get install tesseract-ocr tesseract-ocr-chi-sim"):
        OCR(engine="tesseract", language="chi_sim").load(torch.device("cpu"), torch.float32)
    program = tesseract("pass")
    with pytest.raises(RewardError, match="has no fra .*it has: .*eng deu.*apt-get install .* tesseract-ocr-fra"):
        OCR(engine="tesseract", language="eng+fra").load(torch.device("cpu"), torch.float32)
    program.write_text("#!/does/not/exist\n")
    with pytest.raises(RewardError, match="cannot be run: .*apt-get install tesseract-ocr"):
        OCR(engine="tesseract").load(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")
def test_the_real_tesseract_reads_rendered_text():
    samples = [asking("Hello World", "Hello World"), asking("OPEN 24h", "Open 24H"), asking("cat", "dog")]
    assert by_tesseract(samples).total.tolist() == pytest.approx([1, 1, 0])
