"""Whole diffusers pipelines with random weights, built without any download: `tiny/<name>` wherever a model is named.

A file of this folder builds one family: each public function in it that returns a pipeline is a name, so `tiny/flux`
is `flux()` of whichever file has it. Its recommended arguments are the dict `INFERENCE[name]` of that file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

PREFIX = "tiny/"
_HERE = Path(__file__).parent
_DONE = "inference.json"


@cache
def names() -> dict[str, str]:
    """Every name after `tiny/`, with the module that builds it; found by reading the files, importing none."""
    found = {}
    for file in sorted(_HERE.glob("[!_]*.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        found |= {name: f"{__name__}.{file.stem}" for name in functions if not name.startswith("_")}
    return found


def folder(name: str) -> Path:
    """The saved pipeline `tiny/<name>`, built on first use in the cache folder; the same weights on every machine.

    KeyError for a name that is not in `names()`. The cache is $FLOWRL_CACHE, else ~/.cache/flowrl.
    """
    module: ModuleType = importlib.import_module(names()[name])
    target = cache_folder() / "tiny" / f"{name}-{_fingerprint(module)}"
    if not (target / _DONE).is_file():
        _build(module, name, target)
    return target


def cache_folder() -> Path:
    """Where flowrl keeps what it can make again."""
    return Path(os.environ.get("FLOWRL_CACHE") or Path.home() / ".cache" / "flowrl").expanduser()


def _build(module: ModuleType, name: str, target: Path) -> None:
    import torch

    target.parent.mkdir(parents=True, exist_ok=True)
    # In one step from nothing to complete: another process may be looking for it, or building it too.
    with tempfile.TemporaryDirectory(dir=target.parent) as made, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = getattr(module, name)()
        part = Path(made) / "pipeline"
        pipe.save_pretrained(part)
        (part / _DONE).write_text(json.dumps(module.INFERENCE[name], indent=2) + "\n")
        try:
            part.rename(target)
        except OSError:
            if not (target / _DONE).is_file():
                shutil.rmtree(target, ignore_errors=True)
                part.rename(target)


def _fingerprint(module: ModuleType) -> str:
    """Changes with the recipe and with the library that saves: a stale pipeline is never taken for a new one."""
    digest = hashlib.sha256(version("diffusers").encode())
    for file in (Path(str(module.__file__)), *sorted(_HERE.glob("_*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
