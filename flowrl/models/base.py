"""What the families share: a diffusers pipeline as a velocity in flow coordinates. A family adds what is its own.

Everything the pipeline's call does has its counterpart here, so that what is trained is what the pipeline will sample.
A family gives four things: which conditions it makes of prompts (`encode_text`, `encode_sources`), what its network
says at a state (`predict`), the shape of its latents, and what the pipeline does to its scheduler. The rest is here.

Shapes: P prompts, N samples, C x h x w latents of an image, C x f x h x w of a video, F frames of H x W pixels.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowrl.models.pipeline import ModelError, chunked, first_given
from flowrl.types import Cond, padded

Sources = Sequence[tuple[Tensor, ...]]
"""The source pictures of each prompt, each [3,H,W] in [0,1]: what an editing model edits, where a video begins."""

NEGATIVE = "negative_"
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of networks in which text and picture attend to each other, each with weights of its own."""
_ENCODE_AT_ONCE = 32
_TRAIN_STEPS = 1000


class PipelineModel(ABC):
    """A diffusers pipeline as a velocity in flow coordinates; frozen weights, float32 states.

    `grid` is "scheduler", the times of scheduler.set_timesteps(T), or "linear", those of sigmas [1, ..., 1/T]; the
    model's own shift applies to both. None is what the pipeline's call does, or "linear" where the folder's
    `inference.json` passes sigmas. `embedded_guidance` is a number that a distilled network takes as an input.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Pipeline classes of diffusers that the family serves."""
    components: ClassVar[tuple[str, ...]] = ("transformer",)
    """Parts of the pipeline that learn; several where experts share the times among them."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of layers, matched at their end, that adapters go to by default."""
    video: ClassVar[bool] = False
    """Whether latents have a dimension of time."""
    fps: ClassVar[float | None] = None
    """Frames per second that the family was trained with."""
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "scheduler"
    """Whether the pipeline's call passes sigmas of its own to the scheduler."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """Argument of the pipeline's call that is classifier-free guidance; empty where it has none."""
    embedded_argument: ClassVar[str | None] = None
    """Argument of the pipeline's call that is embedded guidance, where the network has such an input."""
    further_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the pipeline's call that the family looks at besides those that all look at."""
    heeds: ClassVar[tuple[str, ...]] = ()
    """Arguments in inference.json that the family reads or refuses, besides those of every family."""
    empty_prompt: ClassVar[str | None] = ""
    """The other branch of guidance, where no negative prompt is given; None: the pipeline's call is given none too."""
    num_sources: ClassVar[tuple[int, int]] = (0, 0)
    """How few and how many source pictures a prompt may have."""

    def __init__(
        self,
        pipe: Any,
        *,
        path: str = "",
        inference: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        max_sequence_length: int | None = None,
        grid: Literal["scheduler", "linear"] | None = None,
        embedded_guidance: float | None = None,
        negative_prompt: str | None = None,
        decode_micro_batch: int | None = None,
    ) -> None:
        self.pipe, self.path = pipe, path or pipe.name_or_path or ""
        self._check_pipeline()
        self.trainable: nn.Module = self.network()
        self.dtype: torch.dtype = getattr(pipe, self.components[0]).dtype
        self.decode_micro_batch = decode_micro_batch
        if fps is not None:
            self.fps = fps  # type: ignore[misc]
        self.stays: set[str] = set()
        """Parts of the pipeline that `to` leaves where they are."""
        if embedded_guidance is not None and not self.takes_embedded_guidance:
            raise ModelError(
                f"model {self.path!r}: embedded_guidance is {embedded_guidance:g}, but {type(pipe).__name__} of these "
                "weights has no such input. Leave model.embedded_guidance out; model.guidance is classifier-free."
            )
        recommended = dict(inference or {})
        linear = recommended.pop("sigmas", None) is not None
        self.grid = grid or ("linear" if linear else self.grid_of_call)
        given = {
            "height": height, "width": width, "num_frames": frames, "max_sequence_length": max_sequence_length,
            "negative_prompt": negative_prompt,
        } | ({self.embedded_argument: embedded_guidance} if self.embedded_argument else {})  # fmt: skip
        call = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
        if negative_prompt is not None and "negative_prompt" not in call:
            raise ModelError(
                f"model {self.path!r}: the call of {type(pipe).__name__} takes no negative prompt. "
                "Leave model.negative_prompt out."
            )
        names = ("num_inference_steps", self.guidance_argument, self.embedded_argument, "max_sequence_length",
                 "height", "width", "num_frames", "negative_prompt", *self.further_arguments)  # fmt: skip
        known = tuple(dict.fromkeys([*(name for name in names if name in call), *recommended]))
        self.inference: dict[str, Any] = first_given(known, given, recommended, self.call_defaults(), call)
        """Arguments of the pipeline's call that reproduce this model's samples, besides those of a run."""
        ignored = sorted(set(recommended) - set(names) - set(self.heeds))
        if ignored:
            warnings.warn(
                f"model {self.path!r}: its inference.json (or model.inference) sets {', '.join(ignored)}, which "
                f"{type(self).__name__} does not heed: training draws without, the exported call has it. Remove it.",
                stacklevel=2,
            )
        self._empty: Cond | None = None

    # -------------------------------------------------------------------------------- what a family may change

    def network(self) -> nn.Module:
        """What learns: the one component, or a module that holds several by their names (`components`)."""
        module: nn.Module = getattr(self.pipe, self.components[0])
        return module

    def call_defaults(self) -> dict[str, Any]:
        """Arguments that the pipeline's call works out where they are not given, such as the size."""
        if not hasattr(self.pipe, "default_sample_size"):
            return {}
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return {"height": side, "width": side}

    @property
    def takes_embedded_guidance(self) -> bool:
        """Whether the network has an input for guidance; of a family that can, some weights do not."""
        return self.embedded_argument is not None

    def check_guidance(self, guidance: float) -> None:  # noqa: B027
        """ModelError where these weights must not be guided, such as distilled ones."""

    @abstractmethod
    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """Conditions of prompts, each tensor [P, S, ...]; where lengths S may differ, a mask [P,S] is among them.

        `sources` is empty unless the family takes source pictures (`num_sources`).
        """

    def encode_negative(self, prompts: list[str], sources: Sources) -> Cond:
        """Conditions [P, ...] of the other branch's prompts, where the pipeline makes them in its own way."""
        return self.encode_text(prompts, sources)

    def encode_sources(self, sources: Sources) -> Cond:
        """Conditions [P, ...] of the source pictures, the same for both branches of guidance."""
        return {}

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] that the network says at x [N,*L], t [N] (both float32); conditions are [N, ...].

        They have come to the device, and the floating ones to the model's dtype.
        """

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598) of two velocities [N,*L]."""
        return empty + guidance * (prompted - empty)

    def start(self, noise: Tensor, t: float) -> Tensor:
        """The state at the first time t of a grid from standard noise [N,*L]; the noise itself where t = 1 is noise."""
        return noise

    def pipeline_with(self, guidance: float) -> Any:
        """The pipeline; where its call takes no guidance, it is set to draw with this one."""
        return self.pipe

    def pipeline_latents(self, x: Tensor) -> Tensor:
        """Latents [N,*L] as the pipeline's call takes them (`latents=`)."""
        return x

    def pipeline_output(self, x0: Tensor) -> Tensor:
        """Clean latents [N,*L] as the pipeline's call gives them (output_type="latent")."""
        return self.pipeline_latents(x0)

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.pipe.transformer.config.in_channels)

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent, in height and width."""
        return int(getattr(self.pipe, "vae_scale_factor_spatial", None) or self.pipe.vae_scale_factor)

    @property
    def temporal_factor(self) -> int:
        """Frames to a latent, of all but the first frame."""
        return int(getattr(self.pipe, "vae_scale_factor_temporal", 1))

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return 2

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """Tokens of one sample, by which a scheduler with a dynamic shift moves its times."""
        *_, h, w = self.noise_shape(height, width, frames)
        return (h // self.patch) * (w // self.patch)

    def shift(self, num_steps: int, height: int, width: int, frames: int) -> float:
        """mu of a scheduler with a dynamic shift (arXiv:2403.03206, section 5.3.2): a line through two lengths."""
        from samplers import dynamic_shift

        config = self.pipe.scheduler.config
        ends = {
            "base_seq_len": config.get("base_image_seq_len", 256),
            "max_seq_len": config.get("max_image_seq_len", 4096),
        }
        shifts = {"base_shift": config.get("base_shift", 0.5), "max_shift": config.get("max_shift", 1.15)}
        return dynamic_shift(self.num_tokens(height, width, frames), **ends, **shifts)

    def unscale(self, x0: Tensor) -> Tensor:
        """Latents as the VAE speaks them, of clean latents [N,*L]; the inverse of `scale`."""
        config = self.pipe.vae.config
        if config.get("latents_mean") is not None:
            mean, std = self._statistics(x0)
            return x0 * std + mean
        return x0 / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def scale(self, latents: Tensor) -> Tensor:
        """Clean latents [N,*L] of what the VAE says."""
        config = self.pipe.vae.config
        if config.get("latents_mean") is not None:
            mean, std = self._statistics(latents)
            return (latents - mean) / std
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        """What the VAE makes of latents as it speaks them: pictures [N,3,H,W], or videos [N,3,F,H,W], in [-1,1]."""
        media: Tensor = self.pipe.vae.decode(latents, return_dict=False)[0]
        return media

    # -------------------------------------------------------------------------------- what all families do

    @property
    def height(self) -> int:
        """Pixels, where nothing else is asked for."""
        return int(self.inference["height"])

    @property
    def width(self) -> int:
        """Pixels, where nothing else is asked for."""
        return int(self.inference["width"])

    @property
    def frames(self) -> int:
        """Frames, where nothing else is asked for; 1 of a model of images."""
        return int(self.inference.get("num_frames", 1))

    @property
    def guidance(self) -> float:
        """Classifier-free guidance that the folder or the pipeline recommends; 1 = none."""
        return max(1.0, float(self.inference.get(self.guidance_argument) or 1.0))

    def arguments(self, *, guidance: float | None = None, **overrides: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call that reproduce this model's samples; give what differs in a run."""
        asked = guidance is not None and self.guidance_argument
        own = {self.guidance_argument: guidance, **overrides} if asked else overrides
        call = first_given(tuple(dict.fromkeys([*self.inference, *own])), own, self.inference)
        guided = (self.guidance if guidance is None else guidance) > 1 and self.empty_prompt is not None
        if guided and "negative_prompt" in inspect.signature(type(self.pipe).__call__).parameters:
            call.setdefault("negative_prompt", self.empty_prompt)  # without one, some calls leave guidance out
        if self.grid == "linear" and self.grid_of_call != "linear":
            call["sigmas"] = linear_sigmas(call["num_inference_steps"])
        return call

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, h, w) of one image's latent, (C, f, h, w) of one video's; ModelError for a size that cannot be."""
        name, step, factor = type(self.pipe).__name__, self.spatial_factor * self.patch, self.spatial_factor
        if height % step or width % step:
            nearest = f"{max(1, round(height / step)) * step} x {max(1, round(width / step)) * step}"
            raise ModelError(f"{height} x {width} pixels: both sides must be multiples of {step}; nearest: {nearest}.")
        space = (height // factor, width // factor)
        if not self.video:
            if frames != 1:
                raise ModelError(f"{frames} frames asked of {name}, which makes images; set model.frames: 1.")
            return (self.latent_channels, *space)
        if (frames - 1) % self.temporal_factor:
            nearest = str(round((frames - 1) / self.temporal_factor) * self.temporal_factor + 1)
            raise ModelError(
                f"{frames} frames: {name} makes one, and {self.temporal_factor} for each further latent; nearest: "
                f"{nearest}. Set model.frames."
            )
        return (self.latent_channels, (frames - 1) // self.temporal_factor + 1, *space)

    def times(self, num_steps: int, height: int, width: int, frames: int = 1) -> Tensor:
        """The scheduler's own sigmas [T+1], float32: shift, resolution-dependent shift and terminal value included.

        Note: the scheduler's grid of a shifted model ends with a tiny step (0.0089 for SD3, T = 10); it is what
        inference walks, and so it is kept. `grid="linear"` has no such step.
        ModelError for one step of a grid that is stretched to end at a time of its own.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes it
        if num_steps == 1 and scheduler.config.get("shift_terminal"):
            raise ModelError(
                f"model {self.path!r}: one step, but its scheduler stretches the grid so that the last step begins at "
                f"{scheduler.config.shift_terminal:g}, and the first begins at 1. Ask for at least two steps."
            )
        given: dict[str, Any] = {"sigmas": linear_sigmas(num_steps)} if self.grid == "linear" else {}
        if scheduler.config.get("use_dynamic_shifting"):
            given["mu"] = self.shift(num_steps, height, width, frames)
        scheduler.set_timesteps(None if self.grid == "linear" else num_steps, **given)
        times: Tensor = scheduler.sigmas.to("cpu", torch.float32)
        return times

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], sources: Sources = ()) -> Cond:
        """Conditions [P, ...] of prompts with their source pictures; the other branch's are `negative_*`.

        The empty prompt is encoded once, unless it is seen together with the sources. ModelError where there are too
        few or too many of them.
        """
        self._check_sources(prompts, sources)
        if not sources and self.num_sources[1]:  # prompts with and without pictures have the same conditions
            sources = [()] * len(prompts)
        parts = []
        for start in range(0, len(prompts), _ENCODE_AT_ONCE):
            part, seen = list(prompts[start : start + _ENCODE_AT_ONCE]), sources[start : start + _ENCODE_AT_ONCE]
            cond = self.encode_text(part, seen)
            parts.append(cond | self._negative(len(part), seen) | self.encode_sources(seen))
        return {name: padded([part[name] for part in parts]) for name in parts[0]}

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Velocity [N,*L] float32 at x [N,*L], t [N]; guidance > 1: one batch of 2N, the empty prompt first."""
        prompted = {name: tensor for name, tensor in cond.items() if not name.startswith(NEGATIVE)}
        if guidance <= 1:
            return self._velocity(x, t, prompted)
        both = {name: padded([cond.get(NEGATIVE + name, tensor), tensor]) for name, tensor in prompted.items()}
        empty, wanted = self._velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return self.guide(wanted, empty, guidance, t)

    def decode(self, x0: Tensor) -> Tensor:
        """Media [N,F,3,H,W] float32 in [0,1] of latents [N,*L]; differentiable (micro-batches then save nothing).

        The clamp to [0, 1] passes gradients as if it were not there, so that a saturated pixel still learns.
        """
        return chunked(self._decode, x0, self.decode_micro_batch)

    @torch.no_grad()
    def encode_media(self, media: Tensor) -> Tensor:
        """Latents [N,*L] float32 of media [N,F,3,H,W] in [0,1], the inverse of `decode`; micro-batched as it is.

        Of a VAE with a posterior it is the mode, never a sample, so the same picture always gives the same latent. The
        result lies where the VAE does. ModelError for frames or sides that the model cannot generate.
        """
        self.noise_shape(media.shape[-2], media.shape[-1], media.shape[1])
        return chunked(self._encode_media, media, self.decode_micro_batch)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for name in self.components:
            getattr(self.pipe, name).enable_gradient_checkpointing()

    def enable_tiling(self) -> None:
        """Decode and encode large media in overlapping tiles, for less memory; seams are blended, not exact."""
        if not hasattr(self.pipe.vae, "enable_tiling"):
            raise ModelError(
                f"{type(self.pipe.vae).__name__} cannot work in tiles. "
                "Leave tiling off; decode fewer pictures at a time, or smaller ones."
            )
        self.pipe.vae.enable_tiling()

    def to(self, device: str | torch.device) -> Self:
        """Moves every network but those that `flowrl.memory` has put somewhere else."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name not in self.stays:
                part.to(device)
        return self

    # -------------------------------------------------------------------------------- inside

    def _velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        here = {
            name: tensor.to(x.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in cond.items()
        }
        # Autocast lets the trained weights be float32 while the rest computes in the model's dtype.
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.predict(x, t.to(x.device, torch.float32), here).float()

    def _negative(self, count: int, sources: Sources) -> Cond:
        """The other branch's conditions [P, ...], named `negative_*`; of one prompt without sources they are views."""
        text = self.inference.get("negative_prompt") or self.empty_prompt or ""
        if sources:
            return {NEGATIVE + name: value for name, value in self.encode_negative([text] * count, sources).items()}
        if self._empty is None:
            self._empty = self.encode_negative([text], ())
        return {NEGATIVE + name: value.expand(count, *value.shape[1:]) for name, value in self._empty.items()}

    def _check_pipeline(self) -> None:
        kinds = [kind.__name__ for kind in type(self.pipe).__mro__]
        if not set(kinds) & set(self.pipelines):
            raise ModelError(
                f"model {self.path!r} is a {kinds[0]}, and {type(self).__name__} serves {', '.join(self.pipelines)}. "
                "Leave model.family out: model_index.json says which it is."
            )
        absent = [name for name in (self.components[0], "vae", "scheduler") if getattr(self.pipe, name, None) is None]
        if absent:
            raise ModelError(
                f"model {self.path!r} comes without {', '.join(absent)}. Give a complete pipeline: a folder as "
                "save_pretrained writes it, or load those parts and pass them on."
            )

    def _check_sources(self, prompts: Sequence[str], sources: Sources) -> None:
        fewest, most = self.num_sources
        counts = [len(given) for given in sources] or [0] * len(prompts)
        for text, count in zip(prompts, counts, strict=True):
            if not fewest <= count <= most:
                wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                raise ModelError(
                    f"prompt {text!r} has {count} source pictures, {type(self.pipe).__name__} takes {wanted}. Give "
                    'them in a .jsonl file of prompts: {"prompt": ..., "source": "picture.png"} (or a list), '
                    "or leave them out."
                )

    def _decode(self, x0: Tensor) -> Tensor:
        media = self.pixels(self.unscale(x0.to(self.pipe.vae.dtype))).float() * 0.5 + 0.5
        return clamp(media.transpose(1, 2) if self.video else media.unsqueeze(1))

    def _encode_media(self, media: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixels = media.to(vae.device, vae.dtype) * 2 - 1
        found = vae.encode(pixels.transpose(1, 2) if self.video else pixels[:, 0], return_dict=False)[0]
        return self.scale((found if isinstance(found, Tensor) else found.mode()).float())  # AutoencoderTiny: a tensor

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's latents by channel, [1,C,1,...]."""
        config, shape = self.pipe.vae.config, (1, -1, *[1] * (like.ndim - 2))
        mean, std = (torch.tensor(config[name]).to(like).reshape(shape) for name in ("latents_mean", "latents_std"))
        return mean, std


def network_time(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Times [N] as the network is given them: rounded to its dtype as timesteps, as the pipeline's call does it."""
    return (t * _TRAIN_STEPS).to(dtype) / _TRAIN_STEPS


def packed(x: Tensor) -> Tensor:
    """Latents [N,C,h,w] as tokens [N,S,4C], row by row."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The first of tokens [N,S,4C] as latents of the shape of `like` [N,C,h,w]; the inverse of `packed`."""
    h, w = like.shape[-2] // 2, like.shape[-1] // 2
    return pixel_shuffle(tokens[:, : h * w].transpose(1, 2).unflatten(2, (h, w)), 2)


def clamp(media: Tensor) -> Tensor:
    """To [0, 1], with the gradient of the identity where one is asked for; the values are those of a plain clamp.

    With a gradient an infinity becomes NaN, which is no verdict, instead of an innocent 1.
    """
    clamped = media.clamp(0, 1)
    if not media.requires_grad:
        return clamped
    return clamped.detach() + (media - media.detach())  # of a finite number an exact 0


def linear_sigmas(num_steps: int) -> list[float]:
    """[1, ..., 1/T]: what pipelines that shift by themselves pass to their scheduler."""
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
