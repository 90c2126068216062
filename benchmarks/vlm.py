"""The path of models that write: does every method learn, what does a rising IoU do for boxes, and how fast is it?

    python -m benchmarks.vlm presets     trains the config of every method in configs/vlm
    python -m benchmarks.vlm boxes       boxes whose IoU is asked for in stages, or at .99 from the start
    python -m benchmarks.vlm speed       tokens a second, beside transformers' own `generate`

Each writes its part of docs/benchmarks/vlm.json, its picture, and the page vlm.md anew. What is finished is not trained
again; a run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import learning
from benchmarks.results import BenchmarkError, Card, Value, finished, read_card
from flowrl.config import load_config
from flowrl.evaluate import mean_and_error, paired_gain
from flowrl.log import write_atomic

BOXES = ("box_dynamic", "box_fixed")
"""Equal budgets; the schedule of the IoU, and its end from the start."""
QUESTIONS = (24, 4, 2)
"""An iteration: as the configs have it, and fewer, so that a perfect box is a rare thing."""
IOUS = (0.85, 0.95, 0.99)
"""Above which overlaps the shares of boxes are counted: the stages of V-Triune's schedule (arXiv:2505.18129)."""
LEARNT = 10.0
"""Percentage points of gain under which a method is marked: it has hardly learnt."""
EARLY = 0.1
"""The first share of a run, in which a method must find something to learn from."""


# ------------------------------------------------------------------------------------------------ training


def presets(configs: Path) -> dict[str, Path]:
    """{method: its config}: of a folder's configs, those that have the name of their method."""
    found = {path.stem: path for path in sorted(configs.glob("*.yaml"))}
    return {name: path for name, path in found.items() if load_config(path).algorithm.name == name}


def job_of(
    name: str, path: Path, output: Path, *, seed: int, iterations: int | None, jobs: int, questions: int | None = None
) -> learning.Job:
    """What is to be done for a config: as many iterations and questions an iteration as it says itself, or as these.

    The budget of its card is in answers. BenchmarkError where the folder holds another run.
    """
    changes = [] if questions is None else [f"data.prompts_per_iteration={questions}"]
    config = load_config(path, [f"seed={seed}", *changes])
    length = iterations or config.iterations
    answers = length * config.data.prompts_per_iteration * config.data.samples_per_prompt
    card = Card(
        config=path.as_posix(), budget=answers, predicted=answers, iterations=length, seed=seed,
        threads=learning.THREADS, jobs=jobs, changes=changes,
    )  # fmt: skip
    folder = output / "-".join(map(str, [name, seed] if questions is None else [name, questions, seed]))
    action = learning.decide(folder, card, load_config(path, learning.overrides(card, folder)))
    return learning.Job(name=folder.name, folder=folder, card=card, action=action)


def train(
    wanted: Mapping[str, Path], output: Path, *, seeds: Sequence[int], iterations: int | None, jobs: int,
    questions: Sequence[int | None] = (None,),
) -> tuple[list[Path], dict[str, str]]:  # fmt: skip
    """Brings every config to its end, once a seed and number of questions; the folders of those that got there.

    And why others did not, by their names.
    """
    planned, failed = [], {}
    for asked, seed, (name, path) in itertools.product(questions, seeds, wanted.items()):
        try:
            planned.append(job_of(name, path, output, seed=seed, iterations=iterations, jobs=jobs, questions=asked))
        except (ValueError, OSError) as error:
            failed[f"{name}-{seed}"] = str(error)
    failed |= learning.train_all([job for job in planned if job.action != "skip"], jobs)
    return [job.folder for job in planned if finished(job.folder, job.card.iterations)], failed


# ------------------------------------------------------------------------------------------------ what a run left


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run, by the answers that it had written when it was evaluated; shares in percent."""

    name: str
    seed: int
    lr: float
    iterations: int
    updates: int
    answers: list[int]
    tokens: int
    accuracy: list[Value]
    kinds: dict[str, tuple[float, float]]
    """Accuracy of each kind of question before and after."""
    gain: Value
    """Points after - before, paired by question and draws."""


def read_curve(folder: Path) -> Curve:
    """A finished run's accuracy on held-out questions."""
    card, config, evaluations = read_card(folder), load_config(folder / "config.yaml"), _rows(folder, "evaluations")
    asked, spent, tokens = config.data.prompts_per_iteration * config.data.samples_per_prompt, [0], 0.0
    for row in _rows(folder, "metrics"):
        written = round(asked * row.get("refill_tries", 1.0))
        spent.append(spent[-1] + written)
        tokens += written * row["text/tokens/all"]
    before, after = (_samples(folder, row["iteration"])["accuracy"] for row in (evaluations[0], evaluations[-1]))
    accuracy = [row["scores"]["accuracy"] for row in evaluations]
    return Curve(
        name=Path(card.config).stem, seed=card.seed, lr=config.optimizer.lr, iterations=card.iterations,
        updates=card.iterations * config.optimizer.updates_per_iteration,
        answers=[spent[row["iteration"]] for row in evaluations], tokens=round(tokens),
        accuracy=[Value(100 * entry["mean"], 100 * entry["se"]) for entry in accuracy],
        kinds={
            kind: (100 * first["mean"], 100 * accuracy[-1]["by_category"][kind]["mean"])
            for kind, first in accuracy[0].get("by_category", {}).items()
        },
        gain=_percent(paired_gain(before, after)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BoxRun:
    """A run on boxes, evaluation by evaluation; overlaps and shares in percent."""

    name: str
    seed: int
    questions: int
    answers: int
    """In an iteration."""
    iterations: list[int]
    iou: list[Value]
    shares: list[list[float]]
    """Of the boxes that overlap by each of IOUS at least."""
    gain: Value
    """Mean IoU after - before, paired by question and draws."""
    early: float
    """Groups of answers in the first tenth of the run whose rewards differ: what there was to learn from."""
    whole: float
    """The same over the run."""


def read_boxes(folder: Path) -> BoxRun:
    """A finished run's overlaps on held-out questions."""
    card, data = read_card(folder), load_config(folder / "config.yaml").data
    at = [row["iteration"] for row in _rows(folder, "evaluations")]
    overlaps = [_samples(folder, iteration)["box.iou"] for iteration in at]
    differ = [100 * (1 - row["zero_std_frac"]) for row in _rows(folder, "metrics")]
    return BoxRun(
        name=Path(card.config).stem, seed=card.seed, questions=data.prompts_per_iteration,
        answers=data.prompts_per_iteration * data.samples_per_prompt, iterations=at,
        iou=[_percent(mean_and_error(x)) for x in overlaps],
        shares=[[100 * (x >= bar).float().mean().item() for bar in IOUS] for x in overlaps],
        gain=_percent(paired_gain(overlaps[0], overlaps[-1])),
        early=statistics.mean(differ[: math.ceil(EARLY * len(differ))]), whole=statistics.mean(differ),
    )  # fmt: skip


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _samples(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Scores of an evaluation's samples by name; NaN = no verdict."""
    told = json.loads((folder / "samples" / f"{iteration:06d}.json").read_text(encoding="utf-8"))["scores"]
    return {name: torch.tensor([math.nan if v is None else v for v in values]) for name, values in told.items()}


def _percent(value: tuple[float | None, float | None]) -> Value:
    return Value(*(None if part is None else 100 * part for part in value))


# ------------------------------------------------------------------------------------------------ speed


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over several repetitions on this machine; `generate` is transformers', with num_return_sequences."""

    questions: int
    members: int
    limit: int
    threads: int
    prompt_tokens: int
    """Of all questions, each once."""
    tokens: int
    """Of all answers."""
    sampling: float
    """Tokens a second that are written, with their log-probs."""
    generate: float
    """Those of `generate`, which keeps no log-probs."""
    against_generate: float
    """Time of `generate` for a token over ours."""
    reading_against_generate: float
    """Time until the first token of every answer: that of `generate` over ours."""
    updating: float
    """Tokens of answers a second through forward and backward pass."""
    update_over_sampling: float
    """Time of that over the time of writing the answers."""


def measure_speed(path: str = "shapes_vlm", *, questions: int = 24, members: int = 8, repeats: int = 7) -> Speed:
    """Sampling beside `generate` in turns, and the update's forward and backward pass; one thread."""
    from flowrl.types import Tokens
    from flowrl.vlm.collate import collate
    from flowrl.vlm.data import load_questions, messages, pictures
    from flowrl.vlm.generate import begin
    from flowrl.vlm.model import ImageTextModel
    from flowrl.vlm.policy import TextPolicy

    limit = 48
    torch.set_num_threads(learning.THREADS)
    policy = TextPolicy(ImageTextModel.load(path), temperature=1.0)
    model, network = policy.model, policy.model.trainable
    prompts = load_questions("shapes_questions", "train")[:questions]
    inputs = [policy.prepare(messages(prompt, pictures(prompt))) for prompt in prompts]
    index = [p for p in range(questions) for _ in range(members)]
    none = torch.zeros(questions, 0, dtype=torch.int64)

    def ours(longest: int) -> Tokens:
        rows = [begin(inputs[p], (0, 0, i)) for i, p in enumerate(index)]
        return policy.tokens(policy.write(rows, limit=longest), index)

    def theirs(longest: int) -> int:
        batch = collate(inputs, none, none.bool(), model.pad_id)
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            out = network.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=members,
                max_new_tokens=longest, eos_token_id=model.ends, pad_token_id=model.pad_id,
                suppress_tokens=model.banned.tolist(),
            )  # fmt: skip
        ended = torch.isin(out[:, length:], torch.tensor(model.ends)).long()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first token that ends, and that one

    def update(tokens: Tokens) -> None:
        for part in torch.arange(len(tokens)).chunk(2):
            torch.autograd.backward(policy.evaluate(tokens.select(part)).logprob.sum())
        network.zero_grad()

    tokens = ours(limit)
    count = int(tokens.lengths.sum())
    for warm in (lambda: theirs(limit), lambda: update(tokens)):
        warm()
    whole, first, sampling, generated, updating = [], [], [], [], []
    for _ in range(repeats):
        mine, (others, written) = _seconds(lambda: ours(limit))[0], _seconds(lambda: theirs(limit))
        sampling.append(count / mine)
        generated.append(written / others)
        whole.append(sampling[-1] / generated[-1])
        first.append(_seconds(lambda: theirs(1))[0] / _seconds(lambda: ours(1))[0])
        updating.append(count / _seconds(lambda: update(tokens))[0])
    return Speed(
        questions=questions, members=members, limit=limit, threads=learning.THREADS,
        prompt_tokens=sum(len(one.ids) for one in inputs), tokens=count, sampling=statistics.median(sampling),
        generate=statistics.median(generated), against_generate=statistics.median(whole),
        reading_against_generate=statistics.median(first), updating=statistics.median(updating),
        update_over_sampling=statistics.median(a / b for a, b in zip(sampling, updating, strict=True)),
    )  # fmt: skip


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# ------------------------------------------------------------------------------------------------ the page


def write_part(to: Path, name: str, part: Any) -> list[Path]:
    """Put a part into vlm.json, and write the page from all parts; the files."""
    to.mkdir(parents=True, exist_ok=True)
    numbers, page = to / "vlm.json", to / "vlm.md"
    parts = json.loads(numbers.read_text(encoding="utf-8")) if numbers.is_file() else {}
    parts[name] = part
    write_atomic(numbers, json.dumps(parts, indent=1, allow_nan=False, sort_keys=True) + "\n")
    write_atomic(page, render(parts))
    return [numbers, page]


def render(parts: Mapping[str, Any]) -> str:
    """The page as Markdown; parts that nobody has made yet are left out."""
    lines = [
        "# Models that write",
        "",
        "The built-in model that sees, `shapes_vlm`, on held-out questions of the built-in world: one answer to each,",
        "sampled as in training, with the same draws at every evaluation. ± is one standard error of the paired",
        "difference: it covers the luck of questions and draws, not that of the training seed.",
        "",
    ]
    sections: dict[str, Callable[[Any], list[str]]] = {
        "presets": _presets_section, "boxes": _boxes_section, "speed": _speed_section,
    }  # fmt: skip
    for name, section in sections.items():
        if name in parts:
            lines += section(parts[name])
    return "\n".join(lines)


def _presets_section(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds, seeds = list(curves[0]["kinds"]), sorted({curve["seed"] for curve in curves})
    several, names = len(seeds) > 1, dict.fromkeys(curve["name"] for curve in curves)
    of_method = [[curve for curve in curves if curve["name"] == name] for name in names]
    of_method.sort(key=lambda runs: -_gain(runs))
    base = [
        "base model", "0", "", "", f"{curves[0]['accuracy'][0][0]:.1f}", "",
        *(f"{curves[0]['kinds'][kind][0]:.0f}" for kind in kinds),
    ]  # fmt: skip
    lines = [
        "## Every method",
        "",
        "The same base model, questions, number of answers that count and number of updates; lr as in the method's",
        "config. The columns at the right are the accuracy for each kind of question at the end.",
        *(["Mean over the seeds, and the range of the gain over them."] if several else []),
        "",
        _line(["method", "answers", "tokens", "lr", "accuracy %", _GAIN[several], *kinds]),
        _line(["---", *["---:"] * (5 + len(kinds))]),
        _line(base),
        *(_line(_preset_cells(runs, kinds)) for runs in of_method),
        "",
    ]
    if any(_gain(runs) < LEARNT for runs in of_method):
        lines += [f"† gained less than {LEARNT:g} points.", ""]
    if len({curve["answers"][-1] for curve in curves}) > 1:
        lines += ["Methods with more answers than others draw groups without a difference anew.", ""]
    first = curves[0]["accuracy"][0]
    if others := {curve["name"]: None for curve in curves if curve["accuracy"][0] != first}:
        lines += [f"Note: not the same score of the base model as {curves[0]['name']}: {', '.join(others)}.", ""]
    if len({curve["lr"] for curve in curves}) > 1:
        lines += ["Note: not the same lr in all of them; see the column.", ""]
    if fewer := [runs[0]["name"] for runs in of_method if len(runs) < len(seeds)]:
        lines += [f"Note: not all seeds of {', '.join(fewer)}.", ""]
    updates = sorted({curve["updates"] for curve in curves})
    lines += [
        "![Accuracy over answers](vlm_presets.png)",
        "",
        f"{_SEEDS[several]} {_listed(seeds)}, {_listed(updates)} updates, one thread. {_ORDER[several]}",
        "",
        *_made_by("presets", curves[0]["iterations"], seeds),
    ]
    return lines


_SEEDS = ("Seed", "Seeds")
_GAIN = ("gain ± SE", "gain (range)")
_ORDER = (
    "One seed does not order two methods that lie\nwithin a few points of each other.",
    "Two methods whose ranges overlap are\nnot ordered by this.",
)
"""With one seed, and with several."""


def _gain(runs: Sequence[Mapping[str, Any]]) -> float:
    return statistics.mean(run["gain"][0] or 0.0 for run in runs)


def _preset_cells(runs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    """Of one method, over its seeds."""

    def mean(of: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.mean(map(of, runs))

    (gain, error), name = runs[0]["gain"], runs[0]["name"]
    first, last = (mean(lambda run, at=at: run["accuracy"][at][0]) for at in (0, -1))
    return [
        name + (" †" if _gain(runs) < LEARNT else ""), f"{mean(lambda run: run['answers'][-1]):,.0f}",
        f"{mean(lambda run: run['tokens']):,.0f}", f"{runs[0]['lr']:g}", f"{first:.1f} → {last:.1f}",
        f"{gain:+.1f} ± {error:.1f}" if len(runs) == 1 else _mean_of([run["gain"][0] for run in runs]),
        *(f"{mean(lambda run, kind=kind: run['kinds'][kind][1]):.0f}" for kind in kinds),
    ]  # fmt: skip


def _boxes_section(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = [f"share ≥ {bar:.2f}".replace("0.", ".") for bar in IOUS]
    seeds = sorted({run["seed"] for run in runs})
    kinds = sorted({(-run["answers"], run["name"]) for run in runs})
    of_kind = [[run for run in runs if (-run["answers"], run["name"]) == kind] for kind in kinds]
    return [
        "## Boxes: a rising IoU, or .99 from the start",
        "",
        "Both are paid 1 for a box that overlaps enough, 0 for any other; they differ in nothing but what is enough.",
        "Before training "
        f"{runs[0]['shares'][0][-1]:.1f} % of the boxes reach .99 already. With many answers an iteration some of them",
        "always do, and that is enough to learn from; with few of them most groups of a fixed .99 are all wrong.",
        "",
        f"Mean over the seeds {_listed(seeds)}, and their range, in percentage points: mean IoU, and shares of boxes",
        "above a bar. Groups that differ are those whose answers did not all get the same reward, which is all that",
        "there is to learn from.",
        "",
        _line(["answers an iteration", "config", "mean IoU", *shares, "groups that differ, first tenth", "whole run"]),
        _line(["---:", "---", *["---:"] * (3 + len(shares))]),
        *(_line(_box_cells(found)) for found in of_kind),
        "",
        "![Overlaps over iterations](vlm_boxes.png)",
        "",
        *_made_by(
            "boxes", runs[0]["iterations"][-1], seeds,
            questions=sorted({run["questions"] for run in runs}, reverse=True),
        ),
    ]  # fmt: skip


def _box_cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one config with so many answers, over its seeds."""
    return [
        str(runs[0]["answers"]), runs[0]["name"], _mean_of([run["gain"][0] for run in runs]),
        *(_mean_of([run["shares"][-1][bar] - run["shares"][0][bar] for run in runs]) for bar in range(len(IOUS))),
        f"{statistics.mean(run['early'] for run in runs):.0f} %",
        f"{statistics.mean(run['whole'] for run in runs):.0f} %",
    ]  # fmt: skip


def _mean_of(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})"


def _speed_section(speed: Mapping[str, Any]) -> list[str]:
    members, limit = speed["members"], speed["limit"]
    return [
        "## Speed",
        "",
        f"{speed['questions']} questions with {members} answers of up to {limit} tokens each, one thread of a CPU;",
        "medians. `generate` is transformers' with `num_return_sequences`, at the same temperature and with the same",
        "tokens banned, and without log-probs, which ours keeps.",
        "",
        _line(["what", "value"]),
        _line(["---", "---:"]),
        _line(["sampling against `generate`, tokens a second", f"{speed['against_generate']:.2f} x"]),
        _line(["until every answer's first token, against `generate`", f"{speed['reading_against_generate']:.2f} x"]),
        _line([f"prompt tokens read: each question once, not {members} times", f"1 / {members}"]),
        _line(["prompt tokens / answer tokens", f"{speed['prompt_tokens']:,} / {speed['tokens']:,}"]),
        _line(
            ["forward and backward pass of an update, time beside sampling", f"{speed['update_over_sampling']:.2f} x"]
        ),
        "",
        "```bash",
        "python -m benchmarks.vlm speed",
        "```",
        "",
    ]


def _made_by(command: str, iterations: int, seeds: Iterable[int], **lists: Iterable[int]) -> list[str]:
    given = {"iterations": [iterations], "seed": seeds, **lists}
    options = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in given.items())
    return ["```bash", f"python -m benchmarks.vlm {command} {options}", "```", ""]


def _listed(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------------ pictures


def draw_presets(curves: Sequence[Curve], path: Path) -> None:
    """Accuracy over answers, a line a method: the mean over its seeds, with bars from the lowest to the highest.

    Where there is one seed, the bars are a standard error long on both sides.
    """
    from benchmarks.plot import COLORS, STYLES

    by_method = [[curve for curve in curves if curve.name == name] for name in dict.fromkeys(c.name for c in curves)]
    by_method.sort(key=lambda runs: -statistics.mean(run.gain.mean or 0.0 for run in runs))
    sheet, (axis,) = _sheet(1)
    for place, runs in enumerate(by_method):
        line, marker = STYLES[place // len(COLORS) % len(STYLES)]
        points = [[value.mean or 0.0 for value in each] for each in zip(*(run.accuracy for run in runs), strict=True)]
        means = [statistics.mean(each) for each in points]
        low, high = ([abs(mean - end(each)) for mean, each in zip(means, points, strict=True)] for end in (min, max))
        errors = [value.error for value in runs[0].accuracy]
        axis.errorbar(
            [statistics.mean(each) for each in zip(*(run.answers for run in runs), strict=True)], means,
            yerr=errors if len(runs) == 1 else (low, high), label=runs[0].name, color=COLORS[place % len(COLORS)],
            linestyle=line, marker=marker, markersize=4, linewidth=1.4, elinewidth=0.6, capsize=2,
        )  # fmt: skip
    axis.set(xlabel="answers written", ylabel="held-out accuracy, %")
    _finish(sheet, path)


def draw_boxes(runs: Sequence[BoxRun], path: Path) -> None:
    """Mean IoU, and the share of boxes above each of IOUS, over iterations.

    A line a seed: its colour is of the config, its style of the number of answers.
    """
    from benchmarks.plot import COLORS, STYLES

    sheet, (left, *right) = _sheet(1 + len(IOUS))
    colors = dict(zip(dict.fromkeys(run.name for run in runs), COLORS, strict=False))
    styles = dict(zip(sorted({run.answers for run in runs}, reverse=True), STYLES, strict=False))
    labelled: set[str] = set()
    for run in runs:
        line, marker = styles[run.answers]
        look = {"color": colors[run.name], "linestyle": line, "marker": marker, "markersize": 3, "linewidth": 1.2}
        name = f"{run.name}, {run.answers} answers"
        left.plot(run.iterations, [value.mean for value in run.iou], **look, label=None if name in labelled else name)
        labelled.add(name)
        for place, axis in enumerate(right):
            axis.plot(run.iterations, [shares[place] for shares in run.shares], **look)
    left.set(xlabel="iteration", ylabel="mean IoU, %")
    for bar, axis in zip(IOUS, right, strict=True):
        axis.set(xlabel="iteration", ylabel=f"boxes with an IoU of {bar:g} or more, %")
    _finish(sheet, path)


def _sheet(panels: int) -> tuple[Any, Sequence[Any]]:
    # matplotlib belongs to the extra `notebooks`; training does without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9, 5.5) if panels == 1 else (3.3 * panels, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    return sheet, sheet.subplots(1, panels, squeeze=False)[0]


def _finish(sheet: Any, path: Path) -> None:
    for axis in sheet.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = sheet.axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, metadata={"Software": None})


# ------------------------------------------------------------------------------------------------ commands


def run_presets(options: argparse.Namespace) -> dict[str, str]:
    """Train every method, write the table and the picture; why some of them are missing."""
    wanted = presets(options.configs)
    if unknown := [name for name in options.only if name not in wanted]:
        raise BenchmarkError(f"--only {' '.join(unknown)}: {options.configs} has {', '.join(wanted)}.")
    chosen = {name: path for name, path in wanted.items() if not options.only or name in options.only}
    folders, failed = train(
        chosen, options.output, seeds=options.seed, iterations=options.iterations, jobs=options.jobs
    )  # fmt: skip
    curves = [read_curve(folder) for folder in folders]
    if curves:
        write_part(options.to, "presets", [asdict(curve) for curve in curves])
        draw_presets(curves, options.to / "vlm_presets.png")
    return failed


def run_boxes(options: argparse.Namespace) -> dict[str, str]:
    """Train on boxes in both ways, write the table and the picture; why some of them are missing."""
    wanted = {name: options.configs / f"{name}.yaml" for name in BOXES}
    folders, failed = train(
        wanted, options.output, seeds=options.seed, iterations=options.iterations, jobs=options.jobs,
        questions=options.questions,
    )  # fmt: skip
    runs = [read_boxes(folder) for folder in folders]
    if runs:
        write_part(options.to, "boxes", [asdict(run) for run in runs])
        draw_boxes(runs, options.to / "vlm_boxes.png")
    return failed


def run_speed(options: argparse.Namespace) -> dict[str, str]:
    """Measure, print, and write the part."""
    speed = asdict(measure_speed())
    for name, value in speed.items():
        print(f"{name:26} {value:,.2f}" if isinstance(value, float) else f"{name:26} {value}")
    write_part(options.to, "speed", speed)
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a run failed, 2 where nothing could be done, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        failed: dict[str, str] = options.run(options)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vlm", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("presets", help="train the config of every method; resumable")
    each.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these methods; the table has no others")
    each.set_defaults(run=run_presets)
    boxes = commands.add_parser("boxes", help="a rising IoU against .99 from the start; resumable")
    boxes.add_argument("--questions", type=int, nargs="+", default=QUESTIONS, help="an iteration, in turn")
    boxes.set_defaults(run=run_boxes)
    for command in (each, boxes):
        command.add_argument("--configs", type=Path, default=Path("configs/vlm"), help="folder of the configs")
        command.add_argument("--output", type=Path, default=Path("runs/vlm"), help="folder of the run folders")
        command.add_argument("--seed", type=int, nargs="+", default=[0], help="training seeds")
        command.add_argument("--iterations", type=int, help="of every run; default: what its config says")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    speed = commands.add_parser("speed", help="tokens a second, beside transformers' generate")
    speed.set_defaults(run=run_speed)
    for command in (each, boxes, speed):
        command.add_argument("--to", type=Path, default=Path("docs/benchmarks"), help="folder of what is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
