"""A server of raw sockets that misbehaves as told, for tests of clients.

    with FaultServer(status(500), status(429, {"Retry-After": "1"}), reply({"value": [1.0]})) as server:
        Endpoint(server.url).post("/v1/score", {})          # 500, then 429, then the answer
        server.requests                                     # what came in: method, path, headers, body

Each request meets the next fault, and all further ones the last. A fault is a function of an `Exchange`, so that one
may look at the request first: `lambda exchange: (hang() if b"slow" in exchange.request.body else reply({}))(exchange)`.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

JSON = "application/json"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    connection: int
    """Which of the server's connections it came over, from 0."""

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange:
    """A request and the line that an answer goes over; `open` says whether the connection serves another request."""

    def __init__(self, line: socket.socket, request: Request, closing: threading.Event) -> None:
        self.line, self.request, self._closing = line, request, closing
        self.open = True

    def send(self, data: bytes) -> None:
        self.line.sendall(data)

    def wait(self, seconds: float) -> bool:
        """Sleep, no longer than the server lives; whether it still does."""
        return not self._closing.wait(seconds)


Fault = Callable[[Exchange], None]


class FaultServer:
    """Listens on the loopback; every connection has a thread."""

    def __init__(self, *faults: Fault, host: str = "127.0.0.1") -> None:
        self._faults = list(faults)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._lines: list[socket.socket] = []
        self.requests: list[Request] = []
        self.running = self.most_running = 0
        """Requests being answered now, and at most at one time."""
        self._listener = socket.create_server((host, 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        with self._lock:
            for line in self._lines:
                line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._lines.append(line)
                number = len(self._lines) - 1
            threading.Thread(target=self._serve, args=(line, number), daemon=True).start()

    def _serve(self, line: socket.socket, number: int) -> None:
        try:
            with line, line.makefile("rb") as incoming:
                while request := _read(incoming, number):
                    with self._lock:
                        self.requests.append(request)
                        fault = self._faults.pop(0) if len(self._faults) > 1 else self._faults[0]
                        self.running += 1
                        self.most_running = max(self.most_running, self.running)
                    exchange = Exchange(line, request, self._closing)
                    try:
                        fault(exchange)
                    finally:
                        with self._lock:
                            self.running -= 1
                    if not exchange.open:
                        return
        except (OSError, ValueError):  # the client has hung up, or this server has been closed
            pass


def _read(incoming: Any, number: int) -> Request | None:
    start = incoming.readline().split()
    if len(start) < 2:
        return None
    headers = {}
    while line := incoming.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = incoming.read(int(headers.get("content-length", 0)))
    return Request(start[0].decode(), start[1].decode(), headers, body, number)


# ------------------------------------------------------------------------------------------------------------- answers


def head(length: int | None, status: int = 200, headers: Mapping[str, str] | None = None, kind: str = JSON) -> bytes:
    """Status line and headers, with the length that they claim."""
    fields = {"Content-Type": kind, **({} if length is None else {"Content-Length": str(length)}), **(headers or {})}
    lines = [f"HTTP/1.1 {status} As Told", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def raw(data: bytes, status: int = 200, headers: Mapping[str, str] | None = None, kind: str = JSON) -> Fault:
    """A well-formed answer with this body, whatever it is."""
    return lambda exchange: exchange.send(head(len(data), status, headers, kind) + data)


def reply(body: Any) -> Fault:
    """A good answer."""
    return raw(json.dumps(body).encode())


def answer(make: Callable[[Request], Any]) -> Fault:
    """A good answer that depends on the request."""
    return lambda exchange: reply(make(exchange.request))(exchange)


def status(code: int, headers: Mapping[str, str] | None = None, message: str = "as told") -> Fault:
    """A refusal in JSON: `status(429, {"Retry-After": "1"})`."""
    return raw(json.dumps({"error": message}).encode(), code, headers)


# -------------------------------------------------------------------------------------------------------------- faults


def hang(seconds: float = 60.0) -> Fault:
    """Not a byte."""

    def fault(exchange: Exchange) -> None:
        exchange.wait(seconds)
        exchange.open = False

    return fault


def late(seconds: float, then: Fault) -> Fault:
    """A pause, then something else."""

    def fault(exchange: Exchange) -> None:
        if exchange.wait(seconds):
            then(exchange)

    return fault


def drip(interval: float = 0.2, body: Any = None) -> Fault:
    """Headers at once, then a byte of a good body every so often: no silence is ever long."""
    data = json.dumps({"value": [0.5] * 100} if body is None else body).encode()

    def fault(exchange: Exchange) -> None:
        exchange.send(head(len(data)))
        _drip(exchange, data, interval)

    return fault


def drip_headers(interval: float = 0.2) -> Fault:
    """One byte of the headers every so often."""
    return lambda exchange: _drip(exchange, head(2, headers={"X-Padding": "x" * 500}) + b"{}", interval)


def _drip(exchange: Exchange, data: bytes, interval: float) -> None:
    for index in range(len(data)):
        exchange.send(data[index : index + 1])
        if not exchange.wait(interval):
            return


def garbage() -> Fault:
    """No HTTP at all."""

    def fault(exchange: Exchange) -> None:
        exchange.send(b"\x16\x03\x01\x02 this is not HTTP\r\n\r\n" + bytes(range(256)))
        exchange.open = False

    return fault


def not_json() -> Fault:
    """HTTP, with a body that only claims to be JSON."""
    return raw(b'{"value": [0.1, ')


def nan_literal() -> Fault:
    """NaN as a bare word, which JSON does not have and Python's reader takes all the same."""
    return raw(b'{"value": [NaN, Infinity]}')


def deep(levels: int = 200_000) -> Fault:
    """Brackets in brackets, which exhaust the stack of a careless reader."""
    return raw(b"[" * levels + b"]" * levels)


def huge(megabytes: int = 256, declared: bool = True) -> Fault:
    """A body that does not end for a long time; `declared` says so in Content-Length, else it comes in chunks."""

    def fault(exchange: Exchange) -> None:
        piece = b" " * (1 << 20)
        if declared:
            exchange.send(head(megabytes << 20))
        else:
            exchange.send(head(None, headers={"Transfer-Encoding": "chunked"}))
        for _ in range(megabytes):
            exchange.send(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))
        exchange.open = False

    return fault


def endless_chunk(sent: list[int], code: int = 200, megabytes: int = 64) -> Fault:
    """A chunk of -1 bytes, and what follows; `sent` collects how many bytes of it went out."""

    def fault(exchange: Exchange) -> None:
        exchange.open = False
        exchange.send(head(None, code, {"Transfer-Encoding": "chunked"}) + b"-1\r\n")
        for _ in range(megabytes):
            exchange.send(b" " * (1 << 20))
            sent.append(1 << 20)

    return fault


def redirect(location: str, code: int = 307) -> Fault:
    """Sends the client elsewhere."""
    return status(code, {"Location": location})


def wrong_type(kind: str = "text/html", data: bytes = b"<html>Sign in</html>") -> Fault:
    """A page where JSON was asked for."""
    return raw(data, kind=kind)


def wrong_length() -> Fault:
    """A good JSON answer with fewer bytes than the headers claim; the connection then closes."""

    def fault(exchange: Exchange) -> None:
        data = b'{"value": [0.5]}'
        exchange.send(head(len(data) + 100) + data)
        exchange.open = False

    return fault


def closes_early() -> Fault:
    """The connection closes before a byte of the answer."""

    def fault(exchange: Exchange) -> None:
        exchange.open = False

    return fault


def resets() -> Fault:
    """As above, and not in a polite way (TCP RST)."""

    def fault(exchange: Exchange) -> None:
        exchange.line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.open = False

    return fault


def without_answer() -> dict[str, Fault]:
    """{name: fault} of everything after which there is no usable answer, for parametrised tests."""
    return {
        "500": status(500),
        "429 with a long Retry-After": status(429, {"Retry-After": "60"}),
        "404": status(404),
        "hang": hang(),
        "drip": drip(),
        "drip in the headers": drip_headers(),
        "garbage": garbage(),
        "not JSON": not_json(),
        "NaN literal": nan_literal(),
        "nested deeply": deep(),
        "huge": huge(),
        "huge in chunks": huge(declared=False),
        "redirect": redirect("http://169.254.169.254/latest"),
        "wrong content type": wrong_type(),
        "wrong length": wrong_length(),
        "closes early": closes_early(),
        "resets": resets(),
    }


def closed_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
