"""Every reward of the folder keeps the contract. A new module is found here by itself."""

import copy
import importlib
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewards import RewardHub, Scores, available, build, traits_of
from rewards.resolve import resolve
from tests.rewards.makers import noise, text

PROMPTS = [
    "a red circle moves left",
    'a sign that says "hello"',
    "two squares",
    "a star above a blue triangle",
    "anything else",
]


def own(name, what):
    """`what` of the reward's own test file, `test_reward_<name>.py`, or of its module's; None where it has none.

    tiny(folder)   writes a tiny model and returns the options with which the reward uses it
    metas()        the metadata that its samples need
    """
    for part in (name.replace(".", "_"), name.split(".")[0]):
        if (Path(__file__).parent / f"test_reward_{part}.py").is_file():
            return getattr(importlib.import_module(f"tests.rewards.test_reward_{part}"), what, None)
    return None


def samples_for(traits, count, name):
    """Noise, a drawn word and prompts of several kinds; one group, so that rewards of groups can be asked too."""
    meta = (own(name, "metas") or dict)()
    frames = None if "image" in traits.media else 4
    made = [noise(seed, 96, frames=frames, prompt=PROMPTS[seed % 5], fps=8.0, meta=meta) for seed in range(count)]
    if frames is None and count > 1:
        made[1] = text("hello", 96, 24, prompt=PROMPTS[1], meta=meta)
    return made


@pytest.fixture(autouse=True, scope="module")
def offline():
    """Any attempt to reach another machine is an error, loading included."""
    connect = socket.socket.connect

    def local(self, address):
        assert address[0] in ("127.0.0.1", "::1"), f"a reward tried to reach {address}"
        return connect(self, address)

    def refuse(*args, **kwargs):
        raise AssertionError("a reward tried to reach the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        for name in ("connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        yield


@pytest.fixture(scope="module", params=available())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reward(name, tmp_path_factory):
    """The reward, with a tiny model where it needs one; the hub loads it."""
    tiny = own(name, "tiny")
    return build(name, tiny(tmp_path_factory.mktemp("tiny")) if tiny else {})


@pytest.fixture(scope="module")
def hub(reward, offline):
    with RewardHub({"use": reward, "on_error": "raise"}, device="cpu", max_nan_frac=1.0) as made:
        made.warmup()
        yield made


@pytest.fixture
def loaded(hub, reward):
    return reward, traits_of(reward)


def test_it_has_a_docstring(name):
    assert (resolve(name).__doc__ or "").strip()


@pytest.mark.parametrize("count", [1, 5])
def test_it_answers_every_sample_with_fp32(hub, loaded, count, name):
    samples = samples_for(loaded[1], count, name)
    raw = loaded[0].score(samples)
    value = raw.value if isinstance(raw, Scores) else raw
    assert len(value) == count
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.float32
    result = hub(samples)
    assert result.total.shape == (count,)
    assert not result.total.isinf().any()


def test_it_has_a_verdict_on_something(hub, loaded, name):
    assert not hub(samples_for(loaded[1], 5, name)).total.isnan().all()


def test_it_stays_within_its_declared_range(hub, loaded, name):
    if loaded[1].range is not None:
        low, high = loaded[1].range
        value = hub(samples_for(loaded[1], 5, name)).total
        assert value[~value.isnan()].min() >= low - 1e-6
        assert value[~value.isnan()].max() <= high + 1e-6


def test_a_sample_scores_the_same_alone_and_in_a_batch(hub, loaded, name):
    if loaded[1].scope == "sample":
        samples = samples_for(loaded[1], 5, name)
        alone = torch.cat([hub([sample]).total for sample in samples])
        torch.testing.assert_close(hub(samples).total, alone, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_deterministic_means_bitwise_equal(hub, loaded, name):
    if loaded[1].deterministic:
        samples = samples_for(loaded[1], 5, name)
        first, again = hub(samples).total, hub(samples).total
        torch.testing.assert_close(first, again, equal_nan=True, rtol=0, atol=0)


def test_it_leaves_its_inputs_alone(loaded, name):
    samples = samples_for(loaded[1], 3, name)
    before = [(sample.media.clone(), copy.deepcopy(sample.meta)) for sample in samples]
    loaded[0].score(samples)
    for sample, (media, meta) in zip(samples, before, strict=True):
        assert torch.equal(sample.media, media)
        assert sample.meta == meta


def test_gradients_reach_the_pixels_where_it_says_so(loaded, name):
    reward, traits = loaded
    if traits.differentiable:
        samples = samples_for(traits, 3, name)
        for sample in samples:
            sample.media.requires_grad_()
        raw = reward.score(samples)
        value = raw.value if isinstance(raw, Scores) else raw
        value.sum().backward()
        for sample in samples:
            assert sample.media.grad.isfinite().all()
            assert sample.media.grad.abs().max() > 0


def test_it_judges_videos_of_the_same_pixels_like_images(hub, loaded, name):
    if loaded[1].media == {"image"} and loaded[1].scope == "sample":
        image = samples_for(loaded[1], 2, name)[1]
        video = replace(image, media=image.media.expand(4, 3, 96, 96), fps=8.0)
        torch.testing.assert_close(hub([video]).total, hub([image]).total, equal_nan=True)


def test_its_scores_can_be_had_in_every_form_of_the_config(name):
    RewardHub(name), RewardHub([name]), RewardHub({name: 1.0}), RewardHub({"use": name, "weight": 1.0})
