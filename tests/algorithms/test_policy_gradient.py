"""The parts that methods compose, where Flow-GRPO and MixGRPO do not reach: trees and weighted edges."""

import pytest
import torch

from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.algorithms.mix_grpo import MixGRPO
from flowrl.algorithms.schedule import AlgorithmError, credit_of, plans_of
from flowrl.types import Batch
from samplers import Plan, branch_at, deterministic, linear_times, noise_source, rollout, window
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

TIMES = linear_times(5)


class Tree(FlowGRPO):
    """Two splits in two, and stochastic steps between them."""

    def plan(self, times, iteration, samples_per_prompt, seed) -> Plan:
        return branch_at(times, [0, 2], [2, 2])


def test_credit_of_a_tree_ignores_what_has_no_verdict():
    """R1: it is the credit of the tree without that leaf, also on the edges that it shares with others."""
    algorithm = Tree(num_steps=5)
    batch = collect(algorithm, ToyPolicy())
    batch.rewards[5] = float("nan")
    valid = ~batch.rewards.isnan()
    credit = algorithm.credit(batch)
    alive = (batch.trajectory.leaves & valid).any(1)
    batch.trajectory, batch.rewards = batch.trajectory.keep_leaves(valid), batch.rewards[valid]
    assert torch.equal(credit[alive], algorithm.credit(batch))
    assert credit[~alive].isnan().all() and (~alive).any()


def test_a_tree_is_on_policy_at_first():
    algorithm, policy = Tree(num_steps=5), ToyPolicy()
    loss = algorithm.loss(policy, collect(algorithm, policy))
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6


class Weighted(MixGRPO):
    """Edges weighted by their number."""

    def weight(self, batch):
        return torch.arange(len(batch.trajectory)).float()


def test_weights_scale_the_edges_but_not_the_kl():
    settings = {"num_steps": 6, "window": 3, "clip_range": 0.02}
    policy = ToyPolicy()
    batch = collect(MixGRPO(**settings), policy)
    with torch.no_grad():
        policy.bias += 0.05
    found = Weighted(**settings, kl_coef=0.5).loss(policy, batch)
    without = Weighted(**settings).loss(policy, batch).value
    assert found.metrics["kl"] > 0
    torch.testing.assert_close(found.value, without + 0.5 * found.metrics["kl"])
    batch.advantages = batch.advantages * Weighted(**settings).weight(batch)
    torch.testing.assert_close(MixGRPO(**settings).loss(policy, batch).value, without)


OBJECTIVES = {
    "clip": {}, "dual_clip": {}, "gspo": {}, "cispo": {}, "spo": {"trust": 0.02}, "drpo": {"trust": 0.02},
    "guard": {"clip_range": 0.01}, "dppo": {"trust": 1e-4}, "gmpo": {}, "sapo": {}, "reinforce": {},
    "dro": {"trust": 0.02}, "clip_cov": {}, "kl_cov": {},
}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sde", ["flow_sde", "cps"])
def test_every_objective_starts_on_policy_and_learns(objective, sde):
    settings = {"num_steps": 6, "sde": sde, "clip_range": 0.02, "kl_coef": 0.0, **OBJECTIVES[objective]}
    algorithm, policy = FlowGRPO(objective=objective, **settings), ToyPolicy()
    batch = collect(algorithm, policy)
    loss, grad = gradient(algorithm, policy, batch)
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6 and grad.isfinite().all() and (grad != 0).all()
    left_out = 0.02 if objective == "clip_cov" else 1e-5  # one edge of them, at random
    assert float(loss.value.detach()) == pytest.approx(-float(batch.advantages.mean()), abs=left_out)
    _, records = train(algorithm, iterations=25, lr=0.05, updates=2)
    assert records[-1]["reward"] > records[0]["reward"] + 0.5


@pytest.mark.parametrize("objective", ["dppo_tv", "cppo_tv"])
def test_objectives_of_probabilities_are_refused(objective):
    with pytest.raises(ValueError, match="a step has a density, which has no upper bound; choose dppo"):
        FlowGRPO(objective=objective)


@pytest.mark.parametrize("combine", ["per_reward", "gdpo"])
def test_each_reward_can_be_taken_by_itself(combine):
    """Two rewards, one a thousand times the other: their sum would hide the small one, their advantages do not."""
    algorithm = FlowGRPO(num_steps=4, combine=combine, adv_std="group", adv_eps=0.0, adv_clip=50.0)
    assert algorithm.needs.scores and not FlowGRPO().needs.scores
    batch = collect(algorithm, ToyPolicy())
    small, large = torch.rand(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch.scores, batch.weights = {"small": small, "large": 1000 * large}, {"small": 3.0, "large": 1.0}
    batch.rewards = 3 * small + 1000 * large
    groups = [r.view(4, 8) for r in (small, large)]
    parts = [(r - r.mean(1, True)) / r.std(1, keepdim=True, correction=0) for r in groups]
    expected = (3 * parts[0] + parts[1]).flatten() / (4 if combine == "per_reward" else 1)
    if combine == "gdpo":
        expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(algorithm.credit(batch), expected.float().repeat(3))


def test_edges_with_zero_credit_can_be_left_out():
    algorithm = FlowGRPO(num_steps=4, drop_zero=True, adv_std="group")
    batch = collect(algorithm, ToyPolicy())
    batch.rewards[:8] = 1.0
    credit = algorithm.credit(batch)
    dead = batch.trajectory.leaves[:, :8].any(1)
    assert torch.equal(credit.isnan(), dead) and dead.any()


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([], r"plan\(\) returned list \[\]; return a samplers.Plan"),
        (None, "returned NoneType None"),
        (["SS.."], "returned list"),
        (window(TIMES, 3, 2), "the last step of the plan, 4, is stochastic"),
        (deterministic(TIMES), "no step of the plan is stochastic"),
        (branch_at(TIMES, [0], 3), "samples_per_prompt=8 is no multiple of the 3 samples"),
        ([branch_at(TIMES, [0], 2), branch_at(TIMES, [0], 4)], "branch into the same number"),
    ],
)
def test_impossible_plans_are_refused(plans, message):
    class Planned(FlowGRPO):
        def plan(self, times, iteration, samples_per_prompt, seed):
            return plans

    with pytest.raises(ValueError, match=message):
        plans_of(Planned(num_steps=5), TIMES, 0, 8, 0)


class Elementwise:
    """A velocity that treats every latent dimension alike, so that the latents' shape cannot matter."""

    def __init__(self):
        self.slope = torch.tensor(0.7, requires_grad=True)

    def velocity(self, x, t, cond):
        return self.slope * x + 0.1 * x.tanh()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_shape_of_latents_does_not_matter(objective):
    """Videos [E,C,F,H,W] with as many channels as edges: a std on the wrong axis would fit, and be wrong."""
    algorithm = FlowGRPO(objective=objective, num_steps=5, kl_coef=0.0, clip_range=0.5, **{"trust": 0.5})
    plan, found = algorithm.plan(TIMES, 0, 2, 0), []
    for shape in ((8, 3, 2, 2), (96,)):
        policy, roots = Elementwise(), torch.arange(2)
        noise = noise_source((96,), seed=0, iteration=0, prompt=roots)

        def shaped(root, member, step, shape=shape, noise=noise):
            return noise(root, member, step).view(-1, *shape)

        table = rollout(
            lambda x, t, i, policy=policy: policy.velocity(x, t, {}), shaped(roots, roots * 0, -1), plan,
            algorithm.kernel, eta=0.7, prompt=roots, group=roots, noise=shaped, keep_mean=True,
        )  # fmt: skip
        assert len(table) == 8
        batch = Batch(prompts=[], cond={}, trajectory=table, leaf_prompt=table.leaf_prompt, plans=(plan,))
        batch.advantages = torch.linspace(-1, 1, 8)
        with torch.no_grad():
            policy.slope += 0.01
        loss = algorithm.loss(policy, batch)
        (grad,) = torch.autograd.grad(loss.value, policy.slope)
        found.append((loss.value.detach(), grad, loss.metrics["ratio_mean"]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (lambda n: None, r"credit\(\) returned NoneType None; return a floating tensor \[24\]"),
        (lambda n: torch.zeros(n, 1), r"a float32 tensor \[24, 1\]"),
        (lambda n: torch.zeros(n, dtype=torch.long), "a int64 tensor"),
        (lambda n: torch.full((n,), float("inf")), "infinite"),
    ],
)
def test_credit_of_another_shape_is_refused(credit, message):
    class Crediting(FlowGRPO):
        def credit(self, batch):
            return credit(len(batch.trajectory))

    algorithm = Crediting(num_steps=4)
    with pytest.raises(AlgorithmError, match=message):
        credit_of(algorithm, collect(FlowGRPO(num_steps=4), ToyPolicy(), k=2))


@pytest.mark.parametrize("shape", [(24, 1), (1,), ()])
def test_a_weight_that_would_be_broadcast_is_refused(shape):
    class Weighing(FlowGRPO):
        def weight(self, batch):
            return torch.ones(shape)

    policy = ToyPolicy()
    with pytest.raises(AlgorithmError, match=r"weight\(\) returned .*one factor for each edge, \[24\]"):
        Weighing(num_steps=4).loss(policy, collect(FlowGRPO(num_steps=4), policy, k=2))
