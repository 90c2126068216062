"""LTX-Video (arXiv:2501.00103) through diffusers' LTXPipeline.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x f x h x w latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.base import PipelineModel, Sources
from flowrl.types import Cond


class LTX(PipelineModel):
    """LTXPipeline as a velocity in flow coordinates; its own time and velocity are those already.

    Positions of tokens are in seconds, by `frame_rate` of the call, which `fps` is here.

    Note: VAEs with `timestep_conditioning` decode with noise: as much as `decode_noise_scale` of the call says, and
    some inside the decoder of version 0.9.1. Here it is the same noise for every video, so that equal latents are equal
    videos; each is what the pipeline gives for that video alone with a generator seeded 0.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    video: ClassVar[bool] = True
    fps: ClassVar[float | None] = 25.0
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    further_arguments: ClassVar[tuple[str, ...]] = (
        "frame_rate",
        "guidance_rescale",
        "decode_timestep",
        "decode_noise_scale",
    )

    def __init__(
        self, pipe: Any, *, fps: float | None = None, inference: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        given = dict(inference or {}) | ({} if fps is None else {"frame_rate": fps})
        super().__init__(pipe, inference=given, **options)
        self.fps = float(self.inference["frame_rate"])  # type: ignore[misc]  # positions are in seconds

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent, in height and width."""
        return int(self.pipe.vae_spatial_compression_ratio)

    @property
    def temporal_factor(self) -> int:
        """Frames to a latent, of all but the first frame."""
        return int(self.pipe.vae_temporal_compression_ratio)

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer_spatial_patch_size)

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """Latents of one sample in space and time, by which the scheduler moves its times."""
        _, f, h, w = self.noise_shape(height, width, frames)
        return f * h * w

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] of T5, and prompt_attention_mask [P,S]."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.inference["max_sequence_length"],
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,f,h,w]; the network sees tokens, and t times the length of the training schedule."""
        f, h, w = x.shape[2:]
        spatial = self.spatial_factor
        v: Tensor = self.trainable(
            hidden_states=self.pipeline_latents(x.to(self.dtype)),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=t * self.pipe.scheduler.config.num_train_timesteps,
            encoder_attention_mask=cond["prompt_attention_mask"],
            num_frames=f,
            height=h,
            width=w,
            rope_interpolation_scale=(self.temporal_factor / self.inference["frame_rate"], spatial, spatial),
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents(v, f, h, w, self.patch, self.pipe.transformer_temporal_patch_size)
        return unpacked

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """Classifier-free guidance of two velocities [N,*L], its spread brought back by `guidance_rescale`."""
        from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg

        guided = super().guide(prompted, empty, guidance, t)
        rescaled: Tensor = rescale_noise_cfg(  # type: ignore[no-untyped-call]
            guided, prompted, self.inference["guidance_rescale"]
        )
        return rescaled

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Tokens [N, f h w, C] of latents [N,C,f,h,w]."""
        packed: Tensor = self.pipe._pack_latents(x, self.patch, self.pipe.transformer_temporal_patch_size)
        return packed

    def unscale(self, x0: Tensor) -> Tensor:
        """Latents as the VAE speaks them, of clean latents [N,C,f,h,w]."""
        mean, std = self._statistics(x0)
        return x0 * std / self.pipe.vae.config.scaling_factor + mean

    def scale(self, latents: Tensor) -> Tensor:
        """Clean latents [N,C,f,h,w] of what the VAE says."""
        mean, std = self._statistics(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std

    def pixels(self, latents: Tensor) -> Tensor:
        """Videos [N,3,F,H,W] in [-1,1] of latents as the VAE speaks them, with fixed noise where it wants some."""
        vae = self.pipe.vae
        if not vae.config.timestep_conditioning:
            return super().pixels(latents)
        t = float(self.inference["decode_timestep"])
        share = float(self.inference.get("decode_noise_scale", t))
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
        at = latents.new_full((len(latents),), t)
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(0)
            media: Tensor = vae.decode((1 - share) * latents + share * noise, at, return_dict=False)[0]
        return media

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's latents by channel, [1,C,1,1,1]; this VAE has them among its weights."""
        vae, shape = self.pipe.vae, (1, -1, 1, 1, 1)
        return vae.latents_mean.to(like).reshape(shape), vae.latents_std.to(like).reshape(shape)
