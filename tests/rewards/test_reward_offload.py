"""Where weights are between calls, and the way back that a warm-up tries."""

import threading

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, declare
from rewards._clip import Trunk, share
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


class Sharer:
    """A reward whose network others have too; it notes where the network is when it scores."""

    def __init__(self):
        self.trunk, self.found = None, []

    def load(self, device, dtype):
        def make():
            model = Moved()
            model.to(device)
            return Trunk(model=model, device=device, dtype=dtype)

        self.trunk = share("moved", make)

    def unload(self):
        self.trunk = None

    def score(self, samples):
        self.found.append(self.trunk.model.seen[-1])
        return [0.5] * len(samples)


@pytest.mark.parametrize("other", ["none", "cpu", "drop"])
@pytest.mark.parametrize("hubs", [1, 2])
def test_a_shared_network_is_on_its_device_whenever_one_of_its_rewards_scores(other, hubs):
    rewards = [Sharer(), Sharer()]
    entries = [
        {"use": reward, "name": name, "offload": offload, "device": "meta"}
        for reward, name, offload in zip(rewards, "ab", ("cpu", other), strict=True)
    ]
    made = [RewardHub(entries)] if hubs == 1 else [RewardHub(entry) for entry in entries]
    try:
        for _ in range(3):
            for hub in made:
                hub(batch(2))
        assert [reward.found for reward in rewards] == [["meta"] * 3] * 2
        (model,) = {reward.trunk.model for reward in rewards if reward.trunk}
        assert model.seen[-1] == "meta"
        if hubs == 2:
            made[1].close()
            made[0](batch(2))
            assert model.seen[-1] == "cpu"  # the other reward has let go
    finally:
        for hub in made:
            hub.close()


def test_a_network_is_not_moved_while_a_reward_of_another_hub_computes_with_it():
    """Two hubs are two threads: one puts its weights away while the other is in the middle of a score."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Sharer):
        def score(self, samples):
            begun.set()
            assert go_on.wait(20)
            return super().score(samples)

    slow, quick = Slow(), Sharer()
    options = {"offload": "cpu", "device": "meta"}
    with RewardHub({"use": slow, **options}) as first, RewardHub({"use": quick, **options}) as second:
        second(batch(2))
        assert quick.trunk.model.seen[-1] == "cpu"
        ticket = first.submit(batch(2))
        assert begun.wait(20)
        second(batch(2))
        go_on.set()
        first.result(ticket)
    assert slow.found == ["meta"] and quick.found == ["meta", "meta"]


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
