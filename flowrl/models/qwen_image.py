"""Qwen-Image (arXiv:2508.02324) through diffusers' QwenImagePipeline.

Shapes: P prompts, N samples, S tokens of text, D channels of the text, C x h x w latents, whose tokens are squares of
2 x 2: R = h/2 x w/2 of them, with 4C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.base import JOINT_ATTENTION, PipelineModel, Sources, network_time, packed, unpacked
from flowrl.types import Cond

Grid = tuple[int, int, int]
"""Frames, rows and columns of a picture's tokens, from which the network makes their places."""


class QwenImage(PipelineModel):
    """QwenImagePipeline as a velocity in flow coordinates; its time and velocity are those already.

    Note: the VAE is one of videos that gets one frame. It clamps what it decodes by itself, so a saturated pixel has no
    gradient, other than `decode` says.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    empty_prompt: ClassVar[str] = " "

    @property
    def latent_channels(self) -> int:
        """C; the network sees 2 x 2 latents as one token."""
        return int(self.pipe.transformer.config.in_channels) // 4

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] and prompt_embeds_mask [P,S]."""
        return self.text(prompts)

    def text(self, prompts: list[str], **seen: Any) -> Cond:
        """What the pipeline's text encoder makes of prompts, and of what is `seen` with them; with a mask always."""
        length = self.inference["max_sequence_length"]
        embeds, mask = self.pipe.encode_prompt(prompt=prompts, max_sequence_length=length, **seen)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]; the network's timestep is t."""
        return unpacked(self.said(packed(x), t, cond, [grid(x)]), x)

    def said(self, tokens: Tensor, t: Tensor, cond: Cond, grids: Sequence[Grid]) -> Tensor:
        """What the network says of the tokens [N,R,4C] of pictures with these grids, one picture after the other."""
        longest = int(cond["prompt_embeds_mask"].sum(dim=1).max())
        mask = cond["prompt_embeds_mask"][:, :longest]
        v: Tensor = self.trainable(
            hidden_states=tokens.to(self.dtype),
            timestep=network_time(t, self.dtype),
            encoder_hidden_states=cond["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=None if mask.all() else mask,  # fast attention kernels take no mask
            img_shapes=[list(grids)] * len(tokens),
            return_dict=False,
        )[0]
        return v

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """Guidance of two velocities [N,C,h,w] that leaves each token as long as the prompted one."""
        guided = packed(super().guide(prompted, empty, guidance, t))
        length = packed(prompted).norm(dim=-1, keepdim=True)
        return unpacked(guided * (length / guided.norm(dim=-1, keepdim=True)), prompted)

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Tokens [N,R,4C]."""
        return packed(x)

    def pixels(self, latents: Tensor) -> Tensor:
        """Pictures [N,3,H,W] in [-1,1] of latents [N,C,h,w] as the VAE speaks them."""
        return super().pixels(latents.unsqueeze(2)).squeeze(2)

    def _encode_media(self, media: Tensor) -> Tensor:
        vae = self.pipe.vae
        frame = media.to(vae.device, vae.dtype).transpose(1, 2) * 2 - 1
        return self.scale(vae.encode(frame, return_dict=False)[0].mode().squeeze(2).float())


def grid(x: Tensor) -> Grid:
    """The grid of the tokens of latents [N,C,h,w]."""
    return (1, x.shape[-2] // 2, x.shape[-1] // 2)
