"""Preferences from a folder of pairs: made, learnt, stopped and gone on with to the last bit, refused when broken."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from flowrl.config import ConfigError, check
from flowrl.data import DataError
from flowrl.make_pairs import make_pairs
from flowrl.train import Trainer
from tests import runs
from tests.test_resume import assert_equal_folders

pytestmark = pytest.mark.slow

DPO = {"name": "flow_dpo", "num_steps": 4, "draws_per_sample": 2, "beta": 100.0}
PROMPTS = [*runs.PROMPTS, "a tree", "a boat"]


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    """A folder of pairs that `flowrl pairs make` would write, of five prompts."""
    home = tmp_path_factory.mktemp("pairs")
    config = runs.config(tiny_model, home / "unused", {"data.prompts": PROMPTS})
    summary = make_pairs(
        config, home / "store", num_prompts=None, samples_per_prompt=3, how="all", min_margin=0.0, weights=None,
        num_steps=2, seed=0, console=Console(quiet=True),
    )  # fmt: skip
    assert summary.pairs == 15
    return home / "store"


def offline(store, **changes):
    return {
        "algorithm": dict(DPO), "data.prompts": str(store), "data.eval_prompts": PROMPTS, "data.samples": "stored",
        "data.samples_per_prompt": 2, "data.prompts_per_iteration": 4, "optimizer.lr": 1e-3, "iterations": 4,
        "checkpoint_every": 10, "evaluate_every": 2, **changes,
    }  # fmt: skip


def test_no_sample_is_drawn_and_the_pairs_are_learnt(trainer, store, tmp_path):
    run = trainer(offline(store, iterations=8, **{"optimizer.ema_decay": None}))
    run.run()
    rows = runs.rows(tmp_path / "run")
    for row in rows:
        assert row["calls/rollout"] == 0 and row["calls/train"] == row["calls/reference"] == 4 * 2 * 2
        assert row["reward_margin"] > 0 and row["pairs_per_group"] == 1 and row["no_pair_frac"] == 0
    assert rows[0]["policy_loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert rows[0]["implicit_accuracy"] == 0.5
    assert rows[-1]["policy_loss"] < rows[0]["policy_loss"] and rows[-1]["implicit_accuracy"] > 0.5


@pytest.mark.parametrize(
    "kind",
    [{"model.lora": runs.LORA}, {"algorithm": DPO | {"refresh_every": 3, "sft_iterations": 1}, "optimizer.lr": 1e-4}],
    ids=["lora", "full, sft, refreshed"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_model, store, tmp_path, kind):
    for name in ("whole", "stopped"):
        options = offline(store, **kind) | ({"iterations": 2} if name == "stopped" else {})
        Trainer(runs.config(tiny_model, tmp_path / name, options)).run()
    Trainer(runs.config(tiny_model, tmp_path / "stopped", offline(store, **kind)), resume=True).run()
    assert_equal_folders(tmp_path / "whole", tmp_path / "stopped")


# ------------------------------------------------------------------------------------------------ broken stores


@pytest.fixture
def copied(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def spoil(store, number, **changes):
    path = store / "pairs.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chosen": "media/none.png"}, "is no file"),
        ({"rewards": {"chosen": 0.1, "rejected": 0.5}}, "swap the two"),
        ({"rejected": "../../outside.png"}, "outside the store"),
    ],
)
def test_broken_rows_are_refused_with_file_and_line_before_the_model_is_loaded(
    tiny_model, config_file, copied, tmp_path, monkeypatch, changes, text
):
    spoil(copied, 4, **changes)
    monkeypatch.setattr("flowrl.media.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=rf"pairs\.jsonl:4: .*{text}"):
        Trainer(runs.config(tiny_model, tmp_path / "run", offline(copied)))
    (problem,) = check(config_file(offline(copied)))
    assert "pairs.jsonl:4" in problem and text in problem and "data.prompts" in problem


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"data.samples_per_prompt": 4}, ["names 2 stored samples where 4 are wanted", "data.samples_per_prompt: 2"]),
        ({"data.prompts": ["a cat"]}, ["names 0 stored samples where 2 are wanted", "flowrl pairs make"]),
    ],
)
def test_prompts_without_as_many_samples_are_refused_early(
    tiny_model, config_file, store, tmp_path, monkeypatch, changes, texts
):
    monkeypatch.setattr("flowrl.media.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    options = offline(store) | changes
    with pytest.raises(ValueError, match=texts[0]):
        Trainer(runs.config(tiny_model, tmp_path / "run", options))
    (problem,) = check(config_file(options))
    assert all(text in problem for text in texts)


def test_a_method_that_needs_steps_cannot_take_stored_samples(tiny_model, store, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.samples.*mix_grpo trains on steps; choose a method of the forward"):
        runs.config(tiny_model, tmp_path / "run", offline(store, algorithm=dict(runs.MIX)))


def test_media_of_another_size_are_refused(trainer, store):
    run = trainer(offline(store, **{"model.height": 16, "model.width": 16}))
    with pytest.raises(ValueError, match=r"1 x 32 x 32 .*1 x 16 x 16.*model\.height"):
        run.step(0)
