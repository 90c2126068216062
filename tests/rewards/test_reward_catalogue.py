"""The list of all rewards: complete, honest about what can run here, and about what makes the others run."""

import pytest

from rewards import available
from rewards.card import Card, obstacles
from rewards.catalogue import catalogue, describe, options_of
from rewards.files import Weights
from rewards.types import Traits, declare

ASKED = {
    "pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward", "blip.itm", "blip.itc", "vqascore", "hpsv3",
    "image_sim", "similarity.ssim", "similarity.psnr", "pixel.jpeg_size", "pixel.jpeg_compressibility", "ocr",
    "geneval", "deqa", "videoreward", "flow.magnitude", "flow.spikes", "temporal_consistency", "judge",
    "unifiedreward", "remote", "shapes",
}  # fmt: skip


@pytest.fixture(scope="module")
def listed():
    return {each.name: each for each in catalogue()}


def test_every_reward_of_the_field_is_there(listed):
    assert set(listed) == set(available()) and not set(listed) - set(available())
    assert set(listed) >= ASKED


@pytest.mark.parametrize("name", sorted(available()))
def test_each_says_where_it_comes_from_and_what_it_needs(listed, name):
    each = listed[name]
    assert each.summary.endswith((".", ")", "?")) or each.summary, "the docstring's first line"
    assert isinstance(each.traits.card, Card), "a reward says its card"
    assert each.card.source and each.card.licence
    if each.card.weights:
        assert each.card.memory_gb is None or each.card.memory_gb > 0
    for what, mend in each.obstacles:
        assert what and mend.startswith(("hf download ", "pip install ", "apt", "{use: "))


def test_those_that_need_no_hub_can_run(listed):
    for name in ("ocr", "shapes", "shapes_clip", "pixel.jpeg_size", "flow.magnitude", "similarity.ssim", "harmonic"):
        assert listed[name].runs, listed[name].obstacles


def test_those_whose_weights_are_not_here_say_which_command_fetches_them(listed):
    (_, command), *_ = listed["hpsv2"].obstacles
    assert command.startswith("hf download xswu/HPSv2 HPS_v2")
    assert not listed["judge"].runs and "{use: ..., model: ...}" in dict(listed["judge"].obstacles).values()


def test_obstacles_are_those_of_this_machine(tmp_path):
    card = Card(
        source="x",
        packages={"torch": "pip install torch", "no_such_package": "pip install it"},
        programs={"sh": "apt install sh", "no-such-program": "apt install it"},
        options=("url",),
        weights=(Weights(str(tmp_path), ("a.bin",)), Weights(str(tmp_path / "none"), ("b.bin",))),
    )
    found = dict(obstacles(card))
    assert set(found) == {"no_such_package", "no-such-program", "option url", str(tmp_path), str(tmp_path / "none")}
    (tmp_path / "a.bin").write_text("")
    assert str(tmp_path) not in dict(obstacles(card))
    assert obstacles(None) == []


def test_an_option_that_is_given_is_no_obstacle(tmp_path):
    assert "option model" in dict(describe("judge").obstacles)
    assert "option model" not in dict(describe("judge", {"model": str(tmp_path)}).obstacles)


def test_options_and_their_defaults():
    assert ("mode", "'ned'") in options_of("ocr")
    assert options_of("pixel.jpeg_size") == [("quality", "95"), ("unit", "'kb'")]


def test_a_function_may_have_a_card():
    card = Card(source="here")

    @declare(card=card)
    def mine(samples):
        return [0.0] * len(samples)

    assert mine.card is card and Traits(card=card).card is card
