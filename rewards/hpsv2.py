"""HPSv2: a CLIP ViT-H trained on what people preferred among pictures of one prompt (arXiv:2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards._clip import Contrast, Trunk, freeze, share, unit
from rewards.card import Card
from rewards.files import Weights, fill, read_tensors
from rewards.preprocess import Preprocess
from rewards.types import RewardError, Sample

__all__ = ["HPSv2"]

_FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
_INSTALL = "pip install open_clip_torch"


class HPSv2(Contrast):
    """cos(picture, prompt) of HPSv2.1 or 2.0 (arXiv:2306.09341), mostly between 0.2 and 0.35; leaderboards print 100 x.

    The longer side becomes 224, the rest is black: nothing of a picture is cut off.

    Note: upstream's own resize of tensors had no antialiasing before torchvision 0.17; here it has, whatever is
    installed, so scores of larger pictures can differ from old published ones.
    """

    name = "hpsv2"
    range = (-1.0, 1.0)
    card = Card(
        source="arXiv:2306.09341, github.com/tgxs002/HPSv2",
        licence="Apache-2.0",
        weights=(Weights("xswu/HPSv2", (_FILES["2.1"],)),),
        memory_gb=3.9,
        packages={"open_clip": _INSTALL},
        note='`version: "2.0"` needs the other file of the same repository.',
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        version: str = "2.1",
        architecture: str = "ViT-H-14",
        checkpoint: bool = False,
    ) -> None:
        """`model`: the .pt file, a folder that has it, or a hub id; `version`: "2.1" or "2.0".

        `architecture`: the name that open_clip has for the network in the file.
        `checkpoint`: recompute the network's layers in the backward pass, for less memory and more time.
        """
        if version not in _FILES:
            raise RewardError(f"hpsv2: version is {version!r}; expected one of {', '.join(map(repr, _FILES))}, quoted")
        self._weights = Weights("xswu/HPSv2", (_FILES[version],)).at(model, revision)
        self._architecture, self._checkpoint = architecture, checkpoint

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Build the network and read the file into it; RewardError names what is missing or does not fit."""
        try:
            import open_clip
        except ImportError as error:
            raise RewardError(f"reward 'hpsv2' needs open_clip: {_INSTALL} ({error})") from error
        path = self._weights.file(self.name)

        def make() -> Trunk:
            config = open_clip.get_model_config(self._architecture)
            if config is None:
                raise RewardError(
                    f"reward 'hpsv2': open_clip has no architecture {self._architecture!r}. Leave the option out for "
                    "the published weights (ViT-H-14); open_clip.list_models() names the others."
                )
            model = open_clip.CLIP(**config)
            fill(model, read_tensors(path), self.name, path)
            model.visual.set_grad_checkpointing(self._checkpoint)
            return freeze(model, device, dtype)

        key = (self._architecture, str(path.resolve()), str(device), dtype, self._checkpoint)
        trunk = share(key, make)
        side, _ = trunk.model.visual.image_size
        self._encoder = _OpenClipEncoder(
            trunk=trunk,
            prepare=Preprocess(size=side, mode="pad"),
            tokenizer=open_clip.get_tokenizer(self._architecture),
        )

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Cosines [N], differentiable."""
        return self.cosines(samples).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class _OpenClipEncoder:
    """`rewards._clip.Encoder` by a CLIP of open_clip, whose vocabulary is in its wheel."""

    trunk: Trunk
    prepare: Preprocess
    tokenizer: Any

    @property
    def scale(self) -> float:
        return self.trunk.scale

    def image_features(self, images: Sequence[Tensor], /) -> Tensor:
        return unit(self.trunk.model.encode_image(self.trunk.place(self.prepare(images))))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], /) -> Tensor:
        return unit(self.trunk.model.encode_text(self.tokenizer(list(texts)).to(self.trunk.device)))
