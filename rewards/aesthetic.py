"""The LAION aesthetic predictor, version 2, of github.com/christophschuhmann/improved-aesthetic-predictor.

    score = w . f + b        f = CLIP ViT-L features of the picture, of length 1

The published head has five linear layers with nothing but dropout between them: in use they are one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewards._clip import Trunk, chosen, clip_preprocess, dual, unit
from rewards.card import Card
from rewards.files import Weights, read_tensors
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample

__all__ = ["Aesthetic"]

_MODEL = Weights("openai/clip-vit-large-patch14", ("config.json", "model.safetensors"))
_HEAD = Weights("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",))


class Aesthetic:
    """LAION's aesthetic score (version 2) of a picture, whatever its prompt; mostly between 4.5 and 7.

    It was fitted to ratings from 1 to 10, but a linear head has no bounds, so no range is declared: `norm: unit` is
    `{unit: [1, 10]}` here. A policy that maximises nothing else ends in painterly pictures of anything: keep a reward
    for the prompt beside it.
    """

    name = "aesthetic"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    differentiable = True
    card = Card(
        source="github.com/christophschuhmann/improved-aesthetic-predictor",
        licence="MIT (CLIP); of the head see its card",
        weights=(_MODEL, _HEAD),
        memory_gb=1.7,
        note="`head` may be the author's own sac+logos+ava1-l14-linearMSE.pth. `clipscore` shares its network.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        head: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        """`model`: folder or hub id of the CLIP; `head`: file, or folder or hub id that has aesthetic-model.pth.

        `checkpoint`: recompute the network's layers in the backward pass, for less memory and more time.
        """
        self._model, self._checkpoint = chosen(_MODEL, model, revision), checkpoint
        self._head = _HEAD.at(head)
        self._trunk: Trunk | None = None
        self._prepare: Preprocess
        self._line: tuple[Tensor, Tensor]

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read network and head; RewardError names what is missing or does not fit."""
        path = self._head.file(self.name)
        trunk = dual(self._model, self.name, device, dtype, checkpoint=self._checkpoint)
        prepare = clip_preprocess(trunk, self._model, self.name)
        weight, bias = collapse(read_tensors(path))
        width = trunk.model.config.projection_dim
        if weight.shape != (1, width):
            raise RewardError(
                f"reward 'aesthetic': {path} turns {weight.shape[1]} features into {weight.shape[0]} numbers, but "
                f"{self._model.source!r} has {width} and one is wanted. Mend: give the CLIP that the head was made for."
            )
        wide = torch.promote_types(dtype, torch.float32)  # a score of 5.43 is 5.44 in bfloat16
        self._line = weight[0].to(device, wide), bias[0].to(device, wide)
        self._prepare, self._trunk = prepare, trunk

    def unload(self) -> None:
        """Let go of the network; it leaves the memory when no other reward holds it."""
        self._trunk = None

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], differentiable."""
        if self._trunk is None:
            raise RewardError("aesthetic has no weights yet; call load(device, dtype) first (a RewardHub does)")
        pixels = self._trunk.place(self._prepare([sample.media for sample in samples]))
        features = unit(self._trunk.model.get_image_features(pixel_values=pixels).pooler_output)
        weight, bias = self._line
        return features @ weight + bias


def collapse(layers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight [O,D] and bias [O], in float64, of linear layers in a row, named `layers.<n>.weight` and `.bias`."""
    numbers = sorted(int(found[1]) for name in layers if (found := re.fullmatch(r"layers\.(\d+)\.weight", name)))
    if not numbers or any(f"layers.{number}.bias" not in layers for number in numbers):
        raise RewardError(
            f"reward 'aesthetic': the head has {', '.join(list(layers)[:3]) or 'nothing'}; expected layers.0.weight, "
            "layers.0.bias, ... Mend: give sac+logos+ava1-l14-linearMSE.pth or a copy of it."
        )
    pairs = [(layers[f"layers.{n}.weight"].double(), layers[f"layers.{n}.bias"].double()) for n in numbers]
    weight, bias = pairs[0]
    for w, b in pairs[1:]:
        weight, bias = w @ weight, w @ bias + b
    return weight, bias
