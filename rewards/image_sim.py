"""How alike are a picture and a reference? DINO-I or CLIP-I of DreamBooth (arXiv:2208.12242): a cosine of features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import folder
from rewards._clip import Trunk, chosen, preprocessing, pretrained, unit
from rewards.card import Card
from rewards.files import Weights
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample, Scores, no_verdict

__all__ = ["ImageSim"]

_MODEL = Weights("facebook/dinov2-base", ("config.json", "model.safetensors", "preprocessor_config.json"))
_POOLER = r"pooler\."
"""A layer behind the CLS token, which is not looked at; many a ViT is published without it."""


class ImageSim:
    """Cosine in [-1, 1] of the features of a picture and of `meta["reference"]` (arXiv:2208.12242).

    The reference is the path of an image file (a relative one starts at the working directory) or a tensor [3,H,W] in
    [0,1]. DINOv2, the default, sees what a thing looks like and is compared by its CLS token; a CLIP or SigLIP sees
    what it is. A copy of the reference scores 1: keep a reward for the prompt beside it.

    Note: the paper's DINO-I is by the first DINO's ViT-S/16.
    """

    name = "image_sim"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (-1.0, 1.0)
    needs = ("reference",)
    deterministic = True
    differentiable = True
    card = Card(
        source="arXiv:2208.12242, with DINOv2 (arXiv:2304.07193)",
        licence="Apache-2.0 (facebook/dinov2-base); of others see their card",
        weights=(_MODEL,),
        memory_gb=0.35,
        note='Samples need meta["reference"]: an image file, or a tensor.',
    )

    def __init__(self, model: str | None = None, revision: str | None = None) -> None:
        """`model`: folder or hub id of a DINOv2 or another ViT with a CLS token (DINO-I), or of a CLIP (CLIP-I)."""
        self._model = chosen(_MODEL, model, revision)
        self._trunk: Trunk | None = None
        self._prepare: Preprocess

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read network and preprocessing; RewardError names what is missing."""
        self._prepare = preprocessing(self._model, self.name)
        self._trunk = pretrained(self._model, self.name, device, dtype, unused=_POOLER)

    def unload(self) -> None:
        """Let go of the network; it leaves the memory when no other reward holds it."""
        self._trunk = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Cosines [N], differentiable in the pictures; a reference that several samples share is seen once.

        NaN, with the reason, where the reference is no picture.
        """
        given = [_key(sample.meta["reference"]) for sample in samples]
        seen, errors = _references({key: sample.meta["reference"] for key, sample in zip(given, samples, strict=True)})
        info = [{"error": errors[key]} if key in errors else {} for key in given]
        rows = [row for row, key in enumerate(given) if key in seen]
        if not rows:
            return Scores(value=no_verdict(len(samples)), info=info)
        with torch.no_grad():
            references = self._features(list(seen.values()))[[list(seen).index(given[row]) for row in rows]]
        cosines = (self._features([samples[row].media for row in rows]) * references).sum(-1).clamp(-1, 1)
        value = cosines.new_full((len(samples),), float("nan"))
        value[rows] = cosines
        return Scores(value=value, info=info)

    def _features(self, images: Sequence[Tensor]) -> Tensor:
        """Features [N,D] of length 1."""
        if self._trunk is None:
            raise RewardError("image_sim has no weights yet; call load(device, dtype) first (a RewardHub does)")
        model, pixels = self._trunk.model, self._trunk.place(self._prepare(images))
        if hasattr(model, "get_image_features"):
            return unit(model.get_image_features(pixel_values=pixels).pooler_output)
        return unit(model(pixel_values=pixels).last_hidden_state[:, 0])


def _references(given: dict[Hashable, Any]) -> tuple[dict[Hashable, Tensor], dict[Hashable, str]]:
    """Those that are pictures [3,H,W] by key, and what is wrong with the others."""
    seen, errors = {}, {}
    for key, reference in given.items():
        try:
            seen[key] = folder.reference(reference)
        except RewardError as error:
            errors[key] = str(error)
    return seen, errors


def _key(reference: Any) -> Hashable:
    """What two samples with the same reference have in common."""
    return str(reference) if isinstance(reference, str | Path) else id(reference)
