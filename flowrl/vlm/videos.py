"""Videos that questions are about: a few frames, evenly spaced, of a file or of a list of pictures.

A model gets frames and how many of them make a second, for some tell the time of each. Nothing else of a video is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowrl.data import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

LISTED_FPS = 2.0
"""Frames a second of listed frames, whose times nobody tells; the tools of Qwen's authors take them so too."""
_DEMUXERS = {".mp4": "mp4", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska", ".avi": "avi", ".gif": "gif"}
"""Said by the name of a file, not guessed from what is in it: some formats are lists of other files."""


class Clip(NamedTuple):
    """What a model is shown of a video."""

    frames: list[Image]
    """RGB, all of one size."""
    fps: float
    """How many of these make a second."""


def is_video(name: str) -> bool:
    """Whether a file is called as a video is."""
    return Path(name).suffix.lower() in _DEMUXERS


def clip_of(place: str, video: str | Sequence[Any], most: int, picture: Callable[[Any], Image]) -> Clip:
    """At most `most` frames of a video, evenly spaced: of a file, or of frames that `picture` opens.

    DataError names `place` and a file that cannot be read, or frames that differ in size.
    """
    if isinstance(video, str):
        return _of_file(place, Path(video), most)
    chosen = _evenly(len(video), most)
    frames = [picture(video[number]) for number in chosen]
    if len({frame.size for frame in frames}) > 1:
        raise DataError(f"{place}: the frames of a video differ in size; give all of them one.")
    return Clip(frames, LISTED_FPS * len(chosen) / len(video))


def _evenly(total: int, most: int) -> list[int]:
    count = min(total, most)
    return [number * total // count for number in range(count)]


def _of_file(place: str, file: Path, most: int) -> Clip:
    try:
        import av
    except ImportError as error:
        raise DataError(f'{place}: {file} is a video, and PyAV is not installed: pip install -e ".[video]".') from error

    def opened() -> Any:
        return av.open(str(file), format=_DEMUXERS[file.suffix.lower()])

    try:
        with opened() as container:  # a packet is a frame; counting them decodes nothing
            stream = container.streams.video[0]
            rate = float(stream.average_rate or LISTED_FPS)
            total = sum(packet.size > 0 for packet in container.demux(stream))
        chosen = set(_evenly(total, most))
        with opened() as container:
            frames = [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in chosen]
    except (OSError, ValueError, IndexError) as error:  # PyAV's own errors are such
        raise DataError(f"{place}: {file} cannot be read as a video ({error}); replace the file.") from error
    if not frames:
        raise DataError(f"{place}: {file} holds no frame; replace the file.")
    return Clip(frames, rate * len(frames) / total)
