"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206) through diffusers' StableDiffusion3Pipeline; the built-in world too.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from flowrl.models.base import JOINT_ATTENTION, PipelineModel, Sources
from flowrl.types import Cond


class SD3(PipelineModel):
    """StableDiffusion3Pipeline as a velocity in flow coordinates; SD3's own time and velocity are those already."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.patch_size)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] and pooled_prompt_embeds [P,D'].

        Note: without a T5 encoder the pipeline appends max_sequence_length zero tokens all the same.
        """
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.inference["max_sequence_length"],
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]; the network's timestep is t times the length of the training schedule."""
        v: Tensor = self.trainable(
            hidden_states=x.to(self.dtype),
            timestep=t * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return v
