"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752) through diffusers' StableDiffusionPipeline, as a velocity.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from flowrl.models.base import Sources
from flowrl.models.pipeline import ModelError
from flowrl.models.vp import VariancePreserving
from flowrl.types import Cond


class SD(VariancePreserving):
    """StableDiffusionPipeline as a velocity in flow coordinates; weights that predict eps (1.5) or v (2.1).

    Note: the safety checker is not asked: a black picture is no sample of the model.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    heeds: ClassVar[tuple[str, ...]] = (
        "clip_skip",
        "guidance_rescale",
    )
    components: ClassVar[tuple[str, ...]] = ("unet",)

    def network(self) -> nn.Module:
        """The U-Net; ModelError where it takes guidance as an input, as consistency distillation leaves it."""
        if self.pipe.unet.config.time_cond_proj_dim is not None:
            raise ModelError(
                f"model {self.path!r}: its U-Net is distilled for a few steps and takes guidance as an input, which "
                "flowrl does not give to this family. Use the weights that it was distilled from."
            )
        return super().network()

    def call_defaults(self) -> dict[str, Any]:
        """The size that the weights were trained with, as the pipeline's call has it."""
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return {"height": height * self.pipe.vae_scale_factor, "width": width * self.pipe.vae_scale_factor}

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.pipe.unet.config.in_channels)

    @property
    def patch(self) -> int:
        """One: the U-Net pads what it cannot halve."""
        return 1

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D], padded to the tokenizer's length (77), which the network sees whole."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, self.pipe._execution_device, 1, False, clip_skip=self.inference.get("clip_skip")
        )
        return {"prompt_embeds": embeds}

    def output(self, z: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """eps or the v-prediction, [N,C,h,w]."""
        said: Tensor = self.trainable(
            z.to(self.dtype), timestep, encoder_hidden_states=cond["prompt_embeds"],
            added_cond_kwargs=self.added(z, cond), return_dict=False,
        )[0]  # fmt: skip
        return said

    def added(self, z: Tensor, cond: Cond) -> dict[str, Tensor] | None:
        """What the U-Net sees besides the text's tokens."""
        return None
