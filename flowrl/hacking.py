"""Is the trained reward still about what it stands for? Held-out rewards are asked at evaluations, and compared.

A run whose trained reward rises while a reward that it never saw falls is gaming the first (reward hacking). Both are
measured on the same prompts and noise, so differences are paired, and an alarm is no accident of sampling: over the
last few evaluations the one must have risen, and the other fallen, by more than two standard errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowrl.evaluate import paired_gain

TOTAL = "total"
"""Key of the trained reward beside the scores of an evaluation."""
WINDOW = 2
"""Evaluations back that the present one is compared with."""
ERRORS = 2.0
"""Standard errors by which a difference is one."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A held-out reward that fell while the trained one rose."""

    name: str
    since: int
    """Iterations before the older of the two evaluations."""
    trained: float
    """Gain of the trained reward."""
    held_out: float
    """Loss of this one, below 0."""

    def __str__(self) -> str:
        """What happened and what can be done."""
        return (
            f"reward hacking? Since iteration {self.since} the trained reward rose by {self.trained:+.3g} while the "
            f"held-out reward {self.name!r} fell by {self.held_out:+.3g}, both by more than {ERRORS:g} standard "
            "errors. Look at samples/; then a larger kl_coef, a gate, fewer iterations, or this reward among the "
            "trained ones."
        )


def alarms(before: dict[str, Tensor], after: dict[str, Tensor], since: int, held_out: Iterable[str]) -> list[Alarm]:
    """Which held-out rewards fell while the trained one rose, from per-sample scores {name: [N]} of two evaluations."""
    trained, error = paired_gain(before[TOTAL], after[TOTAL])
    if trained is None or error is None or trained <= ERRORS * error:
        return []
    found = []
    for name in held_out:
        if name in before and name in after:
            gain, error = paired_gain(before[name], after[name])
            if gain is not None and error is not None and gain < -ERRORS * error:
                found.append(Alarm(name=name, since=since, trained=trained, held_out=gain))
    return found


def scores_of(folder: Path, iteration: int) -> dict[str, Tensor] | None:
    """Per-sample scores that a run keeps of an evaluation; None where it has none."""
    path = folder / "samples" / f"{iteration:06d}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["scores"] | ({TOTAL: found[TOTAL]} if TOTAL in found else {})
    return {name: torch.tensor([math.nan if value is None else value for value in row]) for name, row in rows.items()}


def look(folder: Path, evaluations: Iterable[int], held_out: Iterable[str]) -> list[Alarm]:
    """Alarms of the newest evaluation of a run, compared with the one `WINDOW` before it or the first."""
    done = sorted(evaluations)
    if len(done) < 2:
        return []
    since = done[max(0, len(done) - 1 - WINDOW)]
    before, after = scores_of(folder, since), scores_of(folder, done[-1])
    if before is None or after is None or TOTAL not in before or TOTAL not in after:
        return []
    return alarms(before, after, since, held_out)
