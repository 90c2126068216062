"""From a name in a config to a class or function, without a registry: the folder is the list.

    mix_grpo                the module `<package>.mix_grpo`, of which the one thing that follows the convention is taken
    mix_grpo.Variant        an attribute of that module, where it has several
    package.module:attr     anything importable
    ./file.py:attr          a file loaded by its path, whatever it is called: `./rewards.py` does not shadow `rewards`

The convention, in this order: a public function `load`; else, of the public classes defined in the module, the one that
has a `loss` (an algorithm), else the one that has a `velocity` (a model), else the only one. `:attr` may be left out
where it decides.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_METHODS = ("loss", "velocity")
_NO_BASE = {"NamedTuple", "Protocol", "Enum", "StrEnum", "Exception", "ValueError", "RuntimeError"}


class ResolveError(ValueError):
    """A name in the config stands for nothing; the message says what was looked for, where, and what there is."""


def resolve(name: str, package: str) -> Any:
    """The class or function that `name` stands for; a bare name is a module of `package` (dotted)."""
    path, colon, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if path.endswith(".py"):
        return _pick(load_file(path), attribute, name)
    if colon:
        return _pick(_import(path, name), attribute, name)
    check_name(name, package)
    module, _, attribute = (name, "", "") if name in _modules(package) else name.rpartition(".")
    return _pick(_import(f"{package}.{module}", name), attribute, name)


def check_name(name: str, package: str) -> None:
    """Refuse a bare name that is no module of `package`, by listing the folder: nothing is imported or run."""
    modules = _modules(package)
    if ":" in name or name.endswith(".py") or {name, name.rpartition(".")[0]} & set(modules):
        return
    known = available(package)
    raise ResolveError(
        f"{name!r} is not known in {package}{nearest(name, known)}. There are: {', '.join(known) or 'none'}; "
        "or give package.module:Name, or ./file.py:Name"
    )


def available(package: str) -> list[str]:
    """The bare names that `resolve` understands in a package: its files are read, none of them is imported."""
    modules = _modules(package)
    return sorted(name for name, path in modules.items() if _offers(path)) or sorted(modules)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for a word that is almost one of `known`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(match) for match in close)}?)" if close else ""


def load_file(path: str) -> ModuleType:
    """A Python file as a module of its own, under a name that cannot collide with an installed package.

    The name carries the file's contents: an unchanged file gives the same module again, so that its classes stay
    themselves; an edited one is loaded anew.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else [])
        raise ResolveError(f"{path!r} does not exist{near}; looked for {file} (paths start at the working folder)")
    key = f"_flowrl_file_{file.stem}_{hashlib.sha256(bytes(file) + file.read_bytes()).hexdigest()[:12]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # pydantic and dataclasses look a class's module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise ResolveError(f"file {path!r} fails when loaded: {type(error).__name__}: {error}") from error
    return module


def _modules(package: str) -> dict[str, Path]:
    """Public modules of a package by bare name, found by listing its folders."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ResolveError(f"{package!r} is not a package")
    found: dict[str, Path] = {}
    for folder in map(Path, spec.submodule_search_locations):
        found |= {path.stem: path for path in sorted(folder.glob("*.py"))}
        found |= {path.parent.name: path for path in sorted(folder.glob("*/__init__.py"))}
    return {name: path for name, path in found.items() if not name.startswith("_")}


def _offers(path: Path) -> bool:
    """Whether a source file seems to hold something that follows the convention, judged without running it.

    A class that only derives from another may inherit the method, so every public subclass counts.
    """
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        return True  # listed all the same: importing it is what tells its author what is wrong
    classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    classes = [cls for cls in classes if not _is_abstract(cls)]
    return (
        any(isinstance(node, ast.FunctionDef) and node.name == "load" for node in body)
        or any(isinstance(item, ast.FunctionDef) and item.name in _METHODS for cls in classes for item in cls.body)
        or any({ast.unparse(base) for base in cls.bases} - _NO_BASE for cls in classes)
    )


def _is_abstract(cls: ast.ClassDef) -> bool:
    """Whether a class leaves a method to those that derive from it, as what a family shares does."""
    methods = (item for item in cls.body if isinstance(item, ast.FunctionDef))
    return any("abstractmethod" in ast.unparse(decorator) for item in methods for decorator in item.decorator_list)


def _import(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or "?"
        if path == missing or path.startswith(missing + "."):
            fix = "it must be installed or on PYTHONPATH (a file is given as ./file.py:Name)"
        else:
            fix = f"it imports {missing!r}, which is not installed: pip install {missing.partition('.')[0]}"
        raise ResolveError(f"{name!r}: cannot import {path!r}; {fix}") from error
    except Exception as error:
        raise ResolveError(f"{name!r}: importing {path!r} fails: {type(error).__name__}: {error}") from error


def _pick(module: ModuleType, attribute: str, name: str) -> Any:
    """`module.attribute`; without an attribute, what follows the convention."""
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    public = {key: value for key, value in own.items() if not key.startswith("_")}
    if attribute:
        if hasattr(module, attribute):
            return getattr(module, attribute)
        there = ", ".join(public) or "nothing"
        raise ResolveError(f"{name!r}: there is no {attribute!r}{nearest(attribute, public)}. It has: {there}")
    if inspect.isfunction(public.get("load")):
        return public["load"]
    classes = [value for value in public.values() if inspect.isclass(value) and not inspect.isabstract(value)]
    for method in _METHODS:
        fitting = [cls for cls in classes if callable(getattr(cls, method, None))]
        classes = fitting or classes
    if len(classes) == 1:
        return classes[0]
    if not classes:
        raise ResolveError(f"{name!r} has neither a function load() nor a class of its own")
    joint = "" if name.endswith(":") else ":" if name.endswith(".py") else "."
    raise ResolveError(f"{name!r} offers several; name one of {', '.join(name + joint + c.__name__ for c in classes)}")
