"""Many rewards at once: overlap, order, names, and one result that adds up."""

import threading
import time

import pytest
import torch

from rewards import RewardError, RewardHub, declare
from tests.rewards.makers import batch, noise


def mean(samples):
    return [sample.media.mean().item() for sample in samples]


def test_a_slow_reward_runs_while_the_caller_goes_on():
    started, release = threading.Event(), threading.Event()

    def slow(samples):
        started.set()
        assert release.wait(60)
        return mean(samples)

    with RewardHub(slow) as hub:
        ticket = hub.submit(batch(2))
        assert started.wait(60)  # the reward is running, and this thread is free
        release.set()
        assert hub.result(ticket).total.tolist() == pytest.approx(mean(batch(2)))


def test_lanes_of_two_devices_run_at_the_same_time():
    """Each waits for the other, which only works if both run at once. "meta" is a second device on any machine."""
    barrier = threading.Barrier(2, timeout=60)

    def here(samples):
        barrier.wait()
        return [1.0] * len(samples)

    def there(samples):
        barrier.wait()
        return [2.0] * len(samples)

    with RewardHub([{"use": here, "device": "cpu"}, {"use": there, "device": "meta"}]) as hub:
        assert hub(batch(2)).total.tolist() == [3.0, 3.0]


def test_a_reward_runs_where_the_entry_says_or_where_it_wants_or_where_the_hub_is():
    seen = {}

    def reward(samples):
        seen.setdefault("devices", []).append(samples[0].media.device.type)
        return [0.0] * len(samples)

    for entry in (
        {"use": reward, "device": "cpu"},
        {"use": declare(device="cpu")(lambda samples: reward(samples))},
        reward,
    ):
        with RewardHub(entry, device="meta") as hub:
            hub([noise()])
    assert seen["devices"] == ["cpu", "cpu", "meta"]


def test_one_lane_is_first_in_first_out_on_one_thread():
    log = []

    def reward(samples):
        time.sleep(0.01 if samples[0].prompt == "prompt 0" else 0)
        log.append((samples[0].prompt, threading.get_ident()))
        return mean(samples)

    with RewardHub(reward) as hub:
        tickets = [hub.submit([noise(seed)]) for seed in range(5)]
        totals = [hub.result(ticket).total.item() for ticket in reversed(tickets)]
    assert [prompt for prompt, _ in log] == [f"prompt {seed}" for seed in range(5)]
    assert len({thread for _, thread in log}) == 1
    assert threading.get_ident() not in {thread for _, thread in log}
    assert totals == pytest.approx(mean([noise(seed) for seed in (4, 3, 2, 1, 0)]))


def test_results_come_in_the_order_of_the_config_whoever_is_first():
    def late(samples):
        time.sleep(0.05)
        return [1.0] * len(samples)

    def early(samples):
        return [2.0] * len(samples)

    with RewardHub([{"use": late, "device": "meta"}, early], device="cpu") as hub:
        result = hub(batch(4))
    assert list(result.scores) == list(result.parts) == list(result.seconds) == ["late", "early"]
    assert all(list(entry) == ["late", "early"] for entry in result.info)
    assert result.seconds["late"] >= 0.05


def test_batches_are_cut_and_put_together_in_order():
    sizes = []

    def reward(samples):
        sizes.append(len(samples))
        return mean(samples)

    with RewardHub({"use": reward, "batch_size": 4}) as hub:
        assert hub(batch(10)).total.tolist() == pytest.approx(mean(batch(10)))
    assert sizes == [4, 4, 2]


def test_a_reward_sees_fp32_without_a_graph():
    seen = []

    def reward(samples):
        seen.extend(samples)
        return mean(samples)

    half = noise(meta={"a": 1}, group=7)
    media = half.media.to(torch.bfloat16).requires_grad_()
    with RewardHub(reward) as hub:
        hub([type(half)(media=media, prompt="p", group=7, meta=half.meta)])
    assert seen[0].media.dtype == torch.float32
    assert not seen[0].media.requires_grad
    assert (seen[0].prompt, seen[0].group, seen[0].meta) == ("p", 7, {"a": 1})


def test_scores_of_several_processes_can_be_combined_after_gathering():
    """A rank within the group is only right when all of the group is there."""
    with RewardHub([{"use": mean, "norm": "rank"}, {"use": "pixel.redness", "weight": 0.5}]) as hub:
        samples = batch(6, group_size=3)
        whole = hub(samples)
        halves = [hub(samples[::2]), hub(samples[1::2])]
        order = [0, 2, 4, 1, 3, 5]
        scores = {name: torch.cat([half.scores[name] for half in halves]) for name in whole.scores}
        again = hub.combine(scores, torch.tensor([samples[i].group for i in order]))
    torch.testing.assert_close(again, whole.total[order])


def test_names_come_from_the_config():
    with RewardHub({"pixel.brightness": 2.0, "pixel.redness": 0}) as hub:
        result = hub([noise()])
    assert list(result.scores) == ["pixel.brightness", "pixel.redness"]
    torch.testing.assert_close(result.total, 2 * result.scores["pixel.brightness"])
    names = [{"use": mean, "name": "a"}, mean, declare(name="b")(lambda samples: mean(samples))]
    with RewardHub(names) as hub:
        assert list(hub([noise()]).scores) == ["a", "mean", "b"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([mean, mean], "two rewards are called 'mean'; tell them apart with `name:`"),
        ({"pixel.redness": 0}, r"every reward has weight 0 \(pixel.redness\): nothing to train on"),
        ([{"weight": 1.0}], "a reward entry needs `use: name`; this one has weight"),
        ({"use": mean, "dtype": "int8"}, "dtype is 'int8'; expected float32"),
        ({"use": mean, "batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"use": mean, "frames": 1.5}, "frames is 1.5"),
    ],
)
def test_a_config_that_means_nothing_is_refused_at_once(entries, message):
    with pytest.raises(RewardError, match=message):
        RewardHub(entries)


def test_no_samples_and_no_rewards():
    with RewardHub([mean, {"use": "pixel.redness", "norm": "rank"}]) as hub:
        result = hub([])
    assert result.total.shape == (0,)
    assert result.info == []
    with pytest.raises(RewardError, match="no reward is given; there are: .*ocr"):
        RewardHub([])


def test_a_closed_hub_drops_what_has_not_started():
    release = threading.Event()
    done = []

    def slow(samples):
        release.wait(60)
        done.append(samples[0].prompt)
        return mean(samples)

    hub = RewardHub(slow)
    first, second = hub.submit([noise(0)]), hub.submit([noise(1)])
    second.futures["slow"].add_done_callback(lambda _: release.set())  # being dropped, it lets the first one go on
    hub.close()
    assert done == ["prompt 0"]
    assert not hub.result(first).total.isnan().any()
    assert second.futures["slow"].cancelled()
    with pytest.raises(RuntimeError):
        hub.submit([noise(2)])


def test_an_error_of_one_reward_leaves_the_hub_usable():
    def moody(samples):
        if samples[0].prompt == "prompt 0":
            raise TypeError("bug")
        return mean(samples)

    with RewardHub([moody, "pixel.brightness"]) as hub:
        with pytest.raises(RewardError, match="moody"):
            hub([noise(0)])
        assert not hub([noise(1)]).total.isnan().any()


def test_inputs_stay_what_they_were():
    samples = batch(3, meta={"a": [1]})
    before = [sample.media.clone() for sample in samples]
    with RewardHub(["pixel.brightness", "pixel.jpeg_size"]) as hub:
        hub(samples)
    assert all(torch.equal(a, sample.media) for a, sample in zip(before, samples, strict=True))
