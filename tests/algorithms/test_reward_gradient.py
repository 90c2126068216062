"""ReFL, DRaFT and AlignProp: gradients by brute force, counted steps and calls, learning on the toy and in a run."""

import json

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.direct_gradient import mean_of_judged
from flowrl.algorithms.matching import noise_of
from flowrl.algorithms.reward_gradient import RewardGradient
from flowrl.algorithms.schedule import plans_of
from flowrl.algorithms.srpo import SRPO
from flowrl.costs import cost
from flowrl.types import Needs
from rewards import declare
from samplers import linear_times, shifted_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, reward, train
from tests.algorithms.toy_critic import critic, near_one_if_right

MODES = {
    "refl": {"mode": "refl", "num_steps": 8},
    "draft": {"mode": "draft", "last_steps": 3, "num_steps": 6},
    "draft_lv": {"mode": "draft_lv", "num_steps": 6},
    "alignprop": {"mode": "alignprop", "num_steps": 8},
}
every_mode = pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
solvers = pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])


def gathered(settings, policy=None, judge=None, **changes):
    algorithm = RewardGradient(**settings, **changes)
    policy = policy or ToyPolicy()
    return algorithm, policy, live(collect(algorithm, policy, critic=judge or critic()))


def finished_reward(policy, num_steps, solver):
    """Mean reward of the samples that a rollout of all steps ends in."""
    return collect(SRPO(num_steps=num_steps, solver=solver), policy).rewards.mean()


# ------------------------------------------------------------------------------------------------ DRaFT


@solvers
def test_all_steps_are_the_full_gradient_of_the_chain(solver):
    """DRaFT with K = T against central differences of the finished rollout, whose own graph is cut at every step."""
    algorithm, policy, batch = gathered({"num_steps": 5, "solver": solver}, last_steps=5)
    found = gradient(algorithm, policy, batch)[1]
    measured = []
    for parameter, place in ((policy.bias, 0), (policy.bias, 1), (policy.gain, ())):
        ends = []
        for h in (0.05, -0.05):
            with torch.no_grad():
                parameter[place] += h
                ends.append(finished_reward(policy, 5, solver))
                parameter[place] -= h
        measured.append((ends[1] - ends[0]) / 0.1)  # the loss is minus the reward
    torch.testing.assert_close(found.double(), torch.stack(measured), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_last_steps_are_those_of_a_chain_with_its_beginning_cut_off(last):
    """By hand: Euler steps one after the other, the state detached once."""
    algorithm, policy, batch = gathered({"num_steps": 4, "solver": "euler"}, last_steps=last)
    times, cond = shifted_times(4, 3.0), batch.cond_at(batch.leaf_prompt)
    whole = RewardGradient(num_steps=4, last_steps=4, solver="euler")
    x = collect(whole, policy, critic=critic()).trajectory.x0  # a rollout of no step at all: the noise
    for step in range(4):
        v = policy.velocity(x, times[step].expand(len(x)), cond)
        x = x - (times[step] - times[step + 1]) * v
        if step < 4 - last:
            x = x.detach()
    expected = torch.autograd.grad(-reward(x).float().mean(), (policy.bias, policy.gain))
    found = gradient(algorithm, policy, batch)[1]
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)


@solvers
@pytest.mark.parametrize("last", [1, 6])
def test_the_picture_that_is_judged_is_the_finished_one(solver, last):
    algorithm, policy, batch = gathered({"num_steps": 6, "solver": solver}, last_steps=last)
    told = gradient(algorithm, policy, batch)[0].metrics
    expected = float(finished_reward(policy, 6, solver))
    assert float(told["reward/mean"]) == float(told["score/near_one"]) == pytest.approx(expected, rel=1e-5)


def test_low_variance_averages_the_step_and_its_repetitions():
    algorithm, policy, batch = gathered({"mode": "draft_lv", "num_steps": 4}, renoise=3)
    last, cond, draws = float(shifted_times(4, 3.0)[-2]), batch.cond_at(batch.leaf_prompt), batch.draws
    noises = noise_of(batch, draws).view(-1, 4, 2)[:, 1:]
    x, t = batch.trajectory.x0, torch.full((32,), last)
    first = x - last * policy.velocity(x, t, cond)
    values = [reward(first)]
    for noise in noises.unbind(1):
        again = (1 - last) * first.detach() + last * noise
        values.append(reward(again - last * policy.velocity(again, t, cond)))
    expected = torch.autograd.grad(-torch.cat(values).mean().float(), (policy.bias, policy.gain))
    loss, found = gradient(algorithm, policy, batch)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert float(loss.value.detach()) == pytest.approx(-torch.cat(values).detach().mean().item(), rel=1e-5)
    assert not torch.equal(noises[:, 0], noises[:, 1]) and abs(float(noises.mean())) < 0.3


# ------------------------------------------------------------------------------------------------ ReFL, AlignProp


def test_refl_steps_once_from_a_random_step_of_its_range():
    algorithm = RewardGradient(mode="refl", num_steps=40)
    left = [algorithm.steps_left(i, 0) for i in range(400)]
    assert set(left) == set(range(1, 11))  # steps 30 to 39 of 40
    batch = collect(algorithm, ToyPolicy(), 7, critic=critic())
    start = shifted_times(40, 3.0)[40 - left[7]]
    assert (batch.draws.t == start).all() and (batch.draws.t_next == 0).all() and len(batch.draws) == 32
    assert batch.trajectory.calls == 32 * (40 - left[7])


def test_refl_s_margin_lets_good_pictures_alone():
    """The gradient of mean ReLU(margin - r), with r of x0_hat = x - t v, by hand."""
    algorithm, policy, batch = gathered(MODES["refl"], margin=-0.5)
    x, t = batch.trajectory.x0, batch.draws.t
    r = reward(x - t[:, None] * policy.velocity(x, t, batch.cond_at(batch.leaf_prompt)))
    assert 4 < (r < -0.5).sum() < 28
    expected = torch.autograd.grad(torch.relu(-0.5 - r).mean().float(), (policy.bias, policy.gain))
    loss, found = gradient(algorithm, policy, batch)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert float(loss.value.detach()) == pytest.approx(torch.relu(-0.5 - r).mean().item(), rel=1e-5)


def test_alignprop_s_depth_has_the_published_distribution():
    """T - floor(N(42, 5)) of 50 steps: 8.5 on average, std 5 (and the floor's), never less than 1."""
    algorithm = RewardGradient(mode="alignprop", num_steps=50)
    left = torch.tensor([algorithm.steps_left(i, 3) for i in range(4000)]).float()
    assert left.min() >= 1 and left.max() <= 49
    assert left.mean() == pytest.approx(8.5, abs=0.5) and left.std() == pytest.approx(4.6, abs=0.5)
    evenly = RewardGradient(mode="alignprop", num_steps=50, last_steps=(2, 4))
    assert {evenly.steps_left(i, 0) for i in range(100)} == {2, 3, 4}


# ------------------------------------------------------------------------------------------------ every mode


@every_mode
def test_rows_take_over_where_the_plan_ends(settings):
    algorithm = RewardGradient(**settings)
    for iteration in range(12):
        (plan,) = plans_of(algorithm, linear_times(algorithm.num_steps), iteration, 8, 0)
        assert plan.until == algorithm.num_steps - algorithm.steps_left(iteration, 0)
        batch = collect(algorithm, ToyPolicy(), iteration, critic=critic())
        rows = batch.draws
        each = len(rows) // 32
        assert torch.equal(rows.unit, rows.sample) and torch.equal(
            rows.sample, torch.arange(32).repeat_interleave(each)
        )
        assert (rows.t[::each] == algorithm.grid(batch.times)[plan.until]).all() and (
            rows.t_next[each - 1 :: each] == 0
        ).all()
        if settings["mode"] in ("draft", "alignprop"):
            assert torch.equal(rows.t.view(32, each)[:, 1:], rows.t_next.view(32, each)[:, :-1])
        assert len(rows.key.unique(dim=0)) == len(rows)


@every_mode
def test_nothing_but_the_state_is_stored(settings):
    _, _, batch = gathered(settings)
    assert len(batch.trajectory) == 0 and batch.trajectory.x.numel() == 0
    assert batch.trajectory.x0.numel() == 32 * 2


@every_mode
@pytest.mark.parametrize("changes", [{}, {"kl_coef": 0.1}, {"checkpoint": True}, {"kl_coef": 0.1, "checkpoint": True}])
def test_counted_calls_are_the_formula(settings, changes):
    for iteration in range(4):
        algorithm, policy = RewardGradient(**settings, **changes), ToyPolicy()
        batch = live(collect(algorithm, policy, iteration, critic=critic()))
        plans = plans_of(algorithm, shifted_times(algorithm.num_steps, 3.0), iteration, 8, 0)
        expected = cost(
            algorithm, plans, prompts=4, samples_per_prompt=8, guided=False, updates=1, iteration=iteration
        )  # fmt: skip
        assert policy.calls["current"] == expected.rollout == batch.trajectory.calls
        gradient(algorithm, policy, batch)
        assert policy.calls["current"] - expected.rollout == expected.train
        assert policy.calls["reference"] == expected.reference
        assert expected.stored == 0 and expected.rows == len(batch.draws)


@every_mode
@solvers
def test_recomputed_steps_have_the_same_gradient(settings, solver):
    kept, again = (
        gradient(*gathered(settings, solver=solver, kl_coef=0.1, checkpoint=checkpoint))[1]
        for checkpoint in (False, True)
    )
    assert torch.equal(kept, again)


@every_mode
def test_micro_batches_add_up(settings):
    algorithm, policy, batch = gathered(settings, ToyPolicy(0.1), kl_coef=0.3)
    _, whole = gradient(algorithm, policy, batch)
    share = batch.draws.unit % 3
    parts = [batch.select(share == number) for number in range(3)]
    summed = sum(gradient(algorithm, policy, part)[1] * len(part.rows) / len(batch.rows) for part in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


@every_mode
def test_a_picture_without_a_verdict_has_no_gradient(settings):
    """It adds nothing to the sum, and what is told is the mean of the others."""
    algorithm, policy, batch = gathered(settings, judge=critic(near_one_if_right))
    loss, found = gradient(algorithm, policy, batch)
    silent = float(loss.metrics["no_verdict"])
    assert 0.1 < silent < 0.9 and found.isfinite().all()
    assert float(loss.metrics["reward/mean"]) == pytest.approx(float(-loss.value.detach()) / (1 - silent), rel=1e-4)


def test_no_verdict_at_all_teaches_nothing():
    value = torch.full((4,), torch.nan, requires_grad=True)
    loss = mean_of_judged(-value)
    loss.backward()
    assert loss == 0 and (value.grad == 0).all()


@every_mode
def test_a_reward_that_only_fails_teaches_nothing(settings):
    """Its NaN has no graph at all; the loss must have one all the same, with the gradient 0."""

    @declare(differentiable=True)
    def broken(images, prompts):
        raise ValueError("always")

    algorithm, policy, batch = gathered(settings)
    batch.critic = critic(broken)
    with pytest.warns(UserWarning, match="always"):
        loss, found = gradient(algorithm, policy, batch)
    assert (found == 0).all() and loss.metrics["no_verdict"] == 1 and loss.metrics["reward/mean"].isnan()


@every_mode
def test_distance_to_the_initial_weights(settings):
    algorithm, policy, batch = gathered(settings, kl_coef=2.0)
    assert float(gradient(algorithm, policy, batch)[0].metrics["kl"]) == 0
    with torch.no_grad():
        policy.bias += 0.1
    without = RewardGradient(**settings)
    (loss, far), (plain, near) = gradient(algorithm, policy, batch), gradient(without, policy, batch)
    t, distance = batch.draws.t, []
    for time in t.tolist():  # v changes with the bias b by -(1 - t) t / var - 1 + (1 - t)^2 / (4 var), whatever x is
        var = ((1 - time) * 0.5) ** 2 + time**2
        slope = -(1 - time) * time / var - 1 + (1 - time) ** 2 * 0.25 / var
        distance.append((0.1 * slope) ** 2)
    expected = sum(distance) / len(distance)
    assert float(loss.metrics["kl"]) == pytest.approx(expected, rel=1e-4)
    assert float((loss.value - plain.value).detach()) == pytest.approx(2 * expected, rel=1e-3)
    # The states are taken as they are: the chain that led to them has no part in this gradient.
    torch.testing.assert_close((far - near)[:2], torch.full((2,), 2 * expected / 0.1), rtol=1e-3, atol=1e-5)


@every_mode
@solvers
def test_learning_on_the_toy(settings, solver):
    algorithm = RewardGradient(**settings, solver=solver)
    policy, records = train(algorithm, 40, 0.05, critic=critic())
    assert records[-1]["reward/mean"] > records[0]["reward/mean"] + 0.5
    assert (policy.bias.detach() > 0.5).all()


def test_nothing_is_asked_of_the_rollout():
    assert RewardGradient().needs == Needs(logprobs=False, rewards=False, gradient=True, own_rollout=True)
    assert RewardGradient(kl_coef=0.1, checkpoint=True).needs == Needs(
        logprobs=False, rewards=False, gradient=True, reference=True, evaluations=4, own_rollout=True
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"last_steps": 11}, r"last_steps=11 must lie between 1 and num_steps=10.*10 the whole chain"),
        ({"last_steps": 0}, "last_steps=0 must lie between 1"),
        ({"mode": "refl", "last_steps": (5, 3)}, r"last_steps=\[5, 3\] must lie between"),
        ({"mode": "draft_lv", "last_steps": 2}, "last_steps=2, but draft_lv takes the last step only.*mode=draft"),
        ({"solver": "heun"}, "solver='heun'.*choose 'euler' or 'dpmpp_2m'"),
        ({"kl_coef": -1}, "kl_coef"),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        RewardGradient(**settings)


# ------------------------------------------------------------------------------------------------ a run


@pytest.mark.parametrize("mode", ["draft", "draft_lv"])
def test_a_run_with_the_real_decoder(trainer, mode):
    """Calls, rows and rewards of a whole run; the reward comes from the loss, no sample of the rollout is scored."""
    made = trainer(
        {
            "algorithm": {"name": "reward_gradient", "mode": mode, "num_steps": 3},
            "rewards": [{"use": "pixel.contrast"}, {"use": "pixel.brightness", "weight": 0}],
            "optimizer.micro_batch": 2, "optimizer.updates_per_iteration": 1, "iterations": 2, "optimizer.lr": 1e-2,
        }
    )  # fmt: skip
    made.run()
    metrics = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    samples = made.config.data.prompts_per_iteration * made.config.data.samples_per_prompt
    for row in metrics:
        assert row["calls/rollout"] == 2 * samples and row["calls/train"] == (3 if mode == "draft_lv" else 1) * samples
        assert row["reward/mean"] == row["score/pixel.contrast"] > 0 and row["grad_norm"] > 0 and row["no_verdict"] == 0
