"""Wan 2.1 and 2.2 (arXiv:2503.20314) through diffusers' WanPipeline: text to video, with one network or two experts.

Wan 2.2 A14B has two networks: one speaks at the times t >= boundary_ratio, the other below. TI2V-5B has one, which is
told a time for every token (`expand_timesteps`).

Shapes: P prompts, N samples, S tokens, D channels of the text, C x f x h x w latents, L tokens of a video.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowrl.models.base import PipelineModel, Sources
from flowrl.models.pipeline import ModelError
from flowrl.types import Cond

_LOW = "guidance_scale_2"


class Experts(nn.ModuleDict):
    """The networks of one pipeline by their names in it, as one module that an engine can wrap."""

    def forward(self, name: str, **inputs: Any) -> Any:
        """What the expert `name` says."""
        return self[name](**inputs)


class Wan(PipelineModel):
    """WanPipeline as a velocity in flow coordinates; Wan's own time and velocity are those already.

    The call's argument guidance_scale_2 (in `inference`) is the guidance of the expert at low noise, where it differs.

    Note: a scheduler whose timesteps are whole numbers (UniPC) tells the network floor(1000 t); here it is told 1000 t.
    Note: the VAE clamps its pixels itself, so one that is saturated gets no gradient.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    video: ClassVar[bool] = True
    fps: ClassVar[float | None] = 16.0
    further_arguments: ClassVar[tuple[str, ...]] = (_LOW,)

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        if self.pipe.config.expand_timesteps and options.get("fps") is None:
            self.fps = 24.0  # type: ignore[misc]  # what TI2V-5B was trained with
        if _LOW in self.inference and not self.boundary:
            raise ModelError(
                f"model {self.path!r}: {_LOW} is {self.inference[_LOW]:g}, but these weights have no second expert. "
                "Leave it out of model.inference and of the folder's inference.json."
            )

    @property
    def boundary(self) -> float:
        """The time below which the second expert speaks; 0 where there is one network."""
        return float(self.pipe.config.boundary_ratio or 0.0)

    def network(self) -> nn.Module:
        """The transformer, or both experts (`components` says which)."""
        if not self.boundary:
            return super().network()
        self.components = ("transformer", "transformer_2")  # type: ignore[misc]  # of these weights
        absent = [name for name in self.components if getattr(self.pipe, name) is None]
        if absent:
            raise ModelError(
                f"model {self.path!r}: {absent[0]} is missing, and two experts share the times at {self.boundary:g}. "
                "Load the pipeline with all of its parts."
            )
        return Experts({name: getattr(self.pipe, name) for name in self.components})

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.pipe.vae.config.z_dim)

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer.config.patch_size[1])

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D]; S is max_sequence_length always, and the network sees the zeros at the end too."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.inference["max_sequence_length"]
        )
        return {"prompt_embeds": embeds}

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,f,h,w]; every row is asked of the expert of its time, as the pipeline asks."""
        inputs = self.inputs(x, t, cond)
        if not self.boundary:
            v: Tensor = self.trainable(**inputs, return_dict=False)[0]
            return v
        early = self._early(t)
        rows = {name: at.nonzero()[:, 0] for name, at in zip(self.components, (early, ~early), strict=True)}
        found = [
            self.trainable(name, **{key: tensor[at] for key, tensor in inputs.items()}, return_dict=False)[0]
            for name, at in rows.items()
            if len(at)
        ]
        return torch.cat(found)[torch.cat(list(rows.values())).argsort()]

    def inputs(self, x: Tensor, t: Tensor, cond: Cond) -> dict[str, Tensor]:
        """What the network takes, each [N, ...]; timestep is 1000 t, [N] or, of one that expands it, [N,L]."""
        timestep = t * self._training_steps
        if self.pipe.config.expand_timesteps:
            timestep = timestep[:, None].expand(-1, x[0, 0].numel() // self.patch**2)
        return {
            "hidden_states": x.to(self.dtype),
            "timestep": timestep,
            "encoder_hidden_states": cond["prompt_embeds"],
        }

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """Classifier-free guidance of two velocities [N,*L], by the scale of the expert that speaks at t [N]."""
        if _LOW not in self.inference:
            return super().guide(prompted, empty, guidance, t)
        early = self._early(t.to(prompted.device)).reshape(-1, 1, 1, 1, 1)
        return torch.where(
            early,
            super().guide(prompted, empty, guidance, t),
            super().guide(prompted, empty, float(self.inference[_LOW]), t),
        )

    @property
    def _training_steps(self) -> int:
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def _early(self, t: Tensor) -> Tensor:
        """Whether the first expert speaks, [N]; compared in timesteps, as the pipeline compares."""
        return t * self._training_steps >= self.boundary * self._training_steps
