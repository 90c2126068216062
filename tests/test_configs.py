"""Every config of the repository: it passes the check as it lies there, it runs an iteration, its header is true.

Where the model is one of the hub, the tiny pipeline and the rewards that its header's `Try it on a CPU` line names take
the place of weights that are not here; everything else is the config's own.
"""

import json
import math
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from flowrl import tiny
from flowrl.config import Config, check, diff, load_config
from flowrl.configfile import parse_yaml
from flowrl.smoke import smallest
from flowrl.vlm import tiny as tiny_vlm
from tests.matrices import one_of_each, thinned

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
BUILT_IN = ("shapes", "shapes_video", "shapes_vlm")
TRY = re.compile(r"^# Try it on a CPU: (.+)$", re.M)
VERIFIED = re.compile(
    r"^# Verified: config check; one iteration on (tiny/\w+)(?:, not quantised)?; not run at size\.$", re.M
)
MADE = re.compile(r"^#\s+(?:First: )?(flowrl (?:pairs make|shapes twins) .+)$", re.M)
"""Commands in headers that make what a config reads."""
FEWER = {"--num-prompts": "4", "--samples-per-prompt": "2", "--num-steps": "2", "--count": "4"}


@cache
def lines_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def try_line(path: Path) -> str | None:
    """The line of the file, or else of the file that it is based on."""
    if found := TRY.search(lines_of(path)):
        return found[1]
    base = parse_yaml(lines_of(path), str(path)).values.get("base")
    return try_line((ROOT / path.parent / base).resolve().relative_to(ROOT)) if base else None


@cache
def config_of(path: Path) -> Config:
    return load_config(ROOT / path)


OF_FAMILIES = [path for path in FILES if config_of(path).model.path not in BUILT_IN]
METHODS = [path for path in OF_FAMILIES if not path.stem.endswith("base") and not path.stem.startswith("gpu_")]
OF_A_METHOD = one_of_each(
    (path for path in FILES if path.parent.name != "vlm"), lambda path: config_of(path).algorithm.name
)
each = {"ids": lambda path: str(path.relative_to("configs").with_suffix(""))}


def runs_always(path: Path) -> bool:
    """The quickstarts, every base and first config of a model, one of each method of media.

    tests/vlm trains the methods for answers.
    """
    first = path.stem.endswith("base") or TRY.search(lines_of(path)) is not None
    return first or path.stem == "quickstart" or path.parent.name == "configs" or path in OF_A_METHOD


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a user's checkout: with the configs, and what the headers' commands make, only less of it."""
    from flowrl import cli

    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in {found[1] for path in FILES for found in MADE.finditer(lines_of(path))}:
            words = shlex.split(command)[1:]
            fewer = [FEWER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
            patch.setattr(sys, "argv", ["flowrl", *fewer])
            with pytest.raises(SystemExit) as leave:
                cli.main()
            assert not leave.value.code
        yield folder


@pytest.mark.parametrize("path", FILES, **each)
def test_passes_the_check_as_it_is(path, workplace):
    assert check(path) == []


@pytest.mark.parametrize("path", thinned(FILES, runs_always), **each)
def test_runs_an_iteration(path, workplace, tmp_path):
    """The first config of each model runs as a whole, with evaluations, a checkpoint and the export."""
    from flowrl.train import RATIO_TOLERANCE

    overrides = shlex.split(try_line(path))[4:] if path in OF_FAMILIES else []
    config = smallest(path, [*overrides, f"output_dir={tmp_path}/run"]).model_copy(update={"iterations": 1})
    row = whole_run(config) if TRY.search(lines_of(path)) or path.stem == "base" else one_step(config)
    assert math.isfinite(row["reward/mean"]) and math.isfinite(row["grad_norm"])
    assert row["grad_norm"] > 0 or row["zero_std_frac"] == 1  # the few samples may be worth the same
    assert row.get("ratio_first_update", 0.0) <= RATIO_TOLERANCE


def whole_run(config):
    from flowrl.train import Trainer

    Trainer(config).run()
    return json.loads((Path(config.output_dir) / "metrics.jsonl").read_text())


def one_step(config):
    from flowrl.train import Trainer

    trainer = Trainer(config)
    try:
        return trainer.step(0)
    finally:
        trainer._let_go()


@pytest.mark.parametrize("path", OF_FAMILIES, **each)
def test_the_header_names_the_tiny_pipeline_that_it_was_tried_on(path):
    words = shlex.split(try_line(path))
    (model,) = [word.removeprefix("model.path=") for word in words if word.startswith("model.path=")]
    (verified,) = VERIFIED.findall(lines_of(path))
    assert verified == model and model.removeprefix(tiny.PREFIX) in (*tiny.names(), *tiny_vlm.names())
    if TRY.search(lines_of(path)):
        assert words[:4] == ["flowrl", "train", str(path), "--smoke"]


@pytest.mark.parametrize("path", METHODS, **each)
def test_the_header_says_paper_hardware_and_curve(path):
    header = lines_of(path).partition("\nbase:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(r"arXiv:\d{4}\.\d{5}", header)
    assert re.search(r"^# Hardware: .*\bCurve.*: .+", header, re.M)


@pytest.mark.parametrize("path", METHODS, **each)
def test_the_page_of_presets_has_it_under_its_family(path):
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    section = page.partition(f"`{path.parent}/`")[2].partition("\n### ")[0]
    assert f"| `{path.stem}` | `{config_of(path).algorithm.name}` |" in section


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("gpu_")], **each)
def test_a_preset_for_a_gpu_is_the_same_run(path):
    """But for the rounding of weights that are stored in fewer bits."""
    changed = diff(config_of(path.parent / "base.yaml"), config_of(path))
    assert all(key.startswith("model.quantization") for key in changed)


@pytest.mark.parametrize("path", ["configs/sd3/gpu_24gb.yaml", "configs/wan/base.yaml"])
def test_the_line_to_try_works_as_it_is_written(path, workplace, command, tmp_path):
    words = shlex.split(try_line(Path(path)))
    code, _, err = command("train", path, *words[3:], f"output_dir={tmp_path}/run")
    assert code == 0, err
    assert (tmp_path / "run-smoke" / "weights" / "inference.json").is_file() or list(tmp_path.glob("*-smoke/weights"))
