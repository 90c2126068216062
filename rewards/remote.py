"""A reward that runs on a server (`rewards.serve`): another environment, another machine, the same scores.

    rewards:
      - {use: "http://127.0.0.1:8000/pickscore", weight: 1.0}
      - {use: "https://scores.example/hpsv2", token: "env:SCORES_TOKEN", deadline: 60}

The last part of the address names the reward, and the server says what it judges, needs and returns. Pictures travel as
PNG, which keeps 8 bits of each value: an image whose values are multiples of 1/255 scores exactly as it would here.

    GET /v1/info      {version, rewards: {name: {media, scope, needs, range, deterministic}}, limits: {max_samples}}
    POST /v1/score    {reward, samples: [{prompt, media, group, meta}]}      media: {mime, b64}, or {frames: [...], fps}
                   -> {value: [x | null], parts: {name: [x | null]}, info: [{...}], version}
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rewards import folder
from rewards.card import Card
from rewards.contract import Sheet
from rewards.functions import nearest
from rewards.http import Endpoint, RemoteError, began, read_token, readable
from rewards.media import to_pil
from rewards.types import RewardContractError, RewardError, Sample, Scores, Traits

__all__ = ["VERSION", "Remote", "to_wire"]

VERSION = 1
"""Of the messages; a server that speaks another one is refused."""
_DEEPEST, _LONGEST_INFO = 16, 1 << 16
"""How deeply a sample's info may be nested, and its length as JSON: it goes into logs, and the scores do without."""
_ADDRESS = "`use: http://host:port/name`, with the name that the server gives the reward"


class Remote:
    """A reward served by `rewards.serve` at `url`; of several addresses the least busy healthy one is asked."""

    media = frozenset({"image", "video"})  # until the server has said what it judges
    device = "cpu"
    card = Card(
        source="the server's; this is its client",
        licence="the served reward's",
        options=("url",),
        note="pictures are sent with 8 bits per value",
    )

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        deadline: float = 180.0,
        retries: int = 4,
        request_size: int = 16,
        max_concurrency: int = 4,
        max_reply_mb: float = 16.0,
    ) -> None:
        """`url`: address of the server and name of the reward, http(s)://host:port/name; several for copies of it.

        token             env:NAME, the environment variable with the server's token
        timeout           seconds for one try of one request
        deadline          seconds for all requests of a call of the hub together, retries, batches and frames included
        retries           further tries after 408, 425, 429, 5xx, or if nobody listens
        request_size      samples in one request; a group is not divided if the reward compares groups
        max_concurrency   requests at the same time
        max_reply_mb      a longer answer is refused
        """
        urls = [url] if isinstance(url, str) else list(url or [])
        self._bases, names = [each.rstrip("/").rpartition("/")[0] for each in urls], set(map(_name, urls))
        if len(names) > 1:
            raise RewardError(f"reward 'remote': the addresses name different rewards: {', '.join(sorted(names))}")
        if token is not None and not token.startswith("env:"):
            raise RewardError(
                "reward 'remote': a token must not stand in a config, which is kept with every run. "
                "Mend: export NAME=..., and token: env:NAME"
            )
        if isinstance(request_size, bool) or not isinstance(request_size, int) or request_size < 1:
            raise RewardError(f"reward 'remote': request_size is {request_size!r}; expected a whole number above 0")
        self._token, self._timeout, self._deadline, self._retries = token, timeout, deadline, retries
        self._request_size, self._max_concurrency = request_size, max_concurrency
        self._max_bytes = int(max_reply_mb * (1 << 20))
        if names:
            self.name = names.pop()
            self.lane = f"remote-{self._bases[0]}/{self.name}"
        self._endpoint: Endpoint | None = None
        self._pool: ThreadPoolExecutor | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Ask the server what the reward is; RewardError if it cannot be reached or does not have it."""
        if not self._bases:
            raise RewardError(f"reward 'remote' needs an address: {_ADDRESS}")
        endpoint = Endpoint(
            self._bases,
            token=read_token(self._token),
            timeout=self._timeout,
            deadline=self._deadline,
            retries=self._retries,
            max_bytes=self._max_bytes,
            max_concurrency=self._max_concurrency,
        )
        try:
            told = endpoint.get("/v1/info")
            traits, self._most = _read_info(told, self.name, self._bases[0])
        except BaseException:
            endpoint.close()
            raise
        self.media, self.needs, self.range = traits.media, traits.needs, traits.range
        self.scope, self.deterministic = traits.scope, traits.deterministic
        self._endpoint = endpoint
        self._pool = ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="remote")

    def unload(self) -> None:
        """Close the connections."""
        if self._endpoint is not None and self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._endpoint.close()
        self._endpoint = self._pool = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores [N] from the server; the samples of a request that fails get none, and the others keep theirs.

        RewardContractError if some `meta` cannot be written as JSON.
        """
        if self._pool is None:
            raise RewardError(f"reward {self.name!r} is not loaded; the hub does that, or call .load(device, dtype)")
        end = began() + self._deadline
        for row, sample in enumerate(samples):
            _check_json({k: v for k, v in sample.meta.items() if not _is_picture(k, v)}, f"sample {row}: meta")
        sheet = Sheet(len(samples))
        asked: list[tuple[list[int], Future[Scores]]] = [
            (rows, self._pool.submit(self._ask, [samples[row] for row in rows], end)) for rows in self._split(samples)
        ]
        for rows, answer in asked:
            try:
                sheet.put(rows, answer.result(max(0.0, end + 0.1 - time.monotonic())))
            except (RemoteError, TimeoutError) as error:
                answer.cancel()
                sheet.fail(rows, str(error) or f"no answer before the deadline of {self._deadline:g} s")
                for row in rows:
                    sheet.info[row]["failed"] = True
        return sheet.scores()

    def _split(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Rows of each request; what must be scored together stays together."""
        units: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            units.setdefault(sample.group if self.scope == "group" else row, []).append(row)
        size = min(self._request_size, self._most)
        requests: list[list[int]] = []
        for unit in units.values():
            if requests and len(requests[-1]) + len(unit) <= size:
                requests[-1] += unit
            else:
                requests.append(list(unit))
        return requests

    def _ask(self, samples: Sequence[Sample], end: float) -> Scores:
        """One request, without the samples that cannot be sent."""
        assert self._endpoint is not None
        sheet = Sheet(len(samples))
        written = self._written(samples, sheet)
        if not written:
            return sheet.scores()
        body = {"reward": self.name, "samples": list(written.values())}
        answer = self._endpoint.post("/v1/score", body, deadline=end - time.monotonic())
        try:
            sheet.put(list(written), _read_scores(answer, len(written)))
        except ValueError as error:
            raise RemoteError(f"{self._bases[0]}/v1/score", f"the answer is no list of scores: {error}") from error
        return sheet.scores()

    def _written(self, samples: Sequence[Sample], sheet: Sheet) -> dict[int, dict[str, Any]]:
        """{row: wire form} of the samples whose pictures can be read; the others, or their groups, get the reason."""
        written = {}
        for row, sample in enumerate(samples):
            try:
                written[row] = to_wire(sample)
            except RewardError as error:
                lost = [r for r, s in enumerate(samples) if s.group == sample.group] if self.scope == "group" else [row]
                sheet.fail(lost, str(error))
        return {row: form for row, form in written.items() if "error" not in sheet.info[row]}


def to_wire(sample: Sample) -> dict[str, Any]:
    """A sample as JSON; `meta` has to be JSON already, but for pictures, which are read here and sent."""
    if sample.kind == "image":
        media: dict[str, Any] = _png(sample.media)
    else:
        media = {"frames": [_png(frame) for frame in sample.media], "fps": sample.fps}
    return {"prompt": sample.prompt, "group": sample.group, "media": media, "meta": _meta(sample)}


def _meta(sample: Sample) -> dict[str, Any]:
    """Metadata with the pictures in it as PNG: a server reads no files that it is told of."""
    meta = dict(sample.meta)
    for key in folder.PICTURES:
        value = meta.get(key)
        if isinstance(value, Tensor) or (isinstance(value, str | Path) and _is_file(value)):
            meta[key] = _png(folder.reference(value, key))
    return meta


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a name, not to be looked at, or ~ of nobody
        return False


def _is_picture(key: str, value: Any) -> bool:
    return key in folder.PICTURES and isinstance(value, Tensor | Path)


def _png(image: Tensor) -> dict[str, Any]:
    file = io.BytesIO()
    to_pil(image).save(file, "PNG", compress_level=1)  # the network is faster than a better compression
    return {"mime": "image/png", "b64": base64.b64encode(file.getvalue()).decode()}


def _name(url: str) -> str:
    name = urlsplit(url).path.rstrip("/").rpartition("/")[2]
    if not url.startswith(("http://", "https://")) or not name:
        raise RewardError(f"reward 'remote': the address {url!r} names no reward; expected {_ADDRESS}")
    return name


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would refuse, or would hand over as something else."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RewardContractError(f"{where} has the key {key!r}; a reward on a server gets JSON: use str(...)")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise RewardContractError(
            f"{where} is {shown}, which cannot be sent to a reward on a server: JSON has text, numbers, lists and "
            "dicts. Mend: tensor.tolist(), float(...), or run the reward here"
        )


# ------------------------------------------------------------------------------------------------------------- answers


def _read_info(told: Any, name: str, url: str) -> tuple[Traits, int]:
    """Traits of a reward, and the most samples that its server takes at once."""
    try:
        version, rewards, most = told["version"], told["rewards"], int(told["limits"]["max_samples"])
        if version != VERSION:
            raise RemoteError(
                url, f"speaks version {version!r} of the messages, this client {VERSION}; update one of them"
            )
        if name not in rewards:
            meant = nearest(name, rewards)
            raise RewardError(f"{url} serves no reward {name!r}{meant}. It serves: {', '.join(map(str, rewards))}.")
        about = rewards[name]
        span = about["range"]
        traits = Traits(
            media=frozenset(about["media"]),
            scope=about["scope"],
            needs=tuple(map(str, about["needs"])),
            deterministic=bool(about["deterministic"]),
            range=None if span is None else (float(span[0]), float(span[1])),
        )
    except (KeyError, TypeError, ValueError, IndexError, RewardContractError) as error:
        raise RemoteError(url, f"/v1/info is not what a reward server says: {type(error).__name__}: {error}") from error
    return traits, max(1, most)


def _read_scores(answer: Any, count: int) -> Scores:
    """An answer as `Scores`; ValueError says what is wrong with it."""
    if not isinstance(answer, dict):
        raise ValueError(f"it is a {type(answer).__name__}")
    parts = answer.get("parts", {})
    info = answer.get("info") or [{} for _ in range(count)]
    if not isinstance(parts, dict):
        raise ValueError("`parts` is no object")
    if not isinstance(info, list) or len(info) != count or not all(isinstance(entry, dict) for entry in info):
        raise ValueError(f"`info` is no list of {count} objects")
    return Scores(
        value=_numbers(answer.get("value"), count, "value"),
        parts={name: _numbers(part, count, f"parts.{name}") for name, part in parts.items()},
        info=[_loggable(entry) for entry in info],
    )


def _loggable(info: dict[str, Any]) -> dict[str, Any]:
    """A sample's info as far as it can be trusted to a log, with `error` as one line of text."""
    fits = _is_shallow(info, _DEEPEST) and len(json.dumps(info)) <= _LONGEST_INFO
    kept = dict(info)
    if not fits:
        told = f"info nested more than {_DEEPEST} deep, or longer than {_LONGEST_INFO} characters"
        kept = {"left_out": told} | ({"failed": True} if info.get("failed") else {})
    if "error" in info:
        error = info["error"]
        kept["error"] = readable(error if isinstance(error, str) else json.dumps(error) if fits else "no text")
    return kept


def _is_shallow(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inside)


def _numbers(values: Any, count: int, what: str) -> Tensor:
    """fp32 [count]; null is NaN."""
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ValueError(f"`{what}` is {found}, expected {count} values")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"`{what}` has {str(value)[:40]!r} in it, expected numbers and null")
    try:
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)
    except OverflowError as error:
        raise ValueError(f"`{what}` has a number that is too large") from error
