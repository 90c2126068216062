"""Qwen-Image-Edit (arXiv:2508.02324) through diffusers' QwenImageEditPipeline: a prompt says how to change a picture.

The text encoder sees the picture with the prompt, and the network its latents behind those of the state.

Shapes: P prompts, N samples, S tokens of text, D channels of the text, C x h x w latents, R tokens of 4C channels of
all of a prompt's pictures.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from flowrl.models.base import Sources, packed, unpacked
from flowrl.models.qwen_image import Grid, QwenImage, grid
from flowrl.types import Cond, padded, take


class QwenImageEdit(QwenImage):
    """QwenImageEditPipeline as a velocity in flow coordinates.

    Note: as in the pipeline the network gets the picture at about a megapixel, whatever size is generated. The size is
    the model's own; the pipeline's call, where it is given none, takes the shape of the picture.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline",)
    num_sources: ClassVar[tuple[int, int]] = (1, 1)
    area: ClassVar[int] = 1024 * 1024
    """Pixels of a picture as the VAE sees it; its shape stays."""
    area_of_text: ClassVar[int] = 1024 * 1024
    """Pixels of a picture as the text encoder's processor gets it."""

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] and prompt_embeds_mask [P,S], of each prompt with its pictures."""
        parts = [
            self.text([prompt], image=[self.resized(picture, self.area_of_text) for picture in given])
            for prompt, given in zip(prompts, sources, strict=True)
        ]
        return {name: padded([part[name] for part in parts]) for name in parts[0]}

    def encode_sources(self, sources: Sources) -> Cond:
        """source_tokens [P,R,4C] and source_grids [P,most,3], zeros where a prompt has fewer of either."""
        latents = [[self._seen(picture) for picture in given] for given in sources]
        return {
            "source_tokens": padded([torch.cat([packed(x) for x in given], dim=1) for given in latents]),
            "source_grids": padded([torch.tensor([[grid(x) for x in given]]) for given in latents]),
        }

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]. The network takes one shape of pictures at a time: samples go in groups of one shape."""
        kinds, kind = cond["source_grids"].unique(dim=0, return_inverse=True)
        rows = [(kind == k).nonzero().flatten() for k in range(len(kinds))]
        grids = [[(f, h, w) for f, h, w in each if f] for each in kinds.tolist()]
        found = [self._beside(x[i], t[i], take(cond, i), g) for i, g in zip(rows, grids, strict=True)]
        return torch.cat(found)[torch.cat(rows).argsort()]

    def resized(self, picture: Tensor, area: int) -> Image:
        """A picture [3,H,W] in [0,1] at about `area` pixels, of 8 bits, resized as the pipeline does it."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
        from torchvision.transforms.functional import to_pil_image

        width, height, *_ = calculate_dimensions(area, picture.shape[-1] / picture.shape[-2])
        resized: Image = self.pipe.image_processor.resize(to_pil_image(picture), height, width)
        return resized

    def _seen(self, picture: Tensor) -> Tensor:
        """Latents [1,C,h,w] of a picture [3,H,W]."""
        from torchvision.transforms.functional import to_tensor

        return self._encode_media(to_tensor(self.resized(picture, self.area))[None, None])

    def _beside(self, x: Tensor, t: Tensor, cond: Cond, grids: list[Grid]) -> Tensor:
        """Velocity [N,C,h,w] beside source pictures of these grids, the same for all N."""
        length = sum(frames * rows * columns for frames, rows, columns in grids)
        tokens = torch.cat([packed(x), cond["source_tokens"][:, :length].to(x)], dim=1)
        return unpacked(self.said(tokens, t, cond, [grid(x), *grids]), x)
