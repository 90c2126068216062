"""REINFORCE++-baseline (arXiv:2501.03262): rewards less their group's mean, normalised over the tokens of the batch.

| symbol | here |
|---|---|
| r - mean of the group | credit |
| (A - mean) / std over the batch's tokens | credit |
| k2, KL in the loss | kl_coef, kl_form |
| epsilon | clip_range |
"""

import torch
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, group_advantages, of_live_group, whiten
from flowrl.algorithms.token_policy_gradient import AnswerCredit, check_groups, own
from flowrl.types import Needs, TokenBatch


class ReinforcePPBaseline(AnswerCredit):
    """REINFORCE++-baseline (arXiv:2501.03262): the mean is local, the std is global.

    Note: a group that agrees stays at exactly 0, where whitening would move it by the mean over the tokens.
    Note: the paper's KL, kl_coef, is 0 by default.
    """

    aggregate: fields.Aggregate = "token_mean"
    kl_form: fields.KLForm = "k2"

    @property
    def needs(self) -> Needs:
        """Whitened, the tokens of an answer have a number each."""
        return super().needs._replace(token_credit=True)

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """r less its group's mean, which `credit` then whitens."""
        check_groups(batch)
        return group_advantages(rewards, batch.group.cpu(), std="none")

    def credit(self, batch: TokenBatch) -> Tensor:
        """Whitened over the tokens of all processes, fp32 [R,S]; NaN for answers that are not trained on."""
        value = super().credit(batch).cpu().double()
        trained, mask = ~value.isnan(), batch.tokens.mask.cpu()
        found = self.advantages(batch, self.penalised(batch))
        live = own(batch, of_live_group(batch.group.cpu(), found.live))
        white = whiten(value.nan_to_num()[:, None].expand_as(mask), mask & trained[:, None], batch.total)
        white = white.where(live[:, None], 0.0).where(trained[:, None], torch.nan)
        return white.to(batch.tokens.mask.device, torch.float32)
