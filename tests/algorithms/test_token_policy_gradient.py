"""The loss of answers' tokens against autograd and closed forms, and what must not move it."""

import threading
from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.advantages import right_in_order
from flowrl.algorithms.aggregate import aggregate, merge_metrics, token_weights
from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.dr_grpo import DrGRPO
from flowrl.algorithms.gmpo import GMPO
from flowrl.algorithms.gpg import GPG
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.lite_ppo import LitePPO
from flowrl.algorithms.objectives import NEEDS_MEANS, NEEDS_TRUST, Limits, Objective, objective
from flowrl.algorithms.opmd import OPMD
from flowrl.algorithms.opo import OPO
from flowrl.algorithms.passk_grpo import PassKGRPO
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.reinforce_pp import ReinforcePP
from flowrl.algorithms.reinforce_pp_baseline import ReinforcePPBaseline
from flowrl.algorithms.remax import ReMax
from flowrl.algorithms.rloo import RLOO
from flowrl.algorithms.sapo import SAPO
from flowrl.algorithms.schedule import AlgorithmError
from flowrl.algorithms.t_grpo import TGRPO
from flowrl.algorithms.token_dpo import TokenDPO
from flowrl.algorithms.token_mpo import TokenMPO
from flowrl.algorithms.token_policy_gradient import token_edges
from flowrl.types import Besides
from tests.algorithms.words import V, Words, batch_of, gradient, live, moved, score, tokens_with, write

NAN = float("nan")
METHODS = {
    "grpo": GRPO(), "dr_grpo": DrGRPO(horizon=7), "dapo": DAPO(), "gspo": GSPO(clip_range=0.1), "gmpo": GMPO(),
    "sapo": SAPO(), "cispo": CISPO(), "rloo": RLOO(), "opmd": OPMD(), "lite_ppo": LitePPO(), "gpg": GPG(), "opo": OPO(),
    "passk": PassKGRPO(k=2, right=0.9), "best of k": PassKGRPO(k=None), "reinforce_pp": ReinforcePP(),
    "reinforce_pp_baseline": ReinforcePPBaseline(), "ppo": PPO(),
}  # fmt: skip
GROUPED = {name: method for name, method in METHODS.items() if name not in ("reinforce_pp", "ppo")}
OBJECTIVES = {
    "clip": {}, "dual_clip": {}, "gspo": {}, "gmpo": {}, "sapo": {}, "cispo": {}, "reinforce": {},
    "dro": {"trust": 5.0}, "spo": {"trust": 0.2}, "drpo": {"trust": 0.1}, "dppo_tv": {"trust": 0.02},
    "cppo_tv": {"trust": 0.02},
}  # fmt: skip
"""Objectives whose loss of an answer depends on that answer alone, with settings that bite in these tests."""
EXTRAS = {
    "kl": {"kl_coef": 0.1}, "kl of drawn": {"kl_coef": 0.1, "kl_unbiased": True, "kl_form": "k3+"},
    "kl in reward": {"kl_in_reward": 0.1}, "entropy": {"entropy_coef": 0.1}, "top entropy": {"top_entropy": 0.4},
    "opsm": {"off_policy_delta": 0.05}, "positive sft": {"positive_sft_coef": 0.2}, "chord": {"sft_coef": 0.3},
    "papo": {"perception_coef": 0.1, "perception_entropy": 0.05}, "truncated": {"mask_truncated": True},
    "tools": {"shaping": "tool_position"}, "sure": {"shaping": "entropy"},
}  # fmt: skip
GOLD = [[3, 3, 0], None, [1, 0], [3]]
every = pytest.mark.parametrize("name", METHODS)


def engine(batch, seed=5, by=0.4):
    """The batch as a foreign engine would have written it: its log-probs are near the policy's."""
    noise = torch.randn(batch.tokens.logprob.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(batch, tokens=tokens_with(batch.tokens, behaviour=batch.tokens.logprob - by * noise))


# -------------------------------------------------------------------------------------------------------- the update


@every
def test_at_first_it_is_reinforce(name):
    """Ratio 1, nothing clipped, and the gradient of -sum w A log pi with the weights of the mean."""
    algorithm, policy = METHODS[name], Words()
    batch = live(batch_of(policy, algorithm))
    loss, found = gradient(algorithm, policy, batch)
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-12 and float(loss.metrics["clip_frac"]) == 0
    mask = batch.tokens.mask
    credit = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
    weight = token_weights(mask, algorithm.aggregate, algorithm.horizon)
    stats = policy.evaluate(batch.tokens, value=algorithm.needs.value)
    value = -(weight * credit * stats.logprob).sum()
    if algorithm.needs.value:
        value = value + (weight * 0.25 * (stats.value - algorithm.targets(batch)).square()).sum()
    grads = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    expected = torch.cat([
        torch.zeros_like(p).flatten() if g is None else g.flatten()
        for p, g in zip(policy.parameters(), grads, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert found.norm() > 0


def added(algorithm, policy, batch, parts):
    total, value, grad = algorithm.mass(batch), 0.0, 0.0
    for part in (batch.select(rows) for rows in parts):
        share = algorithm.share(part, total)
        loss, one = gradient(algorithm, policy, part, share)
        value, grad = value + share * loss.value, grad + one
    return value, grad


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "token_sum"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_no_term_depends_on_the_cut(extra, mode):
    horizon = 7 if mode.endswith("norm") else None
    algorithm = GRPO(aggregate=mode, horizon=horizon, clip_range=0.05, **EXTRAS[extra])
    policy = Words(gold=GOLD)
    batch = live(batch_of(policy, algorithm))
    moved(policy)
    loss, expected = gradient(algorithm, policy, batch)
    plain, without = gradient(GRPO(aggregate=mode, horizon=horizon, clip_range=0.05), policy, batch)
    if extra not in ("kl in reward", "truncated", "tools", "sure"):  # which change the credit
        assert not torch.allclose(expected, without), "the term does nothing"
    order = torch.randperm(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    value, grad = added(algorithm, policy, batch, order.split(3))
    torch.testing.assert_close(value, loss.value)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_depends_on_the_cut(name):
    algorithm, policy = GRPO(objective=name, clip_range=0.05, **OBJECTIVES[name]), Words()
    batch = engine(live(batch_of(policy, algorithm)))
    moved(policy)
    loss, expected = gradient(algorithm, policy, batch)
    assert expected.norm() > 0
    order = torch.randperm(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    value, grad = added(algorithm, policy, batch, order.split(3))
    torch.testing.assert_close(value, loss.value)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean"])
def test_no_metric_depends_on_the_cut(mode):
    algorithm = GRPO(
        aggregate=mode, clip_range=0.05, correction="mis", correction_high=1.2, off_policy_delta=0.05, kl_coef=0.1,
        positive_sft_coef=0.1,
    )  # fmt: skip
    policy = Words()
    batch = engine(live(batch_of(policy, algorithm)))
    moved(policy)
    whole = algorithm.loss(policy, batch)
    assert 0 < whole.metrics["opsm_frac"] < 1 and 0 < whole.metrics["is_masked_frac"] < 1
    for size in (1, 3):
        order = torch.randperm(len(batch.tokens), generator=torch.Generator().manual_seed(0))
        parts = [algorithm.loss(policy, batch.select(rows)) for rows in order.split(size)]
        merged = merge_metrics([part.metrics for part in parts], [part.counts for part in parts])
        for name, value in whole.metrics.items():
            torch.testing.assert_close(merged[name].double(), value.double(), rtol=1e-5, atol=1e-7, msg=name)


def test_the_longest_answer_of_a_part_does_not_matter():
    """Places that no answer has any more are cut off a part, of tokens and of what goes with them."""
    algorithm, policy = PPO(kl_in_reward=0.1), Words()
    batch = live(batch_of(policy, algorithm))
    short = batch.tokens.present.sum(1) == 1
    part = batch.select(short)
    assert part.tokens.ids.shape[1] == part.values.shape[1] == part.reference.shape[1] == part.advantages.shape[1] == 1
    assert gradient(algorithm, policy, part)[0].value.isfinite()


def test_foreign_tokens_teach_nothing():
    """What a tool said is not the policy's: other words there change the words after them, and nothing else."""
    algorithm, policy = GRPO(), Words()
    batch = live(batch_of(policy, algorithm))
    foreign = batch.tokens.present & ~batch.tokens.mask
    assert foreign.any()
    stats = policy.evaluate(batch.tokens)
    (grad,) = torch.autograd.grad(algorithm.loss(_Fixed(stats), batch).value, stats.logprob, allow_unused=True)
    assert (grad[~batch.tokens.mask] == 0).all() and (grad[batch.tokens.mask] != 0).any()


class _Fixed:
    """A policy that says what it was told."""

    def __init__(self, stats):
        self.stats = stats

    def evaluate(self, tokens, **asked):
        return self.stats


def test_gspo_is_the_sequence_form():
    """-A min/clip of (pi(y) / pi_old(y))^(1 / n), a mean over answers: value and gradient."""
    algorithm, policy = GSPO(clip_range=(0.02, 0.05)), Words()
    batch = live(batch_of(policy, algorithm))
    moved(policy)
    loss, found = gradient(algorithm, policy, batch)
    tokens, credit = batch.tokens, batch.advantages
    log_ratio = (policy.evaluate(tokens).logprob - tokens.logprob).where(tokens.mask, 0.0)
    ratio = (log_ratio.sum(1) / tokens.lengths).exp()
    value = torch.maximum(-credit * ratio, -credit * ratio.clamp(0.98, 1.05)).mean()
    torch.testing.assert_close(loss.value, value)
    grads = torch.autograd.grad(value, [policy.table, policy.seen])
    torch.testing.assert_close(found[: -V - 1], torch.cat([g.flatten() for g in grads]))
    assert 0 < loss.metrics["clip_frac"] < 1


# ------------------------------------------------------------------------------------------------------------ credit


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_agree_get_exactly_nothing(name):
    algorithm, policy = METHODS[name], Words()
    batch = batch_of(policy, algorithm)
    for level in (0.1, 0.7):
        batch.rewards = score(batch.tokens).index_fill(0, torch.arange(4, 8), level)
        batch.rewards[4:8] += 1e-8 * torch.randn(4, generator=torch.Generator().manual_seed(0))
        assert (algorithm.credit(batch)[4:8] == 0).all()
    batch.rewards = torch.full((16,), 1 / 3)
    assert (algorithm.credit(batch) == 0).all()


@every
def test_the_order_of_answers_does_not_matter(name):
    algorithm, policy = METHODS[name], Words()
    batch = batch_of(policy, algorithm)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        batch, tokens=batch.tokens.select(order), group=batch.group[order], rewards=batch.rewards[order],
        facts={k: v[order] for k, v in batch.facts.items()},
        values=None if batch.values is None else batch.values[order],
    )  # fmt: skip
    torch.testing.assert_close(algorithm.credit(shuffled), algorithm.credit(batch)[order], rtol=1e-6, atol=1e-7)


@every
@pytest.mark.parametrize("kl_in_reward", [0.0, 0.2])
def test_two_processes_give_the_credit_of_one(name, kl_in_reward):
    """Each has half of the answers, the table of all rewards, and a sum over both."""
    algorithm = METHODS[name].model_copy(update={"kl_in_reward": kl_in_reward})
    policy = moved(Words())
    batch = batch_of(policy, algorithm)
    batch.rewards[3] = NAN
    whole = algorithm.credit(batch)
    barrier, sums, found = threading.Barrier(2), [None, None], [None, None]

    def work(rank):
        def total(x):
            sums[rank] = x
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        rows = torch.arange(16).view(2, 8)[rank]
        mine = batch.select(rows)
        found[rank] = algorithm.credit(
            replace(mine, rewards=batch.rewards, group=batch.group, facts=batch.facts, place=rows, total=total)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for rank in (0, 1):
        part = whole[8 * rank : 8 * rank + 8]
        part = part[:, : found[rank].shape[1]] if part.dim() == 2 else part
        torch.testing.assert_close(found[rank], part, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_the_credit_of_the_presets():
    """By hand: rewards 1 0 0 1 and all equal, as in the tests of the functions."""
    policy = Words(prompts=2)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    expected = {
        "grpo": 0.8660239, "dapo": 0.8660239, "dr_grpo": 0.5, "lite_ppo": 1.0801211, "rloo": 2 / 3, "opmd": 0.25,
        "gpg": 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        batch = batch_of(policy, METHODS[name])
        batch.rewards = rewards
        found = METHODS[name].credit(batch)
        assert found.tolist() == pytest.approx([value, -value, -value, value, 0, 0, 0, 0], abs=1e-6), name


def test_reinforce_pp_whitens_discounted_returns():
    """gamma 0.5 by hand, holes skipped; with the KL of each token in its reward."""
    algorithm, policy = ReinforcePP(gamma=0.5, kl_in_reward=0.1), moved(Words())
    batch = batch_of(policy, algorithm)
    batch.rewards[2] = NAN
    credit, returns = algorithm.credit(batch), {}
    for row in range(16):
        places = batch.tokens.mask[row].nonzero().flatten().tolist()
        following = 0.0
        for place in reversed(places):
            reward = -0.1 * float(batch.tokens.logprob[row, place] - batch.reference[row, place])
            reward += float(batch.rewards[row]) * (place == places[-1])
            following = reward + 0.5 * following
            returns[row, place] = following
    values = torch.tensor([v for (row, _), v in returns.items() if row != 2], dtype=torch.float64)
    assert credit[2].isnan().all()
    for (row, place), value in returns.items():
        if row != 2:
            expected = (value - float(values.mean())) / float((values.var() + 1e-8).sqrt())
            assert float(credit[row, place]) == pytest.approx(expected, abs=1e-5)


def test_the_baseline_form_whitens_over_tokens():
    """Long answers weigh more in mean and std."""
    algorithm, policy = METHODS["reinforce_pp_baseline"], Words()
    batch = batch_of(policy, algorithm)
    batch.rewards[8:12] = 0.5
    centred = (batch.rewards.view(4, 4) - batch.rewards.view(4, 4).mean(1, keepdim=True)).flatten()
    tokens = centred.repeat_interleave(batch.tokens.lengths)
    expected = (centred - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    expected[8:12] = 0
    found = algorithm.credit(batch)
    for row in range(16):
        assert (found[row][batch.tokens.mask[row]] - expected[row]).abs().max() < 1e-6
    assert (found[8:12] == 0).all()


def test_long_answers_weigh_more_in_opos_baseline():
    """(4 + 8) / 20 = 0.6 for rewards 1 0 0 1 and lengths 4 2 6 8."""
    batch = batch_of(Words(prompts=1), OPO())
    batch.rewards = torch.tensor([1.0, 0, 0, 1])
    batch.facts["tokens"] = torch.tensor([4.0, 2, 6, 8], dtype=torch.float64)
    assert OPO().credit(batch).tolist() == pytest.approx([0.4, -0.6, -0.6, 0.4])


def test_remax_leaves_out_what_it_has_no_baseline_for():
    batch = batch_of(Words(), ReMax())
    batch.rewards[1] = NAN
    batch.facts["greedy"] = torch.tensor([0.4, NAN, 0.4, 0.4], dtype=torch.float64).repeat_interleave(4)
    found = ReMax().credit(batch)
    assert found.isnan().nonzero().flatten().tolist() == [1, 4, 5, 6, 7]
    known = ~found.isnan()
    torch.testing.assert_close(found[known], (batch.rewards - 0.4)[known].float())


def test_t_grpo_pays_right_answers_of_groups_that_the_order_helps():
    """Means .5, .5, .75 and 1/3 (one without a verdict) against .6, .7, none and 0, margin .8: .5 >= .48, .5 < .56."""
    rewards = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [1 - 1e-7, 0, NAN, 0]], dtype=torch.float64)
    shuffled = torch.tensor([0.6, 0.7, NAN, 0.0], dtype=torch.float64).repeat_interleave(4)
    found = right_in_order(rewards.flatten(), torch.arange(4).repeat_interleave(4), shuffled, right=1.0, margin=0.8)
    assert found.nonzero().flatten().tolist() == [0, 1, 12]
    usual = TGRPO()
    assert (usual.shuffled, usual.temporal_bonus, usual.temporal_margin, usual.right) == (4, 0.3, 0.8, 1.0)
    algorithm = TGRPO(right=0.5, temporal_bonus=0.25)
    batch = batch_of(Words(), algorithm)
    batch.rewards = rewards.flatten().where(torch.arange(16) != 2, 0.5)
    batch.facts["shuffled"] = shuffled
    paid = batch.rewards + 0.25 * torch.tensor([1, 1, 1] + 9 * [0] + [1] + 3 * [0], dtype=torch.float64)
    credit = algorithm.credit(batch)
    batch.rewards = paid
    torch.testing.assert_close(credit, GRPO().credit(batch), equal_nan=True)
    assert algorithm.needs.besides == Besides("shuffled", answers=4, shuffled=True)
    with pytest.raises(ValidationError, match="the bonus is for a sum, and combine=gdpo.*set combine=sum"):
        TGRPO(combine="gdpo")


@pytest.mark.parametrize("algorithm", [GRPO(), ReMax(), PPO(), ReinforcePP()], ids=lambda a: type(a).__name__)
def test_answers_without_a_token_of_the_policys_leave(algorithm):
    batch = batch_of(Words(), algorithm)
    mask = batch.tokens.mask.clone()
    mask[5] = False
    batch.tokens = tokens_with(batch.tokens, mask=mask)
    assert algorithm.trained(batch).tolist() == [row != 5 for row in range(16)]


def test_truncated_answers_leave_but_stay_in_the_statistics():
    policy = Words()
    batch = batch_of(policy, GRPO())
    cut = batch.facts["truncated"] > 0
    assert 0 < cut.sum() < 16
    found = GRPO(mask_truncated=True).credit(batch)
    assert torch.equal(found.isnan(), cut)
    assert torch.equal(found[~cut], GRPO().credit(batch)[~cut])


def test_the_kl_in_the_reward_is_that_of_the_whole_answer():
    algorithm, policy = DrGRPO(kl_in_reward=0.5), moved(Words())
    batch = batch_of(policy, algorithm)
    kl = (batch.tokens.logprob - batch.reference).sum(1)
    rewards = (batch.rewards - 0.5 * kl).view(4, 4)
    torch.testing.assert_close(
        algorithm.credit(batch).double(), (rewards - rewards.mean(1, keepdim=True)).flatten(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("foreign", [False, True])
def test_the_kl_of_drawn_tokens_by_hand(foreign):
    """pi / mu (log pi - log ref) with its gradient, mu being who drew the tokens; the ratio is cut at exp(20)."""
    algorithm, policy = GRPO(kl_coef=0.1, kl_unbiased=True, kl_form="k1", aggregate="token_mean"), Words()
    batch = live(batch_of(policy, algorithm))
    batch = engine(batch) if foreign else batch
    moved(policy)
    tokens, mask = batch.tokens, batch.tokens.mask
    drawn = tokens.behaviour if foreign else tokens.logprob
    with torch.no_grad(), policy.reference():
        reference = policy.evaluate(tokens).logprob
    logprob = policy.evaluate(tokens).logprob
    ratio = (logprob - drawn)[mask].exp()
    assert (ratio - 1).abs().max() > 0.1
    expected = (ratio * (logprob - reference)[mask]).mean()
    stats = policy.evaluate(tokens)
    table = algorithm.terms(policy, batch, stats, reference)[0]["kl"][1]
    torch.testing.assert_close(table[mask].mean(), expected)
    for found, wanted in zip(*(torch.autograd.grad(x, (policy.table, policy.seen)) for x in
                               (table[mask].mean(), expected)), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted)
    name = "behaviour" if foreign else "logprob"
    far = replace(batch, tokens=tokens_with(tokens, **{name: drawn - 900.0}))
    assert algorithm.loss(policy, far).metrics["kl"].isfinite()


@every
def test_methods_say_whether_their_tokens_have_an_advantage_each(name):
    algorithm = METHODS[name]
    assert (batch_of(Words(), algorithm).advantages.dim() == 2) == algorithm.needs.token_credit


def test_ratios_against_an_engine_do_not_start_at_one():
    batch = live(batch_of(Words(), GRPO()))
    assert GRPO(correction="bypass").starts_at_one(batch) and GRPO().starts_at_one(engine(batch))
    assert not GRPO(correction="bypass").starts_at_one(engine(batch))


def test_rewards_by_themselves():
    """gdpo and per_reward take the scores, not their sum."""
    algorithm = GRPO(combine="per_reward", unbiased=False, adv_eps=0.0)
    assert algorithm.needs.scores
    batch = batch_of(Words(), GRPO())
    small, large = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch.scores, batch.weights = {"small": small, "large": 1000 * large}, {"small": 3.0, "large": 1.0}
    parts = [(r.view(4, 4) - r.view(4, 4).mean(1, True)) / r.view(4, 4).std(1, correction=0, keepdim=True)
             for r in (small, large)]  # fmt: skip
    torch.testing.assert_close(algorithm.credit(batch), ((3 * parts[0] + parts[1]) / 4).flatten().float())


def test_shaping_changes_the_advantage():
    batch = batch_of(Words(), GRPO())
    plain, sure = GRPO().credit(batch), GRPO(shaping="entropy").credit(batch)
    entropy = batch.facts["entropy"].view(4, 4)
    torch.testing.assert_close(sure, (plain.view(4, 4) * entropy.mean(1, True) / entropy).flatten().float())
    tools = GRPO(shaping="tool_position").credit(batch)
    without = batch.facts["tool_position"].isnan()
    assert torch.equal(tools[without], plain[without]) and not torch.equal(tools, plain)
    assert ((tools - plain).abs() <= 0.7 * plain.abs() + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------- terms


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def difference(policy, batch, **extra):
    """What a term adds to the loss and to its gradient in table and seen."""
    found = [gradient(GRPO(**settings), policy, batch) for settings in (extra, {})]
    return found[0][0].value - found[1][0].value, (found[0][1] - found[1][1])[: -V - 1]


def seq_mean(table, mask):
    return (table.where(mask, 0.0).sum(1) / mask.sum(1)).mean()


def test_the_terms_are_what_they_say():
    policy = Words(gold=GOLD)
    batch = live(batch_of(policy, GRPO()))
    moved(policy)
    tokens, mask = batch.tokens, batch.tokens.mask
    stats = policy.evaluate(tokens, entropy=True)
    with torch.no_grad(), policy.reference():
        reference = policy.evaluate(tokens).logprob
    with policy.masked_images(0.6, 0):
        blind = policy.evaluate(tokens, entropy=True)
    gap = blind.logprob - stats.logprob
    expected = {
        ("kl_coef", 0.5): 0.5 * (reference - stats.logprob).expm1() - 0.5 * (reference - stats.logprob),
        ("entropy_coef", 0.5): -0.5 * stats.entropy,
        ("positive_sft_coef", 0.5): -0.5 * stats.logprob * (batch.rewards > 0.9)[:, None],
        ("perception_coef", 0.5): -0.5 * (gap.expm1() - gap),
        ("perception_entropy", 0.5): 0.5 * (stats.entropy + blind.entropy),
    }
    for (field, weight), table in expected.items():
        value, grad = difference(policy, batch, **{field: weight})
        wanted = seq_mean(table, mask)
        torch.testing.assert_close(value, wanted, msg=field)
        grads = torch.autograd.grad(wanted, [policy.table, policy.seen], retain_graph=True)
        torch.testing.assert_close(grad, flat(grads), rtol=1e-6, atol=1e-9, msg=field)


@pytest.mark.parametrize("algorithm", [GRPO, PPO])
def test_right_answers_are_imitated(algorithm):
    """Of the first prompt's answers those with a reward of 1 or more, to within rounding, in groups of any kind."""
    policy = Words(prompts=2)
    batch = live(batch_of(policy, algorithm()))
    batch.rewards = torch.tensor([1.0, 1 - 1e-7, 1.5, 0.99, 1, 1, 1, 1], dtype=torch.float64)
    batch.advantages = algorithm().credit(batch).double()
    right = torch.tensor([True, True, True, False, True, True, True, True])
    moved(policy)
    mask, logprob = batch.tokens.mask, policy.evaluate(batch.tokens).logprob
    losses = [algorithm(positive_sft_coef=coef).loss(policy, batch).value for coef in (0.5, 0.0)]
    weight = token_weights(mask, algorithm().aggregate)
    torch.testing.assert_close(losses[0] - losses[1], -0.5 * (weight * logprob * right[:, None]).sum())
    strict = algorithm(positive_sft_coef=0.5, positive_sft_reward=1.5).loss(policy, batch).metrics["positive_sft"]
    torch.testing.assert_close(strict, -(weight * logprob)[2].sum().detach())


def test_wrong_answers_are_not_imitated_whatever_their_tokens_are_worth():
    """Whitened returns of a critic are positive somewhere, though every answer is wrong."""
    algorithm, policy = PPO(lam=0.5, positive_sft_coef=0.5), Words(prompts=1)
    batch = batch_of(policy, algorithm)
    batch.rewards = torch.zeros(4, dtype=torch.float64)
    batch.advantages = algorithm.credit(batch).double()
    assert (batch.advantages > 0).any()
    assert algorithm.loss(policy, batch).metrics["positive_sft"] == 0


def test_replayed_answers_are_right_where_their_advantage_is_positive():
    """Their rewards are not kept."""
    policy = Words()
    batch = live(batch_of(policy, GRPO()))
    batch.rewards, batch.advantages[0] = None, 0.0
    found = GRPO(positive_sft_coef=0.5).loss(policy, batch).metrics["positive_sft"]
    logprob = policy.evaluate(batch.tokens).logprob.detach()
    torch.testing.assert_close(found, seq_mean(-logprob * (batch.advantages > 0)[:, None], batch.tokens.mask))


def test_chord_imitates_the_worked_answers():
    """mu of the mean over answers of the mean of -p (1 - p) log p, and 1 - mu of the rest; mu follows its schedule."""
    policy = Words(gold=GOLD)
    batch = live(batch_of(policy, GRPO()))
    moved(policy)
    batch.iteration = 5
    loss, grad = gradient(GRPO(sft_coef=((0, 0.0), (10, 0.8))), policy, batch)
    plain, without = gradient(GRPO(), policy, batch)
    each = []
    for row in GOLD:
        last, total = V, 0.0
        for word in row or []:
            logprob = policy.logits(torch.tensor(last), torch.tensor(len(each))).log_softmax(-1)[word]
            chance = float(logprob.detach().exp())
            total, last = total - chance * (1 - chance) * logprob / len(row), word
        each.append(total)
    wanted = sum(each) / 4  # every prompt has four answers
    torch.testing.assert_close(loss.value, 0.6 * plain.value + 0.4 * wanted)
    torch.testing.assert_close(
        grad[: -V - 1], 0.6 * without[: -V - 1] + 0.4 * flat(torch.autograd.grad(wanted, [policy.table, policy.seen]))
    )
    policy.solutions = []
    torch.testing.assert_close(gradient(GRPO(sft_coef=0.4), policy, batch)[0].value, 0.6 * plain.value)


def test_only_the_least_sure_tokens_learn():
    """80/20: of each answer, the top share by entropy; the mean still counts all tokens."""
    policy = Words()
    batch = live(batch_of(policy, GRPO()))
    moved(policy)
    loss = GRPO(objective="reinforce", top_entropy=0.4).loss(policy, batch)
    stats = policy.evaluate(batch.tokens, entropy=True)
    total = 0.0
    for row in range(len(batch.tokens)):
        own = batch.tokens.mask[row]
        entropy, log_ratio = stats.entropy[row][own], (stats.logprob - batch.tokens.logprob)[row][own]
        kept = entropy.sort(descending=True, stable=True).indices[: -(-2 * len(entropy) // 5)]
        total = total - (batch.advantages[row] * (1 + log_ratio[kept])).sum() / len(entropy)
    torch.testing.assert_close(loss.value, total / len(batch.tokens))


def test_weights_of_a_foreign_engine_multiply_the_loss():
    """TIS by hand; the mean divides by all tokens though some have the weight 0; null ignores the engine."""
    policy = Words()
    batch = engine(live(batch_of(policy, GRPO())))
    moved(policy)
    tokens = batch.tokens
    log_weight = tokens.logprob - tokens.behaviour
    stats = policy.evaluate(tokens)
    log_ratio = stats.logprob - tokens.logprob
    plain = -batch.advantages[:, None] * (1 + log_ratio)
    for mode, weight in (
        ("tis", log_weight.exp().clamp(max=1.2)),
        ("mis", log_weight.exp() * (log_weight.exp() <= 1.2)),
        ("icepop", log_weight.exp() * (log_weight.exp() <= 1.2) * (log_weight.exp() >= 0.8)),
        (None, torch.ones_like(log_weight)),
    ):
        algorithm = GRPO(objective="reinforce", correction=mode, correction_low=0.8, correction_high=1.2)
        loss = algorithm.loss(policy, batch)
        torch.testing.assert_close(loss.value, seq_mean(plain * weight, tokens.mask))
        assert "is_chi2" in loss.metrics
    assert "is_chi2" not in GRPO().loss(policy, replace(batch, tokens=tokens_with(tokens, behaviour=None))).metrics


@pytest.mark.parametrize(("mode", "usual", "other"), [("tis", 2.0, 5.0), ("mis", 2.0, 5.0), ("icepop", 5.0, 2.0)])
def test_every_correction_has_a_usual_bound(mode, usual, other):
    policy = Words()
    batch = engine(live(batch_of(policy, GRPO())), by=1.0)
    found, same, differs = (
        GRPO(correction=mode, correction_high=high).loss(policy, batch).value for high in (None, usual, other)
    )
    assert found == same != differs


def test_the_engine_itself_may_be_the_old_policy():
    """bypass: the ratio is against the engine's log-probs, which then need no weight; drpo reads its probability."""
    policy = Words()
    batch = engine(live(batch_of(policy, GRPO())))
    moved(policy)
    other = replace(batch, tokens=tokens_with(batch.tokens, logprob=batch.tokens.behaviour, behaviour=None))
    for name, extra in (("clip", {}), ("drpo", {"trust": 0.1})):
        found = GRPO(objective=name, correction="bypass", **extra).loss(policy, batch)
        expected = GRPO(objective=name, **extra).loss(policy, other)
        torch.testing.assert_close(found.value, expected.value)


def test_answers_far_from_the_engine_can_be_rejected():
    policy = Words()
    batch = engine(live(batch_of(policy, GRPO())))
    tokens = batch.tokens
    log_weight = (tokens.logprob - tokens.behaviour).where(tokens.mask, 0.0)
    kept = (log_weight.sum(1) / tokens.lengths).abs() <= 0.1
    assert kept.any() and not kept.all()
    algorithm = GRPO(objective="reinforce", correction=None, rejection="mean_k1", reject_range=(-0.1, 0.1))
    loss = algorithm.loss(policy, batch)
    torch.testing.assert_close(loss.value, -(batch.advantages * kept).mean())


def test_bad_answers_that_are_far_away_can_be_left_out():
    policy = Words()
    batch = live(batch_of(policy, GRPO()))
    moved(policy, 0.5)
    tokens = batch.tokens
    log_ratio = (policy.evaluate(tokens).logprob - tokens.logprob).where(tokens.mask, 0.0)
    gone = (-log_ratio.sum(1) / tokens.lengths > 0.1) & (batch.advantages < 0)
    assert gone.any()
    loss = GRPO(objective="reinforce", off_policy_delta=0.1).loss(policy, batch)
    expected = seq_mean(-batch.advantages[:, None] * (1 + log_ratio) * ~gone[:, None], tokens.mask)
    torch.testing.assert_close(loss.value, expected)
    share = (gone * tokens.lengths).sum() / tokens.lengths.sum()
    assert float(loss.metrics["opsm_frac"]) == pytest.approx(float(share))


def test_far_away_is_far_from_who_wrote_it():
    """log(mu / pi) of the engine, not of the old policy, for the same answers."""
    policy = Words()
    batch = engine(live(batch_of(policy, GRPO())))
    moved(policy, 0.5)
    tokens, bad = batch.tokens, batch.advantages < 0
    log_ratio = (policy.evaluate(tokens).logprob - tokens.logprob).where(tokens.mask, 0.0)
    drift = (tokens.behaviour - tokens.logprob).where(tokens.mask, 0.0)
    gone, otherwise = ((far.sum(1) / tokens.lengths > 0.1) & bad for far in (drift - log_ratio, -log_ratio))
    assert gone.any() and not torch.equal(gone, otherwise)
    loss = GRPO(objective="reinforce", correction=None, off_policy_delta=0.1).loss(policy, batch)
    expected = seq_mean(-batch.advantages[:, None] * (1 + log_ratio) * ~gone[:, None], tokens.mask)
    torch.testing.assert_close(loss.value, expected)


@pytest.mark.parametrize(
    ("algorithm", "limits"),
    [
        (SAPO(tau_pos=0.5, tau_neg=2.0), Limits(0.2, 0.2, 0.2, tau_pos=0.5, tau_neg=2.0)),
        (GRPO(objective="dual_clip", dual_clip=10.0), Limits(0.2, 0.2, 0.2, dual=10.0)),
        (GRPO(objective="clip", clip_range=(0.1, 0.4)), Limits(0.1, 0.4, 0.2)),
        (GRPO(objective="dppo_tv"), Limits(0.2, 0.2, trust=0.2)),
        (GRPO(objective="dppo_tv", trust=0.05), Limits(0.2, 0.2, trust=0.05)),
    ],
)
def test_the_settings_reach_the_objective(algorithm, limits):
    """Ratios up to exp(3), of enough tokens that each of them matters."""
    policy = Words(prompts=16)
    batch = live(batch_of(policy, algorithm))
    moved(policy)
    noise = 3 * torch.rand(batch.tokens.ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch.tokens = tokens_with(batch.tokens, logprob=batch.tokens.logprob - noise)
    tokens, mask = batch.tokens, batch.tokens.mask
    edges = token_edges(tokens, policy.evaluate(tokens).logprob, tokens.logprob, batch.advantages[:, None] * mask)
    each, _ = objective(algorithm.objective, edges, limits)
    expected = aggregate(torch.zeros_like(tokens.logprob).masked_scatter(mask, each), mask, algorithm.aggregate)
    torch.testing.assert_close(algorithm.loss(policy, batch).value, expected)


def test_a_stored_reference_is_not_asked_for_again():
    policy = Words()
    batch = live(batch_of(policy, GRPO(kl_in_reward=0.1)))
    moved(policy)
    algorithm = GRPO(kl_coef=0.3)
    policy.calls = 0
    value = algorithm.loss(policy, batch).value
    assert policy.calls == 1
    torch.testing.assert_close(algorithm.loss(policy, replace(batch, reference=None)).value, value)
    assert policy.calls == 3


# --------------------------------------------------------------------------------------------------------------- ppo


def test_ppo_has_whitened_advantages_of_its_critic():
    algorithm, policy = PPO(gamma=0.9, lam=0.8), Words()
    batch = batch_of(policy, algorithm)
    found = {}
    for row in range(16):
        places = batch.tokens.mask[row].nonzero().flatten().tolist()
        following = advantage = 0.0
        for place in reversed(places):
            reward = float(batch.rewards[row]) * (place == places[-1])
            value = float(batch.values[row, place])
            advantage = reward + 0.9 * following - value + 0.72 * advantage
            following, found[row, place] = value, advantage
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    credit = algorithm.credit(batch)
    for (row, place), value in found.items():
        expected = (value - float(values.mean())) / float((values.var() + 1e-8).sqrt())
        assert float(credit[row, place]) == pytest.approx(expected, abs=1e-5)


def test_the_critic_has_a_lambda_and_a_clip_of_its_own():
    """VC-PPO: at lam_critic = 1 the targets are the rewards that followed, whatever lam is."""
    policy = Words()
    batch = live(batch_of(policy, PPO(lam=0.5)))
    mask = batch.tokens.mask
    torch.testing.assert_close(PPO(lam=0.5).targets(batch), batch.rewards[:, None] * mask)
    targets = PPO(lam_critic=0.0).targets(batch)
    last = (mask.flip(1).long().cumsum(1).flip(1) == 1) & mask
    torch.testing.assert_close(targets[last], batch.rewards)
    moved(policy)
    value = policy.evaluate(batch.tokens, value=True).value
    target = batch.rewards[:, None]
    clipped = batch.values + (value - batch.values).clamp(-0.1, 0.1)
    for clip, error in (
        (None, (value - target) ** 2),
        (0.1, torch.maximum((value - target) ** 2, (clipped - target) ** 2)),
    ):
        loss = PPO(value_clip=clip).loss(policy, batch)
        expected = 0.5 * error.where(mask, 0.0).sum() / mask.sum()
        torch.testing.assert_close(loss.metrics["value_loss"], expected.detach())


def test_the_critic_expects_what_the_policy_is_rewarded_with():
    """kl_in_reward is in its targets: the reward and the KL that follow, from each token on."""
    algorithm, policy = PPO(kl_in_reward=0.2), moved(Words())
    batch = live(batch_of(policy, algorithm))
    kl = (batch.tokens.logprob - batch.reference).where(batch.tokens.mask, 0.0)
    assert kl.abs().max() > 0.1
    following = batch.rewards[:, None] - 0.2 * kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(algorithm.targets(batch), following * batch.tokens.mask)


def test_long_answers_trust_the_rewards_more():
    """VAPO: lambda = 1 - 1 / (alpha l)."""
    policy = Words()
    batch = batch_of(policy, PPO())
    found = PPO(lam_alpha=0.5).credit(batch)
    for row, length in enumerate(batch.tokens.lengths.tolist()):
        lam = max(0.0, 1 - 1 / (0.5 * length))
        algorithm = PPO(lam=lam)
        rewards = algorithm.token_rewards(batch, batch.rewards)
        one = PPO(lam_alpha=0.5).returns(batch, rewards)[row]
        torch.testing.assert_close(one, algorithm.returns(batch, rewards)[row])
    assert not torch.equal(found, PPO(lam=1.0).credit(batch))


def test_a_warm_up_teaches_the_critic_alone():
    algorithm, policy = PPO(critic_warmup=3, kl_coef=0.1), Words()
    batch = live(batch_of(policy, algorithm))
    moved(policy)
    for iteration, learns in ((2, False), (3, True)):
        _, grad = gradient(algorithm, policy, replace(batch, iteration=iteration))
        assert (grad[: -V - 1] != 0).any() == learns and (grad[-V - 1 :] != 0).any()


def test_values_are_asked_for():
    assert PPO().needs.value and not GRPO().needs.value
    batch = batch_of(Words(), GRPO())
    with pytest.raises(ValueError, match="ppo needs batch.values"):
        PPO().credit(batch)


# ------------------------------------------------------------------------------------------------------- preferences


@pytest.mark.parametrize("pairing", ["best_worst", "all", "margin"])
@pytest.mark.parametrize("normalised", [False, True])
def test_token_dpo_by_hand(pairing, normalised):
    margin = 0.5 if pairing == "margin" else 0.0
    algorithm = TokenDPO(pairing=pairing, min_margin=margin, length_normalised=normalised, beta=0.7)
    policy = Words()
    batch = live(batch_of(policy, algorithm))
    moved(policy)
    tokens = batch.tokens
    with torch.no_grad(), policy.reference():
        reference = policy.evaluate(tokens).logprob
    ratio = (policy.evaluate(tokens).logprob - reference).sum(1) / (tokens.lengths if normalised else 1)
    rewards, group, losses, right = batch.rewards.tolist(), batch.group.tolist(), [], []
    for name in sorted(set(group)):
        mine = [i for i in range(len(group)) if group[i] == name]
        pairs = [(i, j) for i in mine for j in mine if rewards[i] - rewards[j] > max(margin, 1e-6)]
        if pairing == "best_worst":
            pairs = [max(pairs, key=lambda p: (rewards[p[0]] - rewards[p[1]], -p[0], -p[1]))] if pairs else []
        for i, j in pairs:
            losses.append(-torch.nn.functional.logsigmoid(0.7 * (ratio[i] - ratio[j])))
            right.append(float(ratio[i] > ratio[j]))
    loss = algorithm.loss(policy, batch)
    torch.testing.assert_close(loss.value, torch.stack(losses).mean())
    assert float(loss.metrics["reward_accuracies"]) == pytest.approx(sum(right) / len(right))
    assert algorithm.mass(batch).tolist() == [len(losses)]


def test_answers_in_no_pair_leave():
    algorithm, policy = TokenDPO(), Words()
    batch = batch_of(policy, algorithm)
    batch.rewards = torch.tensor([1.0, 0, 0.5, 0.5, 1, 1, 1, 1, NAN, 1, 0, NAN, NAN, NAN, 3, NAN])
    assert algorithm.credit(batch).nan_to_num(9).tolist() == [1, -1, 9, 9, 9, 9, 9, 9, 9, 1, -1, 9, 9, 9, 9, 9]
    balance = TokenDPO(pairing="all").credit(batch)
    assert balance[:4].tolist() == [3, -3, 0, 0]


def test_token_mpo_compares_quality_with_the_shift_of_the_iteration():
    algorithm, policy = TokenMPO(beta=0.7), moved(Words())
    batch = batch_of(policy, algorithm)
    ratio = (batch.tokens.logprob - batch.reference).sum(1)
    paired = ~batch.advantages.isnan()
    shift = 0.7 * float(ratio[paired].mean())
    assert batch.advantages[paired].tolist() == pytest.approx([shift] * int(paired.sum()), rel=1e-6)
    batch = live(batch)
    moved(policy, seed=3)
    found, expected = algorithm.compare(policy, batch), {}
    sig = torch.nn.functional.logsigmoid
    expected["dpo"] = -sig(0.7 * (found.chosen - found.rejected))
    expected["bco"] = -sig(0.7 * found.chosen - shift) - sig(shift - 0.7 * found.rejected)
    chosen = torch.tensor([max((i for i in range(len(batch.tokens)) if batch.group[i] == g),
                               key=lambda i: float(batch.rewards[i])) for g in batch.group.unique()])  # fmt: skip
    logprob = policy.evaluate(batch.tokens).logprob.sum(1)[chosen]
    expected["sft"] = -logprob / batch.tokens.lengths[chosen]
    wanted = 0.8 * expected["dpo"] + 0.2 * expected["bco"] + expected["sft"]
    torch.testing.assert_close(algorithm.loss(policy, batch).value, wanted.mean(), rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "guard"}, "means of Gaussian steps, and a token has none; choose dppo_tv"),
        ({"objective": "dppo"}, "choose dppo_tv"),
        ({"objective": "spo"}, "needs algorithm.trust: say 0.2"),
        ({"objective": "drpo"}, "say 0.1"),
        ({"objective": "dro"}, "1 / beta"),
        ({"objective": "gspo", "aggregate": "token_mean"}, "set aggregate=seq_mean_token_mean"),
        ({"objective": "sapo", "aggregate": "token_sum"}, "set aggregate=seq_mean_token_mean"),
        ({"aggregate": "seq_mean_token_sum_norm"}, "set algorithm.horizon"),
        ({"horizon": 100}, "set algorithm.horizon"),
        ({"clip_range": (0.0, 0.2)}, "low = 1 is no lower bound"),
        ({"correction": "icepop", "correction_low": 5.0}, "correction_low=5 is not below correction_high=5"),
        ({"correction": "icepop", "correction_low": 3.0, "correction_high": 2.0}, "is not below correction_high=2"),
        ({"reject_range": (1.0, 0.5)}, "must be rising"),
        ({"sft_coef": 1.5}, "lies in"),
        ({"mean": "none", "baseline": "leave_one_out"}, "mean=none has none"),
        ({"combine": "gdpo", "kl_in_reward": 0.1}, "takes each by itself"),
        ({"top_entropy": 0.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPO(**settings)


def test_every_objective_was_seen():
    assert set(OBJECTIVES) == set(get_args(Objective)) - set(NEEDS_MEANS) - {"clip_cov", "kl_cov"}
    assert {name for name, settings in OBJECTIVES.items() if settings} >= set(NEEDS_TRUST)


def test_what_is_not_known_is_asked_for():
    batch = batch_of(Words(), GRPO())
    batch.facts = {"tokens": batch.facts["tokens"]}
    with pytest.raises(AlgorithmError, match="'truncated' .there are tokens."):
        GRPO(mask_truncated=True).credit(batch)
    with pytest.raises(ValueError, match="kl_in_reward needs batch.reference"):
        GRPO(kl_in_reward=0.1).credit(batch)
    with pytest.raises(ValueError, match="token_mpo needs batch.reference"):
        TokenMPO().credit(batch)


@pytest.mark.parametrize("algorithm", [GRPO(), OPO(), ReinforcePPBaseline()])
def test_groups_of_one_are_refused(algorithm):
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        batch_of(Words(), algorithm, k=1)


def test_as_many_answers_as_k_are_refused():
    assert (PassKGRPO().fewest_samples, PassKGRPO(k=None).fewest_samples) == (5, 2)
    with pytest.raises(AlgorithmError, match="samples_per_prompt=4 leaves no choice of k=4"):
        batch_of(Words(), PassKGRPO())


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("name", [*METHODS, "token_dpo", "token_mpo"])
def test_every_method_learns(name):
    """3 is the word that pays: 25 iterations of two updates each."""
    algorithm = {**METHODS, "token_dpo": TokenDPO(), "token_mpo": TokenMPO()}[name]
    policy = Words()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    before = float(score(write(policy, k=16, seed=1000)).mean())
    for iteration in range(25):
        batch = live(batch_of(policy, algorithm, seed=iteration))
        for half in (batch.group % 2 == 0, batch.group % 2 == 1):
            if half.any():
                optimizer.zero_grad()
                algorithm.loss(policy, batch.select(half)).value.backward()
                optimizer.step()
    assert float(score(write(policy, k=16, seed=1000)).mean()) > before + 1
