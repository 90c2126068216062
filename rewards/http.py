"""JSON over HTTP for rewards and judges that run elsewhere: bounded in time and in size, whatever the other side does.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", token="env:JUDGE_TOKEN", deadline=30)
    answer = endpoint.post("/chat/completions", {"model": "judge", "messages": [...]})

    cannot connect, 408, 425, 429, 5xx     tried again after a random pause of at most 0.25, 0.5, 1, ... s, or after the
                                           `Retry-After` that the server asks for
    other statuses, redirects, answers     RemoteError at once
    that are broken, late or too large
    the deadline                           RemoteError, also while bytes still drip in

What is sent must bear to arrive twice: where a connection that was kept turns out to be closed, the request goes out
again on a new one. Environment variables for proxies are not read.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import ipaddress
import json
import math
import os
import random
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast
from urllib.parse import urlsplit

from rewards.types import RewardError

__all__ = ["Endpoint", "RemoteError", "began", "is_loopback", "one_call", "parse_json", "read_token", "readable"]

_AGAIN = frozenset({408, 425, 429})
"""Statuses besides 5xx that another try may mend."""
_PIECE = 1 << 16
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0
_BROKEN = "the connection broke in the middle of the answer"
_TRIP, _REST, _LONGEST_REST = 3, 1.0, 30.0
"""Failures in a row until a server is left alone, and for how many seconds at first and at most."""


class RemoteError(RewardError):
    """A request got no usable answer; the message says from which server, why, and after how many tries."""

    def __init__(self, url: str, reason: str, *, status: int | None = None, attempts: int = 1) -> None:
        """`status` is the HTTP status, where one came."""
        super().__init__(f"{url}: {reason}" + (f" (after {attempts} tries)" if attempts > 1 else ""))
        self.url, self.reason, self.status, self.attempts = url, reason, status, attempts


def read_token(token: str | None) -> str | None:
    """A token, or for `env:NAME` what that environment variable holds, so that no secret stands in a config."""
    if token is None:
        return None
    kind, _, name = token.partition(":")
    value = os.environ.get(name, "") if kind == "env" else token
    if not value:
        raise RewardError(f"the environment variable {name!r} holds no token. Mend: export {name}=...")
    if not all("!" <= character <= "~" for character in value):
        raise RewardError("a token has a space, a line break or a character that is not ASCII; copy it again")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host (or an address) of this name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def readable(text: str, most: int = 400) -> str:
    """Text from elsewhere, fit for a log: without control characters and lone surrogates, at most `most` long."""
    text = "".join(character if character.isprintable() else " " for character in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


_began: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Deadlines inside count from now, not from each question: batches, frames and repeats multiply no deadline.

    Inside another one the outer beginning holds.
    """
    token = _began.set(began())
    try:
        yield
    finally:
        _began.reset(token)


def began() -> float:
    """When the `one_call` under way began, in the time of `time.monotonic`; without one, now."""
    start = _began.get()
    return time.monotonic() if start is None else start


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8 as Python objects; ValueError for anything else, and for NaN and infinities."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class Endpoint:
    """One service at one or several addresses; safe to use from many threads.

    Of several addresses the least busy is asked. One that failed three times in a row is left alone for a while, then
    gets one request to prove itself. Where none is healthy all are asked: nobody is served by not asking.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        timeout: float = 60.0,
        deadline: float = 180.0,
        retries: int = 4,
        max_bytes: int = 64 << 20,
        max_concurrency: int = 8,
    ) -> None:
        """`urls` are base addresses, to which a request's path is added; nothing is connected yet.

        token             bearer token, or `env:NAME`
        timeout           seconds for one try: connecting, sending, and the whole answer
        deadline          seconds for one call: waiting for its turn, all tries, and the pauses between them
        retries           tries after the first
        max_bytes         of an answer; with its headers and the marks of its chunks 128 KiB more
        max_concurrency   requests at the same time; further calls wait
        """
        servers = [_read_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
        if not servers:
            raise RewardError("an endpoint needs at least one url, such as http://127.0.0.1:8000")
        _check_positive(timeout=timeout, deadline=deadline, max_bytes=max_bytes, max_concurrency=max_concurrency)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise RewardError(f"retries is {retries!r}; expected a whole number, 0 for a single try")
        self._token = read_token(token)
        self._timeout, self._deadline = timeout, deadline
        self._retries, self._max_bytes = retries, max_bytes
        self._pool = _Pool(servers)
        self._slots = threading.BoundedSemaphore(max_concurrency)
        self._closed = threading.Event()
        self._random = random.Random()  # of its own: a run's random numbers stay what they were
        for server in servers if self._token else []:
            if server.tls is None and not is_loopback(server.host):
                warnings.warn(f"{server.url}: a token goes over the network unencrypted; use https", stacklevel=2)

    def post(self, path: str, body: Mapping[str, Any], *, deadline: float | None = None) -> Any:
        """Send a JSON object and return the JSON that comes back; `deadline` in seconds, if not the usual one."""
        return self._call("POST", path, body, deadline)

    def get(self, path: str, *, deadline: float | None = None) -> Any:
        """The JSON at a path."""
        return self._call("GET", path, None, deadline)

    def close(self) -> None:
        """Close all idle connections; a call under way may end its try, and all later ones fail."""
        self._closed.set()
        self._pool.close()

    def __enter__(self) -> Self:
        """The endpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # ------------------------------------------------------------------------------------------- one call, some tries

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, deadline: float | None) -> Any:
        limit = self._deadline if deadline is None else deadline
        end = time.monotonic() + limit
        if limit <= 0:  # no server is to blame for what it was not asked
            raise RemoteError(self._pool.servers[0].url + path, "not asked: the deadline was over before its turn")
        asked = _Asked(method, path, None if body is None else _written(path, body))
        if not self._slots.acquire(timeout=limit):
            raise RemoteError(self._pool.servers[0].url + path, f"no free slot before the deadline of {limit:g} s")
        try:
            return self._tries(asked, end, limit)
        finally:
            self._slots.release()

    def _tries(self, asked: _Asked, end: float, limit: float) -> Any:
        tried: list[_Server] = []
        while True:
            server = self._pool.take(tried)
            tried.append(server)
            sick = False
            try:
                return self._try(server, asked, end)
            except _FailedError as failed:
                error, sick = failed, failed.sick
            finally:
                self._pool.give(server, sick)
            reason = error.reason
            wait = max(error.after, self._random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (len(tried) - 1))))
            final = not error.again or len(tried) > self._retries
            if not final and time.monotonic() + wait >= end:
                reason += f"; the next try, in {wait:.1f} s, would be past the deadline of {limit:g} s"
                final = True
            if final:
                reason = self._cleaned(reason)
                raise RemoteError(server.url + asked.path, reason, status=error.status, attempts=len(tried)) from None
            self._closed.wait(wait)

    def _cleaned(self, reason: str) -> str:
        """A reason fit for a log: without the token and without control characters, and short."""
        if self._token:
            reason = reason.replace(self._token, "***")
        return readable(reason)

    def _try(self, server: _Server, asked: _Asked, end: float) -> Any:
        """One try, on a connection that was kept if there is one."""
        if self._closed.is_set():
            raise _FailedError("the endpoint is closed")
        limit = min(self._timeout, end - time.monotonic())
        until = time.monotonic() + limit
        kept = self._pool.kept(server)
        try:
            if kept is not None:
                try:
                    return self._exchange(kept, server, asked, until)
                except _LostError:  # closed by the server while it was idle, which is its good right
                    pass
            return self._exchange(_connect(server, until), server, asked, until)
        except TimeoutError as error:
            rest = ", all that the deadline left" if limit < self._timeout else ""
            raise _FailedError(f"no complete answer within {limit:.3g} s{rest}", sick=True) from error
        except _LostError as error:
            raise _FailedError("closed the connection without an answer", sick=True) from error

    def _exchange(self, line: _Line, server: _Server, asked: _Asked, until: float) -> Any:
        """One request and its answer; the connection is kept for the next if it can be."""
        line.until, line.most, line.came = until, self._max_bytes + 2 * _PIECE, 0
        try:
            response = self._request(line, server, asked)
            answer = self._answer(line, response)
        except BaseException:
            line.close()
            raise
        if response.will_close:
            line.close()
        else:
            self._pool.keep(server, line)
        return answer

    def _request(self, line: _Line, server: _Server, asked: _Asked) -> http.client.HTTPResponse:
        """Send, and read the head of the answer."""
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.default_port = 80 if server.tls is None else 443  # what the Host header leaves out
        connection.sock = cast(socket.socket, line)
        headers = {"Accept": "application/json"}
        if asked.payload is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            try:
                connection.request(asked.method, server.base + asked.path, asked.payload, headers)
            except ConnectionError:
                pass  # a server that refuses a body may answer and close before it has read all of it
            return connection.getresponse()
        except ConnectionError as error:
            raise _LostError from error
        except http.client.HTTPException as error:
            raise _FailedError(f"does not answer in HTTP: {error!r}", sick=True) from error
        except TimeoutError:
            raise
        except OSError as error:
            raise _FailedError(f"the connection failed: {error}", sick=True) from error

    def _answer(self, line: _Line, response: http.client.HTTPResponse) -> Any:
        """The JSON of a good answer; anything else is a failure with its reason."""
        status = response.status
        if 300 <= status < 400:
            raise _FailedError(
                f"HTTP {status} redirects to {response.headers.get('Location', 'nowhere')!r}, which is not followed: "
                "token and data would go there. Mend: give that address as the url, if you trust it",
                status=status,
            )
        if not 200 <= status < 300:
            line.most = min(line.most, line.came + 2 * _PIECE)  # a refusal is short
            raise _FailedError(
                f"HTTP {status} {response.reason}{_told(response)}",
                status=status,
                again=status in _AGAIN or status >= 500,
                after=_retry_after(response.headers.get("Retry-After")),
                sick=status >= 500,
            )
        kind, encoding = response.headers.get_content_type(), response.headers.get("Content-Encoding", "identity")
        if kind != "application/json" or encoding != "identity":
            raise _FailedError(f"answers in {kind} ({encoding}); expected application/json (identity)", status=status)
        try:
            return parse_json(_read(response, self._max_bytes))
        except ValueError as error:
            raise _FailedError(f"the answer is not valid JSON: {error}", status=status) from error


class _Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    payload: bytes | None


def _written(path: str, body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(f"the request to {path} cannot be written as JSON: {error}") from error


# ------------------------------------------------------------------------------------------------------------ failures


class _LostError(Exception):
    """The connection was closed before the head of an answer came."""


@dataclass
class _FailedError(Exception):
    """Why one try failed, and what that means for the next one."""

    reason: str
    status: int | None = None
    again: bool = False
    """Another try may succeed."""
    after: float = 0.0
    """Seconds that the server asks to be left alone."""
    sick: bool = False
    """The server is to blame, not the request."""


# ------------------------------------------------------------------------------------------------------------- servers


@dataclass(eq=False)
class _Server:
    """One address: how it fares, and its idle connections."""

    url: str
    host: str
    port: int
    base: str
    """Path that every request's path is added to."""
    tls: ssl.SSLContext | None
    outstanding: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    idle: list[_Line] = field(default_factory=list)

    def healthy(self, now: float) -> bool:
        """Whether to ask it; after a rest one request at a time, until one succeeds."""
        return self.failures < _TRIP or (now >= self.rests_until and not self.outstanding)


class _Pool:
    """The servers of an endpoint: who is asked next, and which connections are kept."""

    def __init__(self, servers: list[_Server]) -> None:
        self.servers = servers
        self._closed = False
        self._lock = threading.Lock()

    def take(self, tried: Sequence[_Server]) -> _Server:
        """The server to ask: healthy, not `tried` yet, with the fewest requests under way."""
        with self._lock:
            now = time.monotonic()
            healthy = [server for server in self.servers if server.healthy(now)] or self.servers
            chosen = min(healthy, key=lambda server: (tried.count(server), server.outstanding))
            chosen.outstanding += 1
            return chosen

    def give(self, server: _Server, sick: bool) -> None:
        """A request is over; `sick` if the server is to blame for its failure."""
        with self._lock:
            server.outstanding -= 1
            server.failures = server.failures + 1 if sick else 0
            if server.failures >= _TRIP:
                rest = min(_LONGEST_REST, _REST * 2 ** min(server.failures - _TRIP, 16))
                server.rests_until = time.monotonic() + rest

    def kept(self, server: _Server) -> _Line | None:
        """The idle connection that was used last, if there is one."""
        with self._lock:
            return server.idle.pop() if server.idle else None

    def keep(self, server: _Server, line: _Line) -> None:
        """Keep a connection for a later request."""
        with self._lock:
            if not self._closed:
                server.idle.append(line)
                return
        line.close()

    def close(self) -> None:
        """Close what is idle, and keep nothing from now on."""
        with self._lock:
            self._closed = True
            idle = [line for server in self.servers for line in server.idle]
            for server in self.servers:
                server.idle.clear()
        for line in idle:
            line.close()


def _read_url(url: str) -> _Server:
    """An address that was given; RewardError for what is no plain http(s) address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RewardError(f"url {url!r}: {error}") from error
    if "@" in parts.netloc:
        raise RewardError("a url must not hold a user or a password, which would stand in logs; use `token: env:NAME`")
    plain = all("!" <= character <= "~" for character in url) and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise RewardError(f"url {url!r}; expected http(s)://host:port/path in ASCII, without spaces, ? and #")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = port or (443 if tls else 80)
    return _Server(url=url.rstrip("/"), host=parts.hostname, port=port, base=parts.path.rstrip("/"), tls=tls)


# --------------------------------------------------------------------------------------------------------- connections


class _Line:
    """A connected socket of which every send and every receive ends at `until`, a time of `time.monotonic`.

    A timeout of the socket alone bounds the silence between two bytes: one byte a second would be waited for forever.
    And `most` bytes come in at most, counted here: http.client reads to the end of what claims to be a chunk of -1
    bytes. It has what http.client needs of a socket.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.until = 0.0
        self.most = self.came = 0

    def sendall(self, data: bytes) -> None:
        """Send all of it, in pieces."""
        left = memoryview(data)
        while left:
            self.wait_at_most()
            left = left[self._socket.send(left[:_PIECE]) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        """What comes in, as a file; it stays readable when the line is closed before it."""
        return io.BufferedReader(_Reader(self, self._socket.makefile("rb", buffering=0)))

    def wait_at_most(self) -> None:
        """Let the next send or receive take what time is left."""
        self._socket.settimeout(_left(self.until))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class _Reader(io.RawIOBase):
    """What comes in over a line, as a raw file."""

    def __init__(self, line: _Line, raw: io.RawIOBase) -> None:
        self._line, self._raw = line, raw

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """What is there, waiting for it no longer than the line may."""
        self._line.wait_at_most()
        count = self._raw.readinto(buffer)
        self._line.came += count or 0
        if self._line.came > self._line.most:
            raise _FailedError(f"the answer has more than {self._line.most} bytes")
        return count

    def close(self) -> None:
        """Let go of the line."""
        self._raw.close()
        super().close()


def _left(until: float) -> float:
    """Seconds until a time; TimeoutError if it has passed."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(server: _Server, until: float) -> _Line:
    """A line to a server, by the first of its addresses that answers; a failure may be tried again."""
    why: Exception = OSError("the host has no address")
    try:
        found = _addresses(server, until)
        for index, (family, address) in enumerate(found):
            try:
                return _Line(_open(server, family, address, _left(until) / (len(found) - index)))
            except ssl.SSLCertVerificationError as error:
                raise _FailedError(f"its certificate is refused: {error.verify_message}", sick=True) from error
            except OSError as error:
                why = error
    except (OSError, UnicodeError) as error:
        why = error
    told = "no answer in time" if isinstance(why, TimeoutError) else str(why)
    raise _FailedError(f"cannot connect: {told}", again=True, sick=True) from why


def _open(server: _Server, family: int, address: Any, limit: float) -> socket.socket:
    """A connected socket, encrypted where the address says so, within `limit` seconds."""
    until = time.monotonic() + limit
    line = socket.socket(family, socket.SOCK_STREAM)
    try:
        line.settimeout(limit)
        line.connect(address)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.tls is not None:
            line = server.tls.wrap_socket(line, server_hostname=server.host, do_handshake_on_connect=False)
            line.settimeout(_left(until))
            line.do_handshake()
    except BaseException:
        line.close()
        raise
    return line


def _addresses(server: _Server, until: float) -> list[tuple[int, Any]]:
    """(family, address) of a host. In a thread, since the system's look-up takes no time limit."""
    answer: Future[list[Any]] = Future()

    def look() -> None:
        try:
            answer.set_result(socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=look, daemon=True).start()
    return [(family, address) for family, _, _, _, address in answer.result(_left(until))]


# ------------------------------------------------------------------------------------------------------------- answers


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """The whole body, if it is no longer than `limit` bytes."""
    if (response.length or 0) > limit:
        raise _FailedError(f"the answer has {response.length} bytes; at most {limit} are read", status=response.status)
    data = bytearray()
    try:
        while piece := response.read(_PIECE):
            data += piece
            if len(data) > limit:
                raise _FailedError(f"the answer has more than {limit} bytes", status=response.status)
    except (http.client.HTTPException, ConnectionError) as error:
        raise _FailedError(f"{_BROKEN}: {error!r}", status=response.status, sick=True) from error
    if response.length:
        raise _FailedError(f"{_BROKEN}: {response.length} bytes are missing", status=response.status, sick=True)
    return bytes(data)


def _told(response: http.client.HTTPResponse) -> str:
    """What the body of a refusal says, if it says it in a way that is known: {"error": ...}."""
    try:
        answer = parse_json(_read(response, _PIECE))
    except (_FailedError, ValueError):
        return ""
    error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return f": {message}" if isinstance(message, str) else ""


def _retry_after(header: str | None) -> float:
    """Seconds to wait from a `Retry-After` header: a number, or a date; 0 for anything else."""
    if header is None:
        return 0.0
    try:
        if header.strip().isdigit():
            return float(header)
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise RewardError(f"{name} is {number!r}; expected a number above 0")
