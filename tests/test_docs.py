"""The documentation is true: its examples run, its commands, files, modules and keys exist.

A block that follows `<!-- file: NAME -->` is a file that the other blocks of the page use. The other python blocks of a
page run one after the other, in one namespace, in a folder of their own.
"""

import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import typer.main

from flowrl import cli
from flowrl.config import Config, algorithm_class, load_config
from flowrl.configfile import parse_yaml
from flowrl.resolve import available as names_in

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_ENTRY_POINTS = {"flowrl.rewards"}


class Block(NamedTuple):
    line: int
    language: str
    file: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, m.start("text")), m["language"], m["file"], m["text"]) for m in _BLOCK.finditer(text)
    ]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder as the pages assume it: with the configs, and a file of prompts."""
    (tmp_path / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    (tmp_path / "prompts.txt").write_text('A sign that says "Open late"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")


def export_runs(folder: Path) -> None:
    """The weights of two runs, as the README's snippets look for them; two steps are enough here."""
    from flowrl.models import load
    from flowrl.policy import Policy

    for run, lora in (("quickstart", None), ("my-lora", {"rank": 2, "alpha": 8})):
        policy = Policy(load("shapes"), lora=lora)
        policy.export(folder / "runs" / run / "weights", inference={"num_inference_steps": 2})


def export_a_model_that_writes(folder: Path) -> None:
    """What `flowrl train configs/vlm/quickstart.yaml` would leave, untrained; the README asks it."""
    from flowrl.vlm.model import ImageTextModel
    from flowrl.vlm.policy import TextPolicy

    TextPolicy(ImageTextModel.load("shapes_vlm")).export(folder / "runs" / "vlm-quickstart" / "weights")


# ------------------------------------------------------------------------------------------------ examples


@every_page
def test_python_examples_run(page, folder, capsys):
    write_files(page, folder)
    if page.name == "README.md":
        export_runs(folder)
        export_a_model_that_writes(folder)
    namespace = {"__name__": "example"}
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, namespace)  # the project's own pages


@pytest.mark.parametrize("run", ["quickstart", "my-lora"])
def test_the_snippet_that_comes_with_weights_runs(run, folder, monkeypatch):
    """The README.md of an export, run where it says itself; the built-in base model is stored in float16."""
    export_runs(folder)
    monkeypatch.chdir(folder / "runs" / run)
    (block,) = blocks(Path("weights/README.md"))
    exec(compile(block.text, "weights/README.md", "exec"), {"__name__": "example"})
    assert Path("image.png").is_file()


@every_page
def test_yaml_examples_are_understood(page, folder):
    from rewards.entries import place, read_entries

    write_files(page, folder)
    for block in blocks(page):
        if block.language == "yaml" and block.file is not None:
            load_config(block.file)
        elif block.language == "yaml":
            values = parse_yaml(block.text, f"{page.name}:{block.line}").values
            assert {"rewards"} <= set(values) <= {"rewards", "eval_rewards"}, "other YAML has a file name"
            for entries in values.values():
                read_entries(entries, place("cpu"))


# ------------------------------------------------------------------------------------------------ commands


def lines_of_shell(page: Path):
    for block in blocks(page):
        if block.language == "bash":
            for offset, line in enumerate(block.text.splitlines()):
                words = shlex.split(line, comments=True)
                if words:
                    yield f"{page.name}:{block.line + offset + 1}", words


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command of the program by its words: `config check`."""

    def walk(group, prefix=""):
        for name, command in group.commands.items():
            inner = getattr(command, "commands", None)
            found.update(walk(command, f"{prefix}{name} ") if inner else {f"{prefix}{name}": command})
        return found

    found: dict[str, typer.core.TyperCommand] = {}
    return walk(typer.main.get_command(cli.app))


def check_flowrl(place: str, words: list[str], folder: Path) -> None:
    known = commands()
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
    assert name is not None, f"{place}: there is no command {words[0]!r}"
    context = known[name].make_context(name, words[len(name.split()) :])  # a wrong option or a missing argument raises
    config = context.params.get("config")
    if config is not None and config.is_file():
        load_config(config, context.params["overrides"] or [])
    elif config is not None:
        assert config.parts[0] == "runs", f"{place}: there is no {config}"


@every_page
def test_shell_commands_exist(page, folder):
    write_files(page, folder)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for place, words in lines_of_shell(page):
        program = words[0]
        if "-m" in words and words[words.index("-m") + 1] == "flowrl":  # torchrun, python -m
            words = words[words.index("-m") + 1 :]
        if words[0] == "flowrl":
            check_flowrl(place, words[1:], folder)
        elif program == "make":
            assert set(words[1:]) <= targets, place
        elif program == "pip":
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(extras), place
        elif program == "python":
            file = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
            assert file.is_file(), f"{place}: there is no {file}"
        else:
            pytest.fail(f"{place}: {program} is not a program that the pages should need")


@every_page
def test_commands_in_the_text_exist(page):
    first_words = {name.split()[0] for name in commands()}
    for name in re.findall(r"`flowrl (\w+)", without_blocks(page)):
        assert name in first_words, f"{page.name}: flowrl {name}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in re.findall(r"`make ([\w-]+)`", without_blocks(page)):
        assert name in targets, f"{page.name}: make {name}"


def test_the_table_of_commands_is_the_help():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- commands", 1)[1].split("```", 1)[0]
    table = dict(re.findall(r"^\| `flowrl ([\w -]+)` \| (.+) \|$", text, re.M))
    assert table == {name: " ".join((command.help or "").split()) for name, command in commands().items()}


# ------------------------------------------------------------------------------------------------ files, modules, keys


@every_page
def test_links_lead_somewhere(page):
    text = without_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), f"{page.name}: {target}"
        if anchor:
            linked = (page.parent / path if path else page).read_text(encoding="utf-8")
            titles = [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.+)$", linked, re.M)
            ]
            assert anchor in titles, f"{page.name}: {target}"


@every_page
def test_files_named_in_the_text_exist(page):
    """Of this repository: `flowrl/train.py`, `configs/quickstart.yaml`, `tests/models/`."""
    tops = "flowrl|samplers|rewards|tests|docs|configs|notebooks"
    for name in re.findall(rf"(?<![\w./])((?:{tops})/[\w./]*\w)", page.read_text(encoding="utf-8")):
        if (ROOT / name).exists():
            continue
        pytest.fail(f"{page.name}: there is no {name}")


@every_page
def test_modules_named_in_the_text_exist(page):
    for name in re.findall(r"`((?:flowrl|samplers|rewards)(?:\.\w+)+)`", without_blocks(page)):
        if name.endswith(".py") or name in _ENTRY_POINTS:
            continue  # a file of the reader's; a group of entry points
        parts = name.split(".")
        length = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
        thing = importlib.import_module(".".join(parts[:length]))
        for attribute in parts[length:]:
            assert hasattr(thing, attribute), f"{page.name}: {name}"
            thing = getattr(thing, attribute)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def test_the_house_is_described_whole():
    """docs/architecture.md names every file at the top of the packages, and every folder in them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("samplers", "rewards", "flowrl"):
        for path in sorted((ROOT / package).iterdir()):
            if path.suffix == ".py" and path.name != "__init__.py":
                assert f"{package}/{path.name}" in text, path.name
            elif (path / "__init__.py").is_file():
                assert f"{package}/{path.name}/" in text, path.name


def test_every_method_is_in_the_paper_index():
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in names_in("flowrl.algorithms"):
        assert f"flowrl/algorithms/{name}.py" in text, name


def test_every_reward_is_described():
    from rewards import available
    from rewards.resolve import resolve

    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name in available():
        if resolve(name).__module__.startswith("rewards."):
            assert f"`{name}`" in text, name


def test_every_verifier_is_described():
    from rewards.verifiers import available

    text = (ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8")
    for name in available():
        assert f"`{name}`" in text, name


def test_what_the_page_of_coverage_names_exists():
    """Every row says where it is or why it is not, and its verifiers and keys of a config exist."""
    from rewards.verifiers import available

    text = (ROOT / "docs" / "vlm_coverage.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\w+) \| ?(.*) \|$", text, re.M)
    assert {state for _, state, _ in rows} == {"yes", "preset", "part", "function", "no", "out", "state"}
    for item, state, where in rows:
        assert state in ("no", "out", "state") or "`" in where, f"{item}: where?"
        assert state != "no" or where, f"{item}: why not?"
    names = re.findall(r"`([^`]+)`", text)
    for name in (name for name in names if name.startswith("verifiers.")):
        assert name in available(), name
    sections = {"model", "algorithm", "generation", "data", "optimizer"}
    keys = {name.partition(":")[0] for name in names if name.partition(".")[0] in sections}
    assert len(keys) > 50
    assert [key for key in keys if not _is_key(key)] == []


def _is_key(name: str) -> bool:
    """Whether a dotted name is a key of a config for a model that writes; methods have keys of their own."""
    section, _, rest = name.partition(".")
    if section == "algorithm":
        return any(rest in algorithm_class(method).model_fields for method in names_in("flowrl.algorithms"))
    model: Any = Config
    for part in name.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return False
        inner = [kind for kind in (fields[part].annotation, *get_args(fields[part].annotation)) if kind is not None]
        model = next((kind for kind in inner if hasattr(kind, "model_fields")), None)
    return True


def test_the_page_of_coverage_notices_what_is_not_there():
    assert _is_key("generation.tools.max_turns") and _is_key("algorithm.lam_alpha")
    assert not _is_key("generation.tools.max_turn") and not _is_key("algorithm.lam_omega")


@every_page
def test_no_paths_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.)/])/(?:home|root|tmp|work|Users|mnt|data|opt|usr|var)\b", text)
    assert not re.search(r"[A-Z]:\\", text)


def test_the_page_of_all_keys_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, "run: python docs/make_configuration.py"


def test_the_metrics_of_some_methods_are_logged_by_one():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("## metrics.jsonl of some methods")[1].split("\n## ")[0]
    keys = {key for row in re.findall(r"^\| (`.+?) \|", section, re.M) for key in re.findall(r"`([^`]+)`", row)}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "flowrl" / "algorithms").glob("*.py"))
    assert len(keys) > 10
    assert not [key for key in keys if f'"{key}"' not in code]


@pytest.mark.slow
def test_the_metrics_are_the_described_ones(tmp_path):
    from flowrl.train import Trainer

    overrides = [
        f"output_dir={tmp_path}", "iterations=1", "algorithm.kl_coef=0.01",
        "data.prompts_per_iteration=2", "data.samples_per_prompt=2", "optimizer.micro_batch=4",
        "data.evaluation.num_samples=6", "data.evaluation.num_steps=2", "data.evaluation.grid_prompts=2",
    ]  # fmt: skip
    Trainer(load_config(ROOT / "configs" / "quickstart.yaml", overrides)).run()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## metrics.jsonl")[1].split("\n## ")[0]
    described = {key for cell in re.findall(r"^\| (`.+?) \|", text, re.M) for key in re.findall(r"`([^`]+)`", cell)}
    patterns = {key for key in described if "<" in key}
    prefixes = ("score", "score_group_std", "score_no_verdict", "time/reward")
    assert {re.sub(rf"^({'|'.join(prefixes)})/.*", r"\1/<name>", key) for key in row} == described
    assert patterns == {f"{prefix}/<name>" for prefix in prefixes}
