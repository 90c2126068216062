"""What the tests of a whole run share. Building the tiny model and importing diffusers take most of their time."""

import json
from pathlib import Path

import pytest

from tests import runs
from tests.matrices import places, runs_always


@pytest.hookimpl(tryfirst=True)  # before cells are chosen by their marks
def pytest_collection_modifyitems(items):
    """Marks the further cells of a matrix with `one_in(n)` as exhaustive; files with slow tests come first.

    A worker takes whole files, so the last ones must be short for all workers to end at the same time.
    """
    matrices = {}
    for item in items:
        if item.get_closest_marker("one_in"):
            matrices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cells in matrices.values():
        (n,) = cells[0].get_closest_marker("one_in").args
        for item, place in zip(cells, places(item.callspec.params for item in cells), strict=True):
            if not runs_always(place, n):
                item.add_marker(pytest.mark.exhaustive)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a whole random SD3 pipeline: two CLIPs, no T5, 32 x 32 pixels; and a two-time network of it."""
    from flowrl.models import load
    from tests.models.tiny import build_sd3

    folder = build_sd3(tmp_path_factory.mktemp("model") / "tiny", t5=False)
    load(folder, family="meanflow", fresh=True).trainable.save_pretrained(folder / "meanflow")
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0, "height": 32, "width": 32}
    (folder / "inference.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """`make_config({"optimizer.lr": 1e-2}, folder="run")`: a config for a small run in a temporary folder."""

    def make(changes=None, folder="run"):
        return runs.config(tiny_model, tmp_path / folder, changes)

    return make


@pytest.fixture
def trainer(make_config):
    """`trainer({"optimizer.lr": 1e-2}, resume=True)`: a Trainer on such a config; what is left open is closed."""
    from flowrl.train import Trainer

    made = []

    def make(changes=None, folder="run", resume=False):
        made.append(Trainer(make_config(changes, folder), resume=resume))
        return made[-1]

    yield make
    for one in made:
        one.hub.close()
        one.log.close()
        if one.lock is not None:
            one.lock.release()


@pytest.fixture
def config_file(tiny_model, tmp_path):
    """`config_file({"seed": 3})`: the path of a YAML config for a small run in `tmp_path / "run"`."""
    from flowrl.configfile import dump_yaml

    def make(changes=None, folder="run", name="config.yaml"):
        path = tmp_path / name
        path.write_text(dump_yaml(runs.tree(tiny_model, tmp_path / folder, changes)))
        return path

    return make


@pytest.fixture
def command(monkeypatch, capfd):
    """`command("train", path)`: runs the command line in this process; returns (exit code, stdout, stderr)."""
    import sys

    from flowrl import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flowrl", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run
