"""`flowrl train --smoke` of a config of a model that writes."""

import json

import pytest

from flowrl.config import load_config
from flowrl.configfile import dump_yaml
from flowrl.smoke import smallest, smoke

pytestmark = pytest.mark.slow


@pytest.fixture
def config(vlm_tree, tmp_path):
    """`config({"seed": 3})`: the path of a YAML config."""

    def make(changes=None):
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(vlm_tree(tmp_path / "run", changes)))
        return path

    return make


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_a_smoke_run_saves_resumes_and_exports(config, tmp_path, lora):
    lines = []
    folder = smoke(config({"model.lora": lora, "iterations": 40}), [], lines.append)
    assert folder == tmp_path / "test-smoke"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    assert [line.split(":")[1].strip() for line in lines[:3]] == [
        "one iteration, with rewards and an evaluation", "resumed from its checkpoint, one more",
        "exported weights loaded and sampled",
    ]  # fmt: skip


def test_rewards_that_agree_are_told_and_answers_are_kept_with_the_right_ones(config):
    told = "note: the rewards of every group agreed"
    lines = []
    folder = smoke(config(), ["rewards=[{use: verifiers.format.tags}]"], lines.append)
    assert lines[-1].startswith(told)
    shown = json.loads((folder / "samples" / "000002.json").read_text())
    assert len(shown["answers"]) == len(shown["right"]) == len(shown["prompts"]) == 2
    (first, *_) = [json.loads(line) for line in (folder / "rollouts" / "000000.jsonl").read_text().splitlines()]
    golds = {row.metadata["answer"] for row in load_rows(folder)}
    assert first["answer"] in golds and set(shown["right"]) <= set(map(str, golds)) and "response" in first
    lines.clear()
    smoke(config(), [], lines.append)
    assert not any(line.startswith(told) for line in lines)


def load_rows(folder):
    """The questions of a run."""
    from flowrl.vlm.actor import questions

    settings = load_config(folder / "config.yaml")
    held_out = questions(settings, settings.data.eval_prompts or settings.data.prompts, "held_out")
    return [*questions(settings, settings.data.prompts, "train"), *held_out]


def test_what_decides_whether_it_works_stays(config):
    changes = {
        "generation.max_new_tokens": 2000, "data.max_tries": 9, "data.filters": [{"use": "informative"}],
        "generation.tools": {"use": ["zoom"]}, "data.samples_per_prompt": 16, "data.on_dead_group": "hint",
    }  # fmt: skip
    path = config(changes)
    small, whole = smallest(path, []), load_config(path)
    assert (small.algorithm, small.rewards, small.model) == (whole.algorithm, whole.rewards, whole.model)
    assert small.generation.tools == whole.generation.tools and small.generation.max_new_tokens == 32
    assert small.data.filters == () and small.data.max_tries == 1  # there is something to update with
    assert small.iterations == 2 and small.data.samples_per_prompt == 2
    tiny = smallest(path, ["model.path=tiny/llava", "model.dtype=bfloat16"])
    assert tiny.model.dtype == "float32"
