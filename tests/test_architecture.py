"""The axes stay apart: no file asks which model or method it works for, and the arrows between packages hold."""

import ast
import difflib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
    tree, own = ast.parse(path.read_text(encoding="utf-8")), str(path.resolve())
    for name, line in names_in(tree):
        for kind in (METHODS, MODELS):
            assert kind.get(name, own) == own, f"{path.name}:{line} names {name}"
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


# ------------------------------------------------------------------------------------------------ models that write

KINDS = ("flowrl.media", "flowrl.vlm")
"""What only one kind of model needs."""
FRONT = {
    f"flowrl/{name}.py" for name in ("cli", "estimate", "make_pairs", "media", "standalone", "train_latent", "vlm_cli")
}
"""Commands that are about one kind, or ask both; everything else outside flowrl/vlm is shared."""
MEDIA = ROOT / "flowrl" / "media.py"
OWN = [path for path in FILES if path.is_relative_to(ROOT / "flowrl" / "vlm")]
SHARED = [path for path in FILES if path not in OWN and str(path.relative_to(ROOT)) not in FRONT]
FEWEST = 6
"""Statements of a function that is worth comparing."""
ALIKE = 0.8


def kinds_named(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Imports of what one kind alone needs, wherever they stand, and texts that name it, but for docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(s.value) for node in ast.walk(tree) if isinstance(node, documented) for s in node.body
                  if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}  # fmt: skip
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            names = [node.value]
        yield from ((name, node.lineno) for name in names if name.startswith(KINDS))


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_shared_names_neither_kind(path):
    """Save one property, which says what a config is for."""
    named = list(kinds_named(ast.parse(path.read_text(encoding="utf-8"))))
    actors = [name for name, _ in named if name in ("flowrl.media:MediaActor", "flowrl.vlm.actor:TextActor")]
    assert [name for name, _ in named] == actors, named
    assert len(actors) == (2 if path.name == "config.py" else 0)


def test_the_commands_that_may_name_them_do():
    for name in FRONT - {"flowrl/media.py", "flowrl/cli.py"}:
        assert list(kinds_named(ast.parse((ROOT / name).read_text(encoding="utf-8")))), f"{name} is shared now"
    assert {"train.py", "update.py", "actor.py", "types.py", "filters.py", "checkpoint.py"} <= {p.name for p in SHARED}


@pytest.mark.parametrize(
    "code",
    [
        "import flowrl.vlm.policy",
        "def f():\n    from flowrl.vlm import policy",
        "from flowrl import vlm",
        "x = importlib.import_module('flowrl.media')",
        "resolve('flowrl.vlm.actor:TextActor', 'flowrl')",
    ],
)
def test_such_a_name_would_be_seen(code):
    assert list(kinds_named(ast.parse(code)))
    assert not list(kinds_named(ast.parse('"""flowrl.vlm has it."""\nfrom flowrl.types import Tokens')))


class Renamed(ast.NodeTransformer):
    """Local names by their order of appearance, without annotations and docstrings."""

    def __init__(self, function: ast.FunctionDef) -> None:
        stored = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self.local = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)} | set(stored)
        self.names: dict[str, str] = {}

    def name(self, given: str) -> str:
        return self.names.setdefault(given, f"v{len(self.names)}") if given in self.local else given

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.name(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self.name(node.arg))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.visit(ast.copy_location(ast.Assign([node.target], node.value, lineno=node.lineno), node))


class Body(NamedTuple):
    """A function's name, and its words in order and counted."""

    name: str
    words: list[str]
    bag: Counter[str]


def bodies(tree: ast.AST) -> Iterator[Body]:
    """Those of each function that is long enough."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            if sum(isinstance(n, ast.stmt) for s in body for n in ast.walk(s)) >= FEWEST:
                renamed = Renamed(node)
                text = "\n".join(ast.unparse(ast.fix_missing_locations(renamed.visit(s))) for s in body)
                words = re.findall(r"\w+|[^\w\s]", text)
                yield Body(node.name, words, Counter(words))


def likeness(one: Body, other: Body) -> float:
    """How much of two texts is the same, words in order; 0 where it cannot be as much as is looked for."""
    lengths = len(one.words), len(other.words)
    least = ALIKE * sum(lengths) / 2
    if min(lengths) < least or (one.bag & other.bag).total() < least:
        return 0.0
    return difflib.SequenceMatcher(None, one.words, other.words, autojunk=False).ratio()


def copies(own: Iterable[ast.AST], shared: Iterable[ast.AST]) -> list[tuple[str, str, float]]:
    """Functions of the first that are nearly one of the second, and how nearly."""
    known = [found for tree in shared for found in bodies(tree)]
    pairs = ((a.name, b.name, likeness(a, b)) for tree in own for a in bodies(tree) for b in known)
    return [pair for pair in pairs if pair[2] >= ALIKE]


def test_models_that_write_have_no_copy_of_a_shared_function():
    parsed = [[ast.parse(path.read_text(encoding="utf-8")) for path in paths] for paths in (OWN, [*SHARED, MEDIA])]
    assert copies(*parsed) == []


def test_a_copy_would_be_seen():
    """Also with other names, another annotation and a line more."""
    copied = """
def among(values: list[float], *, most: int):
    '''Another docstring.'''
    kept = {}
    for place, value in enumerate(values):
        if math.isnan(value):
            continue
        kept.setdefault(round(value, 3), []).append(place)
    ordered = sorted(kept.items(), key=lambda pair: -len(pair[1]))
    print(len(ordered))
    return [places for _, places in ordered[:most]]
"""
    shared = """
def groups(rewards, *, count):
    found: dict[float, list[int]] = {}
    for index, reward in enumerate(rewards):
        if math.isnan(reward):
            continue
        found.setdefault(round(reward, 3), []).append(index)
    order = sorted(found.items(), key=lambda item: -len(item[1]))
    return [members for _, members in order[:count]]
"""
    other = """
def total(rewards, *, count):
    summed = 0.0
    for reward in rewards:
        if reward > 0:
            summed += reward
    mean = summed / count
    return mean if math.isfinite(mean) else None
"""
    ((mine, theirs, found),) = copies([ast.parse(copied)], [ast.parse(shared), ast.parse(other)])
    assert (mine, theirs) == ("among", "groups") and found > 0.85


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
