"""FLUX.2-dev (Black Forest Labs, 2025), which may be shown pictures, through diffusers' Flux2Pipeline.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents, K source pictures of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from flowrl.models.base import Sources, network_time, packed, unpacked
from flowrl.models.flux import Flux, grid
from flowrl.models.pipeline import ModelError, first_given
from flowrl.types import Cond, padded

IMAGES, MASK = "image_latents", "image_mask"
SOURCE_KIND = 10
"""How far a source's tokens are from those before it, on the first axis of places."""


class Flux2(Flux):
    """Flux2Pipeline as a velocity in flow coordinates: guidance is embedded, and up to ten pictures may be shown.

    Note: the pipeline shows one set of pictures to all prompts, each in its own size. Here each prompt has its own, and
    since all rows of a batch have the same places they are cropped to the proportions of the model's own pictures.
    Note: the pipeline sets no limit to the number of pictures; ten is flowrl's.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2Pipeline",)
    heeds: ClassVar[tuple[str, ...]] = ("text_encoder_out_layers",)
    lora_targets: ClassVar[tuple[str, ...]] = (*Flux.lora_targets, "to_qkv_mlp_proj")
    guidance_argument: ClassVar[str] = ""
    num_sources: ClassVar[tuple[int, int]] = (0, 10)

    def check_guidance(self, guidance: float) -> None:
        """ModelError for classifier-free guidance, which the pipeline does not have."""
        if guidance > 1:
            raise ModelError(
                f"model {self.path!r}: guidance is {guidance:g}, but {type(self.pipe).__name__} has no classifier-free "
                "guidance, since it was distilled into these weights. Set model.guidance: 1; the guidance that the "
                "network is told is model.embedded_guidance."
            )

    def shift(self, num_steps: int, height: int, width: int, frames: int) -> float:
        """FLUX.2's mu, an empirical function of tokens and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(self.num_tokens(height, width, frames), num_steps))

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Patches [N,4C,h/2,w/2]."""
        return pixel_unshuffle(x, 2)

    def pipeline_output(self, x0: Tensor) -> Tensor:
        """Tokens [N,S,4C]."""
        return packed(x0)

    def unscale(self, x0: Tensor) -> Tensor:
        """Latents as the VAE speaks them, of clean latents [N,C,h,w]; its statistics are those of patches."""
        mean, std = self.patch_statistics(x0)
        return pixel_shuffle(pixel_unshuffle(x0, 2) * std + mean, 2)

    def scale(self, latents: Tensor) -> Tensor:
        """Clean latents [N,C,h,w] of what the VAE says."""
        mean, std = self.patch_statistics(latents)
        return pixel_shuffle((pixel_unshuffle(latents, 2) - mean) / std, 2)

    def patch_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's patches by channel, each [1,4C,1,1]."""
        vae = self.pipe.vae
        mean, variance = vae.bn.running_mean.to(like), vae.bn.running_var.to(like)
        return mean.reshape(1, -1, 1, 1), (variance + vae.config.batch_norm_eps).sqrt().reshape(1, -1, 1, 1)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D], always max_sequence_length long: some layers of the language model side by side."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=prompts,
            max_sequence_length=self.inference["max_sequence_length"],
            **first_given(("text_encoder_out_layers",), self.inference),
        )
        return {"prompt_embeds": embeds}

    def encode_sources(self, sources: Sources) -> Cond:
        """image_latents [P,K,C,h',w'] of up to K sources a prompt, and image_mask [P,K]; nothing where none has any."""
        if not sources:
            return {}
        counts = [len(given) for given in sources]
        pictures = [picture for given in sources for picture in given] or [torch.zeros(3, self.height, self.width)]
        latents = self.encode_media(self.source_pixels(pictures).unsqueeze(1))[: sum(counts)]
        return {
            IMAGES: padded([given.unsqueeze(0) for given in latents.split(counts)]),
            MASK: padded([torch.ones(1, count, dtype=torch.bool) for count in counts]),
        }

    def source_pixels(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pixels [M,3,H',W'] in [0,1] of sources, each [3,H,W]: of the model's size, at most a megapixel."""
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import to_pil_image

        processor, step = self.pipe.image_processor, self.spatial_factor * self.patch
        size = (self.width, self.height)
        fitted = [ImageOps.fit(to_pil_image(picture), size, Image.Resampling.LANCZOS) for picture in pictures]
        fitted = [processor._resize_if_exceeds_area(picture) for picture in fitted]
        width, height = (side // step * step for side in fitted[0].size)
        pixels: Tensor = processor.preprocess(fitted, height=height, width=width, resize_mode="crop")
        return pixels * 0.5 + 0.5

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]."""
        tokens, places = self.image_tokens(x, cond)
        text = cond["prompt_embeds"]
        v: Tensor = self.trainable(
            hidden_states=tokens.to(self.dtype),
            timestep=network_time(t, self.dtype),
            guidance=self.told_guidance(t),
            encoder_hidden_states=text,
            txt_ids=pad(torch.arange(text.shape[1], device=x.device).unsqueeze(1), (3, 0)),
            img_ids=pad(places, (0, 1)),
            joint_attention_kwargs=seen_tokens(text.shape[1] + tokens.shape[1], cond),
            return_dict=False,
        )[0]
        return unpacked(v, x)

    def image_tokens(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Tokens [N,S,4C] and places [S,3] of x, then of the sources, whose kinds are 10, 20, ..."""
        tokens, places = super().image_tokens(x, cond)
        if IMAGES not in cond:
            return tokens, places
        sources = cond[IMAGES]
        kinds = [SOURCE_KIND * (k + 1) for k in range(sources.shape[1])]
        shown = packed(sources.flatten(0, 1)).reshape(len(x), -1, tokens.shape[2])
        return torch.cat([tokens, shown], dim=1), torch.cat([places, grid(sources, kinds)])


def seen_tokens(count: int, cond: Cond) -> dict[str, Tensor] | None:
    """The attention's mask where some rows have fewer sources than others, whose tokens are the last of `count`."""
    mask = cond.get(MASK)
    if mask is None or bool(mask.all()):
        return None  # without a mask every kernel of attention can be taken
    sources = mask.repeat_interleave(cond[IMAGES].shape[-2] * cond[IMAGES].shape[-1] // 4, dim=1)
    return {"attention_mask": pad(sources, (count - sources.shape[1], 0), value=True)[:, None, None]}
