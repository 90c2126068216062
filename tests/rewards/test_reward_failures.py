"""Everything that can go wrong with a reward: one sample, one batch, or the whole of it, and never a 0."""

import math
import warnings

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, Sample, Scores, declare
from tests.rewards.makers import batch, noise

# what the warning says is checked where it matters
pytestmark = pytest.mark.filterwarnings("ignore:.*No verdict there.*")


def mean(samples):
    return [sample.media.mean().item() for sample in samples]


def failing(bad, error=None):
    """Mean brightness, but raises when asked for one of the `bad` prompts; remembers the sizes of its calls."""
    sizes = []

    def reward(samples):
        sizes.append(len(samples))
        if any(sample.prompt in bad for sample in samples):
            raise error or ValueError("no face")
        return mean(samples)

    reward.sizes = sizes
    return reward


# ------------------------------------------------------------------------------------------------ R1: one sample raises


def test_a_failing_sample_has_no_verdict_and_the_others_are_scored_as_without_it():
    samples = batch(6)
    reward = failing({"prompt 4"})
    with pytest.warns(UserWarning, match=r"'reward' failed on sample 4 .*ValueError: no face\. No verdict there"):
        result = RewardHub(reward)(samples)
    expected = torch.tensor(mean(samples))
    expected[4] = math.nan
    torch.testing.assert_close(result.total, expected, equal_nan=True)
    assert result.info[4]["reward"] == {"error": "ValueError: no face"}
    assert all("error" not in entry["reward"] for i, entry in enumerate(result.info) if i != 4)
    assert reward.sizes == [6, 1, 1, 1, 1, 1, 1]


def test_on_error_raise_names_reward_sample_group_and_prompt():
    hub = RewardHub({"use": failing({"prompt 4"}), "on_error": "raise", "name": "faces"})
    message = r"reward 'faces' failed on sample 4 \(group 2, prompt 'prompt 4'\): ValueError: no face\. `on_error: nan`"
    with pytest.raises(RewardError, match=message) as caught:
        hub(batch(6))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("bug", [TypeError("x"), NameError("x"), ImportError("x"), NotImplementedError("x")])
def test_a_bug_raises_whatever_the_policy_is_and_names_the_sample(bug):
    with pytest.raises(RewardError, match=r"failed on sample 1 \(group 0, prompt 'prompt 1'\).*a bug in it"):
        RewardHub({"use": failing({"prompt 1"}, bug), "on_error": "nan"})(batch(3))


def test_on_error_has_no_zero():
    with pytest.raises(RewardError, match="on_error is 0; expected nan .* or raise. There is no 0"):
        RewardHub({"use": mean, "on_error": 0})


def test_a_reward_that_only_fails_on_batches_still_scores_and_is_reported_once():
    def fragile(samples):
        if len(samples) > 1:
            raise RuntimeError("sizes differ")
        return mean(samples)

    hub = RewardHub(fragile)
    with pytest.warns(UserWarning, match="fails on 3 samples at once .*RuntimeError: sizes differ.* `batch_size: 1`"):
        assert hub(batch(3)).total.tolist() == pytest.approx(mean(batch(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub(batch(3))


def test_a_group_reward_is_never_split_and_fails_by_the_group():
    calls = []

    @declare(scope="group")
    def ranked(samples):
        calls.append([sample.prompt for sample in samples])
        if any(sample.prompt == "prompt 3" for sample in samples):
            raise ValueError("judge says no")
        return mean(samples)

    samples = [noise(i, group=g) for i, g in enumerate([0, 1, 0, 1, 2, 2])]
    result = RewardHub({"use": ranked, "batch_size": 3})(samples)
    assert result.total.isnan().tolist() == [False, True, False, True, False, False]
    assert result.info[1]["ranked"]["error"] == "ValueError: judge says no"
    assert calls == [["prompt 0", "prompt 2"], ["prompt 1", "prompt 3"], ["prompt 4", "prompt 5"]]
    whole = RewardHub(declare(scope="group")(lambda samples: mean(samples)))(samples)
    assert whole.total.tolist() == mean(samples), "interleaved groups come back in the order of the samples"
    with pytest.raises(RewardError, match=r"failed on samples 1, 3 \(group 1, prompt 'prompt 1'\)"):
        RewardHub({"use": ranked, "on_error": "raise"})(samples)


# ---------------------------------------------------------------------------------------------- R2: NaN, Inf, bad input


def test_nan_none_and_infinities_have_no_verdict_and_a_reason():
    result = RewardHub(lambda samples: [1.0, None, math.nan, math.inf])(batch(4))
    assert result.total.isnan().tolist() == [False, True, True, True]
    assert [("error" in entry["<lambda>"]) for entry in result.info] == [False, True, True, True]


def test_broken_pixels_never_reach_a_reward():
    samples = batch(4)
    samples[2].media[0, 0, 0] = math.inf
    reward = failing({"prompt 2"})
    result = RewardHub([reward, "pixel.brightness"])(samples)
    assert result.total.isnan().tolist() == [False, False, True, False]
    assert "NaN or infinite" in result.info[2]["reward"]["error"]
    assert "NaN or infinite" in result.info[2]["pixel.brightness"]["error"]
    assert reward.sizes == [3]


def test_missing_meta_is_no_verdict_and_one_warning():
    @declare(needs=("text", "box"))
    def needy(samples):
        return [float(len(sample.meta["text"])) for sample in samples]

    samples = [noise(0, meta={"text": "abc", "box": 1}), noise(1, meta={"box": 1}), noise(2, meta={"text": None})]
    hub = RewardHub(needy)
    with pytest.warns(UserWarning, match=r"sample 1 \(group 0, prompt 'prompt 1'\): meta has no 'text'") as caught:
        result = hub(samples)
        hub(samples)
    assert len(caught) == 1
    assert result.total.isnan().tolist() == [False, True, True]
    assert "'text' and no 'box'" in result.info[2]["needy"]["error"]


def test_a_group_reward_loses_the_group_of_a_sample_that_cannot_be_judged():
    samples = batch(4)
    samples[1].media.fill_(math.nan)
    result = RewardHub(declare(scope="group")(lambda samples: mean(samples)))(samples)
    assert result.total.isnan().tolist() == [True, True, False, False]
    assert "another sample of its group" in result.info[0]["<lambda>"]["error"]


def test_a_video_reward_refuses_an_image():
    hub = RewardHub(declare(media={"video"}, name="motion")(lambda samples: mean(samples)))
    with pytest.raises(
        RewardContractError, match=r"'motion' judges videos; sample 0 .*image of shape \[3, 32, 32\]. Mend"
    ):
        hub([noise()])


def test_the_hub_takes_samples_only():
    with pytest.raises(RewardContractError, match="item 1 is a Tensor; the hub takes rewards.Sample"):
        RewardHub(mean).submit([noise(), torch.rand(3, 8, 8)])


# ------------------------------------------------------------------------------------------------ R3: the contract


@pytest.mark.parametrize(
    "returned", [[1.0], 1.0, "ab", [True, False], torch.zeros(2, 1), torch.zeros(2, requires_grad=True)]
)
def test_a_broken_contract_raises_whatever_the_policy_is(returned):
    with pytest.raises(RewardContractError, match="reward 'mine' returned .* expected"):
        RewardHub({"use": lambda samples: returned, "name": "mine", "on_error": "nan"})(batch(2))


def test_a_graph_cannot_leak_out_of_a_reward_unnoticed():
    """The hub scores without gradients, so an ordinary torch reward is fine, whatever its weights are."""
    weight = torch.nn.Parameter(torch.ones(()))
    result = RewardHub(lambda samples: torch.stack([weight * sample.media.mean() for sample in samples]))(batch(2))
    assert not result.total.requires_grad


# ------------------------------------------------------------------------------------------------ loading and warm-up


class Loaded:
    def __init__(self, error=None):
        self.error, self.calls = error, []

    def load(self, device, dtype):
        self.calls.append(("load", str(device), dtype))
        if self.error:
            raise self.error

    def unload(self):
        self.calls.append("unload")

    def score(self, samples):
        self.calls.append(len(samples))
        return mean(samples)


def test_load_comes_once_before_the_first_score_and_unload_at_the_end():
    reward = Loaded()
    with RewardHub({"use": reward, "dtype": "bfloat16"}, device="cpu") as hub:
        assert reward.calls == []
        hub(batch(2)), hub(batch(3))
    assert reward.calls == [("load", "cpu", torch.bfloat16), 2, 3, "unload"]


def test_a_reward_that_cannot_be_loaded_always_raises():
    with pytest.raises(RewardError, match="reward 'Loaded' cannot be loaded: OSError: no weights.bin"):
        RewardHub(Loaded(OSError("no weights.bin")))(batch(2))


def test_warm_up_scores_two_samples_and_leaves_the_noise_of_the_run_alone():
    reward, state = Loaded(), torch.get_rng_state()
    assert list(RewardHub(reward, device="cpu").warmup()) == ["Loaded"]
    assert reward.calls == [("load", "cpu", torch.float32), 2]
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_up_has_no_mercy():
    def broken(samples):
        raise ConnectionError("refused")

    with pytest.raises(RewardError, match="'broken' failed on sample 0 .*ConnectionError: refused"):
        RewardHub({"use": broken, "on_error": "nan"}).warmup()
    with pytest.raises(RewardContractError, match="returned 1 scores; expected 2"):
        RewardHub(lambda samples: [1.0]).warmup()


def test_a_reward_that_needs_meta_is_loaded_but_not_bothered():
    reward = Loaded()
    reward.needs = ("text",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardHub(reward, device="cpu").warmup()
    assert reward.calls == [("load", "cpu", torch.float32)]


def test_warm_up_with_own_samples_and_with_videos():
    seen = []
    hub = RewardHub(declare(media={"video"})(lambda samples: seen.append(samples) or mean(samples)))
    hub.warmup(), hub.warmup([noise(frames=7)])
    assert [sample.kind for sample in seen[0]] == ["video", "video"]
    assert seen[1][0].media.shape[0] == 7


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.filterwarnings("ignore:.*ran out of memory with 4 samples")
def test_out_of_memory_halves_the_batch_from_then_on():
    sizes = []

    def big(samples):
        sizes.append(len(samples))
        if len(samples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(samples)

    hub = RewardHub({"use": big, "batch_size": 8})
    with pytest.warns(UserWarning, match="ran out of memory with 8 samples; batch_size is now 4"):
        assert hub(batch(9)).total.tolist() == pytest.approx(mean(batch(9)))
    hub(batch(4))
    assert sizes == [8, 4, 2, 2, 2, 2, 1, 2, 2]


def test_out_of_memory_on_one_sample_says_where_to_go():
    def big(samples):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(RewardError, match="smallest batch .*Mend: .*`device: cpu`"):
        RewardHub(big)(batch(2))


# ---------------------------------------------------------------------------------------------- a reward that has gone


def outage(calls):
    """A reward whose server is down in the calls (by number) that are listed."""
    number = -1

    def scored(samples):
        if number in calls:
            raise ConnectionError("refused")
        return mean(samples)

    def step(hub):
        nonlocal number
        number += 1
        return hub(batch(2))

    return scored, step


def test_a_reward_that_is_down_from_the_start_stops_the_run_at_the_third_call():
    reward, step = outage(range(99))
    hub = RewardHub({"use": reward, "name": "judge"})
    step(hub), step(hub)
    message = (
        r"'judge' gives no verdict on 100% of the samples .* 3 calls in a row. Last error: ConnectionError: refused"
    )
    with pytest.raises(RewardError, match=message):
        step(hub)


def test_a_short_outage_is_ridden_out_and_a_long_one_is_not():
    """From health the average passes 1/2 at the 4th failing call (1 - 0.8^4 = 0.59), so the third strike is the 6th."""
    reward, step = outage({1, 2, 3, 4, 5, 7, 8, *range(30, 99)})
    hub = RewardHub(reward)
    for _ in range(30):
        step(hub)
    for _ in range(5):
        assert step(hub).total.isnan().all()
    with pytest.raises(RewardError, match="3 calls in a row"):
        step(hub)


def test_a_logged_reward_cannot_stop_a_run_and_the_limit_can_be_raised():
    reward, step = outage(range(99))
    logged = RewardHub([mean, {"use": reward, "weight": 0}])
    patient = RewardHub(reward, max_nan_frac=1.0)
    for _ in range(6):
        assert not step(logged).total.isnan().any()
        assert step(patient).nan_frac == {"scored": 1.0}


# ------------------------------------------------------------------------------------------------ video by frames


def test_an_image_reward_sees_frames_of_a_video_and_answers_their_mean():
    shapes = []

    def reward(samples):
        shapes.append([tuple(sample.media.shape) for sample in samples])
        value = torch.stack([sample.media.mean() for sample in samples])
        return Scores(value=value, parts={"twice": 2 * value}, info=[{"mean": v} for v in value.tolist()])

    samples = [noise(0, frames=8), noise(1)]
    result = RewardHub({"use": reward, "frames": 2})(samples)
    expected = [samples[0].media[[2, 6]].mean().item(), samples[1].media.mean().item()]
    assert result.total.tolist() == pytest.approx(expected)
    assert result.parts["reward"]["twice"].tolist() == pytest.approx([2 * value for value in expected])
    assert len(result.info[0]["reward"]["frames"]) == 2
    assert shapes == [[(3, 32, 32)] * 4]


@pytest.mark.parametrize(("batch_size", "calls"), [(None, [12]), (3, [3, 3, 3, 3]), (2, [2] * 4 + [2, 2]), (7, [6, 6])])
def test_frames_are_scored_together_as_far_as_batch_size_allows(batch_size, calls):
    sizes = []

    def reward(samples):
        sizes.append(len(samples))
        return mean(samples)

    videos = [noise(seed, frames=8) for seed in range(3)]
    result = RewardHub({"use": reward, "batch_size": batch_size})(videos)
    assert result.total.tolist() == pytest.approx([v.media[[1, 3, 5, 7]].mean().item() for v in videos])
    assert sizes == calls


def test_a_group_reward_compares_frames_of_the_same_place_only():
    class Rank:
        scope = "group"

        def score(self, samples):
            means = mean(samples)
            rivals = [[m for m, s in zip(means, samples, strict=True) if s.group == own.group] for own in samples]
            assert {len(group) for group in rivals} == {2}
            return [float(own == max(group)) for own, group in zip(means, rivals, strict=True)]

    videos = [noise(seed, frames=8, group=seed // 2) for seed in range(4)]
    result = RewardHub({"use": Rank(), "name": "rank"})(videos)
    looks = torch.stack([v.media[[1, 3, 5, 7]].mean((1, 2, 3)) for v in videos]).reshape(2, 2, 4)
    won = (looks == looks.amax(1, keepdim=True)).float().mean(-1)
    assert torch.equal(result.total, won.flatten())


@pytest.mark.filterwarnings("ignore:.*ran out of memory")
@pytest.mark.parametrize(
    ("count", "fits", "sizes"), [(2, 2, [8, 4, 2, 2, 2, 2]), (2, 1, [8, 4, 2] + [1] * 8), (1, 1, [4, 2] + [1] * 4)]
)
def test_out_of_memory_halves_the_frames_too(count, fits, sizes):
    seen = []

    def big(samples):
        seen.append(len(samples))
        if len(samples) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(samples)

    videos = [noise(seed, frames=4) for seed in range(count)]
    assert RewardHub(big)(videos).total.tolist() == pytest.approx(mean(videos))
    assert seen == sizes


def test_a_frame_without_a_verdict_leaves_the_video_without_one():
    def dark_is_unreadable(samples):
        value = [sample.media.mean().item() for sample in samples]
        info = [{} if v > 0.1 else {"error": "too dark"} for v in value]
        return Scores(value=torch.tensor([v if v > 0.1 else math.nan for v in value]), info=info)

    video = Sample(media=torch.cat([torch.ones(3, 3, 4, 4), torch.zeros(1, 3, 4, 4)]))
    result = RewardHub(dark_is_unreadable)([video])
    assert result.total.isnan().all()
    assert result.info[0]["dark_is_unreadable"]["error"] == "too dark"
