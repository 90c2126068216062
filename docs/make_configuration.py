"""Write docs/configuration.md from the fields of the config, so that the page cannot disagree with the code.

python docs/make_configuration.py            writes the page
python docs/make_configuration.py --check    exits with 1 when it is out of date (the tests do the same)
"""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowrl import config, curriculum, filters
from flowrl.config import algorithm_class
from flowrl.resolve import available as names_in
from rewards import available, build, traits_of
from rewards.resolve import resolve
from rewards.verifiers import names
from rewards.verifiers.types import FIELDS

PAGE = Path(__file__).with_name("configuration.md")
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

INTRO = """# Configuration

<!-- Written by docs/make_configuration.py from the code. Do not edit this page: edit a field's description there. -->

A run is one YAML file. This page lists every key, what it accepts, its default and what it means.

```bash
flowrl config check configs/quickstart.yaml                        # every problem at once, or "ok"
flowrl config show configs/quickstart.yaml optimizer.lr=1e-4       # with every default written out
flowrl plan configs/quickstart.yaml                                # samples, steps, network calls, updates
```

**Files.** `base: other.yaml` (or a list of files, relative to the file that names them) puts a file below this one.
Sections are merged key by key. Everything else is replaced, lists too. A section `algorithm` that names another
algorithm starts anew.

**Overrides.** `key.key=value` after the file name wins over the file; the value is read as YAML. A number is a place in
a list: `rewards.0.weight=0.5`. A whole list is written `'rewards=[{use: shapes}]'`.

**References.** `${data.samples_per_prompt}` is the value of another key. `\\${` stands for the characters themselves.

**The dialect** is the core of YAML 1.2: `1e-4` is a number, `no` is a word. A key that stands twice, a tag, an anchor
and an alias are refused. An unknown key is an error that names the nearest known one; nothing is ignored in silence.

**Names.** `algorithm.name`, `model.family`, `engine.name`, `data.curriculum` and `rewards.*.use` take a name of the
package (`mix_grpo`), something importable (`package.module:Name`), or a file of yours (`./mine.py:Name`). Naming a file
runs it: read a config from elsewhere as you would read a program.
"""

SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("", config.Config, "The run"),
    ("model", config.ModelConfig, "model"),
    ("model.lora", config.LoraConfig, "model.lora"),
    ("algorithm", config.AlgorithmConfig, "algorithm"),
    ("rewards.*", config.RewardEntry, "rewards"),
    ("rewards.*.gate", config.GateConfig, "rewards.\\*.gate"),
    ("data", config.DataConfig, "data"),
    ("data.filters.*", config.FilterEntry, "data.filters.\\*"),
    ("data.replay", config.ReplayConfig, "data.replay"),
    ("data.evaluation", config.EvaluationConfig, "data.evaluation"),
    ("generation", config.GenerationConfig, "generation"),
    ("generation.forced_answer", config.ForcedAnswerConfig, "generation.forced_answer"),
    ("generation.tools", config.ToolsConfig, "generation.tools"),
    ("generation.server", config.ServerConfig, "generation.server"),
    ("generation.noisy", config.NoisyConfig, "generation.noisy"),
    ("optimizer", config.OptimizerConfig, "optimizer"),
    ("engine", config.EngineConfig, "engine"),
    ("log", config.LogConfig, "log"),
)

REWARDS_NOTE = (
    "A list of entries. `rewards: [shapes]` and `rewards: {shapes: 1.0, ocr: 0.5}` (name: weight) are short forms.\n"
    "Every key of an entry that is not in this table is an option of the reward itself, see\n"
    "[below](#options-of-the-rewards)."
)


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for prefix, section, title in SECTIONS:
        level = "##" if prefix.count(".") == 0 or prefix == "rewards.*" else "###"
        parts.append(f"{level} {title}\n\n{_first_line(section)}\n")
        if prefix == "rewards.*":
            parts.append(REWARDS_NOTE + "\n")
        parts.append(table(section.model_fields))
        if prefix == "algorithm":
            parts += list(algorithms())
    return "\n".join([*parts, *reward_options(), *verifier_options(), *function_options(), *resuming()])


def algorithms() -> Iterator[str]:
    """One table for each method of the folder."""
    for name in names_in("flowrl.algorithms"):
        record = algorithm_class(name)
        yield f"### algorithm: {name}\n\n{_first_line(record)}\n"
        yield table(record.model_fields)


def reward_options() -> Iterator[str]:
    """What every reward of the package declares and which options it takes."""
    yield "## Options of the rewards\n"
    yield "| name | judges | range | options | what it is |\n|---|---|---|---|---|"
    for name in available():
        target = resolve(name)
        if not target.__module__.startswith("rewards."):
            continue  # of another installed package
        traits = traits_of(build(name))
        span = "–" if traits.range is None else f"{traits.range[0]:g} to {traits.range[1]:g}"
        yield _row(f"`{name}`", ", ".join(sorted(traits.media)), span, _options(target), _first_line(target))
    yield ""


def verifier_options() -> Iterator[str]:
    """The same of the verifiers of text."""
    yield "## Options of the verifiers\n"
    yield "| name | range | options | what it is |\n|---|---|---|---|"
    for name in names.available():
        target = names.resolve(name)
        given = {*FIELDS, "progress", *getattr(target, "wants", ())}
        span = f"{target.range[0]:g} to {target.range[1]:g}" if target.range else "–"
        yield _row(f"`{name}`", span, _options(target, given), _first_line(target))
    yield ""


def function_options() -> Iterator[str]:
    """Filters and curricula, which are functions."""
    for module, title, given in (
        (filters, "data.filters", {"rewards", "group", "facts", "key"}),
        (curriculum, "data.curriculum", {"history", "prompts", "iteration"}),
    ):
        yield f"## Options of {title}\n"
        yield "| name | options | what it keeps or wants |\n|---|---|---|"
        for name in module.available():
            target = getattr(module, name)
            needed = [p.name for p in _parameters(target, given) if p.default is p.empty]
            told = ", ".join([*(f"`{key}` **needed**" for key in needed), _options(target, given)])
            yield _row(f"`{name}`", told.removesuffix(", –"), _first_line(target))
        yield ""


def resuming() -> Iterator[str]:
    """Which keys may differ when a run is taken up again: those that are not part of its identity."""
    found = config.load_config(QUICKSTART)
    keys = config.identity(found)
    free = [key for key in _leaves(found.model_dump(mode="json")) if key not in keys]
    listed = ", ".join(f"`{key}`" for key in _grouped(free))
    yield "## What may change when a run is resumed\n"
    yield (
        "A resumed run must be the same run. These keys may differ all the same, since they say where, how fast and\n"
        f"how often, not what: {listed}.\n\n"
        "With a constant learning rate `iterations` of a model that makes media may change too. Any other\n"
        "difference is refused, and the message lists it.\n"
    )


# ------------------------------------------------------------------------------------------------ rendering


def table(fields: Mapping[str, FieldInfo]) -> str:
    """A section's keys as a table."""
    rows = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        rows.append(_row(f"`{name}`", kind(field.annotation, field.metadata), _default(field), field.description or ""))
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    return "see below" if isinstance(value, BaseModel) else f"`{plain(value)}`"


def kind(annotation: Any, metadata: Any = ()) -> str:
    """What a type accepts, in words that need no Python."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in args[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return kind(args[0], [*inner, *metadata])
    if origin in (typing.Union, types.UnionType):
        inside = [kind(arg, metadata) for arg in args if arg is not type(None)]
        return " or ".join([*inside, *(["null"] if type(None) in args else [])])
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        if args[-1] is not Ellipsis:
            return "[" + ", ".join(map(kind, args)) + "]"
        return "list of sections" if _is_section(args[0]) else f"list of {kind(args[0])}"
    if origin is dict:
        names = typing.get_args(args[0]) if typing.get_origin(args[0]) is Literal else ("name",)
        return " or ".join(f"{{{name}: {kind(args[1])}}}" for name in names)
    if annotation is Any:
        return "anything"
    if _is_section(annotation):
        return "section"
    word = {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return " ".join([word, " and ".join(bounds)]).strip()


def plain(value: Any) -> str:
    """A default as it would be written in YAML."""
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(plain, value)) + "]"
    return value if isinstance(value, str) and value else json.dumps(value)


def _options(target: Any, known: Collection[str] = ()) -> str:
    """Parameters with their defaults, but for those in `known`."""
    given = [p for p in _parameters(target, known) if p.default is not p.empty]
    return ", ".join(f"`{p.name}: {plain(p.default)}`" for p in given) or "–"


def _parameters(target: Any, known: Collection[str]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(target).parameters.values() if p.name not in known]


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").strip().splitlines()[0]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _is_section(annotation: Any) -> bool:
    found = [annotation, *typing.get_args(annotation)]
    return any(isinstance(item, type) and issubclass(item, BaseModel) for item in found)


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}{name}.")
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix(".")


def _grouped(keys: list[str]) -> list[str]:
    """A whole section by its name, and the entries of a list by a star."""
    whole = ("engine", "log")
    out = [next((s for s in whole if key.startswith(s + ".")), key.replace(".0.", ".*.")) for key in keys]
    return list(dict.fromkeys(out))


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if arguments == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print("up to date" if same else f"{PAGE.name} is out of date: python docs/make_configuration.py")
        return 0 if same else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
