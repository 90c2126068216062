"""The text side of a config: a strict YAML dialect, `base:` files, `a.b=c` overrides, `${a.b}`, and who said what.

The dialect is YAML 1.2's core schema and nothing else: `1e-4` is a number, `no` and `12:30` are words, `010` is ten;
a key may not stand twice, and tags, anchors and aliases are refused, so that a file can neither run code nor unfold
into more than it shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from flowrl.resolve import nearest

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

Key = tuple[str | int, ...]
"""Where a value stands: ("rewards", 0, "weight")."""

_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class ConfigError(ValueError):
    """A config cannot be used. `problems` holds one line for each thing that is wrong; the message holds them all."""

    def __init__(self, problems: Sequence[str]) -> None:
        """One line a problem: where, which key, what is wrong, how to mend it."""
        self.problems = list(problems)
        count = f"{len(self.problems)} problems in the config:\n  " if len(self.problems) > 1 else ""
        super().__init__(count + "\n  ".join(self.problems))


def dotted(key: Key) -> str:
    """`rewards.0.weight`, as the user would write it on the command line."""
    return ".".join(map(str, key))


@dataclass
class Source:
    """A config as it was written: plain values, and where each of them came from."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    """`file:line` or the override, for every key that was written down."""
    name: str = "config"
    """What to call the whole when a key was never written."""

    def where(self, key: Key) -> str:
        """Where a key was set; for one that never was, where the nearest section around it was."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.name


# ------------------------------------------------------------------------------------------------ files


def read_source(path: str | Path, overrides: Sequence[str] = ()) -> Source:
    """A file with its `base:` files below it and the overrides on top of it, interpolated."""
    source = _read_chain(Path(path), ())
    source.name = str(path)
    problems = []
    # A new algorithm empties the section, so it must come before what is set in the section.
    for override in sorted(overrides, key=lambda text: not text.startswith(("algorithm=", "algorithm.name="))):
        try:
            _override(source, override)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    _interpolate(source)
    return source


def _read_chain(path: Path, children: tuple[Path, ...]) -> Source:
    """The file on top of its bases, the later of which win over the earlier."""
    if path.resolve() in children:
        chain = " -> ".join(child.name for child in (*children, path.resolve()))
        raise ConfigError([f"{children[-1]}: base: the files go round in a circle: {chain}. Remove one `base:`."])
    own = parse_yaml(_read_text(path, children), str(path))
    if not isinstance(own.values, dict):
        raise ConfigError([f"{path}: a config is a mapping of `key: value` lines, not {_kind(own.values)}."])
    bases = own.values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{own.where(('base',))}: base: expected a file name or a list of them."])
    merged = Source(name=str(path))
    for base in bases:
        below = _read_chain(path.parent / Path(base).expanduser(), (*children, path.resolve()))
        merged = Source(merge(merged.values, below.values), merged.places | below.places)
    own.places.pop(("base",), None)
    return Source(merge(merged.values, own.values), merged.places | own.places)


def merge(below: Any, above: Any, key: Key = ()) -> Any:
    """`above` on top of `below`: sections are merged key by key, everything else (lists too) is replaced.

    A section `algorithm` that names another algorithm starts anew: the old one's numbers mean nothing to the new one.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if key == ("algorithm",) and above.get("name", below.get("name")) != below.get("name"):
        return above
    return below | {name: merge(below.get(name), value, (*key, name)) for name, value in above.items()}


def _read_text(path: Path, children: tuple[Path, ...]) -> str:
    asked = f"{children[-1]}: base: " if children else ""
    if not path.is_file():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a folder" if path.is_dir() else "does not exist"
        start = "the folder of the file that names it" if children else "the working folder"
        raise ConfigError([f"{asked}{path} {what}{nearest(path.name, known)}; relative paths start at {start}."])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{asked}{path} cannot be read: {error.strerror}."]) from error
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{asked}{path} is larger than {MAX_BYTES:,} bytes; put prompts into a file of their own."])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError([f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8."]) from error


# ------------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """Only composes nodes; values are made by `_value`, so no constructor of PyYAML ever runs."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call,unused-ignore]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not allowed; write ${section.key}", mark)
        if event.tag:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag!r} is not allowed; write a plain value", mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Quotes what either this dialect or PyYAML's own would not read back as a word."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _type, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def parse_yaml(text: str, name: str) -> Source:
    """One YAML document in the strict dialect; `values` is None where there is nothing in it."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        source = Source(name=name)
        source.values = {} if node is None else _value(node, (), source)
        return source
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_yaml_problem(error, name)]) from error
    except yaml.YAMLError as error:  # a character that no YAML file may hold
        raise ConfigError([f"{name}: {' '.join(str(error).split())}."]) from error
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back to the same values, `$`-signs included."""
    text: str = yaml.dump(_escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def _value(node: Any, key: Key, source: Source) -> Any:
    source.places.setdefault(key, f"{source.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*key, index), source) for index, item in enumerate(node.value)]
    made: dict[str, Any] = {}
    for name, item in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(None, None, "a key must be a word", name.start_mark)
        if name.value in made:
            first = source.places[(*key, name.value)].rpartition(":")[2]
            problem = f"the key {dotted((*key, name.value))!r} stands here for the second time (first in line {first})"
            raise yaml.MarkedYAMLError(None, None, problem + "; remove one of them", name.start_mark)
        source.places[(*key, name.value)] = f"{source.name}:{name.start_mark.line + 1}"
        made[name.value] = _value(item, (*key, name.value), source)
    return made


def _scalar(node: Any) -> Any:
    text = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) < 100:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind in ("int", "float"):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _yaml_problem(error: Any, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}" if mark else name
    hint = ""
    if "\\t" in error.problem:
        hint = "; indent with spaces, not tabs"
    elif "mapping values are not allowed" in error.problem:
        hint = "; quote a text that holds ': ', and look at the indentation"
    elif "'%'" in error.problem or "'@'" in error.problem or "'`'" in error.problem:
        hint = "; quote the text"
    elif error.context and "single document" in error.context:
        hint = "; remove the line ---"
    return f"{place}: {error.problem}{hint}."


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a section" if isinstance(value, dict) else repr(value)


# ------------------------------------------------------------------------------------------------ overrides


def _override(source: Source, text: str) -> None:
    """Apply one `a.b=c`, whose value is read as YAML; numbers in the key are places in a list."""
    place = f"override {text if len(text) <= 80 else text[:77] + '...'!r}"
    path, equals, raw = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError([f"{place}: expected key=value, for example optimizer.lr=1e-4 or 'rewards=[{{use: ocr}}]'."])
    parsed = parse_yaml(raw, place)
    value = parsed.values if raw.strip() else None
    source.values = _assign(source.values, names, value, (), place)
    key: Key = tuple(int(name) if name.isdigit() else name for name in names)
    source.places |= {(*key, *inner): place for inner in ((), *parsed.places)}


def _assign(tree: Any, names: Sequence[str], value: Any, key: Key, place: str) -> Any:
    """A copy of `tree` with `value` merged in at `names`; missing sections on the way are made."""
    if not names:
        return merge(tree, value, key)
    name, rest = names[0], names[1:]
    if isinstance(tree, list):
        if not name.isdigit() or int(name) >= len(tree):
            have = f"the list has {len(tree)} item{'s' * (len(tree) != 1)}, numbered from 0"
            hint = f"override the whole list, {dotted(key)}='[...]'"
            raise ConfigError([f"{place}: there is no {dotted((*key, name))}: {have}; {hint}."])
        changed = _assign(tree[int(name)], rest, value, (*key, int(name)), place)
        return [*tree[: int(name)], changed, *tree[int(name) + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError([f"{place}: {dotted(key)} is {tree!r}, not a section, so there is no {name!r} in it."])
    section: dict[str, Any] = tree or {}
    if (*key, name) == ("algorithm", "name"):
        return merge(section, {name: value}, key)
    return section | {name: _assign(section.get(name), rest, value, (*key, name), place)}


# ------------------------------------------------------------------------------------------------ interpolation


def _interpolate(source: Source) -> None:
    """Replace `${a.b}` by what stands there (OmegaConf's grammar; `\\${` is a literal)."""
    if not _any_text(source.values, "${"):
        return
    from omegaconf import OmegaConf  # only where it is needed: it costs half of the time to read a config
    from omegaconf.errors import OmegaConfBaseException

    try:
        source.values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        full_key = getattr(error, "full_key", None)
        names = re.sub(r"\[(\d+)\]", r".\1", full_key).split(".") if full_key else []
        key: Key = tuple(int(name) if name.isdigit() else name for name in names)
        hint = "${section.key} refers to another value of this config; write \\${ for the characters themselves"
        raise ConfigError([f"{source.where(key)}: {dotted(key)}: {first}; {hint}."]) from error


def _any_text(value: Any, part: str) -> bool:
    if isinstance(value, Mapping):
        return any(_any_text(item, part) for item in value.values())
    if isinstance(value, list):
        return any(_any_text(item, part) for item in value)
    return isinstance(value, str) and part in value


def _escaped(value: Any) -> Any:
    """Plain lists and mappings in which a text with `${` is written so that it is not interpolated when read."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value
