"""Is the asked-for text in the picture? Read by RapidOCR (PP-OCRv6, ONNX, CPU) with the weights inside its wheel.

    ned       1 - levenshtein(read, target) / max(len(read), len(target)): too much text costs as missing text does
    contain   Flow-GRPO's reward (arXiv:2505.05470): 1 where the target is part of what is read, otherwise
              1 - min(levenshtein, len(target)) / len(target); repeating the target costs nothing, and models find out

Case and white space do not count. The target is `meta["text"]`, else what stands between double quotes in the prompt
(all of it, in order). Both numbers are logged as parts, so that the distance between them shows the repetition.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.media import to_array
from rewards.types import RewardError, Sample, Scores

__all__ = ["OCR"]

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_INSTALL = 'pip install -e ".[ocr]"'


class OCR:
    """Similarity of the text read in an image to the text that was asked for, in [0, 1]."""

    media = frozenset({"image"})
    deterministic = True
    range = (0.0, 1.0)
    device = "cpu"

    def __init__(self, mode: str = "ned", threads: int = 2) -> None:
        """`threads` is for onnxruntime, whose own choice is all cores for every reader."""
        if mode not in ("ned", "contain"):
            raise RewardError(f'ocr mode {mode!r}; expected "ned" or "contain"')
        self._mode, self._threads = mode, threads
        self._engine: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the reader; it runs on the CPU in fp32 whatever is asked for."""
        try:
            import onnxruntime  # noqa: F401  (RapidOCR asks for it only when the first image comes)
            import rapidocr
        except ImportError as error:
            raise RewardError(f"reward 'ocr' needs RapidOCR and onnxruntime: {_INSTALL} ({error})") from error
        models = Path(rapidocr.__file__).parent / "models"
        threads = min(self._threads, os.cpu_count() or 1)  # RapidOCR ignores more than there are, and then takes all
        self._engine = rapidocr.RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # it turns lines by 180 degrees, now and then wrongly
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                # given a path, RapidOCR takes the file as it is; without one it may download
                "Det.model_path": _bundled(models, "det"),
                "Rec.model_path": _bundled(models, "rec"),
            }
        )

    def unload(self) -> None:
        """Let the reader go."""
        self._engine = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """One reading per image; NaN where there is no text to look for."""
        if self._engine is None:
            raise RewardError("reward 'ocr' is not loaded; the hub does that, or call .load(device, dtype) first")
        rows = [self._judge(sample) for sample in samples]
        parts = {mode: torch.tensor([row[mode] for row in rows], dtype=torch.float32) for mode in ("ned", "contain")}
        return Scores(value=parts[self._mode], parts=parts, info=[row["info"] for row in rows])

    def _judge(self, sample: Sample) -> dict[str, Any]:
        target = target_text(sample)
        if not normalise(target):
            error = 'no text to look for: set meta["text"], or put it between double quotes in the prompt'
            return {"ned": math.nan, "contain": math.nan, "info": {"error": error}}
        read = self._read(sample.media)
        info = {"read": read, "target": target}
        return {"ned": ned(read, target), "contain": contain(read, target), "info": info}

    def _read(self, image: Tensor) -> str:
        """All text in an image [3, H, W], line after line."""
        bgr = np.ascontiguousarray(to_array(image)[:, :, ::-1])
        return " ".join(getattr(self._engine(bgr), "txts", None) or ())


def target_text(sample: Sample) -> str:
    """The text a sample should show; empty where it does not say."""
    if "text" in sample.meta:
        return str(sample.meta["text"] or "")
    return " ".join(straight or curly for straight, curly in _QUOTED.findall(sample.prompt))


def ned(read: str, target: str) -> float:
    """1 - normalised edit distance: 1 = equal, 0 = nothing in common."""
    read, target = normalise(read), normalise(target)
    return 1 - levenshtein(read, target) / max(len(read), len(target), 1)


def contain(read: str, target: str) -> float:
    """Flow-GRPO's OCR reward: distance 0 as soon as the target occurs anywhere, and at most len(target)."""
    read, target = normalise(read), normalise(target)
    distance = 0 if target in read else min(levenshtein(read, target), len(target))
    return 1 - distance / max(len(target), 1)


def normalise(text: str) -> str:
    """Without white space, and in lower case."""
    return "".join(text.split()).lower()


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b` (Wagner-Fischer, one row at a time)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _bundled(models: Path, stage: str) -> str:
    """The one model file of a stage that lies in the wheel; never one that would have to be fetched."""
    files = sorted(models.glob(f"*_{stage}_*.onnx"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise RewardError(
            f"reward 'ocr' expects one {stage} model in the RapidOCR wheel, found {found} in {models}. "
            f"This is written for rapidocr >=3.10,<4, and nothing is downloaded: {_INSTALL} --force-reinstall"
        )
    return str(files[0])
