"""ReMax (arXiv:2310.10505): REINFORCE with the reward of the likeliest answer as the baseline.

| symbol | here |
|---|---|
| r(x, a), a drawn by the policy | batch.rewards |
| b = r(x, greedy a) | batch.facts["greedy"]; needs.besides |
| on-policy, one answer a prompt is enough | objective: reinforce, one update an iteration |
"""

from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import Advantages, less_baseline
from flowrl.algorithms.token_policy_gradient import AnswerCredit, fact, own
from flowrl.types import Besides, Needs, TokenBatch

_GREEDY = "greedy"


class ReMax(AnswerCredit):
    """ReMax (arXiv:2310.10505): an answer's reward less that of the greedy answer to the same prompt.

    It needs no group; the greedy answer is one more to write, and is not trained on.
    Note: the loss has no ratio, so that it wants one update an iteration; for more, set objective=clip.
    Note: answers whose greedy one has no verdict are left out.
    """

    objective: fields.ObjectiveName = "reinforce"
    aggregate: fields.Aggregate = "seq_mean_token_sum"

    @property
    def fewest_samples(self) -> int:
        """One is compared with the greedy one."""
        return 1

    @property
    def needs(self) -> Needs:
        """A greedy answer."""
        return super().needs._replace(besides=Besides(_GREEDY, greedy=True))

    def trained(self, batch: TokenBatch) -> Tensor:
        """Besides, with a verdict on the greedy answer."""
        return super().trained(batch) & own(batch, fact(batch, _GREEDY)).isfinite()

    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """r - r of the greedy answer."""
        return less_baseline(rewards, batch.group.cpu(), fact(batch, _GREEDY))
