"""Pref-GRPO: who beats whom in a group, what that is worth, and the guarded, reweighted loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.pref_grpo import PrefGRPO
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, train

PROMPTS, K = 3, 5
SMALL = PrefGRPO(num_steps=6, step_share=1.0)
NAN = math.nan


def rates_by_hand(rewards, margin):
    """Wins plus half the ties over the other members with a verdict; a group as a list."""
    out = []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and r == r]
        points = [0.5 if abs(own - r) <= margin else float(own > r) for r in others]
        out.append(sum(points) / len(points) if own == own and points else NAN)
    return out


def z_scores(group):
    values = np.array(group, dtype=float)
    known = values[values == values]
    spread = known.std(ddof=1)
    return (values - known.mean()) / (spread + 1e-8) if spread else values * 0


def credit_of(algorithm, groups, weights=None):
    """Credit of each sample where the rewards (or the lists of several, by name) are these, as [G][K]."""
    scores = groups if isinstance(groups, dict) else {"reward": groups}
    weights = weights or dict.fromkeys(scores, 1.0)
    first = next(iter(scores.values()))
    batch = collect(algorithm, ToyPolicy(), num_prompts=len(first), k=len(first[0]))
    tensors = {name: torch.tensor(values, dtype=torch.float64).flatten() for name, values in scores.items()}
    total = sum(weights[name] * score for name, score in tensors.items())
    credit = algorithm.credit(replace(batch, rewards=total, scores=tensors, weights=weights))
    leaf = batch.trajectory.leaves.int().argmax(1)
    found = credit[leaf.argsort(stable=True)].reshape(len(total), -1)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=0, equal_nan=True)
    return found[:, 0].reshape(len(first), -1).double().numpy()


def test_defaults_are_the_papers():
    record = PrefGRPO().model_dump()
    expected = {
        "num_steps": 25, "shift": 3.0, "sde": "flow_sde", "eta": 0.7, "clip_range": 1e-4, "objective": "guard",
        "step_share": 0.6, "adv_eps": 1e-8, "adv_clip": 5.0, "adv_std": "group", "kl_coef": 0.0, "shared_noise": True,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert PrefGRPO().needs.means


def test_plan_and_share_of_the_steps():
    assert PrefGRPO().plan(linear_times(25), 0, 9, 0).fanout == (9, *[1] * 24)
    batch = collect(PrefGRPO(num_steps=25), ToyPolicy(), num_prompts=2, k=4)
    trained = [int((~batch.advantages[batch.trajectory.leaves[:, leaf]].isnan()).sum()) for leaf in range(8)]
    assert trained == [14] * 8


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
def test_credit_is_the_z_score_of_the_win_rate(margin):
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(PROMPTS, K, generator=generator, dtype=torch.float64).tolist()
    expected = [z_scores(rates_by_hand(group, margin)) for group in groups]
    found = credit_of(SMALL.model_copy(update={"margin": margin}), groups)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_only_the_order_counts():
    groups = [[0.1, 0.7, 0.3, 0.9, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0]]
    stretched = [[math.exp(9 * r) for r in groups[0]], [r**3 for r in groups[1]]]
    np.testing.assert_array_equal(credit_of(SMALL, groups), credit_of(SMALL, stretched))
    assert sorted(credit_of(SMALL, groups)[0]) == sorted(credit_of(SMALL, groups)[1])


def test_ties_count_half_and_rounding_is_a_tie():
    groups = [[0.5, 0.5, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2], [1.0, 1.0 + 1e-8, 1.0 - 1e-8, 1.0]]
    found = credit_of(SMALL, groups)
    np.testing.assert_allclose(found[0], z_scores([0.5, 0.5, 1.0, 0.0]), rtol=1e-5, atol=1e-7)
    assert (found[1:] == 0).all()


def test_without_margin_rewards_are_the_win_rates():
    groups = [[0.5, 0.125, 0.875, 0.5], [0.9, 0.1, 0.2, 0.1]]
    found = credit_of(SMALL.model_copy(update={"margin": None}), groups)
    np.testing.assert_allclose(found, [z_scores(group) for group in groups], rtol=1e-5)


@pytest.mark.parametrize("margin", [0.0, None])
def test_each_reward_has_win_rates_of_its_own(margin):
    """0.4 z(rates of a) + 0.6 z(rates of b), although b's numbers are a thousand times as large."""
    scores = {"a": [[0.1, 0.5, 0.4, 0.2], [0.3, 0.1, 0.9, 0.8]], "b": [[900.0, 10.0, 20.0, 11.0], [1.0, 2.0, 3.0, 2.0]]}
    weights = {"a": 0.4, "b": 0.6}
    expected = sum(
        weights[name]
        * np.array([z_scores(group if margin is None else rates_by_hand(group, margin)) for group in groups])
        for name, groups in scores.items()
    )
    found = credit_of(SMALL.model_copy(update={"margin": margin}), scores, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_of_a_sum_there_is_one_win_rate():
    scores = {"a": [[0.1, 0.5, 0.4, 0.2]], "b": [[900.0, 10.0, 20.0, 11.0]]}
    found = credit_of(SMALL.model_copy(update={"combine": "sum"}), scores)
    np.testing.assert_allclose(found[0], z_scores([1.0, 0.0, 2 / 3, 1 / 3]), rtol=1e-5)


@pytest.mark.parametrize("combine", ["per_reward", "sum"])
def test_a_sample_without_a_verdict_plays_against_nobody(combine):
    algorithm = SMALL.model_copy(update={"combine": combine})
    found = credit_of(algorithm, [[0.1, NAN, 0.9, 0.4], [NAN, NAN, 0.5, NAN]])
    np.testing.assert_allclose(found[0], z_scores([0.0, NAN, 1.0, 0.5]), rtol=1e-5, atol=1e-7)
    assert np.isnan(found[1]).all()  # one sample alone has nobody to be better than


def test_a_verdict_is_one_of_all_rewards():
    """Sample 1 has no verdict of b, so nobody is compared with it in a either."""
    scores = {"a": [[0.1, 0.2, 0.3, 0.9]], "b": [[4.0, NAN, 3.0, 2.0]]}
    weights = {"a": 0.75, "b": 0.25}
    rates = {"a": [0.0, NAN, 0.5, 1.0], "b": [1.0, NAN, 0.5, 0.0]}
    expected = sum(weights[name] * z_scores(rate) for name, rate in rates.items())
    np.testing.assert_allclose(credit_of(SMALL, scores, weights)[0], expected, rtol=1e-5, atol=1e-7)


def test_loss_is_the_guarded_ratio_over_num_steps_dt():
    """x_next = mu_old + std eps, so the normalised log-ratio is mean_d((mu - mu_old) eps)."""
    algorithm = PrefGRPO(num_steps=6, eta=0.7, clip_range=0.005)
    policy = ToyPolicy()
    batch = live(collect(algorithm, policy, num_prompts=PROMPTS, k=K))
    edges = batch.trajectory

    def flow_step():
        x, t, t_next = edges.x.double(), edges.t[:, None].double(), edges.t_next[:, None].double()
        v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)).double()
        g = 0.7 * (t / torch.where(t == 1, 1 - t_next, 1 - t)).sqrt()
        mean = x - (t - t_next) * (v + g**2 / (2 * t) * (x + (1 - t) * v))
        return mean, g * (t - t_next).sqrt()

    with torch.no_grad():
        old, std = flow_step()
        policy.bias += 0.05
        new, _ = flow_step()
    ratio = ((new - old) * (edges.x_next.double() - old) / std).mean(1).exp()
    a = batch.advantages.double()
    each = torch.maximum(-a * ratio, -a * ratio.clamp(0.995, 1.005))
    expected = (each / (6 * (edges.t - edges.t_next).double())).mean()
    loss, _ = gradient(algorithm, policy, batch)
    assert 0.1 < float(loss.metrics["clip_frac"]) < 0.9
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_weight_goes_with_the_guarded_ratio():
    batch = collect(SMALL, ToyPolicy())
    steps = batch.trajectory
    torch.testing.assert_close(SMALL.weight(batch), 1 / (6 * (steps.t - steps.t_next)))
    assert PrefGRPO(objective="clip").weight(batch) is None


def test_it_learns():
    policy, records = train(PrefGRPO(num_steps=6), iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5 and last > -0.8
    assert (policy.bias > 0.5).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"margin": -0.1}, "greater than or equal to 0"),
        ({"margin": math.inf}, "finite"),
        ({"step_share": 0.0}, "greater than 0"),
        ({"objective": "guarded"}, "guard"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        PrefGRPO(**fields)
