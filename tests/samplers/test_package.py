"""What the package promises as a whole: its imports, its names and the example in its docstring."""

import ast
import sys
from pathlib import Path

import samplers

FOLDER = Path(samplers.__file__).parent


def test_it_needs_torch_and_nothing_else():
    allowed = {*sys.stdlib_module_names, "torch", "samplers"}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_all_public_names_are_exported_once():
    assert list(samplers.__all__) == sorted(set(samplers.__all__), key=lambda n: (not n.isupper(), n))
    for name in samplers.__all__:
        assert getattr(samplers, name) is not None
    for path in FOLDER.glob("[a-z]*.py"):
        module = sys.modules[f"samplers.{path.stem}"]
        assert set(module.__all__) <= set(samplers.__all__), path.name


def test_the_example_of_the_docstring_runs(capsys):
    lines = samplers.__doc__.split("::\n", 1)[1].split("\nThree choices")[0].splitlines()
    exec("\n".join(line.removeprefix("    ") for line in lines), {})
    assert "tensor(0.)" in capsys.readouterr().out
