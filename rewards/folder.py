"""Pictures and videos from the disk as samples: files, folders, or a list of them in JSON lines.

    a.png b.mp4          with one prompt for all
    folder/              its media in order of their names; prompts from metadata.jsonl, if there is one
    list.jsonl           one object a line: {"file": "a.png", "prompt": "a dog", ...}; the other keys are metadata

In metadata.jsonl the file is called `file` or, as in the hub's image folders, `file_name`; it is relative to the list.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rewards.media import RANGE_TOLERANCE, from_pil
from rewards.types import RewardError, Sample

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # all that PIL may try: some of its other formats start programs
LISTS = ("metadata.jsonl", "prompts.jsonl")


def read_media(
    paths: Sequence[Path], prompt: str, meta: Mapping[str, Any], *, limit: int | None = None
) -> tuple[list[Sample], list[Path]]:
    """Samples and the files that they come from; equal prompts are one group. RewardError names what cannot be read."""
    rows = [row for path in paths for row in _rows(path, prompt, meta)][:limit]
    if not rows:
        raise RewardError(f"no picture or video in {', '.join(map(str, paths))} (known: {' '.join(IMAGES + VIDEOS)})")
    groups: dict[str, int] = {}
    samples = []
    for file, text, facts in rows:
        media, fps = read(file)
        group = groups.setdefault(text, len(groups))
        samples.append(Sample(media=media, prompt=text, group=group, fps=fps, meta=facts))
    return samples, [file for file, _, _ in rows]


def read(file: Path, fps: float | None = None) -> tuple[Tensor, float | None]:
    """A picture [3,H,W] or a video [F,3,H,W] in [0,1], and the video's frames per second.

    A folder is a video's frames, a .safetensors one of a pair store. Of a video file at most `fps` frames a second are
    kept, evenly spaced. RewardError names a file that cannot be read.
    """
    try:
        if not file.exists():
            raise RewardError(f"{file} does not exist")
        if file.is_dir():
            return _frames(file), None
        if file.suffix == ".safetensors":
            return _stored(file), None
        if file.suffix.lower() in VIDEOS:
            return _video(file, fps)
        return picture(file.read_bytes()), None
    except RewardError:
        raise
    except Exception as error:  # PIL, PyAV and safetensors raise what they like about damaged files
        raise RewardError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


PICTURES = ("reference", "source")
"""Keys of a sample's metadata that hold a picture, or the path of one."""

_may_read = ContextVar("may_read", default=True)


@contextmanager
def without_files() -> Iterator[None]:
    """No path in a sample's metadata is read: what a client names is none of the server's files."""
    token = _may_read.set(False)
    try:
        yield
    finally:
        _may_read.reset(token)


def reference(given: Any, key: str = "reference") -> Tensor:
    """A picture that a sample's metadata names under `key`, a path or a tensor, as [3,H,W] in [0,1].

    RewardError for what can be neither, or cannot be read: it is one sample's trouble.
    """
    if isinstance(given, str | Path):
        if not _may_read.get():
            raise RewardError(f'meta["{key}"] is a path, and a server reads none that a client names. Mend: send it')
        try:
            given = read(Path(given).expanduser())[0]
        except RewardError as error:
            raise RewardError(f'meta["{key}"]: {error}') from error
    if not isinstance(given, Tensor) or given.ndim != 3 or len(given) != 3 or not given.is_floating_point():
        told = f"tensor {list(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise RewardError(
            f'meta["{key}"] is a {told}; expected the path of an image, or a tensor [3, H, W] in [0, 1], floating '
            "point. Mend: .permute(2, 0, 1) for channels-last data, .float() / 255 for bytes."
        )
    low, high = (value.item() for value in given.detach().aminmax())
    if not (-RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):
        raise RewardError(f'meta["{key}"] spans [{low:.3g}, {high:.3g}]; expected [0, 1]')
    return given


def picture(data: bytes) -> Tensor:
    """The bytes of a PNG, JPEG, WEBP or BMP as [3,H,W] in [0,1]."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return from_pil(image)
    except UnidentifiedImageError:
        raise ValueError(f"it is no {', '.join(_FORMATS)}") from None


def _frames(folder: Path) -> Tensor:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    if not files:
        raise RewardError(f"{folder} holds no frames ({', '.join(IMAGES)})")
    frames = [picture(file.read_bytes()) for file in files]
    if len({frame.shape for frame in frames}) > 1:
        raise RewardError(f"{folder}: its frames differ in size")
    return torch.stack(frames)


def _stored(file: Path) -> Tensor:
    """A video of a pair store: one tensor "media", uint8 [F,3,H,W]."""
    from safetensors.torch import load_file

    return load_file(file)["media"].float() / 255


def _video(file: Path, most: float | None) -> tuple[Tensor, float | None]:
    try:
        import av
    except ImportError as error:
        raise RewardError(f'{file} is a video, and PyAV is not installed: pip install -e ".[video]"') from error
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate) if stream.average_rate else None
        step = 1.0 if most is None or fps is None else max(1.0, fps / most)
        kept, due = [], 0.0
        for number, frame in enumerate(container.decode(stream)):
            if number >= due:
                kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255)
                due += step
    if not kept:
        raise RewardError(f"{file} holds no frame")
    return torch.stack(kept), None if fps is None else fps / step


def _rows(path: Path, prompt: str, meta: Mapping[str, Any]) -> list[tuple[Path, str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        return _listed(path)
    if not path.is_dir():
        return [(path, prompt, dict(meta))]
    lists = [path / name for name in LISTS if (path / name).is_file()]
    if lists:
        return _listed(lists[0])
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES + VIDEOS)
    return [(file, prompt, dict(meta)) for file in files]


def lists_files(path: Path) -> bool:
    """Whether a .jsonl is a list of pictures with their prompts, by its first line; other files are pictures."""
    if path.suffix not in (".jsonl", ".json", ".csv", ".parquet", ".arrow"):
        return True
    with path.open("rb") as lines:
        return path.suffix == ".jsonl" and re.search(rb'"file(_name)?"\s*:', lines.readline(1 << 20)) is not None


def _listed(path: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """The rows of a list, with errors that name the line."""
    if not path.is_file():
        raise RewardError(f"{path} does not exist")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RewardError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{path}:{number}: no JSON: {error}") from error
        name = row.pop("file", None) or row.pop("file_name", None) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise RewardError(f'{path}:{number}: no `file`; expected {{"file": "a.png", "prompt": "a dog"}}')
        meta = row.pop("meta", None) or {}
        if not isinstance(meta, dict):
            raise RewardError(f"{path}:{number}: `meta` is {type(meta).__name__}; expected an object")
        rows.append((path.parent / name, str(row.pop("prompt", "")), {**meta, **row}))
    return rows
