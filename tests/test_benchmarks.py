"""The benchmarks: equal budgets, honest numbers, and nothing is trained twice."""

import itertools
import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cost, learning
from benchmarks.plot import COLORS, PANELS, figure
from benchmarks.results import (
    CARD,
    STRICT,
    BenchmarkError,
    Point,
    Value,
    calls_to_reach,
    read_card,
    read_run,
    read_runs,
    render,
    table,
)
from flowrl.config import load_config
from flowrl.configfile import dump_yaml
from flowrl.train import Trainer
from tests import runs

pytestmark = pytest.mark.slow

BUDGET = 500
CALLS = ("calls/rollout", "calls/train", "calls/reference")
ASKED = {"budget": BUDGET, "seed": 0, "jobs": 1}


def write_configs(model, folder):
    """A shared base with two methods on it, on the built-in prompts and their checker."""
    folder.mkdir()
    values = runs.tree(model, "unused", {"rewards": [{"use": "shapes"}], "data.prompts": "shapes"})
    values["data"] |= {"balance": "category"}
    values["data"]["evaluation"] |= {"num_samples": 24, "measures": ["flowrl.shapes.measures:quality"]}
    (folder / "base.yaml").write_text(dump_yaml(values))
    for name, algorithm in (("flow_grpo", runs.FLOW), ("mix_grpo", runs.MIX)):
        text = dump_yaml({"base": "base.yaml", "name": name, "algorithm": algorithm})
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def configs(tiny_model, tmp_path_factory):
    return write_configs(tiny_model, tmp_path_factory.mktemp("bench") / "configs")


@pytest.fixture(scope="module")
def bench(configs):
    """The folder of two finished runs, each done in this process."""
    output = configs.parent / "runs"
    for name, path in learning.configs_in(configs).items():
        job = learning.prepare(name, path, output, **ASKED)
        assert job.action == "start"
        learning.write_card(job.folder, job.card)
        Trainer(load_config(path, learning.overrides(job.card, job.folder))).run()
    return output


@pytest.fixture
def copied(bench, tmp_path):
    """A copy that a test may spoil; a file of it is replaced, never changed in place."""
    import shutil

    return Path(shutil.copytree(bench, tmp_path / "copy"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_buys_as_many_iterations_as_fit(seed):
    rng = random.Random(seed)
    prices = [rng.randint(1, 50) for _ in range(200)]
    budget = rng.randint(prices[0], 900)
    affordable = [n for n in range(200) if sum(prices[:n]) <= budget]
    assert learning.iterations_within(budget, prices.__getitem__) == (max(affordable), sum(prices[: max(affordable)]))


def test_a_budget_that_is_met_exactly_is_spent():
    assert learning.iterations_within(30, lambda _: 10) == (3, 30)
    assert learning.iterations_within(29, lambda _: 10) == (2, 20)


def test_a_budget_below_one_iteration_is_refused():
    with pytest.raises(BenchmarkError, match=r"costs 1,001 denoiser calls, the budget is 1,000: raise"):
        learning.iterations_within(1000, lambda _: 1001)


def test_a_free_iteration_is_refused_instead_of_repeated_for_ever():
    with pytest.raises(BenchmarkError, match="iteration 2 is predicted to cost 0"):
        learning.iterations_within(1000, lambda iteration: 0 if iteration == 2 else 5)


def test_what_was_predicted_is_what_was_counted_and_one_more_iteration_was_too_much(bench):
    for folder in bench.iterdir():
        card = read_card(folder)
        rows = read_lines(folder / "metrics.jsonl")
        counted = [sum(row[key] for key in CALLS) for row in rows]
        assert len(rows) == card.iterations >= 4
        assert sum(counted) == card.predicted <= BUDGET < card.predicted + max(counted)
    assert read_card(bench / "flow_grpo").iterations < read_card(bench / "mix_grpo").iterations  # it has a reference


# ------------------------------------------------------------------------------------------------ what is to be done


def test_the_base_is_no_run_and_unknown_names_are_told(configs, tmp_path):
    assert list(learning.configs_in(configs)) == ["flow_grpo", "mix_grpo"]
    assert list(learning.configs_in(configs, ["mix_grpo"])) == ["mix_grpo"]
    with pytest.raises(BenchmarkError, match="--only mixgrpo: .* has flow_grpo, mix_grpo"):
        learning.configs_in(configs, ["mixgrpo", "flow_grpo"])
    with pytest.raises(BenchmarkError, match="has no configs"):
        learning.configs_in(tmp_path)


@pytest.mark.parametrize(("iterations", "evaluated"), [(1, [1]), (3, [1, 2, 3]), (8, [2, 4, 6, 8]), (10, [3, 6, 9])])
def test_a_run_is_evaluated_about_four_times(configs, bench, iterations, evaluated):
    card = replace(read_card(bench / "flow_grpo"), iterations=iterations, seed=5)
    config = load_config(configs / "flow_grpo.yaml", learning.overrides(card, bench / "x"))
    assert (config.iterations, config.seed, config.engine.threads) == (iterations, 5, learning.THREADS)
    assert Path(config.output_dir) == bench / "x"
    every = config.evaluate_every
    assert list(range(every, iterations + 1, every)) == evaluated


def decided(configs, output, **asked):
    job = learning.prepare("mix_grpo", configs / "mix_grpo.yaml", output, **(ASKED | asked))
    assert ("--resume" in job.command) == (job.action == "resume")
    return job.action


def test_a_finished_run_is_skipped_whatever_runs_beside_it(configs, copied):
    assert decided(configs, copied) == "skip"
    assert decided(configs, copied, jobs=7) == "skip"


def test_an_unfinished_run_goes_on_from_its_checkpoint_or_from_the_start(configs, copied):
    (copied / "mix_grpo" / "status.json").unlink()
    assert decided(configs, copied) == "resume"
    for path in sorted((copied / "mix_grpo" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert decided(configs, copied) == "start"
    (copied / "mix_grpo" / "config.yaml").unlink()  # it died even before
    assert decided(configs, copied) == "start"


def test_another_run_in_the_folder_is_refused(configs, copied, tiny_model, tmp_path):
    with pytest.raises(BenchmarkError, match=r"budget is 500 there, 1000 now; iterations is \d+ there, \d+ now"):
        decided(configs, copied, budget=2 * BUDGET)
    with pytest.raises(BenchmarkError, match=r"seed is 0 there, 1 now.*Delete that folder, or choose another --output"):
        decided(configs, copied, seed=1)
    other = write_configs(tiny_model, tmp_path / "configs")
    text = (other / "mix_grpo.yaml").read_text()
    (other / "mix_grpo.yaml").write_text(text.replace("eta: 0.7", "eta: 0.8"))
    with pytest.raises(BenchmarkError, match=r"algorithm.eta is 0.7 there, 0.8 now"):
        decided(other, copied)
    (copied / "mix_grpo" / CARD).unlink()
    with pytest.raises(BenchmarkError, match="not the benchmark's"):
        decided(configs, copied)


# ------------------------------------------------------------------------------------------------ numbers


def points(*pairs):
    """Evaluations with these (calls, strict score)."""
    return [
        Point(iteration=i, calls=calls, seconds=0.0, values={STRICT: Value(score, 0.1)})
        for i, (calls, score) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(0, 0.4), (100, 0.5), (200, 0.7)], 0.6, 150.0),
        ([(0, 0.4), (100, 0.5), (200, 0.7)], 0.5, 100.0),
        ([(0, 0.4), (100, 0.5), (200, 0.7)], 0.71, None),
        ([(0, 0.4), (100, 0.5)], 0.4, 0.0),
        ([(0, 0.4), (100, 0.5)], 0.1, 0.0),
        ([(0, 0.4), (100, 0.8), (200, 0.2), (300, 0.9)], 0.6, 50.0),  # the first time counts
        ([(0, 0.4), (100, 0.4), (200, 0.4)], 0.5, None),
        ([(0, None), (100, 0.4), (200, None), (300, 0.8)], 0.6, 200.0),  # on the line past an unknown one
        ([], 0.5, None),
    ],
)
def test_calls_to_reach(curve, target, expected):
    assert calls_to_reach(points(*curve), target) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("seed", range(10))
def test_calls_to_reach_against_walking_along_the_curve(seed):
    rng = random.Random(seed)
    calls = list(itertools.accumulate((rng.randint(1, 50) for _ in range(6)), initial=0))
    scores = [rng.random() for _ in calls]
    target = rng.uniform(scores[0], max(scores))
    for (c0, s0), (c1, s1) in itertools.pairwise(zip(calls, scores, strict=True)):
        walked = [c0 + (c1 - c0) * k / 20_000 for k in range(20_001) if s0 + (s1 - s0) * k / 20_000 >= target]
        if walked:
            break
    found = calls_to_reach(points(*zip(calls, scores, strict=True)), target)
    assert found == pytest.approx(walked[0], abs=50 / 20_000 + 1e-9)


def test_the_numbers_of_a_run_against_its_files(bench):
    folder = bench / "mix_grpo"
    run = read_run(folder)
    rows, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl")
    assert [p.iteration for p in run.points] == [e["iteration"] for e in evaluations]
    assert run.points[0].calls == 0 and run.points[0].seconds == 0
    for point, evaluation in zip(run.points, evaluations, strict=True):
        spent = [row for row in rows if row["iteration"] < point.iteration]
        assert point.calls == sum(row[key] for row in spent for key in CALLS)
        assert point.seconds == pytest.approx(sum(row["time/iteration"] for row in spent))
        assert point.mean(STRICT) == evaluation["scores"][STRICT]["mean"]
        assert point.mean("fidelity") == evaluation["measures"]["fidelity"]["mean"]
    assert run.points[-1].mean("no such thing") is None


def spoil(folder, before, after):
    """Give a run other strict scores in its first and last evaluation, in all the files that have them."""
    lines = read_lines(folder / "evaluations.jsonl")
    for line, scores in ((lines[0], before), (lines[-1], after)):
        known = [s for s in scores if s is not None]
        line["scores"][STRICT] = {"mean": statistics.mean(known), "se": None}
        path = folder / "samples" / f"{line['iteration']:06d}.json"
        sample = json.loads(path.read_text())
        sample["scores"][STRICT] = scores
        path.write_text(json.dumps(sample))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


BEFORE = [0.0] * 16 + [1.0] * 8
AFTER = {"flow_grpo": [0.0] * 12 + [1.0] * 12, "mix_grpo": [1.0, None, 1.0, 1.0] + [0.0] * 12 + [1.0] * 7 + [0.0]}


@pytest.fixture
def learnt(copied):
    """The two runs with scores that have something to tell: +16.7 points, and +8.7 with a verdict missing."""
    for name, after in AFTER.items():
        spoil(copied / name, BEFORE, after)
    return copied


def test_gains_are_paired_and_leave_out_what_has_no_verdict(learnt):
    found = table(read_runs(learnt)[0], "flow_grpo")
    assert [row.method for row in found.rows] == ["flow_grpo", "mix_grpo"]  # the larger gain first
    for row in found.rows:
        pairs = zip(BEFORE, AFTER[row.method], strict=True)
        differences = [100 * (a - b) for b, a in pairs if a is not None]
        assert row.gain.mean == pytest.approx(statistics.mean(differences))
        assert row.gain.error == pytest.approx(statistics.stdev(differences) / math.sqrt(len(differences)))
        assert (row.base, row.final) == (pytest.approx(100 / 3), pytest.approx(row.evaluations[-1].mean(STRICT) * 100))
    assert [row.marked for row in found.rows] == [False, True] and found.notes == []


def test_the_race_to_the_references_score(learnt):
    runs_, _ = read_runs(learnt)
    first, second = table(runs_, "flow_grpo").rows
    assert first.reach == first.calls and first.ratio == 1.0
    assert second.reach is None and second.ratio is None
    first, second = table(runs_, "mix_grpo").rows
    total = second.calls
    assert second.ratio == 1.0 and first.ratio == pytest.approx(first.reach / total) and first.reach < first.calls
    found = table(runs_, "dance_grpo")
    assert [row.reach for row in found.rows] == [None, None] and "no finished run of the reference" in found.notes[0]


def test_what_is_not_comparable_is_said(copied):
    def notes():
        return table(read_runs(copied)[0], "flow_grpo").notes

    assert notes() == []
    card = read_card(copied / "mix_grpo")
    learning.write_card(copied / "mix_grpo", replace(card, seed=3, threads=2, budget=7))
    told = " ".join(notes())
    for what in ("budget", "seed", "number of threads"):
        assert f"Not the same {what} as flow_grpo: mix_grpo." in told
    learning.write_card(copied / "mix_grpo", card)
    spoil(copied / "mix_grpo", [1.0] * 24, [0.0] * 24)
    assert notes() == ["Not the same score of the base model as flow_grpo: mix_grpo."]


def test_unfinished_runs_are_left_out_and_named(copied):
    (copied / "mix_grpo" / "status.json").unlink()
    found, notes = read_runs(copied)
    assert [run.name for run in found] == ["flow_grpo"] and notes == ["mix_grpo has not finished and is left out."]
    (copied / "flow_grpo" / "status.json").unlink()
    with pytest.raises(BenchmarkError, match="no finished run"):
        read_runs(copied)


def test_a_run_without_the_strict_score_is_refused(copied):
    path = copied / "mix_grpo" / "samples" / "000000.json"
    sample = json.loads(path.read_text())
    del sample["scores"][STRICT]
    path.write_text(json.dumps(sample))
    with pytest.raises(BenchmarkError, match=r"no score shapes.strict.*add \{use: shapes, weight: 0\}"):
        read_runs(copied)


# ------------------------------------------------------------------------------------------------ table and plot


def test_the_report_is_written_and_the_same_every_time(learnt, tmp_path, capsys):
    def written(folder):
        arguments = ["report", "--output", str(learnt), "--to", str(folder)]
        assert learning.main(arguments) == 0
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    files = written(tmp_path / "a" / "docs")
    assert list(files) == ["learning.json", "learning.md", "learning.png"]
    assert files == written(tmp_path / "b")
    assert files["learning.png"].startswith(b"\x89PNG")
    numbers = json.loads(files["learning.json"])
    assert [row["method"] for row in numbers["rows"]] == ["flow_grpo", "mix_grpo"]
    assert numbers["rows"][1]["reach"] is None
    assert "learning.md" in capsys.readouterr().out


def test_the_page_says_what_the_rows_hold(learnt):
    found = table(read_runs(learnt)[0], "flow_grpo")
    page = render(found)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + 2 and len({len(row) for row in rows}) == 1
    base, first, second = rows[2:]
    assert base[0] == "base model" and base[4] == "33.3"
    calls = found.rows[0].calls
    assert first[:3] == ["flow_grpo", str(found.rows[0].iterations), f"{calls:,} ({calls:,})"]
    assert first[4:6] == ["33.3 → 50.0", f"+16.7 ± {found.rows[0].gain.error:.1f}"]
    assert first[-2:] == [f"{calls:,}", "1.00"]
    assert second[0] == "mix_grpo †" and second[-2:] == ["–", "–"]
    assert "† gained less than 10 points." in page and "Note:" not in page
    assert (
        "--budget 500 --seed 0 --jobs 1\n" in page and "Seed: 0, threads a run: 1, runs beside each other: 1." in page
    )
    assert not re.search(r"\b20\d\d-\d\d", page)  # no dates


def test_the_plot_draws_every_method_in_every_panel(learnt):
    found = table(read_runs(learnt)[0], "flow_grpo")
    sheet = figure(found)
    assert len(sheet.axes) == 4
    for panel, axis in zip(PANELS, sheet.axes, strict=True):
        assert len(axis.containers) == 2
        for place, (row, bars) in enumerate(zip(found.rows, axis.containers, strict=True)):
            line = bars.lines[0]
            known = [p for p in row.evaluations if p.mean(panel.measure) is not None]
            assert list(line.get_xdata()) == [panel.across(p) for p in known] and len(known) >= 2
            assert list(line.get_ydata()) == [panel.scale * p.mean(panel.measure) for p in known]
            assert line.get_color() == COLORS[place]
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == ["flow_grpo", "mix_grpo"]


def test_twenty_methods_look_different(bench):
    found = table(read_runs(bench)[0], "flow_grpo")
    many = replace(found, rows=[replace(found.rows[0], method=f"m{i}") for i in range(20)])
    lines = [bars.lines[0] for bars in figure(many).axes[0].containers]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 20


def test_an_evaluation_without_a_measure_is_left_out_of_the_line(learnt):
    lines = read_lines(learnt / "mix_grpo" / "evaluations.jsonl")
    lines[1]["measures"]["fidelity"] = {"mean": None, "se": None}
    (learnt / "mix_grpo" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = table(read_runs(learnt)[0], "flow_grpo")
    drawn = figure(found).axes[2].containers[1].lines[0]
    assert len(drawn.get_xdata()) == len(lines) - 1 and lines[1]["iteration"] not in drawn.get_xdata()


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def benchmark(capfd, monkeypatch):
    """The command; each of its runs is a process of its own, where a fault may be waiting."""

    def run(configs, output, *, fault=""):
        monkeypatch.setenv("FLOWRL_FAULT", fault)
        arguments = ["run", "--configs", configs, "--output", output, "--budget", BUDGET]
        code = learning.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.mark.slow
def test_failures_are_told_at_the_end_and_the_next_run_goes_on(tiny_model, bench, benchmark, tmp_path):
    configs, output = write_configs(tiny_model, tmp_path / "configs"), tmp_path / "runs"
    (configs / "broken.yaml").write_text("base: base.yaml\nalgorithm: {name: mixgrpo}\n")
    (configs / "flow_grpo.yaml").unlink()
    code, out, err = benchmark(configs, output, fault="train.updated:3")
    assert code == 1 and "start  mix_grpo" in out and "FAILED mix_grpo" in out
    assert "FAILED broken: " in err and "did you mean 'mix_grpo'" in err and "FAILED mix_grpo: exit code -9" in err
    assert (
        (output / "mix_grpo" / "log.txt").read_text().startswith(f"$ flowrl train {configs}/mix_grpo.yaml iterations=")
    )

    (configs / "broken.yaml").unlink()
    code, out, err = benchmark(configs, output)
    assert code == 0 and "FAILED" not in err and "resume  mix_grpo" in out and "finished mix_grpo" in out
    assert "--resume" in (output / "mix_grpo" / "log.txt").read_text()
    assert runs.rows(output / "mix_grpo") == runs.rows(bench / "mix_grpo")  # the same as one that was not killed

    assert learning.prepare("mix_grpo", configs / "mix_grpo.yaml", output, **ASKED).action == "skip"


def test_what_cannot_be_done_at_all_is_one_sentence(tmp_path, capsys):
    assert learning.main(["run", "--configs", str(tmp_path)]) == 2
    assert learning.main(["report", "--output", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "--configs" in told[0] and "no finished run" in told[1]


# ------------------------------------------------------------------------------------------------ cost


def test_the_cost_of_an_iteration_by_phases(configs):
    cases = [
        cost.Case("mix", str(configs / "mix_grpo.yaml"), (), "mix"),
        cost.Case("more prompts", str(configs / "mix_grpo.yaml"), ("data.prompts_per_iteration=6",), "mix"),
    ]
    mix, more = cost.measure(cases, rounds=2, threads=1)
    assert mix.ratio == 1.0 and more.ratio > 0
    assert more.calls == 2 * mix.calls > 0  # the same plans for 6 prompts instead of 3
    for spent in (mix, more):
        assert set(spent.phases) == {"collect", "score", "update"}
        assert 0 < max(spent.phases.values()) < spent.iteration
    page = cost.render(cases, [mix, more])
    assert page.splitlines()[2].endswith("| 1.00 | mix |") and len(page.splitlines()) == 4


def test_a_ratio_is_taken_round_by_round():
    """A machine that is half as fast in the second round slows both down: 3 and 6 are 3 times 1 and 2."""

    def row(seconds, calls):
        spent = {"time/collect": seconds / 2, "time/score": 0.0, "time/update": seconds / 4, "time/iteration": seconds}
        return spent | {"calls/rollout": calls, "calls/train": 10.0, "calls/reference": 1.0}

    case = cost.Case("slow", "config.yaml", (), "fast")
    found = cost.timing(case, [row(3, 4), row(6, 4), row(30, 1)], [row(1, 4), row(2, 4), row(5, 4)])
    assert found.ratio == 3 and found.iteration == 6 and found.calls == 11 + 3
    assert found.phases == {"collect": 3.0, "score": 0.0, "update": 1.5}


def test_a_reference_that_is_no_case_is_refused():
    with pytest.raises(BenchmarkError, match="its reference 'y' is none of x"):
        cost.measure([cost.Case("x", "none.yaml", (), "y")], rounds=1, threads=1)


def test_the_listed_cases_can_be_read():
    labels = [case.label for case in cost.CASES]
    assert len(set(labels)) == len(labels)
    for case in cost.CASES:
        assert case.reference in labels
        load_config(case.config, case.overrides)
