"""DanceGRPO: the published numbers, which samples and steps it trains on, and what they are worth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from flowrl.algorithms.dance_grpo import DanceGRPO
from samplers import linear_times, shifted_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, train

PROMPTS, K = 3, 8


def two_rewards(batch, scale=100.0):
    """The batch with a second, much larger reward that wants something else, weights 1 and -2."""
    x0 = batch.trajectory.x0.double()
    scores = {"near": -(x0 - 1).square().sum(1), "wide": scale * (x0[:, 0] - x0[:, 1]).abs()}
    weights = {"near": 1.0, "wide": -2.0}
    rewards = sum(weights[name] * scores[name] for name in scores)
    return replace(batch, scores=scores, weights=weights, rewards=rewards)


def by_hand(scores, weights, k):
    """sum_k w_k A_k / sum_k |w_k| with A = (r - mean) / (std + 1e-8), group by group, in numpy."""
    total = 0
    for name, weight in weights.items():
        r = scores[name].numpy().reshape(-1, k)
        total = total + weight * (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True, ddof=1) + 1e-8)
    return (total / sum(abs(weight) for weight in weights.values())).clip(-5, 5).flatten()


def per_sample(batch, credit):
    """Credit of each sample's steps, [[...], ...], without the steps that are not trained on."""
    chains = [credit[batch.trajectory.leaves[:, leaf]] for leaf in range(batch.trajectory.num_leaves)]
    return [chain[~chain.isnan()] for chain in chains]


def test_defaults_are_the_papers():
    record = DanceGRPO().model_dump()
    expected = {
        "num_steps": 16, "shift": 3.0, "sde": "dance_sde", "eta": 0.3, "clip_range": 1e-4, "adv_eps": 1e-8,
        "adv_clip": 5.0, "unbiased": True, "adv_std": "group", "step_share": 0.6, "kl_coef": 0.0, "shared_noise": True,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected


def test_a_group_starts_from_one_noise_and_all_steps_but_the_last_are_stochastic():
    plan = DanceGRPO().plan(linear_times(16), 3, 12, 0)
    assert plan.times == tuple(shifted_times(16, 3.0).tolist())
    assert plan.stochastic_steps == tuple(range(15))
    assert plan.fanout == (12, *[1] * 15)
    assert DanceGRPO(shared_noise=False).plan(linear_times(16), 3, 12, 0).leaves_per_root == 1


@pytest.mark.parametrize(("num_steps", "trained"), [(16, 9), (12, 6), (20, 11)])
def test_each_sample_trains_on_its_share_with_one_advantage(num_steps, trained):
    """The counts are the published ones: 9 of 15, 6 of 11."""
    batch = collect(DanceGRPO(num_steps=num_steps), ToyPolicy(), num_prompts=PROMPTS, k=K)
    expected = by_hand(batch.scores, batch.weights, K)
    for found, advantage in zip(per_sample(batch, batch.advantages), expected, strict=True):
        assert found.tolist() == pytest.approx([advantage] * trained, rel=1e-5)


def test_credit_does_not_depend_on_how_processes_share_the_prompts():
    algorithm = DanceGRPO(num_steps=8, best=2, worst=1)
    batch = collect(algorithm, ToyPolicy(), iteration=5, num_prompts=PROMPTS, k=K)
    for rank in range(2):
        mine = batch.trajectory.prompt % 2 == rank
        part = algorithm.credit(replace(batch, trajectory=batch.trajectory.select(mine)))
        torch.testing.assert_close(part, batch.advantages[mine], rtol=0, atol=0, equal_nan=True)


def test_several_rewards_each_against_their_own_spread():
    algorithm = DanceGRPO(num_steps=6, step_share=1.0)
    batch = two_rewards(collect(algorithm, ToyPolicy(), num_prompts=PROMPTS, k=K))
    found = [chain.tolist() for chain in per_sample(batch, algorithm.credit(batch))]
    for chain, advantage in zip(found, by_hand(batch.scores, batch.weights, K), strict=True):
        assert chain == pytest.approx([advantage] * 5, rel=1e-5)
    # In the sum the second reward has nearly all the spread, so that the first one hardly counts.
    of_sum = per_sample(batch, DanceGRPO(num_steps=6, step_share=1.0, combine="sum").credit(batch))
    assert max(abs(float(a[0]) - b[0]) for a, b in zip(of_sum, found, strict=True)) > 0.3


@pytest.mark.parametrize(("best", "worst"), [(2, 2), (3, 0), (0, 1), (4, 4)])
def test_best_and_worst_are_chosen_by_advantages_of_the_whole_group(best, worst):
    algorithm = DanceGRPO(num_steps=6, best=best, worst=worst)
    batch = two_rewards(collect(algorithm, ToyPolicy(), num_prompts=PROMPTS, k=K))
    expected = by_hand(batch.scores, batch.weights, K)
    ranks = expected.reshape(PROMPTS, K).argsort(1).argsort(1).flatten()
    for rank, advantage, found in zip(ranks, expected, per_sample(batch, algorithm.credit(batch)), strict=True):
        kept = rank >= K - best or rank < worst
        assert found.tolist() == pytest.approx([advantage] * (3 if kept else 0), rel=1e-5)


def test_the_raw_sum_would_choose_other_samples():
    """What the test above would not notice if the order by reward and by advantage were the same."""
    batch = two_rewards(collect(DanceGRPO(num_steps=6), ToyPolicy(), num_prompts=PROMPTS, k=K))
    by_reward = batch.rewards.numpy().reshape(PROMPTS, K).argsort(1)
    by_advantage = by_hand(batch.scores, batch.weights, K).reshape(PROMPTS, K).argsort(1)
    assert any(set(a[:2]) != set(b[:2]) for a, b in zip(by_reward, by_advantage, strict=True))


def test_a_sample_without_a_verdict_is_neither_best_nor_worst():
    algorithm = DanceGRPO(num_steps=6, best=1, worst=1)
    batch = collect(algorithm, ToyPolicy(), num_prompts=1, k=4)
    rewards = torch.tensor([0.1, float("nan"), 0.9, 0.4], dtype=torch.float64)
    batch = replace(batch, rewards=rewards, scores={"reward": rewards})
    judged = np.array([0.1, 0.9, 0.4])
    a = (judged - judged.mean()) / judged.std(ddof=1)
    found = [chain.tolist() for chain in per_sample(batch, algorithm.credit(batch))]
    assert found[1] == found[3] == []
    assert found[0] == pytest.approx([a[0]] * 3, rel=1e-5)
    assert found[2] == pytest.approx([a[1]] * 3, rel=1e-5)


def test_loss_of_the_kept_edges_by_hand():
    """mean max(-A r, -A clip(r)), r = exp(mean_d of the change of torch.distributions.Normal's log-density)."""
    eta, clip = 0.4, 0.05
    algorithm = DanceGRPO(num_steps=6, eta=eta, clip_range=clip, best=2, worst=2)
    policy = ToyPolicy()
    batch = live(collect(algorithm, policy, num_prompts=PROMPTS, k=K))
    edges = batch.trajectory

    def logprob():
        t, h = edges.t[:, None].double(), (edges.t - edges.t_next)[:, None].double()
        x = edges.x.double()
        v = policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)).double()
        mean = x - h * (v + eta**2 / (2 * t) * (x + (1 - t) * v))
        return Normal(mean, eta * h.sqrt()).log_prob(edges.x_next.double()).mean(1)

    with torch.no_grad():
        before = logprob()
        policy.bias += 0.05
        ratio = (logprob() - before).exp()
    a = batch.advantages.double()
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean()
    assert len(edges) == PROMPTS * 4 * 3
    loss, _ = gradient(algorithm, policy, batch)
    assert 0.1 < float(loss.metrics["clip_frac"]) < 0.9
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_ddim_path_is_on_policy():
    algorithm = DanceGRPO(sde="ddim", eta=1.0, num_steps=10, shift=None, step_share=1.0)
    policy = ToyPolicy()
    batch = live(collect(algorithm, policy, num_prompts=PROMPTS, k=K))
    loss, grad = gradient(algorithm, policy, batch)
    assert len(batch.trajectory) == PROMPTS * K * 9
    assert loss.metrics["ratio_max_dev"] == 0
    assert grad.isfinite().all() and grad.abs().min() > 0


def test_it_learns():
    policy, records = train(DanceGRPO(num_steps=6, eta=0.5, best=3, worst=3), iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5 and last > -0.8
    assert (policy.bias > 0.5).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best": 4}, "best=4 and worst=None.*set both"),
        ({"best": 0, "worst": 0}, "at least one of them above 0"),
        ({"best": -1, "worst": 1}, "greater than or equal to 0"),
        ({"step_share": 0.0}, "greater than 0"),
        ({"step_share": 1.1}, "less than or equal to 1"),
        ({"sde": "ddim", "eta": 1.5}, r"eta in \(0, 1\]"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        DanceGRPO(**fields)


def test_a_group_that_is_too_small_to_choose_from_is_refused():
    with pytest.raises(
        ValueError, match=r"samples_per_prompt=7 is fewer than best \+ worst = 8; make the group larger"
    ):
        DanceGRPO(best=4, worst=4).plan(linear_times(16), 0, 7, 0)
    assert DanceGRPO(best=4, worst=4).plan(linear_times(16), 0, 8, 0).leaves_per_root == 8
