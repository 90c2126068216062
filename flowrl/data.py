"""Prompts: where they come from, what is refused, and which of them an iteration takes.

    prompts = load_prompts("captions.jsonl")
    sampler = PromptSampler(prompts, per_iteration=48, seed=0)
    mine = shard(sampler(iteration), rank, world)

What an iteration takes is a pure function of (seed, iteration), and of the weights where there is a curriculum: nothing
has to be saved for it, and nothing depends on how many processes there are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowrl.resolve import nearest

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from flowrl.types import Prompt

T = TypeVar("T")

BUILT_IN = "shapes"
BUILT_IN_VIDEO = "shapes_video"
SOURCE = "source"
"""Field of a row that names a prompt's source picture, or a list of them: what is edited, where a video begins."""
PICTURES = ("reference", SOURCE)
"""Fields of a row that hold paths of pictures."""
IMAGES = "images"
"""Metadata of a question: the pictures that it is about, paths or PIL images (`flowrl.vlm.data`)."""
VIDEOS = "videos"
"""Metadata of a question: its videos, each a path or a list of frames, which are paths or PIL images."""
SPLITS = ("train", "held_out")
PAIRS = "pairs.jsonl"
"""The rows of a pair store."""


class DataError(ValueError):
    """Prompts cannot be used; the message names the file and the line, what is wrong there, and how to mend it."""


# ------------------------------------------------------------------------------------------------ reading


def load_prompts(source: str | Path | Sequence[str], split: str = "train") -> list[Prompt]:
    """The prompts of a source, numbered from 0 in its order; equal texts stay different prompts.

    `source` is "shapes" or "shapes_video" (the built-in worlds, whose `split` is "train" or "held_out"), a .txt file
    with one prompt a line, a .jsonl file with {"prompt": text, ...metadata} a line, a folder of pairs (`flowrl.pairs`,
    or its pairs.jsonl), or a sequence of texts. Files have no splits.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; there are {' and '.join(SPLITS)}.")
    if source in (BUILT_IN, BUILT_IN_VIDEO):
        rows = _built_in(str(source), split)
    elif isinstance(source, str | Path):
        path = Path(source).expanduser()
        if _is_of_pairs(path):
            from flowrl.pairs import read_pairs  # which reads its lines with what is below

            return read_pairs(path)
        rows = _read_file(path)
    else:
        rows = [prompt_row(f"prompt {index} of the list", text) for index, text in enumerate(source)]
    if not rows:
        what = str(source) if isinstance(source, str | Path) else "the list of prompts"
        raise DataError(f"{what} holds no prompts; give at least one.")
    from flowrl.types import Prompt  # imports torch, which a mistake above need not wait for

    return [Prompt(id=index, text=text, metadata=metadata) for index, (text, metadata) in enumerate(rows)]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of texts, metadata and order, so that a resumed run notices that its data set has changed."""
    digest = hashlib.sha256()
    for prompt in prompts:
        metadata = dict(prompt.metadata)
        if "stored" in metadata:  # what the files hold, not where they lie
            metadata["stored"] = [{**row, "media": _contents(row["media"])} for row in metadata["stored"]]
        for key in (key for key in PICTURES if key in metadata):
            given = metadata[key]
            metadata[key] = [_contents(path) for path in ([given] if isinstance(given, str) else given)]
        if isinstance(images := metadata.get(IMAGES), list):
            metadata[IMAGES] = [_contents(image) if _is_picture(image) else image for image in images]
        if isinstance(videos := metadata.get(VIDEOS), list):
            frames = [[video] if isinstance(video, str) else video for video in videos]
            metadata[VIDEOS] = [[_contents(one) if _is_picture(one) else one for one in video] for video in frames]
        digest.update(json.dumps([prompt.text, metadata], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _is_picture(image: Any) -> bool:
    return Path(image).is_file() if isinstance(image, str) else hasattr(image, "tobytes")


def _contents(path: str | Image) -> str:
    if not isinstance(path, str):  # a picture that lies in memory
        return hashlib.sha256(repr((path.mode, path.size)).encode() + path.tobytes()).hexdigest()
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _built_in(source: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    if source == BUILT_IN_VIDEO:
        from flowrl.shapes import clips

        return [(clip.prompt, {"category": clip.category}) for clip in clips.prompts(split)]
    from flowrl.shapes.scenes import prompts

    return [(spec.prompt, {"category": spec.category}) for spec in prompts(split)]


def _is_of_pairs(path: Path) -> bool:
    return path.name == PAIRS or (path / PAIRS).is_file()


def _read_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    readers = {".txt": _text_row, ".jsonl": json_row}
    if not path.is_file():
        raise DataError(_missing(path))
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .txt (one prompt a line) or .jsonl.")
    lines = read_lines(path)
    rows = [readers[path.suffix](f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    return [
        (text, _with_pictures(f"{path}:{number}", metadata, path.parent))
        for number, (text, metadata) in enumerate(rows, start=1)
    ]


def _with_pictures(place: str, metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row's pictures as paths that hold from anywhere: a relative one starts beside the file of prompts.

    What is edited also is what rewards compare with (`reference`), where the row names nothing else.
    """
    found = {key: picture_paths(f"{place}: {key!r}", metadata[key], folder) for key in PICTURES if key in metadata}
    if isinstance(source := found.get(SOURCE), str):
        found = {"reference": source, **found}
    return {**metadata, **found}


def picture_paths(place: str, given: Any, folder: Path) -> Any:
    """A path, or a list of paths, made absolute from `folder` on; a DataError names `place` and a file that is none."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{place} is {short(given)}; give the path of a picture, or a list of paths.")
    paths = [(folder / Path(name).expanduser()).resolve() for name in names]
    for path in paths:
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise DataError(
                f"{place}: there is no file {str(path)!r}{near}. Paths start at the folder of the prompts, {folder}: "
                "mend the path in that line, or put the file there."
            )
    return str(paths[0]) if isinstance(given, str) else [str(path) for path in paths]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends; empty ones at its end are left out. DataError if it is not one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    # Not splitlines(): it would also split at the line separators that Unicode allows inside a prompt.
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")] if text.strip("\r\n") else []


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder without {PAIRS}; name a .txt or .jsonl file in it, or a folder of pairs."
    known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, [*known, BUILT_IN, BUILT_IN_VIDEO])
    return (
        f"there is no file {str(path)!r}{near}; looked for {path.absolute()}. Give {BUILT_IN!r}, "
        f"{BUILT_IN_VIDEO!r}, a .txt or .jsonl file "
        "(relative to the working folder), or a list of prompts."
    )


def _text_row(place: str, line: str) -> tuple[str, dict[str, Any]]:
    return prompt_row(place, line)


def json_row(place: str, line: str) -> tuple[str, dict[str, Any]]:
    """The prompt of a line {"prompt": text, ...} and its other fields; a DataError names `place` and the mend."""
    record = json_object(place, line)
    if "prompt" not in record:
        near = nearest("prompt", record) or (f"; rename one of {', '.join(record)}" if record else "")
        raise DataError(f'{place}: the field "prompt" is missing{near}.')
    return prompt_row(place, record["prompt"], {key: value for key, value in record.items() if key != "prompt"})


def json_object(place: str, line: str) -> dict[str, Any]:
    """The object that a line of JSON holds; a DataError names `place` and the mend."""
    if not line.strip():
        raise DataError(f"{place}: the line is empty; remove it.")
    try:
        record = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: broken JSON: {error.msg} at column {error.colno}; one object a line.") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{place}: broken JSON: {what}.") from error
    if not isinstance(record, dict):
        raise DataError(f'{place}: expected an object like {{"prompt": "a red cube"}}, found {type(record).__name__}.')
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; use null, or leave the field out")


def prompt_row(place: str, text: Any, metadata: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """A prompt without white space around it, and its metadata; a DataError names `place` if it is no usable text."""
    if not isinstance(text, str):
        raise DataError(f"{place}: the prompt is {type(text).__name__} {short(text)}, not text; put it in quotes.")
    if not text.strip():
        raise DataError(f"{place}: the prompt is empty; remove the line, or write a prompt.")
    if "\0" in text:
        raise DataError(f"{place}: the prompt holds a null byte; the file may be UTF-16: save it as UTF-8.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: half of a character (a lone surrogate) at {error.start}; fix it.") from error
    return text.strip(), metadata or {}


def short(value: object) -> str:
    """A value as a message quotes it, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------ sampling


class PromptSampler:
    """Which prompts an iteration takes: `sampler(iteration)`, the same on every process.

    The prompts are walked through in a fresh order each epoch, so that none comes back before all have been seen. With
    the weights of a curriculum they are drawn instead, each iteration for itself.

    Where an iteration takes one more than once (the data set is small), every further group has an id of its own:
    its prompt's id plus a multiple of `len(prompts)`.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_iteration: int, seed: int = 0, balance: str | None = None,
        together: str | None = None,
    ) -> None:  # fmt: skip
        """With `balance`, a metadata key, its values take turns: in an iteration their counts differ by at most one.

        With `together`, another one, prompts that share its value are taken together, one after another.
        """
        if not prompts:
            raise DataError("there are no prompts to sample from.")
        if per_iteration < 1:
            raise DataError(f"prompts_per_iteration={per_iteration}; an iteration takes at least one prompt.")
        self.per_iteration, self.seed = per_iteration, seed
        self._prompts = list(prompts)
        self._pools = {"": list(range(len(prompts)))} if balance is None else _pools(prompts, balance, "balance")
        self._families = _families(prompts, together, per_iteration)
        self._pools = {name: [i for i in pool if i in self._families] for name, pool in self._pools.items()}
        self._order = lru_cache(maxsize=2 * len(self._pools))(self._shuffled)

    def __call__(self, iteration: int, weights: Tensor | None = None) -> list[Prompt]:
        """The prompts of an iteration (from 0), one a group.

        `weights` [len(prompts)], none negative and not all 0, has them drawn without replacement, each draw in
        proportion to the weights of the prompts that are left (of a value of `balance`, when that is its turn). A
        prompt of weight 0 is taken only where the others do not suffice, and all are taken before one comes twice.
        """
        families = self.per_iteration // len(next(iter(self._families.values())))
        places = range(iteration * families, (iteration + 1) * families)
        heads = map(self._at, places) if weights is None else self._drawn(iteration, places, self._numbers(weights))
        taken: dict[int, int] = {}
        chosen = []
        for index in (member for head in heads for member in self._families[head]):
            prompt, times = self._prompts[index], taken.get(index, 0)
            chosen.append(replace(prompt, id=prompt.id + times * len(self._prompts)) if times else prompt)
            taken[index] = times + 1
        return chosen

    def _at(self, place: int) -> int:
        """Index of the prompt at a place of the endless sequence: pools take turns, each in epochs of its own."""
        names = list(self._pools)
        turn, name = place // len(names), names[place % len(names)]
        epoch, offset = divmod(turn, len(self._pools[name]))
        return self._order(name, epoch)[offset]

    def _shuffled(self, name: str, epoch: int) -> list[int]:
        """A pool in the order of an epoch: sorted by a keyed hash, which no library version can change."""

        def key(index: int) -> bytes:
            return hashlib.blake2b(f"{self.seed}/{name}/{epoch}/{index}".encode(), digest_size=16).digest()

        return sorted(self._pools[name], key=key)

    def _drawn(self, iteration: int, places: range, weights: list[float]) -> Iterator[int]:
        """Indices of the prompts at an iteration's places; pools take turns as they do in `_at`."""
        draws = [self._draw(pool, iteration, weights) for pool in self._pools.values()]
        return (next(draws[place % len(draws)]) for place in places)

    def _draw(self, pool: list[int], iteration: int, weights: list[float]) -> Iterator[int]:
        """A pool in the order of a weighted draw without replacement, then lap after lap in that of another draw.

        Weighted random sampling (Efraimidis and Spirakis, 2006, algorithm A): the largest u^(1/w) first, with u uniform
        in (0, 1). Note: sorted by -log(u) / w, smallest first, since u^(1/w) is rounded to 0 for every small w.
        """
        for lap in count():
            waits = {index: self._exponential(f"{iteration}/{lap}/{index}") for index in pool}
            # Those of weight 0 come last, among themselves evenly.
            keys = [(wait / weights[i] if weights[i] else math.inf, wait, i) for i, wait in waits.items()]
            yield from (index for _, _, index in sorted(keys))

    def _exponential(self, identity: str) -> float:
        """An exponential variate of mean 1, -log(u), as a function of the seed and an identity."""
        digest = hashlib.blake2b(f"{self.seed}/draw/{identity}".encode(), digest_size=8).digest()
        u = ((int.from_bytes(digest) >> 12) + 0.5) / 2**52  # of 52 bits: exact in float64, and neither 0 nor 1
        return -math.log(u)

    def _numbers(self, weights: Tensor) -> list[float]:
        """The weights [len(prompts)] of a curriculum, which may be a function of the user's own, checked."""
        values: list[float] = weights.tolist()
        if weights.shape != (len(self._prompts),):
            raise DataError(
                f"data.curriculum: weights of shape {list(weights.shape)} for {len(self._prompts)} prompts; "
                "return one for each."
            )
        for prompt, value in zip(self._prompts, values, strict=True):
            if not 0 <= value < math.inf:
                raise DataError(
                    f"data.curriculum: prompt {prompt.id} ({short(prompt.text)}) has the weight {value}; "
                    "return finite numbers that are not negative."
                )
        if not any(values):
            raise DataError("data.curriculum: every prompt has the weight 0; return at least one that is larger.")
        return values


def _families(prompts: Sequence[Prompt], key: str | None, per_iteration: int) -> dict[int, list[int]]:
    """{first index: all indices} of the prompts that are taken together, equally many each."""
    if key is None:
        return {index: [index] for index in range(len(prompts))}
    families = {members[0]: members for members in _pools(prompts, key, "together").values()}
    sizes = sorted({len(members) for members in families.values()})
    if len(sizes) > 1 or per_iteration % sizes[0]:
        raise DataError(
            f"data.together={key}: {' or '.join(map(str, sizes))} prompts share a value, and an iteration takes "
            f"{per_iteration}; every value must be shared by equally many prompts, which divide prompts_per_iteration."
        )
    return families


def _pools(prompts: Sequence[Prompt], key: str, option: str) -> dict[str, list[int]]:
    """Indices of the prompts by the value of a metadata key, in the order in which the values first appear."""
    pools: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if key not in prompt.metadata:
            known: Mapping[str, Any] = prompt.metadata
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise DataError(
                f"data.{option}={key}: prompt {prompt.id} ({short(prompt.text)}) has no metadata {key!r}"
                f"{nearest(key, known)}; {there}. Remove data.{option}, or add the field to every line."
            )
        pools.setdefault(str(prompt.metadata[key]), []).append(index)
    return pools


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """This process's contiguous part; sizes differ by at most one, and all parts together are `items` in order."""
    return list(items[len(items) * rank // world : len(items) * (rank + 1) // world])
