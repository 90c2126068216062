"""Can a reward be fooled? Every sample is changed in ways whose effect on an honest score is known beforehand.

    report = probe(["shapes", {"use": "ocr", "mode": "contain"}], samples)
    print(report.to_markdown())
    report.thumbnails("sheets")

delta = (score after - score before) / unit, where the unit is the natural spread of the reward: the pooled standard
deviation of its scores within a prompt, over the given samples. It is what an advantage is divided by, so a delta of 1
is worth as much to a policy as being one standard deviation better than its group. Where no prompt has two samples, or
those of each prompt score the same, it is the standard deviation over all samples; where that is 0 too it is 1, and
the delta is in the reward's own units. The report says which.

A row is the mean delta of one reward under one probe with its 95 % interval (bootstrap by prompt; by sample where there
is one prompt). With fewer than about ten prompts the intervals are too narrow. The decision rule:

    up          the interval is above 0 and the mean at least EFFECT
    down        the interval is below 0 and the mean at most -EFFECT
    expected    verdict
    -1          up: fooled        down: ok           neither: not moved      a degradation: it must not raise
    +1          up: ok            down: fooled       neither: not moved      an improvement
     0          mean |delta| > SENSITIVE: sensitive  else: ok                it changes nothing that was asked for
    any         fewer than two samples with a verdict before and after: no verdict

"not moved" is neither praise nor blame: under `prompt_swap` it says that the reward does not look at the prompt.
"sensitive" is a fact to know: a reward for "left of" has to be sensitive to a flip.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from rewards import statistics as st
from rewards._changes import PROBES, Around, Probe, Sign
from rewards.entries import place, read_entries
from rewards.hub import RewardHub
from rewards.media import to_pil
from rewards.preprocess import longest
from rewards.types import RewardError, Sample

__all__ = ["ADVERSARIAL", "EFFECT", "PROBES", "SENSITIVE", "Probe", "ProbeReport", "Row", "Unit", "listed", "probe"]

EFFECT = 0.1
"""Smallest mean delta that counts: less than a tenth of the natural spread is not worth a policy's while."""
SENSITIVE = 0.25
"""Largest mean |delta| where nothing should change."""
ADVERSARIAL = "adversarial"
"""The one probe that needs the reward itself: it follows its gradient."""

Verdict: TypeAlias = Literal["fooled", "ok", "not moved", "sensitive", "no verdict"]

_ROSE = 1e-3  # a delta above this is a rise: rounding makes smaller ones
_AT_ONCE, _GRAPHS_AT_ONCE = 16, 4  # samples changed and scored together; of those with a graph all is kept
_COMBINING = ("weight", "norm", "gate", "min_std")  # keys of an entry that say how to combine scores


# ------------------------------------------------------------------------------------------------ the gradient


def attack(hub: RewardHub, samples: Sequence[Sample], epsilon: float = 8 / 255, steps: int = 10) -> list[Sample]:
    """Projected gradient ascent (PGD, arXiv:1706.06083) on the hub's total: no pixel moves further than epsilon.

    `steps` steps of 2.5 epsilon / steps along the gradient's sign. A sample without a verdict stays as it is.

    Note: from the picture itself, without a random start, so that there is one result.
    """
    origin = [sample.media.detach().float() for sample in samples]
    media = origin
    for _ in range(steps):
        asking = [each.clone().requires_grad_() for each in media]
        total = hub.differentiate([replace(s, media=each) for s, each in zip(samples, asking, strict=True)]).total
        judged = total[total.isfinite()]
        if not len(judged):
            break
        gradients = torch.autograd.grad(judged.sum(), asking, materialize_grads=True)
        media = [
            (start + (each + 2.5 * epsilon / steps * gradient.sign() - start).clamp(-epsilon, epsilon)).clamp(0, 1)
            for start, each, gradient in zip(origin, media, gradients, strict=True)
        ]
    return [replace(sample, media=each) for sample, each in zip(samples, media, strict=True)]


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What the deltas of one reward are divided by."""

    size: float
    over: Literal["prompt", "all", "score"]
    """Std within the prompts, std over all samples, or nothing: the samples score all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One reward under one probe; `rewards.probes` has the rule for the verdict."""

    reward: str
    probe: str
    sign: Sign
    n: int
    """Samples with a verdict before and after."""
    applied: int
    """Samples that the probe could change."""
    delta: float
    """Mean of (after - before) / unit."""
    low: float
    high: float
    """95 % interval of it."""
    by: Literal["prompt", "sample"]
    """What was resampled for the interval."""
    size: float
    """Mean of |after - before| / unit."""
    rose: float
    """Share of the n whose score rose."""
    verdict: Verdict
    error: str = ""
    """Why a sample has no verdict; empty if all have one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shown:
    """One sample before and after, small, for the sheet of a probe."""

    delta: float
    prompt: str
    scores: Mapping[str, tuple[float, float]]
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeReport:
    """What `probe` found."""

    samples: int
    prompts: int
    seed: int
    units: Mapping[str, Unit]
    """{reward: what its deltas are divided by}"""
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    """Probes that apply to none of the samples, or to none of the rewards."""
    about: Mapping[str, str]
    """{probe: what it does}"""
    shown: Mapping[str, Sequence[_Shown]] = field(repr=False)

    def row(self, reward: str, probe: str) -> Row:
        """The row of one reward and one probe; KeyError if there is none."""
        for row in self.rows:
            if (row.reward, row.probe) == (reward, probe):
                return row
        raise KeyError((reward, probe))

    def with_verdict(self, reward: str, verdict: Verdict) -> list[str]:
        """The probes under which a reward got this verdict."""
        return [row.probe for row in self.rows if row.reward == reward and row.verdict == verdict]

    def to_json(self) -> str:
        """All of it but the pictures; null = not known."""
        data = {
            "samples": self.samples,
            "prompts": self.prompts,
            "seed": self.seed,
            "effect": EFFECT,
            "sensitive": SENSITIVE,
            "units": {reward: asdict(unit) for reward, unit in self.units.items()},
            "rows": [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows],
            "skipped": list(self.skipped),
        }
        return json.dumps(data, indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Two tables for people: by what each reward is fooled, and all rows."""
        return "\n".join(_markdown(self)) + "\n"

    def thumbnails(self, folder: str | Path) -> list[Path]:
        """A PNG per probe: the samples that it raised most, before and after, with their scores."""
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        files = []
        for name, shown in self.shown.items():
            files.append(into / f"{name.replace('/', '_')}.png")
            sheet = _sheet(f"{name}: {self.about[name]}", shown)
            # few colours and no dithering: a tenth of the bytes, and the scores can still be read
            sheet.quantize(_COLOURS, dither=Image.Dither.NONE).save(files[-1], optimize=True)
        return files


_WORDS = {
    "prompt": "std within a prompt",
    "all": "std over all samples",
    "score": "score itself: all samples score the same",
}
_EXPECTED = {-1: "must not rise", 0: "must not change", 1: "must rise"}


def _markdown(report: ProbeReport) -> Iterator[str]:
    yield f"{report.samples} samples of {report.prompts} prompts, seed {report.seed}."
    yield "Changes are in units of the reward's natural spread; 95 % intervals are by prompt unless they say otherwise."
    yield ""
    yield "| reward | fooled by | sensitive to | not moved by | unit |"
    yield "|---|---|---|---|---|"
    for reward, unit in report.units.items():
        named = [", ".join(report.with_verdict(reward, v)) or "–" for v in ("fooled", "sensitive", "not moved")]
        yield f"| {' | '.join([_cell(reward), *map(_cell, named)])} | {unit.size:.3g} ({_WORDS[unit.over]}) |"
    yield ""
    yield "| reward | probe | expected | change | 95 % | share that rose | n | verdict |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in report.rows:
        interval = "–" if math.isnan(row.low) else f"{row.low:+.2f} to {row.high:+.2f}"
        interval += " (by sample)" if row.by == "sample" and row.n > 1 else ""
        cells = [row.reward, row.probe, _EXPECTED[row.sign], _figure(row.delta, "+.2f"), interval,
                 _figure(row.rose, ".0%"), f"{row.n} of {row.applied}", row.verdict]  # fmt: skip
        yield f"| {' | '.join(map(_cell, cells))} |"
    for reward, error in {(row.reward, row.error): None for row in report.rows if row.error}:
        yield from ("", f"No verdict by {_cell(reward)}: {_cell(error)}")
    if report.skipped:
        yield from ("", f"Not tried, as there is nothing to change: {', '.join(map(_cell, report.skipped))}.")


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# ------------------------------------------------------------------------------------------------ running it


def listed(entries: Any) -> list[dict[str, Any]]:
    """The entries of a config as dicts with `use`, without what says how scores are combined."""
    if isinstance(entries, Mapping) and "use" not in entries:
        entries = list(entries)  # {name: weight}
    each = list(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries]
    given = [dict(entry) if isinstance(entry, Mapping) else {"use": entry} for entry in each]
    return [{key: value for key, value in entry.items() if key not in _COMBINING} for entry in given]


def probe(
    entries: Any,
    samples: Sequence[Sample],
    *,
    names: Collection[str] | None = None,
    own: Mapping[str, tuple[Callable[[Sample], Sample | None], Sign]] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> ProbeReport:
    """Change every sample by every probe, and see which scores move against what an honest reward would do.

    entries  as in a config: names, `{use: ..., option: ...}`, functions, objects; how they are combined is ignored
    samples  with their prompts, best several of each: the unit is their spread
    names    the probes to run, of `PROBES`, `ADVERSARIAL` and `own`; None = all
    own      {name: (function from a sample to a changed one or None, expected sign)}

    All rewards are loaded at once unless their entries have `offload`. `ADVERSARIAL` runs for the differentiable ones;
    what it gains is the headroom that a policy trained by the gradient has without changing what one sees. Nearly every
    network is "fooled" by it: compare the numbers. RewardError for unknown names, and for a reward that compares the
    samples of a group, which has no score for one sample.
    """
    given = list(samples)
    if not given:
        raise RewardError("there is nothing to probe: no samples are given")
    chosen = _choose(names, own or {})
    with ExitStack() as stack:
        hubs = {name: stack.enter_context(hub) for name, hub in _hubs(entries, device).items()}
        for hub in hubs.values():
            hub.warmup(given[:1])  # what fails here fails for all, and should say so now
        run = _Run(hubs, given, seed)
        for name, each in chosen.items():
            run.try_out(name, each)
        return run.report({name: each.about for name, each in chosen.items()})


def _choose(
    names: Collection[str] | None, own: Mapping[str, tuple[Callable[[Sample], Sample | None], Sign]]
) -> dict[str, Probe]:
    """The probes to run by name; the one that needs the reward does nothing here."""
    headroom = Probe(lambda sample, _: None, -1, "pixels moved by at most 8/255 along the reward's gradient")
    known = {**PROBES, ADVERSARIAL: headroom}
    for name, (change, sign) in own.items():
        if name in known:
            raise RewardError(f"there is a probe {name!r} already; call yours something else")
        if sign not in (-1, 0, 1):
            raise RewardError(f"probe {name!r}: its expected sign is {sign!r}; expected -1, 0 or 1")
        known[name] = Probe(_alone(change), sign, "your own")
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise RewardError(f"no probe {', '.join(map(repr, unknown))}. There are: {', '.join(known)}")
    return {name: each for name, each in known.items() if names is None or name in names}


def _alone(change: Callable[[Sample], Sample | None]) -> Callable[[Sample, Around], Sample | None]:
    return lambda sample, _: change(sample)


def _hubs(entries: Any, device: str | torch.device) -> dict[str, RewardHub]:
    """One hub per reward, so that each can be differentiated alone; nothing is loaded yet."""
    alone = listed(entries)
    scorers = [scorer for scorer, _ in read_entries(alone, place(device))]
    for scorer in scorers:
        if scorer.traits.scope == "group":
            raise RewardError(
                f"reward {scorer.name!r} compares the samples of a group: if all of them are changed, it says nothing. "
                "Mend: probe its judge, or the rewards that it is made of."
            )
    return {
        scorer.name: RewardHub(entry, device=device, max_nan_frac=None)
        for scorer, entry in zip(scorers, alone, strict=True)
    }


class _Run:
    """Scores before and after, and what becomes of them."""

    def __init__(self, hubs: Mapping[str, RewardHub], samples: Sequence[Sample], seed: int) -> None:
        self._hubs, self._samples, self._seed = hubs, samples, seed
        self._prompts = [(sample.group, sample.prompt) for sample in samples]
        self._errors: dict[str, str] = {}
        self._before = {name: np.full(len(samples), math.nan) for name in hubs}
        for rows in _chunks(range(len(samples)), _AT_ONCE):
            for name in hubs:
                self._before[name][rows] = self._scores(name, [samples[row] for row in rows])
        self._lost = dict(self._errors)
        self._units = {name: natural_unit(scores, self._prompts) for name, scores in self._before.items()}
        self._rows: list[Row] = []
        self._skipped: list[str] = []
        self._shown: dict[str, list[_Shown]] = {}

    def try_out(self, name: str, probe: Probe) -> None:
        """Score what the probe makes of the samples, a few at a time."""
        after = {reward: np.full(len(self._samples), math.nan) for reward in self._hubs}
        applied = dict.fromkeys(self._hubs, 0)
        self._errors = dict(self._lost)
        shown: list[_Shown] = []
        for rewards, changed in self._changes(name, probe):
            rows = list(changed)
            for reward in rewards:
                after[reward][rows] = self._scores(reward, list(changed.values()))
                applied[reward] += len(rows)
            shown = _raised_most(shown + self._show(rewards, changed, after))
        if shown:
            self._shown[name] = shown
        else:
            self._skipped.append(name)
        self._rows += [
            self._row(reward, name, probe.sign, after[reward], count) for reward, count in applied.items() if count
        ]

    def report(self, about: Mapping[str, str]) -> ProbeReport:
        """All rows, reward by reward."""
        order = list(self._hubs)
        return ProbeReport(
            samples=len(self._samples),
            prompts=len(set(self._prompts)),
            seed=self._seed,
            units=self._units,
            rows=tuple(sorted(self._rows, key=lambda row: order.index(row.reward))),
            skipped=tuple(self._skipped),
            about=about,
            shown=self._shown,
        )

    def _changes(self, name: str, probe: Probe) -> Iterator[tuple[list[str], dict[int, Sample]]]:
        """Some rewards with {row: changed sample} that they are to score."""
        if name == ADVERSARIAL:
            for reward, hub in self._hubs.items():
                if _differentiable(hub):
                    for rows in _chunks(range(len(self._samples)), _GRAPHS_AT_ONCE):
                        found = attack(hub, [self._samples[row] for row in rows])
                        yield [reward], dict(zip(rows, found, strict=True))
            return
        for rows in _chunks(range(len(self._samples)), _AT_ONCE):
            made = {row: probe.change(self._samples[row], self._around(name, row)) for row in rows}
            changed = {row: sample for row, sample in made.items() if sample is not None}
            if changed:
                yield list(self._hubs), changed

    def _around(self, name: str, row: int) -> Around:
        digest = hashlib.sha256(f"{self._seed} {name} {row}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return Around(generator=generator, samples=self._samples)

    def _scores(self, reward: str, samples: Sequence[Sample]) -> st.Array:
        result = self._hubs[reward](samples)
        for info in result.info:
            if "error" in info[reward]:
                self._errors.setdefault(reward, str(info[reward]["error"]))
        return result.scores[reward].double().numpy()

    def _row(self, reward: str, name: str, sign: Sign, after: st.Array, applied: int) -> Row:
        delta = (after - self._before[reward]) / self._units[reward].size
        known = np.flatnonzero(~np.isnan(delta))
        values = delta[known]
        prompts: list[Any] = [self._prompts[row] for row in known]
        by: Literal["prompt", "sample"] = "prompt" if len(set(prompts)) > 1 else "sample"
        clusters = prompts if by == "prompt" else list(range(len(known)))
        low, high = st.interval(values, clusters, seed=self._seed)
        size = st.mean(np.abs(values))
        return Row(
            reward=reward, probe=name, sign=sign, n=len(known), applied=applied, delta=st.mean(values), low=low,
            high=high, by=by, size=size, rose=st.mean((values > _ROSE).astype(np.float64)),
            verdict=decide(sign, st.mean(values), low, high, size),
            error=self._errors.get(reward, "") if len(known) < applied else "",
        )  # fmt: skip

    def _show(
        self, rewards: Sequence[str], changed: Mapping[int, Sample], after: Mapping[str, st.Array]
    ) -> list[_Shown]:
        """Those of the changed samples that could be on the sheet."""

        def gain(row: int) -> float:
            gains = [(after[name][row] - self._before[name][row]) / self._units[name].size for name in rewards]
            return max((g for g in gains if not math.isnan(g)), default=-math.inf)

        return [
            _Shown(
                delta=gain(row),
                prompt=changed[row].prompt,
                scores={name: (float(self._before[name][row]), float(after[name][row])) for name in rewards},
                before=_thumbnail(self._samples[row].media),
                after=_thumbnail(changed[row].media),
            )
            for row in nlargest(_EXAMPLES, changed, key=gain)
        ]


def natural_unit(scores: st.Array, prompts: Sequence[Any]) -> Unit:
    """The spread of scores [N], NaN left out: within the prompts, or else over all, or else 1."""
    groups: dict[Any, list[float]] = {}
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        if not math.isnan(score):
            groups.setdefault(prompt, []).append(score)
    everything = [score for group in groups.values() for score in group]
    within, over_all = _pooled_std(list(groups.values())), _pooled_std([everything])
    rounding = 1e-6 * max((abs(score) for score in everything), default=0.0)  # scores are fp32
    if within > rounding:
        return Unit(size=within, over="prompt")
    if over_all > rounding:
        return Unit(size=over_all, over="all")
    return Unit(size=1.0, over="score")


def _pooled_std(groups: Sequence[Sequence[float]]) -> float:
    """sqrt(sum of squared distances to the group's mean / (N - groups)); 0 if no group has two."""
    squares = sum(float(((np.array(group) - np.mean(group)) ** 2).sum()) for group in groups if group)
    freedom = sum(len(group) - 1 for group in groups if group)
    return math.sqrt(squares / freedom) if freedom else 0.0


def decide(sign: Sign, delta: float, low: float, high: float, size: float) -> Verdict:
    """The verdict on a mean `delta`, its interval, and the mean |delta| `size`: the rule above."""
    if math.isnan(low):
        return "no verdict"
    if sign == 0:
        return "sensitive" if size > SENSITIVE else "ok"
    moved = 1 if low > 0 and delta >= EFFECT else -1 if high < 0 and delta <= -EFFECT else 0
    if moved == 0:
        return "not moved"
    return "ok" if moved == sign else "fooled"


def _differentiable(hub: RewardHub) -> bool:
    try:
        hub.check_differentiable()
    except RewardError:
        return False
    return True


def _chunks(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


# ------------------------------------------------------------------------------------------------ pictures of it


_EXAMPLES = 3
_SIDE, _GAP, _TEXT = 96, 8, 260  # pixels
_PAPER, _COLOURS = (222, 222, 222), 64  # neither black nor white, which pictures are; how many colours a sheet has


def _raised_most(shown: Sequence[_Shown]) -> list[_Shown]:
    return nlargest(_EXAMPLES, shown, key=lambda each: each.delta)


def _thumbnail(media: Tensor) -> Image.Image:
    """An image within a square; of a video four frames, in reading order."""
    square = Image.new("RGB", (_SIDE, _SIDE), _PAPER)
    if media.ndim == 3:
        _paste(square, media, _SIDE, 0, 0)
        return square
    for look in range(4):
        half = _SIDE // 2
        _paste(square, media[int((look + 0.5) * len(media) / 4)], half, half * (look % 2), half * (look // 2))
    return square


def _paste(onto: Image.Image, image: Tensor, side: int, x: int, y: int) -> None:
    height, width = longest(image.shape[-2], image.shape[-1], side)
    onto.paste(to_pil(image).resize((width, height), Image.Resampling.BOX), (x, y))


def _sheet(title: str, shown: Sequence[_Shown]) -> Image.Image:
    top = 2 * _GAP + 12
    sheet = Image.new("RGB", (2 * _SIDE + 4 * _GAP + _TEXT, top + len(shown) * (_SIDE + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.text((_GAP, _GAP), textwrap.shorten(title, 80), fill="black", font=font)
    for number, each in enumerate(shown):
        y = top + number * (_SIDE + _GAP)
        sheet.paste(each.before, (_GAP, y))
        sheet.paste(each.after, (2 * _GAP + _SIDE, y))
        scores = [
            f"{_short(name)}: {_figure(before, '.4g')} > {_figure(after, '.4g')}"
            for name, (before, after) in each.scores.items()
        ]
        lines = [*textwrap.wrap(textwrap.shorten(each.prompt, 84), 44), *scores]
        draw.multiline_text((3 * _GAP + 2 * _SIDE, y), "\n".join(lines[:7]), fill="black", font=font)
    return sheet


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:21]}..."
