"""The worth of right and wrong answers by their length: short and right is best, short and wrong is worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.contract import Sheet, as_scores
from rewards.types import RewardError, Scores
from rewards.verifiers.length import known
from rewards.verifiers.names import build
from rewards.verifiers.types import Answer, NoVerdict

__all__ = ["Cosine", "cosine"]


class Cosine:
    """Cosine-scaled reward of another verifier's verdict (Yeo et al., arXiv:2502.03373, and TRL).

    Parts: right, the other verifier's score.

    Note: a response longer than the limit is worth what one at the limit is; unclamped, the cosine rises again.
    """

    range = (-1.0, 1.0)

    def __init__(
        self,
        verifier: Any = "verifiers.math",
        verifier_options: Mapping[str, Any] | None = None,
        limit: int = 20480,
        right: Sequence[float] = (1.0, 0.5),
        wrong: Sequence[float] = (-1.0, -0.5),
        threshold: float = 0.5,
    ) -> None:
        """`verifier`: what a verifier's `use` can be.

        limit       tokens from which on nothing changes any more
        right       (worth of a right answer of 0 tokens, at the limit)
        wrong       the same of a wrong one
        threshold   the score from which on an answer is right
        """
        if limit < 1 or len(right) != 2 or len(wrong) != 2:
            raise RewardError(
                f"cosine: limit is {limit!r}, right is {right!r}, wrong is {wrong!r}; expected a number of tokens "
                "above 0 and two pairs (worth when short, worth at the limit)"
            )
        self._verifier = build(verifier, verifier_options)
        self.needs = self._verifier.needs
        self._limit, self._right, self._wrong, self._threshold = limit, right, wrong, threshold
        self.range = (min(*right, *wrong), max(*right, *wrong))

    def score(self, answers: Sequence[Answer], progress: float | None = None) -> Scores:
        """One value per answer; none where the other verifier has none, or the tokens are not counted."""
        sheet = Sheet(len(answers))
        judged = as_scores(self._verifier.score(answers, progress), len(answers), "cosine")
        sheet.parts["right"] = judged.value
        for row, (answer, score) in enumerate(zip(answers, judged.value.tolist(), strict=True)):
            sheet.info[row] = judged.info[row]
            if math.isnan(score):
                continue
            try:
                ends = self._right if score >= self._threshold else self._wrong
                sheet.value[row] = cosine(known(answer.tokens), self._limit, *ends)
            except NoVerdict as error:
                sheet.fail([row], str(error))
        return sheet.scores()

    def unload(self) -> None:
        """Let go of what the other verifier holds."""
        if hasattr(self._verifier, "unload"):
            self._verifier.unload()


def cosine(tokens: int, limit: int, short: float, long: float) -> float:
    """From `short` at 0 tokens to `long` at the limit and beyond, along half a wave of the cosine."""
    progress = min(tokens, limit) / limit
    return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2
