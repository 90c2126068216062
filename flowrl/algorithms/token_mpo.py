"""MPO, mixed preference optimisation (arXiv:2411.10442), the offline stage of InternVL3.5 and Skywork R1V2.

| symbol | here |
|---|---|
| L_p, which is better: DPO | preference_coef, beta |
| L_q, how good is it: BCO | quality_coef, beta |
| delta, reward shift | credit: the mean implicit reward of the iteration's pairs when they were drawn |
| L_g, write it: SFT on the chosen | generation_coef |
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.preference_terms import bco, dpo, mpo, sft
from flowrl.algorithms.token_dpo import Pairs, TokenDPO
from flowrl.types import Needs, TokenBatch


class TokenMPO(TokenDPO):
    """MPO (arXiv:2411.10442): 0.8 preference + 0.2 quality + 1 generation.

    Note: the paper's reward shift is a moving average over batches; here it is the mean over this iteration's pairs, of
    all processes, by the weights that wrote them: how an update is cut does not matter, and nothing is carried on.
    """

    preference_coef: Annotated[float, Field(description="Weight of DPO's loss.", ge=0)] = 0.8
    quality_coef: Annotated[float, Field(description="Weight of BCO's loss, each side by itself.", ge=0)] = 0.2
    generation_coef: Annotated[
        float, Field(description="Weight of -log pi of the chosen answer, a mean over its tokens.", ge=0)
    ] = 1.0

    @property
    def needs(self) -> Needs:
        """What the reference thought of the answers when they came, for the shift."""
        return super().needs._replace(reference_logprobs=True)

    def credit(self, batch: TokenBatch) -> Tensor:
        """The shift, equal for all answers that are in a pair, fp32 [R]; NaN, out of training, for the others."""
        paired = super().credit(batch).isfinite()
        if batch.reference is None:
            raise ValueError("token_mpo needs batch.reference; see needs.reference_logprobs.")
        ratio = (batch.tokens.logprob - batch.reference).where(batch.tokens.mask, 0.0).double().sum(1)
        if self.length_normalised:
            ratio = ratio / batch.tokens.lengths.clamp(min=1)
        count, summed = batch.total(torch.stack([paired.sum().double(), ratio[paired].sum()]).cpu()).tolist()
        shift = self.beta * summed / max(count, 1.0)
        return torch.full_like(ratio, shift).where(paired, torch.nan).float()

    def pair_loss(self, found: Pairs) -> Tensor:
        """The three losses [M] of the pairs, weighted."""
        return mpo(
            dpo(found.chosen, found.rejected, self.beta),
            bco(found.chosen, found.rejected, self.beta, found.shift),
            sft(found.logprob, found.lengths),
            (self.preference_coef, self.quality_coef, self.generation_coef),
        )
