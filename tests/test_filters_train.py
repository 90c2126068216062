"""Filters and refills in real iterations on pictures: which rows are trained on, and what the rest of the run sees."""

import math
import shutil
from collections import Counter

import pytest
import torch

from flowrl.metrics import PhaseTimer
from flowrl.train import Try
from samplers import stable_seed
from tests import runs
from tests.test_resume import assert_equal_folders

pytestmark = pytest.mark.slow

PROMPTS = ["dull one", "a cat", "dull two", "two dogs", "a red house", "dull three"]
"""Half of them get the same reward for every sample."""
DULL = "return [0.5 if s.prompt.startswith('dull') else v for s, v in zip(samples, brightness(samples))]"
INFORMATIVE = {"use": "informative"}
WIDE = {"clip_range": 0.5}
METHODS = {
    "flow_grpo": {**runs.FLOW, **WIDE},
    "whole samples": {**runs.FLOW, **WIDE, "objective": "gspo"},
    "windows": {**runs.MIX, **WIDE},
    "trees": {"name": "branch_grpo", "num_steps": 4, "splits": [0, 1], "split_noise": 1.0},
    "draws": {"name": "diffusion_nft", "num_steps": 4, "draws_per_sample": 2, "adv_std": "global"},
    "draws of groups": {"name": "diffusion_nft", "num_steps": 4, "draws_per_sample": 2, "share_draws": True},
    "pairs": {"name": "flow_dpo", "num_steps": 4, "draws_per_sample": 2, "pairing": "all"},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def options(tmp_path):
    """`options(filters, {"algorithm": ...})`: three of six prompts an iteration, of which some teach nothing."""
    reward = runs.reward_file(tmp_path, DULL)

    def make(filters=(), changes=None):
        return {
            "data.prompts": PROMPTS, "data.filters": list(filters), "rewards": [{"use": reward, "name": "mine"}],
            "optimizer.eps": 1e-3, "algorithm": METHODS["flow_grpo"], **(changes or {}),
        }  # fmt: skip

    return make


def watched(trainer):
    """What the updater is given, iteration by iteration."""
    seen, run = [], trainer.updater.run

    def told(batch, update_of):
        seen.append((batch, update_of))
        return run(batch, update_of)

    trainer.updater.run = told
    return seen


def names_of(batch):
    """(sample, step or draw) of each row, of methods whose rows belong to one sample each."""
    rows = batch.rows
    if batch.draws is None:
        return list(zip(rows.leaves.int().argmax(1).tolist(), rows.step.tolist(), strict=True))
    return list(zip(rows.sample.tolist(), rows.key[:, 2].tolist(), strict=True))


def kept_of(trainer, batch):
    """What the trainer's filters leave of the first iteration's samples."""
    key = stable_seed(trainer.config.seed, 0, -5)
    return trainer.filters.keep(batch.rewards, batch.place // runs.SAMPLES, key=key)


# ------------------------------------------------------------------------------------------------ refill


@pytest.mark.one_in(2)
@every_method
@pytest.mark.parametrize("updates", [1, 2])
def test_two_tries_are_one_larger_iteration(trainer, options, method, updates):
    """Six prompts in two tries, of which three teach, and the same six at once: the same weights."""
    changes = {"algorithm": method, "optimizer.updates_per_iteration": updates}
    twice = trainer(options([INFORMATIVE], {**changes, "data.max_tries": 2}), "twice")
    once = trainer(options([INFORMATIVE], {**changes, "data.prompts_per_iteration": 6}), "once")
    start = runs.weights(once)
    seen = [watched(twice), watched(once)]
    rows = [twice.step(0), once.step(0)]
    assert [row["refill_tries"] for row in rows] == [2, 1] and [row["refill_drawn"] for row in rows] == [6, 6]
    assert rows[0]["refill_missing"] == 0 and rows[0]["kept_groups"] == rows[1]["kept_groups"] == 0.5
    moved = runs.distance(runs.weights(once), start)
    assert moved > 0 and runs.distance(runs.weights(once), runs.weights(twice)) < 1e-3 * moved
    batches = [told[0][0] for told in seen]
    assert len(batches[0].rows) == len(batches[1].rows) > 0
    for name in ("reward/mean", "score/mine", "policy_loss", "grad_norm", "calls/rollout", "calls/train"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6), name


def test_surplus_groups_are_cut_and_remembered_all_the_same(trainer, options):
    """Five of six prompts teach: the first three of them are trained on, and the history knows all that were drawn."""
    prompts = ["a cat", "two dogs", "dull", "a red house", "a tree", "a boat"]
    run = trainer(options([INFORMATIVE], {"data.prompts": prompts, "data.max_tries": 4}))
    seen = watched(run)
    row = run.step(0)
    batch = seen[0][0]
    trained = set(batch.trajectory.group[batch.rows.leaves.int().argmax(1)].tolist())
    drawn = [run._prompts_of(0, number)[i].text for number in range(int(row["refill_tries"])) for i in range(3)]
    wanted = [slot for slot, text in enumerate(drawn) if text != "dull"][:3]
    assert trained == set(wanted)
    assert [run.history.seen(prompt.id) > 0 for prompt in run.prompts] == [text in drawn for text in prompts]


def test_a_joined_try_has_the_states_and_credit_of_one(trainer, options):
    run = trainer(options(changes={"data.max_tries": 2}))
    phase, tries = PhaseTimer(), []
    for _ in range(2):
        tries.append(run._try(0, tries, phase))
    joined = Try.joined(tries, run.actor)
    whole = run.actor.collect(run.actor.plan(0), joined.prompts, list(range(6)), 0)
    batch = joined.batch
    assert torch.equal(batch.group, whole.group) and torch.equal(batch.leaf_prompt, whole.leaf_prompt)
    assert joined.slots == list(range(6)) and torch.equal(batch.place, torch.arange(6 * runs.SAMPLES))
    keys = [(t.step * 1000 + t.leaves.int().argmax(1)).argsort() for t in (batch.trajectory, whole.trajectory)]
    for name in ("x", "x_next", "logprob", "step", "prompt"):
        mine, theirs = (getattr(b.trajectory, name)[k] for b, k in zip((batch, whole), keys, strict=True))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(batch.trajectory.state.unique()) == len(whole.trajectory.state.unique())
    for name, tensor in batch.cond.items():
        assert torch.equal(tensor, whole.cond[name])
    result = run.actor.submit(whole)()
    torch.testing.assert_close(joined.table, result.total.double(), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ rows


SAMPLE_FILTERS = {
    "largest_advantage": {"use": "largest_advantage", "prune": 0.5},
    "best_worst": {"use": "best_worst", "best": 1, "worst": 1},
    "pf_ppo": {"use": "pf_ppo", "how": "max_random"},
}


@pytest.mark.parametrize("filter_", SAMPLE_FILTERS.values(), ids=SAMPLE_FILTERS)
@pytest.mark.parametrize("method", ["flow_grpo", "draws"])
def test_rows_are_those_of_the_kept_samples(trainer, options, method, filter_):
    """As often as the filter says, each with the credit that it has among its whole group."""
    changes = {"algorithm": METHODS[method]}
    every, some = trainer(options((), changes), "every"), trainer(options([filter_], changes), "some")
    seen = [watched(every), watched(some)]
    told = [every.step(0), some.step(0)]
    whole, batch = (found[0][0] for found in seen)
    kept, rows = kept_of(some, whole), Counter(names_of(whole))
    assert set(rows.values()) == {1} and 0 < int(kept.samples.sum()) < len(kept.counts)
    wanted = {row: int(kept.counts[row[0]]) for row in rows}
    assert Counter(names_of(batch)) == {row: count for row, count in wanted.items() if count}
    credit = dict(zip(names_of(whole), whole.advantages.tolist(), strict=True))
    assert [credit[name] for name in names_of(batch)] == batch.advantages.tolist()
    assert told[1]["kept_samples"] == pytest.approx(kept.samples.double().mean().item())
    assert told[1]["grad_norm"] > 0 and told[1]["reward/mean"] == told[0]["reward/mean"]


def test_a_step_of_a_tree_stays_while_a_sample_below_it_does(trainer, options):
    changes = {"algorithm": METHODS["trees"]}
    every, some = (
        trainer(options((), changes), "every"),
        trainer(options([SAMPLE_FILTERS["best_worst"]], changes), "some"),
    )
    seen = [watched(every), watched(some)]
    for run in (every, some):
        run.step(0)
    whole, batch = (found[0][0] for found in seen)
    kept = kept_of(some, whole).samples
    wanted = (whole.trajectory.leaves & kept).any(1)
    assert 0 < wanted.sum() < len(wanted)
    assert torch.equal(batch.trajectory.leaves, whole.trajectory.leaves[wanted])
    assert torch.equal(batch.advantages, whole.advantages[wanted])


@pytest.mark.parametrize("filter_", SAMPLE_FILTERS.values(), ids=SAMPLE_FILTERS)
@pytest.mark.parametrize("name", ["flow_dpo", "diffusion_dpo", "rpo"])
def test_a_pair_stays_whole_or_goes(trainer, options, name, filter_):
    method = {"name": name, "num_steps": 4, "draws_per_sample": 2, "pairing": "all"}
    run = trainer(options([filter_], {"algorithm": method, "optimizer.updates_per_iteration": 2}))
    seen = watched(run)
    row = run.step(0)
    draws, sign = seen[0][0].draws, seen[0][0].advantages
    assert len(draws) and row["grad_norm"] > 0
    for unit in draws.unit.unique():
        mine = draws.unit == unit
        assert sorted(sign[mine].sign().tolist()) == [-1.0, 1.0]
        assert len(draws.sample[mine].unique()) == 2


@pytest.mark.parametrize("filters", [[], [INFORMATIVE], [SAMPLE_FILTERS["largest_advantage"]]], ids=["all", "g", "s"])
def test_the_rollout_s_graphs_give_what_is_computed_again(trainer, options, filters):
    made = {}
    for update in ("recompute", "single_pass"):
        run = trainer(options(filters, {"optimizer.update": update}), update)
        start = runs.weights(run)
        assert run.step(0)["single_pass"] == (update == "single_pass")
        made[update] = runs.weights(run)
    moved = runs.distance(made["recompute"], start)
    assert moved > 0 and runs.distance(*made.values()) < 1e-3 * moved


# ------------------------------------------------------------------------------------------------ runs


def trained(run):
    """Weights, average and optimizer; a policy that follows comes nearer to weights that stay, by rounding."""
    return {name: tensor for name, tensor in runs.state(run).items() if not name.startswith("old.")}


@pytest.mark.parametrize("tries", [1, 2])
@every_method
def test_where_nothing_is_kept_the_run_says_so_and_goes_on(trainer, options, tmp_path, capfd, method, tries):
    """The first iteration's rewards are all alike."""
    body = f"return [0.5 if calls <= {tries} else v for v in brightness(samples)]"
    rewards = [{"use": runs.reward_file(tmp_path, body, "alike.py"), "name": "mine"}]
    run = trainer(options([INFORMATIVE], {"algorithm": method, "rewards": rewards, "data.max_tries": tries}))
    before = trained(run)
    row = run.step(0)
    assert row["empty_updates"] == 1 and row["kept_groups"] == 0 and row["refill_tries"] == tries
    assert row["dead_low"] + row["dead_high"] == 1
    assert runs.same(trained(run), before)
    warning = f"warning: data.filters kept none of {3 * tries} groups in {tries} tries, so this iteration trains on"
    assert warning in capfd.readouterr().out
    row = run.step(1)
    assert row["grad_norm"] > 0 and not runs.same(trained(run), before)


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_with_filters_goes_on_to_the_same_bits(trainer, options, tmp_path, after):
    filters = [INFORMATIVE, SAMPLE_FILTERS["pf_ppo"]]
    more = {"data.max_tries": 2, "data.curriculum": "learnable", "iterations": 3, "checkpoint_every": 1}
    trainer(options(filters, more)).run()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for later in range(after + 1, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{later:06d}")
    run = trainer(options(filters, more), resume=True)
    assert run.iteration == after
    run.run()
    assert_equal_folders(tmp_path / "whole", tmp_path / "run")
    assert not math.isnan(runs.rows(tmp_path / "run")[0]["refill_missing"])
