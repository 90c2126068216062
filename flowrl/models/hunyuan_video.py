"""HunyuanVideo (arXiv:2412.03603) through diffusers' HunyuanVideoPipeline.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x f x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from flowrl.models.base import JOINT_ATTENTION, PipelineModel, Sources
from flowrl.types import Cond


class HunyuanVideo(PipelineModel):
    """HunyuanVideoPipeline as a velocity in flow coordinates; its own time and velocity are those already.

    The published weights are distilled: guidance is an input of the network (`embedded_guidance`). True guidance
    (`true_cfg_scale` of the call) comes on top of it, where a run asks for some.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    video: ClassVar[bool] = True
    fps: ClassVar[float | None] = 24.0
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    embedded_argument: ClassVar[str | None] = "guidance_scale"
    further_arguments: ClassVar[tuple[str, ...]] = ("prompt_template",)

    @property
    def takes_embedded_guidance(self) -> bool:
        """Whether the network has an input for guidance."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer.config.patch_size)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] of Llama with prompt_attention_mask [P,S], and pooled_prompt_embeds [P,D'] of CLIP.

        Llama reads the prompt inside the call's `prompt_template`.
        """
        embeds, pooled, mask = self.pipe.encode_prompt(
            prompt=prompts,
            max_sequence_length=self.inference["max_sequence_length"],
            prompt_template=self.inference["prompt_template"],
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask.bool(), "pooled_prompt_embeds": pooled}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,f,h,w]; the network's timestep is t times the length of the training schedule."""
        v: Tensor = self.trainable(
            hidden_states=x.to(self.dtype),
            timestep=(t * self.pipe.scheduler.config.num_train_timesteps).to(self.dtype),  # as the pipeline rounds it
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_attention_mask"],
            pooled_projections=cond["pooled_prompt_embeds"],
            **self._embedded(t),
            return_dict=False,
        )[0]
        return v

    def _embedded(self, t: Tensor) -> dict[str, Any]:
        """The network's input for guidance, in thousandths [N], where it has one."""
        if not self.takes_embedded_guidance:
            return {}
        scale = float(self.inference["guidance_scale"])
        return {"guidance": t.new_full(t.shape, scale, dtype=self.dtype) * 1000.0}
