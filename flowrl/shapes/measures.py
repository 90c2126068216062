"""What is measured on pictures of the built-in world besides the reward: a policy may raise that and lose all of this.

    evaluate_images     the whole table: strict, soft and stricter, fidelity, texture, diversity, with standard errors
    fidelity            how much of a picture is the scene found in it, and how much is texture and background pattern
    diversity           how differently the samples of one prompt are composed
    paired_difference   one model against another on the same prompts and noise

A picture with NaN, or a prompt of another world, has no verdict: NaN, and every mean leaves it out.
Symbols: N pictures, M object slots, G groups of samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.shapes.scenes import CELL, GRID, Scenes, render
from rewards.shapes import BACKGROUND, CATEGORIES, COLORS, Detections, Spec, detect, judge, parse, resize


class Estimate(NamedTuple):
    """A mean over `num` valid samples with its standard error; both NaN where there is none."""

    mean: float
    error: float
    num: int


def estimate(values: Tensor, group: Tensor | None = None) -> Estimate:
    """Mean of the values [N] that are not NaN, and its standard error: for 0/1 values the binomial sqrt(p (1 - p) / n).

    Samples of one group share a prompt, hence luck: with `group` the error is the cluster-robust one, which adds up the
    deviations within a group before it squares them. Groups of one make the two the same.
    """
    valid = ~values.isnan()
    num = int(valid.sum())
    if num == 0:
        return Estimate(math.nan, math.nan, 0)
    kept = values[valid].double()
    deviation = kept - kept.mean()
    if group is not None:
        _, member = torch.unique(group[valid], return_inverse=True)
        deviation = torch.zeros(int(member.max()) + 1, dtype=torch.double).index_add(0, member, deviation)
    return Estimate(float(kept.mean()), float(deviation.square().sum().sqrt()) / num, num)


def paired_difference(a: Tensor, b: Tensor, group: Tensor | None = None) -> Estimate:
    """Mean of b - a over pairs [N] of samples of the same prompt and noise: far less noisy than two separate means."""
    return estimate(b - a, group)


# ------------------------------------------------------------------------------------------------ fidelity


class Fidelity(NamedTuple):
    """N pictures, all [N]: explained in [0, 1], the rest RMS in RGB units."""

    explained: Tensor
    """1 - |picture - redrawn scene| / |picture - plain background|: the share that the scene found in it explains."""
    high_frequency: Tensor
    """RMS of what a 3 x 3 box blur takes away: outlines and speckle. Compare it with that of drawn scenes."""
    background: Tensor
    """RMS deviation from the plain background outside of the objects."""
    fill: Tensor
    """RMS deviation from flat colour inside of the objects."""


def fidelity(images: Tensor, found: Detections | None = None) -> Fidelity:
    """How cleanly pictures [N,3,96,96] show what is in them, whatever was asked for; blank ones explain nothing: 0."""
    found = detect(images) if found is None else found
    used = int(found.num.clamp(max=found.valid.shape[1]).max())  # the rest of the slots is empty in every picture
    scene = render(Scenes(*(field[:, :used] for field in (found.shape, found.xy, found.radius, found.rgb))))
    whole = (images - BACKGROUND).square().flatten(1).mean(1).sqrt()
    rest = (images - scene).square().flatten(1).mean(1).sqrt()
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    fine = (images - blurred).square().flatten(1).mean(1).sqrt()
    explained = (1 - rest / whole.clamp(min=1e-6)).clamp(min=0) * (whole > 1e-6)
    columns = (explained, fine, found.background, found.fill)
    return Fidelity(*(torch.where(found.finite, column, math.nan) for column in columns))


# ------------------------------------------------------------------------------------------------ diversity


class Diversity(NamedTuple):
    """How differently two samples of one prompt are composed, in [0, 1]: means over pairs, then over groups."""

    placement: Estimate
    """Jaccard distance of the sets of grid cells that hold an object."""
    color: Estimate
    """Jaccard distance of the colour counts, over prompts that leave a colour open."""


def diversity(images: Tensor, group: Tensor, prompts: Sequence[str] | None = None) -> Diversity:
    """Spread over the samples of each group [N]; without prompts every colour counts as open.

    It compares what is found in the pictures, not their pixels: speckle would pass for diversity there. And it is a
    mean over pairs, so that it does not depend on how many samples a group has, as a count of different ones would.
    """
    return _diversity(detect(images), group, None if prompts is None else [parse(prompt) for prompt in prompts])


def _diversity(found: Detections, group: Tensor, specs: Sequence[Spec | None] | None) -> Diversity:
    column, row = (found.xy / CELL).floor().clamp(0, GRID - 1).long().unbind(-1)
    cells = _counts(row * GRID + column, found.valid, GRID**2).clamp(max=1)
    colors = _counts(found.color, found.valid, len(COLORS))
    is_open = [specs is None or _leaves_color_open(specs[i]) for i in range(len(group))]
    color_open = torch.tensor(is_open, dtype=torch.bool)
    return Diversity(_spread(cells, group, found.finite), _spread(colors, group, found.finite & color_open))


def _leaves_color_open(spec: Spec | None) -> bool:
    return spec is not None and any(thing.color is None for thing in spec.things)


def _counts(index: Tensor, valid: Tensor, size: int) -> Tensor:
    """How many valid objects [N,M] have each index, [N,size]."""
    return torch.zeros(len(index), size).scatter_add(1, index.clamp(min=0), valid.float())


def _spread(counts: Tensor, group: Tensor, valid: Tensor) -> Estimate:
    """Mean Jaccard distance 1 - sum(min) / sum(max) between the valid rows [N,C] of a group; empty rows are equal."""
    means = []
    for g in torch.unique(group[valid]):
        rows = counts[(group == g) & valid]
        a, b = torch.triu_indices(len(rows), len(rows), 1)
        if len(a):
            most = torch.maximum(rows[a], rows[b]).sum(1)
            shared = torch.minimum(rows[a], rows[b]).sum(1)
            means.append(torch.where(most > 0, 1 - shared / most.clamp(min=1), 0.0).mean())
    return estimate(torch.stack(means) if means else torch.empty(0))


# ------------------------------------------------------------------------------------------------ the table


def judge_images(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Scores of pictures [N,3,H,W] for their prompts, [N] each: strict, soft, stricter; NaN = no verdict."""
    return _judge(detect(resize(images)), [parse(prompt) for prompt in prompts])


def _judge(found: Detections, specs: Sequence[Spec | None]) -> dict[str, Tensor]:
    known = torch.tensor([i for i, spec in enumerate(specs) if spec is not None], dtype=torch.long)
    asked = [spec for spec in specs if spec is not None]
    scores = {key: torch.full((len(specs),), math.nan) for key in ("strict", "soft", "stricter")}
    if asked:
        these = Detections(*(field[known] for field in found))
        verdict = judge(these, asked)
        for key, values in zip(
            scores, (verdict.strict, verdict.soft, judge(these, asked, "stricter").strict), strict=True
        ):
            scores[key][known] = values
    return scores


def quality(images: Tensor, prompts: Sequence[str], group: Tensor) -> dict[str, Estimate]:
    """What no reward pays for: fidelity, high-frequency energy, dirt, and the spread of samples of one prompt.

    The part of `evaluate_images` that the reward `shapes` does not report already.
    """
    table = evaluate_images(images, prompts, group)
    told = ("strict", "soft", "stricter")
    return {name: value for name, value in table.items() if name.partition("/")[0] not in told}


def evaluate_images(images: Tensor, prompts: Sequence[str], group: Tensor) -> dict[str, Estimate]:
    """Everything that is measured on pictures [N,3,H,W] in [0,1] of N prompts; group [N] numbers the prompt of each.

    Keys: strict, soft, stricter; strict/<category>; fidelity, high_frequency, background, fill;
    diversity/placement and diversity/color, whose `num` counts groups.
    """
    images, group = resize(images.detach().float().cpu()), group.cpu()
    specs = [parse(prompt) for prompt in prompts]
    found = detect(images)
    scores = _judge(found, specs)
    table = {key: estimate(values, group) for key, values in scores.items()}
    for category in CATEGORIES:
        chosen = torch.tensor([spec is not None and spec.category == category for spec in specs], dtype=torch.bool)
        if chosen.any():
            table[f"strict/{category}"] = estimate(scores["strict"][chosen], group[chosen])
    clean = fidelity(images, found)
    table["fidelity"] = estimate(clean.explained, group)
    for key in ("high_frequency", "background", "fill"):
        table[key] = estimate(getattr(clean, key), group)
    spread = _diversity(found, group, specs)
    return table | {"diversity/placement": spread.placement, "diversity/color": spread.color}
