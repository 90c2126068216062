"""One reward made safe to call: batching, loading, and everything that can go wrong, decided in this one place.

    pixels NaN or infinite, or `meta` lacks what the reward needs   NaN for that sample, with `info["error"]`
    an exception for some sample                                    the batch is tried again one by one; NaN for the one
                                                                    that fails, or `on_error: raise` names it
    TypeError, NameError, ... for some sample                       a bug: raises at once and names the sample
    wrong length, shape or type returned                            a bug: RewardContractError says how to mend it
    infinity returned                                               NaN
    out of memory                                                   halved batch size from then on; raises with a graph
    most samples without a verdict, call after call                 raises with the last error

"One by one" is sample by sample, or group by group for a reward of `scope = "group"`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rewards._clip import Trunk
from rewards.cache import ScoreCache
from rewards.contract import Sheet, as_scores
from rewards.gradient import Valve, reaching
from rewards.http import one_call
from rewards.media import frame
from rewards.types import MediaKind, Reward, RewardContractError, RewardError, Sample, Scores, Traits, traits_of

BUGS = (TypeError, NameError, ImportError, NotImplementedError, RewardContractError)
"""What no sample is to blame for."""

Unit: TypeAlias = list[int]
"""Rows of the samples that must be scored together: one sample, or one group."""


@dataclass(kw_only=True)
class Scorer:
    """A reward with its place and its policy.

    `run` is called from one thread only, that of its lane; `differentiate` from the caller's, never at the same time.
    """

    reward: Reward
    name: str
    traits: Traits
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    """Samples, or frames of videos where a reward for images judges them, in one call; None = all."""
    on_error: Literal["nan", "raise"] = "nan"
    frames: int = 4
    """How many frames of a video a reward for images sees."""
    offload: Literal["none", "cpu", "drop"] = "none"
    """Where the weights are between calls: on the device, in main memory, or nowhere.

    A network that another loaded reward shares, of this hub or of another, stays where it is.
    """
    cache: ScoreCache | None = None
    _loaded: bool = False
    _away: bool = False
    _warned: set[str] = field(default_factory=set)

    @property
    def lane(self) -> str:
        """Rewards of one lane take turns: those on one device; one that runs elsewhere may name a `lane` of its own."""
        return str(getattr(self.reward, "lane", self.device))

    def load(self) -> None:
        """Bring the weights in, once, or back from where they waited."""
        if self._away:
            self._move(self.device)
            self._away = False
        if self._loaded:
            return
        try:
            if hasattr(self.reward, "load"):
                self.reward.load(self.device, self.dtype)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward {self.name!r} cannot be loaded: {_told(error)}") from error
        self.traits = traits_of(self.reward)  # one that runs elsewhere learns there what it is
        self._loaded = True

    def unload(self) -> None:
        """Let the weights go."""
        if self._loaded and hasattr(self.reward, "unload"):
            self.reward.unload()
        self._loaded = False

    def put_away(self) -> None:
        """Make room on the device after a call, as `offload` says."""
        if self.offload == "drop":
            self.unload()
        elif self.offload == "cpu" and self.device.type != "cpu":
            self._move(torch.device("cpu"))
            self._away = True
        if self.offload != "none" and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        for module in modules_of(self.reward):
            module.to(device)

    def warm(self, samples: Sequence[Sample] | None, gradient: bool = False) -> float:
        """Load, and score some samples (by default made-up ones) with no mercy for errors; the seconds that it took.

        With `gradient` the way back is tried too, so that a reward without one is found before the first iteration.
        """
        start = time.perf_counter()
        self.load()  # what the reward needs may be known only then
        seconds = time.perf_counter() - start
        if samples is None and self.traits.needs:
            samples = []  # what a reward needs cannot be made up: it is only loaded
        policy, self.on_error = self.on_error, "raise"
        try:
            made_up = made_up_samples("image" if "image" in self.traits.media else "video")
            given = made_up if samples is None else samples
            seconds += self.run(given, {})[1]
            if gradient:
                self.differentiate([replace(s, media=s.media.detach().clone().requires_grad_()) for s in given], {})
                self.put_away()
            return seconds
        finally:
            self.on_error = policy

    @torch.no_grad()
    def run(self, samples: Sequence[Sample], broken: Mapping[int, str]) -> tuple[Scores, float]:
        """Scores of all samples, fp32 on the CPU and in their order, and the seconds that it took.

        `broken` says which samples no reward can judge (`rewards.media.broken_media`). A deadline that a reward has
        counts from here, once it is loaded, however many calls the samples take.
        """
        start = time.perf_counter()
        self.load()
        sheet = Sheet(len(samples))
        units = self._scorable(samples, broken, sheet)
        with one_call():
            if self.cache is None:
                self._score(units, samples, sheet)
            else:
                keys = {row: self.cache.key(samples[row]) for (row,) in units}
                known = {row for row, key in keys.items() if self.cache.recall(key, row, sheet)}
                self._score([[row] for row in keys if row not in known], samples, sheet)
                self.cache.remember({row: key for row, key in keys.items() if row not in known}, sheet)
        self.put_away()
        return sheet.scores(), time.perf_counter() - start

    @torch.enable_grad()
    def differentiate(self, samples: Sequence[Sample], broken: Mapping[int, str]) -> Scores:
        """Scores as `run` gives them, whose `value` [N] has a gradient to the media; the cache takes no part.

        A sample without a verdict sends gradient 0 to its media, never NaN. RewardContractError if there is no graph.
        """
        self.load()
        sheet = Sheet(len(samples))
        self._score(self._scorable(samples, broken, sheet), samples, sheet)
        return sheet.scores()

    def _scorable(self, samples: Sequence[Sample], broken: Mapping[int, str], sheet: Sheet) -> list[Unit]:
        """The units that can be scored; the others get their reason."""
        units: dict[int, Unit] = {}
        for row, sample in enumerate(samples):
            units.setdefault(sample.group if self.traits.scope == "group" else row, []).append(row)
        refused = dict(broken)
        for row, sample in enumerate(samples):
            lacking = [key for key in self.traits.needs if sample.meta.get(key) is None]
            if lacking:
                refused[row] = f"meta has no {' and no '.join(map(repr, lacking))}, which reward {self.name!r} needs"
                self._warn_once("needs", f"sample {row} {_called(sample)}: {refused[row]}; it gets no verdict")
            if sample.kind == "image" and "image" not in self.traits.media:
                raise RewardContractError(
                    f"reward {self.name!r} judges videos; sample {row} {_called(sample)} is an image of shape "
                    f"{list(sample.media.shape)}. Mend: use a reward for images, or a model that makes videos."
                )
        for row, error in refused.items():
            sheet.fail([row], error)
        whole = [unit for unit in units.values() if not refused.keys() & set(unit)]
        for unit in units.values():
            if unit not in whole:
                sheet.fail(unit, "another sample of its group cannot be judged, and this reward compares whole groups")
        return whole

    def _score(self, units: Sequence[Unit], samples: Sequence[Sample], sheet: Sheet) -> None:
        """Score units in batches and in order; whatever goes wrong is settled here."""
        done = 0
        while done < len(units):
            batch = self._next_batch(units[done:])
            rows = [row for unit in batch for row in unit]
            chosen = [samples[row] for row in rows]
            outcome = self._attempt(chosen)
            if isinstance(outcome, torch.OutOfMemoryError):
                looks = self._looks_at_once(chosen)
                self._shrink(len(rows) * looks, outcome, splits=len(batch) > 1 or looks > 1)
                continue
            if isinstance(outcome, Scores):
                sheet.put(rows, outcome)
                self._settle_failed(rows, samples, sheet)
            elif len(batch) > 1 and not isinstance(outcome, RewardContractError):
                self._isolate(batch, samples, sheet, outcome)
            else:
                self._settle(rows, samples, sheet, outcome)
            done += len(batch)

    def _next_batch(self, waiting: Sequence[Unit]) -> list[Unit]:
        """As many units as fit into `batch_size` samples, and at least one."""
        if self.batch_size is None:
            return list(waiting)
        batch, size = [waiting[0]], len(waiting[0])
        for unit in waiting[1:]:
            size += len(unit)
            if size > self.batch_size:
                break
            batch.append(unit)
        return batch

    def _attempt(self, samples: Sequence[Sample]) -> Scores | Exception:
        """Scores of one batch, or what was raised instead."""
        try:
            if torch.is_grad_enabled():
                return self._judge_with_graph(samples)
            return self._judge([replace(s, media=s.media.detach().to(self.device, torch.float32)) for s in samples])
        except Exception as error:
            return error

    def _judge_with_graph(self, samples: Sequence[Sample]) -> Scores:
        valves = [Valve() for _ in samples]
        placed = [
            replace(sample, media=valve.through(sample.media.to(self.device, torch.float32)))
            for sample, valve in zip(samples, valves, strict=True)
        ]
        media = [sample.media for sample in placed]
        scores = reaching(self.name, media, lambda: self._judge(placed), lambda scores: scores.value)
        for valve, missing in zip(valves, scores.value.isnan(), strict=True):
            valve.close(missing)
        return scores

    def _judge(self, placed: Sequence[Sample]) -> Scores:
        if not self._by_frames(placed):
            return self._call(placed)
        step, scores = self._looks_at_once(placed), []
        for start in range(0, self.frames, step):
            scores += self._look(placed, range(start, min(start + step, self.frames)))
        return _mean(scores)

    def _by_frames(self, samples: Sequence[Sample]) -> bool:
        return "video" not in self.traits.media and any(sample.kind == "video" for sample in samples)

    def _looks_at_once(self, samples: Sequence[Sample]) -> int:
        """How many frames of each video go into one call: as many as `batch_size` has room for, and at least one."""
        if not self._by_frames(samples):
            return 1
        room = self.frames if self.batch_size is None else self.batch_size // len(samples)
        return max(1, min(self.frames, room))

    def _look(self, placed: Sequence[Sample], looks: range) -> list[Scores]:
        """Scores [N] of some frames of each video, in one call; what is compared is frames of the same place."""
        seen = [[frame(sample, look, self.frames) for sample in placed] for look in looks]
        shown = together(seen) if self.traits.scope == "group" else [sample for look in seen for sample in look]
        return cut(self._call(shown), [len(placed)] * len(looks))

    def _call(self, samples: Sequence[Sample]) -> Scores:
        return as_scores(self.reward.score(samples), len(samples), self.name)

    def _isolate(self, batch: list[Unit], samples: Sequence[Sample], sheet: Sheet, error: Exception) -> None:
        """Score the units of a failed batch one by one, so that only what really fails is lost."""
        rows = [row for unit in batch for row in unit]
        for unit in batch:
            self._score([unit], samples, sheet)
        if not any("error" in sheet.info[row] for row in rows):
            self._warn_once(
                "batch",
                f"reward {self.name!r} fails on {len(rows)} samples at once ({_told(error)}) but scores each alone, "
                "which is slow; set `batch_size: 1`, or mend its handling of batches",
            )

    def _settle_failed(self, rows: Sequence[int], samples: Sequence[Sample], sheet: Sheet) -> None:
        """What a reward could not ask for (`info["failed"]`) is settled as if it had raised for those samples."""
        failed = [row for row in rows if sheet.info[row].get("failed")]
        if failed:
            self._settle(failed, samples, sheet, RewardError(sheet.info[failed[0]].get("error", "no reason is given")))

    def _settle(self, rows: Sequence[int], samples: Sequence[Sample], sheet: Sheet, error: Exception) -> None:
        """One unit failed: raise with its name, or leave it without a verdict."""
        if isinstance(error, RewardContractError):
            raise error
        which = f"sample {rows[0]}" if len(rows) == 1 else f"samples {', '.join(map(str, rows))}"
        failed = f"reward {self.name!r} failed on {which} {_called(samples[rows[0]])}: {_told(error)}."
        if isinstance(error, BUGS):
            mend = "This looks like a bug in it; for a sample that it cannot judge, let it return NaN or None."
            raise RewardError(f"{failed} {mend}") from error
        if self.on_error == "raise":
            raise RewardError(f"{failed} `on_error: nan` leaves such a sample out of training instead.") from error
        where = "in `info` and in the share without a verdict"
        self._warn_once("error", f"{failed} No verdict there; further failures only show {where}.")
        sheet.fail(rows, _told(error))

    def _shrink(self, size: int, error: Exception, splits: bool) -> None:
        """Halve the batch size after running out of memory."""
        if torch.is_grad_enabled():  # smaller batches would not help: their graphs are all kept until the backward pass
            raise RewardError(
                f"reward {self.name!r} runs out of memory on {self.device} with a graph through {size} samples. "
                "Mend: differentiate fewer samples at once, use `dtype: bfloat16`, or put it on another device."
            ) from error
        if not splits:
            raise RewardError(
                f"reward {self.name!r} runs out of memory on {self.device} with the smallest batch it can be given "
                f"({size}). Mend: put it on another device (`device: cpu`), or use `dtype: bfloat16`."
            ) from error
        error.with_traceback(None)  # its frames hold the tensors that did not fit
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size = max(1, size // 2)
        warnings.warn(
            f"reward {self.name!r} ran out of memory with {size} samples; batch_size is now {self.batch_size}",
            stacklevel=2,
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)


@dataclass(kw_only=True)
class NanWatch:
    """Stops a run whose reward has gone: too few verdicts now and on the moving average, for several calls in a row."""

    name: str
    max_nan_frac: float
    key: str = "max_nan_frac"
    """What the limit is called where the user sets it."""
    decay: float = 0.8
    patience: int = 3
    average: float | None = None
    strikes: int = 0

    def see(self, values: Tensor, errors: Sequence[str]) -> None:
        """Take note of the scores [N] of one call; raise with the last error when it was one too many."""
        if not len(values):
            return
        fraction = values.isnan().float().mean().item()
        self.average = fraction if self.average is None else self.decay * self.average + (1 - self.decay) * fraction
        self.strikes = self.strikes + 1 if min(fraction, self.average) > self.max_nan_frac else 0
        if self.strikes >= self.patience:
            raise RewardError(
                f"reward {self.name!r} gives no verdict on {fraction:.0%} of the samples ({self.average:.0%} on "
                f"average), for {self.strikes} calls in a row. "
                f"Last error: {errors[-1] if errors else 'none in this call'}. "
                "Mend what fails and go on from the last checkpoint; "
                f"if it is meant for some of the prompts only, raise {self.key}."
            )


def made_up_samples(kind: MediaKind, count: int = 2) -> list[Sample]:
    """Noise with a prompt, one group; drawn from a generator of its own, so that a run's noise stays what it was."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 64, 64) if kind == "image" else (4, 3, 64, 64)
    return [
        Sample(media=torch.rand(shape, generator=generator), prompt='a sign that says "hello"', fps=8.0)
        for _ in range(count)
    ]


def modules_of(reward: object) -> list[torch.nn.Module | Trunk]:
    """The networks that a reward holds as attributes, itself or in helpers of this package; shared ones as trunks."""
    held = list(vars(reward).values()) if hasattr(reward, "__dict__") else []
    networks = (torch.nn.Module, Trunk)
    helpers = [value for value in held if type(value).__module__.startswith("rewards.") and hasattr(value, "__dict__")]
    found = [value for value in held if isinstance(value, networks)]
    found += [value for helper in helpers if not isinstance(helper, networks) for value in modules_of(helper)]
    return list({id(module): module for module in found}.values())


def together(batches: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Batches as one; groups of different batches stay apart, whatever number they have."""
    groups: dict[tuple[int, int], int] = {}
    return [
        replace(sample, group=groups.setdefault((index, sample.group), len(groups)))
        for index, samples in enumerate(batches)
        for sample in samples
    ]


def cut(scores: Scores, sizes: Sequence[int]) -> list[Scores]:
    """Scores of batches that were scored together; every sample has its dict of info."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start := start + size)
        parts = {name: part[rows] for name, part in scores.parts.items()}
        pieces.append(Scores(value=scores.value[rows], parts=parts, info=scores.info[rows]))
    return pieces


def _mean(looks: Sequence[Scores]) -> Scores:
    """Mean over the frames that a video was judged by; a frame without a verdict leaves the video without one."""
    info = []
    for frames in zip(*(look.info for look in looks), strict=True):
        errors = [entry["error"] for entry in frames if "error" in entry]
        failed = {"failed": True} if any(entry.get("failed") for entry in frames) else {}
        info.append({"frames": list(frames)} | ({"error": errors[0]} if errors else {}) | failed)
    parts = {
        key: torch.stack([look.parts[key] for look in looks]).mean(0)
        for key in looks[0].parts
        if all(key in look.parts for look in looks)
    }
    return Scores(value=torch.stack([look.value for look in looks]).mean(0), parts=parts, info=info)


def _called(sample: Sample) -> str:
    prompt = sample.prompt if len(sample.prompt) <= 80 else sample.prompt[:77] + "..."
    return f"(group {sample.group}, prompt {prompt!r})"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
