"""SRPO: exact recovery, branches that meet, the combined gradient of the paper, and what words have to do with it."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from flowrl.algorithms.matching import noise_of, noised
from flowrl.algorithms.srpo import SRPO, recovered
from flowrl.costs import cost
from flowrl.types import Needs
from tests.algorithms.toy import ToyPolicy, collect, gradient, live, train
from tests.algorithms.toy_critic import Compass, critic, image_features, text_features

WORDS = {"positive": ("right",), "negative": ("left",)}
FEW = {"num_steps": 4}


def compass(silent=False):
    return critic({"use": Compass(silent), "name": "compass"})


def gathered(policy=None, judge=None, iteration=0, **settings):
    algorithm = SRPO(**{**FEW, **WORDS, **settings})
    policy = policy or ToyPolicy()
    return algorithm, policy, live(collect(algorithm, policy, iteration, critic=judge or compass()))


class Free(nn.Module):
    """A policy whose velocity at each row is a parameter of its own: gradients show what is asked of it."""

    def __init__(self, v):
        super().__init__()
        self.v = nn.Parameter(v)

    def velocity(self, x, t, cond):
        return self.v


def exact(batch):
    return Free(noised(batch).target.clone())


def asked_of(algorithm, batch, policy=None):
    """Gradient of the sum of the rows' losses by each row's velocity."""
    policy = policy or exact(batch)
    loss = algorithm.loss(policy, batch)
    return torch.autograd.grad(len(batch.rows) * loss.value, policy.v)[0], loss


# ------------------------------------------------------------------------------------------------ Direct-Align


def test_recovery_is_exact_where_the_velocity_is():
    """From any time to any other, upwards and downwards."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(200, 3, 4, generator=generator).double() for _ in range(2))
    t, t_next = 0.01 + 0.97 * torch.rand(2, 200, generator=generator).double()
    x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    torch.testing.assert_close(recovered(x, noise - x0, noise, t, t_next), x0, rtol=0, atol=1e-11)


def test_an_error_of_the_velocity_counts_by_the_length_of_the_step():
    """dx0/dv = (sigma_out - sigma_in) / (1 - sigma_out): -0.15 for the published .88 -> .857."""
    v = torch.zeros(2, 1, requires_grad=True)
    zero = torch.zeros(2, 1)
    times = torch.tensor([0.8785, 0.8356]), torch.tensor([0.857, 0.857])
    gain = torch.autograd.grad(recovered(zero, v, zero, *times).sum(), v)[0].flatten()
    torch.testing.assert_close(gain, torch.tensor([-0.0215 / 0.143, 0.0214 / 0.143]), rtol=1e-4, atol=0)


def test_both_branches_recover_the_sample_at_the_same_time():
    _, _, batch = gathered(draws_per_sample=3)
    rows = batch.draws
    assert len(rows) == 32 * 3 * 2 and rows.unit.bincount().tolist() == [2] * 96
    above, below = rows.select(rows.t > rows.t_next), rows.select(rows.t < rows.t_next)
    assert torch.equal(above.unit, below.unit) and torch.equal(above.t_next, below.t_next)
    assert torch.equal(above.sample, below.sample) and torch.equal(above.key, below.key)
    at = noised(batch)
    x0 = recovered(at.x, at.target, at.noise, at.t, rows.t_next)
    torch.testing.assert_close(x0, batch.trajectory.x0[rows.sample], rtol=0, atol=1e-5)


def test_steps_do_not_shrink_at_the_ends_of_the_range():
    rows = gathered(time_range=(0.4, 0.8), interval=0.2, draws_per_sample=8)[2].draws
    torch.testing.assert_close((rows.t - rows.t_next).abs(), torch.full_like(rows.t, 0.08), rtol=1e-5, atol=0)
    every = torch.cat([rows.t, rows.t_next])
    assert 0.4 <= every.min() < 0.42 and 0.78 < every.max() <= 0.8


def test_the_noise_is_the_very_one_that_made_the_sample():
    """Bit by bit the state that the rollout began with, without its having been stored."""

    class Watched(ToyPolicy):
        def velocity(self, x, t, cond):
            if (t == 1).all():
                self.first = x.clone()
            return super().velocity(x, t, cond)

    _, policy, batch = gathered(Watched())
    assert len(batch.trajectory) == 0 and batch.trajectory.x.numel() == 0
    assert batch.trajectory.x0.numel() == 32 * 2  # one latent a sample, and nothing else
    assert torch.equal(noise_of(batch, batch.draws), policy.first[batch.draws.sample])


# ------------------------------------------------------------------------------------------------ preference


def test_the_combined_gradient_is_the_published_one():
    """-g+ [(1 + d+) grad<f,c_pos> - grad<f,c_neg>] - g- [grad<f,c_pos> - (1 + d-) grad<f,c_neg>] on v, pair by pair."""
    algorithm, _, batch = gathered(time_range=(0.5, 0.9))
    found, loss = asked_of(algorithm, batch)
    rows = batch.draws
    x0 = batch.trajectory.x0.clone().requires_grad_()
    towards = {
        word: 2.0 * torch.autograd.grad((image_features(x0) @ text_features(word)).sum(), x0)[0][rows.sample[::2]]
        for word in ("right", "left")
    }
    above, below, out = rows.t[::2, None], rows.t[1::2, None], rows.t_next[::2, None]
    along = (out - 0.5) / 0.4, (below - 0.5) / 0.4
    d_positive, d_negative = 0.1 + 0.15 * along[0], 0.3 - 0.29 * along[1]
    g_above, g_below = ((out - t).abs() / (1 - out) for t in (above, below))
    # A loss falls where the preference rises, and dx0/dv is -g from above, +g from below.
    denoise = g_above * ((1 + d_positive) * towards["right"] - towards["left"])
    inversion = g_below * (towards["right"] - (1 + d_negative) * towards["left"])
    torch.testing.assert_close(found[::2], denoise, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[1::2], inversion, rtol=1e-3, atol=1e-6)
    f = image_features(x0.detach())[rows.sample[::2]]
    pos, neg = f @ text_features("right"), f @ text_features("left")
    told = loss.metrics["reward/mean"], loss.metrics["reward/inversion"]
    expected = 2 * ((1 + d_positive[:, 0]) * pos - neg).mean(), 2 * ((1 + d_negative[:, 0]) * neg - pos).mean()
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-6)


def test_each_branch_turns_the_velocity_to_the_positive_words():
    """Down the gradient the velocity goes to the left in both branches: x0 = x - t v goes to the right."""
    algorithm, _, batch = gathered()
    found, _ = asked_of(algorithm, batch)
    assert (found[::2, 0] > 0).all() and (found[1::2, 0] > 0).all()


def test_what_is_liked_whatever_the_words_cancels():
    """With one wording for both sides only the discounts' part is left, and it has the other sign from below."""
    settings = {
        "positive": ("up",),
        "negative": ("up",),
        "discount_positive": (0.2, 0.2),
        "discount_negative": (0.2, 0.2),
    }
    algorithm, _, batch = gathered(**settings)
    found, _ = asked_of(algorithm, batch)
    assert found.norm(dim=1).min() > 1e-4
    torch.testing.assert_close(found[::2], -found[1::2], rtol=1e-3, atol=1e-7)
    alone, _, batch = gathered(**settings, inversion=False)
    assert len(batch.draws) == 32 and (batch.draws.t > batch.draws.t_next).all()
    torch.testing.assert_close(asked_of(alone, batch)[0], found[::2], rtol=1e-3, atol=1e-7)


def test_words_take_turns():
    for iteration, (wanted, unwanted) in enumerate([("right", "left"), ("up", "down"), ("right", "")]):
        reward = Compass()
        algorithm, _, batch = gathered(
            judge=critic({"use": reward, "name": "compass"}), iteration=iteration, positive=("right", "up"),
            negative=("left", "down", ""),
        )  # fmt: skip
        algorithm.loss(exact(batch), batch)
        heads = {text.rpartition(". ")[0] for text in reward.asked}
        assert heads == {wanted, unwanted}
        assert {text.rpartition(". ")[2] for text in reward.asked} == {"0", "1", "2", "3"}


def test_a_margin_lets_good_rows_alone():
    algorithm, _, batch = gathered(margin=0.7)
    found, loss = asked_of(algorithm, batch)
    plain, _ = asked_of(SRPO(**FEW, **WORDS), batch)
    at = noised(batch)
    s = algorithm.preference(
        batch, recovered(at.x, at.target, at.noise, at.t, batch.draws.t_next), at.t, batch.draws.t_next
    )
    enough = s >= 0.7
    assert 5 < enough.sum() < 59
    assert (found[enough] == 0).all() and torch.equal(found[~enough], plain[~enough])
    torch.testing.assert_close(loss.value, torch.relu(0.7 - s).mean())


# ------------------------------------------------------------------------------------------------ as a method


def test_rows_without_a_verdict_teach_nothing():
    algorithm, _, batch = gathered(judge=compass(silent=True))
    found, loss = asked_of(algorithm, batch)
    silent = batch.trajectory.x0[batch.draws.sample, 0] < 0
    assert 5 < silent.sum() < 59 and (found[silent] == 0).all() and (found[~silent].norm(dim=1) > 0).all()
    assert float(loss.metrics["no_verdict"]) == pytest.approx(float(silent.float().mean()))
    assert loss.value.isfinite() and loss.metrics["reward/mean"].isfinite()


@pytest.mark.parametrize("changes", [{}, {"kl_coef": 0.1}, {"inversion": False}, {"draws_per_sample": 3}])
def test_counted_calls_are_the_formula(changes):
    algorithm, policy, batch = gathered(**changes)
    c = cost(algorithm, batch.plans, prompts=4, samples_per_prompt=8, guided=False, updates=1)
    assert policy.calls["current"] == c.rollout == 32 * 4
    gradient(algorithm, policy, batch)
    assert policy.calls["current"] - c.rollout == c.train == len(batch.draws)
    assert policy.calls["reference"] == c.reference == ("kl_coef" in changes) * len(batch.draws)
    assert c.stored == 0 and algorithm.needs == Needs(
        logprobs=False, rewards=False, gradient=True, features=True, reference="kl_coef" in changes
    )


def test_micro_batches_add_up():
    algorithm, policy, batch = gathered(ToyPolicy(0.2), kl_coef=0.3, draws_per_sample=2)
    _, whole = gradient(algorithm, policy, batch)
    share = batch.draws.unit % 3
    parts = [batch.select(share == number) for number in range(3)]
    summed = sum(gradient(algorithm, policy, part)[1] * len(part.rows) / len(batch.rows) for part in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_learning_on_the_toy():
    """The preference rises and the centre goes to the right; with the words exchanged it goes to the left."""
    policy, records = train(SRPO(**FEW, **WORDS), 30, 0.05, critic=compass())
    assert records[-1]["reward/mean"] > records[0]["reward/mean"] + 0.5 and policy.bias[0] > 0.5
    other, _ = train(SRPO(**FEW, positive=("left",), negative=("right",)), 30, 0.05, critic=compass())
    assert other.bias[0] < -0.5


@pytest.mark.parametrize("time_range", [(0.5, 1.0), (0.0, 0.5), (0.8, 0.2)])
def test_impossible_times_are_refused(time_range):
    with pytest.raises(ValidationError, match=r"time_range=.* must be rising and lie inside \(0, 1\)"):
        SRPO(time_range=time_range)


@pytest.mark.parametrize("changes", [{"interval": 0.5}, {"interval": 0.0}, {"positive": ()}, {"negative": ()}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        SRPO(**changes)


# ------------------------------------------------------------------------------------------------ runs

RUN = {
    "algorithm": {"name": "srpo", "num_steps": 3, "shift": None, "positive": ["clean"], "negative": ["noisy"]},
    "rewards": [{"use": "shapes_clip"}, {"use": "pixel.brightness", "weight": 0}],
    "iterations": 2, "optimizer.lr": 1e-2, "optimizer.updates_per_iteration": 2,
}  # fmt: skip


def metrics_of(made):
    made.run()
    return [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_the_real_decoder_and_scorer(trainer):
    made = trainer(RUN | {"optimizer.micro_batch": 6})
    samples = made.config.data.prompts_per_iteration * made.config.data.samples_per_prompt
    for row in metrics_of(made):
        assert row["calls/rollout"] == 3 * samples and row["calls/train"] == 2 * samples
        assert row["grad_norm"] > 0 and row["no_verdict"] == 0 and -40 < row["reward/mean"] < 40


def test_pictures_from_disk_serve_as_samples(trainer, tmp_path):
    """No rollout: the picture is encoded, and noised anew in each iteration."""
    from PIL import Image

    lines = []
    for number, prompt in enumerate(("a red circle", "a blue star", "two green squares")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 32), (200, 40 * number, 90)).save(path)
        lines.append(json.dumps({"prompt": prompt, "stored": [{"media": str(path), "reward": 0.0}]}))
    (tmp_path / "real.jsonl").write_text("\n".join(lines))
    changes = {"data.prompts": str(tmp_path / "real.jsonl"), "data.samples": "stored", "data.samples_per_prompt": 1}
    rows = metrics_of(trainer(RUN | changes))
    for row in rows:
        assert row["calls/rollout"] == 0 and row["calls/train"] == 2 * 3 and row["grad_norm"] > 0
