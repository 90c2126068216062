"""DeQA behind a server that answers as it does: a sentence, with the probabilities of the five words in it."""

import math

import pytest
import torch

from rewards import RewardError, RewardHub, build, traits_of
from rewards.media import from_pil, to_pil
from tests.rewards.chat_server import chat_server, completion, logs, shown
from tests.rewards.makers import noise

SERVERS = []
FRONT = ["The", " quality", " of", " the", " image", " is"]


def sentence(**chances):
    """A completion whose seventh token has these probabilities, and the others none of the words."""
    words = [(token, logs(**{token: 0.99})) for token in FRONT]
    best = max(chances, key=chances.get)
    words.append((f" {best}", {f" {word}": math.log(chance) for word, chance in chances.items()}))
    words.append((".", {".": -0.01, " excellent": -5.0}))
    return completion("".join(token for token, _ in words), steps=words)


def by_pixel(body):
    level = shown(body)[1][0].convert("L").getpixel((0, 0)) / 255
    return sentence(excellent=0.1 + 0.4 * level, bad=0.5 - 0.4 * level, fair=0.3)


def tiny(folder):
    """For the conformance tests: a server, which lives as long as they do."""
    SERVERS.append(chat_server(by_pixel))
    return {"url": SERVERS[-1].url + "/v1", "model": "tiny"}


def asking(server, **options):
    reward = build("deqa", {"url": server.url + "/v1", "model": "tiny", **options})
    reward.load(torch.device("cpu"), torch.float32)
    return reward


def test_it_is_the_expected_level():
    """(5 * .2 + 4 * .5 + 3 * .1 + 2 * .05 + 1 * .05) / .9 = 3.45 / .9"""
    with chat_server(lambda body: sentence(excellent=0.2, good=0.5, fair=0.1, poor=0.05, bad=0.05)) as server:
        scores = asking(server).score([noise(0, 16)])
    assert scores.value.tolist() == pytest.approx([3.45 / 0.9])
    assert scores.parts["mass"].tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(("word", "score"), [("excellent", 5), ("good", 4), ("fair", 3), ("poor", 2), ("bad", 1)])
def test_a_sure_answer_is_its_level(word, score):
    with chat_server(lambda body: sentence(**{word: 1.0})) as server:
        assert asking(server).score([noise(0, 16)]).value.tolist() == [score]


def test_the_image_is_not_compressed():
    """Flow-GRPO's client sends JPEG, which is what the score is about."""
    sample = noise(0, 64)
    with chat_server(by_pixel) as server:
        asking(server).score([sample])
        texts, pictures = shown(server.requests[-1].json())
    assert torch.equal(from_pil(pictures[0]), from_pil(to_pil(sample.media)))
    assert len(pictures) == len(texts) == 1 and sample.prompt not in texts[0]


def test_another_sentence_is_no_verdict():
    with chat_server(lambda body: completion("I see", steps=[("I", logs(I=0.9)), (" see", logs(see=0.9))])) as server:
        with RewardHub({"use": "deqa", "url": server.url + "/v1", "model": "tiny"}) as hub:
            result = hub([noise(0, 16)])
    assert result.total.isnan().all()
    assert "none of excellent, good, fair, poor, bad" in result.info[0]["deqa"]["error"]


def test_without_a_server_it_says_what_to_do():
    for options in ({}, {"model": "zhiyuanyou/DeQA-Score-Mix3"}):
        with pytest.raises(RewardError, match="no server is given.*as `url`"):
            build("deqa", options).load(torch.device("cpu"), torch.float32)


def test_what_it_declares():
    traits = traits_of(build("deqa"))
    assert traits.media == {"image"} and traits.range == (1, 5)
