"""Rewards as functions of clean latents, with a gradient: through the decoder, the reward and the total.

What ReFL (arXiv:2304.05977), DRaFT (arXiv:2309.17400), AlignProp (arXiv:2310.03739) and SRPO (arXiv:2509.06942) ascend.
Decoder and rewards are frozen but stay in the graph, so never run this in torch.inference_mode.
Symbols: N samples, *L latent dimensions, F frames, H x W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from flowrl.collect import samples_of
from flowrl.policy import Policy
from flowrl.types import Judged, Prompt
from rewards import RewardHub
from rewards.gradient import Embedder, Valve


class Decoder(Protocol):
    """The part of a model that a critic needs."""

    def decode(self, x0: Tensor) -> Tensor:
        """Media [N,F,3,H,W] in [0,1] of clean latents [N,*L], with their graph."""
        ...


class Critic:
    """The rewards of a hub as differentiable functions of a model's clean latents x0 [N,*L].

    A row without a verdict is NaN and sends gradient 0 to its latent; a loss must leave it out all the same, since
    NaN + 1 is NaN: `total[~total.isnan()]`. A latent that is itself NaN still spoils the network it came from.

    `decode_batch` latents are decoded at a time (None: all). With `checkpoint` a decode keeps only its latents and its
    pixels, and is done again in the backward pass: one more decode for the memory of one portion's activations.
    Example: judged = Critic(policy, hub, decode_batch=1)(x0, prompts); (-judged.total.nanmean()).backward()
    """

    def __init__(
        self, model: Policy | Decoder, hub: RewardHub, *, decode_batch: int | None = None, checkpoint: bool = True
    ) -> None:
        self.decoder: Decoder = model.model if isinstance(model, Policy) else model
        self.hub, self.decode_batch, self.checkpoint = hub, decode_batch, checkpoint
        self.fps: float | None = getattr(self.decoder, "fps", None)
        """Frames per second that the rewards of a video are told."""
        self.texts_kept = 4096
        """How many text features are remembered: those used last."""
        self._texts: dict[str, Tensor] = {}

    @cached_property
    def embedder(self) -> Embedder:
        """The one reward with image and text features; RewardError (`RewardHub.embedder`) without it."""
        return self.hub.embedder()

    def media(self, x0: Tensor) -> Tensor:
        """Media [N,F,3,H,W] in [0,1] of x0 [N,*L], with their graph."""
        again = self.checkpoint and torch.is_grad_enabled() and x0.requires_grad
        parts = torch.split(x0, self.decode_batch or max(1, len(x0)))
        decode = self.decoder.decode
        return torch.cat([recompute(decode, part, use_reentrant=False) if again else decode(part) for part in parts])

    def __call__(self, x0: Tensor, prompts: Sequence[Prompt]) -> Judged:
        """The weighted total of x0 [N,*L], each for its prompt; raises what `RewardHub.differentiate` raises.

        Samples of one prompt id are a group to a reward that compares.
        """
        _one_prompt_each(x0, prompts)
        valve = Valve()
        media = self.media(valve.through(x0))
        group = torch.tensor([prompt.id for prompt in prompts], dtype=torch.long)
        found = self.hub.differentiate(samples_of(media, prompts, torch.arange(len(prompts)), group, self.fps))
        valve.close(found.total.isnan())
        return Judged(total=found.total.to(x0.device), scores={n: s.to(x0.device) for n, s in found.scores.items()})

    def relative(
        self, x0: Tensor, prompts: Sequence[Prompt], positive: str, negative: str, k: float | Tensor
    ) -> Tensor:
        """SRPO's semantic relative preference (arXiv:2509.06942) [N] of x0 [N,*L]: scale <f, (1 + k) c_p - c_n>.

        f are the picture's features, c_p and c_n those of `positive + ". " + prompt` and of `negative` likewise; an
        empty control word is the prompt alone. `k` is one number or [N]. Of a video, the mean over some of its frames.
        The other rewards of the hub, their weights and norms take no part.
        """
        _one_prompt_each(x0, prompts)
        valve = Valve()
        features = self.embedder.image_features(self.media(valve.through(x0)))
        wanted, unwanted = (
            self._text_features([_worded(control, prompt.text) for prompt in prompts]).to(features.device)
            for control in (positive, negative)
        )
        factor = 1 + torch.as_tensor(k, dtype=features.dtype, device=features.device).expand(len(x0))
        preference = factor * (features * wanted).sum(1) - (features * unwanted).sum(1)
        valve.close(~preference.isfinite())
        return (self.embedder.scale * preference).to(x0.device)

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """Features [N,D] of the texts, each asked for once: they are frozen."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts |= dict(zip(new, self.embedder.text_features(new), strict=True))
        rows = torch.stack([self._texts[text] for text in texts])
        for text in dict.fromkeys(texts):
            self._texts[text] = self._texts.pop(text)  # to the end: the first were used longest ago
        for text in list(self._texts)[: -self.texts_kept]:
            del self._texts[text]
        return rows


def _one_prompt_each(x0: Tensor, prompts: Sequence[Prompt]) -> None:
    if len(prompts) != len(x0):
        raise ValueError(f"{len(x0)} latents and {len(prompts)} prompts: the critic takes one prompt for each latent.")


def _worded(control: str, prompt: str) -> str:
    return f"{control}. {prompt}" if control else prompt
