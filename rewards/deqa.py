"""DeQA-Score (arXiv:2501.11561): how good is the quality of an image, by the expected level of five, served elsewhere.

    score = sum_k k p(k) / sum_k p(k)        k = 5 (excellent), 4 (good), 3 (fair), 2 (poor), 1 (bad)

from the probabilities of the words at the place where the answer names one of them. The weights (mPLUG-Owl2) come with
code of their own for an old transformers, so they run in another environment: behind OpenAI's API (`url`), or as a
reward of your own in `flowrl reward serve` there (`use: http://host:port/name` here). Images go as PNG: JPEG would
change what is measured.

Note: the words of the question are ours; published scores need those of the DeQA-Score repository (`template`).
Note: Flow-GRPO divides by 5; give `norm: unit`, or `norm: {affine: [0, 5]}` for the same.
"""

from __future__ import annotations

import torch

from rewards._chat import RemoteChat
from rewards.card import Card
from rewards.judge import Judge
from rewards.types import RewardError

__all__ = ["DeQA"]


class DeQA(Judge):
    """Quality of an image from 1 to 5 by DeQA-Score (arXiv:2501.11561), behind an OpenAI-compatible server.

    Parts: level, the score; mass, the probability that the answer is one of the five words at all.
    """

    name = "deqa"
    default_mode = "level"
    card = Card(
        source="DeQA-Score (arXiv:2501.11561), zhiyuanyou/DeQA-Score-Mix3",
        licence="see its card",
        options=("url",),
        note="Runs in an environment of its own. Our wording is the default: published numbers need the upstream one.",
    )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Look whether the server answers."""
        if not isinstance(self._chat, RemoteChat):
            raise RewardError(
                "deqa: no server is given, and its weights do not load on today's transformers. Mend: serve them in an "
                "environment of their own and give the address as `url`, such as http://127.0.0.1:8000/v1"
            )
        super().load(device, dtype)
