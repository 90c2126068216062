"""Pairs made offline: sample a model, score, keep what was preferred to what (`flowrl pairs make`).

Prompts are taken in chunks; a chunk's media are written first, then its rows, then how far the store has come. A run
that was stopped goes on behind the last whole chunk, and its store is the one it would have made at one go.

Symbols: P prompts, K samples each, B = P K samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.algorithms.pairing import How, choose
from flowrl.checkpoint import RunLock
from flowrl.collect import Conditions, Geometry, sample, samples_of
from flowrl.config import Config, identity
from flowrl.data import DataError, PromptSampler, fingerprint, load_prompts
from flowrl.engine import default_device
from flowrl.log import plain, write_atomic
from flowrl.media import geometry_of, load_model
from flowrl.pairs import PAIRS, STORE, save_media
from flowrl.policy import Policy, exported_weights, load_weights
from flowrl.types import Prompt
from rewards import RewardHub
from rewards.hub import HubResult

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1

_NOISE = -2
"""The iteration that keys the noise: training counts from 0, and evaluations are -1."""

_MATTERS = ("model.", "rewards", "data.prompts", "data.balance")
_DOES_NOT = ("model.lora", "data.prompts_per_iteration")


@dataclass(kw_only=True, slots=True)
class PairSummary:
    """What became of the groups, one a prompt."""

    pairs: int = 0
    prompts: int = 0
    tied: int = 0
    """Groups without a pair though two or more of their samples have a verdict."""
    unjudged: int = 0
    """Groups with fewer than two verdicts."""
    no_verdict: int = 0
    """Samples."""


def make_pairs(
    config: Config, output: Path, *, num_prompts: int | None, samples_per_prompt: int, how: How, min_margin: float,
    weights: Path | None, num_steps: int | None, seed: int, console: Console,
) -> PairSummary:  # fmt: skip
    """Sample the config's prompts, score, choose and write: a pair store in `output`; says how far it has come.

    Prompts are `num_prompts` of the training prompts as an iteration would take them (`data.balance` holds; None: each
    of them once). `weights` are a run's, or an export; None is the base model. `num_steps` None: as in evaluations.
    Samples are rounded to 8 bits before they are judged, so a score belongs to the very file. With the arguments of an
    unfinished store in `output` it goes on, and the same store results; DataError if one of them differs.
    """
    if samples_per_prompt < 2:
        raise DataError(f"samples_per_prompt={samples_per_prompt}; a pair takes at least two samples of a prompt.")
    try:  # before anything is loaded
        choose(torch.zeros(0), torch.zeros(0), how, min_margin)
    except ValueError as error:
        raise DataError(str(error)) from error
    known = load_prompts(config.data.prompts)
    prompts = PromptSampler(known, num_prompts or len(known), seed, config.data.balance)(0)
    steps = num_steps or config.data.evaluation.num_steps
    exported = exported_weights(weights) if weights else None
    arguments = {
        **_of_config(config), "data.prompts (contents)": fingerprint(known), "weights (contents)": digest(exported),
        "num_prompts": len(prompts), "samples_per_prompt": samples_per_prompt, "how": how, "min_margin": min_margin,
        "num_steps": steps, "seed": seed,
    }  # fmt: skip
    with RunLock(output):
        store = _Store(output, arguments)
        if store.summary.prompts == len(prompts):
            console.print(f"{output} is complete", highlight=False)
            return store.summary
        device = default_device(config.engine.device)
        policy = Policy(load_model(config, device), frozen=True, guidance=config.model.guidance, device=device)
        if exported:
            load_weights(policy, exported)
        made_by = {
            "config": config.name, "model": _portable(config.model.path),
            "weights": _portable(str(exported)) if exported else None, "iteration": _iteration(exported),
            "guidance": config.model.guidance, "num_steps": steps, "seed": seed,
        }  # fmt: skip
        conditions = Conditions(encode=policy.encode, device=policy.device)
        batch = config.data.evaluation.batch_size
        at_once = max(1, batch // samples_per_prompt)
        entries = [entry.entry() for entry in config.rewards]
        with RewardHub(entries, device=device, max_nan_frac=config.data.max_no_verdict) as hub:
            for start in range(store.summary.prompts, len(prompts), at_once):
                chunk = prompts[start : start + at_once]
                media = _sampled(
                    policy, chunk, start, samples_per_prompt, conditions, geometry_of(config, policy.model),
                    num_steps=steps, seed=seed, batch=batch,
                )  # fmt: skip
                group = torch.arange(len(chunk)).repeat_interleave(samples_per_prompt)
                result = hub(samples_of(media, chunk, group, group, geometry_of(config, policy.model).fps))
                pairs = choose(result.total, group, how, min_margin)
                store.add(_rows(output, chunk, start, media, result, pairs, made_by), _counted(result, group, pairs))
                console.print(
                    f"{store.summary.prompts}/{len(prompts)} prompts, {store.summary.pairs} pairs", highlight=False
                )
    return store.summary


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], first: int, each: int, conditions: Conditions, geometry: Geometry,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """Media [P K,F,3,H,W] as 8 bits can hold them. The noise is a function of the prompt's place and the sample's."""
    repeated = [prompt for prompt in prompts for _ in range(each)]
    slots = range(first * each, (first + len(prompts)) * each)
    media = sample(policy, repeated, slots, conditions, geometry, iteration=_NOISE, **settings)
    return (media * 255).round() / 255


def _rows(
    folder: Path, prompts: Sequence[Prompt], first: int, media: Tensor, result: HubResult, pairs: Tensor,
    made_by: Mapping[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a chunk, whose media are on the disk already: those that are in a pair, each once."""
    each = len(media) // len(prompts)
    files = {
        index: save_media(media[index], folder, f"{first + index // each:05d}_{index % each:02d}")
        for index in sorted(set(pairs.flatten().tolist()))
    }
    rows = []
    for pair in pairs.tolist():
        prompt = prompts[pair[0] // each]
        sides = dict(zip(("chosen", "rejected"), pair, strict=True))
        rewards = {side: result.total[index].item() for side, index in sides.items()}
        rows.append({
            "prompt": prompt.text, **{side: files[index] for side, index in sides.items()},
            "margin": rewards["chosen"] - rewards["rejected"],
            "scores": {side: {n: s[index].item() for n, s in result.scores.items()} for side, index in sides.items()},
            "rewards": rewards,
            "metadata": {k: v for k, v in prompt.metadata.items() if k != "stored"},  # the prompts may be a store's
            "policy": dict(made_by),
        })  # fmt: skip
    return rows


def _counted(result: HubResult, group: Tensor, pairs: Tensor) -> PairSummary:
    """What became of a chunk's groups, numbered from 0."""
    number = int(group[-1]) + 1
    judged = torch.zeros(number, dtype=torch.long).index_add(0, group, result.total.isfinite().long())
    paired = torch.zeros(number, dtype=torch.bool)
    paired[group[pairs.flatten()]] = True
    return PairSummary(
        pairs=len(pairs), prompts=number, tied=int(((judged > 1) & ~paired).sum()), unjudged=int((judged < 2).sum()),
        no_verdict=int((~result.total.isfinite()).sum()),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the store


class _Store:
    """A store while it grows: its rows, and beside them the arguments that make them and how far they have come."""

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        """Starts a store, or goes on with the one of the same arguments, without what a broken chunk left of its rows.

        DataError if `folder` holds pairs of other arguments or of other making.
        """
        self.summary, self._bytes = PairSummary(), 0
        self._rows, self._record = folder / PAIRS, folder / STORE
        self._arguments = plain(dict(arguments))
        if self._record.is_file():
            self._go_on()
        elif self._rows.exists():
            raise DataError(f"{folder} holds pairs without a {STORE}: it cannot go on with them; name a new folder.")
        else:
            self._write_record()
        with self._rows.open("ab") as file:
            file.truncate(self._bytes)

    def add(self, rows: Sequence[Mapping[str, Any]], counts: PairSummary) -> None:
        """The pairs of one more chunk, on the disk when this returns."""
        data = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows).encode()
        with self._rows.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        before = asdict(self.summary)
        self.summary = PairSummary(**{key: before[key] + value for key, value in asdict(counts).items()})
        self._bytes += len(data)
        self._write_record()

    def _go_on(self) -> None:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            then, self._bytes, self.summary = record["arguments"], record["bytes"], PairSummary(**record["counts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._record}: damaged ({error!r}), cannot go on; name a new folder.") from error
        names = dict.fromkeys([*then, *self._arguments])
        other = [name for name in names if then.get(name) != self._arguments.get(name)]
        if other:
            listed = "\n".join(f"  {n}: {then.get(n)!r} then, {self._arguments.get(n)!r} now" for n in other)
            raise DataError(
                f"{self._record.parent} holds pairs that were made with other arguments:\n{listed}\n"
                "Give those again to go on with it, or name a new folder."
            )
        size = self._rows.stat().st_size if self._rows.is_file() else 0
        if size < self._bytes:
            raise DataError(
                f"{self._rows} has {size} bytes, but {self._bytes} were written; it was changed. Name a new folder."
            )

    def _write_record(self) -> None:
        record = {
            "format": FORMAT, "arguments": self._arguments, "counts": asdict(self.summary), "bytes": self._bytes,
        }  # fmt: skip
        write_atomic(self._record, json.dumps(record, indent=2) + "\n")


def _of_config(config: Config) -> dict[str, Any]:
    """What of a config decides which pairs are made, as {dotted key: plain value}."""
    found = {k: v for k, v in identity(config).items() if k.startswith(_MATTERS) and not k.startswith(_DOES_NOT)}
    return {k: _portable(v) if isinstance(v, str) and k.startswith(("model.path", "data.")) else v
            for k, v in found.items()}  # fmt: skip


def _portable(path: str) -> str:
    """A path without the part of it that is this machine's: relative to the working folder, or its last two names."""
    if not Path(path).is_absolute():
        return path
    if Path(path).is_relative_to(Path.cwd()):
        return Path(path).relative_to(Path.cwd()).as_posix()
    return "/".join(Path(path).parts[-2:])


def digest(weights: Path | None) -> str | None:
    """sha256 of exported weights, file by file in the order of their names."""
    if weights is None:
        return None
    total = hashlib.sha256()
    for path in sorted(weights.rglob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _iteration(weights: Path | None) -> int | None:
    """After how many iterations a run exported these weights, where they lie in its folder still."""
    summary = weights.parent / "summary.json" if weights else None
    if summary is None or not summary.is_file():
        return None
    found = json.loads(summary.read_text(encoding="utf-8"))
    return found.get("iterations")
