"""Wan 2.1 and 2.2 (arXiv:2503.20314) from a first frame, through diffusers' WanImageToVideoPipeline.

How the network is told of the frame is a property of the weights:

    2.1 I2V-14B     `channels` beside the latents: a mask, and the latents of the frame followed by grey; and
                    `image_embeds`, what a CLIP sees in it, which every block attends to
    2.2 I2V-A14B    `channels` only, to both experts
    2.2 TI2V-5B     `known`: its latent stands in the place of the first latent frame, whose tokens have time 0

Shapes: P prompts, N samples, C x f x h x w latents, S tokens of CLIP with D channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flowrl.models.base import Sources
from flowrl.models.pipeline import ModelError
from flowrl.models.wan import Wan
from flowrl.types import Cond

_TEXT_TOKENS = 512
"""What diffusers' attention takes for the text where there are tokens of CLIP before it."""


class WanI2V(Wan):
    """WanImageToVideoPipeline as a velocity in flow coordinates, from one picture a prompt.

    The files of TI2V-5B name WanPipeline, which takes no picture; with this family it becomes the other one.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    num_sources: ClassVar[tuple[int, int]] = (1, 1)

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(_from_picture(pipe), **options)
        if not self._expands and self.pipe.transformer.config.in_channels == self.latent_channels:
            raise ModelError(
                f"model {self.path!r}: its network has no channels for a picture, so it is one that makes videos of "
                "text alone. Set model.family: wan, or give the path of an I2V or TI2V model."
            )
        tokens = self.inference["max_sequence_length"]
        if self._has_clip and tokens != _TEXT_TOKENS:
            raise ModelError(
                f"model {self.path!r}: max_sequence_length is {tokens}, but where tokens of CLIP come before those of "
                f"the text, diffusers' attention counts {_TEXT_TOKENS} of the latter. Set it to {_TEXT_TOKENS}."
            )

    def encode_sources(self, sources: Sources) -> Cond:
        """`known` [P,C,1,h,w]; or `channels` [P,4+C,f,h,w] and, of weights with a CLIP, `image_embeds` [P,S,D]."""
        rows = [self._encode_first(picture) for (picture,) in sources]  # one by one: a whole video goes into the VAE
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def inputs(self, x: Tensor, t: Tensor, cond: Cond) -> dict[str, Tensor]:
        """What the network takes, each [N, ...], with what it is told of the first frame."""
        given = super().inputs(x, t, cond)
        if "known" in cond:
            first, rest = given["timestep"].tensor_split([given["timestep"].shape[1] // x.shape[2]], dim=1)
            given["timestep"] = torch.cat([torch.zeros_like(first), rest], dim=1)
            given["hidden_states"] = torch.cat([cond["known"], given["hidden_states"][:, :, 1:]], dim=2)
        if "channels" in cond:
            given["hidden_states"] = torch.cat([given["hidden_states"], cond["channels"]], dim=1)
        if "image_embeds" in cond:
            given["encoder_hidden_states_image"] = cond["image_embeds"]
        return given

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Velocity [N,C,f,h,w]; that of a known latent frame is (x - known) / t, whose x0 is exactly the frame.

        Note: the pipeline walks that frame along the network's own velocity and puts the known one in its place at the
        end. Here it is there without that, along the ODE; a random last step leaves its noise in it as in the others.
        """
        v = super().velocity(x, t, cond, guidance)
        if "known" not in cond:
            return v
        known = cond["known"].to(x.device, torch.float32)  # not in the model's dtype: it comes out as it went in
        first = (x[:, :, :1] - known) / t.to(x.device, torch.float32).reshape(-1, 1, 1, 1, 1)
        return torch.cat([first, v[:, :, 1:]], dim=2)

    @property
    def _expands(self) -> bool:
        return bool(self.pipe.config.expand_timesteps)

    @property
    def _has_clip(self) -> bool:
        return self.pipe.transformer.config.image_dim is not None

    def _encode_first(self, picture: Tensor) -> Cond:
        """Conditions [1, ...] of one picture [3,H,W] in [0,1], resized as the pipeline does it."""
        from torchvision.transforms.functional import to_pil_image

        image = to_pil_image(picture)
        pixels = self.pipe.video_processor.preprocess(image, height=self.height, width=self.width).unsqueeze(2)
        if self._expands:
            return {"known": self._latents(pixels)}
        grey = pixels.new_zeros(1, 3, self.frames - 1, self.height, self.width)
        latents = self._latents(torch.cat([pixels, grey], dim=2))
        mask = latents.new_zeros(1, self.temporal_factor, *latents.shape[2:])
        mask[:, :, 0] = 1
        cond = {"channels": torch.cat([mask, latents], dim=1)}
        return cond | ({"image_embeds": self.pipe.encode_image(image)} if self._has_clip else {})

    def _latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.scale(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float())


def _from_picture(pipe: Any) -> Any:
    """The pipeline that takes a picture, around the same parts."""
    import diffusers

    make: Any = diffusers.WanImageToVideoPipeline
    if isinstance(pipe, make):
        return pipe
    made = make(**pipe.components, **{name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps")})
    made.set_progress_bar_config(disable=True)
    return made
