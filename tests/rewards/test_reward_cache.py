"""A remembered score is the same score, for the same sample only."""

from dataclasses import replace

import pytest
import torch

from rewards import RewardError, RewardHub, Scores, declare
from rewards.cache import ScoreCache
from tests.rewards.makers import batch, noise


class Counting:
    """Mean brightness; counts what it was really asked."""

    deterministic = True

    def __init__(self):
        self.seen = 0

    def score(self, samples):
        self.seen += len(samples)
        value = torch.stack([sample.media.mean() for sample in samples])
        return Scores(value=value, parts={"twice": 2 * value}, info=[{"prompt": s.prompt} for s in samples])


def test_known_samples_are_not_asked_again_and_answers_are_equal():
    reward = Counting()
    with RewardHub({"use": reward, "cache": 10}) as hub:
        first, again = hub(batch(3)), hub([*batch(3), noise(9)])
    assert reward.seen == 4
    assert torch.equal(first.total, again.total[:3])
    assert torch.equal(first.parts["Counting"]["twice"], again.parts["Counting"]["twice"][:3])
    assert again.info[1]["Counting"] == {"prompt": "prompt 1"}


def test_the_least_recently_used_verdict_leaves():
    reward = Counting()
    with RewardHub({"use": reward, "cache": 2}) as hub:
        for seed in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, since 0 was used after it
            hub([noise(seed)])
    assert reward.seen == 4


def test_a_key_depends_on_everything_a_score_may_depend_on():
    sample = noise(meta={"text": "a", "n": 1, "box": torch.zeros(2)})
    others = [
        replace(sample, prompt="other"),
        replace(sample, fps=8.0),
        replace(sample, media=sample.media.flip(0)),
        replace(sample, media=sample.media.reshape(3, 16, 64)),
        replace(sample, meta={**sample.meta, "text": "b"}),
        replace(sample, meta={**sample.meta, "n": 1.0}),
        replace(sample, meta={**sample.meta, "n": "1"}),
        replace(sample, meta={**sample.meta, "box": torch.ones(2)}),
        replace(sample, meta={**sample.meta, "more": None}),
    ]
    cache = ScoreCache("mine", 9)
    keys = [cache.key(one) for one in [sample, *others]] + [ScoreCache("other", 9).key(sample)]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert cache.key(replace(sample, group=5, meta=dict(reversed(sample.meta.items())))) == keys[0]


def test_meta_without_stable_bytes_is_never_remembered():
    reward = Counting()
    with RewardHub({"use": reward, "cache": 5}) as hub:
        hub([noise(meta={"thing": object()})])
        hub([noise(meta={"thing": object()})])
    assert reward.seen == 2


def test_a_missing_verdict_is_asked_again():
    calls = []

    @declare(deterministic=True)
    def flaky(samples):
        calls.append(len(samples))
        return [None if len(calls) == 1 else 1.0 for _ in samples]

    with RewardHub({"use": flaky, "cache": 5}) as hub:
        assert hub([noise()]).total.isnan().all()
        assert hub([noise()]).total.tolist() == [1.0]


def test_only_deterministic_sample_rewards_can_be_cached():
    def plain(samples):
        return [0.0] * len(samples)

    with pytest.raises(RewardError, match="'plain' cannot be cached: it declares deterministic = False"):
        RewardHub({"use": plain, "cache": 5})
    with pytest.raises(RewardError, match="scope = 'group'"):
        RewardHub({"use": declare(deterministic=True, scope="group")(plain), "cache": 5})
