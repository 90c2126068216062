"""How good is the policy now: the same held-out prompts and the same noise every time, scored by the run's rewards.

Differences between two evaluations of a run are paired: sample i of both has the same prompt and initial noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.collect import Conditions, Geometry, Guidance, sample, samples_of
from flowrl.policy import Policy
from flowrl.types import Prompt
from rewards import RewardHub

Measure = Callable[[Tensor, Sequence[str], Tensor], Mapping[str, Any]]
"""measure(media [N,3,H,W] or [N,F,3,H,W], prompts, group [N]) -> numbers, or (mean, standard error, ...), by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: per-sample tables, and the summary that people read."""

    prompts: list[Prompt]
    """The prompt of each sample, N."""
    scores: dict[str, Tensor]
    """Each reward and each of its parts (`reward.part`), [N]; NaN = no verdict."""
    measures: dict[str, tuple[float, float | None]]
    """Numbers about the set as a whole, with their standard errors where known."""
    total: Tensor | None = None
    """The reward that is trained on, [N]."""
    media: Tensor | None = None
    """[N,F,3,H,W]; dropped where nobody shows it."""
    texts: Sequence[str] = ()
    """What a model that writes answered, N."""

    def summary(self) -> dict[str, Any]:
        """Mean and standard error of every score, overall and by the prompts' category, as plain numbers."""
        categories = [str(p.metadata.get("category", "")) for p in self.prompts]
        names = sorted(set(categories) - {""})
        out: dict[str, Any] = {"num_samples": len(self.prompts), "scores": {}, "measures": {}}
        of = torch.tensor([names.index(c) if c else -1 for c in categories])
        for name, score in self.scores.items():
            entry = _mean_entry(score)
            if names:
                entry["by_category"] = {c: _mean_entry(score[of == i]) for i, c in enumerate(names)}
            out["scores"][name] = entry
        out["measures"] = {name: {"mean": mean, "se": error} for name, (mean, error) in self.measures.items()}
        return out


def _mean_entry(score: Tensor) -> dict[str, Any]:
    return dict(zip(("mean", "se"), mean_and_error(score), strict=True))


def mean_and_error(score: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard error of the samples with a verdict; None where there are too few."""
    valid = score[score.isfinite()].double()
    if len(valid) == 0:
        return None, None
    return valid.mean().item(), (valid.std() / math.sqrt(len(valid))).item() if len(valid) > 1 else None


def paired_gain(before: Tensor, after: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard error of after - before, sample by sample, over those with both verdicts."""
    return mean_and_error(after.double() - before.double())


def evaluation_prompts(prompts: Sequence[Prompt], num_samples: int) -> list[Prompt]:
    """`num_samples` prompts: categories in equal shares where prompts have them, each category's prompts in turn."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(str(prompt.metadata.get("category", "")), []).append(prompt)
    shares = list(by_category.values())
    chosen = [shares[i % len(shares)][i // len(shares) % len(shares[i % len(shares)])] for i in range(num_samples)]
    return sorted(chosen, key=lambda p: p.id)


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    hub: RewardHub,
    conditions: Conditions,
    geometry: Geometry,
    *,
    num_steps: int,
    seed: int,
    measures: Sequence[Measure] = (),
    batch: int = 150,
    guide: Guidance | None = None,
    held_out: RewardHub | None = None,
) -> Evaluation:
    """Sample one medium for each prompt with the averaged weights, and score it; `guide` changes the velocity.

    `held_out` are rewards that are not trained on.
    """
    with policy.averaged():
        media = sample(
            policy, prompts, range(len(prompts)), conditions, geometry, num_steps=num_steps, seed=seed, batch=batch,
            guide=guide,
        )  # fmt: skip
    ids = {p.id: i for i, p in enumerate(prompts)}
    group = torch.tensor([ids[p.id] for p in prompts])
    samples = samples_of(media, prompts, torch.arange(len(prompts)), group, geometry.fps)
    result, *others = [each(samples) for each in (hub, held_out) if each is not None]
    scores: dict[str, Tensor] = {}
    for answer in (result, *others):
        scores |= answer.scores
        scores |= {f"{name}.{part}": value for name, parts in answer.parts.items() for part, value in parts.items()}
    shown = media[:, 0] if media.shape[1] == 1 else media
    found: dict[str, tuple[float, float | None]] = {}
    for measure in measures:
        for name, value in measure(shown, [p.text for p in prompts], group).items():
            found[name] = (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), None)
    return Evaluation(prompts=list(prompts), scores=scores, total=result.total, measures=found, media=media)
