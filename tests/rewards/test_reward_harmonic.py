"""The harmonic reward: its limits, what it asks and what it refuses."""

import math

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, Scores, declare
from rewards.harmonic import Harmonic, harmonic

ASKED = []


@declare(deterministic=True, range=(-1.0, 1.0))
def cosine(samples):
    """What the prompt says, as a cosine."""
    ASKED.append(len(samples))
    return [float(s.meta["cos"]) for s in samples]


@declare(range=(0.0, 2.0), media=frozenset({"image", "video"}))
def half(samples):
    return [math.nan if s.meta.get("mute") else 2 * s.meta["b"] for s in samples]


@declare(range=(0.0, 1.0))
def unreachable(samples):
    """A server that does not answer for the second sample, and refuses to judge the third."""
    info = [{"read": "it"}, {"error": "no answer", "failed": True}, {"error": "not of its kind"}]
    return Scores(value=torch.tensor([0.5, math.nan, math.nan]), info=info)


@declare()
def boundless(samples):
    return [0.0 for _ in samples]


HERE = "tests.rewards.test_reward_harmonic"


def samples(*rows):
    return [Sample(media=torch.rand(3, 8, 8), meta=dict(zip(("cos", "b"), row, strict=True))) for row in rows]


def of(weight, rows):
    options = {"similarity": f"{HERE}:cosine", "alignment": f"{HERE}:half", "similarity_weight": weight}
    with RewardHub({"use": "harmonic", "on_error": "raise", **options}) as hub:
        return hub(samples(*rows))


def test_the_limits_are_the_two_rewards():
    a, b = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.1, 0.8, 0.5])
    torch.testing.assert_close(harmonic(a, b, 1.0), a)
    torch.testing.assert_close(harmonic(a, b, 0.0), b)
    torch.testing.assert_close(harmonic(a, b, 0.5), 2 * a * b / (a + b))
    assert harmonic(torch.tensor(0.0), torch.tensor(1.0), 0.3) < 1e-7, "one that is 0 makes it 0"
    between = harmonic(a, b, 0.3)
    assert (between >= torch.minimum(a, b) - 1e-6).all() and (between <= torch.maximum(a, b) + 1e-6).all()


def test_scores_are_brought_to_unit_range_first():
    result = of(0.3, [(0.6, 0.5), (-1.0, 0.7), (1.0, 1.0)])
    a, b = torch.tensor([0.8, 0.0, 1.0]), torch.tensor([0.5, 0.7, 1.0])
    torch.testing.assert_close(result.parts["harmonic"]["similarity"], a)
    torch.testing.assert_close(result.parts["harmonic"]["alignment"], b)
    torch.testing.assert_close(result.total, 1 / (0.3 / (a + 1e-8) + 0.7 / (b + 1e-8)))


def test_what_has_no_weight_is_not_asked():
    ASKED.clear()
    torch.testing.assert_close(of(0.0, [(0.6, 0.5)]).total, torch.tensor([0.5]))
    assert not ASKED
    torch.testing.assert_close(of(1.0, [(0.6, 0.5)]).total, torch.tensor([0.8]))
    assert ASKED


def test_no_verdict_of_one_is_none_at_all():
    reward = Harmonic(f"{HERE}:cosine", f"{HERE}:half")
    one, other = samples((0.5, 0.5), (0.5, 0.5))
    muted = Sample(media=other.media, meta={**other.meta, "mute": True})
    value = reward.score([one, muted]).value
    assert value[0].isfinite() and value[1].isnan()


def test_what_the_two_say_is_kept():
    reward = Harmonic(f"{HERE}:cosine", f"{HERE}:unreachable")
    info = reward.score(samples(*[(0.5, 0.5)] * 3)).info
    assert info[0] == {"alignment": {"read": "it"}}
    assert info[1]["error"] == "alignment: no answer" and info[1]["failed"] is True
    assert info[2] == {"alignment": {"error": "not of its kind"}, "error": "alignment: not of its kind"}
    alone = Harmonic(alignment=f"{HERE}:unreachable", similarity_weight=0.0).score(samples(*[(0.5, 0.5)] * 3))
    assert alone.info == info


@pytest.mark.filterwarnings("ignore:.*No verdict there.*")
def test_a_server_that_one_of_the_two_cannot_reach_stops_the_run_if_errors_do():
    options = {"use": "harmonic", "similarity": f"{HERE}:cosine", "alignment": f"{HERE}:unreachable"}
    with RewardHub({**options, "on_error": "raise"}) as hub, pytest.raises(RewardError, match="alignment: no answer"):
        hub(samples(*[(0.5, 0.5)] * 3))
    with RewardHub(options) as hub:
        assert hub(samples(*[(0.5, 0.5)] * 3)).total.isnan().tolist() == [False, True, True]


def test_a_score_beyond_its_declared_range_counts_as_its_end():
    """A cosine of 1 + 1e-3 by rounding, and a reward that lies about its range."""
    parts = of(0.5, [(1.001, 1.5), (-1.001, -0.5)]).parts["harmonic"]
    assert parts["similarity"].tolist() == [1.0, 0.0]
    assert parts["alignment"].tolist() == [1.0, 0.0]
    assert of(0.5, [(-3.0, 0.5)]).total.item() == pytest.approx(0, abs=1e-6), "and not negative"


def test_it_takes_on_what_its_two_declare():
    reward = Harmonic(f"{HERE}:cosine", f"{HERE}:half")
    assert reward.media == {"image"} and reward.deterministic is False
    assert Harmonic(f"{HERE}:cosine", f"{HERE}:half", 1.0).deterministic is True


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"similarity_weight": 1.5}, "similarity_weight is 1.5; expected a number from 0 to 1"),
        ({"similarity": f"{HERE}:boundless"}, "declares no range.*declare"),
        ({"alignment": "pairs"}, "alignment 'pairs' compares whole groups"),
        ({"alignment": "shaps_clip"}, "alignment 'shaps_clip'"),
        ({"alignment_options": {"wights": "x"}}, "alignment 'shapes_clip'.*wights"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, text):
    with pytest.raises(RewardError, match=text):
        Harmonic(**options)
