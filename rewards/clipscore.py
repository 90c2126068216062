"""CLIPScore: how well a picture fits its prompt, as the cosine of CLIP features (Hessel et al., arXiv:2104.08718).

cosine        cos                       in [-1, 1]
hessel        2.5 max(cos, 0)           the paper's, in [0, 2.5]
torchmetrics  100 max(cos, 0)           that library's, in [0, 100]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards._clip import Contrast, chosen, encoder
from rewards.card import Card
from rewards.files import Weights
from rewards.types import RewardError, Sample

__all__ = ["CLIPScore"]

_MODEL = Weights(
    "openai/clip-vit-large-patch14",
    (
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
        "vocab.json", "merges.txt",
    ),
)  # fmt: skip
_FACTORS = {"hessel": 2.5, "torchmetrics": 100.0}


class CLIPScore(Contrast):
    """Cosine of a picture's and its prompt's features by any CLIP or SigLIP (arXiv:2104.08718).

    Picture size, crop and tokenizer are the checkpoint's own. The clipped scales have no gradient below 0.

    Note: the paper puts "A photo depicts" before a caption; here a prompt is given as it is, as rewards do.
    """

    name = "clipscore"
    card = Card(
        source="arXiv:2104.08718",
        licence="MIT (openai/clip-vit-large-patch14); of others see their card",
        weights=(_MODEL,),
        memory_gb=1.7,
        note="`model` may be any CLIP or SigLIP of a fixed picture size. `aesthetic` shares its network.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        scale: str = "cosine",
        checkpoint: bool = False,
    ) -> None:
        """`model`: folder or hub id of a CLIP or SigLIP; `scale`: "cosine", "hessel" or "torchmetrics".

        `checkpoint`: recompute the network's layers in the backward pass, for less memory and more time.
        """
        if scale != "cosine" and scale not in _FACTORS:
            raise RewardError(f"clipscore: scale is {scale!r}; expected one of cosine, {', '.join(_FACTORS)}")
        self._model, self._checkpoint = chosen(_MODEL, model, revision), checkpoint
        self._factor = _FACTORS.get(scale)
        self.range = (-1.0, 1.0) if self._factor is None else (0.0, self._factor)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read network, tokenizer and preprocessing; RewardError names what is missing."""
        self._encoder = encoder(
            self._model, self.name, device, dtype, own_preprocessing=True, checkpoint=self._checkpoint
        )

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], differentiable."""
        cosines = self.cosines(samples).clamp(-1, 1)
        return cosines if self._factor is None else self._factor * cosines.clamp(min=0)
