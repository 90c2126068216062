"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206) through diffusers' StableDiffusion3Pipeline; the built-in world too.

Everything the pipeline's call does has its counterpart here, so that what is trained is what the pipeline will sample.
Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.pipeline import ModelError, chunked, first_given
from flowrl.types import Cond

_CALL = ("num_inference_steps", "guidance_scale", "max_sequence_length", "height", "width")
# Defaults of the pipeline's call. Without a T5 encoder it appends max_sequence_length zero tokens all the same.
_DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 7.0, "max_sequence_length": 256}
_ENCODE_AT_ONCE = 32


class SD3:
    """StableDiffusion3Pipeline as a velocity in flow coordinates; SD3's own time and velocity are those already.

    `grid` is "scheduler", the times of pipe(num_inference_steps=T), or "linear", those of pipe(sigmas=[1, ..., 1/T]);
    the model's own shift applies to both. None takes "linear" where the folder's `inference.json` passes sigmas.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    component: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )

    def __init__(
        self,
        pipe: Any,
        *,
        path: str = "",
        inference: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        grid: Literal["scheduler", "linear"] | None = None,
        decode_micro_batch: int | None = None,
    ) -> None:
        self.pipe, self.path = pipe, path or pipe.name_or_path or ""
        self.trainable: torch.nn.Module = pipe.transformer
        self.dtype: torch.dtype = pipe.transformer.dtype
        self.decode_micro_batch = decode_micro_batch
        given = {"height": height, "width": width, "max_sequence_length": max_sequence_length}
        side = pipe.default_sample_size * pipe.vae_scale_factor
        recommended = dict(inference or {})
        linear = recommended.pop("sigmas", None) is not None
        self.grid = grid or ("linear" if linear else "scheduler")
        names = tuple(dict.fromkeys([*_CALL, *recommended]))
        self.inference = first_given(names, given, recommended, _DEFAULTS, {"height": side, "width": side})
        self._empty: tuple[Tensor, Tensor] | None = None

    @property
    def height(self) -> int:
        """Pixels, where nothing else is asked for."""
        return int(self.inference["height"])

    @property
    def width(self) -> int:
        """Pixels, where nothing else is asked for."""
        return int(self.inference["width"])

    def arguments(self, **overrides: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call that reproduce this model's samples; give what differs in a run."""
        call = first_given(tuple(dict.fromkeys([*self.inference, *overrides])), overrides, self.inference)
        if self.grid == "linear":
            call["sigmas"] = _linear_sigmas(call["num_inference_steps"])
        return call

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, h, w) of one image's latent."""
        if frames != 1:
            raise ModelError(f"{frames} frames asked of {type(self.pipe).__name__}, which makes images; set frames: 1.")
        factor = self.pipe.vae_scale_factor
        step = factor * self.pipe.patch_size
        if height % step or width % step:
            nearest = f"{max(1, round(height / step)) * step} x {max(1, round(width / step)) * step}"
            raise ModelError(f"{height} x {width} pixels: both sides must be multiples of {step}; nearest: {nearest}.")
        return (self.pipe.transformer.config.in_channels, height // factor, width // factor)

    def times(self, num_steps: int, height: int, width: int, frames: int = 1) -> Tensor:
        """The scheduler's own sigmas [T+1], float32: shift, resolution-dependent shift and terminal value included.

        Note: the scheduler's grid of a shifted model ends with a tiny step (0.0089 for SD3, T = 10); it is what
        inference walks, and so it is kept. `grid="linear"` has no such step.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes it
        sigmas = _linear_sigmas(num_steps) if self.grid == "linear" else None
        mu = self._shift(height, width) if scheduler.config.get("use_dynamic_shifting") else None
        scheduler.set_timesteps(None if sigmas else num_steps, sigmas=sigmas, mu=mu)
        return scheduler.sigmas.to("cpu", torch.float32)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """prompt_embeds [P,S,D], pooled_prompt_embeds [P,D'], and the empty prompt's as negative_*, which are views."""
        if self._empty is None:
            self._empty = self._encode([""])
        parts = [self._encode(prompts[i : i + _ENCODE_AT_ONCE]) for i in range(0, len(prompts), _ENCODE_AT_ONCE)]
        embeds, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        empty, empty_pooled = (tensor.to(embeds.device) for tensor in self._empty)
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": empty.expand_as(embeds),
            "negative_pooled_prompt_embeds": empty_pooled.expand_as(pooled),
        }

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Velocity [N,C,h,w] float32 at x [N,C,h,w], t [N]; guidance > 1: one batch of 2N, the empty prompt first."""
        embeds, pooled = cond["prompt_embeds"], cond["pooled_prompt_embeds"]
        if guidance > 1:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            embeds = torch.cat([cond["negative_prompt_embeds"], embeds])
            pooled = torch.cat([cond["negative_pooled_prompt_embeds"], pooled])
        # Autocast lets the trained weights be float32 while the rest computes in the model's dtype.
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            v = self.trainable(
                hidden_states=x.to(self.dtype),
                timestep=t.to(x.device, torch.float32) * self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=embeds.to(x.device, self.dtype),
                pooled_projections=pooled.to(x.device, self.dtype),
                return_dict=False,
            )[0].float()
        if guidance > 1:
            empty, prompted = v.chunk(2)
            return empty + guidance * (prompted - empty)
        return v

    def decode(self, x0: Tensor) -> Tensor:
        """Media [N,1,3,H,W] float32 in [0,1] of latents [N,C,h,w]; differentiable (micro-batches then save nothing).

        The clamp to [0, 1] passes gradients as if it were not there, so that a saturated pixel still learns.
        """
        return chunked(self._decode, x0, self.decode_micro_batch)

    @torch.no_grad()
    def encode_media(self, media: Tensor) -> Tensor:
        """Latents [N,C,h,w] float32 of media [N,F,3,H,W] in [0,1], the inverse of `decode`; micro-batched as it is.

        Of a VAE with a posterior it is the mode, never a sample, so the same picture always gives the same latent. The
        result lies where the VAE does. ModelError for several frames, or sides that the model cannot generate.
        """
        self.noise_shape(media.shape[-2], media.shape[-1], media.shape[1])
        return chunked(self._encode_media, media, self.decode_micro_batch)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.pipe.transformer.enable_gradient_checkpointing()

    def enable_tiling(self) -> None:
        """Decode and encode large pictures in overlapping tiles, for less memory; seams are blended, not exact."""
        if not hasattr(self.pipe.vae, "enable_tiling"):
            raise ModelError(
                f"{type(self.pipe.vae).__name__} cannot work in tiles. "
                "Leave tiling off; decode fewer pictures at a time, or smaller ones."
            )
        self.pipe.vae.enable_tiling()

    def to(self, device: str | torch.device) -> SD3:
        """Moves every network."""
        self.pipe.to(device)
        return self

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.inference["max_sequence_length"],
        )
        return embeds, pooled

    def _decode(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = x0.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(latents, return_dict=False)[0]
        return _clamp(image.float() * 0.5 + 0.5).unsqueeze(1)

    def _encode_media(self, media: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixels = media[:, 0].to(vae.device, vae.dtype) * 2 - 1
        found = vae.encode(pixels, return_dict=False)[0]
        latents = found if isinstance(found, Tensor) else found.mode()  # AutoencoderTiny has no posterior
        return (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor

    def _shift(self, height: int, width: int) -> float:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = self.pipe.scheduler.config
        _, h, w = self.noise_shape(height, width)
        tokens = (h // self.pipe.patch_size) * (w // self.pipe.patch_size)
        ends = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return float(calculate_shift(tokens, *ends))


def _clamp(image: Tensor) -> Tensor:
    """To [0, 1], with the gradient of the identity where one is asked for; the values are those of a plain clamp.

    With a gradient an infinity becomes NaN, which is no verdict, instead of an innocent 1.
    """
    clamped = image.clamp(0, 1)
    if not image.requires_grad:
        return clamped
    return clamped.detach() + (image - image.detach())  # of a finite number an exact 0


def _linear_sigmas(num_steps: int) -> list[float]:
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
