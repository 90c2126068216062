"""The HTTP client against a server that misbehaves: every call ends in time, with an answer or with a reason."""

import email.utils
import json
import random
import socket
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards import RewardError
from rewards.http import Endpoint, RemoteError, began, is_loopback, one_call, parse_json, read_token, readable
from tests.rewards.faults import (
    FaultServer,
    answer,
    closed_port,
    closes_early,
    drip,
    endless_chunk,
    garbage,
    hang,
    huge,
    late,
    raw,
    redirect,
    reply,
    resets,
    status,
    without_answer,
    wrong_type,
)

pytestmark = pytest.mark.slow

SLACK = 0.9


def timed(call):
    start = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value, time.monotonic() - start


# ------------------------------------------------------------------------------------------------------ the good case


def test_it_posts_json_and_returns_json():
    body = {"text": "ein Kreis ⭐ {x}", "numbers": [1, 2.5, None, True]}
    with FaultServer(answer(lambda request: request.json())) as server, Endpoint(server.url + "/v1/") as endpoint:
        assert endpoint.post("/echo", body) == body
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/v1/echo")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert "authorization" not in request.headers


def test_it_gets():
    with FaultServer(reply({"status": "ok"})) as server, Endpoint(server.url) as endpoint:
        assert endpoint.get("/health") == {"status": "ok"}
    assert (server.requests[0].method, server.requests[0].body) == ("GET", b"")


def test_a_connection_is_used_again():
    with FaultServer(reply({})) as server, Endpoint(server.url) as endpoint:
        for _ in range(5):
            endpoint.post("/", {})
        assert server.connections == 1


def test_an_answer_in_chunks_is_read():
    chunked = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'4\r\n{"a"\r\n4\r\n: 1}\r\n0\r\n\r\n'
    )
    with FaultServer(lambda exchange: exchange.send(chunked)) as server, Endpoint(server.url) as endpoint:
        assert [endpoint.post("/", {}) for _ in range(3)] == [{"a": 1}] * 3
        assert server.connections == 1


def test_an_answer_that_ends_with_the_connection_is_read():
    def old(exchange):
        exchange.send(b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"a": 1}')
        exchange.open = False

    with FaultServer(old) as server, Endpoint(server.url) as endpoint:
        assert endpoint.post("/", {}) == endpoint.post("/", {}) == {"a": 1}


@pytest.mark.parametrize("closing", [closes_early(), resets()])
def test_a_kept_connection_that_the_server_closed_is_replaced(closing):
    with FaultServer(reply(1), closing, reply(2)) as server, Endpoint(server.url, retries=0) as endpoint:
        assert endpoint.post("/", {}) == 1
        assert endpoint.post("/", {}) == 2


def test_large_bodies_both_ways():
    text = "x" * (8 << 20)
    with FaultServer(answer(lambda request: request.json())) as server, Endpoint(server.url) as endpoint:
        assert endpoint.post("/", {"text": text})["text"] == text


def test_a_body_that_is_no_json_is_refused_before_anything_is_sent():
    with FaultServer(reply({})) as server, Endpoint(server.url) as endpoint:
        for body in ({"x": float("nan")}, {"x": object()}):
            with pytest.raises(RewardError, match="cannot be written as JSON"):
                endpoint.post("/", body)
        assert not server.requests


# ---------------------------------------------------------------------------------------------------------- all faults


@pytest.mark.parametrize("name", without_answer())
def test_every_fault_is_an_error_with_a_reason_before_the_deadline(name):
    with FaultServer(without_answer()[name]) as server:
        with Endpoint(server.url, deadline=0.6, retries=50, max_bytes=1 << 20) as endpoint:
            error, seconds = timed(lambda: endpoint.post("/v1/score", {"a": 1}))
    assert seconds < 0.6 + SLACK
    assert isinstance(error, RewardError)
    assert error.url == server.url + "/v1/score" and error.url in str(error)
    assert error.reason and error.attempts == len(server.requests) >= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("500", "HTTP 500 As Told: as told"),
        ("404", "HTTP 404 As Told: as told"),
        ("429 with a long Retry-After", "the next try, in 60.0 s, would be past the deadline of 0.5 s"),
        ("hang", "no complete answer within 0.5 s, all that the deadline left"),
        ("drip", "no complete answer within 0.5 s"),
        ("drip in the headers", "no complete answer within 0.5 s"),
        ("garbage", "does not answer in HTTP"),
        ("not JSON", "not valid JSON"),
        ("NaN literal", "NaN is not JSON"),
        ("nested deeply", "nested too deeply"),
        ("huge", f"has {256 << 20} bytes; at most {1 << 20} are read"),
        ("huge in chunks", f"more than {1 << 20} bytes"),
        ("redirect", "redirects to 'http://169.254.169.254/latest', which is not followed"),
        ("wrong content type", "answers in text/html"),
        ("wrong length", "100 bytes are missing"),
        ("closes early", "closed the connection without an answer"),
        ("resets", "closed the connection without an answer"),
    ],
)
def test_the_reason_says_what_happened(name, reason):
    with FaultServer(without_answer()[name]) as server:
        with Endpoint(server.url, deadline=0.5, retries=0 if name == "500" else 4, max_bytes=1 << 20) as endpoint:
            error, _ = timed(lambda: endpoint.post("/", {}))
    assert reason in error.reason
    if name != "500":
        assert error.attempts == 1


def test_a_try_has_a_limit_of_its_own():
    with FaultServer(hang()) as server, Endpoint(server.url, timeout=0.3, deadline=30) as endpoint:
        error, seconds = timed(lambda: endpoint.post("/", {}))
    assert 0.3 <= seconds < 0.3 + SLACK
    assert error.reason == "no complete answer within 0.3 s"


def test_the_caller_may_ask_for_an_earlier_deadline():
    with FaultServer(drip(0.05)) as server, Endpoint(server.url, deadline=30) as endpoint:
        _, seconds = timed(lambda: endpoint.post("/", {}, deadline=0.3))
    assert 0.3 <= seconds < 0.3 + SLACK


def test_sending_has_a_limit_too():
    """A server that accepts and never reads: the body fills the buffers of both sides."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=0.5) as endpoint:
            _, seconds = timed(lambda: endpoint.post("/", {"x": "x" * (48 << 20)}))
    assert seconds < 0.5 + SLACK + 0.2  # and 48 MB are written as JSON first


def test_the_handshake_of_tls_has_a_limit_too():
    with FaultServer(hang()) as server, Endpoint(f"https://127.0.0.1:{server.port}", deadline=0.4) as endpoint:
        error, seconds = timed(lambda: endpoint.get("/"))
    assert 0.4 <= seconds < 0.4 + SLACK
    assert "cannot connect: " in error.reason


def test_connecting_has_a_limit_too():
    """A full backlog drops further connections in silence, as a firewall does."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=0.5) as endpoint:
            error, seconds = timed(lambda: endpoint.get("/"))
    assert seconds < 0.5 + SLACK
    assert "cannot connect: no answer in time" in error.reason


def test_looking_up_a_name_has_a_limit_too(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
    error, seconds = timed(lambda: Endpoint("http://judge.example", deadline=0.3).get("/"))
    assert seconds < 0.3 + SLACK
    assert "cannot connect: no answer in time" in error.reason


def test_a_refusal_that_comes_before_the_body_is_read_is_understood():
    """The server answers 413 and closes while the client still sends."""

    def serve(listener):
        line, _ = listener.accept()
        line.recv(1000)
        line.sendall(
            b'HTTP/1.1 413 Too Large\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{"error": "40 MB"}'
        )
        line.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=5) as endpoint:
            error, _ = timed(lambda: endpoint.post("/", {"x": "x" * (40 << 20)}))
    assert error.status == 413
    assert "40 MB" in error.reason


# ------------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(code):
    with FaultServer(status(code), reply(1)) as server, Endpoint(server.url) as endpoint:
        assert endpoint.post("/", {}) == 1
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    "fault", [status(400), status(401), status(404), status(413), redirect("/b"), garbage(), closes_early(), raw(b"{")]
)
def test_what_will_not_pass_is_not_tried_again(fault):
    with FaultServer(fault, reply(1)) as server, Endpoint(server.url) as endpoint:
        assert timed(lambda: endpoint.post("/", {}))[0].attempts == 1
        assert len(server.requests) == 1


def test_a_server_that_starts_late_is_waited_for():
    port = closed_port()
    with Endpoint(f"http://127.0.0.1:{port}", retries=100, deadline=10) as endpoint, ThreadPoolExecutor(1) as pool:
        call = pool.submit(endpoint.get, "/")
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as listener:
            line, _ = listener.accept()
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n7")
            assert call.result() == 7
            line.close()


def test_nobody_there_is_said_after_all_tries():
    url = f"http://127.0.0.1:{closed_port()}"
    error, _ = timed(lambda: Endpoint(url, retries=2).get("/"))
    assert error.attempts == 3
    assert str(error).startswith(f"{url}/: cannot connect:") and str(error).endswith("(after 3 tries)")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form):
    until = time.time() + 2
    header = (
        "1" if form == "seconds" else email.utils.formatdate(until, usegmt=True)
    )  # whole seconds, so 1 to 2 from now
    start = time.monotonic()
    with FaultServer(status(429, {"Retry-After": header}), reply(1)) as server, Endpoint(server.url) as endpoint:
        assert endpoint.post("/", {}) == 1
    assert 0.9 <= time.monotonic() - start < 5


def test_the_pauses_grow_and_are_random():
    """With full jitter, pause k is uniform in [0, 0.25 * 2**k]: the sum of 5 is at most 7.75 s and never the same."""
    pauses = []
    with FaultServer(status(500)) as server, Endpoint(server.url, retries=5) as endpoint:
        endpoint._closed.wait = pauses.append
        for _ in range(60):
            with pytest.raises(RemoteError):
                endpoint.post("/", {})
    for k in range(5):
        drawn = pauses[k::5]
        assert 0 <= min(drawn) < 0.25 * 2**k * 0.25
        assert 0.25 * 2**k * 0.75 < max(drawn) <= 0.25 * 2**k


def test_the_pauses_leave_the_random_numbers_of_a_run_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with FaultServer(status(500), reply(1)) as server, Endpoint(server.url) as endpoint:
        endpoint.post("/", {})
    assert random.random() == expected


# ------------------------------------------------------------------------------------------------ many at the same time


def test_no_more_requests_run_at_once_than_allowed():
    with FaultServer(late(0.05, reply({}))) as server, Endpoint(server.url, max_concurrency=3) as endpoint:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda _: endpoint.post("/", {}), range(12)))
        assert server.most_running == 3
        assert server.connections <= 3


def test_waiting_for_a_turn_counts_towards_the_deadline():
    with FaultServer(hang()) as server, Endpoint(server.url, max_concurrency=1, deadline=2) as endpoint:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(endpoint.post, "/", {})
            time.sleep(0.1)
            error, seconds = timed(lambda: endpoint.post("/", {}, deadline=0.3))
            server.close()
            assert isinstance(first.exception(), RemoteError)
    assert seconds < 0.3 + SLACK
    assert "no free slot" in error.reason


def test_the_least_busy_address_is_asked():
    with FaultServer(late(0.3, reply("slow"))) as slow, FaultServer(late(0.01, reply("fast"))) as fast:
        with Endpoint([slow.url, fast.url], max_concurrency=4) as endpoint, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: endpoint.post("/", {}), range(24)))
    assert len(fast.requests) > 2 * len(slow.requests) >= 2


def test_an_address_that_fails_is_left_alone_for_a_while_and_then_probed(monkeypatch):
    sick = threading.Event()
    sick.set()

    def first(exchange):
        (status(500) if sick.is_set() else reply("a"))(exchange)

    offset = [0.0]
    with FaultServer(first) as a, FaultServer(reply("b")) as b, Endpoint([a.url, b.url]) as endpoint:
        monkeypatch.setattr("rewards.http.time.monotonic", lambda clock=time.monotonic: clock() + offset[0])
        assert [endpoint.post("/", {}) for _ in range(10)] == ["b"] * 10
        assert len(a.requests) == 3  # and no more, although it is never busier than b
        offset[0] = 1.5
        assert endpoint.post("/", {}) == "b"
        assert len(a.requests) == 4  # the probe, which fails
        assert endpoint.post("/", {}) == "b"
        assert len(a.requests) == 4  # it rests for longer now
        sick.clear()
        offset[0] = 5.0
        assert endpoint.post("/", {}) == "a"
        assert {endpoint.post("/", {}) for _ in range(3)} == {"a"}  # both idle: the first is taken


def test_where_no_address_is_healthy_all_are_asked():
    with FaultServer(*[status(500)] * 9, reply(1)) as server, Endpoint(server.url, retries=0) as endpoint:
        for _ in range(9):
            with pytest.raises(RemoteError):
                endpoint.post("/", {})
        assert endpoint.post("/", {}) == 1


def test_a_busy_server_is_not_a_sick_one():
    with FaultServer(status(429)) as busy, FaultServer(late(0.05, reply("b"))) as other:
        with Endpoint([busy.url, other.url]) as endpoint:
            for _ in range(8):
                assert endpoint.post("/", {}) == "b"
        assert len(busy.requests) == 8


def test_a_closed_endpoint_fails_at_once_and_leaves_no_connection():
    with FaultServer(reply(1)) as server:
        endpoint = Endpoint(server.url)
        endpoint.post("/", {})
        endpoint.close()
        error, _ = timed(lambda: endpoint.post("/", {}))
        assert "closed" in error.reason
        assert len(server.requests) == 1


# --------------------------------------------------------------------------------------------------------- what is said

SECRET = "s3cret-token-0123456789"


def test_the_token_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    leaky = status(403, message=f"Bearer {SECRET} is not allowed\n\x1b[31m here")
    with FaultServer(leaky) as server, Endpoint(server.url, token="env:JUDGE_TOKEN") as endpoint:
        error, _ = timed(lambda: endpoint.post("/", {}))
        assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
        assert "*** is not allowed" in str(error)
        assert "\x1b" not in str(error) and "\n" not in str(error)
        for text in (str(error), repr(error), repr(endpoint), repr(vars(error)), str(error.__cause__)):
            assert SECRET not in text


def test_a_long_reason_is_cut():
    with FaultServer(status(400, message="x" * 5000)) as server, Endpoint(server.url) as endpoint:
        assert len(timed(lambda: endpoint.post("/", {}))[0].reason) == 400


def test_an_openai_error_is_understood():
    body = json.dumps({"error": {"message": "no such model", "type": "invalid_request_error"}}).encode()
    with FaultServer(raw(body, 404)) as server, Endpoint(server.url) as endpoint:
        assert timed(lambda: endpoint.post("/", {}))[0].reason == "HTTP 404 As Told: no such model"


def test_tokens_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("A_TOKEN", SECRET)
    assert read_token("env:A_TOKEN") == SECRET
    assert read_token(SECRET) == SECRET
    assert read_token(None) is None
    with pytest.raises(RewardError, match="'NOT_SET' holds no token. Mend: export NOT_SET"):
        read_token("env:NOT_SET")
    with pytest.raises(RewardError, match="line break") as caught:
        read_token("abc\r\nX-Evil: 1")
    assert "Evil" not in str(caught.value)


def test_a_token_over_an_open_network_warns():
    with pytest.warns(UserWarning, match="http://judge.example: a token goes over the network unencrypted"):
        Endpoint("http://judge.example", token=SECRET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Endpoint("https://judge.example", token=SECRET)
        Endpoint("http://127.0.0.1:1", token=SECRET)
        Endpoint("http://judge.example")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "judge",
        "ftp://x",
        "file:///etc/passwd",
        "http://",
        "http://a/b?c=1",
        "http://a/#b",
        "http://a:b",
        "http://a b/",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(RewardError, match="url"):
        Endpoint(url)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(RewardError, match="token: env:NAME") as caught:
        Endpoint("http://me:hunter2@host/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"deadline": -1}, {"retries": -1}, {"max_concurrency": 0}])
def test_options_without_sense_are_refused(options):
    with pytest.raises(RewardError, match=next(iter(options))):
        Endpoint("http://127.0.0.1:1", **options)
    with pytest.raises(RewardError, match="at least one url"):
        Endpoint([])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", ""])
def test_not_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("data", [b"NaN", b"[Infinity]", b"[-Infinity]", b"1e999", b"\xff", b"", b"{", b"[" * 100_000])
def test_strict_json(data):
    with pytest.raises(ValueError):
        parse_json(data)


def test_a_compressed_answer_is_refused():
    with FaultServer(raw(b"{}", headers={"Content-Encoding": "gzip"})) as server, Endpoint(server.url) as endpoint:
        assert "(gzip)" in timed(lambda: endpoint.post("/", {}))[0].reason


def test_a_page_is_not_parsed_even_if_it_is_json():
    with FaultServer(wrong_type("text/plain", b"{}")) as server, Endpoint(server.url) as endpoint:
        assert "answers in text/plain" in timed(lambda: endpoint.post("/", {}))[0].reason


def test_a_huge_answer_is_refused_without_being_read():
    with FaultServer(huge(64)) as server, Endpoint(server.url, max_bytes=1000) as endpoint:
        assert timed(lambda: endpoint.post("/", {}))[1] < 0.5


@pytest.mark.parametrize(("code", "most"), [(200, 1 << 18), (503, 48 << 20)])
def test_a_chunk_that_claims_less_than_no_length_is_not_read_to_its_end(code, most):
    """http.client reads all that comes where the size of a chunk is -1."""
    sent = []
    with FaultServer(endless_chunk(sent, code)) as server, Endpoint(server.url, max_bytes=most, retries=0) as end:
        error, seconds = timed(lambda: end.post("/", {}))
    assert seconds < 2
    assert error.reason == (f"the answer has more than {most + (1 << 17)} bytes" if code == 200 else "HTTP 503 As Told")
    assert sum(sent) < 32 << 20  # what fits into the buffers of both sides comes on top; 64 MB are offered


def test_what_is_not_asked_for_lack_of_time_is_no_fault_of_the_server():
    with FaultServer(reply({})) as server, Endpoint(server.url) as endpoint:
        for _ in range(4):
            assert "not asked: the deadline was over" in timed(lambda: endpoint.post("/", {}, deadline=-0.1))[0].reason
        assert endpoint.post("/", {}) == {} and len(server.requests) == 1
        assert endpoint._pool.servers[0].failures == 0


def test_one_call_has_one_beginning():
    before = began()
    with one_call():
        first = began()
        time.sleep(0.02)
        with one_call():
            assert began() == first
        assert began() == first
    assert before <= first < first + 0.02 <= began()


def test_text_from_elsewhere_is_made_fit_for_a_log():
    assert readable("a\x1b[31m\r\nb\ud800 \u202e ⭐") == "a [31m  b    ⭐"
    assert readable("x" * 400) == "x" * 400
    assert readable("x" * 401) == "x" * 397 + "..."
