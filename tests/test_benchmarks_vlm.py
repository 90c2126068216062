"""The benchmarks of models that write: every method has its config, and the page says what the runs' files say."""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import learning, vlm
from flowrl.config import load_config
from flowrl.resolve import resolve
from flowrl.train import Trainer
from flowrl.types import Hyperparameters

pytestmark = pytest.mark.slow

CONFIGS = Path("configs/vlm")
SMALL = """base: {base}
name: {name}
iterations: 2
algorithm: {{name: grpo}}
generation: {{max_new_tokens: 8, temperature: 1.0}}
optimizer: {{warmup: 0}}
data: {{prompts: "shapes_questions{kind}", prompts_per_iteration: 6, samples_per_prompt: 4, {filters}
       evaluation: {{num_samples: 30, grid_prompts: 0}}}}
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Finished runs of two iterations, on all questions with groups drawn anew, and on boxes."""
    root = tmp_path_factory.mktemp("vlm")
    again = "filters: [{use: informative}], max_tries: 2,"
    for name, kind, filters in (("grpo", "", again), ("box_dynamic", ":box", "")):
        base = (CONFIGS / ("quickstart.yaml" if not kind else "box_dynamic.yaml")).resolve()
        path = root / f"{name}.yaml"
        path.write_text(SMALL.format(base=base, name=name, kind=kind, filters=filters))
        job = vlm.job_of(name, path, root / "runs", seed=0, iterations=None, jobs=1)
        assert job.action == "start" and job.card.budget == 2 * 6 * 4
        learning.write_card(job.folder, job.card)
        Trainer(load_config(path, learning.overrides(job.card, job.folder))).run()
        assert vlm.job_of(name, path, root / "runs", seed=0, iterations=None, jobs=1).action == "skip"
    return root / "runs"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(folder, iteration, name):
    return json.loads((folder / "samples" / f"{iteration:06d}.json").read_text())["scores"][name]


def test_every_method_that_writes_has_a_config_and_one_of_its_name_for_the_built_in_world():
    """But T-GRPO, which is about videos: the built-in world asks about none."""
    found = vlm.presets(CONFIGS)
    configs = [load_config(path).algorithm.name for path in CONFIGS.glob("*.yaml")]
    methods = {path.stem for path in Path("flowrl/algorithms").glob("*.py")}
    needs = {name: load_config(path).algorithm.build().needs for name, path in found.items()}
    assert all(need.tokens for need in needs.values())
    writes = set()
    for name in methods:
        try:
            method = resolve(name, "flowrl.algorithms")
        except (ImportError, AttributeError, ValueError):
            continue  # what methods share
        if isinstance(method, type) and issubclass(method, Hyperparameters) and method().needs.tokens:
            writes.add(name)
    assert writes == set(configs) and writes - set(found) == {"t_grpo"}


def test_equal_budgets():
    paid = {
        vlm.job_of(name, path, Path("none"), seed=0, iterations=None, jobs=1).card.budget
        for name, path in vlm.presets(CONFIGS).items()
    }
    boxes = {
        vlm.job_of(name, CONFIGS / f"{name}.yaml", Path("none"), seed=0, iterations=None, jobs=1).card.budget
        for name in vlm.BOXES
    }
    assert len(paid) == len(boxes) == 1


def test_fewer_questions_are_a_run_of_their_own():
    job = vlm.job_of("box_fixed", CONFIGS / "box_fixed.yaml", Path("none"), seed=1, iterations=9, jobs=1, questions=2)
    assert job.folder == Path("none/box_fixed-2-1") and job.card.budget == 9 * 2 * 8
    assert load_config(job.card.config, learning.overrides(job.card, job.folder)).data.prompts_per_iteration == 2
    assert "data.prompts_per_iteration=2" in job.command


def test_a_curve_is_what_the_run_wrote(output):
    curve, folder = vlm.read_curve(output / "grpo-0"), output / "grpo-0"
    rows, evaluations = lines(folder / "metrics.jsonl"), lines(folder / "evaluations.jsonl")
    assert curve.answers[-1] == sum(24 * row["refill_tries"] for row in rows) > 0
    before, after = samples(folder, 0, "accuracy"), samples(folder, 2, "accuracy")
    gains = [100 * (b - a) for a, b in zip(before, after, strict=True)]
    assert curve.gain.mean == pytest.approx(statistics.mean(gains))
    assert curve.gain.error == pytest.approx(statistics.stdev(gains) / len(gains) ** 0.5)
    assert curve.accuracy[-1].mean == pytest.approx(100 * evaluations[-1]["scores"]["accuracy"]["mean"])
    assert set(curve.kinds) == {"count", "color", "yes_no", "relation", "box", "digits"}
    assert curve.updates == 4 and 0 < curve.tokens <= 8 * curve.answers[-1]


def test_shares_of_boxes_are_counted_on_the_overlaps(output):
    run, folder = vlm.read_boxes(output / "box_dynamic-0"), output / "box_dynamic-0"
    overlaps = samples(folder, 2, "box.iou")
    assert len(overlaps) == 30
    assert run.iou[-1].mean == pytest.approx(100 * statistics.mean(overlaps))
    assert run.shares[-1] == pytest.approx([100 * sum(x >= bar for x in overlaps) / 30 for bar in (0.85, 0.95, 0.99)])


def test_the_page_has_a_row_for_each_run_and_keeps_the_other_parts(output, tmp_path):
    curve, run = vlm.read_curve(output / "grpo-0"), vlm.read_boxes(output / "box_dynamic-0")
    vlm.write_part(tmp_path, "presets", [asdict(curve)])
    vlm.write_part(tmp_path, "boxes", [asdict(run)])
    vlm.draw_presets([curve], tmp_path / "vlm_presets.png")
    vlm.draw_boxes([run], tmp_path / "vlm_boxes.png")
    page = (tmp_path / "vlm.md").read_text()
    assert (
        f"| {curve.accuracy[0].mean:.1f} → {curve.accuracy[-1].mean:.1f} |" in page and "| 24 | box_dynamic | " in page
    )
    for picture in ("vlm_presets.png", "vlm_boxes.png"):
        assert f"({picture})" in page and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_several_seeds_of_a_method_are_one_row_and_one_line(output, tmp_path):
    """Two seeds of one method and one of another, which the page tells."""
    curve = vlm.read_curve(output / "grpo-0")
    last, gain = curve.accuracy[-1], curve.gain
    other = replace(
        curve, seed=1, accuracy=[*curve.accuracy[:-1], last._replace(mean=last.mean + 10)],
        gain=gain._replace(mean=gain.mean + 10), kinds={kind: (a, 20.0) for kind, (a, _) in curve.kinds.items()},
    )  # fmt: skip
    lonely = replace(curve, name="gspo", gain=gain._replace(mean=gain.mean - 1))
    vlm.write_part(tmp_path, "presets", [asdict(one) for one in (lonely, curve, other)])
    page = (tmp_path / "vlm.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(("| grpo", "| gspo"))]
    assert [row[0].split()[0] for row in rows] == ["grpo", "gspo"]
    assert f"→ {last.mean + 5:.1f}" in rows[0][4]
    assert rows[0][5] == f"{gain.mean + 5:+.1f} ({gain.mean:+.1f} to {gain.mean + 10:+.1f})"
    assert rows[0][-1] == f"{(list(curve.kinds.values())[-1][1] + 20) / 2:.0f}"
    assert f"{gain.mean - 1:+.1f} ± {gain.error:.1f}" in rows[1][5]
    assert "Seeds 0 and 1" in page and "Note: not all seeds of gspo." in page and "overlap" in page
    vlm.draw_presets([lonely, curve, other], tmp_path / "vlm_presets.png")
    assert (tmp_path / "vlm_presets.png").stat().st_size > 1000


def test_another_budget_is_another_benchmark(output):
    with pytest.raises(vlm.BenchmarkError, match="iterations is 2 there, 3 now"):
        vlm.job_of("grpo", output.parent / "grpo.yaml", output, seed=0, iterations=3, jobs=1)
