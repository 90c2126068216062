"""Pictures and videos from the disk as samples: files, folders, or a list of them in JSON lines.

    a.png b.mp4          with one prompt for all
    folder/              its media in order of their names; prompts from metadata.jsonl, if there is one
    list.jsonl           one object a line: {"file": "a.png", "prompt": "a dog", ...}; the other keys are metadata

In metadata.jsonl the file is called `file` or, as in the hub's image folders, `file_name`; it is relative to the list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rewards.media import from_pil
from rewards.types import RewardError, Sample

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
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


def read(file: Path) -> tuple[Tensor, float | None]:
    """A picture [3,H,W] or a video [F,3,H,W] in [0,1], and the video's frames per second."""
    if file.is_dir():
        frames = sorted(path for path in file.iterdir() if path.suffix.lower() in IMAGES)
        if not frames:
            raise RewardError(f"{file} has no pictures: a folder that is one video holds its frames")
        return torch.stack([read(frame)[0] for frame in frames]), None
    if not file.is_file():
        raise RewardError(f"{file} does not exist")
    if file.suffix.lower() in VIDEOS:
        return _video(file)
    try:
        with Image.open(file) as image:
            return from_pil(image), None
    except (UnidentifiedImageError, OSError) as error:
        raise RewardError(f"{file} is no picture that can be read: {error}") from error


def _video(file: Path) -> tuple[Tensor, float | None]:
    try:
        import av
    except ImportError as error:
        raise RewardError(f'{file} is a video; reading it needs PyAV: pip install -e ".[video]"') from error
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = float(stream.average_rate) if stream.average_rate else None
    except (av.error.FFmpegError, IndexError) as error:
        raise RewardError(f"{file} is no video that can be read: {error}") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, rate


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


def _listed(path: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """The rows of a list, with errors that name the line."""
    if not path.is_file():
        raise RewardError(f"{path} does not exist")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RewardError(f"{path}:{number}: no JSON: {error}") from error
        name = row.pop("file", None) or row.pop("file_name", None) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise RewardError(f'{path}:{number}: no `file`; expected {{"file": "a.png", "prompt": "a dog"}}')
        rows.append((path.parent / name, str(row.pop("prompt", "")), {**row.pop("meta", {}), **row}))
    return rows
