"""ReFL (arXiv:2304.05977), DRaFT (arXiv:2309.17400) and AlignProp (arXiv:2310.03739): up the gradient of the reward.

| symbol | here |
|---|---|
| T, steps of a sample | num_steps; the rollout walks the first T - K of them, without a graph |
| DRaFT-K: the last K steps keep their graph | mode draft, last_steps |
| DRaFT-LV: K = 1, and n more from x0, noised anew to t_1 | mode draft_lv, renoise |
| AlignProp: K = T - floor(N(0.84 T, 0.1 T)), anew each iteration | mode alignprop; evenly from last_steps [low, high] |
| ReFL: stop m steps from the end, at random, then one step to x0_hat | mode refl, last_steps [low, high] of m |
| phi(r) = ReLU(margin - r), or -r | margin |
| lambda, its scale | none: Adam does not see it |
"""

from torch import Tensor

from flowrl.algorithms.direct_gradient import Margin, below
from flowrl.algorithms.last_steps import LastSteps


class RewardGradient(LastSteps):
    """ReFL (arXiv:2304.05977), DRaFT (2309.17400), AlignProp (2310.03739): a reward's gradient through the last steps.

    Samples are not finished in the rollout: the loss takes their last K steps, with a graph, and judges what comes out.
    Note: no pre-training loss is added to ReFL's, as in its released code; kl_coef is what holds the model.
    """

    margin: Margin = None

    def shortfall(self, reward: Tensor) -> Tensor:
        """-r, or ReLU(margin - r) [N]."""
        return below(self.margin, reward)
