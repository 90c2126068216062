"""No code runs from a file, a checkpoint, a data set or a message: there is no place in our source where it could."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("flowrl", "rewards", "samplers") for path in (ROOT / package).rglob("*.py"))

# {what: (pattern, {file: why it is fine there})}
FORBIDDEN = {
    "unpickling": (
        r"\b(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|\bpickle\.\w+\(|allow_pickle",
        {},
    ),
    "torch.load": (r"\btorch\.load\(|\.load_state\(|FileSystemReader",
        {"rewards/files.py": "weights_only: published rewards are .pt files; nothing but tensors loads"}),
    "YAML that builds objects": (r"\byaml\.(?:unsafe_|full_)?load(?:_all)?\(|yaml\.(?:Unsafe|Full)?Loader\b", {}),
    "evaluating text": (r"(?<![\w.])(?:eval|exec|compile|__import__)\(", {}),
    "code from a model repository": (r"trust_remote_code", {}),
    "a shell": (r"shell=True|os\.system\(|os\.popen\(", {}),
    "objects sent between processes": (r"gather_object|all_gather_object|broadcast_object|scatter_object", {}),
    "a socket open to the network": (r"0\.0\.0\.0|http\.server|socketserver|\.bind\(\(", {}),
    "temporary files with guessable names": (r"tempfile\.mktemp\(|/tmp/", {}),
}  # fmt: skip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_source_has_none_of_it(what):
    pattern, allowed = FORBIDDEN[what]
    found = {}
    for path in SOURCES:
        for number, line in enumerate(_code(path).splitlines(), start=1):
            if re.search(pattern, line):
                found.setdefault(path.relative_to(ROOT).as_posix(), []).append(f"{number}: {line.strip()}")
    assert {name: lines for name, lines in found.items() if name not in allowed} == {}
    assert set(allowed) <= set(found), "an exception that is not needed any more"


def _code(path):
    """The source without comments and docstrings, line by line: what is said about pickle is no pickle."""
    return _stripped(path.read_text(encoding="utf-8"))


@cache
def _stripped(text):
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    return "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in lines)


def test_the_search_finds_what_it_looks_for(tmp_path):
    bad = {
        "unpickling": "import pickle",
        "torch.load": "x = torch.load(path)",
        "YAML that builds objects": "yaml.load(text)",
        "evaluating text": "y = eval(text)",
        "code from a model repository": "load(trust_remote_code=True)",
        "a shell": "run(command, shell=True)",
        "objects sent between processes": "dist.all_gather_object(out, x)",
        "a socket open to the network": "serve('0.0.0.0')",
        "temporary files with guessable names": "open('/tmp/x')",
    }
    assert bad.keys() == FORBIDDEN.keys()
    for what, line in bad.items():
        path = tmp_path / "bad.py"
        path.write_text(f'"""About pickle, eval(x) and torch.load(x)."""\n{line}  # and yaml.load(x)\n')
        assert re.search(FORBIDDEN[what][0], _code(path)), what
    fine = "model.eval()\nre.compile(x)\nyaml.dump(x)\nload_state_dict(x)"
    assert not [what for what, (pattern, _) in FORBIDDEN.items() if re.search(pattern, fine)]


def test_there_is_source_to_search():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"flowrl/train.py", "flowrl/checkpoint.py", "rewards/hub.py", "samplers/rollout.py"} <= names


def test_a_config_cannot_run_code(tmp_path):
    from flowrl.config import ConfigError, load_config

    path = tmp_path / "config.yaml"
    sentinel = tmp_path / "owned"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{sentinel}']\n")
    with pytest.raises(ConfigError, match="the tag .* is not allowed"):
        load_config(path)
    assert not sentinel.exists()


def test_prompts_stay_text(trainer, tmp_path):
    """Prompts that look like markup, formats, paths or shell commands end up as files named by numbers."""
    nasty = [
        "<script>alert(1)</script>",
        "{0.__class__} %s $(touch owned) `touch owned`",
        "../../owned\t[bold]x[/bold]",
    ]
    run = trainer({"data.prompts": nasty, "iterations": 1, "evaluate_every": 1, "name": "nasty"})
    run.run()
    folder = tmp_path / "run"
    names = {path.name for path in folder.rglob("*")}
    assert not [name for name in names if "owned" in name] and not (ROOT / "owned").exists()
    assert not list(tmp_path.parent.glob("owned*"))
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
