"""The loop: phases, ratios, metrics and what a run leaves in its folder."""

import json
import math
import signal
import threading
from dataclasses import replace

import pytest
import torch

from flowrl.config import load_config
from flowrl.models import ModelError
from flowrl.train import credited, due, leaf_places, reward_metrics
from flowrl.types import Batch, Prompt
from rewards.types import RewardError
from samplers import all_steps, flow_sde, noise_source, rollout
from tests import runs

pytestmark = pytest.mark.slow

PHASES = ("prompts", "plan", "collect", "score", "gather", "credit", "update")
NAN = math.nan


# ------------------------------------------------------------------------------------------------ small parts


def test_when_something_is_due():
    assert [i for i in range(1, 8) if due(i, 3)] == [3, 6]
    assert [i for i in range(1, 8) if due(i, 3, last=i == 7)] == [3, 6, 7]
    assert not due(7, 0, last=True)


def toy(slots, k=2):
    """Linear rollouts of `k` samples for the prompts at these slots."""
    slot = torch.tensor(slots).repeat_interleave(k)
    root = torch.arange(len(slot))
    noise = noise_source((2,), seed=0, iteration=0, prompt=slot, member=torch.arange(k).repeat(len(slots)))
    prompt = torch.arange(len(slots)).repeat_interleave(k)
    trajectory = rollout(
        lambda x, t, i: 0.5 * x, noise(root, torch.zeros_like(root), -1), all_steps(torch.linspace(1, 0, 4)), flow_sde,
        eta=0.7, prompt=prompt, group=slot, noise=noise,
    )  # fmt: skip
    prompts = [Prompt(id=s, text=str(s)) for s in slots]
    return Batch(prompts=prompts, cond={}, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt)


def test_samples_stand_in_the_table_prompt_by_prompt():
    assert leaf_places(toy([0, 1, 2]).group, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert leaf_places(toy([3, 1]).group, 2).tolist() == [6, 7, 2, 3]


def test_edges_with_nan_credit_leave_the_table():
    batch = toy([0, 1])
    credit = torch.tensor([0.0, NAN, 1.0, NAN, -1.0, NAN, 2.0, NAN])
    left = credited(batch, credit)
    assert left.advantages.tolist() == [0.0, 1.0, -1.0, 2.0]
    assert torch.equal(left.trajectory.x, batch.trajectory.x[::2])


def test_reward_metrics_by_hand():
    table = torch.tensor([1.0, 3.0, 2.0, NAN, 5.0, 5.0], dtype=torch.float64)
    asked = {"a": torch.ones(6, dtype=torch.bool), "b": torch.arange(6) < 4, "c": torch.zeros(6, dtype=torch.bool)}
    found = reward_metrics(table, {"a": table, "b": table / 2, "c": table * NAN}, 2, asked)
    known = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0], dtype=torch.float64)
    assert found["reward/mean"] == pytest.approx(16 / 5)
    assert found["reward/std"] == pytest.approx(known.std(correction=0).item())
    assert found["reward/group_std"] == pytest.approx((1.0 + 0.0) / 2)  # the second group has one verdict
    assert found["score/a"] == pytest.approx(16 / 5) and found["score/b"] == pytest.approx(8 / 5)
    assert found["zero_std_frac"] == pytest.approx(2 / 3) and found["no_verdict_frac"] == pytest.approx(1 / 6)
    assert found["score_no_verdict/a"] == pytest.approx(1 / 6) and found["score_no_verdict/b"] == pytest.approx(1 / 4)
    assert "score_no_verdict/c" not in found  # nobody asked
    nothing = reward_metrics(torch.full((4,), NAN, dtype=torch.float64), {}, 2, {})
    assert math.isnan(nothing["reward/mean"]) and nothing["zero_std_frac"] == nothing["no_verdict_frac"] == 1


# ------------------------------------------------------------------------------------------------ iterations


@pytest.mark.parametrize("lora", [None, runs.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", [runs.FLOW, runs.MIX], ids=["flow_grpo", "mix_grpo"])
def test_the_first_update_of_every_iteration_is_on_policy(trainer, method, lora):
    changes = {"algorithm": method, "model.lora": lora, "optimizer.lr": 1e-2, "optimizer.updates_per_iteration": 2}
    run = trainer({**changes, "model.guidance": 2.0})
    before = runs.weights(run)
    for iteration in range(3):
        row = run.step(iteration)
        assert row["ratio_first_update"] <= 1e-5
        assert row["ratio_max_dev"] > 10 * row["ratio_first_update"]  # the second update is not: the weights moved
    assert runs.distance(runs.weights(run), before) > 0.1


def test_the_ratio_tells_of_samples_that_are_not_the_policys_own(trainer, monkeypatch):
    from flowrl import media

    def stale(*args, **kwargs):
        batch = original(*args, **kwargs)
        return replace(batch, trajectory=replace(batch.trajectory, logprob=batch.trajectory.logprob - 0.02))

    original = media.roll_out
    monkeypatch.setattr(media, "roll_out", stale)
    assert trainer().step(0)["ratio_first_update"] == pytest.approx(math.exp(0.02) - 1, rel=1e-2)


def test_a_row_of_metrics(trainer):
    row = trainer().step(0)
    assert all(row[f"time/{phase}"] >= 0 for phase in PHASES)
    assert row["time/iteration"] == pytest.approx(sum(row[f"time/{phase}"] for phase in PHASES))
    assert row["time/total"] == row["time/iteration"]
    assert row["reward/mean"] == pytest.approx(row["score/pixel.brightness"], rel=1e-5)
    assert all(math.isfinite(value) for value in row.values())
    for name in ("grad_norm", "clip_frac", "policy_loss", "adv_abs", "lr", "live_groups", "skipped_updates"):
        assert name in row


def test_a_run_is_a_function_of_its_seed(trainer):
    def numbers(folder, **changes):
        run = trainer(changes, folder=folder)
        rows = [run.step(i) for i in range(2)]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    one, two, three = numbers("one"), numbers("two"), numbers("three", seed=1)
    assert one == two
    assert one[0]["reward/mean"] != three[0]["reward/mean"]


def test_portions_do_not_change_the_samples(trainer):
    def rewards(folder, **changes):
        return trainer(changes, folder=folder).step(0)["reward/mean"]

    whole = rewards("whole")
    parts = rewards("parts", **{"model.rollout_micro_batch": 5, "model.decode_micro_batch": 5})
    assert parts == pytest.approx(whole, rel=1e-6)


def test_a_group_is_compared_with_itself(trainer, tmp_path):
    """Rewards that are constant within a prompt teach nothing, whatever differs between the prompts."""
    reward = runs.reward_file(tmp_path, "return [float(len(s.prompt)) for s in samples]")
    row = trainer({"rewards": [{"use": reward}]}).step(0)
    assert row["reward/std"] > 0 and row["reward/group_std"] == 0
    assert row["zero_std_frac"] == 1 and row["grad_norm"] == 0


def test_weighted_scores_make_the_reward(trainer):
    rewards = [{"use": "pixel.brightness", "weight": 2.0}, {"use": "pixel.redness", "weight": -0.5}]
    row = trainer({"rewards": rewards}).step(0)
    assert row["reward/mean"] == pytest.approx(2 * row["score/pixel.brightness"] - 0.5 * row["score/pixel.redness"])


def test_training_raises_the_reward(trainer, tmp_path):
    changes = {"iterations": 12, "evaluate_every": 12, "optimizer.lr": 1e-2, "data.samples_per_prompt": 8}
    summary = trainer({**changes, "data.evaluation.num_samples": 24, "checkpoint_every": 12}).run()
    rows = runs.rows(tmp_path / "run")
    base, final = (summary[side]["scores"]["pixel.brightness"] for side in ("base", "final"))
    assert final["mean"] - base["mean"] > 5 * max(base["se"], final["se"])
    assert sum(row["reward/mean"] for row in rows[-3:]) > sum(row["reward/mean"] for row in rows[:3])


# ------------------------------------------------------------------------------------------------ the folder


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished run on prompts of the built-in world; (folder, summary, config)."""
    from flowrl.train import Trainer

    folder = tmp_path_factory.mktemp("runs") / "finished"
    config = runs.config(
        tiny_model, folder,
        {
            "iterations": 4, "evaluate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 1,
            "rewards": [{"use": "shapes"}, {"use": "pixel.brightness", "weight": 0.1}],
            "data.prompts": "shapes", "data.balance": "category",
            "data.evaluation": {
                "num_samples": 12, "num_steps": 2, "grid_prompts": 4,
                "measures": ["flowrl.shapes.measures:evaluate_images", "tests.runs:no_number"],
            },
        },
    )  # fmt: skip
    return folder, Trainer(config).run(), config


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{path} holds {name}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_a_run_leaves(finished):
    folder, _, config = finished
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {
        "config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "status.json", "report.html", "run.lock",
        "weights/inference.json", "weights/README.md", "weights/transformer/config.json",
        "checkpoints/000004/state.safetensors", "checkpoints/000004/manifest.json",
        *(f"samples/{i:06d}.{kind}" for i in (0, 2, 4) for kind in ("png", "json")),
    }  # fmt: skip
    assert expected <= names
    assert not [name for name in names if ".tmp" in name or "checkpoints/000002" in name]
    assert load_config(folder / "config.yaml") == config
    assert strict_json(folder / "status.json") == {"state": "finished", "iteration": 4}
    assert [row["iteration"] for row in runs.rows(folder)] == [0, 1, 2, 3]
    evaluations = [json.loads(line)["iteration"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations == [0, 2, 4]


def test_the_summary_of_a_run(finished):
    from rewards.shapes import CATEGORIES

    folder, summary, _ = finished
    assert strict_json(folder / "summary.json") == summary
    assert {"base", "final", "iterations", "train_seconds", "seed"} <= set(summary)
    for side in ("base", "final"):
        scores = summary[side]["scores"]
        assert {"shapes", "shapes.strict", "shapes.soft", "pixel.brightness"} <= set(scores)
        for score in scores.values():
            assert {"mean", "se", "by_category"} == set(score) and set(score["by_category"]) == set(CATEGORIES)
        assert {"strict", "fidelity", "diversity/placement"} <= set(summary[side]["measures"])
        assert summary[side]["measures"]["nothing"] == {"mean": None, "se": None}  # JSON has no NaN
        assert summary[side]["num_samples"] == 12
    seconds = [json.loads(line)["train_seconds"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert seconds[0] == 0 < seconds[1] < seconds[2] == summary["train_seconds"]


def test_the_page_of_a_run(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    for name in ("shapes.strict", "attribution", "pixel.brightness", "fidelity"):
        assert f">{name}<" in page or f">  {name}<" in page
    assert "reward/mean" in page and "<svg" in page


def test_balanced_prompts_cover_the_categories_in_turn(finished):
    from flowrl.data import PromptSampler, load_prompts

    config = finished[2]
    sampler = PromptSampler(load_prompts("shapes"), 3, config.seed, "category")
    seen = {p.metadata["category"] for i in range(2) for p in sampler(i)}
    assert len(seen) == 6


def test_evaluations_of_an_earlier_attempt_are_forgotten(trainer, tmp_path):
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    for name in ("000000.png", "000099.png", "000099.json"):
        (samples / name).write_bytes(b"stale")
    trainer({"iterations": 1, "evaluate_every": 1}).run()
    assert {path.name for path in samples.iterdir()} == {"000000.png", "000000.json", "000001.png", "000001.json"}


# ------------------------------------------------------------------------------------------------ manners


def test_a_run_gives_back_signals_lock_and_lanes(trainer, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    changes = {"iterations": 1, "checkpoint_every": 5}
    threads = threading.active_count()
    trainer(changes).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert threading.active_count() == threads
    run = trainer({"iterations": 2}, resume=True)  # the lock is free
    assert run.iteration == 1


def test_a_run_that_fails_gives_them_back_too(trainer, tmp_path):
    reward = runs.reward_file(tmp_path, "if calls == 2: raise TypeError('no')\nreturn brightness(samples)")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Exception, match="TypeError: no"):
        trainer({"rewards": [{"use": reward}]}).run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert trainer({"rewards": [{"use": reward}]}, resume=True).iteration == 1


def test_a_start_that_fails_gives_the_folder_back(trainer):
    """As in a notebook, which keeps the exception, and with it the half-made trainer."""
    with pytest.raises(ModelError) as kept:
        trainer({"model.lora": {"rank": 4, "targets": ["no_such_layer"]}})
    assert trainer({"iterations": 1}).run()["iterations"] == 1
    assert kept.value is not None


def test_a_ratio_that_is_not_one_is_told_once(trainer, monkeypatch, capfd):
    from flowrl import train

    monkeypatch.setattr(train, "RATIO_TOLERANCE", -1.0)
    run = trainer()
    run.step(0)
    run.step(1)
    assert capfd.readouterr().out.count("warning: ratio_first_update is") == 1


def test_a_run_may_be_started_in_a_thread(trainer):
    found = []
    thread = threading.Thread(target=lambda: found.append(trainer({"iterations": 1}).run()))
    thread.start()
    thread.join()
    assert found and found[0]["iterations"] == 1


def test_the_old_policy_follows_after_each_iteration(trainer):
    """old <- d old + (1 - d) trained, with the decay of that iteration."""
    run = trainer({
        "algorithm": {"name": "diffusion_nft", "num_steps": 3, "draws_per_sample": 2, "decay": [[0, 0.25], [1, 0.75]]},
        "optimizer.lr": 1e-2,
    })  # fmt: skip
    state = run.policy.state_dict()
    name = next(key.removeprefix("weights.") for key in state if key.startswith("weights."))
    old = state[f"old.{name}"]
    for iteration, decay in enumerate((0.25, 0.75)):
        run.step(iteration)
        state = run.policy.state_dict()
        old = decay * old + (1 - decay) * state[f"weights.{name}"]
        torch.testing.assert_close(state[f"old.{name}"], old)
        assert not torch.equal(state[f"old.{name}"], state[f"weights.{name}"])


def test_rewards_that_fail_in_the_loss_stop_the_run_too(trainer, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from rewards import declare\n\n\n@declare(differentiable=True)\ndef score(images, prompts):\n"
        "    if images.requires_grad:\n        raise ValueError('always')\n    return images.mean((1, 2, 3))\n"
    )
    run = trainer({
        "algorithm": {"name": "reward_gradient", "num_steps": 3}, "rewards": [{"use": f"{tmp_path}/broken.py:score"}],
    })  # fmt: skip
    with pytest.raises(RewardError, match="no verdict on 100%"):
        for iteration in range(4):
            run.step(iteration)
