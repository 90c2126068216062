"""Rewards behind HTTP, for runs whose environment or machine cannot hold them; `rewards.remote` is the client.

    with RewardServer(["ocr", {"use": "pickscore", "dtype": "bfloat16"}], port=8000) as server:    # or: serve([...])
        ...                                                     # a config elsewhere: use: http://127.0.0.1:8000/ocr

    GET  /health      {status, version}, without a token
    GET  /v1/info     what is served, and the limits
    POST /v1/score    as `rewards.remote` says; pictures as PNG, JPEG or WebP, inline: no address is ever followed

Requests that come at the same time are scored together. A sample that cannot be judged gets null and a reason, and the
others their scores. A client can only ask for the rewards that the server was started with.

    400 not understood      401 token                404 no such reward     408 the body came too slowly
    413 too large           415 not JSON             429 too many waiting   504 not scored in time
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import logging
import math
import queue
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from rewards.contract import Sheet
from rewards.entries import place, read_entries
from rewards.folder import without_files
from rewards.http import is_loopback, parse_json, read_token
from rewards.media import broken_media, from_pil
from rewards.remote import VERSION
from rewards.scorer import Scorer, cut, together
from rewards.types import RewardError, Sample, Scores

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["RewardServer", "serve"]

_LOG = logging.getLogger(__name__)
_INSTALL = 'pip install -e ".[serve]"'
_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_PICTURES = 16
"""A request may hold this many pictures of the largest size, in pixels: a small file can hold a large picture."""
_HEAD_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
"""How long what is under way may still take when the server stops; a reward that hangs is left behind."""
_POLL_SECONDS = 0.02
_PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?[/\\][\w.\-]+[/\\][^\s'\",;)]*")


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """What a client may ask for; `RewardServer` says what each is."""

    max_body_mb: float
    max_samples: int
    max_pixels: int
    request_timeout: float
    max_waiting: int

    def __post_init__(self) -> None:
        """Refuse limits that nothing could keep to."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise RewardError(f"{name} is {value!r}; expected a number above 0")


def serve(entries: Any, **options: Any) -> None:
    """Serve rewards until interrupted; entries and options are those of `RewardServer`."""
    server = RewardServer(entries, **options)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn has stopped in good order, and says so in this way
        pass
    finally:
        server.close()


class RewardServer:
    """Rewards loaded once and scored for whoever asks, in a thread of its own (`start`) or in this one (`run`)."""

    def __init__(
        self,
        entries: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        device: str | torch.device = "auto",
        batch_wait_ms: float = 5.0,
        max_batch: int = 64,
        max_body_mb: float = 64.0,
        max_samples: int = 256,
        max_pixels: int = 1 << 24,
        request_timeout: float = 120.0,
        max_waiting: int = 64,
    ) -> None:
        """`entries` as for `RewardHub`, of which weight, norm and gate are left to the client; nothing is loaded yet.

        host              one that other machines reach needs a token; put TLS in front of it (a reverse proxy)
        port              0 takes a free one; `url` says which
        token             `env:NAME`, or the token itself
        batch_wait_ms     how long a request waits for others to be scored with
        max_batch         samples that are scored together
        max_body_mb       of a request
        max_samples       of a request
        max_pixels        of one picture or frame; a request may have 16 times that, and so may all under way together:
                          one more waits until there is room
        request_timeout   seconds for a request, from its head to its scores
        max_waiting       requests under way; one more is told to come back (429)
        """
        self._token = read_token(token)
        _check_host(host, self._token)
        self._limits = _Limits(
            max_body_mb=max_body_mb,
            max_samples=max_samples,
            max_pixels=max_pixels,
            request_timeout=request_timeout,
            max_waiting=max_waiting,
        )
        self._host, self._port = host, port
        self._wait, self._max_batch = batch_wait_ms / 1000, max_batch
        self._scorers = {scorer.name: scorer for scorer, _ in read_entries(entries, place(device))}
        for name in self._scorers:
            if not re.fullmatch(r"[\w.\-]+", name, re.ASCII):
                raise RewardError(f"reward {name!r} cannot be asked for by an address; give it a plain `name:`")
        self._batchers: dict[str, _Batcher] = {}
        self._room = _Room(_PICTURES * max_pixels)
        self._waiting = 0
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Its address, to which a reward's name is added."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def start(self) -> Self:
        """Load the rewards, and answer from now on, in a thread."""
        listener = self._prepare()
        assert self._uvicorn is not None
        self._thread = threading.Thread(target=self._uvicorn.run, args=([listener],), name="reward-server", daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RewardError(f"the reward server at {self.url} did not start; its log says why")
            time.sleep(0.01)
        return self

    def run(self) -> None:
        """Load the rewards, and answer until the process is interrupted."""
        listener = self._prepare()
        assert self._uvicorn is not None
        print(f"serving {', '.join(f'{self.url}/{name}' for name in self._scorers)}", flush=True)
        self._uvicorn.run([listener])

    def close(self) -> None:
        """Answer what is under way, unless that takes too long, stop, and let the weights go."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()
        for batcher in self._batchers.values():
            batcher.stop()
        end = time.monotonic() + _CLOSE_SECONDS
        for name, scorer in self._scorers.items():
            if name in self._batchers and not self._batchers[name].ended(end):
                _LOG.warning("reward %r still scores; it is left behind with its weights", name)
            else:
                scorer.unload()

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _prepare(self) -> socket.socket:
        """Take the port, which fails at once or not at all, then load."""
        try:
            import uvicorn

            app = self._app()
            protocol = _protocol()
        except ImportError as error:
            raise RewardError(f"serving rewards needs starlette and uvicorn: {_INSTALL} ({error})") from error
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self._port), family=family, backlog=128)
        except OSError as error:
            raise RewardError(f"cannot serve at {self.url}: {error}. Mend: another port, or 0 for any") from error
        try:
            self._port = listener.getsockname()[1]
            for scorer in self._scorers.values():
                scorer.warm(None)
            turns: dict[str, threading.Lock] = defaultdict(threading.Lock)
            for name, scorer in self._scorers.items():
                self._batchers[name] = _Batcher(scorer, self._wait, self._max_batch, turns[scorer.lane])
        except BaseException:
            listener.close()
            raise
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=math.ceil(_CLOSE_SECONDS),
        )
        self._uvicorn = uvicorn.Server(config)
        return listener

    # ----------------------------------------------------------------------------------------------------- requests

    def _app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        async def refused(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return _json({"error": error.detail}, error.status_code, error.headers)

        async def broken(request: Request, error: Exception) -> Response:
            return _json({"error": "the server failed; its log says why"}, 500)

        return Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/v1/info", self._info, methods=["GET"]),
                Route("/v1/score", self._score, methods=["POST"]),
            ],
            exception_handlers={HTTPException: refused, Exception: broken},
        )

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok", "version": VERSION})

    async def _info(self, request: Request) -> Response:
        self._authorise(request)
        about = {name: _about(scorer) for name, scorer in self._scorers.items()}
        return _json({"version": VERSION, "rewards": about, "limits": vars(self._limits)})

    async def _score(self, request: Request) -> Response:
        self._authorise(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _refusal(415, "send application/json")
        if self._waiting >= self._limits.max_waiting:
            raise _refusal(429, f"{self._waiting} requests are waiting", {"Retry-After": "1"})
        self._waiting += 1
        try:
            return await self._scored(request, asyncio.get_running_loop().time() + self._limits.request_timeout)
        finally:
            self._waiting -= 1

    async def _scored(self, request: Request, end: float) -> Response:
        limit = f"{self._limits.request_timeout:g} s"
        try:
            async with asyncio.timeout_at(end):
                body = await self._body(request)
        except TimeoutError:
            raise _refusal(408, f"the request did not come within {limit}") from None
        try:
            async with asyncio.timeout_at(end):
                asked = await asyncio.to_thread(_read_request, body, self._scorers.keys(), self._limits)
                future = await self._submitted(asked)
                scores = await asyncio.wrap_future(future)  # giving up here cancels the future
        except _BadRequestError as error:
            raise _refusal(error.status, str(error)) from None
        except TimeoutError:
            raise _refusal(504, f"the samples were not scored within {limit}") from None
        return _json(_answer(asked, scores))

    async def _submitted(self, asked: _Asked) -> Future[Scores]:
        """Scores of a request, later; its room is given back with them, or as soon as nobody waits for them."""
        await self._room.take(asked.pixels)
        try:
            samples = await asyncio.to_thread(asked.decode)
            future = self._batchers[asked.reward].submit(samples)
        except BaseException:
            self._room.give(asked.pixels)
            raise
        future.add_done_callback(lambda _: self._room.give(asked.pixels))
        return future

    async def _body(self, request: Request) -> bytes:
        """The body, if it is no larger than allowed."""
        from starlette.requests import ClientDisconnect

        most = int(self._limits.max_body_mb * (1 << 20))
        too_large = f"the body is larger than {self._limits.max_body_mb:g} MB. Mend: a smaller `request_size`"
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            raise _refusal(413, too_large)
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise _refusal(413, too_large)
        except ClientDisconnect:
            raise _refusal(400, "the body ends early") from None
        return bytes(body)

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            told = "wrong token" if given else "this server needs a token. Mend: `token: env:NAME`"
            raise _refusal(401, told, {"WWW-Authenticate": "Bearer"})


def _check_host(host: str, token: str | None) -> None:
    if is_loopback(host):
        return
    mend = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
    if token is None:
        raise RewardError(
            f"host {host!r} can be reached from other machines, where anybody could use the rewards without a token. "
            f"Mend: host 127.0.0.1, or a token (token: env:NAME) made with {mend}"
        )
    if len(token) < 32:
        raise RewardError(f"the token for host {host!r} has {len(token)} characters, at least 32 are safe: {mend}")


def _protocol() -> Any:
    """uvicorn's HTTP, which would wait for ever for a client to end the head of its request, with a limit to that."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            waits = self.conn.their_state is h11.IDLE
            if waits and self.timer is None:
                self.timer = self.loop.call_later(_HEAD_SECONDS, self._give_up)
            elif not waits and self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _give_up(self) -> None:
            self.timer = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return Impatient


def _refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Exception:
    from starlette.exceptions import HTTPException

    return HTTPException(status, message, dict(headers or {}))


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(content, allow_nan=False), status, dict(headers or {}), "application/json")


# ---------------------------------------------------------------------------------------------------------- messages


class _BadRequestError(Exception):
    """A request that the client has to mend."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class _Asked:
    """A request as it was understood."""

    reward: str
    pixels: int = 0
    """Of all its pictures together."""
    opened: dict[int, tuple[Image.Image | list[Image.Image], dict[str, Any]]] = field(default_factory=dict)
    """{row: picture or frames, the sample's other fields}, until they are decoded"""
    readable: list[int] = field(default_factory=list)
    """Rows that were decoded."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """{row: why not}"""

    def decode(self) -> list[Sample]:
        """The samples whose pictures can be read. They are not kept here, which outlives the scoring of them."""
        samples = []
        for row, (media, fields) in self.opened.items():
            try:
                meta = {key: _decoded(v) if isinstance(v, Image.Image) else v for key, v in fields["meta"].items()}
                shown = _video(media) if isinstance(media, list) else _decoded(media)
                samples.append(Sample(media=shown, **fields | {"meta": meta}))
                self.readable.append(row)
            except _UnreadableError as error:
                self.unreadable[row] = str(error)
        self.opened.clear()
        return samples


def _read_request(body: bytes, rewards: Any, limits: _Limits) -> _Asked:
    """A request with its pictures opened, which tells their sizes, but not decoded."""
    try:
        told = parse_json(body)
    except ValueError as error:
        raise _BadRequestError(f"the body is not valid JSON: {error}") from error
    reward = told.get("reward") if isinstance(told, dict) else None
    if not isinstance(reward, str) or reward not in rewards:
        raise _BadRequestError(f"no reward {str(reward)[:80]!r}; there are: {', '.join(rewards)}", 404)
    rows = told.get("samples")
    if not isinstance(rows, list):
        raise _BadRequestError("`samples` is no list")
    if len(rows) > limits.max_samples:
        raise _BadRequestError(f"{len(rows)} samples; at most {limits.max_samples} at once", 413)
    pictures = _Pictures(limits.max_pixels, _PICTURES * limits.max_pixels)
    asked = _Asked(reward=reward)
    for row, given in enumerate(rows):
        fields, media = _fields(given, f"sample {row}")
        try:
            fields["meta"] = pictures.meta(fields["meta"])
            asked.opened[row] = pictures.media(media), fields
        except _UnreadableError as error:
            asked.unreadable[row] = str(error)
    asked.pixels = pictures.pixels
    return asked


def _fields(given: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sample's fields without its media, and its media."""
    media = given.get("media") if isinstance(given, dict) else None
    if not isinstance(media, dict):
        raise _BadRequestError(f"{where} is no object with an object `media`")
    prompt, group, meta = given.get("prompt", ""), given.get("group", 0), given.get("meta", {})
    fps = media.get("fps")
    checks = {
        "prompt": isinstance(prompt, str),
        "group": isinstance(group, int) and not isinstance(group, bool),
        "meta": isinstance(meta, dict),
        "media.fps": fps is None or (isinstance(fps, int | float) and not isinstance(fps, bool)),
    }
    wrong = [name for name, fine in checks.items() if not fine]
    if wrong:
        raise _BadRequestError(f"{where}: `{wrong[0]}` is missing or of the wrong type")
    return {"prompt": prompt, "group": group, "meta": meta, "fps": fps}, media


class _UnreadableError(Exception):
    """A picture that cannot be read; the other samples of the request are not to blame."""


class _Pictures:
    """Opens the pictures of one request, within a number of pixels; none is decoded."""

    def __init__(self, most_each: int, most: int) -> None:
        self._most_each, self._most = most_each, most
        self.pixels = 0

    def media(self, media: Mapping[str, Any]) -> Image.Image | list[Image.Image]:
        """A picture, or the frames of a video."""
        if "frames" not in media:
            return self._picture(media)
        frames = media["frames"]
        if not isinstance(frames, list) or not frames:
            raise _UnreadableError("`media.frames` is no list of pictures")
        return [self._picture(frame) for frame in frames]

    def meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata with the pictures in it opened."""
        return {key: self._picture(value) if _is_picture(value) else value for key, value in meta.items()}

    def _picture(self, given: Any) -> Image.Image:
        kind = _FORMATS.get(str(given.get("mime"))) if isinstance(given, dict) else None
        if kind is None or not isinstance(given.get("b64"), str):
            raise _UnreadableError(f"a picture is {{mime, b64}}, with a mime of {', '.join(_FORMATS)}")
        try:
            data = base64.b64decode(given["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _UnreadableError(f"the picture is not valid base64: {error}") from error
        try:
            image = Image.open(io.BytesIO(data), formats=[kind])
        except Exception as error:  # a decoder may raise anything on data made to upset it
            raise _UnreadableError(f"the picture cannot be read as {kind}: {type(error).__name__}") from error
        self._admit(*image.size)
        return image

    def _admit(self, width: int, height: int) -> None:
        """Before a pixel is decoded: refuse what would fill the memory."""
        if width * height > self._most_each:
            raise _UnreadableError(f"the picture is {width}x{height}; at most {self._most_each} pixels are taken")
        self.pixels += width * height
        if self.pixels > self._most:
            raise _BadRequestError(f"the pictures have more than {self._most} pixels together; send fewer", 413)


def _decoded(image: Image.Image) -> Tensor:
    """[3, H, W]"""
    try:
        with image:
            return from_pil(image)
    except Exception as error:
        raise _UnreadableError(f"the picture cannot be read as {image.format}: {type(error).__name__}") from error


def _video(frames: Sequence[Image.Image]) -> Tensor:
    """[F, 3, H, W]"""
    decoded = [_decoded(frame) for frame in frames]
    if len({frame.shape for frame in decoded}) > 1:
        raise _UnreadableError("the frames are not all of the same size")
    return torch.stack(decoded)


class _Room:
    """Pixels that all requests under way may hold together; taken in the server's thread, given back in any."""

    def __init__(self, pixels: int) -> None:
        self._left, self._lock = pixels, threading.Lock()

    async def take(self, pixels: int) -> None:
        """Wait until there is room."""
        while not self._took(pixels):
            await asyncio.sleep(_POLL_SECONDS)

    def give(self, pixels: int) -> None:
        """There is room again."""
        with self._lock:
            self._left += pixels

    def _took(self, pixels: int) -> bool:
        with self._lock:
            fits = self._left >= pixels
            self._left -= pixels if fits else 0
            return fits


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"mime", "b64"}


def _about(scorer: Scorer) -> dict[str, Any]:
    """What a client has to know of a reward."""
    traits = scorer.traits
    return {
        "media": sorted(traits.media),
        "scope": traits.scope,
        "needs": list(traits.needs),
        "range": traits.range,
        "deterministic": traits.deterministic,
    }


def _answer(asked: _Asked, scores: Scores) -> dict[str, Any]:
    """Scores as JSON, every sample in its place."""
    count = len(asked.readable) + len(asked.unreadable)
    sheet = Sheet(count)
    sheet.put(asked.readable, scores)
    for row, error in asked.unreadable.items():
        sheet.fail([row], error)
    whole = sheet.scores()
    return {
        "value": _plain(whole.value),
        "parts": {name: _plain(part) for name, part in whole.parts.items()},
        "info": [_plain(_without_paths(entry)) for entry in whole.info],
        "version": VERSION,
    }


def _without_paths(info: dict[str, Any]) -> dict[str, Any]:
    """An error may name a file of this machine, which is none of the client's business."""
    return {**info, "error": _PATH.sub("<path>", str(info["error"]))[:400]} if "error" in info else info


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: null for NaN, lists for tensors, text for anything unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


# ----------------------------------------------------------------------------------------------------------- batching


@dataclass(frozen=True, eq=False)
class _Job:
    samples: list[Sample]
    future: Future[Scores]
    came: float


class _Batcher:
    """Scores together what comes within `wait` seconds, or while the batch before is scored; one thread per reward."""

    def __init__(self, scorer: Scorer, wait: float, most: int, turn: threading.Lock) -> None:
        """`turn` is shared with the other rewards on the same device."""
        self._scorer, self._wait, self._most, self._turn = scorer, wait, most, turn
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._held: _Job | None = None
        self._thread = threading.Thread(target=self._work, name=f"batches-{scorer.name}", daemon=True)
        self._thread.start()

    def submit(self, samples: list[Sample]) -> Future[Scores]:
        """Scores of the samples, later; the list is emptied once they are there, or nobody waits for them."""
        job = _Job(samples, Future(), time.monotonic())
        job.future.add_done_callback(lambda _: samples.clear())  # a job that was given up stays queued for a while
        self._jobs.put(job)
        return job.future

    def stop(self) -> None:
        """Score what has been submitted, then stop."""
        self._jobs.put(None)

    def ended(self, end: float) -> bool:
        """Whether it has stopped, by the time `end` at the latest."""
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next():
            with self._turn:
                self._settle([job for job in batch if job.future.set_running_or_notify_cancel()])

    def _settle(self, jobs: Sequence[_Job]) -> None:
        try:
            for job, scores in zip(jobs, self._scored(jobs), strict=True):
                job.future.set_result(scores)
        except Exception as error:
            for job in jobs:
                job.future.set_exception(error)

    def _next(self) -> list[_Job]:
        """The jobs to score together; [] at the end."""
        first = self._held or self._jobs.get()
        self._held = None
        if first is None:
            return []
        batch, size = [first], len(first.samples)
        while size < self._most:
            try:
                left = first.came + self._wait - time.monotonic()
                job = self._jobs.get(timeout=left) if left > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            if size + len(job.samples) > self._most:
                self._held = job
                break
            batch.append(job)
            size += len(job.samples)
        return batch

    def _scored(self, jobs: Sequence[_Job]) -> list[Scores]:
        """Scores of each job. Groups of different jobs are not to be mixed, whatever number they have."""
        whole = self._score(together([job.samples for job in jobs]))
        return cut(whole, [len(job.samples) for job in jobs])

    def _score(self, samples: list[Sample]) -> Scores:
        """Scores of samples; where the reward raises, those it raises for have none, and a reason."""
        try:
            with without_files():
                return self._scorer.run(samples, broken_media(samples))[0]
        except Exception as error:
            units: dict[int, list[int]] = {}
            for row, sample in enumerate(samples):
                units.setdefault(sample.group if self._scorer.traits.scope == "group" else row, []).append(row)
            sheet = Sheet(len(samples))
            if len(units) > 1:
                for rows in units.values():
                    sheet.put(rows, self._score([samples[row] for row in rows]))
            else:
                _LOG.exception("reward %r failed", self._scorer.name)
                sheet.fail(range(len(samples)), str(error))
                for entry in sheet.info:
                    entry["failed"] = True
            return sheet.scores()
