"""Pair-GRPO (FocusDiff, arXiv:2506.05501) on the forward process: twin prompts, and their true pictures injected.

| symbol | here |
|---|---|
| (p1, p2), two near-identical prompts | prompts that share the value of `data.together`: one group for credit |
| (g1, g2), their true pictures | each prompt's stored samples: its own picture, and the other's as a bad example |
| pi(n), probability of injection | inject, [[iteration, value], ...] |
| G, samples of a prompt | data.samples_per_prompt; with injection two of them are stored, not drawn |
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from flowrl.algorithms.diffusion_nft import DiffusionNFT
from flowrl.schedules import Schedule, value_at, values
from flowrl.types import Needs

STORED = 2


class PairGRPO(DiffusionNFT):
    """Pair-GRPO's data curriculum (arXiv:2506.05501) with DiffusionNFT's loss; rewards judge all samples alike.

    Note: the paper trains an autoregressive generator, where an injected picture gets a log-prob and a ratio of 1. A
    flow has no trajectory that led to it, so that only a loss on finished samples can take it.
    Note: the published corners of pi, 50, 450 and 1200 updates, are the default; shorter runs want shorter ones.
    """

    inject: Annotated[
        Schedule, Field(description="Probability that a prompt's true and false pictures stand among its samples.")
    ] = ((50.0, 1.0), (450.0, 0.25), (1200.0, 0.0))

    @model_validator(mode="after")
    def _are_probabilities(self) -> Self:
        if not all(0 <= value <= 1 for value in values(self.inject)):
            raise ValueError(f"inject={self.inject} holds a probability that is not in [0, 1].")
        return self

    @property
    def needs(self) -> Needs:
        """The true and the false picture of each prompt."""
        return super().needs._replace(stored=STORED)

    def injection(self, iteration: int) -> float:
        """pi(n)."""
        return value_at(self.inject, iteration)
