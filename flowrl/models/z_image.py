"""Z-Image and Z-Image-Turbo (arXiv:2511.22699) through diffusers' ZImagePipeline.

Shapes: P prompts, N samples, S tokens of text, D channels of the text, C x h x w latents.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.models.base import PipelineModel, Sources
from flowrl.types import Cond
from samplers.prediction import rows


class ZImage(PipelineModel):
    """ZImagePipeline as a velocity in flow coordinates; its network's time runs to 1 at the data, its sign is turned.

    Note: the argument `guidance_scale` of the pipeline's call is what is added to the prompted velocity: 0 is none, and
    s is guidance s + 1 here. `cfg_normalization` and `cfg_truncation` of the folder's `inference.json` are heeded.
    Turbo has been distilled to do without guidance, which its files do not say: leave model.guidance at 1.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    grid_of_call: ClassVar[Literal["scheduler", "linear"]] = "linear"
    further_arguments: ClassVar[tuple[str, ...]] = ("cfg_normalization", "cfg_truncation")

    def call_defaults(self) -> dict[str, Any]:
        """The size."""
        return {"height": 1024, "width": 1024}

    @property
    def guidance(self) -> float:
        """Classifier-free guidance that the folder or the pipeline recommends; 1 = none."""
        return 1.0 + float(self.inference[self.guidance_argument])

    def arguments(self, *, guidance: float | None = None, **overrides: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call that reproduce this model's samples; give what differs in a run."""
        return super().arguments(guidance=None if guidance is None else guidance - 1.0, **overrides)

    def encode_text(self, prompts: list[str], sources: Sources) -> Cond:
        """prompt_embeds [P,S,D] with zeros behind each prompt's tokens, and prompt_embeds_mask [P,S]."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(prompts),  # the call changes the list
            do_classifier_free_guidance=False,
            max_sequence_length=self.inference["max_sequence_length"],
        )
        masks = [each.new_ones(len(each), dtype=torch.bool) for each in embeds]
        return {
            "prompt_embeds": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
            "prompt_embeds_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        }

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,C,h,w]; the network takes one picture of one frame and one text a sample."""
        texts = zip(cond["prompt_embeds"], cond["prompt_embeds_mask"], strict=True)
        said: list[Tensor] = self.trainable(
            list(x.to(self.dtype).unsqueeze(2)),
            1 - t,
            [embeds[mask] for embeds, mask in texts],
            return_dict=False,
        )[0]
        return -torch.stack(said).squeeze(2)

    def guide(self, prompted: Tensor, empty: Tensor, guidance: float, t: Tensor) -> Tensor:
        """Guidance of two velocities [N,C,h,w], no longer than the folder allows, and none near the data if it says so.

        `cfg_normalization` is the largest length of a sample's velocity, as a multiple of the prompted one's (0: any).
        `cfg_truncation` is how far from the noise guidance ends, as 1 - t.
        """
        v = super().guide(prompted, empty, guidance, t)
        if limit := float(self.inference["cfg_normalization"]):
            longest = limit * prompted.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
            v = v * rows(longest.clamp(max=1), v)
        late = 1 - t.to(v.device) > float(self.inference["cfg_truncation"])
        return torch.where(late.reshape(-1, *[1] * (v.ndim - 1)), prompted, v)
