"""The axes stay apart: no file asks which model or method it works for, and the arrows between packages hold."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowrl.algorithms
import flowrl.models
from flowrl.types import Hyperparameters
from tests import runs

ROOT = Path(__file__).parent.parent
FILES = [path for package in ("samplers", "rewards", "flowrl") for path in sorted((ROOT / package).rglob("*.py"))]
ASKED = {"algorithm", "model", "family", "algorithm_name", "model_name", "model_type", "algo"}
"""Names whose value says which method or model it is, as the left side of `if ... ==`."""


def classes_by_file(package, belongs) -> dict[str, str]:
    """{class name: file} of a folder's own public classes of a kind."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, thing in vars(module).items():
            if inspect.isclass(thing) and thing.__module__ == module.__name__ and belongs(thing):
                found[name] = str(Path(module.__file__).resolve())
    return found


METHODS = classes_by_file(
    flowrl.algorithms, lambda cls: issubclass(cls, Hyperparameters) and not inspect.isabstract(cls)
)
MODELS = classes_by_file(
    flowrl.models, lambda cls: callable(getattr(cls, "velocity", None)) and not inspect.isabstract(cls)
)


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that code uses or imports, with its line; docstrings and comments do not count.

    A class that one derives from does not either: a variant of a family is the family, and what differs.
    """
    bases = {base.id for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
             if isinstance(base, ast.Name)}  # fmt: skip
    yield from ((name, line) for name, line in _all_names(tree) if name not in bases)


def _all_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                yield alias.name.rpartition(".")[2], node.lineno


def asks(tree: ast.AST) -> Iterator[int]:
    """Lines that compare the name of a model or method with a text, or match on it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = any(
                isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) for s in sides for leaf in ast.walk(s)
            )
            if texts and any(_is_asked(side) for side in sides):
                yield node.lineno
        elif isinstance(node, ast.Match) and _is_asked(node.subject):
            yield node.lineno


def _is_asked(side: ast.AST) -> bool:
    """`model`, `config.model`, `config.algorithm.name`, `self.family`, ..."""
    parts = ast.unparse(side).split(".") if isinstance(side, ast.Name | ast.Attribute) else []
    return bool(parts) and (parts[-1] in ASKED or (parts[-1] == "name" and len(parts) > 1 and parts[-2] in ASKED))


def test_the_folders_were_listed():
    assert {"FlowGRPO", "MixGRPO"} <= set(METHODS)
    assert "SD3" in MODELS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_does_not_ask_which_model_or_method(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, line in names_in(tree):
        for kind in (METHODS, MODELS):
            assert kind.get(name, str(path.resolve())) == str(path.resolve()), f"{path.name}:{line} names {name}"
    assert not list(asks(tree)), f"{path.name}: an if about the name of a model or method"


@pytest.mark.parametrize(
    "code",
    [
        "if model == 'sd3': pass",
        "if config.algorithm.name in ('mix_grpo', 'flow_grpo'): pass",
        "x = 1 if 'flux' == self.family else 2",
        "match config.algorithm.name:\n    case 'mix_grpo': pass",
    ],
)
def test_such_an_if_would_be_seen(code):
    assert list(asks(ast.parse(code)))


def test_deriving_is_not_asking():
    derived = "from flowrl.models.wan import Wan\nclass Mine(Wan):\n    fps = 3"
    assert "Wan" not in dict(names_in(ast.parse(derived)))
    assert "Wan" in dict(names_in(ast.parse("from flowrl.models.wan import Wan\nx = isinstance(y, Wan)")))


@pytest.mark.parametrize("code", ["if form == 'flow_grpo': pass", "if name in known: pass", "if model is None: pass"])
def test_other_ifs_are_left_alone(code):
    assert not list(asks(ast.parse(code)))


def test_the_arrows_between_packages_hold():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


MINE = '''
"""An algorithm of a user's own, with two plans an iteration, a weight, and edges that it leaves out."""

import torch

from flowrl.algorithms.policy_gradient import PolicyGradient
from samplers import window


class Mine(PolicyGradient):
    def plan(self, times, iteration, samples_per_prompt, seed):
        return [window(times, start, 1) for start in (0, 1)]

    def credit(self, batch):
        credit = super().credit(batch)
        return torch.where(torch.arange(len(credit)) % 3 == 0, torch.nan, credit)

    def weight(self, batch):
        return 1 + batch.trajectory.step.float()
'''


def test_an_algorithm_in_a_file_of_ones_own_trains(trainer, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = trainer({"algorithm": {"name": f"{tmp_path}/mine.py:Mine", "num_steps": 4, "clip_range": 1e-2}})
    before = runs.weights(run)
    row = run.step(0)
    assert runs.distance(runs.weights(run), before) > 0
    assert row["ratio_first_update"] <= 1e-5 and row["calls/rollout"] == 12 * 4 and row["calls/train"] == 8
