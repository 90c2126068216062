"""Where weights are between calls, and the way back that a warm-up tries."""

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, declare
from rewards.entries import read_entries
from rewards.scorer import modules_of
from tests.rewards.makers import batch, flat


class Moved(torch.nn.Linear):
    """A layer that notes where it is sent."""

    def __init__(self):
        super().__init__(3, 1)
        self.seen = []

    def to(self, device):
        self.seen.append(str(device))
        return self


class Network:
    """A reward with weights; it notes when they come and go."""

    def __init__(self):
        self.story = []
        self.layer = None

    def load(self, device, dtype):
        self.layer = Moved()
        self.story.append("load")

    def unload(self):
        self.layer = None
        self.story.append("unload")

    def score(self, samples):
        self.story.append("score")
        return [0.5] * len(samples)


def hub_of(reward, **entry):
    return RewardHub({"use": reward, **entry})


def test_weights_stay_by_default_and_are_dropped_on_demand():
    stays, drops = Network(), Network()
    for reward, where in ((stays, "none"), (drops, "drop")):
        with hub_of(reward, offload=where) as hub:
            hub(batch(2)), hub(batch(2))
            assert (reward.layer is None) == (where == "drop")
    assert stays.story == ["load", "score", "score", "unload"]
    assert drops.story == ["load", "score", "unload"] * 2


def test_weights_wait_in_main_memory_and_come_back():
    """ "meta" is a second device on any machine."""
    reward = Network()
    with hub_of(reward, offload="cpu", device="meta") as hub:
        hub(batch(2))
        layer = reward.layer
        assert layer.seen == ["cpu"]
        hub(batch(2))
        assert layer.seen == ["cpu", "meta", "cpu"]
    assert reward.story == ["load", "score", "score", "unload"]


def test_networks_are_found_in_a_reward_and_in_its_helpers():
    reward = Network()
    reward.load("cpu", torch.float32)
    assert modules_of(reward) == [reward.layer]
    assert modules_of(lambda samples: None) == []


def test_a_word_that_is_no_place_is_refused():
    with pytest.raises(RewardError, match="offload is 'disk'; expected none"):
        read_entries([{"use": "pixel.contrast", "offload": "disk"}], torch.device("cpu"))


@declare(differentiable=True)
def broken_way_back(samples):
    return torch.stack([sample.media.detach().mean() for sample in samples])


def test_a_warm_up_tries_the_way_back_of_weighted_rewards():
    with RewardHub(broken_way_back) as hub:
        hub.warmup()
        with pytest.raises(RewardContractError, match="does not reach"):
            hub.warmup(gradient=True)
    with RewardHub(["pixel.contrast", {"use": broken_way_back, "weight": 0}]) as hub:
        assert set(hub.warmup([flat(0.1, 0.2, 0.3)], gradient=True)) == {"pixel.contrast", "broken_way_back"}
