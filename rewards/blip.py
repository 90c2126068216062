"""How well do picture and prompt match? The two heads of BLIP (arXiv:2201.12086, section 3.2), differentiable.

    blip.itm   P(match), softmax of the image-text matching head: the text is read while looking at the picture
    blip.itc   cosine of picture and text features, which do not see each other (image-text contrast)

Note: the text is read as a whole, up to as many tokens as the network has places for (512); BLIP was trained on
captions of at most 35.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards._clip import Trunk, pretrained
from rewards.card import Card
from rewards.files import Weights
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample

__all__ = ["itc", "itm"]

_WEIGHTS = Weights(
    "Salesforce/blip-itm-large-coco",
    ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
_INTERPOLATIONS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""By PIL's numbers."""


class _Blip:
    """A checkpoint of BlipForImageTextRetrieval with its tokenizer and preprocessing, and the way to both heads.

    Shapes: N samples, P patches, W the width.
    """

    name: ClassVar[str]
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    differentiable = True
    card = Card(
        source="BLIP, arXiv:2201.12086",
        licence="BSD-3-Clause",
        weights=(_WEIGHTS,),
        memory_gb=1.8,
        note="Both heads share one network. Pictures are squashed to a square, whatever their shape.",
    )

    def __init__(self, model: str | None = None, revision: str | None = None) -> None:
        """`model`: folder or hub id of a BlipForImageTextRetrieval (safetensors) with its processor.

        Default: Salesforce/blip-itm-large-coco. `revision`: branch, tag or commit on the hub.
        """
        self._weights = _WEIGHTS.at(model, revision)
        self._trunk: Trunk | None = None
        self._tokenizer: Any = None
        self._preprocess: Preprocess

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read processor and weights; RewardError if they are missing or not all there."""
        import transformers

        auto: Any = transformers  # most of its functions have no types
        processor = self._weights.pretrained(self.name, auto.BlipProcessor.from_pretrained)
        trunk = pretrained(self._weights, self.name, device, dtype, auto="BlipForImageTextRetrieval")
        side = trunk.model.config.vision_config.image_size
        self._preprocess = _preprocess(self.name, processor.image_processor, side)
        self._trunk, self._tokenizer = trunk, processor.tokenizer

    def unload(self) -> None:
        """Let network and tokenizer go; the network leaves the memory when the other head does not hold it."""
        self._trunk = self._tokenizer = None

    @property
    def _model(self) -> Any:
        return self._loaded.model

    @property
    def _loaded(self) -> Trunk:
        if self._trunk is None:
            raise RewardError(f"{self.name} has no weights yet; call load(device, dtype) first (a RewardHub does)")
        return self._trunk

    def _pictures(self, samples: Sequence[Sample]) -> Tensor:
        """What is seen, [N,P+1,W]."""
        trunk = self._loaded
        pixels = trunk.place(self._preprocess([sample.media for sample in samples]))
        return trunk.model.vision_model(pixel_values=pixels).last_hidden_state

    def _texts(self, samples: Sequence[Sample], seen: Tensor | None) -> Tensor:
        """The class token [N,W] of the prompts, read while looking at `seen` or at nothing."""
        read = self._tokenizer(
            [sample.prompt for sample in samples],
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._loaded.device)
        return self._model.text_encoder(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state[:, 0]


class itm(_Blip):
    """Probability in [0, 1] that picture and prompt match, by BLIP's matching head (arXiv:2201.12086)."""

    name = "blip.itm"
    range = (0.0, 1.0)

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Probabilities [N]; gradients reach the pixels."""
        seen = self._pictures(samples)
        return _full(self._model.itm_head(self._texts(samples, seen))).softmax(-1)[:, 1]


class itc(_Blip):
    """Cosine in [-1, 1] of BLIP's picture and text features (arXiv:2201.12086)."""

    name = "blip.itc"
    range = (-1.0, 1.0)

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Cosines [N]; gradients reach the pixels."""
        seen = self._pictures(samples)
        picture, text = self._model.vision_proj(seen[:, 0]), self._model.text_proj(self._texts(samples, seen=None))
        return F.cosine_similarity(_full(picture), _full(text))


def _preprocess(reward: str, images: Any, side: int) -> Preprocess:
    """As the checkpoint's processor would; RewardError unless it makes what the network sees, `side` x `side`."""
    height, width = images.size["height"], images.size["width"]
    if not height == width == side:
        raise RewardError(
            f"reward {reward!r}: the processor makes pictures of {height} x {width}, the network sees {side} x {side}. "
            "Mend: give a folder whose preprocessor_config.json belongs to its config.json."
        )
    return Preprocess(
        size=side,
        mode="squash",
        interpolation=_INTERPOLATIONS[int(images.resample)],
        mean=tuple(images.image_mean),
        std=tuple(images.image_std),
    )


def _full(tensor: Tensor) -> Tensor:
    """At least fp32, for a score's last digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
