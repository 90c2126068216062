"""A reward that fails on some samples, to measure what that does to a run; see failing_*.yaml beside this file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rewards import Sample, Scores, build
from rewards.media import to_uint8
from rewards.pixel import jpeg_size


class Failing:
    """Another reward that has no verdict on some samples: at random, or on those whose JPEG is large.

    The second is what a judge with a time limit does: it gives up on busy pictures, and on no others.
    """

    def __init__(
        self,
        reward: str = "shapes",
        options: Mapping[str, Any] | None = None,
        share: float = 0.0,
        limit_kb: float | None = None,
        answer: float = float("nan"),
    ) -> None:
        """`share` of all samples fail at random, and all above `limit_kb`; a failure scores `answer`.

        NaN is what a failure is here. 0 is what other trainers make of it.
        """
        self._reward = build(reward, options)
        self._share, self._limit, self._answer = share, limit_kb, answer

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the other reward."""
        if hasattr(self._reward, "load"):
            self._reward.load(device, dtype)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The other reward's scores; parts: true, before anything failed, and failed, 0 or 1."""
        answered = self._reward.score(samples)
        true = answered.value if isinstance(answered, Scores) else torch.as_tensor(answered)
        failed = torch.tensor([self._fails(sample) for sample in samples])
        parts = {"true": true, "failed": failed.float()}
        parts |= answered.parts if isinstance(answered, Scores) else {}
        return Scores(value=torch.where(failed, self._answer, true), parts=parts)

    def _fails(self, sample: Sample) -> bool:
        if self._limit is not None and jpeg_size([sample])[0] > self._limit:
            return True
        number = hashlib.sha256(to_uint8(sample.media).numpy().tobytes()).digest()[:8]
        return int.from_bytes(number) < self._share * 2**64
