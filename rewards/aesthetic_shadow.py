"""Aesthetic Shadow, version 2: is a drawing of high quality? A ViT of 1024 x 1024 pixels with two classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards._clip import Trunk, chosen, preprocessing, pretrained
from rewards.card import Card
from rewards.files import Weights
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample

__all__ = ["AestheticShadow"]

_MODEL = Weights("RE-N-Y/aesthetic-shadow-v2", ("config.json", "model.safetensors", "preprocessor_config.json"))


class AestheticShadow:
    """Probability in [0, 1] that a classifier of pictures (Aesthetic Shadow v2) gives to one of its classes, "hq".

    It was made for anime drawings and means nothing on photographs.
    """

    name = "aesthetic_shadow"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (0.0, 1.0)
    deterministic = True
    differentiable = True
    card = Card(
        source="huggingface.co/RE-N-Y/aesthetic-shadow-v2, a copy of shadowlilac/aesthetic-shadow-v2",
        licence="see its card",
        weights=(_MODEL,),
        note="For anime drawings only.",
    )

    def __init__(self, model: str | None = None, revision: str | None = None, label: str = "hq") -> None:
        """`model`: folder or hub id of a classifier of pictures; `label`: the class whose probability is the score."""
        self._model, self._label = chosen(_MODEL, model, revision), label
        self._trunk: Trunk | None = None
        self._prepare: Preprocess
        self._index: int

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read network and preprocessing; RewardError names what is missing, or the classes if `label` is none."""
        prepare = preprocessing(self._model, self.name)
        trunk = pretrained(self._model, self.name, device, dtype, auto="AutoModelForImageClassification")
        index = trunk.model.config.label2id.get(self._label)
        if index is None:
            raise RewardError(
                f"reward 'aesthetic_shadow': {self._model.source!r} has no class {self._label!r}. "
                f"Set `label` to one of: {', '.join(trunk.model.config.label2id)}."
            )
        self._prepare, self._index, self._trunk = prepare, int(index), trunk

    def unload(self) -> None:
        """Let go of the network."""
        self._trunk = None

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Probabilities [N], differentiable."""
        if self._trunk is None:
            raise RewardError("aesthetic_shadow has no weights yet; call load(device, dtype) first (a RewardHub does)")
        pixels = self._trunk.place(self._prepare([sample.media for sample in samples]))
        logits = self._trunk.model(pixel_values=pixels).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[:, self._index]
