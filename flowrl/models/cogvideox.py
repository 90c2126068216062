"""CogVideoX 1.0 and 1.5 (arXiv:2408.06072) through diffusers' CogVideoXPipeline, from text.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x f x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flowrl.models.base import Sources
from flowrl.models.pipeline import ModelError
from flowrl.models.vp import VariancePreserving
from flowrl.types import Cond


class CogVideoX(VariancePreserving):
    """CogVideoXPipeline as a velocity: a v-prediction whose table ends in pure noise, so that times begin at 1.

    The first latent is one frame, and the others are decoded in pairs: frames are 1 + 8 k. The network of version 1.5
    sees latents in pairs too, so that one more stands at the front, which is not decoded.

    Note: a pipeline with CogVideoXDPMScheduler walks the same times with second-order, random steps; ours are DDIM's.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    heeds: ClassVar[tuple[str, ...]] = (
        "use_dynamic_cfg",
        "guidance_rescale",
    )
    video: ClassVar[bool] = True
    fps: ClassVar[float | None] = 8.0

    def call_defaults(self) -> dict[str, Any]:
        """Size and frames that the network was trained with, where none are given."""
        config, factor = self.pipe.transformer.config, self.spatial_factor
        return {
            "height": config.sample_height * factor,
            "width": config.sample_width * factor,
            "num_frames": config.sample_frames,
        }

    def check_guidance(self, guidance: float) -> None:
        """ModelError where the pipeline would change the guidance along the steps, or rescale it."""
        super().check_guidance(guidance)
        if guidance > 1 and self.inference.get("use_dynamic_cfg"):
            raise ModelError(
                f"model {self.path!r}: its inference.json sets use_dynamic_cfg, a guidance that depends on how many "
                "steps there are, which a velocity cannot know. Remove it there, or set model.guidance: 1."
            )

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer.config.patch_size)

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, f, h, w) of one video's latent, with what stands at its front; ModelError for a size that cannot be."""
        step = 2 * self.temporal_factor
        if (frames - 1) % step:
            raise ModelError(
                f"{frames} frames: {type(self.pipe).__name__} decodes one, and then {step} at a time; nearest: "
                f"{round((frames - 1) / step) * step + 1}. Set model.frames."
            )
        channels, f, h, w = super().noise_shape(height, width, frames)
        return (channels, self._leading + f, h, w)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] of T5, always S = max_sequence_length: padding is part of what the network learnt."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.inference["max_sequence_length"],
        )
        return {"prompt_embeds": embeds}

    def output(self, z: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The network's v-prediction [N,C,f,h,w] at the variance-preserving state z."""
        said: Tensor = self.trainable(
            hidden_states=self.pipeline_latents(z.to(self.dtype)),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=timestep,
            image_rotary_emb=self._positions(z),
            return_dict=False,
        )[0]
        return said.transpose(1, 2)

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Latents [N,f,C,h,w] of x [N,C,f,h,w]."""
        return x.transpose(1, 2)

    def unscale(self, x0: Tensor) -> Tensor:
        """Latents as the VAE speaks them, of clean latents [N,C,f,h,w], without what stands at the front."""
        return super().unscale(x0[:, :, self._leading :])

    def scale(self, latents: Tensor) -> Tensor:
        """Clean latents [N,C,f,h,w] of what the VAE says; the first is repeated where one stands at the front."""
        clean = super().scale(latents)
        return torch.cat([clean[:, :, :1]] * self._leading + [clean], dim=2)

    @property
    def _leading(self) -> int:
        """Latents at the front that fill the first token of a network with patches in time."""
        return int(self.pipe.transformer.config.patch_size_t or 1) - 1

    def _positions(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings of the tokens of z [N,C,f,h,w], for networks that have no other positions."""
        if not self.pipe.transformer.config.use_rotary_positional_embeddings:
            return None
        f, h, w = z.shape[2:]
        factor = self.spatial_factor
        found: tuple[Tensor, Tensor] = self.pipe._prepare_rotary_positional_embeddings(
            h * factor, w * factor, f, z.device
        )
        return found
