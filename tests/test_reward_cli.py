"""`flowrl reward ...` as a user types it."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowrl.cli import app
from flowrl.shapes.preferences import write_preferences
from rewards import available
from rewards.media import to_pil
from tests.rewards.makers import noise, text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefs")
    write_preferences(folder, 24, seed=0)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr("flowrl.reward_cli.console.width", 400)


def run(*words, ok=True):
    result = CliRunner().invoke(app, ["reward", *map(str, words)])
    assert (result.exit_code == 0) == ok, result.output or result.exception
    return result


def test_the_list_has_every_reward_and_whether_it_runs_here():
    said = run("list").output
    assert all(name in said for name in available())
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in said
    found = {each["name"]: each for each in json.loads(run("list", "--json").output)}
    assert set(found) == set(available())
    assert found["pixel.contrast"]["runs"] and not found["hpsv3"]["runs"]
    assert found["pixel.contrast"]["range"] == [0.0, 0.5] and found["pixel.contrast"]["differentiable"]
    runnable = {each["name"] for each in json.loads(run("list", "--runnable", "--json").output)}
    assert runnable == {name for name, each in found.items() if each["runs"]}


def test_info_says_options_published_figures_and_what_is_missing():
    said = run("info", "hpsv2").output
    assert "version = '2.1'" in said and "hf download xswu/HPSv2" in said and "HPDv2" in said
    assert "runs here" in run("info", "ocr").output
    assert "missing" in run("info", "judge").output
    given = run("info", "{use: judge, model: m, url: 'http://127.0.0.1:1/v1'}").output
    assert "missing" not in given and "runs here" in given


def test_score_prints_number_parts_and_reasons(tmp_path):
    to_pil(text("hello", 128).media).save(tmp_path / "a.png")
    to_pil(noise(1, 64).media).save(tmp_path / "b.png")
    lines = run("score", "ocr", tmp_path, "--prompt", 'a sign that says "hello"', "--json").output.splitlines()
    first, second = map(json.loads, lines)
    assert first["file"].endswith("a.png") and first["score"] == first["ned"] == 1.0
    assert first["info"]["read"] == "hello" and second["score"] < 1
    said = run("score", "pixel.jpeg_size", tmp_path / "a.png").output
    assert "a.png" in said and "pixel.jpeg_size" in said
    assert "no text to look for" in run("score", "ocr", tmp_path / "a.png", ok=False).output
    given = run("score", "ocr", tmp_path / "a.png", "--meta", '{"text": "hella"}', "--json").output
    assert json.loads(given)["score"] == pytest.approx(0.8)


def test_eval_reports_and_writes(prefs, tmp_path):
    said = run("eval", "shapes", "pixel.jpeg_size", "--data", prefs, "--output", tmp_path / "r.json").output
    assert "| shapes |" in said and "category=color" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert {result["name"]: result["accuracy"]["value"] for result in report["results"]}["shapes"] == 1.0
    run("eval", "shapes", "--data", prefs, "--output", tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text().startswith("#")


def test_probe_finds_one_that_is_fooled_and_one_that_is_not(prefs, tmp_path):
    said = run(
        "probe", "shapes", "pixel.contrast", "--data", prefs, "--limit", 12, "--probe", "contrast", "--probe", "noise",
        "--thumbnails", tmp_path / "sheets", "--output", tmp_path / "p.json",
    ).output  # fmt: skip
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in said.splitlines() if "std within" in line
    }
    assert rows["shapes"] == "–" and set(rows["pixel.contrast"].split(", ")) == {"noise", "contrast"}
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2
    assert {row["probe"] for row in json.loads((tmp_path / "p.json").read_text())["rows"]} >= {"contrast", "noise"}


def test_probe_reads_whatever_eval_reads(prefs, tmp_path):
    lines = (prefs / "pairs.jsonl").read_text().replace('"media/', f'"{prefs}/media/').splitlines()[:2]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": str(next((prefs / "media").iterdir())), "prompt": "p"}))
    for data in (tmp_path / "list.jsonl", prefs / "pairs.jsonl", prefs):
        assert "contrast" in run("probe", "pixel.contrast", "--data", data, "--probe", "contrast", "--limit", 4).output


def test_a_package_whose_entry_point_fails_is_listed_with_its_error(monkeypatch):
    from importlib.metadata import EntryPoint

    broken = EntryPoint("broken", "no_such_module:nothing", "flowrl.rewards")
    monkeypatch.setattr("rewards.catalogue.available", lambda: ["pixel.contrast", "broken"])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [broken])
    found = {each["name"]: each for each in json.loads(run("list", "--json").output)}
    assert found["pixel.contrast"]["runs"] and not found["broken"]["runs"]
    assert "no_such_module" in found["broken"]["missing"][0]["what"]


def test_check_grad_fails_with_an_exit_code(tmp_path):
    assert "ok" in run("check-grad", "pixel.contrast").output
    (tmp_path / "bad.py").write_text(
        "import torch\nfrom rewards import declare\n@declare(differentiable=True)\ndef bad(samples):\n"
        "    return torch.stack([s.media.mean() + (s.media * torch.randn_like(s.media)).mean() for s in samples])\n"
    )
    assert run("check-grad", f"{tmp_path}/bad.py:bad", ok=False).exit_code == 1


def test_table_prints_figures_with_their_rules():
    said = run("table", "--benchmark", "HPDv2").output
    assert "HPSv2" in said and "http" in said and "Pick-a-Pic" not in said
    figures = json.loads(run("table", "--json").output)
    assert all(figure["source"] and figure["split"] and figure["ties"] for figure in figures)
    assert all(re.match(r"https?://", figure["source"]) for figure in figures)


def test_serve_answers_over_http(tmp_path):
    """As its own process, stopped as a user stops it."""
    pytest.importorskip("uvicorn")
    from rewards import RewardHub, Sample

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flowrl", "reward", "serve", "pixel.brightness", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert f"http://127.0.0.1:{port}/pixel.brightness" in server.stdout.readline()
            sample = Sample(media=noise(0, 8).media)
            with RewardHub(f"http://127.0.0.1:{port}/pixel.brightness") as there, RewardHub("pixel.brightness") as here:
                assert abs(there([sample]).total - here([sample]).total) < 3e-3
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "ocrr"], "did you mean 'ocr'"),
        (["score", "ocr", "none.png"], "none.png does not exist"),
        (["score", "{use: ocr", "x.png"], "is no YAML"),
        (["score", "{mode: ned}", "x.png"], "has no `use`"),
        (["score", "ocr", "x.png", "--meta", "nonsense"], "--meta is no JSON"),
        (["eval", "shapes", "--data", "nowhere"], "there is no preference data at 'nowhere'"),
        (["serve", "pixel.contrast", "--host", "192.168.0.1"], "token"),
        (["check-grad", "pixel.jpeg_size"], "differentiable"),
        (["serve", "pixel.contrast", "--token", "secret"], "takes env:NAME"),
        (["serve", "./x.csv:y"], "cannot import './x.csv'"),
        (["probe", "shapes", "--data", "x", "--output", "r.txt"], "written as .json or .md"),
        (["table", "--benchmark", "nope"], "there are the benchmarks"),
        (["info", "http://127.0.0.1"], "names no reward"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said):
    result = run(*words, ok=False)
    assert type(result.exception).__name__ in ("RewardError", "RewardContractError"), result.exception
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b"\xff\xfe{}", "not UTF-8"),
        ("a.jsonl", b'{"file": "x.png", "meta": [1]}', "`meta` is list"),
        ("a.jsonl", b"[" * 100_000, "no JSON"),
    ],
)
def test_a_list_that_cannot_be_read_is_told(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    assert said in str(run("score", "pixel.contrast", tmp_path / name, ok=False).exception)


@pytest.mark.parametrize(
    ("layout", "name", "data", "said"),
    [
        ("auto", "a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("videogen", "a.csv", b"x,y\n1,2\n", '"path_A" is missing'),
        ("videogen", "a.csv", b"path_A,path_B\n" + b"x" * 200_000 + b",b\n", "no CSV that can be read"),
        ("genai", "a.jsonl", b'{"prompt": "p", "vote_type": ["x"], "left_image": "a.png"}', '"vote_type" is'),
    ],
)
def test_preferences_that_cannot_be_read_are_told(tmp_path, layout, name, data, said):
    (tmp_path / name).write_bytes(data)
    result = run("eval", "pixel.contrast", "--data", tmp_path / name, "--format", layout, ok=False)
    assert said in str(result.exception)


def test_a_device_that_is_none_is_told(tmp_path):
    to_pil(noise(0, 8).media).save(tmp_path / "a.png")
    result = run("score", "pixel.contrast", tmp_path / "a.png", "--device", "cud", ok=False)
    assert "device 'cud' is none" in str(result.exception)


def test_a_report_needs_a_known_ending(prefs, tmp_path):
    result = run("eval", "pixel.contrast", "--data", prefs, "--output", tmp_path / "r.pdf", ok=False)
    assert "written as .json or .md" in str(result.exception)
