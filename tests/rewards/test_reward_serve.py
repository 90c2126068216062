"""The reward server over real sockets: who may ask, for what and how much, and that no client harms another."""

import base64
import gc
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from rewards import RewardError, RewardHub, declare
from rewards.http import Endpoint, RemoteError
from rewards.media import from_pil
from rewards.remote import Remote, to_wire
from tests.rewards.faults import closed_port
from tests.rewards.makers import batch, flat, noise
from tests.rewards.stopwatch import Stopwatch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from rewards.serve import RewardServer, serve

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-more-than-thirty-two-characters"


class Counting:
    """Mean brightness; remembers the sizes of its calls, and waits while it is told to."""

    def __init__(self):
        self.sizes, self.gate = [], threading.Event()
        self.gate.set()

    def score(self, samples):
        self.sizes.append(len(samples))
        assert self.gate.wait(10)
        return [sample.media.mean().item() for sample in samples]


@declare()
def buggy(samples):
    """A bug (TypeError) for some prompts, which stops a run where it is called directly."""
    return [sample.media.mean().item() + ("" if sample.prompt == "prompt 2" else 0) for sample in samples]


@declare()
def chatty(samples):
    """Information of every kind."""
    from rewards import Scores

    info = [{"nan": float("nan"), "tensor": torch.ones(2), "object": object, "list": (1, "\ud800")} for _ in samples]
    return Scores(value=torch.tensor([s.media.mean() for s in samples]), parts={}, info=info)


@pytest.fixture(scope="module")
def counting():
    return Counting()


@pytest.fixture(scope="module")
def server(counting):
    made = RewardServer(
        [{"use": counting, "name": "mean"}, buggy, chatty],
        port=0,
        device="cpu",
        max_body_mb=1,
        max_samples=20,
        max_pixels=64 * 64,
        request_timeout=1.0,
        batch_wait_ms=30,
        max_batch=8,
        max_waiting=6,
    )
    with made:
        yield made


@pytest.fixture(autouse=True)
def fresh(counting):
    counting.sizes.clear()
    counting.gate.set()


def ask(server, body, path="/v1/score", method="POST", headers=None):
    """(status, answer, headers), by a client that is not ours."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=5)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, response.headers


def body(*samples, reward="mean"):
    return {"reward": reward, "samples": [to_wire(sample) for sample in samples]}


def picture(size=(8, 8), format="PNG", mode="RGB", color="white"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format)
    return {"mime": f"image/{format.lower()}", "b64": base64.b64encode(file.getvalue()).decode()}


def with_media(*media):
    return {"reward": "mean", "samples": [{"prompt": "", "media": each} for each in media]}


# ----------------------------------------------------------------------------------------------------- what it answers


def test_health_and_info(server):
    assert ask(server, None, "/health", "GET")[:2] == (200, {"status": "ok", "version": 1})
    status, info, _ = ask(server, None, "/v1/info", "GET")
    assert status == 200
    about = {"media": ["image"], "scope": "sample", "needs": [], "range": None, "deterministic": False}
    assert info["rewards"] == {"mean": about, "buggy": about, "chatty": about}
    assert info["limits"]["max_samples"] == 20


def test_scores_as_the_protocol_says(server):
    status, answer, headers = ask(server, body(flat(1, 1, 1), flat(0, 0, 0)))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer == {"value": [1.0, 0.0], "parts": {}, "info": [{}, {}], "version": 1}


def test_no_samples_no_scores(server):
    assert ask(server, body())[1]["value"] == []


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_pictures_of_three_formats(server, format):
    assert ask(server, with_media(picture(format=format)))[1]["value"] == [1.0]


def test_information_of_any_kind_is_sent_as_json(server):
    status, answer, _ = ask(server, body(flat(1, 1, 1), reward="chatty"))
    assert status == 200
    assert answer["info"][0] == {"nan": None, "tensor": [1.0, 1.0], "object": str(object), "list": [1, "\ud800"]}


def test_videos_are_judged_frame_by_frame(server):
    frames = [flat(level, level, level).media for level in (0, 0, 1, 1)]
    video = type(noise())(media=torch.stack(frames), prompt="", fps=8.0)
    assert ask(server, body(video))[1]["value"] == [0.5]


# --------------------------------------------------------------------------------------------------- one bad sample


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ({"mime": "image/png", "b64": "###"}, "not valid base64"),
        ({"mime": "image/png", "b64": "AAAA"}, "cannot be read as PNG"),
        ({**picture(), "b64": picture()["b64"][:40]}, "cannot be read as PNG"),
        ({**picture(format="JPEG"), "mime": "image/png"}, "cannot be read as PNG"),
        ({**picture(), "mime": "image/gif"}, "a mime of image/png, image/jpeg, image/webp"),
        ({"url": "http://169.254.169.254/"}, "a picture is {mime, b64}"),
        ({"mime": "image/png", "b64": "file:///etc/passwd"}, "not valid base64"),
        ({"frames": []}, "no list of pictures"),
        ({"frames": [picture((8, 8)), picture((8, 9))]}, "not all of the same size"),
        (picture((65, 64)), "the picture is 65x64; at most 4096 pixels are taken"),
    ],
)
def test_a_picture_that_cannot_be_read_costs_its_own_sample_only(server, media, reason):
    status, answer, _ = ask(server, with_media(picture(), media, picture(color="black")))
    assert status == 200
    assert answer["value"] == [1.0, None, 0.0]
    assert reason in answer["info"][1]["error"]
    assert not answer["info"][0] and not answer["info"][2]


def test_a_small_file_with_a_large_picture_is_not_decoded(server):
    """9000 x 9000 white pixels are 243 MB as RGB and 10 kB in the file."""
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000), 1).save(file, "PNG")
    bomb = {"mime": "image/png", "b64": base64.b64encode(file.getvalue()).decode()}
    watch = Stopwatch()
    assert "9000x9000" in ask(server, with_media(bomb))[1]["info"][0]["error"]
    assert watch.stop() < 1.5


def test_many_pictures_that_are_large_together_are_refused(server):
    frames = {"frames": [picture((64, 64))] * 17}
    status, answer, _ = ask(server, with_media(frames))
    assert (status, answer["error"]) == (413, "the pictures have more than 65536 pixels together; send fewer")
    assert ask(server, with_media({"frames": [picture((64, 64))] * 16}))[0] == 200


def test_a_bug_of_the_reward_costs_its_own_sample_only(server, caplog):
    status, answer, _ = ask(server, body(*batch(4), reward="buggy"))
    assert status == 200
    assert [value is None for value in answer["value"]] == [False, False, True, False]
    assert "TypeError" in answer["info"][2]["error"] and answer["info"][2]["failed"]
    assert "Traceback" not in json.dumps(answer) and "TypeError" in caplog.text


# --------------------------------------------------------------------------------------------------- one bad request


@pytest.mark.parametrize(
    ("told", "status", "message"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"reward": NaN}', 400, "NaN is not JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"\xff", 400, "not valid JSON"),
        ([], 404, "no reward 'None'; there are: mean, buggy, chatty"),
        ({"reward": "rewards.pixel:contrast", "samples": []}, 404, "no reward 'rewards.pixel:contrast'"),
        ({"reward": "../../etc/passwd", "samples": []}, 404, "no reward"),
        ({"reward": ["mean"], "samples": []}, 404, "no reward"),
        ({"reward": "mean"}, 400, "`samples` is no list"),
        ({"reward": "mean", "samples": [1]}, 400, "sample 0 is no object"),
        ({"reward": "mean", "samples": [{"prompt": "x"}]}, 400, "sample 0 is no object with an object `media`"),
        ({"reward": "mean", "samples": [{"media": {}, "prompt": 1}]}, 400, "sample 0: `prompt`"),
        ({"reward": "mean", "samples": [{"media": {}, "group": "a"}]}, 400, "sample 0: `group`"),
        ({"reward": "mean", "samples": [{"media": {}, "meta": [1]}]}, 400, "sample 0: `meta`"),
        ({"reward": "mean", "samples": [{"media": {"fps": "a"}}]}, 400, "sample 0: `media.fps`"),
        ({"reward": "mean", "samples": [{}] * 21}, 413, "21 samples; at most 20 at once"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_json(server, told, status, message):
    found, answer, _ = ask(server, told)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]


def test_refusals_of_other_kinds_are_json_too(server):
    assert ask(server, None, "/nowhere", "GET")[:2] == (404, {"error": "Not Found"})
    assert ask(server, None, "/v1/score", "GET")[:2] == (405, {"error": "Method Not Allowed"})
    status, answer, _ = ask(server, b"{}", headers={"Content-Type": "text/plain"})
    assert (status, answer["error"]) == (415, "send application/json")


def test_a_body_that_is_too_large_is_refused_and_the_client_says_so(server):
    made = Remote(f"{server.url}/mean")
    made.load(torch.device("cpu"), torch.float32)
    scores = made.score([noise(seed, size=64) for seed in range(10)] * 10)  # 12 kB each: 16 are fine
    assert not scores.value.isnan().any()
    with Endpoint(server.url) as endpoint, pytest.raises(RemoteError) as caught:
        endpoint.post("/v1/score", {"reward": "mean", "samples": ["x" * (40 << 20)]})
    assert caught.value.status == 413 and caught.value.attempts == 1
    assert "larger than 1 MB. Mend: a smaller `request_size`" in str(caught.value)


def test_a_body_of_unknown_length_is_limited_too(server):
    def pieces():
        for _ in range(40):
            yield b" " * (1 << 16)

    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=5)
    try:
        connection.request("POST", "/v1/score", pieces(), {"Content-Type": "application/json"}, encode_chunked=False)
    except ConnectionError:
        pass
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_comes_too_slowly_is_given_up(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as line:
        line.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        start = time.monotonic()
        assert line.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert 0.9 < time.monotonic() - start < 4


def test_a_head_that_comes_too_slowly_is_given_up(server, monkeypatch):
    monkeypatch.setattr("rewards.serve._HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as line:
        start = time.monotonic()
        for _ in range(3):
            line.sendall(b"X")
            time.sleep(0.05)
        assert line.recv(1000) == b""
        assert 0.25 < time.monotonic() - start < 3


# ---------------------------------------------------------------------------------------------------- several at once


def test_requests_that_come_together_are_scored_in_one_call(server, counting):
    samples = batch(6)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda k: ask(server, body(*samples[2 * k : 2 * k + 2]))[1]["value"], range(3)))
    expected = [(sample.media * 255).round().div(255).mean().item() for sample in samples]
    assert [value for answer in answers for value in answer] == pytest.approx(expected, abs=1e-6)
    assert sum(counting.sizes) == 6 and len(counting.sizes) < 3


def test_what_comes_while_a_batch_is_scored_waits_for_the_next(server, counting):
    counting.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server, body(noise(0)))
        while not counting.sizes:
            time.sleep(0.01)
        others = [pool.submit(ask, server, body(noise(seed))) for seed in range(1, 4)]
        time.sleep(0.2)
        assert counting.sizes == [1]
        counting.gate.set()
        assert all(call.result()[0] == 200 for call in (first, *others))
    assert counting.sizes == [1, 3]


def test_a_lone_request_waits_no_longer_than_it_is_told_to(server):
    ask(server, body(noise(0)))
    start = time.monotonic()
    ask(server, body(noise(0)))
    assert 0.03 <= time.monotonic() - start < 2


def test_no_more_samples_than_allowed_are_scored_together(server, counting):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: ask(server, body(*batch(3))), range(3)))
    assert sum(counting.sizes) == 9 and max(counting.sizes) <= 8
    counting.sizes.clear()
    assert len(ask(server, body(*batch(12)))[1]["value"]) == 12  # one request is not divided
    assert counting.sizes == [12]


def test_a_reward_that_takes_too_long_is_a_504_and_others_are_still_answered(server, counting):
    counting.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(ask, server, body(noise(0)))
        while not counting.sizes:
            time.sleep(0.01)
        late = pool.submit(ask, server, body(noise(1)))
        assert ask(server, None, "/health", "GET")[0] == 200  # scoring does not block the server
        assert stuck.result()[:2] == (504, {"error": "the samples were not scored within 1 s"})
        assert late.result()[0] == 504
    counting.gate.set()
    assert ask(server, body(noise(2)))[0] == 200
    assert counting.sizes == [1, 1]  # what nobody waits for any more is not scored


def test_too_many_requests_are_told_to_come_back(server, counting):
    counting.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(ask, server, body(noise(seed))) for seed in range(9)]
        while sum(call.done() for call in calls) < 3:
            time.sleep(0.01)
        refused = [call.result() for call in calls if call.done()]
        counting.gate.set()
        assert [status for status, _, _ in refused] == [429, 429, 429]
        assert refused[0][2]["retry-after"] == "1"
        assert sorted(call.result()[0] for call in calls) == [200] * 6 + [429] * 3


class Gated:
    """Scores by group, when told to."""

    scope = "group"

    def __init__(self):
        self.gate, self.calls = threading.Event(), []
        self.gate.set()

    def score(self, samples):
        self.calls.append([sample.group for sample in samples])
        assert self.gate.wait(10)
        return [float(sum(other.group == sample.group for other in samples)) for sample in samples]


def test_groups_of_two_clients_stay_apart_when_they_are_scored_together():
    gated = Gated()
    with (
        RewardServer({"use": gated, "name": "g"}, port=0, device="cpu") as server,
        ThreadPoolExecutor(3) as pool,
    ):
        gated.gate.clear()
        calls = [pool.submit(ask, server, body(noise(0), reward="g"))]
        wait_for(lambda: len(gated.calls) == 2)  # the first was the warm-up
        calls += [pool.submit(ask, server, body(*batch(count, group_size=count), reward="g")) for count in (2, 3)]
        wait_for(lambda: server._batchers["g"]._jobs.qsize() == 2)
        gated.gate.set()
        assert [call.result()[1]["value"] for call in calls] == [[1.0], [2.0] * 2, [3.0] * 3]
    assert sorted(map(gated.calls[-1].count, set(gated.calls[-1]))) == [2, 3]


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def decoded(monkeypatch):
    """Weak references to the pictures that the server has decoded."""
    from rewards import serve

    seen, decode = [], serve.from_pil

    def spy(image):
        picture = decode(image)
        seen.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(serve, "from_pil", spy)
    return seen


def test_pictures_of_requests_that_were_given_up_are_let_go(server, counting, decoded):
    counting.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(ask, server, body(noise(0)))
        wait_for(lambda: counting.sizes)
        late = pool.submit(ask, server, body(noise(1), noise(2)))
        assert stuck.result()[0] == late.result()[0] == 504
    assert server._batchers["mean"]._jobs.qsize() == 1 and len(decoded) == 3
    wait_for(lambda: gc.collect() is not None and [ref() is None for ref in decoded] == [False, True, True])
    counting.gate.set()
    wait_for(lambda: gc.collect() is not None and all(ref() is None for ref in decoded))
    wait_for(lambda: server._room._left == 16 * 64 * 64)


def test_pixels_are_limited_over_all_requests_and_one_more_waits_for_room(server, counting, decoded):
    most = {"frames": [picture((64, 64))] * 16}
    counting.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, server, with_media(most)) for _ in range(3)]
        wait_for(lambda: counting.sizes)
        time.sleep(0.2)
        assert len(decoded) == 16 and ask(server, None, "/health", "GET")[0] == 200
        counting.gate.set()
        assert [call.result()[1]["value"] for call in calls] == [[1.0]] * 3
    assert len(decoded) == 48


def test_a_request_that_finds_no_room_in_time_is_a_504_and_unreadable_pictures_cost_no_room(server, counting):
    whole = server._room._left
    damaged = {**picture((64, 64)), "b64": picture((64, 64))["b64"][:60]}
    assert ask(server, with_media(damaged))[1]["value"] == [None]
    assert ask(server, with_media({"frames": [picture((64, 64))] * 16 + [picture((64, 64))]}))[0] == 413
    assert server._room._left == whole
    counting.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask, server, with_media({"frames": [picture((64, 64))] * 16})) for _ in range(2)]
        assert [call.result()[0] for call in calls] == [504, 504]
    counting.gate.set()
    wait_for(lambda: server._room._left == whole)


def test_pictures_that_take_too_long_to_decode_give_their_room_back(server, monkeypatch):
    whole, decode = server._room._left, from_pil
    monkeypatch.setattr("rewards.serve.from_pil", lambda image: time.sleep(1.3) or decode(image))
    assert ask(server, with_media(picture()))[0] == 504
    wait_for(lambda: server._room._left == whole)


def test_clients_that_hang_up_or_talk_nonsense_do_no_harm(server):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    for data in (
        b"",
        b"\x16\x03\x01",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
        b"GET / HTTP/9\r\n\r\n",
    ):
        with socket.create_connection(address) as line:
            line.sendall(data)
    assert ask(server, body(noise(0)))[0] == 200


# ------------------------------------------------------------------------------------------------------- who may ask


@pytest.fixture(scope="module")
def guarded():
    with RewardServer("pixel.contrast", port=0, device="cpu", token=TOKEN) as made:
        yield made


@pytest.mark.parametrize(("path", "method"), [("/v1/score", "POST"), ("/v1/info", "GET")])
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"]
)
def test_without_the_token_there_is_nothing(guarded, path, method, given):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    status, answer, told = ask(guarded, body(noise(0)), path, method, headers)
    assert (status, list(answer), told["www-authenticate"]) == (401, ["error"], "Bearer")
    assert TOKEN not in json.dumps(answer)


def test_with_the_token_there_are_scores(guarded, monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", TOKEN)
    entry = {"use": f"{guarded.url}/pixel.contrast", "token": "env:SCORES_TOKEN"}
    with RewardHub(entry) as hub:
        assert not hub(batch(3)).total.isnan().any()
    assert ask(guarded, None, "/health", "GET")[0] == 200


def test_a_wrong_token_is_said_when_the_client_is_loaded(guarded, monkeypatch):
    with pytest.raises(RemoteError, match="HTTP 401 .*needs a token. Mend: `token: env:NAME`"):
        RewardHub(f"{guarded.url}/pixel.contrast").warmup()
    monkeypatch.setenv("SCORES_TOKEN", "another-token")
    with pytest.raises(RemoteError, match="HTTP 401 .*wrong token"):
        RewardHub({"use": f"{guarded.url}/pixel.contrast", "token": "env:SCORES_TOKEN"}).warmup()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "gpu-box"])
def test_other_machines_may_not_ask_without_a_good_token(host):
    with pytest.raises(RewardError, match="without a token.*secrets.token_urlsafe"):
        RewardServer("pixel.contrast", host=host)
    with pytest.raises(RewardError, match="has 5 characters") as caught:
        RewardServer("pixel.contrast", host=host, token="short")
    assert "short" not in str(caught.value)
    RewardServer("pixel.contrast", host=host, token=TOKEN)  # nothing is opened yet


def test_the_server_of_another_host_answers_there():
    with RewardServer("pixel.contrast", host="::1", port=0, device="cpu") as made:
        assert made.url.startswith("http://[::1]:")
        with RewardHub(f"{made.url}/pixel.contrast") as hub:
            assert not hub(batch(2)).total.isnan().any()


# ------------------------------------------------------------------------------------------------------ start and stop


def test_a_port_that_is_taken_is_said(guarded):
    port = int(guarded.url.rpartition(":")[2])
    with pytest.raises(RewardError, match="cannot serve at .*Mend: another port"):
        RewardServer("pixel.contrast", port=port).start()


def test_a_reward_that_cannot_start_is_said_before_the_server_answers():
    def broken(samples):
        raise ValueError("no weights")

    port = closed_port()
    with pytest.raises(RewardError, match="no weights"):
        RewardServer(broken, port=port, device="cpu").start()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_name_that_fits_into_no_address_is_refused():
    with pytest.raises(RewardError, match="give it a plain `name:`"):
        RewardServer({"use": "pixel.contrast", "name": "a b"})
    with pytest.raises(RewardError, match="max_samples is 0"):
        RewardServer("pixel.contrast", max_samples=0)


def test_closing_lets_the_weights_go_and_the_port_too():
    class Heavy:
        loaded = False

        def load(self, device, dtype):
            self.loaded = True

        def unload(self):
            self.loaded = False

        def score(self, samples):
            return [float(self.loaded) for _ in samples]

    heavy = Heavy()
    server = RewardServer({"use": heavy, "name": "heavy"}, port=0, device="cpu")
    assert not heavy.loaded
    with server:
        assert heavy.loaded
        assert ask(server, body(noise(0), reward="heavy"))[1]["value"] == [1.0]
    assert not heavy.loaded
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    server.close()


def test_a_reward_that_hangs_does_not_keep_the_server_alive(monkeypatch, caplog):
    monkeypatch.setattr("rewards.serve._CLOSE_SECONDS", 0.3)
    hung = Counting()
    server = RewardServer([{"use": hung, "name": "mean"}, "pixel.contrast"], port=0, device="cpu").start()
    hung.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = len(hung.sizes)
        pool.submit(ask, server, body(noise(0)))
        wait_for(lambda: len(hung.sizes) > asked)
        start = time.monotonic()
        closing = threading.Thread(target=server.close, daemon=True)
        closing.start()
        closing.join(4)
        ended, seconds = not closing.is_alive(), time.monotonic() - start
        hung.gate.set()
    assert ended and seconds < 3
    assert "reward 'mean' still scores; it is left behind" in caplog.text


def test_a_process_of_its_own_serves_until_it_is_interrupted(tmp_path):
    code = "from rewards.serve import serve; serve('pixel.contrast', port=0, device='cpu', token='env:SCORES_TOKEN')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "SCORES_TOKEN": TOKEN}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("serving http://127.0.0.1:")
        url = said.split()[1]
        samples = [sample for sample in batch(5)]
        with Endpoint(url.rpartition("/")[0], token=TOKEN) as endpoint:
            answer = endpoint.post("/v1/score", body(*samples, reward="pixel.contrast"))
        assert len(answer["value"]) == 5
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in err and TOKEN not in out + err
    finally:
        process.kill()


def test_serve_takes_the_options_of_the_server():
    with pytest.raises(RewardError, match="without a token"):
        serve("pixel.contrast", host="0.0.0.0")
