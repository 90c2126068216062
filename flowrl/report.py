"""What a run leaves for people: picture grids, one self-contained `report.html`, and the before/after table."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageSequence
from torch import Tensor

from flowrl.evaluate import Evaluation, paired_gain
from flowrl.log import EVALUATIONS
from flowrl.video import save_video

Row = tuple[str, float | None, float | None, float | None, float | None]
"""name, before, after, gain, standard error of the gain."""


# ------------------------------------------------------------------------------------------------ pictures


def save_grid(evaluation: Evaluation, path: Path, count: int, cell: int = 144, fps: float | None = None) -> None:
    """A PNG with `count` samples, spread over the prompts, each above its prompt.

    Of videos it moves (APNG, which browsers play), and lies beside an MP4 of the same where PyAV is installed.
    """
    if evaluation.media is None or count == 0:
        return
    sheets = [_grid(evaluation, frame, count, cell) for frame in evaluation.media.unbind(1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_frames(sheets, path, fps)
    if len(sheets) > 1 and importlib.util.find_spec("av"):
        save_video(torch.stack([_to_tensor(sheet) for sheet in sheets]), path.with_suffix(".mp4"), fps)


def _save_frames(frames: Sequence[Image.Image], path: Path, fps: float | None) -> None:
    if len(frames) == 1:
        frames[0].save(path, optimize=True)
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / (fps or 8.0)), loop=0)


def _grid(evaluation: Evaluation, pictures: Tensor, count: int, cell: int) -> Image.Image:
    chosen = spread(len(evaluation.prompts), count)
    return sheet_of([to_image(pictures[i]) for i in chosen], [evaluation.prompts[i].text for i in chosen], cell)


def sheet_of(pictures: Sequence[Image.Image], captions: Sequence[str], cell: int = 144, lines: int = 2) -> Image.Image:
    """Pictures in rows, each above so many lines of its caption."""
    columns = max(1, math.ceil(math.sqrt(len(pictures) * 1.6)))
    rows = math.ceil(len(pictures) / columns)
    caption = 6 + 12 * lines
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + caption + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        x, y = 8 + place % columns * (cell + 8), 8 + place // columns * (cell + caption + 8)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        for line, part in enumerate(_wrapped(text, 24)[:lines]):
            draw.text((x, y + cell + 2 + 12 * line), part, fill=(70, 70, 70))
    return sheet


def save_pair(before: Path, after: Path, path: Path) -> None:
    """Two grids of the same prompts side by side, with their titles."""
    with Image.open(before) as left, Image.open(after) as right:
        pairs = zip(ImageSequence.Iterator(left), ImageSequence.Iterator(right), strict=False)
        frames = [_side_by_side(a.convert("RGB"), b.convert("RGB")) for a, b in pairs]
        duration = left.info.get("duration")
    _save_frames(frames, path, 1000 / duration if duration else None)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    title = 34
    sheet = Image.new("RGB", (left.width + right.width + 16, max(left.height, right.height) + title), "white")
    draw = ImageDraw.Draw(sheet)
    for picture, x, text in ((left, 0, "before"), (right, left.width + 16, "after")):
        sheet.paste(picture, (x, title))
        draw.text((x + 8, 6), text, fill=(20, 20, 20), font_size=20)
    return sheet


def spread(total: int, count: int) -> list[int]:
    """`count` places spread evenly over `total`; the same ones every time, so that pictures can be compared."""
    count = min(count, total)
    return [round((i + 0.5) * total / count - 0.5) for i in range(count)]


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3,H,W] in [0,1] as a PIL image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
        picture.height, picture.width, 3
    ).permute(2, 0, 1) / 255  # fmt: skip


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# ------------------------------------------------------------------------------------------------ table


def comparison(folder: Path) -> list[Row]:
    """Before and after of every score, the headline score by category too; paired errors: same prompts, same noise."""
    files = _before_and_after(folder, "json")
    if not files:
        return []
    first, last = (json.loads(path.read_text()) for path in files)
    summary = json.loads((folder / "summary.json").read_text())
    names, shown = _both(first["scores"], last["scores"]), summary.get("headline")
    rows: list[Row] = []
    for name in sorted(names, key=lambda name: name != shown):
        before, after = (_tensor(side["scores"][name]) for side in (first, last))
        rows.append((name, _mean(before), _mean(after), *paired_gain(before, after)))
        for category in sorted(set(first["categories"]) - {""}) if name == shown else ():
            of = torch.tensor([c == category for c in first["categories"]])
            rows.append((f"  {category}", _mean(before[of]), _mean(after[of]), *paired_gain(before[of], after[of])))
    for name in _both(summary["base"]["measures"], summary["final"]["measures"]):
        b, f = (summary[side]["measures"][name]["mean"] for side in ("base", "final"))
        rows.append((name, b, f, None if None in (b, f) else f - b, None))
    return rows


def _before_and_after(folder: Path, suffix: str) -> list[Path]:
    """The files of the first evaluation and of that whose weights were exported, by default the last; or none."""
    files = sorted((folder / "samples").glob(f"*.{suffix}"))
    if len(files) < 2:
        return []
    summary = folder / "summary.json"
    exported = json.loads(summary.read_text()).get("exported") if summary.is_file() else None
    after = folder / "samples" / f"{exported or 0:06d}.{suffix}"
    return [files[0], files[-1] if exported is None or not after.is_file() else after]


def headline(summary: Mapping[str, Any]) -> str:
    """The overall scores of an evaluation in one line."""
    scores = {name: entry for name, entry in summary["scores"].items() if entry["mean"] is not None}
    return "  ".join(f"{name} {e['mean']:.3f}" + (f" ± {e['se']:.3f}" if e["se"] else "") for name, e in scores.items())


def table_lines(folder: Path) -> list[str]:
    """The before/after table as text, for the console."""
    rows = comparison(folder)
    if not rows:
        return []
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'held-out':<{width}}  {'before':>8}  {'after':>8}  {'gain':>10}  {'s.e.':>7}"]
    return lines + [
        f"{name:<{width}}  {_number(b):>8}  {_number(a):>8}  {_number(gain):>10}  {_number(error):>7}"
        for name, b, a, gain, error in rows
    ]


def _both(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """The names in both, in the order of the first: a part of a reward may be missing where it failed."""
    return [name for name in first if name in last]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values])


def _mean(score: Tensor) -> float | None:
    valid = score[score.isfinite()]
    return valid.mean().item() if len(valid) else None


# ------------------------------------------------------------------------------------------------ report

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left;white-space:pre}
tr:nth-child(even){background:#f6f6f6}
img{max-width:100%;border:1px solid #ddd}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1em}
.charts{display:grid;grid-template-columns:repeat(3,1fr);gap:1em}svg{width:100%;background:#fafafa}
pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}
"""

_CURVES = (
    "reward/mean", "reward/group_std", "clip_frac", "kl", "grad_norm", "ratio_first_update", "zero_std_frac", "lr",
    "time/iteration",
)  # fmt: skip


def write_report(folder: Path) -> Path:
    """`report.html`: curves, before and after, table and config in one file that needs no network."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    charts = "".join(_chart(name, rows) for name in _curves(rows))
    grids = _before_and_after(folder, "png")
    if grids:
        save_pair(*grids, folder / "before_after.png")
    pair = "".join(
        f"<div><h3>{title}</h3><img alt='{title}' src='data:image/png;base64,{_base64(path)}'></div>"
        for title, path in zip(("before", "after"), grids, strict=False)
    )
    table = "".join(
        "<tr><td>" + html.escape(name) + "</td>" + "".join(f"<td>{_number(v)}</td>" for v in values) + "</tr>"
        for name, *values in comparison(folder)
    )
    config = html.escape((folder / "config.yaml").read_text())
    alarms = "".join(f"<p><b>after {k} iterations:</b> {html.escape(text)}</p>" for k, text in alarms_of(folder))
    page = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(folder.name)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(folder.name)}</h1><h2>Held-out prompts</h2>"
        "<table><tr><th>score</th><th>before</th><th>after</th><th>gain</th><th>s.e.</th></tr>"
        f"{table}</table>{alarms}<h2>Same prompts, same noise</h2><div class='pair'>{pair}</div>"
        f"<h2>Training</h2><div class='charts'>{charts}</div><h2>Config</h2><pre>{config}</pre>"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def alarms_of(folder: Path) -> list[tuple[int, str]]:
    """(iterations before it, text) of every alarm that evaluations raised."""
    path = folder / EVALUATIONS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(row["iteration"], text) for row in rows for text in row.get("alarms", [])]


def _curves(rows: list[dict[str, Any]]) -> list[str]:
    present = {name for row in rows for name in row}
    return [name for name in _CURVES if name in present] + sorted(n for n in present if n.startswith("score/"))


def _chart(name: str, rows: list[dict[str, Any]], width: int = 320, height: int = 150) -> str:
    """One curve as inline SVG, with its lowest and highest value."""
    points = [(row["iteration"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    span_x, span_y = max(xs[-1] - xs[0], 1), (high - low) or 1.0
    across = [8 + (x - xs[0]) / span_x * (width - 16) for x in xs]
    down = [height - 10 - (y - low) / span_y * (height - 44) for y in ys]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    return (
        f"<svg viewBox='0 0 {width} {height}'><text x='8' y='16' font-size='12'>{html.escape(name)}</text>"
        f"<text x='{width - 8}' y='16' font-size='11' text-anchor='end' fill='#888'>{low:.4g} … {high:.4g}</text>"
        f"<polyline points='{line}' fill='none' stroke='#2563eb' stroke-width='1.5'/></svg>"
    )


def _base64(path: Path) -> str:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if getattr(image, "n_frames", 1) == 1:
            out = io.BytesIO()
            image.save(out, "PNG", optimize=True)
            data = out.getvalue()
    return base64.b64encode(data).decode()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
