"""From edges to one number, so that neither micro-batches nor processes change the gradient of an optimiser update.

The convention: an algorithm's `Loss.value` is the mean over the edges it was given. Whoever cuts an update's N edges
into micro-batches (and processes) multiplies each value by its share n / N before `backward()` and adds the gradients
up; the sum is that of the mean over the N edges, whatever the cut. N counts every edge of the update, those with
advantage 0 too. Edges that lead only to samples without a verdict should leave the table before it is cut:
`trajectory.keep_leaves(~rewards.isnan())`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def merge_metrics(parts: Sequence[Mapping[str, Tensor]], num_edges: Sequence[int]) -> dict[str, Tensor]:
    """Metrics of micro-batches as those of their union: the largest of each `*_max*`, else the mean over rows.

    A micro-batch that had nothing to say (NaN) does not count, unless none had.
    """
    merged: dict[str, list[tuple[Tensor, int]]] = {}
    for part, num in zip(parts, num_edges, strict=True):
        for name, value in part.items():
            merged.setdefault(name, []).append((value, num))
    return {name: _merge(name, values) for name, values in merged.items()}


def _merge(name: str, values: list[tuple[Tensor, int]]) -> Tensor:
    stacked = torch.stack([value for value, _ in values])
    if "_max" in name:
        return stacked.max()
    weight = torch.tensor([num for _, num in values]).to(stacked) * ~stacked.isnan()
    return (stacked.nan_to_num() * weight).sum() / weight.sum()
