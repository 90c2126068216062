"""The benchmark of failing rewards: its reward, its configs, and the page from what runs leave."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import rewards as bench
from flowrl.config import check, load_config
from rewards import RewardHub
from rewards.pixel import jpeg_size
from tests.rewards.makers import batch, flat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FAILING = str(ROOT / "configs" / "rewards" / "failing.py") + ":Failing"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "rewards").glob("*.yaml")), ids=lambda path: path.stem)
def test_its_configs_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check(path, []) == []


def test_there_is_a_config_for_every_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in bench.FAILING:
        config = load_config(ROOT / "configs" / "rewards" / f"{name}.yaml")
        assert config.rewards[0].options.get("limit_kb", bench.BUSY_KB) == bench.BUSY_KB
    entries = load_config(ROOT / "configs" / "rewards" / "multi.yaml").rewards
    assert {entry.name or entry.use: entry.weight for entry in entries} == bench.MULTI


def test_a_share_fails_at_random_and_the_same_every_time():
    samples = batch(400)
    with RewardHub({"use": FAILING, "reward": "pixel.contrast", "share": 0.2, "name": "j"}, max_nan_frac=None) as hub:
        result, again = hub(samples), hub(samples)
    failed = result.total.isnan()
    assert 0.2 - 3 * 0.02 < failed.float().mean() < 0.2 + 3 * 0.02
    assert torch.equal(failed, again.total.isnan())
    assert torch.equal(failed.float(), result.parts["j"]["failed"])
    true = result.parts["j"]["true"]
    assert not true.isnan().any() and torch.equal(true[~failed], result.total[~failed])


def test_busy_pictures_fail_and_calm_ones_do_not():
    busy, calm = batch(1)[0], flat(0.5, 0.5, 0.5, size=32)
    limit = (jpeg_size([busy])[0] + jpeg_size([calm])[0]) / 2
    entry = {"use": FAILING, "reward": "pixel.brightness", "limit_kb": limit}
    for answer in (math.nan, 0.0):
        with RewardHub({**entry, "answer": answer}, max_nan_frac=None) as hub:
            total = hub([busy, calm]).total
        torch.testing.assert_close(total, torch.tensor([answer, 0.5]), equal_nan=True)


def leave(folder, before, after, sizes):
    """What a run leaves that the page reads."""
    (folder / "samples").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"iterations": 5}))
    for k, true in ((0, before), (5, after)):
        scores = {"judge.true": true, "pixel.jpeg_size": sizes} | dict.fromkeys(bench.MULTI, true)
        (folder / "samples" / f"{k:06d}.json").write_text(json.dumps({"scores": scores}))


def test_the_page_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    sizes = [3.0, 2.0, 2.0, 2.0]
    leave(tmp_path / "runs" / "multi", [0.0, 0.2, 0.4, 0.6], [0.1, 0.3, 0.5, 0.7], sizes)
    leave(tmp_path / "runs" / "failing_nan", [0.2] * 4, [0.1, 0.5, 0.5, 0.5], sizes)
    leave(tmp_path / "runs" / "failing_nan-seed1", [0.2] * 4, [0.3, 0.7, 0.7, 0.7], sizes)
    bench.report()
    page = (tmp_path / "page.md").read_text()
    assert "| `shapes` | 1 | 0.300 | 0.400 | +0.100 ± 0.000 |" in page
    (row,) = [line for line in page.splitlines() if "20 % at random: no verdict" in line]
    # gains 0.2 and 0.4: mean 0.3, standard error 0.1414 / sqrt(2) = 0.1; busy 1 of 4; true 0.2 busy, 0.6 others
    assert row.split("|")[2:-1] == [
        " 2 ", " 0.300 ± 0.100 ", " 0.250 ± 0.000 ", " 2.250 ± 0.000 ", " 0.200 ± 0.100 ", " 0.600 ± 0.100 "
    ]  # fmt: skip
    assert "score 0" not in page, "what was not run is not there"


def test_speed_says_three_things(capsys):
    pytest.importorskip("rapidocr")
    bench.speed(2)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["ocr", "hub", "overlap"]
