"""Rows about pictures as their files have them: JSON lines, Hugging Face data sets on the disk, the built-in world's.

A Hugging Face data set is a folder of `save_to_disk`, a folder of .parquet files, or one .parquet or .arrow file. Its
rows are read portion by portion, and pictures in its columns become files of the cache folder, named by their contents:
a large data set is never in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.data import IMAGES, DataError, json_object, picture_paths, read_lines, short
from flowrl.resolve import nearest
from flowrl.vlm.videos import is_video

BUILT_IN = "shapes_questions"
PICTURES = (IMAGES, "image")
"""Fields that hold pictures; the first that a row has counts."""
_TABLES = (".parquet", ".arrow")
_SPLITS = {"train": ("train",), "held_out": ("held_out", "test", "validation")}
"""Names of a split, by ours."""
_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
"""All that PIL may try: some of its other formats start programs."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as its file has it."""

    place: str
    """file:line, for messages."""
    fields: dict[str, Any]
    folder: Path
    """Where its relative paths start."""


# ------------------------------------------------------------------------------------------------ reading


def read_rows(source: str | Path | Sequence[str | Mapping[str, Any]], split: str = "train") -> Iterator[Row]:
    """The rows of a source as they are, one at a time; texts in a list have no pictures. Files have no splits."""
    if not isinstance(source, str | Path):
        rows = ({"prompt": row} if isinstance(row, str) else dict(row) for row in source)
        yield from (Row(f"prompt {n} of the list", row, Path()) for n, row in enumerate(rows))
        return
    name, _, kinds = str(source).partition(":")
    if name == BUILT_IN:
        yield from _built_in(split, [kind.strip() for kind in kinds.split(",")] if kinds else None)
        return
    path = Path(source).expanduser()
    files = _files(path, split) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise DataError(_missing(file))
        yield from _lines(file) if file.suffix == ".jsonl" else _table(file)


def _built_in(split: str, kinds: Sequence[str] | None) -> Iterator[Row]:
    from flowrl.shapes.questions import KINDS, rows

    for kind in kinds or ():
        if kind not in KINDS:
            raise DataError(f"{BUILT_IN} has no questions {kind!r}{nearest(kind, KINDS)}; it has {', '.join(KINDS)}.")
    for number, (text, metadata) in enumerate(rows(split, kinds), start=1):
        yield Row(f"{BUILT_IN}:{number}", {"prompt": text, **metadata}, Path())


def _missing(path: Path) -> str:
    known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, [*known, BUILT_IN])
    return (
        f"there is no file {str(path)!r}{near}; looked for {path.absolute()}. Give {BUILT_IN!r}, a .jsonl file, a "
        ".parquet file, or the folder of a data set."
    )


def _files(folder: Path, split: str) -> list[Path]:
    """The tables of a data set's folder, of one split where it has several."""
    names = _SPLITS.get(split, (split,))
    if (folder / "dataset_dict.json").is_file():  # what DatasetDict.save_to_disk writes: a folder a split
        there = _described(folder / "dataset_dict.json").get("splits", [])
        name = next((name for name in names if name in there), None)
        if name is None:
            raise DataError(f"{folder}: no split {' or '.join(names)}; there are {', '.join(map(str, there))}.")
        folder = folder / name
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        return [folder / str(entry["filename"]) for entry in _described(folder / "state.json").get("_data_files", [])]
    tables = sorted(file for pattern in ("*.parquet", "data/*.parquet") for file in folder.glob(pattern))
    if not tables:
        raise DataError(f"{folder} is no data set: no state.json of save_to_disk and no .parquet files; name a file.")
    of_split = [file for file in tables if file.name.startswith(tuple(f"{name}-" for name in names))]
    known = any(file.name.startswith(tuple(f"{n}-" for ns in _SPLITS.values() for n in ns)) for file in tables)
    if known and not of_split:
        raise DataError(f"{folder}: no split {' or '.join(names)} among {', '.join(f.name for f in tables[:8])}.")
    return of_split or tables


def _described(file: Path) -> dict[str, Any]:
    return json_object(str(file), " ".join(read_lines(file)))


def _lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(file), start=1):
        place = f"{file}:{number}"
        yield Row(place, json_object(place, line), file.parent)


def _table(file: Path) -> Iterator[Row]:
    """The rows of a .parquet or .arrow file, portion by portion."""
    if file.suffix not in _TABLES:
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; use .jsonl, .parquet or .arrow.")
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f'{file} is a table, and pyarrow is not installed: pip install -e ".[data]".') from error
    number = 0
    try:
        for batch in _batches(file):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{file}:{number}", fields, file.parent)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: not a table that pyarrow reads ({error}).") from error


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(file, memory_map=True).iter_batches(batch_size=64)
        return
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))  # as `datasets` writes it
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        return
    yield from reader


def first_of(fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these names that is a field."""
    return next((name for name in names if name in fields), None)


# ------------------------------------------------------------------------------------------------ pictures of a row


def images_of(row: Row, column: str, given: Any) -> list[Any]:
    """Paths that hold from anywhere, or PIL images."""
    from flowrl.tiny import cache_folder

    place = f"{row.place}: {column!r}"
    listed = list(given) if isinstance(given, list | tuple) else [given]
    return [image_of(place, item, row.folder, cache_folder() / "pictures") for item in listed]


def videos_of(row: Row, column: str, given: Any) -> list[Any]:
    """Each video as a path that holds from anywhere, or as its frames: paths too, or PIL images."""
    place = f"{row.place}: {column!r}"
    if not isinstance(given, list | tuple):
        raise DataError(f"{place} is {short(given)}; give a list of videos, each a path or a list of frames.")
    found: list[Any] = []
    for item in given:
        if isinstance(item, list | tuple) and item:
            found.append(images_of(row, column, item))
        elif isinstance(item, str) and is_video(item):
            found.append(picture_paths(place, item, row.folder))
        else:
            raise DataError(f"{place} holds {short(item)}; a video is the path of an .mp4 or .gif, or its frames.")
    return found


def image_of(place: str, item: Any, folder: Path, kept: Path) -> Any:
    """The path of a picture that a field holds in any form, or a PIL image; bytes become a file in `kept`."""
    if isinstance(item, Mapping):  # the Hugging Face form {"bytes", "path"}
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes):
        return str(stored(place, item, kept))
    if isinstance(item, str):
        return picture_paths(place, item, folder)
    if hasattr(item, "convert"):
        return item
    raise DataError(f"{place} is {short(item)}; give the path of a picture, a list of paths, or a column of pictures.")


def stored(place: str, data: bytes, folder: Path) -> Path:
    """A picture as a file that is named by its contents: written once, whoever asks."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
            suffix = _FORMATS[image.format or ""]
    except Exception as error:  # PIL raises what it likes about damaged files
        raise DataError(f"{place}: {len(data)} bytes that are no {', '.join(_FORMATS)} ({error}).") from error
    file = folder / f"{hashlib.sha256(data).hexdigest()}{suffix}"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, data)
    return file


def write_whole(file: Path, data: bytes) -> None:
    """In one step from nothing to complete: another process may be looking for the file, or writing it too."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(file)
