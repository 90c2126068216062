"""Is the asked-for text in the picture? Read on the CPU by one of two engines.

    rapidocr    PP-OCRv6 (ONNX) with the weights inside its wheel; Chinese, English and what else is in its alphabet
    tesseract   the program of that name, started once a picture with `--psm 11` (text anywhere); other mistakes, so
                that a policy which fools the one shows under the other

What is read is scored in one of two ways:

    ned       1 - levenshtein(read, target) / max(len(read), len(target)): too much text costs as missing text does
    contain   Flow-GRPO's reward (arXiv:2505.05470): 1 where the target is part of what is read, otherwise
              1 - min(levenshtein, len(target)) / len(target); repeating the target costs nothing, and models find out

Case and white space do not count. The target is `meta["text"]`, else what stands between double quotes in the prompt
(all of it, in order). Both numbers are logged as parts, so that the distance between them shows the repetition.

Note: Flow-GRPO's code takes only the first quoted text of a prompt. Where there are more, give that in `meta["text"]`.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rewards.card import Card
from rewards.media import to_array
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["OCR"]

Reader: TypeAlias = Callable[[NDArray[np.uint8]], str]
"""From an RGB picture [H, W, 3] to all text in it, line after line."""

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_INSTALL = 'pip install -e ".[ocr]"'
_APT = "apt-get install tesseract-ocr"


class OCR:
    """Similarity of the text read in an image to the text that was asked for, in [0, 1].

    Parts: ned and contain. Info: what was read and what was asked for. Pictures are read side by side, each by a reader
    of its own on one core, so that a score does not depend on what else is read.
    """

    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    range = (0.0, 1.0)
    device = "cpu"
    card = Card(
        source="RapidOCR 3.10 with PP-OCRv6 (PaddleOCR); tesseract 5",
        licence="Apache-2.0 (RapidOCR and its weights)",
        memory_gb=0.03,
        packages={"rapidocr": _INSTALL, "onnxruntime": _INSTALL},
        note=f"engine: tesseract needs that program instead: {_APT}",
    )

    def __init__(
        self,
        mode: str = "ned",
        engine: str = "rapidocr",
        threads: int = 2,
        language: str = "eng",
        timeout: float = 20.0,
    ) -> None:
        """`mode`: ned or contain; `engine`: rapidocr or tesseract.

        threads    how many pictures are read at once, on one core each
        language   tesseract's name of what it reads; several are joined by +
        timeout    seconds that tesseract may take for one picture (noise takes it longest); then there is no verdict
        """
        if mode not in ("ned", "contain"):
            raise RewardError(f'ocr mode {mode!r}; expected "ned" or "contain"')
        if engine not in ("rapidocr", "tesseract"):
            raise RewardError(f'ocr engine {engine!r}; expected "rapidocr" or "tesseract"')
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise RewardError(f"ocr threads is {threads!r}; expected a whole number of at least 1")
        if not timeout > 0:
            raise RewardError(f"ocr timeout is {timeout!r}; expected a number of seconds above 0")
        self._mode, self._engine, self._threads = mode, engine, threads
        self._language, self._timeout = language, float(timeout)
        self._pool: ThreadPoolExecutor | None = None
        self._readers: SimpleQueue[Reader] = SimpleQueue()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the readers; they run on the CPU in fp32 whatever is asked for."""
        if self._engine == "rapidocr":
            readers = _rapidocr(self._threads)
        else:
            readers = [_tesseract(self._language, self._timeout)] * self._threads
        self._readers = SimpleQueue()
        for reader in readers:
            self._readers.put(reader)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ocr")

    def unload(self) -> None:
        """Let the readers go."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._readers = None, SimpleQueue()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """One reading per image; NaN where there is no text to look for, or tesseract fails."""
        if self._pool is None:
            raise RewardError("reward 'ocr' is not loaded; the hub does that, or call .load(device, dtype) first")
        rows = list(self._pool.map(self._judge, samples))
        parts = {mode: torch.tensor([row[mode] for row in rows], dtype=torch.float32) for mode in ("ned", "contain")}
        return Scores(value=parts[self._mode], parts=parts, info=[row["info"] for row in rows])

    def _judge(self, sample: Sample) -> dict[str, Any]:
        target = target_text(sample)
        if not normalise(target):
            return _unread('no text to look for: set meta["text"], or put it between double quotes in the prompt')
        try:
            read = self._read(to_array(sample.media))
        except _Unreadable as error:
            return _unread(str(error))
        return {
            "ned": ned(read, target),
            "contain": contain(read, target),
            "info": {"read": read, "target": target},
        }

    def _read(self, image: NDArray[np.uint8]) -> str:
        """All text in a picture, by the next reader that is free: no reader serves two threads at once."""
        reader = self._readers.get()
        try:
            return reader(image)
        finally:
            self._readers.put(reader)


def _unread(error: str) -> dict[str, Any]:
    return {"ned": math.nan, "contain": math.nan, "info": {"error": error}}


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


# ------------------------------------------------------------------------------------------------ readers


def _rapidocr(count: int) -> list[Reader]:
    """`count` readers of one thread each: they spend 0.6 of the CPU time that one reader with `count` threads does."""
    try:
        import onnxruntime  # noqa: F401  (RapidOCR asks for it only when the first image comes)
        import rapidocr
    except ImportError as error:
        raise RewardError(f"reward 'ocr' needs RapidOCR and onnxruntime: {_INSTALL} ({error})") from error
    models = Path(rapidocr.__file__).parent / "models"
    params = {
        "Global.log_level": "error",
        "Global.use_cls": False,  # it turns lines by 180 degrees, now and then wrongly
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        # given a path, RapidOCR takes the file as it is; without one it may download
        "Det.model_path": _bundled(models, "det"),
        "Rec.model_path": _bundled(models, "rec"),
    }
    return [_Rapid(rapidocr.RapidOCR(params=dict(params))) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class _Rapid:
    """One RapidOCR, which is not safe to share between threads."""

    engine: Any

    def __call__(self, image: NDArray[np.uint8]) -> str:
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        return " ".join(getattr(self.engine(bgr), "txts", None) or ())


class _Unreadable(Exception):
    """tesseract gave no reading of one picture."""


@dataclass(frozen=True, slots=True)
class _Tesseract:
    """The program `tesseract`, once a picture: PNG in, text out, no shell and no file in between."""

    program: str
    language: str
    timeout: float

    def __call__(self, image: NDArray[np.uint8]) -> str:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG", compress_level=1)
        status, out, err = self.run("stdin", "stdout", "-l", self.language, "--psm", "11", given=file.getvalue())
        if status:
            raise _Unreadable(f"tesseract ended with status {status}: {err or 'it does not say why'}")
        return " ".join(out.split())

    def run(self, *arguments: str, given: bytes = b"") -> tuple[int, str, str]:
        """Exit status, standard output, and the last line on standard error."""
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # by default each of them takes four cores
        try:
            done = subprocess.run(
                [self.program, *arguments], input=given, capture_output=True, timeout=self.timeout, env=environment
            )
        except subprocess.TimeoutExpired:
            raise _Unreadable(f"tesseract did not end within {self.timeout:g} s") from None
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        return done.returncode, done.stdout.decode(errors="replace"), errors[-1] if errors else ""


def _tesseract(language: str, timeout: float) -> Reader:
    """A reader, after a look at whether the program is here, runs, and knows the language."""
    packages = [_APT, *(f"tesseract-ocr-{each.replace('_', '-')}" for each in language.split("+"))]
    program = shutil.which("tesseract")
    if program is None:
        raise RewardError(
            f"reward 'ocr' with engine: tesseract needs that program on the PATH: {' '.join(packages)}. "
            f"Without it, use engine: rapidocr ({_INSTALL})."
        )
    reader = _Tesseract(program, language, timeout)
    try:
        status, out, err = reader.run("--list-langs")
    except (_Unreadable, OSError) as error:
        raise RewardError(f"reward 'ocr': {program} cannot be run: {error}. Mend: {' '.join(packages)}") from error
    known = out.split()
    missing = [each for each in language.split("+") if each not in known]
    if status or missing:
        told = err or f"it ended with status {status}" if status else f"it has no {', '.join(missing)} (it has: {out})"
        raise RewardError(
            f"reward 'ocr': {program} cannot read {language!r}: {' '.join(told.split())}. Mend: {' '.join(packages)}"
        )
    return reader


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
