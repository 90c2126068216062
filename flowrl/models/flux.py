"""FLUX.1-dev and -schnell (Black Forest Labs, 2024) through diffusers' FluxPipeline.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents. A token of the network is a square of
2 x 2 latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.base import JOINT_ATTENTION, PipelineModel, Sources, network_time, packed, unpacked
from flowrl.types import Cond


class Flux(PipelineModel):
    """FluxPipeline as a velocity in flow coordinates; FLUX's own time and velocity are those already.

    Embedded guidance (`guidance_scale`, which -schnell has not) and classifier-free guidance (`true_cfg_scale`) are two
    things, and may both be on.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    embedded_argument: ClassVar[str | None] = "guidance_scale"

    @property
    def takes_embedded_guidance(self) -> bool:
        """Whether the network has an input for guidance."""
        return super().takes_embedded_guidance and bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def latent_channels(self) -> int:
        """C; the network counts those of a token."""
        return int(self.pipe.transformer.config.in_channels) // self.patch**2

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Tokens [N,S,4C]."""
        return packed(x)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] of T5, always max_sequence_length long, and pooled_prompt_embeds [P,D'] of CLIP."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, max_sequence_length=self.inference["max_sequence_length"]
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]."""
        tokens, places = self.image_tokens(x, cond)
        text = cond["prompt_embeds"]
        v: Tensor = self.trainable(
            hidden_states=tokens.to(self.dtype),
            timestep=network_time(t, self.dtype),
            guidance=self.told_guidance(t),
            pooled_projections=cond["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], places.shape[1]),
            img_ids=places.to(self.dtype),
            return_dict=False,
        )[0]
        return unpacked(v, x)

    def image_tokens(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Tokens [N,S,4C] of the pictures that the network sees, x's own first, and their places [S,3]."""
        return packed(x), grid(x, [0])

    def told_guidance(self, t: Tensor) -> Tensor | None:
        """What the network is told of guidance [N], float32; None where it cannot be told."""
        name = self.embedded_argument
        if name is None or not self.takes_embedded_guidance:
            return None
        return torch.full_like(t, self.inference[name])


def grid(x: Tensor, kinds: Sequence[int]) -> Tensor:
    """Places [S,3] of the tokens of one picture x [...,h,w] of each kind: kind, row, column; integers."""
    rows, columns = (torch.arange(side // 2, device=x.device) for side in x.shape[-2:])
    return torch.cartesian_prod(torch.tensor(kinds, dtype=rows.dtype, device=x.device), rows, columns)
