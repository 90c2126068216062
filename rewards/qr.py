"""Does the picture hold a QR code that says what was asked for? Decoded by OpenCV, so nothing has to be believed.

    strict   1 where a code says exactly the asked-for text, otherwise 0
    dense    1 for that, 0.3 for a code that can be read and says something else, 0.1 for one that is found but cannot
             be read, otherwise 0

A code either is repaired by its error correction or says nothing, so nothing lies between the steps; `dense` is there
for a policy that starts without any code at all. The target is `meta["text"]`, else what stands between double quotes
in the prompt; case and white space count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.card import Card
from rewards.media import to_array
from rewards.ocr import target_text
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["QR"]

_READ, _FOUND = 0.3, 0.1
_INSTALL = 'pip install -e ".[video]"'


class QR:
    """Does a QR code in the picture say the asked-for text? In [0, 1].

    Parts: strict and dense. Info: what the codes say ("" for one that cannot be read) and what was asked for.
    """

    name = "qr"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    range = (0.0, 1.0)
    device = "cpu"
    card = Card(
        source="QR codes, ISO/IEC 18004; OpenCV reads them",
        licence="Apache-2.0 (OpenCV)",
        packages={"cv2": _INSTALL},
        note="a reader gives up sooner than a phone does: blurred or tilted codes may count as unreadable",
    )

    def __init__(self, mode: str = "dense") -> None:
        """`mode`: dense or strict."""
        if mode not in ("dense", "strict"):
            raise RewardError(f'qr mode {mode!r}; expected "dense" or "strict"')
        self._mode = mode
        self._detector: Any = None
        self._blur: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make OpenCV's reader; it runs on the CPU."""
        try:
            import cv2
        except ImportError as error:
            raise RewardError(f"reward 'qr' needs OpenCV: {_INSTALL} ({error})") from error
        self._detector = cv2.QRCodeDetector()
        self._blur = functools.partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=1.0)

    def unload(self) -> None:
        """Let the reader go."""
        self._detector = self._blur = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """One verdict per image; NaN where there is no text to look for."""
        if self._detector is None:
            raise RewardError("reward 'qr' is not loaded; the hub does that, or call .load(device, dtype) first")
        rows = [self._judge(sample) for sample in samples]
        parts = {mode: torch.tensor([row[mode] for row in rows], dtype=torch.float32) for mode in ("strict", "dense")}
        return Scores(value=parts[self._mode], parts=parts, info=[row["info"] for row in rows])

    def _judge(self, sample: Sample) -> dict[str, Any]:
        target = target_text(sample)
        if not target:
            error = 'no text to look for: set meta["text"], or put it between double quotes in the prompt'
            return {"strict": math.nan, "dense": math.nan, "info": {"error": error}}
        read = self._read(sample.media)
        right = target in read
        dense = 1.0 if right else _READ if any(read) else _FOUND if read else 0.0
        return {"strict": float(right), "dense": dense, "info": {"read": read, "target": target}}

    def _read(self, image: Tensor) -> list[str]:
        """What the codes in an image [3, H, W] say, one text each, "" where one cannot be read.

        Where nothing can be, a second look is taken at the image blurred by one pixel: grain hides a code from OpenCV
        that a phone reads.
        """
        bgr = np.ascontiguousarray(to_array(image)[:, :, ::-1])
        found = self._look(bgr)
        return found if any(found) else self._look(self._blur(bgr)) or found

    def _look(self, bgr: NDArray[np.uint8]) -> list[str]:
        _, texts, *_ = self._detector.detectAndDecodeMulti(bgr)
        return list(texts)
