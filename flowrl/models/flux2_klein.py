"""FLUX.2-klein (Black Forest Labs, 2026), base and distilled, through diffusers' Flux2KleinPipeline."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flowrl.models.flux2 import Flux2
from flowrl.models.pipeline import ModelError


class Flux2Klein(Flux2):
    """Flux2KleinPipeline as a velocity: a smaller FLUX.2 with classifier-free guidance, or distilled to few steps.

    Note: its pipeline's other branch is always the empty prompt.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    heeds: ClassVar[tuple[str, ...]] = ("text_encoder_out_layers",)
    guidance_argument: ClassVar[str] = "guidance_scale"
    embedded_argument: ClassVar[str | None] = None

    @property
    def distilled(self) -> bool:
        """Whether these weights were distilled to a few steps without guidance."""
        return bool(self.pipe.config.is_distilled)

    def call_defaults(self) -> dict[str, Any]:
        """The size, and of distilled weights the four steps without guidance that they are made for."""
        few = {"num_inference_steps": 4, "guidance_scale": 1.0} if self.distilled else {}
        return super().call_defaults() | few

    def check_guidance(self, guidance: float) -> None:
        """ModelError for guidance of distilled weights, whose pipeline ignores it."""
        if guidance > 1 and self.distilled:
            raise ModelError(
                f"model {self.path!r}: guidance is {guidance:g}, but these weights were distilled to few steps, and "
                "their pipeline ignores it. Set model.guidance: 1, or take the -base weights."
            )

    def pipeline_output(self, x0: Tensor) -> Tensor:
        """Latents [N,C,h,w] as the VAE speaks them."""
        return self.unscale(x0)
