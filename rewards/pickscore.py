"""PickScore: a CLIP ViT-H trained on choices that people made between two pictures (arXiv:2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards._clip import Contrast, chosen, encoder
from rewards.card import Card
from rewards.files import Weights
from rewards.types import Sample

__all__ = ["PickScore"]

_MODEL = Weights("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors"))
_TOKENIZER = Weights(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
)


class PickScore(Contrast):
    """exp(logit_scale) * cos(picture, prompt) of PickScore (arXiv:2305.01569, eq. 1), mostly between 15 and 26.

    The prompt is given as it is, and cut after 77 tokens. Others divide: by 26 (Flow-GRPO) or by 20 (SRPO);
    `norm: {affine: [0, 26]}` does so here.
    """

    name = "pickscore"
    card = Card(
        source="arXiv:2305.01569, github.com/yuvalkirstain/PickScore",
        licence="see its card",
        weights=(_MODEL, _TOKENIZER),
        memory_gb=3.9,
        note="`model` and `tokenizer` may be folders of yours.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        """`model`, `tokenizer`: folder or hub id; the weights' repository and that of the CLIP which they began as.

        `checkpoint`: recompute the network's layers in the backward pass, for less memory and more time.
        """
        self._model, self._checkpoint = chosen(_MODEL, model, revision), checkpoint
        self._tokenizer = chosen(_TOKENIZER, tokenizer, None)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read network and tokenizer; RewardError names what is missing."""
        self._encoder = encoder(
            self._model, self.name, device, dtype, tokenizer=self._tokenizer, checkpoint=self._checkpoint
        )

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], differentiable."""
        return self.scale * self.cosines(samples)
