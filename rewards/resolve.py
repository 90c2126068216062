"""From a name in a config to a reward object, without a registry: the folder is the list.

    ocr, pixel.jpeg_size      a reward of this package: its module, then the reward's name where the module has several
    my_name                   an entry point of an installed package in the group `flowrl.rewards`
    package.module:attribute  anything importable
    ./file.py:attribute       a file loaded by its path, wherever it lies and whatever it is called
    http://host:port/name     a reward that runs on a server: `rewards.remote`

A module's rewards are the public classes in it that have a `score` method and the public functions marked with
`@declare(...)`; where it has an `__all__`, what that leaves out is not offered.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.functions import check_options, from_function, label, nearest
from rewards.types import Reward, RewardError, is_declared

ENTRY_POINTS = "flowrl.rewards"


def available() -> list[str]:
    """Every reward name that needs no path: those of this package, then those of installed packages."""
    names = [name for module in _modules() for name in _names(module)]
    return names + sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)} - set(names))


def build(use: Any, options: Mapping[str, Any] | None = None) -> Reward:
    """A reward from a name, class, function or ready object; `options` are its constructor's or its parameters'."""
    target = resolve(use) if isinstance(use, str) else use
    options = dict(options or {})
    if inspect.isclass(target):
        return _construct(target, options, use if isinstance(use, str) else target.__name__)
    if callable(getattr(target, "score", None)):
        if options:
            raise RewardError(
                f"reward {use!r} is an object already; give its constructor the options {', '.join(options)}"
            )
        ready: Reward = target
        return ready
    if callable(target):
        return from_function(target, options)
    raise RewardError(
        f"{use!r} is a {type(target).__name__}; a reward is a function or has a method score(samples)"
        f"{_judges_pairs(target, label(target))}"
    )


def resolve(name: str) -> Any:
    """The class, function or object that a name stands for."""
    if name.startswith(("http://", "https://")):
        return _address(name)
    path, colon, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if path.endswith(".py"):
        return _attribute(_load_file(path), attribute, name)
    if colon:
        return _attribute(_import(path, name), attribute, name)
    found = _builtin(name)
    return _entry_point(name) if found is None else found


def offered(module: ModuleType) -> dict[str, Any]:
    """The rewards that a module offers, by name, in the order of the file."""
    names = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
    found = {key: getattr(module, key) for key in names}
    own = {key: value for key, value in found.items() if getattr(value, "__module__", None) == module.__name__}
    return {key: value for key, value in own.items() if _is_reward_class(value) or is_declared(value)}


def _is_reward_class(value: object) -> bool:
    is_protocol = getattr(value, "_is_protocol", False)
    return inspect.isclass(value) and callable(getattr(value, "score", None)) and not is_protocol


def _modules() -> list[str]:
    """Dotted names of this package's public modules, relative to it and but for those of text; none is imported."""
    package = importlib.import_module("rewards")
    found = [module.name for module in pkgutil.walk_packages(package.__path__, "rewards.")]
    names = [name.removeprefix("rewards.") for name in found if "._" not in name]
    return sorted(name for name in names if name.partition(".")[0] != "verifiers")


def _names(module: str) -> list[str]:
    """Config names of one module's rewards: the module's own name where it has a single one."""
    keys = list(offered(importlib.import_module(f"rewards.{module}")))
    return [module] if len(keys) == 1 else [f"{module}.{key}" for key in keys]


def _builtin(name: str) -> Any | None:
    """`module` or `module.attribute` of this package, or None."""
    modules = _modules()
    if name in modules:
        rewards = offered(importlib.import_module(f"rewards.{name}"))
        if len(rewards) > 1:
            raise RewardError(f"{name!r} has several rewards: {', '.join(f'{name}.{key}' for key in rewards)}")
        return next(iter(rewards.values()), None)
    module, _, attribute = name.rpartition(".")
    return offered(importlib.import_module(f"rewards.{module}")).get(attribute) if module in modules else None


def _address(url: str) -> type:
    """The reward that a server has at an address, as a class whose other options are still open."""
    from rewards.remote import Remote

    class There(Remote):
        __doc__ = Remote.__doc__
        card = replace(Remote.card, options=())

        def __init__(self, **options: Any) -> None:
            check_options("remote", options, [*inspect.signature(Remote).parameters][1:])
            super().__init__(url, **options)

    return There


def _entry_point(name: str) -> Any:
    points = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
    if not points and name.startswith("verifiers."):
        raise RewardError(
            f"no reward {name!r}: verifiers judge text, what a model has written, and rewards judge pictures and "
            "videos. `rewards.verifiers` runs them, see docs/verifiers.md"
        )
    if not points:
        known = available()
        raise RewardError(
            f"no reward {name!r}{nearest(name, known)}. There are: {', '.join(known)}; "
            "or give package.module:attribute, or ./file.py:attribute."
        )
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward {name!r} is the entry point {points[0].value!r}, which fails: {error}") from error


def _import(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except (ImportError, TypeError, ValueError) as error:  # a path that is no name of a module raises what it likes
        raise RewardError(
            f"reward {name!r}: cannot import {path!r}: {error}. A file is given as ./file.py:attribute."
        ) from error


def _load_file(path: str) -> ModuleType:
    """A file as a module of its own, under a name that cannot collide with an installed package."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise RewardError(
            f"reward file {path!r} does not exist (looked for {file}); a relative path starts at the working directory"
        )
    key = f"_reward_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses and pickle look a class's module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise RewardError(f"reward file {path!r} fails when loaded: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    """`module.attribute`; without a name, the module's only reward."""
    rewards = offered(module)
    if attribute and hasattr(module, attribute):
        return getattr(module, attribute)
    if not attribute and len(rewards) == 1:
        return next(iter(rewards.values()))
    known = _defined(module)
    what = f"has no {attribute!r}{nearest(attribute, known)}" if attribute else "needs :attribute"
    raise RewardError(f"reward {name!r}: the module {what}. It has: {', '.join(known) or 'no function and no class'}.")


def _defined(module: ModuleType) -> list[str]:
    """The public functions and classes of a module itself: what may be asked for by its name, marked or not."""
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return [key for key, value in own.items() if not key.startswith("_") and callable(value)]


def _construct(cls: type, options: Mapping[str, Any], name: str) -> Reward:
    """An instance of a reward class, with its options checked by name."""
    parameters = list(inspect.signature(cls).parameters.values())
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_options(cls.__name__, options, [p.name for p in parameters])
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in options]
    if missing:
        raise RewardError(f"reward {cls.__name__!r} needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}")
    instance = cls(**options)
    if not callable(getattr(instance, "score", None)):
        raise RewardError(
            f"class {cls.__name__!r} has no method score(samples), so it is not a reward{_judges_pairs(instance, name)}"
        )
    reward: Reward = instance
    return reward


def _judges_pairs(target: object, name: str) -> str:
    """What a judge of two samples is for, where `target` is one and was taken for a reward; else nothing."""
    if not callable(getattr(target, "prefers", None)):
        return ""
    return f". It has prefers(first, second): it is a judge for `pairs`. Mend: {{use: pairs, judge: {name!r}}}"
