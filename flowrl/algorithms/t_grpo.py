"""T-GRPO (Video-R1, arXiv:2503.21776): GRPO that pays right answers about a video more where the order of frames helps.

| symbol | here |
|---|---|
| p, of the group's answers | mean of batch.rewards |
| p~, of answers to the same video with shuffled frames | batch.facts["shuffled"]; needs.besides |
| r_t = alpha where p >= mu p~ | temporal_bonus, temporal_margin |
| R_i + r_t for right answers | right |
| G~, answers to shuffled frames | shuffled |
"""

from typing import Self

from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, right_in_order
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.token_policy_gradient import fact, rewards_of
from flowrl.types import Besides, Needs, TokenBatch

_SHUFFLED = "shuffled"


class TGRPO(GRPO):
    """T-GRPO (Video-R1, arXiv:2503.21776): a bonus for right answers of groups that beat those to shuffled frames.

    A question without a video, or whose shuffled answers have no verdict, is GRPO's.
    Note: alpha and mu are the released code's .3 and .8, where the paper asks for more right answers than to shuffled
    frames. p and p~ are mean rewards there and here, so that partial credit counts; the paper has shares of right ones.
    Note: the code calls an answer right from a reward above .1 on, for its rewards are partial; here it is `right`.
    """

    shuffled: fields.Shuffled = 4
    temporal_bonus: fields.TemporalBonus = 0.3
    temporal_margin: fields.TemporalMargin = 0.8
    right: fields.Right = 1.0

    @model_validator(mode="after")
    def _of_one_reward(self) -> Self:
        if self.combine != "sum":
            raise ValueError(f"the bonus is for a sum, and combine={self.combine} takes each alone; set combine=sum.")
        return self

    @property
    def needs(self) -> Needs:
        """Besides, answers to videos whose frames are shuffled."""
        return super().needs._replace(besides=Besides(_SHUFFLED, answers=self.shuffled, shuffled=True))

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """GRPO's, of rewards with the bonus."""
        earned = right_in_order(
            rewards_of(batch), batch.group.cpu(), fact(batch, _SHUFFLED), right=self.right, margin=self.temporal_margin
        )
        return super().advantages(batch, rewards + self.temporal_bonus * earned)
