"""Names, paths, functions and classes as rewards, and the message for each way to get one wrong."""

import functools
import sys
from types import ModuleType

import pytest
import torch

import rewards
from rewards import RewardError, RewardHub, Sample, Scores, available, build, declare
from rewards.ocr import OCR
from rewards.pixel import brightness
from rewards.resolve import offered, resolve
from tests.rewards.makers import batch, noise

# ------------------------------------------------------------------------------------------------ names


def test_the_folder_is_the_list():
    names = available()
    assert {"ocr", "pixel.brightness", "pixel.jpeg_size", "shapes"} <= set(names)
    infrastructure = {
        "types",
        "contract",
        "media",
        "functions",
        "resolve",
        "combine",
        "entries",
        "scorer",
        "hub",
        "cache",
    }
    assert not {name.partition(".")[0] for name in names} & infrastructure


def test_every_available_name_resolves():
    assert all(callable(resolve(name)) for name in available())
    assert resolve("ocr") is OCR
    assert resolve("pixel.brightness") is brightness
    assert resolve("rewards.pixel:brightness") is brightness


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "jpeg_size",
            r"no reward 'jpeg_size' \(did you mean 'pixel.jpeg_size'\?\)\. There are: .*ocr.*file\.py:attribute",
        ),
        ("pixle.jpeg_size", "did you mean 'pixel.jpeg_size'"),
        ("ocrr", r"did you mean 'ocr'\?"),
        ("pixel", "'pixel' has several rewards: pixel.brightness, pixel.contrast"),
        ("pixel.to_pil", "no reward 'pixel.to_pil'"),
        ("hub", "no reward 'hub'"),
        (
            "verifiers.math",
            r"no reward 'verifiers.math': verifiers judge text.*`rewards\.verifiers`.*docs/verifiers\.md",
        ),
        ("verifiers.mth", "verifiers judge text"),
        ("nowhere.module:thing", "cannot import 'nowhere.module'.*A file is given as ./file.py:attribute"),
        ("rewards.pixel:brightnes", "the module has no 'brightnes' .did you mean 'brightness'.*It has: .*brightness"),
        ("./nowhere.py:thing", r"file './nowhere.py' does not exist \(looked for /.*working directory"),
    ],
)
def test_a_wrong_name_says_what_there_is(name, message):
    with pytest.raises(RewardError, match=message):
        build(name)


# ------------------------------------------------------------------------------------------------ files

MINE = """
from dataclasses import dataclass
from rewards import Sample, declare

def bright(samples):
    return [sample.media.mean().item() for sample in samples]

@dataclass
class Scaled:
    scale: float
    range = (0.0, 2.0)

    def score(self, samples):
        return [self.scale * s.media.mean() for s in samples]
"""


JUDGE = "class A:\n    def prefers(self, first, second): return 0.5\n"


def test_a_users_own_rewards_py_is_usable_by_its_path(tmp_path, monkeypatch):
    """The file has this package's name and imports this package: neither may disturb the other."""
    (tmp_path / "rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    with RewardHub(
        ["./rewards.py:bright", {"use": f"{tmp_path}/rewards.py:Scaled", "scale": 2.0, "norm": "unit"}]
    ) as hub:
        result = hub(batch(2))
    assert list(result.scores) == ["bright", "Scaled"]
    assert torch.equal(result.scores["Scaled"], 2 * result.scores["bright"])
    torch.testing.assert_close(result.total, 2 * result.scores["bright"])
    assert sys.modules["rewards"] is rewards


def test_a_file_with_one_reward_needs_no_attribute(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    assert build(f"{tmp_path}/mine.py", {"scale": 1.0}).scale == 1.0


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "mine.py").write_text("def one(samples): return [1.0] * len(samples)")
    first = RewardHub(f"{tmp_path}/mine.py:one")
    (tmp_path / "mine.py").write_text("def one(samples): return [22.0] * len(samples)")
    second = RewardHub(f"{tmp_path}/mine.py:one")
    assert (first([noise()]).total.item(), second([noise()]).total.item()) == (1.0, 22.0)


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("1 / 0", ":x", "fails when loaded: ZeroDivisionError"),
        ("def bright(samples): ...\nx = 3", ":brigth", "has no 'brigth' .did you mean 'bright'.*It has: bright\\.$"),
        ("x = 3\ndef _private(samples): ...", ":y", "has no 'y'. It has: no function and no class"),
        (MINE, ":scaled", "did you mean 'Scaled'.*It has: bright, Scaled\\.$"),
        (MINE + "\n@declare()\ndef third(samples): ...", "", "needs :attribute. It has: bright, Scaled, third\\.$"),
        ("x = 3", ":x", "is a int; a reward is a function or has a method score"),
        ("class A: pass", ":A", "'A' has no method score.samples., so it is not a reward$"),
        (JUDGE, ":A", "has no method score.*a judge for `pairs`. Mend: {use: pairs, judge: '.*/mine.py:A'}$"),
        (JUDGE + "a = A()", ":a", "is a A; a reward is .*a judge for `pairs`. Mend: {use: pairs, judge: 'A'}$"),
    ],
)
def test_a_broken_file_says_so(tmp_path, source, attribute, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(RewardError, match=message):
        build(f"{tmp_path}/mine.py{attribute}")


# ------------------------------------------------------------------------------------------------ entry points


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package on the path with metadata that declares entry points, as pip leaves it."""
    (tmp_path / "their_rewards.py").write_text(MINE)
    info = tmp_path / "their_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    points = "theirs = their_rewards:bright\nbroken = their_rewards:nothing\nocr = their_rewards:bright\n"
    (info / "entry_points.txt").write_text(f"[flowrl.rewards]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_rewards", None)


def test_an_installed_package_offers_rewards(installed):
    assert "theirs" in available()
    with RewardHub("theirs") as hub:
        assert list(hub([noise()]).scores) == ["theirs"]
    assert available().count("ocr") == 1
    assert resolve("ocr") is OCR, "a name of this package cannot be taken over"


def test_a_broken_entry_point_names_itself(installed):
    with pytest.raises(RewardError, match="'broken' is the entry point 'their_rewards:nothing', which fails"):
        build("broken")


# ------------------------------------------------------------------------------------------------ functions


def score(use, samples, **options):
    return RewardHub({"use": use, "on_error": "raise", **options})(samples)


def test_a_function_of_samples_with_options():
    def mine(batch, scale=1.0, *, shift=0.0):
        return [scale * sample.media.mean() + shift for sample in batch]

    assert score(mine, [noise()]).total.item() == pytest.approx(noise().media.mean().item())
    assert score(mine, [noise()], scale=0.0, shift=3.0).total.item() == 3.0


def test_a_function_of_columns():
    """`text` has no default, so it comes from meta; `scale` has one, so it is an option."""

    def mine(images, prompts, text, scale=1.0):
        assert images.shape == (3, 3, 32, 32)
        return [scale * (word in prompt) for word, prompt in zip(text, prompts, strict=True)]

    samples = [noise(seed, meta={"text": word}) for seed, word in enumerate(["prompt", "x", "2"])]
    assert score(mine, samples, scale=2.0).total.tolist() == [2.0, 0.0, 2.0]
    with pytest.warns(UserWarning, match="meta has no 'text', which reward 'mine' needs"):
        result = RewardHub(mine)([*samples, noise(5)][1:] + samples[:1])
    assert result.total.isnan().tolist() == [False, False, True, False]


def test_any_order_and_all_other_columns():
    def mine(prompts, media, **columns):
        assert list(columns) == ["a"]
        return media.flatten(1).mean(1) + torch.tensor(columns["a"])

    samples = [noise(0, meta={"a": 1, "b": 2}), noise(1, meta={"a": 2})]
    assert score(mine, samples).total.tolist() == pytest.approx([1.5, 2.5], abs=0.05)


def test_videos_and_media_say_what_a_function_judges():
    def of_videos(videos, prompts):
        assert videos.ndim == 5
        return videos.flatten(1).mean(1)

    def of_images(images, prompts):
        assert images.ndim == 4
        return images.flatten(1).mean(1)

    video = [noise(0, frames=4)]
    assert score(of_videos, video).total.item() == pytest.approx(score(of_images, video).total.item())


def test_columns_of_different_sizes_are_scored_in_order():
    calls = []

    def mine(images, prompts):
        calls.append(prompts)
        return Scores(
            value=images.flatten(1).mean(1),
            parts={"width": torch.full((len(prompts),), float(images.shape[-1]))},
            info=[{"prompt": prompt} for prompt in prompts],
        )

    result = score(mine, [noise(0, 8), noise(1, 16), noise(2, 8)])
    assert calls == [["prompt 0", "prompt 2"], ["prompt 1"]]
    assert result.parts["mine"]["width"].tolist() == [8, 16, 8]
    assert [entry["mine"]["prompt"] for entry in result.info] == ["prompt 0", "prompt 1", "prompt 2"]
    assert result.total.tolist() == pytest.approx(
        [noise(seed, size).media.mean().item() for seed, size in [(0, 8), (1, 16), (2, 8)]]
    )


def test_a_partial_and_a_callable_object_are_functions_too():
    def mine(samples, scale):
        return [scale] * len(samples)

    class Call:
        def __call__(self, samples):
            return [4.0] * len(samples)

    result = score(functools.partial(mine, scale=3.0), [noise()])
    assert list(result.scores) == ["mine"]
    assert result.total.item() == 3.0
    assert score(Call(), [noise()]).total.item() == 4.0


@pytest.mark.parametrize(
    "function", [lambda: [1.0], lambda prompts, completions: [1.0], lambda *args: [1.0], lambda *, samples: [1.0]]
)
def test_a_signature_that_means_nothing_is_explained(function):
    with pytest.raises(
        RewardError, match=r"has the signature .*; expected \(samples, option=default, \.\.\.\) or \(images"
    ):
        build(function)


def test_a_misspelt_option_names_the_right_one():
    with pytest.raises(
        RewardError, match=r"has no option 'qualty' \(did you mean 'quality'\?\). It has: quality, unit"
    ):
        RewardHub({"use": "pixel.jpeg_size", "qualty": 50})
    with pytest.raises(RewardError, match=r"reward 'OCR' has no option 'mod'.*did you mean 'mode'"):
        RewardHub({"use": "ocr", "mod": "ned"})
    with pytest.raises(RewardError, match=r"'wieght' \(did you mean 'weight'\?\)"):
        RewardHub({"use": "ocr", "wieght": 1})


def test_the_samples_are_no_option():
    with pytest.raises(RewardError, match="has no option 'samples'"):
        build("pixel.brightness", {"samples": 1})


# ------------------------------------------------------------------------------------------------ classes and objects


class Needy:
    def __init__(self, url, retries=3):
        self.url = url

    def score(self, samples):
        return [0.0] * len(samples)


def test_a_class_gets_its_options_and_says_which_are_missing():
    assert build(Needy, {"url": "x"}).url == "x"
    with pytest.raises(RewardError, match="'Needy' needs the option url"):
        build(Needy, {"retries": 1})
    with pytest.raises(RewardError, match=r"has no option 'URL'.*It has: url, retries"):
        build(Needy, {"URL": 1})


def test_a_ready_object_takes_no_options():
    ready = Needy("x")
    assert build(ready) is ready
    with pytest.raises(RewardError, match="is an object already"):
        build(ready, {"url": "y"})


def test_only_public_own_and_marked_things_are_offered():
    module = ModuleType("some_rewards")
    code = MINE + "\nfrom rewards.ocr import OCR\n@declare()\ndef a(samples): ...\n@declare()\ndef _b(samples): ...\n"
    exec(compile(code, "some_rewards", "exec"), module.__dict__)
    assert list(offered(module)) == ["Scaled", "a"]
    module.__all__ = ["a", "bright"]
    assert list(offered(module)) == ["a"]


def test_the_example_of_the_package_runs():
    code = rewards.__doc__.split("\n\n    ", 1)[1].split("\n\nA new reward")[0]
    space = {"image": torch.rand(3, 8, 8)}
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), space)
    assert list(space["result"].scores) == ["pixel.contrast", "warm"]
    assert isinstance(space["result"].total, torch.Tensor)
    assert declare and Sample
