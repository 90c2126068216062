"""Preference data on the disk: what people preferred to what, in our own form or as the field's benchmarks store it.

    data = read_preferences("pairs.jsonl")                                     the format is recognised
    data = read_preferences("HPD/test.json", images="HPD/test")                media somewhere else than usual

    format       what is read                                                  media by default in
    native       .jsonl, or a folder with pairs.jsonl                          the file's folder
    store        a pair store (chosen and rejected), or its folder             the store
    pickapic     Pick-a-Pic .parquet or .arrow, a folder of them, or .jsonl    the table, or the file's folder
    hpdv2        test.json of HPDv2 (image_path, rank)                         test/ beside it, else its folder
    imagereward  test.json of ImageReward (generations, ranking)               test_images/ beside it, else its folder
    genai        GenAI-Bench .parquet, .arrow, .json or .jsonl (vote_type)     the table, or the file's folder
    videogen     videogen-rewardbench.csv (path_A, path_B, VQ, MQ, TA, ...)    the file's folder
    mmrb2        one task's .json of MMRB2 (pairs, response_a, chosen)         the file's folder

A native line is a pair `{"prompt", "a", "b", "label": 1 | -1 | 0}` (1: a is better, 0: a tie), with `"p_a": 0..1` in
place of the label where several people were asked, or a ranking `{"prompt", "items": [...], "rank": [...]}` (1 is the
best, equal is a tie). Both may have "dim", "category" and "meta"; a pair "model_a" and "model_b", a ranking "models".

A medium is an image (PNG, JPEG, WEBP), a video file (with PyAV), a folder of frames, or a .safetensors of a pair store.
It is read when it is scored; that it exists is checked at once. No file outside of the media's folder is read.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rewards.contract import short
from rewards.folder import IMAGES, picture, read
from rewards.functions import nearest
from rewards.types import RewardError, Sample

__all__ = ["FORMATS", "Item", "Medium", "Preference", "Preferences", "Ranking", "read_preferences"]

PAIRS = "pairs.jsonl"
_TABLES = (".parquet", ".arrow")
_DIMS = ("Overall", "VQ", "MQ", "TA")
_IMAGES = "`images` (of the command: --images FOLDER)"


# ------------------------------------------------------------------------------------------------ records


class Medium(Protocol):
    """An image or a video that is not read yet."""

    @property
    def key(self) -> str:
        """What tells it from others: a medium that occurs in several pairs is scored once."""
        ...

    def load(self) -> tuple[Tensor, float | None]:
        """[3, H, W] or [F, 3, H, W] in [0, 1], and the frames per second where they are known; RewardError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to score: a medium and what it was made for."""

    medium: Medium
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    attached: Mapping[str, Medium] = field(default_factory=dict)
    """Media that become part of `Sample.meta`, [3, H, W] each: the picture that an edit began with is "source"."""
    model: str | None = None
    """Which generator made it."""

    @property
    def key(self) -> str:
        """What a score depends on."""
        extra = {name: medium.key for name, medium in self.attached.items()}
        return json.dumps([self.medium.key, self.prompt, dict(self.meta), extra], sort_keys=True, default=str)

    def sample(self) -> Sample:
        """Read its media."""
        media, fps = self.medium.load()
        meta = {**self.meta, **{name: medium.load()[0] for name, medium in self.attached.items()}}
        return Sample(media=media, prompt=self.prompt, fps=fps, meta=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two items of one prompt, and which people preferred."""

    a: Item
    b: Item
    p_a: float
    """Share of the people, or the probability, that preferred a: 1, 0, or anything between; 1/2 is a tie."""
    dim: str | None = None
    """What they were asked about, where it was not simply which is better."""
    category: str | None = None
    place: str = ""
    """File and line, for messages."""

    @property
    def label(self) -> int:
        """1: a, -1: b, 0: a tie."""
        return (self.p_a > 0.5) - (self.p_a < 0.5)

    @property
    def prompt(self) -> str:
        """What both were made for; what shares it is drawn together in a bootstrap."""
        return self.a.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Several items of one prompt in order: rank 1 is the best, equal ranks are ties."""

    items: tuple[Item, ...]
    rank: tuple[float, ...]
    dim: str | None = None
    category: str | None = None
    place: str = ""

    def pairs(self) -> Iterator[Preference]:
        """All of its pairs."""
        for (a, rank_a), (b, rank_b) in itertools.combinations(zip(self.items, self.rank, strict=True), 2):
            p_a = 0.5 if rank_a == rank_b else float(rank_a < rank_b)
            yield Preference(a=a, b=b, p_a=p_a, dim=self.dim, category=self.category, place=self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """A data set: its pairs, those of rankings among them, and the rankings themselves."""

    name: str
    format: str
    pairs: tuple[Preference, ...]
    rankings: tuple[Ranking, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    """{why: how many rows say nothing that could be compared}"""

    def samples(self, limit: int | None = None) -> list[Sample]:
        """Its media, each once, as samples; those of one prompt are one group."""
        items = {item.key: item for pair in self.pairs for item in (pair.a, pair.b)}
        read_ = [item.sample() for item in list(items.values())[:limit]]
        groups = {prompt: i for i, prompt in enumerate(dict.fromkeys(sample.prompt for sample in read_))}
        return [replace(sample, group=groups[sample.prompt]) for sample in read_]


Rows = list["Preference | Ranking"]


# ------------------------------------------------------------------------------------------------ reading


def read_preferences(
    path: str | Path, format: str = "auto", *, images: str | Path | None = None, fps: float | None = None
) -> Preferences:
    """Read a local copy of preference data; nothing is fetched.

    format    one of FORMATS, or "auto"
    images    the folder that media are named relative to, if it is not the usual one
    fps       most frames a second that are kept of a video file; None keeps all, which is much memory for long ones

    RewardError names the file, the line or item, the key, and how to mend it.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise RewardError(f"there is no preference data at {str(path)!r} (looked for {source.absolute()})")
    if fps is not None and not fps > 0:
        raise RewardError(f"fps is {fps!r}; expected a number above 0, or null for every frame")
    if format != "auto" and format not in FORMATS:
        raise RewardError(f"format {format!r}{nearest(format, FORMATS)}; expected auto or one of {', '.join(FORMATS)}")
    found = _recognise(source) if format == "auto" else format
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise RewardError(f"images: there is no folder {str(images)!r} (looked for {folder.absolute()})")
    reader = _Reader(source=source, images=folder, fps=fps)
    rows = FORMATS[found](reader)
    rankings = tuple(row for row in rows if isinstance(row, Ranking))
    pairs = [pair for row in rows for pair in (row.pairs() if isinstance(row, Ranking) else [row])]
    if not pairs:
        left = ", ".join(f"{count} {why}" for why, count in reader.skipped.items())
        raise RewardError(f"{source} holds no pair to compare{f' ({left} were left out)' if left else ''}")
    return Preferences(
        name=source.stem if source.is_file() else source.name, format=found,
        pairs=tuple(pairs), rankings=rankings, skipped=dict(reader.skipped),
    )  # fmt: skip


@dataclass(kw_only=True)
class _Reader:
    """Where the data is, and what was left out of it so far."""

    source: Path
    images: Path | None
    fps: float | None
    skipped: Counter[str] = field(default_factory=Counter)

    def root(self, file: Path, *usual: str) -> Path:
        """The folder that media are named relative to: as given, else one of the usual ones beside `file`."""
        beside = [file.parent / name for name in usual if (file.parent / name).is_dir()]
        return self.images or (beside[0] if beside else file.parent)

    def medium(self, root: Path, name: Any, place: str, key: str) -> Medium:
        """A file or a folder of frames below `root`; RewardError if there is no such thing there."""
        if not isinstance(name, str) or not name.strip():
            raise RewardError(f'{place}: "{key}" is {short(name)}; expected the name of a file below {root}')
        try:
            top, path = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
        except ValueError as error:  # characters that no file's name can have
            raise RewardError(f'{place}: "{key}" is {short(name)}, not the name of a file') from error
        if not path.is_relative_to(top):
            raise RewardError(
                f'{place}: "{key}" names {short(name)}, which lies outside of {root}. '
                f"Copy it there, or give the folder that holds it with {_IMAGES}."
            )
        if not path.exists():
            raise RewardError(
                f'{place}: "{key}" names {short(name)}, which does not exist below {root}. '
                f"Put it there, or give its folder with {_IMAGES}."
            )
        return _File(path, self.fps)


def _recognise(source: Path) -> str:
    """The format of a file or folder, by its name and the keys of its first row."""
    file = source
    if source.is_dir():
        tables = sorted(path for path in source.rglob("*") if path.suffix in _TABLES)
        lines = [source / PAIRS, *sorted(source.glob("*.jsonl"))]
        file = next((path for path in lines if path.is_file()), tables[0] if tables else source)
    keys = _first_keys(file)
    for format, needed in _SIGNS:
        if needed <= keys:
            return format
    mend = f"give its format: one of {', '.join(FORMATS)} (of the command: --format NAME)"
    raise RewardError(f"{file} {_unknown(file, keys)}; {mend}")


def _unknown(file: Path, keys: set[str]) -> str:
    """Why no format is recognised, by the keys of the first row."""
    if file.is_dir():
        return f"is a folder without {PAIRS}, .jsonl, .parquet or .arrow files"
    if file.suffix not in (".jsonl", ".json", ".csv", *_TABLES):
        return "is no .jsonl, .json, .csv, .parquet or .arrow file"
    if not keys:
        return "has no row with keys"
    has = f"has the keys {', '.join(sorted(keys))}"
    nearly = [(format, needed) for format, needed in _SIGNS if len(needed - keys) == 1 and needed & keys]
    if not nearly:
        return has
    format, needed = max(nearly, key=lambda sign: len(sign[1] & keys))
    (missing,) = needed - keys
    return f'{has}, and "{missing}" is missing{nearest(missing, sorted(keys - needed))} for the format {format}'


_SIGNS = (
    ("store", {"chosen", "rejected"}),
    ("native", {"prompt", "a", "b"}),
    ("native", {"prompt", "items", "rank"}),
    ("hpdv2", {"image_path", "rank"}),
    ("imagereward", {"generations", "ranking"}),
    ("videogen", {"path_A", "path_B"}),
    ("genai", {"vote_type"}),
    ("mmrb2", {"pairs"}),
    ("pickapic", {"caption", "label_0"}),
)


def _first_keys(file: Path) -> set[str]:
    if file.suffix in (".jsonl", ".json", ".csv") and not _read_text(file).strip():
        raise RewardError(f"{file} is empty")
    if file.suffix == ".jsonl":
        return set(next(iter(_jsonl(file)), ("", {}))[1])
    if file.suffix == ".json":
        data = _json(file)
        first = data[0] if isinstance(data, list) and data else data
        return set(first) if isinstance(first, dict) else set()
    if file.suffix == ".csv":
        return set(next(_csv(file), ("", {}))[1])
    return set(_Table(file).columns) if file.suffix in _TABLES else set()


# ------------------------------------------------------------------------------------------------ our own


def _native(reader: _Reader) -> Rows:
    """Pairs and rankings, one a line."""
    file = reader.source / PAIRS if reader.source.is_dir() else reader.source
    root = reader.root(file)
    return [_native_row(reader, root, place, row) for place, row in _jsonl(file)]


_SHARED = ("prompt", "dim", "category", "meta")
_PAIR_KEYS = (*_SHARED, "a", "b", "label", "p_a", "model_a", "model_b")
_RANKING_KEYS = (*_SHARED, "items", "rank", "models")


def _native_row(reader: _Reader, root: Path, place: str, row: Mapping[str, Any]) -> Preference | Ranking:
    allowed = _RANKING_KEYS if "items" in row else _PAIR_KEYS
    for key in row:
        if key not in allowed:
            near = nearest(key, allowed)
            raise RewardError(f'{place}: unknown key "{key}"{near}; what belongs to the prompt goes into "meta"')
    prompt = _text(place, row, "prompt")
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise RewardError(f'{place}: "meta" is {short(meta)}; expected an object, or leave it out')
    labels = {key: _name(place, row, key) for key in ("dim", "category")}

    def item(name: Any, key: str, model: Any) -> Item:
        if model is not None and not isinstance(model, str):
            raise RewardError(f'{place}: the model of "{key}" is {short(model)}; expected a name')
        return Item(medium=reader.medium(root, name, place, key), prompt=prompt, meta=meta, model=model)

    if "items" not in row:
        a, b = (item(_need(place, row, key), key, row.get(f"model_{key}")) for key in ("a", "b"))
        return Preference(a=a, b=b, p_a=_preference(place, row), place=place, **labels)
    names, rank = _list(place, row, "items"), _ranks(place, row, "rank", len(_list(place, row, "items")))
    models = row.get("models") or [None] * len(names)
    if not isinstance(models, list) or len(models) != len(names):
        raise RewardError(f'{place}: "models" is {short(models)}; expected one name for each of {len(names)} items')
    items = tuple(item(name, "items", model) for name, model in zip(names, models, strict=True))
    return Ranking(items=items, rank=rank, place=place, **labels)


def _preference(place: str, row: Mapping[str, Any]) -> float:
    """`label` or `p_a` of a native pair, as the probability that a is better."""
    if ("label" in row) == ("p_a" in row):
        found = "both" if "label" in row else "neither"
        raise RewardError(f'{place}: expected "label" (1, -1 or 0) or "p_a" (0 to 1), found {found}')
    if "label" in row:
        label = row["label"]
        if isinstance(label, bool) or label not in (1, -1, 0):
            raise RewardError(f'{place}: "label" is {short(label)}; expected 1 (a is better), -1 (b) or 0 (a tie)')
        return (1 + float(label)) / 2
    chance = row["p_a"]
    if not _is_number(chance) or not 0 <= chance <= 1:
        raise RewardError(f'{place}: "p_a" is {short(chance)}; expected the share that preferred a, from 0 to 1')
    return float(chance)


def _store(reader: _Reader) -> Rows:
    """A pair store: chosen and rejected of one prompt."""
    file = reader.source / PAIRS if reader.source.is_dir() else reader.source
    root, rows = reader.root(file), Rows()
    for place, row in _jsonl(file):
        meta = row.get("metadata") or {}
        if not isinstance(meta, dict):
            raise RewardError(f'{place}: "metadata" is {short(meta)}; expected an object, or leave it out')
        a, b = (
            Item(
                medium=reader.medium(root, _need(place, row, side), place, side),
                prompt=_text(place, row, "prompt"), meta=meta,
            )
            for side in ("chosen", "rejected")
        )  # fmt: skip
        category = meta.get("category")
        rows.append(Preference(a=a, b=b, p_a=1.0, category=None if category is None else str(category), place=place))
    return rows


# ------------------------------------------------------------------------------------------------ benchmarks


def _pickapic(reader: _Reader) -> Rows:
    """Pick-a-Pic (arXiv:2305.01569): caption, jpg_0 and jpg_1, label_0 in 0, 1/2, 1; rows without a label are left out.

    In a .jsonl, jpg_0 (or image_0) names a file; without either, the file is called as image_0_uid says.
    """
    rows = Rows()
    for place, row, medium in _rows(reader, ("caption", "label_0", "has_label", "model_0", "model_1"), "jpg_0"):
        if row.get("has_label") in (False, 0):
            reader.skipped["without a label"] += 1
            continue
        label = _need(place, row, "label_0")
        if label not in (0, 0.5, 1):
            raise RewardError(f'{place}: "label_0" is {short(label)}; expected 0, 0.5 or 1')
        a, b = (
            Item(
                medium=medium((f"jpg_{side}", f"image_{side}", f"image_{side}_uid")),
                prompt=_text(place, row, "caption"), model=row.get(f"model_{side}"),
            )
            for side in (0, 1)
        )  # fmt: skip
        rows.append(Preference(a=a, b=b, p_a=float(label), place=place))
    return rows


def _genai(reader: _Reader) -> Rows:
    """GenAI-Bench (arXiv:2406.04485): votes on two pictures, edits or videos. "Both are bad" is a tie, as "tie" is."""
    votes = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
    columns = ("prompt", "instruct_prompt", "vote_type", "left_model", "right_model")
    rows = Rows()
    for place, row, medium in _rows(reader, columns, "left_image", "left_output_image", "left_video"):
        vote = _need(place, row, "vote_type")
        if not isinstance(vote, str) or vote not in votes:
            raise RewardError(f'{place}: "vote_type" is {short(vote)}; expected one of {", ".join(votes)}')
        edits = "instruct_prompt" in row
        attached = {"source": medium(("source_image",))} if edits else {}
        a, b = (
            Item(
                medium=medium((f"{side}_image", f"{side}_output_image", f"{side}_video")),
                prompt=_text(place, row, "instruct_prompt" if edits else "prompt"),
                attached=attached, model=row.get(f"{side}_model"),
            )
            for side in ("left", "right")
        )  # fmt: skip
        rows.append(Preference(a=a, b=b, p_a=votes[vote], place=place))
    return rows


def _hpdv2(reader: _Reader) -> Rows:
    """HPDv2's test.json (arXiv:2306.09341): image_path and rank of each, lower is better."""
    return _json_rankings(reader, "image_path", "rank", "test")


def _imagereward(reader: _Reader) -> Rows:
    """ImageReward's test.json (arXiv:2304.05977): generations and ranking of each, lower is better."""
    return _json_rankings(reader, "generations", "ranking", "test_images")


def _json_rankings(reader: _Reader, names: str, ranks: str, folder: str) -> Rows:
    root, rows = reader.root(reader.source, folder), Rows()
    for place, row in _items(reader.source, _json(reader.source)):
        prompt, files = _text(place, row, "prompt"), _list(place, row, names)
        rank = _ranks(place, row, ranks, len(files))
        items = tuple(Item(medium=reader.medium(root, file, place, names), prompt=prompt) for file in files)
        rows.append(Ranking(items=items, rank=rank, place=place))
    return rows


def _videogen(reader: _Reader) -> Rows:
    """VideoGen-RewardBench's csv (arXiv:2501.13918): A, B or same for each of VQ, MQ, TA and Overall."""
    chances = {"A": 1.0, "B": 0.0, "same": 0.5}
    root, rows = reader.root(reader.source), Rows()
    for place, row in _csv(reader.source):
        a, b = (
            Item(
                medium=reader.medium(root, _text(place, row, f"path_{side}"), place, f"path_{side}"),
                prompt=_text(place, row, "prompt"), model=row.get(f"{side}_model") or None,
            )
            for side in ("A", "B")
        )  # fmt: skip
        for dim in _DIMS:
            verdict = row.get(dim)
            if verdict in chances:
                rows.append(Preference(a=a, b=b, p_a=chances[verdict], dim=dim, place=place))
            elif verdict is not None:
                reader.skipped[f"{dim}: {verdict or 'empty'}"] += 1
    return rows


def _mmrb2(reader: _Reader) -> Rows:
    """A task of MMRB2 (arXiv:2512.16899): prompt and responses are lists of texts and images, chosen is A or B.

    A pair is left out unless each response has exactly one image; one image in the prompt is the "source" of an edit.
    """
    root, rows = reader.root(reader.source), Rows()
    data = _json(reader.source)
    for place, row in _items(reader.source, data.get("pairs") if isinstance(data, dict) else data):
        chosen = _need(place, row, "chosen")
        if chosen not in ("A", "B"):
            raise RewardError(f'{place}: "chosen" is {short(chosen)}; expected "A" or "B"')
        texts, sources = _content(place, row, "prompt_content")
        responses = [_need(place, row, key) for key in ("response_a", "response_b")]
        images = [_content(place, response, "response_content")[1] for response in responses]
        if any(len(found) != 1 for found in images) or len(sources) > 1:
            reader.skipped["not one image in each response and at most one in the prompt"] += 1
            continue
        attached = {"source": reader.medium(root, sources[0], place, "prompt_content")} if sources else {}
        a, b = (
            Item(
                medium=reader.medium(root, name, place, "response_content"),
                prompt="\n".join(texts), attached=attached, model=response.get("model"),
            )
            for (name,), response in zip(images, responses, strict=True)
        )  # fmt: skip
        category = row.get("prompt_source")
        rows.append(Preference(a=a, b=b, p_a=float(chosen == "A"), category=category, place=place))
    return rows


def _content(place: str, row: Any, key: str) -> tuple[list[str], list[str]]:
    """Texts and image names of a list of ["text" | "image", content]."""
    parts = row.get(key) if isinstance(row, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
        raise RewardError(f'{place}: "{key}" is {short(parts)}; expected a list of ["text", ...] and ["image", ...]')
    return ([str(said) for kind, said in parts if kind == "text"], [said for kind, said in parts if kind == "image"])


FORMATS: dict[str, Callable[[_Reader], Rows]] = {
    "native": _native, "store": _store, "pickapic": _pickapic, "hpdv2": _hpdv2, "imagereward": _imagereward,
    "genai": _genai, "videogen": _videogen, "mmrb2": _mmrb2,
}  # fmt: skip
"""{name: reader}"""


# ------------------------------------------------------------------------------------------------ files of rows

Finder = Callable[[Sequence[str]], Medium]
"""The medium in the first of several columns that a row has."""


def _rows(reader: _Reader, columns: Sequence[str], *media: str) -> Iterator[tuple[str, Mapping[str, Any], Finder]]:
    """Rows of tables or of .json and .jsonl files: (place, columns without media, how to get at the media)."""
    files = [reader.source]
    if reader.source.is_dir():
        files = sorted(path for path in reader.source.rglob("*") if path.suffix in _TABLES)
        files = files or sorted(reader.source.glob("*.jsonl"))
    if not files:
        raise RewardError(f"{reader.source} has no .parquet, .arrow or .jsonl file")
    for file in files:
        yield from _table_rows(reader, file, columns, media) if file.suffix in _TABLES else _file_rows(reader, file)


def _table_rows(
    reader: _Reader, file: Path, columns: Sequence[str], media: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], Finder]]:
    table = _Table(file)
    if not set(media) & set(table.columns):
        raise RewardError(f"{file} has no column {' or '.join(media)}; it has {', '.join(table.columns)}")
    for number, row in enumerate(table.rows([name for name in columns if name in table.columns])):
        place = f"{file}:{number + 1}"

        def find(names: Sequence[str], number: int = number, place: str = place) -> Medium:
            held = [name for name in names if name in table.columns]
            if not held:
                raise RewardError(f"{place}: the table has no column {' or '.join(names)}")
            if table.is_text(held[0]):
                return reader.medium(reader.root(file), table.value(number, held[0]), place, held[0])
            return _Cell(table, number, held[0])

        yield place, row, find


def _file_rows(reader: _Reader, file: Path) -> Iterator[tuple[str, Mapping[str, Any], Finder]]:
    root = reader.root(file)
    for place, row in _jsonl(file) if file.suffix == ".jsonl" else _items(file, _json(file)):

        def find(names: Sequence[str], place: str = place, row: Mapping[str, Any] = row) -> Medium:
            key = next((name for name in names if row.get(name)), None)
            if key is None:
                raise RewardError(f"{place}: it has no {' and no '.join(map(repr, names))}")
            name = row[key]
            if key.endswith("_uid"):
                name = next((f"{name}{end}" for end in IMAGES if (root / f"{name}{end}").exists()), name)
            return reader.medium(root, name, place, key)

        yield place, row, find


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of a file with one JSON object a line; empty lines are left out."""
    if not file.is_file():
        raise RewardError(f"there is no file {file}")
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if line.strip():
            place = f"{file}:{number}"
            yield place, _object(place, _parse(place, line))


def _json(file: Path) -> Any:
    return _parse(str(file), _read_text(file))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RewardError(f"{file} is not UTF-8 ({error}). Mend: iconv -t utf-8, or another --format") from error


def _items(file: Path, data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, item n, object) of a JSON list of objects."""
    if not isinstance(data, list):
        raise RewardError(f"{file}: expected a list of objects, found {type(data).__name__}")
    for number, row in enumerate(data):
        place = f"{file}: item {number}"
        yield place, _object(place, row)


def _csv(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""))
    try:
        for row in reader:
            place = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                raise RewardError(f"{place}: expected {len(reader.fieldnames or ())} fields; quote those with commas")
            yield place, row
    except csv.Error as error:
        raise RewardError(f"{file}:{reader.line_num}: no CSV that can be read: {error}") from error


def _parse(place: str, text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{place}: not JSON ({error})") from error


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RewardError(f"{place}: expected an object, found {short(row)}")
    return row


def _need(place: str, row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise RewardError(f'{place}: the key "{key}" is missing{nearest(key, list(row))}')
    return row[key]


def _text(place: str, row: Mapping[str, Any], key: str) -> str:
    value = _need(place, row, key)
    if not isinstance(value, str):
        raise RewardError(f'{place}: "{key}" is {short(value)}; expected text')
    return value


def _name(place: str, row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise RewardError(f'{place}: "{key}" is {short(value)}; expected a name, or leave it out')
    return value


def _list(place: str, row: Mapping[str, Any], key: str) -> list[Any]:
    value = _need(place, row, key)
    if not isinstance(value, list) or len(value) < 2:
        raise RewardError(f'{place}: "{key}" is {short(value)}; expected a list of two or more items')
    return value


def _ranks(place: str, row: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    value = _need(place, row, key)
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        raise RewardError(
            f'{place}: "{key}" is {short(value)}; expected {count} numbers, one for each of the {count} items, '
            "where a lower one is better"
        )
    return tuple(float(rank) for rank in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------ media


@dataclass(frozen=True, slots=True)
class _File:
    """A medium on the disk."""

    path: Path
    fps: float | None = None

    @property
    def key(self) -> str:
        return str(self.path)

    def load(self) -> tuple[Tensor, float | None]:
        return read(self.path, self.fps)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A picture in a table: bytes, or the Hugging Face form {"bytes", "path"}."""

    table: _Table
    row: int
    column: str

    @property
    def key(self) -> str:
        return f"{self.table.file}:{self.row}:{self.column}"

    def load(self) -> tuple[Tensor, float | None]:
        value = self.table.value(self.row, self.column)
        data = value.get("bytes") if isinstance(value, dict) else value
        try:
            if not isinstance(data, bytes):
                raise ValueError(f"found {short(value)}, no bytes of a picture")
            return picture(data), None
        except (OSError, ValueError, SyntaxError) as error:
            place = f"{self.table.file}:{self.row + 1}"
            raise RewardError(f'{place}: "{self.column}" cannot be read ({error})') from error


class _Table:
    """A .parquet or .arrow file as Hugging Face data sets store them; pictures stay on the disk until asked for."""

    def __init__(self, file: Path) -> None:
        """RewardError without pyarrow, or if the file is none of either."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise RewardError(f"{file} is a table, and pyarrow is not installed: pip install pyarrow") from error
        self.file = file
        try:
            if file.suffix == ".parquet":
                self._parquet: Any = pyarrow.parquet.ParquetFile(file, memory_map=True)
                self._schema = self._parquet.schema_arrow
            else:
                self._parquet = None
                self._arrow: Any = _open_arrow(pyarrow, file)
                self._schema = self._arrow.schema
        except (OSError, ValueError) as error:  # pyarrow's own errors are among them
            raise RewardError(f"{file}: not a table that pyarrow reads ({error})") from error
        self.columns: list[str] = list(self._schema.names)
        self._group = lru_cache(maxsize=2)(self._read_group)

    def is_text(self, column: str) -> bool:
        """Whether a column names files, instead of holding them."""
        return "string" in str(self._schema.field(column).type) and "struct" not in str(self._schema.field(column).type)

    def rows(self, columns: list[str]) -> list[dict[str, Any]]:
        """These columns of all rows."""
        table = self._arrow.select(columns) if self._parquet is None else self._parquet.read(columns=columns)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def value(self, row: int, column: str) -> Any:
        """One cell."""
        if self._parquet is None:
            return self._arrow.column(column)[row].as_py()
        for group in range(self._parquet.num_row_groups):
            count = self._parquet.metadata.row_group(group).num_rows
            if row < count:
                return self._group(group, column)[row].as_py()
            row -= count
        raise IndexError(row)

    def _read_group(self, group: int, column: str) -> Any:
        return self._parquet.read_row_group(group, columns=[column]).column(column)


def _open_arrow(pyarrow: Any, file: Path) -> Any:
    """The table of an .arrow file: a stream, as `datasets` writes it, or a file with a footer."""
    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
