"""The weighted harmonic mean of two rewards: high where both are (lambda-Harmonic of RPO, arXiv:2407.12164).

    r = 1 / (lambda / (a + 1e-8) + (1 - lambda) / (b + 1e-8))        lambda = 1 gives a, lambda = 0 gives b

a and b are a similarity and an alignment brought to [0, 1] by their rewards' ranges: (1 + cos) / 2 for a cosine. RPO
trains on labels from lambda = 0 and stops early by lambda = 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.card import Card
from rewards.contract import as_scores
from rewards.resolve import build
from rewards.types import MediaKind, Reward, RewardError, Sample, Scope, Scores, Traits, traits_of

__all__ = ["Harmonic", "harmonic"]

_EPS = 1e-8


def harmonic(similarity: Tensor, alignment: Tensor, weight: float) -> Tensor:
    """1 / (weight / a + (1 - weight) / b) [N] of a and b [N] in [0, 1]; where the weight of one is 0, the other."""
    return 1 / (weight / (similarity + _EPS) + (1 - weight) / (alignment + _EPS))


class Harmonic:
    """Weighted harmonic mean of two rewards, in [0, 1] (lambda-Harmonic of RPO, arXiv:2407.12164).

    Parts: similarity and alignment, both in [0, 1]; info: what each of them said. One that has no weight is not asked.
    """

    name = "harmonic"
    scope: Scope = "sample"
    range = (0.0, 1.0)
    card = Card(
        source="lambda-Harmonic of RPO, arXiv:2407.12164", note="needs what the two rewards need that it is made of"
    )

    def __init__(
        self,
        similarity: str = "shapes",
        alignment: str = "shapes_clip",
        similarity_weight: float = 0.3,
        similarity_options: Mapping[str, Any] | None = None,
        alignment_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`similarity` and `alignment`: what a reward's `use` can be; both judge single samples and declare a range.

        similarity_weight   lambda in [0, 1]: the share of the similarity
        *_options           options of the two
        """
        if not 0 <= similarity_weight <= 1:
            raise RewardError(f"harmonic: similarity_weight is {similarity_weight!r}; expected a number from 0 to 1")
        self.weight = float(similarity_weight)
        asked = {
            "similarity": (similarity, similarity_options, self.weight),
            "alignment": (alignment, alignment_options, 1 - self.weight),
        }
        self._members: dict[str, tuple[Reward, float, float]] = {}
        traits: list[Traits] = []
        for part, (use, options, weight) in asked.items():
            if weight > 0:
                member, own = _member(part, use, options)
                assert own.range is not None
                self._members[part] = (member, *own.range)
                traits.append(own)
        self.media: frozenset[MediaKind] = frozenset.intersection(*(t.media for t in traits))
        if not self.media:
            raise RewardError(f"harmonic: {similarity!r} and {alignment!r} judge different media; name two that agree")
        self.needs = tuple(dict.fromkeys(key for t in traits for key in t.needs))
        self.deterministic = all(t.deterministic for t in traits)
        self.device = next((t.device for t in traits if t.device), None)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load both."""
        for member, *_ in self._members.values():
            if callable(load := getattr(member, "load", None)):
                load(device, dtype)

    def unload(self) -> None:
        """Let both go."""
        for member, *_ in self._members.values():
            if callable(unload := getattr(member, "unload", None)):
                unload()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Harmonic means [N]; NaN where one of the two has no verdict."""
        said = {
            part: as_scores(member.score(samples), len(samples), f"harmonic ({part})")
            for part, (member, *_) in self._members.items()
        }
        parts = {
            part: (said[part].value - low).div(high - low).clamp(0, 1) for part, (_, low, high) in self._members.items()
        }
        told = zip(*(scores.info for scores in said.values()), strict=True)
        info = [_merged(dict(zip(said, entries, strict=True))) for entries in told]
        if len(parts) == 1:
            return Scores(value=next(iter(parts.values())), parts=parts, info=info)
        return Scores(value=harmonic(parts["similarity"], parts["alignment"], self.weight), parts=parts, info=info)


def _merged(said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One sample's info from {part: its member's info}: the first error is its error; failed if one of them has."""
    info: dict[str, Any] = {part: entry for part, entry in said.items() if entry}
    errors = [f"{part}: {entry['error']}" for part, entry in said.items() if "error" in entry]
    failed = any(entry.get("failed") for entry in said.values())
    return info | ({"error": errors[0]} if errors else {}) | ({"failed": True} if failed else {})


def _member(part: str, use: str, options: Mapping[str, Any] | None) -> tuple[Reward, Traits]:
    try:
        member = build(use, options or {})
    except RewardError as error:
        raise type(error)(f"harmonic: {part} {use!r}: {error}") from error
    traits = traits_of(member)
    if traits.scope == "group":
        raise RewardError(f"harmonic: {part} {use!r} compares whole groups; name a reward of single samples")
    if traits.range is None:
        raise RewardError(
            f"harmonic: {part} {use!r} declares no range, so nobody knows what is high; declare(range=(low, high)) it"
        )
    return member, traits
