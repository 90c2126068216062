"""Published numbers: complete, in range, from a source, and what the sources say where it was looked up twice."""

import pytest

from rewards import RewardError
from rewards.published import _read, published


def test_every_number_has_its_split_tie_rule_and_source():
    rows = published()
    assert len(rows) > 60
    for row in rows:
        assert all((row.model, row.benchmark, row.split, row.metric, row.ties)), row
        assert row.source.startswith("https://") and 30 < row.value < 100, row
    keys = [(r.model, r.benchmark, r.split, r.metric, r.source) for r in rows]
    assert len(set(keys)) == len(keys), "one number a cell"


def test_the_same_model_has_different_numbers_by_different_rules():
    found = published("pickscore")
    assert {row.benchmark for row in found} >= {"ImageReward", "HPDv2", "Pick-a-Pic v2"}
    by_rule = {(row.benchmark, row.ties): row.value for row in found}
    assert by_rule["Pick-a-Pic v2", "tied labels are left out"] == pytest.approx(80.19, abs=0.01)
    video = published("VideoReward")
    assert len({row.ties for row in video if row.benchmark.endswith("(Overall)")}) == 2


def test_names_are_compared_without_case_and_punctuation():
    assert published("HPS v2.1") == published("hpsv2_1") != published("hpsv2")
    assert published(benchmark="hpdv2") and not published("no such model")


def test_what_others_inferred_or_measured_on_ports_says_so():
    assert "inferred" in published("LiFT")[0].note and not published("VideoReward")[0].note
    assert all("Ports" in row.note for row in published(benchmark="Pick-a-Pic v2"))


def test_a_table_without_a_tie_rule_is_refused(tmp_path):
    head = "tables:\n  - source: https://a\n    split: test\n    metric: accuracy\n"
    (tmp_path / "a.yaml").write_text(head + "    columns: [{benchmark: X}]\n    rows: {M: [50]}\n")
    with pytest.raises(RewardError, match="has no ties"):
        _read(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(head + "    columns: [{benchmark: X, ties: out}]\n    rows: {M: [50, 60]}\n")
    with pytest.raises(RewardError, match="M has 2 values for 1 columns"):
        _read(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text(
        head + "    columns: [{benchmark: X, ties: out}]\n    rows: {M: [null], N: [50]}\n"
    )
    assert [row.model for row in _read(tmp_path / "c.yaml")] == ["N"]
