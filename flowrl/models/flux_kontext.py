"""FLUX.1-Kontext (arXiv:2506.15742), which edits a picture, through diffusers' FluxKontextPipeline.

Shapes: P prompts, N samples, S tokens, C x h' x w' latents of a source.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flowrl.models.base import Sources, packed
from flowrl.models.flux import Flux, grid
from flowrl.types import Cond


class FluxKontext(Flux):
    """FluxKontextPipeline as a velocity: FLUX.1-dev that sees the tokens of one source picture after its own.

    Note: the network gives all rows of a batch the same places, so every source is brought to one size. It is what the
    pipeline makes of a source with the proportions of the model's own pictures.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)
    heeds: ClassVar[tuple[str, ...]] = (
        "_auto_resize",
        "max_area",
    )
    num_sources: ClassVar[tuple[int, int]] = (1, 1)

    def arguments(self, *, guidance: float | None = None, **overrides: Any) -> dict[str, Any]:
        """As of every family, with the area without which the call goes back to a megapixel."""
        call = super().arguments(guidance=guidance, **overrides)
        return {**call, "max_area": call["height"] * call["width"]}

    def encode_sources(self, sources: Sources) -> Cond:
        """image_latents [P,C,h',w']."""
        from torchvision.transforms.functional import to_pil_image

        height, width = self.source_size()
        # As PIL, which is what users hand to the pipeline: tensors would be resized in another way.
        pictures = [to_pil_image(picture) for (picture,) in sources]
        pixels = self.pipe.image_processor.preprocess(pictures, height, width)
        return {"image_latents": self.encode_media(pixels.unsqueeze(1) * 0.5 + 0.5)}

    def source_size(self) -> tuple[int, int]:
        """Height and width of sources: of the pipeline's sizes, all about a megapixel, that nearest in proportion.

        Where the call's argument `_auto_resize` is false (in model.inference, or inference.json), the model's own size.
        """
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        if not self.inference.get("_auto_resize", True):
            return self.height, self.width
        step, wanted = self.spatial_factor * self.patch, self.width / self.height
        _, width, height = min((abs(wanted - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return height // step * step, width // step * step

    def image_tokens(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Tokens [N,S,4C] and places [S,3] of x, then of its source, whose kind is 1."""
        tokens, places = super().image_tokens(x, cond)
        source = cond["image_latents"]
        return torch.cat([tokens, packed(source)], dim=1), torch.cat([places, grid(source, [1])])
