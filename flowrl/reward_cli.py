"""`flowrl reward ...`: what rewards there are, what they say, and which of them to trust."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

reward_app = typer.Typer(no_args_is_help=True, help="Rewards: what there is, what they say, which to trust.")
console = Console()

Name = Annotated[str, typer.Argument(help="A reward: a name, ./file.py:fn, a URL, or '{use: ocr, mode: contain}'.")]
Names = Annotated[list[str], typer.Argument(help="Rewards: names, ./file.py:fn, URLs, or '{use: ocr, mode: contain}'.")]
Device = Annotated[str, typer.Option(help="Where they run: auto, cpu, cuda:1.")]
Output = Annotated[Path | None, typer.Option(help="A .json or .md file for the report.")]


@reward_app.command("list")
def reward_list(
    runnable: Annotated[bool, typer.Option("--runnable", help="Only what can run here and now.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Every reward: range, licence, weights, size, what it depends on, and whether it can run here."""
    from rewards.catalogue import catalogue

    found = [each for each in catalogue() if each.runs or not runnable]
    if as_json:
        print(json.dumps([_plain(each) for each in found], indent=2))
        return
    for each in found:
        grad = ", differentiable" if each.traits.differentiable else ""
        _say(each.name, f"{_judged(each)}, range {each.range}{grad}; {each.card.licence}", head=True)
        if each.card.weights:
            _say("weights", f"{', '.join(w.source for w in each.card.weights)}; {each.size} in memory")
        if each.card.packages or each.card.programs:
            _say("depends on", ", ".join([*each.card.packages, *each.card.programs]))
        _say("runs here", "yes" if each.runs else "no")
        for _, mend in each.obstacles:
            _say("", mend)
    console.print(f"{sum(each.runs for each in found)} of {len(found)} can run here; more: flowrl reward info NAME")


@reward_app.command("info")
def reward_info(name: Name) -> None:
    """All about one reward: options, weights, licence, published figures, and the commands that make it run."""
    from rewards.catalogue import describe, options_of
    from rewards.published import published

    entry = _entry(name)
    use = entry.pop("use")
    each = describe(use, _options(entry))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [("reward", each.name), ("what", each.summary), ("source", each.card.source), ("judges", _judged(each)),
            ("range", each.range), ("differentiable", "yes" if each.traits.differentiable else "no"),
            ("needs in meta", ", ".join(each.traits.needs) or "–"), ("licence", each.card.licence)]  # fmt: skip
    rows += [("weights", f"{w.source}: {', '.join(w.names) or 'all of it'}") for w in each.card.weights]
    rows += [("memory", each.size), ("note", each.card.note or "–")]
    rows += [("option", f"{option} = {default}") for option, default in options_of(use)]
    rows += [("published", f"{f.value:g} % {f.metric}, {f.benchmark} {f.split}, ties: {f.ties} ({f.source})")
             for f in published(use)]  # fmt: skip
    rows += [("runs here", "yes")] if each.runs else [("missing", f"{what}   mend: {m}") for what, m in each.obstacles]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


@reward_app.command("score")
def reward_score(
    name: Name,
    media: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    prompt: Annotated[str, typer.Option(help="What they were made for; a folder's metadata.jsonl goes first.")] = "",
    meta: Annotated[str, typer.Option(help='Metadata of the prompt as JSON, such as \'{"text": "open"}\'.')] = "{}",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Score pictures with one reward: the number, its parts, and what it has to say."""
    from rewards import RewardHub
    from rewards.folder import read_media

    entry = _entry(name)
    samples, paths = read_media(media, prompt, _json(meta, "--meta"))
    with RewardHub(entry, device=device) as hub:
        hub.warmup([])
        result = hub(samples)
        (key,) = result.scores
    rows = [
        {"file": str(path), "score": _number(result.scores[key][i])}
        | {part: _number(values[i]) for part, values in result.parts[key].items()}
        | ({"info": result.info[i][key]} if result.info[i][key] else {})
        for i, path in enumerate(paths)
    ]
    if as_json:
        for row in rows:
            print(json.dumps(row, default=str))
        return
    table = Table("file", key, *result.parts[key], "info", box=None)
    for row in rows:
        numbers = [row["score"], *(row[part] for part in result.parts[key])]
        info = ", ".join(f"{k}: {v}" for k, v in row.get("info", {}).items())
        table.add_row(
            Text(row["file"], overflow="fold"), *("–" if n is None else f"{n:.4g}" for n in numbers), Text(info)
        )
    console.print(table)
    if result.total.isnan().all():
        raise SystemExit(1)


@reward_app.command("eval")
def reward_eval(
    names: Names,
    data: Annotated[Path, typer.Option(help="Preferences: a .jsonl, a folder, or a local copy of a benchmark.")],
    layout: Annotated[
        str, typer.Option("--format", help="auto, native, store, pickapic, hpdv2, imagereward, genai, videogen, mmrb2.")
    ] = "auto",
    images: Annotated[Path | None, typer.Option(help="Folder of the media, if it is not the usual one.")] = None,
    fps: Annotated[float | None, typer.Option(help="Most frames a second kept of a video file.")] = None,
    dev: Annotated[float, typer.Option(help="Share of the prompts that thresholds are fitted on.")] = 0.2,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Media in memory at a time.", min=1)] = 16,
    seed: int = 0,
    output: Output = None,
) -> None:
    """How often do rewards agree with people? Accuracies with 95 % intervals, calibration, rank correlation, slices."""
    from rewards.evaluate import evaluate
    from rewards.preferences import read_preferences

    _check_output(output)
    preferences = read_preferences(data, layout, images=images, fps=fps)
    entries = [_entry(name) for name in names]
    report = evaluate(entries, preferences, device=device, batch_size=batch_size, seed=seed, dev=dev)
    _report(report, output)


@reward_app.command("probe")
def reward_probe(
    names: Names,
    data: Annotated[Path, typer.Option(help="Pictures with prompts: a .jsonl, a folder, or preferences.")],
    probes: Annotated[list[str] | None, typer.Option("--probe", help="Only these probes; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.", min=1)] = None,
    thumbnails: Annotated[Path | None, typer.Option(help="Folder for pictures of what each probe does.")] = None,
    device: Device = "auto",
    seed: int = 0,
    output: Output = None,
) -> None:
    """Try to fool rewards: degrade, tile, flatter and swap, and see which scores rise that should not."""
    from rewards.probes import probe

    _check_output(output)
    samples = _samples(data, limit)
    report = probe([_entry(name) for name in names], samples, names=probes, device=device, seed=seed)
    _report(report, output)
    if thumbnails is not None:
        report.thumbnails(thumbnails)
        console.print(f"wrote {thumbnails}")


@reward_app.command("check-grad")
def reward_check_grad(
    name: Name,
    data: Annotated[Path | None, typer.Option(help="Pictures with prompts; default: made up.")] = None,
    device: Device = "auto",
) -> None:
    """Is a reward's gradient one? Finite, not zero, and along finite differences; also through saturated pixels."""
    from rewards.check_grad import check_grad

    samples = None if data is None else _samples(data, 4)
    report = check_grad(_entry(name), samples, device=device)
    print(report.to_markdown())
    if not report.ok:
        raise SystemExit(1)


@reward_app.command("serve")
def reward_serve(
    names: Names,
    host: Annotated[str, typer.Option(help="Address to listen on; other than this machine's own it needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8100,
    token: Annotated[str | None, typer.Option(help="env:NAME of the variable that holds the token.")] = None,
    device: Device = "auto",
) -> None:
    """Serve rewards over HTTP to runs elsewhere: `use: http://HOST:PORT/NAME`. JSON only."""
    from rewards.serve import serve
    from rewards.types import RewardError

    if token is not None and not token.startswith("env:"):
        raise RewardError("--token takes env:NAME: what stands on a command line, every user of this machine can read")
    serve([_entry(name) for name in names], host=host, port=port, token=token, device=device)


@reward_app.command("table")
def reward_table(
    benchmark: Annotated[str | None, typer.Option(help="Only this benchmark.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Published accuracies of reward models, each with its split, its rule for ties and its source."""
    from rewards.published import published
    from rewards.types import RewardError

    figures = published(model=model, benchmark=benchmark)
    if not figures:
        known = published()
        there = ", ".join(dict.fromkeys(f.benchmark for f in known)), ", ".join(dict.fromkeys(f.model for f in known))
        raise RewardError(f"no such figure; there are the benchmarks {there[0]}, and the models {there[1]}")
    if as_json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    for f in figures:
        _say(f.model, f"{f.value:g}  {f.benchmark} {f.split}: {f.metric}; {f.ties}", head=True)
        _say("source", f"{f.source} {f.note}".rstrip())


# ------------------------------------------------------------------------------------------------ parts of it


def _entry(text: str) -> dict[str, Any]:
    """A reward as the command line names it: what `use` says, or a whole entry in YAML's braces."""
    from rewards.types import RewardError

    if not text.lstrip().startswith("{"):
        return {"use": text}
    import yaml

    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RewardError(f"the reward {text!r} is no YAML: {error}. Write '{{use: ocr, mode: contain}}'.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
        raise RewardError(f"the reward {text!r} has no `use`. Write '{{use: ocr, mode: contain}}'.")
    return entry


def _samples(data: Path, limit: int | None) -> list[Any]:
    """Pictures with prompts: a folder or list of them, or what a set of preferences compares."""
    from rewards.folder import lists_files, read_media
    from rewards.preferences import PAIRS, read_preferences

    if (data / PAIRS).is_file() or (data.is_file() and not lists_files(data)):
        return read_preferences(data).samples(limit)
    return read_media([data], "", {}, limit=limit)[0]


def _options(entry: dict[str, Any]) -> dict[str, Any]:
    from rewards.entries import KEYS

    return {key: value for key, value in entry.items() if key not in KEYS}


def _json(text: str, option: str) -> dict[str, Any]:
    from rewards.types import RewardError

    try:
        found = json.loads(text)
    except ValueError as error:
        raise RewardError(f'{option} is no JSON: {error}. Write for example \'{{"text": "open"}}\'.') from error
    if not isinstance(found, dict):
        raise RewardError(f'{option} is {type(found).__name__}; expected an object such as \'{{"text": "open"}}\'.')
    return found


def _report(report: Any, output: Path | None) -> None:
    """Print a report, and write it where asked."""
    print(report.to_markdown())
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report.to_markdown() if output.suffix == ".md" else report.to_json(), encoding="utf-8")
    console.print(f"wrote {output}")


def _check_output(output: Path | None) -> None:
    """Before anything is scored."""
    from rewards.types import RewardError

    if output is not None and output.suffix not in (".json", ".md"):
        raise RewardError(f"--output {output}: the report is written as .json or .md; give a name that ends so")


def _say(key: str, text: str, head: bool = False) -> None:
    """A line of the list, which is not wrapped, so that a command in it can be copied."""
    line = Text(key, style="bold") if head else Text(f"    {key:11}", style="dim")
    line.append(f"  {text}" if head else text, style="")
    console.print(line, soft_wrap=True)


def _judged(each: Any) -> str:
    media = "+".join(sorted(each.traits.media))
    return f"{media} (groups)" if each.traits.scope == "group" else media


def _plain(each: Any) -> dict[str, Any]:
    return {
        "name": each.name, "summary": each.summary, "media": sorted(each.traits.media), "scope": each.traits.scope,
        "range": each.traits.range, "differentiable": each.traits.differentiable, "needs": each.traits.needs,
        "licence": each.card.licence, "source": each.card.source, "memory_gb": each.card.memory_gb,
        "weights": [{"source": w.source, "files": w.names} for w in each.card.weights],
        "runs": each.runs, "missing": [{"what": what, "mend": mend} for what, mend in each.obstacles],
    }  # fmt: skip


def _number(value: Any) -> float | None:
    number = float(value)
    return None if number != number else number
