"""Evaluations: fixed prompts and noise, averaged weights, and paired differences against brute force."""

import math
import statistics

import pytest
import torch

from flowrl.evaluate import Evaluation, evaluate, evaluation_prompts, mean_and_error, paired_gain
from flowrl.types import Prompt
from tests import runs

NAN = math.nan


def prompts(*categories, start=0):
    return [
        Prompt(id=start + i, text=f"{c} {i}", metadata={"category": c} if c else {}) for i, c in enumerate(categories)
    ]


# ------------------------------------------------------------------------------------------------ numbers


def test_mean_and_error_by_hand():
    values = [0.5, 1.0, 0.25, 3.0]
    mean, error = mean_and_error(torch.tensor(values))
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(4))
    assert mean_and_error(torch.tensor([0.5, NAN, 1.0, math.inf, 0.25, 3.0])) == pytest.approx((mean, error))
    assert mean_and_error(torch.tensor([2.0, NAN])) == (2.0, None)
    assert mean_and_error(torch.tensor([NAN])) == mean_and_error(torch.zeros(0)) == (None, None)


def test_a_paired_gain_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    luck = torch.randn(200, generator=generator)
    before = luck + 0.1 * torch.randn(200, generator=generator)
    after = luck + 0.3 + 0.1 * torch.randn(200, generator=generator)
    before[3], after[7] = NAN, NAN
    pairs = [
        (b, a) for b, a in zip(before.tolist(), after.tolist(), strict=True) if not math.isnan(b) and not math.isnan(a)
    ]
    differences = [a - b for b, a in pairs]
    gain, error = paired_gain(before, after)
    assert len(pairs) == 198
    assert gain == pytest.approx(statistics.mean(differences), rel=1e-5)
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(198), rel=1e-5)
    unpaired = math.hypot(mean_and_error(before)[1], mean_and_error(after)[1])
    assert error < unpaired / 5  # the luck of prompt and noise cancels


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("count", [1, 5, 12, 31])
def test_evaluation_prompts_are_balanced_over_the_categories(count):
    pool = prompts(*["a"] * 20, *["b"] * 3, *["c"] * 7)
    chosen = evaluation_prompts(pool, count)
    share = [sum(p.metadata["category"] == c for p in chosen) for c in "abc"]
    assert sum(share) == count and max(share) - min(share) <= 1
    for category in "abc":  # within a category its prompts take turns
        ids = [p.id for p in chosen if p.metadata["category"] == category]
        repeats = [ids.count(i) for i in set(ids)]
        assert not ids or max(repeats) - min(repeats) <= 1
    assert chosen == evaluation_prompts(pool, count) and [p.id for p in chosen] == sorted(p.id for p in chosen)


def test_evaluation_prompts_without_categories_are_taken_in_turn():
    pool = prompts(None, None, None)
    assert [p.id for p in evaluation_prompts(pool, 2)] == [0, 1]
    assert [p.id for p in evaluation_prompts(pool, 7)] == [0, 0, 0, 1, 1, 2, 2]


def test_the_built_in_evaluation_is_held_out_and_covers_every_category():
    from flowrl.data import load_prompts
    from rewards.shapes import CATEGORIES

    chosen = evaluation_prompts(load_prompts("shapes", "held_out"), 60)
    counts = {c: sum(p.metadata["category"] == c for p in chosen) for c in CATEGORIES}
    assert counts == dict.fromkeys(CATEGORIES, 10)
    assert not {p.text for p in chosen} & {p.text for p in load_prompts("shapes", "train")}


# ------------------------------------------------------------------------------------------------ summaries


def test_a_summary_by_hand():
    found = Evaluation(
        prompts=prompts("a", "a", "b", None),
        scores={"strict": torch.tensor([1.0, 0.0, 1.0, 1.0]), "soft": torch.tensor([0.5, NAN, NAN, 0.7])},
        measures={"fidelity": (0.9, 0.01), "count": (3.0, None)},
    )
    summary = found.summary()
    assert summary["num_samples"] == 4
    strict, soft = summary["scores"]["strict"], summary["scores"]["soft"]
    assert strict["mean"] == 0.75 and strict["se"] == pytest.approx(0.5 / 2)
    assert strict["by_category"]["a"] == {"mean": 0.5, "se": pytest.approx(math.sqrt(0.5 / 2))}
    assert strict["by_category"]["b"] == {"mean": 1.0, "se": None} and set(strict["by_category"]) == {"a", "b"}
    assert soft["mean"] == pytest.approx(0.6) and soft["by_category"]["b"] == {"mean": None, "se": None}
    assert summary["measures"] == {"fidelity": {"mean": 0.9, "se": 0.01}, "count": {"mean": 3.0, "se": None}}


def test_a_summary_without_categories_has_none():
    found = Evaluation(prompts=prompts(None, None), scores={"r": torch.tensor([1.0, 2.0])}, measures={})
    assert set(found.summary()["scores"]["r"]) == {"mean", "se"}


# ------------------------------------------------------------------------------------------------ evaluations


def scores_of(run, **options):
    settings = {"num_steps": 3, "seed": 0, **options}
    return evaluate(run.policy, run.actor.eval_prompts, run.hub, run.actor.conditions, run.actor.geometry, **settings)


def test_an_evaluation_repeats_itself_until_the_weights_change(trainer):
    run = trainer({"optimizer.lr": 1e-2, "optimizer.ema_decay": None})
    first, second = scores_of(run), scores_of(run)
    assert torch.equal(first.media, second.media)
    assert torch.equal(first.scores["pixel.brightness"], second.scores["pixel.brightness"])
    assert torch.allclose(scores_of(run, batch=3).media, first.media, atol=1e-5)
    assert not torch.allclose(scores_of(run, seed=1).media, first.media, atol=1e-3)
    run.step(0)
    after = scores_of(run)
    assert not torch.equal(after.media, first.media)
    rows = torch.stack([first.scores["pixel.brightness"], after.scores["pixel.brightness"]]).double()
    assert paired_gain(*rows)[0] == pytest.approx((rows[1] - rows[0]).mean().item())


def test_an_evaluation_uses_the_averaged_weights_and_puts_the_others_back(trainer):
    run = trainer({"optimizer.lr": 1e-2, "optimizer.ema_decay": 0.999})
    run.policy.ema.warmup = False  # so the average hardly moves, while the weights do
    before = scores_of(run).media
    run.step(0)
    weights = runs.weights(run)
    assert torch.allclose(scores_of(run).media, before, atol=1e-3)
    assert torch.equal(runs.weights(run), weights)
    run.policy.ema.reset()
    assert not torch.allclose(scores_of(run).media, before, atol=1e-3)


def test_parts_groups_and_measures(trainer, tmp_path):
    path = tmp_path / "parts.py"
    path.write_text(
        "import torch\n\ndef brightness(samples):\n    return [s.media.mean().item() for s in samples]\n\n"
        "from rewards.types import Scores\n\nseen = []\n\n"
        "def score(samples):\n    seen.append([(s.prompt, s.group) for s in samples])\n"
        "    value = torch.tensor(brightness(samples))\n"
        "    return Scores(value=value, parts={'half': value / 2}, info=[{} for _ in samples])\n"
    )
    run = trainer(
        {
            "rewards": [{"use": f"{path}:score", "name": "mine"}],
            "data.evaluation": {"num_samples": 5, "grid_prompts": 2},
        }
    )
    asked = []

    def measure(media, texts, group):
        asked.append((media.shape, list(texts), group.tolist()))
        return {"pair": (1.0, 0.5), "triple": (2.0, 0.25, 99), "number": torch.tensor(3.0)}

    found = scores_of(run, measures=[measure])
    assert torch.allclose(found.scores["mine.half"], found.scores["mine"] / 2)
    assert found.measures == {"pair": (1.0, 0.5), "triple": (2.0, 0.25), "number": (3.0, None)}
    ((shape, texts, group),) = asked
    assert shape == (5, 3, 32, 32) and texts == [p.text for p in found.prompts]
    # Samples of one prompt are one group, and samples of different prompts are not.
    assert [texts[i] == texts[j] for i in range(5) for j in range(5)] == [
        group[i] == group[j] for i in range(5) for j in range(5)
    ]
    assert len(set(group)) == 3
