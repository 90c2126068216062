"""DDPO: rewards against their prompt's own past, over iterations, processes and restarts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.ddpo import DDPO
from flowrl.history import PromptHistory
from samplers import linear_times
from tests import runs, threaded
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

PROMPTS, K = 3, 4
SMALL = DDPO(num_steps=4, min_count=8)


def of_samples(batch, credit):
    """Credit of each sample, the same in all its steps."""
    leaf = batch.trajectory.leaves.int().argmax(1)
    for sample in range(batch.trajectory.num_leaves):
        assert len(set(map(str, credit[leaf == sample].tolist()))) == 1
    return credit[leaf.argsort(stable=True)].reshape(batch.trajectory.num_leaves, -1)[:, 0].tolist()


def test_defaults_are_the_papers():
    record = DDPO().model_dump()
    expected = {
        "num_steps": 50, "sde": "ddim", "eta": 1.0, "clip_range": 1e-4, "adv_clip": 5.0, "adv_eps": 1e-6,
        "min_count": 16, "kl_coef": 0.0,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert DDPO().needs.history == 16
    assert not DDPO().needs.scores


def test_every_step_but_the_last_is_stochastic_and_samples_share_no_noise():
    plan = DDPO().plan(linear_times(50), 3, 8, 0)
    assert plan.stochastic_steps == tuple(range(49))
    assert plan.leaves_per_root == 1


def test_statistics_are_those_of_the_running_buffer():
    """Against numpy on lists: 4 rewards an iteration, below 8 the batch's statistics, never more than the last 12."""
    history, lists = PromptHistory(12, PROMPTS), [[] for _ in range(PROMPTS)]
    lengths = []
    for iteration in range(5):
        batch = collect(SMALL, ToyPolicy(), iteration, PROMPTS, K, history=history)
        rewards = batch.rewards.view(PROMPTS, K).numpy()
        expected = []
        for past, own in zip(lists, rewards, strict=True):
            past += own.tolist()
            lengths.append(len(past[-12:]))
            values = np.array(past[-12:]) if len(past) >= 8 else rewards
            expected += ((own - values.mean()) / (values.std() + 1e-6)).clip(-5, 5).tolist()
        assert of_samples(batch, batch.advantages) == pytest.approx(expected, rel=1e-5)
    assert lengths[::PROMPTS] == [4, 8, 12, 12, 12]


def test_a_group_of_equal_rewards_still_learns_from_its_past():
    """What no method with statistics of the group alone can do."""
    history = PromptHistory(32, 1)
    collect(SMALL, ToyPolicy(), 0, 1, 8, history=history)
    batch = collect(SMALL, ToyPolicy(), 1, 1, 8, history=history, reward=lambda x0: torch.full_like(x0[:, 0], 3.0))
    past = history.rewards(0).numpy()
    assert len(past) == 16
    expected = (3.0 - past.mean()) / (past.std() + 1e-6)
    assert expected > 0.5
    assert of_samples(batch, batch.advantages) == pytest.approx([expected] * 8, rel=1e-5)


def test_no_verdict_is_neither_counted_nor_trained_on():
    history = PromptHistory(32, 1)
    seen = collect(SMALL, ToyPolicy(), 0, 1, 8, history=history).rewards.tolist()

    def reward(x0):
        return torch.where(torch.arange(len(x0)) == 2, math.nan, x0[:, 0].double())

    batch = collect(SMALL, ToyPolicy(), 1, 1, 8, history=history, reward=reward)
    values = np.array(seen + [r for r in batch.rewards.tolist() if r == r])
    assert len(values) == 15
    expected = ((batch.rewards.numpy() - values.mean()) / (values.std() + 1e-6)).clip(-5, 5)
    assert of_samples(batch, batch.advantages) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert batch.advantages.isnan().sum() == 3


def test_credit_does_not_depend_on_how_processes_share_the_prompts():
    history = PromptHistory(32, PROMPTS)
    for iteration in range(3):
        batch = collect(SMALL, ToyPolicy(), iteration, PROMPTS, K, history=history)
        for rank in range(2):
            mine = batch.trajectory.prompt % 2 == rank
            part = SMALL.credit(replace(batch, trajectory=batch.trajectory.select(mine)))
            assert torch.equal(part, batch.advantages[mine])


def test_buffers_survive_a_restart():
    history = PromptHistory(12, PROMPTS)
    for iteration in range(3):
        batch = collect(SMALL, ToyPolicy(), iteration, PROMPTS, K, history=history)
    again = PromptHistory(12, PROMPTS)
    again.load_state_dict(history.state_dict())
    assert torch.equal(SMALL.credit(replace(batch, history=again)), batch.advantages)
    forgotten = PromptHistory(12, PROMPTS)
    assert not torch.equal(SMALL.credit(replace(batch, history=forgotten)), batch.advantages)


RUN = {"algorithm": {"name": "ddpo", "num_steps": 4, "eta": 1.0, "clip_range": 0.5, "min_count": 8}}


def test_a_run_of_two_ranks_and_its_resume_are_one_run(trainer, monkeypatch, tmp_path):
    """The real trainer: three iterations by one process, and two by two processes, then the third by one of them."""
    options = {**RUN, "iterations": 3, "data.history": 12, "optimizer.eps": 1e-3}
    trainer(options, "one").run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    halved = {**options, "iterations": 2, "engine": {"name": threaded.NAME}}
    two = [threaded.on_rank(rank, 2, lambda: trainer(halved, "two")) for rank in range(2)]
    monkeypatch.delenv("WORLD_SIZE")
    assert [told["iterations"] for told in threaded.together([one.run for one in two])] == [2, 2]
    assert [len(one.history.rewards(0)) for one in two] == [2 * runs.SAMPLES] * 2
    resumed = trainer(options, "two", resume=True)
    assert torch.equal(resumed.history.rewards(0), two[0].history.rewards(0))
    resumed.run()
    rows, others = (runs.rows(tmp_path / folder) for folder in ("one", "two"))
    assert len(rows) == 3
    for name in ("adv_abs", "grad_norm", "reward/mean"):
        assert [row[name] for row in others] == pytest.approx([row[name] for row in rows], rel=1e-4)


def test_it_learns():
    policy, records = train(DDPO(num_steps=6, min_count=12), iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5 and last > -0.8
    assert (policy.bias > 0.5).all()


def test_the_first_update_is_on_policy():
    policy = ToyPolicy()
    loss, grad = gradient(SMALL, policy, collect(SMALL, policy))
    assert loss.metrics["ratio_max_dev"] == 0
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "per_reward"}, "combine would change nothing.*running mean and std.*leave it out"),
        ({"unbiased": True, "adv_floor": 0.1}, "adv_floor, unbiased would change nothing"),
        ({"adv_std": "global"}, "adv_std would change nothing"),
        ({"min_count": 1}, "greater than or equal to 2"),
        ({"eta": 1.2}, r"eta in \(0, 1\]"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        DDPO(**fields)


def test_credit_says_what_it_lacks():
    batch = collect(SMALL, ToyPolicy())
    with pytest.raises(
        ValueError, match="data.history=7 keeps fewer.*min_count=8.*raise the first or lower the second"
    ):
        SMALL.credit(replace(batch, history=PromptHistory(7, 4)))
    with pytest.raises(ValueError, match="batch.history; set data.history to min_count or more"):
        SMALL.credit(replace(batch, history=None))
