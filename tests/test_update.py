"""Optimiser steps: the same whatever the cut into micro-batches and processes; nothing moves that should not."""

import math
from dataclasses import replace

import pytest
import torch

from flowrl.collect import roll_out
from flowrl.data import shard
from flowrl.train import credited
from flowrl.types import Batch, Prompt
from flowrl.update import UpdateError, deal, learning_rate_factor
from samplers import all_steps, branch_at, flow_sde, noise_source, rollout, sliding_window
from tests import runs

K = 4
TIMES = torch.linspace(1, 0, 6)
PLANS = {
    "linear": all_steps(TIMES),
    "window": sliding_window(TIMES, 1, 3, shift_every=1),
    "shared": sliding_window(TIMES, 1, 3, shift_every=1).with_fanout({1: K}),
    "tree": branch_at(TIMES, (0, 2), 2),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


# ------------------------------------------------------------------------------------------------ dealing


def toy(plan, slots):
    """A rollout of two dimensions for the prompts at `slots`, as `collect.roll_out` makes one."""
    roots_each = K // plan.leaves_per_root
    prompt = torch.arange(len(slots)).repeat_interleave(roots_each)
    slot = torch.tensor(slots, dtype=torch.long)[prompt]
    member = torch.arange(roots_each).repeat(len(slots)) * plan.leaves_per_root
    noise = noise_source((2,), seed=0, iteration=0, prompt=slot, member=member)
    root = torch.arange(len(prompt))
    trajectory = rollout(
        lambda x, t, i: 0.5 * x, noise(root, torch.zeros_like(root), -1), plan, flow_sde, eta=0.7,
        prompt=prompt, group=slot, noise=noise,
    )  # fmt: skip
    prompts = [Prompt(id=s, text=str(s)) for s in slots]
    return Batch(
        prompts=prompts, cond={}, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt, plans=(plan,)
    )  # fmt: skip


def hands(plan, slots, total, updates, key=7):
    """{(slot, step, state within the prompt): update} of the edges that a process with these slots holds."""
    batch = toy(plan, slots)
    update_of = deal(batch, slots, total, K, updates, key)
    found = {}
    trajectory = batch.trajectory
    rows = torch.stack([trajectory.prompt, trajectory.step, trajectory.state, update_of], 1).tolist()
    least = {}  # the first number of a prompt's states in a step: numbers run on over prompts and steps
    for prompt, step, number, _ in rows:
        least[prompt, step] = min(number, least.get((prompt, step), number))
    for prompt, step, number, update in rows:
        state = slots[prompt], step, number - least[prompt, step]
        assert found.setdefault(state, update) == update  # siblings go together
    return found


@every_plan
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_every_state_is_dealt_once_and_every_depth_evenly(plan, updates):
    total = 5
    found = hands(plan, list(range(total)), total, updates)
    assert len(found) == total * (K // plan.leaves_per_root) * sum(plan.nodes(s) for s in plan.stochastic_steps)
    for step in plan.stochastic_steps:
        counts = [sum(s == step and u == update for (_, s, _), u in found.items()) for update in range(updates)]
        assert sum(counts) and max(counts) - min(counts) <= 1


@every_plan
@pytest.mark.parametrize("world", [2, 3])
def test_a_deal_does_not_depend_on_who_holds_the_prompts(plan, world):
    total = 5
    everyone = hands(plan, list(range(total)), total, 3)
    parts = [hands(plan, shard(list(range(total)), rank, world), total, 3) for rank in range(world)]
    together = {state: update for part in parts for state, update in part.items()}
    assert together == everyone and sum(map(len, parts)) == len(everyone)


def test_a_deal_changes_with_its_key_and_not_with_the_verdicts():
    plan, slots = PLANS["linear"], list(range(5))
    assert hands(plan, slots, 5, 3, key=1) == hands(plan, slots, 5, 3, key=1) != hands(plan, slots, 5, 3, key=2)
    batch = toy(plan, slots)
    rewards = torch.rand(len(batch.leaf_prompt), dtype=torch.float64)
    rewards[[0, 5, 6]] = math.nan
    kept = ~(batch.trajectory.leaves & rewards.isnan()).any(1)
    left = credited(replace(batch, rewards=rewards), torch.where(kept, 1.0, math.nan))
    assert len(left.trajectory) == kept.sum() == len(batch.trajectory) - 3 * 4
    assert torch.equal(deal(left, slots, 5, K, 3, 1), deal(batch, slots, 5, K, 3, 1)[kept])


@pytest.mark.parametrize("world", [1, 2])
def test_whole_samples_stay_together(world):
    plan, updates, total = PLANS["linear"], 3, 5
    found = {}
    for rank in range(world):
        slots = shard(list(range(total)), rank, world)
        batch = toy(plan, slots)
        update_of = deal(batch, slots, total, K, updates, 7, whole_samples=True)
        for leaf, update in zip(batch.trajectory.leaves.int().argmax(1).tolist(), update_of.tolist(), strict=True):
            assert found.setdefault((slots[leaf // K], leaf % K), update) == update
    counts = [list(found.values()).count(update) for update in range(updates)]
    assert len(found) == total * K and max(counts) - min(counts) <= 1


def test_several_plans_are_dealt_evenly_too():
    """Plan a (one state a root) for even roots, plan b (two) for odd ones, as `collect.roll_out` hands them out."""
    plans = [PLANS["linear"], sliding_window(TIMES, 0, 2)]
    slots, whole = list(range(6)), toy(PLANS["linear"], list(range(6)))
    keep = torch.isin(whole.trajectory.step, torch.tensor([0, 1])) | (whole.trajectory.leaves.int().argmax(1) % 2 == 0)
    batch = replace(whole, trajectory=whole.trajectory.select(keep), plans=tuple(plans))
    update_of = deal(batch, slots, 6, K, 3, 5)
    assert (update_of >= 0).all()
    for step, states in ((0, 24), (1, 24), (2, 12), (3, 12)):
        assert torch.bincount(update_of[batch.trajectory.step == step]).tolist() == [states // 3] * 3


# ------------------------------------------------------------------------------------------------ steps


def collected(run, iteration=0):
    """A rollout of the run's policy."""
    times = run.policy.model.times(run.algorithm.num_steps, 32, 32)
    plan = run.algorithm.plan(times, iteration, K, 0)
    prompts = run.sampler(iteration)
    batch = roll_out(
        run.policy, run.algorithm, [plan], prompts, range(len(prompts)), run.actor.conditions, run.actor.geometry,
        samples_per_prompt=K, iteration=iteration, seed=0,
    )  # fmt: skip
    return batch


def update(run, batch, rewards):
    """Credit and optimiser steps, as in `Trainer.step`."""
    batch = replace(batch, rewards=rewards, scores={"reward": rewards}, weights={"reward": 1.0})
    batch = credited(batch, run.algorithm.credit(batch))
    slots = range(len(batch.prompts))
    update_of = deal(batch, slots, len(slots), K, run.updater.updates, 5)
    return run.updater.run(batch, update_of)


def plain_sgd(run, norm=1e-2):
    """Steps of a known length, so that differences mean something."""
    run.updater.optimizer = torch.optim.SGD(run.policy.trainable_parameters(), lr=1.0)
    run.updater.max_grad_norm = norm
    return run


REWARDS = torch.linspace(0, 1, 12, dtype=torch.float64)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
WIDE = {"clip_range": 0.9, "adv_std": "group"}  # a clip that bites or not by a rounding error would hide the cut


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_do_not_change_the_weights(trainer, shared, size):
    found, told = {}, {}
    for micro_batch in (None, size):
        changes = {"algorithm": {**runs.MIX, **WIDE, "shared_noise": shared}, "optimizer.updates_per_iteration": 2}
        run = plain_sgd(trainer({**changes, "optimizer.micro_batch": micro_batch}, folder=f"run{micro_batch}"))
        start = runs.weights(run)
        told[micro_batch] = update(run, collected(run), REWARDS)
        found[micro_batch] = runs.weights(run)
    assert runs.distance(found[None], start) > 5e-3
    assert (found[None] - found[size]).abs().max() <= 1e-6
    assert runs.distance(found[None], found[size]) <= 1e-4 * runs.distance(found[None], start)
    assert told[size] == pytest.approx(told[None], rel=1e-3, abs=1e-5)


def test_a_micro_batch_never_cuts_siblings(trainer, monkeypatch):
    run = trainer({"optimizer.micro_batch": 2})
    seen = []
    loss = type(run.algorithm).loss

    def spy(self, policy, batch):
        seen.append(set(batch.trajectory.state.tolist()))
        return loss(self, policy, batch)

    monkeypatch.setattr(type(run.algorithm), "loss", spy)
    update(run, collected(run), REWARDS)
    states = [state for part in seen for state in part]
    assert len(states) == len(set(states)) == 3 * (1 + K) and {len(part) for part in seen} <= {1, 2}


@pytest.mark.parametrize("shared", [False, True])
def test_samples_without_a_verdict_are_as_if_never_drawn(trainer, shared):
    changes = {"algorithm": {**runs.MIX, **WIDE, "shared_noise": shared}, "optimizer.updates_per_iteration": 2}
    gone = torch.tensor([1, 4, 5, 6])  # one of the first prompt; all but one of the second, which is then dead
    keep = torch.ones(12, dtype=torch.bool)
    keep[gone] = False

    some = trainer(changes, folder="some")
    batch = collected(some)
    rewards = REWARDS.clone()
    rewards[gone] = math.nan
    start = runs.weights(some)
    update(some, batch, rewards)

    without = trainer(changes, folder="without")
    batch = collected(without)
    kept = replace(batch, trajectory=batch.trajectory.keep_leaves(keep), rewards=REWARDS[keep])
    kept = replace(kept, scores={"reward": REWARDS[keep]}, weights={"reward": 1.0})
    led = batch.trajectory.leaves[:, keep].any(1)
    batch = replace(batch, trajectory=batch.trajectory.select(led), advantages=without.algorithm.credit(kept))
    without.updater.run(batch, deal(batch, range(3), 3, K, without.updater.updates, 5))
    assert runs.same(runs.state(some), runs.state(without))

    zero = trainer(changes, folder="zero")
    update(zero, collected(zero), torch.where(keep, REWARDS, 0.0))
    assert not torch.equal(runs.weights(some), start) and not torch.equal(runs.weights(zero), runs.weights(some))


def test_an_optimiser_step_is_the_gradient_of_the_mean_loss(trainer, monkeypatch):
    """Plain SGD with rate 1 moves the weights by the gradient that autograd finds for all edges at once."""
    run = trainer({"optimizer.lr": 1.0, "optimizer.micro_batch": 3, "optimizer.max_grad_norm": None,
                   "optimizer.updates_per_iteration": 1})  # fmt: skip
    parameters = run.policy.trainable_parameters()
    run.optimizer = run.updater.optimizer = torch.optim.SGD(parameters, lr=1.0)
    seen, go_on = [], run.updater.run
    monkeypatch.setattr(run.updater, "run", lambda batch, deal: seen.append(batch) or go_on(batch, deal))
    before = [p.detach().clone() for p in parameters]
    run.step(0)
    moved = [old - p.detach() for old, p in zip(before, parameters, strict=True)]
    with torch.no_grad():
        for old, p in zip(before, parameters, strict=True):
            p.copy_(old)
    for p in parameters:
        p.grad = None
    run.algorithm.loss(run.policy, seen[0]).value.backward(inputs=parameters)
    fresh = [p.grad for p in parameters]
    largest = max(g.abs().max() for g in fresh)
    assert largest > 0
    for g, m in zip(fresh, moved, strict=True):
        torch.testing.assert_close(m, g, rtol=1e-3, atol=1e-3 * float(largest))


def test_an_iteration_that_teaches_nothing_moves_nothing(trainer, tmp_path):
    body = """
if calls == 2 and training:
    return [0.5] * len(samples)
if calls == 3 and training:
    return [math.nan] * len(samples)
return brightness(samples)
"""
    changes = {"rewards": [{"use": runs.reward_file(tmp_path, body)}], "optimizer.weight_decay": 0.1}
    run = trainer({**changes, "optimizer.updates_per_iteration": 2})
    start = runs.weights(run)
    assert run.step(0)["grad_norm"] > 0
    before = runs.state(run)
    assert not torch.equal(runs.weights(run), start)
    dead = run.step(1)  # every group agrees; momentum and weight decay would still move the weights
    assert (dead["zero_std_frac"], dead["grad_norm"], dead["skipped_updates"]) == (1.0, 0.0, 0.0)
    assert runs.same(runs.state(run), before)
    silent = run.step(2)  # no verdict at all, and so not one edge
    assert (silent["no_verdict_frac"], silent["calls/train"]) == (1.0, 0.0) and math.isnan(silent["reward/mean"])
    assert runs.same(runs.state(run), before)
    assert run.step(3)["grad_norm"] > 0
    assert not runs.same(runs.state(run), before)


def test_an_update_may_be_left_without_edges(trainer, tmp_path):
    """Two prompts of three without a verdict leave one shared state, which only one of the four updates can take."""
    body = "return [v if i < 4 or not training else math.nan for i, v in enumerate(brightness(samples))]"
    algorithm = {**runs.MIX, "window": 1, "shared_noise": True}
    changes = {"rewards": [{"use": runs.reward_file(tmp_path, body)}], "algorithm": algorithm}
    run = trainer({**changes, "optimizer.updates_per_iteration": 4})
    start = runs.weights(run)
    row = run.step(0)
    assert row["calls/train"] == 1 and row["grad_norm"] > 0 and math.isfinite(row["policy_loss"])
    assert not torch.equal(runs.weights(run), start)


class Poisoned:
    """An algorithm whose loss has no finite gradient at some of its calls (from 1)."""

    def __init__(self, algorithm, bad):
        self.algorithm, self.bad, self.calls = algorithm, bad, 0

    def __getattr__(self, name):
        return getattr(self.algorithm, name)

    def loss(self, policy, batch):
        self.calls += 1
        loss = self.algorithm.loss(policy, batch)
        return loss._replace(value=loss.value * math.inf if self.calls in self.bad else loss.value)


def test_a_gradient_that_is_not_finite_changes_nothing(trainer):
    run = trainer({"optimizer.max_skipped": 1})
    run.updater.algorithm = Poisoned(run.algorithm, {2, 4, 6, 7})
    assert run.step(0)["skipped_updates"] == 0
    for iteration in (1, 3):  # not two in a row, so the run goes on
        before = runs.state(run)
        assert run.step(iteration)["skipped_updates"] == 1
        assert runs.same(runs.state(run), before) and run.updater.skipped == 1
        assert run.step(iteration + 1)["skipped_updates"] == 0
        assert not runs.same(runs.state(run), before) and run.updater.skipped == 0
    before = runs.state(run)
    run.step(5)
    with pytest.raises(UpdateError, match="not finite in 2 optimiser steps in a row.*The loss itself was not finite"):
        run.step(6)
    assert runs.same(runs.state(run), before)
    assert all(tensor.isfinite().all() for tensor in before.values())


def test_one_bad_update_of_several_is_left_out(trainer):
    run = trainer({"optimizer.updates_per_iteration": 3})
    run.updater.algorithm = Poisoned(run.algorithm, {2})
    row = run.step(0)
    assert row["skipped_updates"] == 1 and math.isfinite(row["policy_loss"]) and math.isfinite(row["grad_norm"])


@pytest.mark.parametrize("norm", [1e-3, None])
def test_the_gradient_is_scaled_down_to_max_grad_norm_or_not_at_all(trainer, norm):
    run = plain_sgd(trainer({"optimizer.ema_decay": None}), norm)
    start = runs.weights(run)
    row = update(run, collected(run), REWARDS)
    moved = runs.distance(runs.weights(run), start)
    assert row["grad_norm"] > 1e-3  # as it was before it was scaled
    assert moved == pytest.approx(norm or row["grad_norm"], rel=1e-3)


def test_the_average_follows_every_optimiser_step(trainer):
    run = trainer({"optimizer.updates_per_iteration": 3})
    run.step(0)
    assert run.policy.ema.count == 3


# ------------------------------------------------------------------------------------------------ learning rate


def test_learning_rate_factors_by_hand():
    def factors(schedule, warmup=0, floor=0.0):
        return [learning_rate_factor(u, 8, schedule, warmup, floor) for u in range(8)]

    assert factors("constant") == [1.0] * 8
    assert factors("constant", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors("linear") == pytest.approx([1 - u / 8 for u in range(8)])
    assert factors("linear", warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert factors("linear", floor=0.5) == pytest.approx([1 - u / 16 for u in range(8)])
    assert factors("cosine") == pytest.approx([0.5 + 0.5 * math.cos(math.pi * u / 8) for u in range(8)])
    assert min(factors("cosine", floor=0.2)) > 0.2


def test_the_learning_rate_of_a_run_counts_updates(trainer):
    changes = {"iterations": 4, "optimizer.updates_per_iteration": 2, "optimizer.schedule": "linear"}
    run = trainer({**changes, "optimizer.warmup": 2, "optimizer.lr": 1e-3})
    rates = [run._set_learning_rate(i) for i in range(4)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3 * (1 - 2 / 6), 1e-3 * (1 - 4 / 6)])
    assert {group["lr"] for group in run.optimizer.param_groups} == {rates[-1]}
