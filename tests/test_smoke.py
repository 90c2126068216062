"""`flowrl train --smoke`: two tiny iterations of any config, saved, resumed, exported."""

from pathlib import Path

import pytest

from flowrl.config import load_config
from flowrl.smoke import smallest, smoke

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def test_a_smoke_run_saves_resumes_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    folder = smoke(ROOT / "configs/quickstart.yaml", [f"output_dir={tmp_path}/runs/quickstart"], lines.append)
    assert folder == tmp_path / "runs" / "quickstart-smoke"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "weights" / "inference.json").is_file() and (folder / "checkpoints").is_dir()
    assert [line.split(":")[1].strip() for line in lines[:3]] == [
        "one iteration, with rewards and an evaluation", "resumed from its checkpoint, one more",
        "exported weights loaded and sampled",
    ]  # fmt: skip


def test_what_decides_whether_it_works_stays():
    config = smallest(ROOT / "configs/sd3/branch_grpo_ocr.yaml", ["data.prompts=shapes"])
    whole = load_config(ROOT / "configs/sd3/branch_grpo_ocr.yaml", ["data.prompts=shapes"])
    assert (config.algorithm, config.rewards) == (whole.algorithm, whole.rewards)
    assert config.model.path == whole.model.path and (config.model.height, config.model.width) == (256, 256)
    assert config.iterations == 2 and config.data.samples_per_prompt <= whole.data.samples_per_prompt
    assert config.output_dir.endswith("-smoke") and config.optimizer.schedule == "constant"
