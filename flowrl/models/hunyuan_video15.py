"""HunyuanVideo 1.5 (arXiv:2511.18870) through diffusers' HunyuanVideo15Pipeline, from text.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x f x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.base import JOINT_ATTENTION, PipelineModel, Sources
from flowrl.models.pipeline import ModelError
from flowrl.types import Cond


class HunyuanVideo15(PipelineModel):
    """HunyuanVideo15Pipeline as a velocity in flow coordinates; its own time and velocity are those already.

    Guidance is no argument of this pipeline's call: it belongs to `pipe.guider`, which `pipeline_with` sets.

    Note: masked text and the tokens of an absent image are cut off, where the pipeline carries 1985 of them through
    every block; what is masked changes the velocity by rounding only.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Pipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    video: ClassVar[bool] = True
    fps: ClassVar[float | None] = 24.0
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    guidance_argument: ClassVar[str] = ""

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        # Its attention takes the mask's batch for heads, and fails for more than one video (diffusers PR 13133).
        pipe.vae.enable_slicing()

    def call_defaults(self) -> dict[str, Any]:
        """The size of the aspect ratio's bucket, where none is given."""
        across, down = self.pipe.default_aspect_ratio
        height, width = self.pipe.video_processor.calculate_default_height_width(down, across, self.pipe.target_size)
        return {"height": height, "width": width}

    @property
    def guidance(self) -> float:
        """Classifier-free guidance that the pipeline's guider recommends; 1 = none."""
        config = self.pipe.guider.config
        return max(1.0, float(config.get("guidance_scale", 1.0))) if config.enabled else 1.0

    def check_guidance(self, guidance: float) -> None:
        """ModelError where the guider is not classifier-free guidance of every step."""
        from diffusers import ClassifierFreeGuidance

        guider, config = self.pipe.guider, self.pipe.guider.config
        if guidance > 1 and not (isinstance(guider, ClassifierFreeGuidance) and (config.start, config.stop) == (0, 1)):
            raise ModelError(
                f"model {self.path!r}: its guider is {type(guider).__name__} from {config.start} to {config.stop} of "
                "the steps, but a velocity knows two branches and no steps. Set model.guidance: 1, or give the "
                "pipeline guider=ClassifierFreeGuidance() and save it in a folder of its own."
            )

    def pipeline_with(self, guidance: float) -> Any:
        """The pipeline, its guider set to this guidance."""
        self.pipe.guider = self._guider(guidance)
        return self.pipe

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """What the pipeline's guider makes of two velocities [N,*L]."""
        guided: Tensor = self._guider(guidance).forward(prompted, empty).pred
        return guided

    @property
    def latent_channels(self) -> int:
        """C; the network sees 2 C + 1: the latent, that of a first frame, and where there is one."""
        return int(self.pipe.num_channels_latents)

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer.config.patch_size)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """Texts of Qwen2.5-VL [P,S,D] and, of what stands in quotes, of ByT5 [P,S',D'], each with its mask."""
        embeds, mask, glyphs, glyph_mask = self.pipe.encode_prompt(
            prompt=prompts, batch_size=len(prompts), dtype=self.dtype
        )
        embeds, mask = _without_padding(embeds, mask.bool())
        glyphs, glyph_mask = _without_padding(glyphs, glyph_mask.bool())
        return {
            "prompt_embeds": embeds, "prompt_embeds_mask": mask,
            "prompt_embeds_2": glyphs, "prompt_embeds_mask_2": glyph_mask,
        }  # fmt: skip

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,f,h,w]; the network's timestep is t times the length of the training schedule.

        As in the pipeline, the timestep is rounded to the model's dtype, and no first frame is zeros.
        """
        x = x.to(self.dtype)
        v: Tensor = self.trainable(
            hidden_states=torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1),
            timestep=(t * self.pipe.scheduler.config.num_train_timesteps).to(self.dtype),
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_embeds_mask"],
            encoder_hidden_states_2=cond["prompt_embeds_2"],
            encoder_attention_mask_2=cond["prompt_embeds_mask_2"],
            image_embeds=x.new_zeros(len(x), 1, self.pipe.vision_states_dim),
            return_dict=False,
        )[0]
        return v

    def _guider(self, guidance: float) -> Any:
        return self.pipe.guider.new(guidance_scale=guidance, enabled=True)


def _without_padding(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text [P,S,D] and mask [P,S] up to the last token that any prompt has; at least one."""
    last = int(mask.any(dim=0).nonzero().max()) if mask.any() else 0
    return embeds[:, : last + 1], mask[:, : last + 1]
