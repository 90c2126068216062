"""UnifiedReward (arXiv:2503.05236) and its kin as judges: one chat model that scores and compares images and videos.

    point_v1          `Final Score: X`, X in 1..5                           UnifiedReward
    point_v2          alignment, coherence and style, 1..5                  UnifiedReward-2.0, images
    point_v2_video    alignment, physics and style, 1..5                    UnifiedReward-2.0, videos
    edit              two numbers in 0..25, for an edit of meta["source"]   UnifiedReward-Edit
    edit_quality      two numbers in 0..25, for the image alone             UnifiedReward-Edit
    pair              `image 1 is better`                                   UnifiedReward
    think             the same in <answer>, after thousands of tokens       UnifiedReward-Think (arXiv:2505.03318)
    flex              JSON with winners by category                         UnifiedReward-Flex

All scores are in [0, 1]: (X - 1) / 4, the mean of three such, and a / 25. The last three modes compare two samples and
are for the reward `pairs`: 1 if the first is better, 0 if the second is, 1/2 for a tie, and flex also what is between.

Note: the words of the questions are ours. The models were trained on those of the UnifiedReward repository, and
published scores need them: put your copy into a text file, `{prompt}` where the caption goes, and name it in
`template`. The answer is read by the mode's parser.
Note: of an edit's two numbers the smaller one counts, as in VIEScore (arXiv:2312.14867): handing the source back
unchanged preserves everything and earns nothing.
Note: flex is half the winner and half the share of the categories won; the weight is ours (`blend` in a template).
"""

from __future__ import annotations

from rewards.card import Card
from rewards.judge import Judge

__all__ = ["UnifiedReward"]


class UnifiedReward(Judge):
    """Scores, or verdicts on two samples for `pairs`, of a UnifiedReward model (arXiv:2503.05236), served or local.

    Modes: point_v1, point_v2, point_v2_video, edit, edit_quality; for `pairs` pair, think, flex. Parts: the numbers as
    they were written.
    """

    name = "unifiedreward"
    default_mode = "point_v2"
    card = Card(
        source="UnifiedReward (arXiv:2503.05236), github.com/CodeGoat24/UnifiedReward",
        licence="MIT (code); weights: see their card",
        options=("model",),
        note=(
            "Weights: CodeGoat24/UnifiedReward-2.0-*, -Think-*, -Flex-*, -Edit-*, in `model`; with `url` they are "
            "served there, without loaded here. Our wording is the default: published numbers need the upstream one "
            "(`template`). Checkpoints in LLaVA-NeXT layout (-7b) have to be served by SGLang."
        ),
    )
