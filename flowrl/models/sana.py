"""Sana (arXiv:2410.10629) through diffusers' SanaPipeline.

Shapes: P prompts, N samples, S tokens, D channels of the text, C x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flowrl.models.base import PipelineModel, Sources
from flowrl.types import Cond


class Sana(PipelineModel):
    """SanaPipeline as a velocity in flow coordinates; Sana's own time and velocity are those already.

    Note: the published weights come with a second-order solver (DPM-Solver++ over flow sigmas, flow_shift 3). Its grid
    is walked here, 0.9997 to 0, by first-order steps, and the network sees 1000 t where that scheduler cuts off the
    fraction. A FlowMatchEulerDiscreteScheduler with shift 3 in the pipeline walks exactly as this model does.
    Note: a picture is drawn at the size that is asked for. The pipeline's default draws it at the nearest size of a
    list and scales the result; `arguments` and the exports turn that off.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    further_arguments: ClassVar[tuple[str, ...]] = (
        "clean_caption",
        "complex_human_instruction",
        "use_resolution_binning",
    )

    def call_defaults(self) -> dict[str, Any]:
        """The size that the weights were trained with, and no other."""
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}

    @property
    def patch(self) -> int:
        """Latents to a token of the network, in height and width."""
        return int(self.pipe.transformer.config.patch_size)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] and their mask [P,S]; each prompt follows an instruction to Gemma to enhance it."""
        return self._encode(prompts, self.inference["complex_human_instruction"])

    def encode_negative(self, prompts: list[str], sources: Sources) -> Cond:
        """The same without the instruction."""
        return self._encode(prompts, None)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]; weights that also learnt a variance have it in as many further channels."""
        config = self.pipe.transformer.config
        v: Tensor = self.trainable(
            x.to(self.dtype),
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_attention_mask"],
            timestep=t * self.pipe.scheduler.config.num_train_timesteps * config.timestep_scale,
            return_dict=False,
        )[0]
        return v[:, : x.shape[1]]

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Cond:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            clean_caption=self.inference["clean_caption"],
            max_sequence_length=self.inference["max_sequence_length"],
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
