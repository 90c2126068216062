"""Stable Diffusion XL (arXiv:2307.01952) through diffusers' StableDiffusionXLPipeline, as a velocity.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flowrl.models.base import Sources
from flowrl.models.sd import SD
from flowrl.types import Cond


class SDXL(SD):
    """StableDiffusionXLPipeline as a velocity in flow coordinates: two text encoders, and the picture's own size.

    The network is told three sizes in pixels (section 2.2): `original_size`, `crops_coords_top_left` and `target_size`
    of inference.json, else the size of the sample, uncropped.
    Note: the pipeline may draw an invisible watermark where that package is installed; here there is none.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    heeds: ClassVar[tuple[str, ...]] = (
        "clip_skip",
        "guidance_rescale",
        "original_size",
        "crops_coords_top_left",
        "target_size",
    )
    empty_prompt: ClassVar[str | None] = None

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] of both encoders, side by side, and pooled_prompt_embeds [P,D'] of the second."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, clip_skip=self.inference.get("clip_skip")
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_negative(self, prompts: list[str], sources: Sources) -> Cond:
        """Zeros, not the empty prompt, where no negative prompt is given and the weights were trained so."""
        negative = self.encode_text(prompts, sources)
        if self.inference.get("negative_prompt") is not None or not self.pipe.config.force_zeros_for_empty_prompt:
            return negative
        return {name: torch.zeros_like(value) for name, value in negative.items()}

    def added(self, z: Tensor, cond: Cond) -> dict[str, Tensor]:
        """text_embeds [N,D'] and time_ids [N,6], in pixels."""
        drawn = tuple(side * self.spatial_factor for side in z.shape[-2:])
        sizes = [
            *(self.inference.get("original_size") or drawn),
            *self.inference.get("crops_coords_top_left", (0, 0)),
            *(self.inference.get("target_size") or drawn),
        ]
        ids = torch.tensor(sizes, dtype=self.dtype, device=z.device).expand(len(z), -1)
        return {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": ids}
