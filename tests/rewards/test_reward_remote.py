"""Rewards by address: the scores of a real server are the local ones, and a bad server costs its own samples only."""

import math
import threading
import time
import warnings

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, Sample, Scores, build, declare, traits_of
from rewards.http import Endpoint, RemoteError
from rewards.media import to_pil
from rewards.remote import Remote, to_wire
from tests.rewards.faults import FaultServer, answer, closed_port, hang, reply, status, without_answer
from tests.rewards.makers import batch, noise
from tests.rewards.stopwatch import Stopwatch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from rewards.serve import RewardServer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*No verdict there.*")]

SERVERS = []


def tiny(folder):
    """For the conformance tests: a server of a real reward; it lives as long as the tests."""
    SERVERS.append(RewardServer("pixel.contrast", port=0, device="cpu").start())
    return {"url": f"{SERVERS[-1].url}/pixel.contrast"}


def exact(sample):
    """The sample with the values that 8 bits can hold."""
    media = (sample.media * 255).round() / 255
    return Sample(media=media, prompt=sample.prompt, group=sample.group, fps=sample.fps, meta=sample.meta)


# ------------------------------------------------------------------------------------------------- rewards to be served


@declare(media={"image", "video"}, deterministic=True, range=(0.0, 2.0), needs=("text",))
def everything(samples):
    """A number that changes with every pixel and every field."""
    value = []
    for sample in samples:
        weights = torch.linspace(0.5, 1, sample.media.numel()).reshape(sample.media.shape)
        fields = f"{sample.prompt}{sample.fps}{sorted(sample.meta.items())}"
        value.append((sample.media.double() * weights).mean() + sum(map(ord, fields)) % 97 / 100)
    parts = {"frames": torch.tensor([float(len(s.media)) for s in samples])}
    info = [{"read": sample.meta["text"], "seen": list(sample.media.shape)} for sample in samples]
    return Scores(value=torch.stack(value).float(), parts=parts, info=info)


class RankInGroup:
    """How many of its group are darker, as a share."""

    scope = "group"
    media = frozenset({"image"})

    def __init__(self):
        self.calls = []

    def score(self, samples):
        self.calls.append([sample.group for sample in samples])
        mean = [sample.media.mean().item() for sample in samples]
        return [
            sum(other < mine for other, rival in zip(mean, samples, strict=True) if rival.group == sample.group) / 10
            for mine, sample in zip(mean, samples, strict=True)
        ]


@declare()
def picky(samples):
    """Raises, and returns None, for some prompts."""
    if any("raise" in sample.prompt for sample in samples):
        raise ValueError("no face in /home/someone/secret/weights.pt")
    return [None if "none" in sample.prompt else sample.media.mean().item() for sample in samples]


@declare(needs=("text",), media={"video"}, range=(-1.0, 3.0), deterministic=True)
def about(samples):
    """To be asked about."""
    return [0.0 for _ in samples]


@pytest.fixture(scope="module")
def rank():
    return RankInGroup()


@pytest.fixture(scope="module")
def server(rank):
    entries = [everything, picky, about, {"use": rank, "name": "rank"}, "pixel.contrast", "pixel.jpeg_size"]
    with RewardServer(entries, port=0, device="cpu") as made:
        yield made


def remote(url, **options):
    made = Remote(url, **options)
    made.load(torch.device("cpu"), torch.float32)
    return made


# ------------------------------------------------------------------------------------------------------ the good case


def test_images_and_videos_score_exactly_as_they_do_here(server):
    samples = [
        exact(noise(seed, size=24 + seed, frames=seed % 3 or None, fps=8.0 if seed % 3 else None, group=seed // 2,
                    meta={"text": f"⭐ {seed}", "boxes": [1, 2.5, None, True], "more": {"a": "b"}}))
        for seed in range(7)
    ]  # fmt: skip
    with RewardHub(everything) as here, RewardHub({"use": f"{server.url}/everything", "request_size": 3}) as there:
        expected, got = here(samples), there(samples)
    assert torch.equal(got.scores["everything"], expected.scores["everything"])
    assert torch.equal(got.parts["everything"]["frames"], expected.parts["everything"]["frames"])
    assert got.info == expected.info
    assert len(set(expected.total.tolist())) == 7


@pytest.mark.parametrize("name", ["pixel.contrast", "pixel.jpeg_size"])
def test_a_reward_for_images_judges_the_frames_that_the_config_here_asks_for(server, name):
    samples = [exact(noise(seed, frames=9)) for seed in range(3)] + [exact(noise(4))]
    with (
        RewardHub({"use": name, "frames": 2}, device="cpu") as here,
        RewardHub({"use": f"{server.url}/{name}", "frames": 2}) as there,
    ):
        assert torch.equal(there(samples).total, here(samples).total)


def test_groups_are_judged_whole_and_are_not_mixed(server, rank):
    samples = [exact(sample) for sample in batch(9, group_size=3)]
    samples = [samples[row] for row in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    expected = RankInGroup().score(samples)
    with RewardHub({"use": f"{server.url}/rank", "request_size": 4}) as there:
        rank.calls.clear()
        torch.testing.assert_close(there(samples).total, torch.tensor(expected))
    assert all(len(call) % 3 == 0 for call in rank.calls)
    assert sum(map(len, rank.calls)) == 9


def test_no_verdict_there_is_none_here_with_its_reason(server):
    samples = [noise(0), noise(1, prompt="none"), noise(2, prompt="raise"), noise(3)]
    with RewardHub(f"{server.url}/picky") as there:
        result = there(samples)
    assert result.total.isnan().tolist() == [False, True, True, False]
    assert result.info[1]["picky"]["error"] == "the reward returned NaN, None or an infinity"
    assert result.info[2]["picky"]["error"] == "ValueError: no face in <path>"


def test_what_the_server_says_of_the_reward_holds_here(server):
    reward = Remote(f"{server.url}/about")
    assert traits_of(reward).media == {"image", "video"}  # not known yet, and nothing has been connected
    reward.load(torch.device("cpu"), torch.float32)
    traits = traits_of(reward)
    assert (traits.media, traits.needs, traits.range) == ({"video"}, ("text",), (-1.0, 3.0))
    assert traits.deterministic and traits.scope == "sample"
    reward.unload()
    assert traits_of(remote(f"{server.url}/rank")).scope == "group"


def test_the_hub_uses_what_the_server_says(server):
    with RewardHub(f"{server.url}/about") as there:
        there.warmup()
        with pytest.warns(UserWarning, match="meta has no 'text'"):
            lacking = there([noise(0, frames=2)])
        assert lacking.info[0]["about"]["error"].startswith("meta has no 'text'")
        with pytest.raises(RewardContractError, match="'about' judges videos"):
            there([noise(0, meta={"text": "x"})])


def test_every_form_of_the_config_names_it_after_the_reward(server):
    url = f"{server.url}/picky"
    for entries in (url, [url], {url: 2.0}, {"use": url}, {"use": "remote", "url": url}):
        assert list(RewardHub(entries).rules) == ["picky"]
    assert list(RewardHub({"use": url, "name": "other"}).rules) == ["other"]
    assert isinstance(build(url, {"timeout": 3}), Remote)


def test_a_remote_reward_does_not_wait_for_the_rewards_on_this_machine(server):
    def slow(samples):
        time.sleep(0.4)
        return [0.0 for _ in samples]

    with RewardHub([slow, {"use": f"{server.url}/picky"}], device="cpu") as hub:
        hub.warmup()
        ticket = hub.submit([noise(0)])
        ticket.futures["picky"].result(timeout=0.3)
        assert not ticket.futures["slow"].done()
        hub.result(ticket)


# ------------------------------------------------------------------------------------------------------- a bad server

INFO = {
    "version": 1,
    "rewards": {"r": {"media": ["image"], "scope": "sample", "needs": [], "range": None, "deterministic": False}},
    "limits": {"max_samples": 256},
}


def good(request):
    """What a server would say: the number in each prompt."""
    if request.path == "/v1/info":
        return INFO
    return {"value": [float(sample["prompt"].split()[1]) for sample in request.json()["samples"]], "version": 1}


def unless(bad, fault):
    """A good server, but the request with the sample `bad` meets a fault."""

    def choose(exchange):
        hit = exchange.request.method == "POST" and bad in [s["prompt"] for s in exchange.request.json()["samples"]]
        (fault if hit else answer(good))(exchange)

    return choose


@pytest.mark.parametrize("name", without_answer())
def test_a_fault_costs_its_own_request_only_and_ends_before_the_deadline(name):
    with FaultServer(unless("prompt 3", without_answer()[name])) as bad:
        made = remote(f"{bad.url}/r", request_size=2, deadline=1.2, retries=50, max_reply_mb=1)
        watch = Stopwatch()
        scores = made.score(batch(8))
        seconds = watch.stop()
        made.unload()
    assert seconds < 1.2 + 1.5, "fifty retries would take longer, also on a machine that does something else besides"
    assert scores.value.isnan().tolist() == [False, False, True, True, False, False, False, False]
    assert scores.value[[0, 1, 4, 5, 6, 7]].tolist() == [0, 1, 4, 5, 6, 7]
    for row, info in enumerate(scores.info):
        assert ("error" in info) == (row in (2, 3)) == info.get("failed", False)
    assert f"{bad.url}/v1/score: " in scores.info[2]["error"]


def test_the_other_samples_keep_their_advantages():
    def advantages(value):
        return value - value.nanmean()

    clean = torch.tensor([0.0, 1, 4, 5, 6, 7])
    with FaultServer(unless("prompt 3", status(404))) as bad:
        value = remote(f"{bad.url}/r", request_size=2).score(batch(8)).value
    torch.testing.assert_close(advantages(value)[[0, 1, 4, 5, 6, 7]], advantages(clean))


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"value": [0.5]}, "`value` is 1 values, expected 2"),
        ({"value": [0.5, 0.5, 0.5]}, "`value` is 3 values, expected 2"),
        ({"value": 0.5}, "`value` is a float"),
        ({"value": [0.5, "0.5"]}, "'0.5' in it"),
        ({"value": [0.5, True]}, "'True' in it"),
        ({"value": [0.5, 10**400]}, "too large"),
        ({"values": [0.5, 0.5]}, "`value` is a NoneType"),
        ([0.5, 0.5], "it is a list"),
        ({"value": [0.5, 0.5], "parts": {"x": [1]}}, "`parts.x` is 1 values"),
        ({"value": [0.5, 0.5], "parts": [1]}, "`parts` is no object"),
        ({"value": [0.5, 0.5], "info": [{}]}, "`info` is no list of 2 objects"),
        ({"value": [0.5, 0.5], "info": ["a", "b"]}, "`info` is no list of 2 objects"),
    ],
)
def test_an_answer_that_is_no_list_of_scores_costs_its_own_request_only(told, reason):
    with FaultServer(unless("prompt 3", reply(told))) as bad:
        scores = remote(f"{bad.url}/r", request_size=2).score(batch(6))
    assert scores.value.isnan().tolist() == [False, False, True, True, False, False]
    assert reason in scores.info[2]["error"] == scores.info[3]["error"]


def test_null_and_large_numbers_in_an_answer():
    with FaultServer(unless("prompt 0", reply({"value": [None, 1e300]}))) as bad:
        with RewardHub({"use": f"{bad.url}/r"}) as hub:
            assert hub(batch(2)).total.isnan().all()  # fp32 has no 1e300: an infinity is no verdict


def test_more_requests_than_slots_share_one_deadline():
    with FaultServer(unless("prompt 0", without_answer()["hang"])) as bad:
        made = remote(f"{bad.url}/r", request_size=1, max_concurrency=1, deadline=0.5)
        watch = Stopwatch()
        scores = made.score(batch(6))
        assert watch.stop() < 0.5 + 1.5  # six deadlines would be 3 s
        assert scores.value.isnan().all()
        assert all(info["failed"] and info["error"] for info in scores.info)


@pytest.mark.parametrize("how", ["frames", "batches", "both", "one by one"])
def test_one_deadline_holds_for_a_call_of_the_hub(how):
    options = {"batches": {"batch_size": 2}, "both": {"batch_size": 2}}.get(how, {})
    frames = 4 if how in ("frames", "both") else None
    samples = [noise(0, frames=frames, group=seed) for seed in range(8)]
    with FaultServer(unless("prompt 0", hang())) as bad:
        url = f"{bad.url}/r"
        entry = (
            {"use": Fragile(url, deadline=0.5), "name": "r"} if how == "one by one" else {"use": url, "deadline": 0.5}
        )
        with RewardHub(entry | options) as hub:
            hub.warmup([noise(1)])
            watch = Stopwatch()
            result = hub(samples)
            assert watch.stop() < 0.5 + 1.0  # four deadlines would be 2 s
    assert result.total.isnan().all()
    assert all(info["r"]["failed"] and info["r"]["error"] for info in result.info)


class Fragile(Remote):
    """Asks the server, and then does not bear batches."""

    def score(self, samples):
        scores = super().score(samples)
        if len(samples) > 1:
            raise ValueError("too many")
        return scores


def test_the_next_call_of_the_hub_has_a_deadline_of_its_own():
    with FaultServer(unless("prompt 0", hang())) as bad, RewardHub({"use": f"{bad.url}/r", "deadline": 1.2}) as hub:
        assert hub([noise(0)]).total.isnan().all()
        assert hub([noise(1)]).total.tolist() == [1.0]


def test_a_picture_that_is_slow_to_read_holds_up_nobody_and_what_waits_behind_it_is_given_up(monkeypatch):
    reads, disk = [], threading.Event()

    def stalled(*_):
        reads.append(1)
        disk.wait(5)
        return torch.zeros(3, 4, 4)

    monkeypatch.setattr("rewards.remote.folder.reference", stalled)
    samples = [noise(seed, meta={"reference": torch.zeros(3, 4, 4)}) for seed in range(4)]
    with FaultServer(answer(good)) as other:
        made = remote(f"{other.url}/r", request_size=1, max_concurrency=1, deadline=0.3)
        watch = Stopwatch()
        scores = made.score(samples)
        assert watch.stop() < 0.3 + 0.7  # four deadlines would be 1.2 s
        assert [info["error"] for info in scores.info] == ["no answer before the deadline of 0.3 s"] * 4
        disk.set()
        made._pool.shutdown(wait=True)
        assert reads == [1]
        assert [r.method for r in other.requests] == ["GET"]


@pytest.mark.parametrize("bad", ["damaged.png", "x" * 5000, "~nobody-of-this-name/a.png"])
def test_a_reference_that_cannot_be_sent_costs_its_own_sample_only(tmp_path, bad):
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    given = str(tmp_path / bad) if bad == "damaged.png" else bad
    samples = [noise(seed, size=16, meta={"reference": noise(9, 16).media}) for seed in range(4)]
    samples[1] = noise(1, size=16, meta={"reference": given})
    asked = []
    with RewardServer(["similarity.l1"], port=0, device="cpu") as server:
        batcher = server._batchers["similarity.l1"]
        submit = batcher.submit
        batcher.submit = lambda jobs: asked.append(len(jobs)) or submit(jobs)
        with RewardHub(f"{server.url}/similarity.l1") as hub:
            result = hub(samples)
    assert result.total.isnan().tolist() == [False, True, False, False]
    assert 'meta["reference"]' in result.info[1]["similarity.l1"]["error"]
    assert asked == [3 if bad == "damaged.png" else 4]


def test_a_reference_that_cannot_be_sent_costs_its_whole_group_where_groups_are_compared(tmp_path, server, rank):
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    samples = batch(4)
    samples[1] = noise(1, group=0, meta={"reference": str(tmp_path / "damaged.png")})
    rank.calls.clear()
    scores = remote(f"{server.url}/rank").score(samples)
    assert scores.value.isnan().tolist() == [True, True, False, False]
    assert "damaged.png" in scores.info[0]["error"] == scores.info[1]["error"]
    assert [len(call) for call in rank.calls] == [2]


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"error": ["x"]}, {"error": '["x"]'}),
        ({"error": {"a": "\x1b"}, "failed": True}, {"error": '{"a": "\\u001b"}', "failed": True}),
        ({"error": "a\x1b[31m\n\ud800"}, {"error": "a [31m  "}),
        ({"error": "x" * 500}, {"error": "x" * 397 + "..."}),
        ({"read": ["a\nb", {"c": 1}]}, {"read": ["a\nb", {"c": 1}]}),
    ],
)
def test_what_a_server_says_of_a_sample_is_made_fit_for_a_log(told, kept):
    with FaultServer(unless("prompt 0", reply({"value": [None], "info": [told]}))) as bad:
        assert remote(f"{bad.url}/r").score([noise(0)]).info == [{"error": ANY} | kept]


ANY = "the reward returned NaN, None or an infinity"


@pytest.mark.parametrize("large", [lambda: nested(600), lambda: nested(17), lambda: "x" * 70_000, lambda: [0] * 40_000])
@pytest.mark.parametrize("key", ["error", "read"])
def test_information_without_end_is_left_out_and_the_score_is_kept(large, key):
    told = {"value": [0.5], "info": [{key: large(), "failed": 1}]}
    with FaultServer(unless("prompt 0", reply(told))) as bad:
        scores = remote(f"{bad.url}/r").score([noise(0)])
    assert scores.value.tolist() == [0.5]
    info = scores.info[0]
    assert "nested more than 16 deep" in info.pop("left_out") and info.pop("failed") is True
    assert list(info) == (["error"] if key == "error" else []) and len(info.get("error", "")) <= 400


def nested(levels):
    return [nested(levels - 1)] if levels else 0


def test_requests_go_out_at_the_same_time_but_not_all_at_once():
    def slow(exchange):
        if exchange.request.method == "POST":
            exchange.wait(0.05)
        answer(good)(exchange)

    with FaultServer(slow) as other:
        made = remote(f"{other.url}/r", request_size=2, max_concurrency=3)
        assert made.score(batch(24)).value.tolist() == list(range(24))
        assert other.most_running == 3
        assert [len(r.json()["samples"]) for r in other.requests if r.method == "POST"] == [2] * 12


def test_the_servers_limit_of_samples_is_kept():
    info = {**INFO, "limits": {"max_samples": 3}}
    with FaultServer(answer(lambda request: info if request.method == "GET" else good(request))) as other:
        remote(f"{other.url}/r", request_size=16).score(batch(7))
        assert sorted(len(r.json()["samples"]) for r in other.requests if r.method == "POST") == [1, 3, 3]


def test_copies_of_a_server_share_the_work_and_stand_in_for_each_other():
    with FaultServer(answer(good)) as one, FaultServer(unless("prompt 3", status(503))) as two:
        made = remote([f"{one.url}/r", f"{two.url}/r"], request_size=1)
        assert made.score(batch(12)).value.tolist() == list(range(12))
        asked = [[request.method for request in server.requests].count("POST") for server in (one, two)]
        assert min(asked) >= 1, "both were asked, though not how often"
    with pytest.raises(RewardError, match="name different rewards: a, b"):
        Remote(["http://127.0.0.1:1/a", "http://127.0.0.1:1/b"])


# ------------------------------------------------------------------------------------------------------------- policies


def test_on_error_raise_stops_the_run_and_names_server_and_samples():
    with FaultServer(unless("prompt 3", status(404))) as bad:
        with RewardHub({"use": f"{bad.url}/r", "request_size": 2, "on_error": "raise"}) as hub:
            assert hub(batch(2)).total.tolist() == [0, 1]
            with pytest.raises(RewardError, match=r"'r' failed on samples 2, 3 .*HTTP 404.*`on_error: nan`") as caught:
                hub(batch(8))
    assert bad.url in str(caught.value)
    assert [r.method for r in bad.requests].count("POST") == 5  # and nothing was sent again sample by sample


def test_on_error_raise_holds_for_frames_of_videos_too():
    with FaultServer(unless("prompt 0", status(404))) as bad:
        with RewardHub({"use": f"{bad.url}/r", "on_error": "raise"}) as hub:
            with pytest.raises(RewardError, match="HTTP 404"):
                hub([noise(0, frames=4)])


def test_on_error_nan_warns_once_and_goes_on():
    with FaultServer(unless("prompt 0", status(404))) as bad:
        with RewardHub({"use": f"{bad.url}/r", "request_size": 2}, max_nan_frac=None) as hub:
            with pytest.warns(UserWarning, match="HTTP 404.*No verdict there"):
                first = hub(batch(4))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = hub(batch(4))
    for result in (first, again):
        assert result.total.isnan().tolist() == [True, True, False, False]
        assert "HTTP 404" in result.info[0]["r"]["error"]


def test_a_server_that_is_gone_stops_the_run_after_three_calls():
    with FaultServer(reply(INFO), status(404)) as bad, RewardHub({"use": f"{bad.url}/r"}) as hub:
        hub(batch(2))
        hub(batch(2))
        with pytest.raises(RewardError, match="no verdict on 100% of the samples.*HTTP 404"):
            hub(batch(2))


def test_a_server_that_cannot_be_reached_is_said_before_the_first_iteration():
    hub = RewardHub({"use": f"http://127.0.0.1:{closed_port()}/pickscore", "retries": 1})
    with pytest.raises(RemoteError, match="cannot connect") as caught:
        hub.warmup()
    assert caught.value.attempts == 2


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({**INFO, "version": 2}, "speaks version 2 of the messages, this client 1"),
        ({"status": "ok"}, "not what a reward server says: KeyError: 'version'"),
        ([], "not what a reward server says"),
        ({**INFO, "rewards": {"r": {**INFO["rewards"]["r"], "media": ["sound"]}}}, "not what a reward server says"),
        ({**INFO, "rewards": {"r": {**INFO["rewards"]["r"], "range": [1]}}}, "not what a reward server says"),
        ({**INFO, "rewards": {}}, "serves no reward 'r'"),
    ],
)
def test_a_server_of_another_kind_is_refused_when_it_is_loaded(told, message):
    with FaultServer(reply(told)) as other, pytest.raises(RewardError, match=message):
        remote(f"{other.url}/r")


def test_an_unknown_reward_names_those_that_there_are(server):
    with pytest.raises(
        RewardError, match=r"serves no reward 'pickyy' \(did you mean 'picky'\?\). It serves: everything"
    ):
        remote(f"{server.url}/pickyy")


# -------------------------------------------------------------------------------------------------------------- options


def test_a_token_comes_from_the_environment_and_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", "sesame-0123456789")
    with FaultServer(unless("prompt 0", status(403, message="sesame-0123456789 is wrong"))) as bad:
        made = remote(f"{bad.url}/r", token="env:SCORES_TOKEN")
        scores = made.score(batch(2))
        assert {r.headers["authorization"] for r in bad.requests} == {"Bearer sesame-0123456789"}
    assert "*** is wrong" in scores.info[0]["error"]
    assert "sesame" not in f"{scores.info} {made!r} {vars(made)}"


def test_a_token_in_a_config_is_refused_and_not_repeated():
    with pytest.raises(RewardError, match="token: env:NAME") as caught:
        Remote("http://127.0.0.1:1/r", token="sesame")
    assert "sesame" not in str(caught.value)


def test_a_token_that_is_not_set_is_said():
    with pytest.raises(RewardError, match="'NOT_SET' holds no token"):
        remote("http://127.0.0.1:1/r", token="env:NOT_SET")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "pickscore"])
def test_an_address_without_a_name_is_refused(url):
    with pytest.raises(RewardError, match="names no reward; expected `use: http://host:port/name`"):
        Remote(url)


def test_without_an_address_it_says_what_it_needs():
    with pytest.raises(RewardError, match="needs an address: `use: http"):
        remote(None)
    with pytest.raises(RewardError, match="request_size"):
        Remote("http://127.0.0.1:1/r", request_size=0)
    with pytest.raises(RewardError, match=r"no option 'deadlines' \(did you mean 'deadline'"):
        build("http://127.0.0.1:1/r", {"deadlines": 3})


def test_it_has_to_be_loaded():
    with pytest.raises(RewardError, match="'r' is not loaded"):
        Remote("http://127.0.0.1:1/r").score(batch(1))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"shape": torch.zeros(3)}, r"sample 1: meta\['shape'\] is a Tensor.*tolist"),
        ({"a": {"b": [1, math.nan]}}, r"meta\['a'\]\['b'\]\[1\] is nan"),
        ({"a": {1: 2}}, r"meta\['a'\] has the key 1"),
        ({"a": b"x"}, r"meta\['a'\] is a bytes"),
    ],
)
def test_metadata_that_json_cannot_hold_is_a_clear_error_before_anything_is_sent(meta, message):
    with FaultServer(answer(good)) as other:
        made = remote(f"{other.url}/r")
        with pytest.raises(RewardContractError, match=message):
            made.score([noise(0), noise(1, meta=meta)])
        assert [r.method for r in other.requests] == ["GET"]


def test_unloading_and_loading_again(server):
    made = remote(f"{server.url}/picky")
    first = made.score([noise(0)]).value
    made.unload()
    with pytest.raises(RewardError, match="not loaded"):
        made.score([noise(0)])
    made.load(torch.device("cpu"), torch.float32)
    assert torch.equal(made.score([noise(0)]).value, first)
    made.unload()


def test_pictures_in_the_metadata_are_sent_and_paths_are_not_read_by_the_server(tmp_path):
    image, other = noise(0, 16).media, noise(1, 16).media
    to_pil(other).save(tmp_path / "other.png")
    samples = [
        Sample(media=image, meta={"reference": other}),
        Sample(media=image, meta={"reference": str(tmp_path / "other.png")}),
        Sample(media=image, meta={"reference": "no such file"}),
    ]
    with RewardServer(["similarity.l1"], port=0) as server, RewardHub(f"{server.url}/similarity.l1") as hub:
        result = hub(samples)
        assert result.total[0] == result.total[1] == pytest.approx(-(image - other).abs().mean().item(), abs=3e-3)
        assert result.total[2].isnan()
        asked = to_wire(samples[0])
        asked["meta"] = {"reference": str(tmp_path / "other.png")}
        told = Endpoint(server.url).post("/v1/score", {"reward": "similarity.l1", "samples": [asked]})
    assert told["value"] == [None] and "a server reads none that a client names" in told["info"][0]["error"]
