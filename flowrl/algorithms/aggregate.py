"""From edges to one number, so that neither micro-batches nor processes change the gradient of an optimiser update.

The convention: an algorithm's `Loss.value` is the mean over the edges it was given. Whoever cuts an update's N edges
into micro-batches (and processes) multiplies each value by its share n / N before `backward()` and adds the gradients
up; the sum is that of the mean over the N edges, whatever the cut. N counts every edge of the update, those with
advantage 0 too. Edges that lead only to samples without a verdict should leave the table before it is cut:
`trajectory.keep_leaves(~rewards.isnan())`.

Answers have different numbers of tokens, so there is more than one mean of a table [N,S] of which a mask tells what
counts. Their shares are told from the `mass` of the parts; the denominators are then those of the whole update.

    token_mean               sum of l / tokens                    DAPO (arXiv:2503.14476)
    seq_mean_token_mean      mean over answers of their mean      GRPO (arXiv:2402.03300), GSPO
    seq_mean_token_sum       mean over answers of their sum       REINFORCE: an answer is one action
    seq_mean_token_sum_norm  the same / horizon, a constant       Dr.GRPO (arXiv:2503.20783)
    token_sum                sum of l

An answer without a token that counts is no answer here.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum"]


def aggregate(loss: Tensor, mask: Tensor, mode: Mode, horizon: int | None = None) -> Tensor:
    """One number [] of the losses [N,S] of the tokens where `mask` [N,S] is True; 0 where there is none.

    `horizon` is the constant of `seq_mean_token_sum_norm`, in tokens; ValueError without one there, or with one
    elsewhere.
    Note: other code divides by the padded width of a batch, which changes from batch to batch.
    """
    check_horizon(mode, horizon)
    return (loss.where(mask, 0.0) * token_weights(mask, mode, horizon).to(loss)).sum()


def token_weights(mask: Tensor, mode: Mode, horizon: int | None = None) -> Tensor:
    """What each token [N,S] weighs in that number, float64."""
    check_horizon(mode, horizon)
    answers, tokens = mass(mask).clamp(min=1).tolist()
    weight = mask.double()
    if mode == "token_mean":
        return weight / tokens
    if mode == "token_sum":
        return weight
    if mode == "seq_mean_token_mean":
        return weight / mask.sum(1, keepdim=True).clamp(min=1) / answers
    return weight / answers / (horizon or 1)


def of_answers(values: Tensor, mask: Tensor, mode: Mode, horizon: int | None = None) -> Tensor:
    """Values [N] of answers as a table [N,S] whose aggregate is their mean.

    Note: with token_mean the mean is one weighted by lengths, and with token_sum it is the sum: with any other weights
    the parts of an update would not add up to the whole.
    """
    check_horizon(mode, horizon)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    each = values[:, None] * mask
    if mode in ("token_mean", "seq_mean_token_mean"):
        return each
    return each / lengths * (horizon or 1)


def mass(mask: Tensor) -> Tensor:
    """Answers with a token that counts, and such tokens, of a mask [N,S], float64 [2]; add it up over parts."""
    lengths = mask.sum(1)
    return torch.stack([(lengths > 0).sum(), lengths.sum()]).double().cpu()


def share(mask: Tensor, total: Tensor, mode: Mode) -> float:
    """What the aggregate of a part [N,S] is multiplied by, so that the parts of mass `total` [2] add up to the whole.

    0 where nothing counts.
    """
    if mode == "token_sum":
        return 1.0
    which = 1 if mode == "token_mean" else 0
    return float(mass(mask)[which]) / max(float(total[which]), 1.0)


def averaged(value: Tensor, mask: Tensor, mode: Mode) -> tuple[Tensor, float]:
    """An aggregate of a part [N,S] as a mean, a sum being made one over tokens, and of how many things it is one."""
    answers, tokens = mass(mask).tolist()
    if mode == "token_sum":
        return value / max(tokens, 1.0), tokens
    return value, tokens if mode == "token_mean" else answers


def check_horizon(mode: Mode, horizon: int | None) -> None:
    """Refuse (ValueError) the one mean that divides by a constant without one, and the others with one."""
    if (mode == "seq_mean_token_sum_norm") != (horizon is not None):
        raise ValueError(
            f"aggregate={mode} with horizon={horizon}: set algorithm.horizon, the tokens that each answer's sum is "
            "divided by (the longest answer allowed, say), for seq_mean_token_sum_norm, and for no other."
        )


def merge_metrics(parts: Sequence[Mapping[str, Tensor]], counts: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """Metrics of micro-batches as those of their union: the largest of each `*_max*`, the smallest of each `*_min*`.

    The others are means, `counts` telling of how many things each. A micro-batch that had nothing to say (NaN) does
    not count, unless none had.
    """
    merged: dict[str, list[tuple[Tensor, float]]] = {}
    for part, count in zip(parts, counts, strict=True):
        for name, value in part.items():
            merged.setdefault(name, []).append((value, count[name]))
    return {name: _merge(name, values) for name, values in merged.items()}


def _merge(name: str, values: list[tuple[Tensor, float]]) -> Tensor:
    stacked = torch.stack([value for value, _ in values])
    if "_max" in name:
        return stacked.max()
    if "_min" in name:
        return stacked.min()
    weight = torch.tensor([num for _, num in values]).to(stacked) * ~stacked.isnan()
    return (stacked.nan_to_num() * weight).sum() / weight.sum()
