"""From pydantic's errors to sentences: where it was written, which key, what is wrong, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flowrl.configfile import Key, Source, dotted
from flowrl.resolve import nearest

Fields = Callable[[Key], Mapping[str, str]]
"""{key: description} of the section at a place."""

_EXPECTED = {
    "int": "should be a whole number",
    "float": "should be a number",
    "bool": "should be true or false",
    "string_type": "should be text; put it in quotes",
    "tuple_type": "should be a list, [a, b]",
    "model_type": "should be a section of `key: value` lines",
    "finite_number": "should be a finite number",
}


def explain(error: ValidationError, source: Source, fields: Fields, every_key: Sequence[str]) -> list[str]:
    """One line for each thing that is wrong, in the order of the file."""
    problems: dict[tuple[Key, str], dict[str, Any]] = {}
    for found in error.errors(include_url=False):
        key = _trimmed(found["loc"], source.values)
        # A value whose type has alternatives is described once for each of them; the first description is enough.
        problems.setdefault((key, "" if found["type"] != "conflict" else found["msg"]), dict(found))
    return sorted((_line(key, found, source, fields, every_key) for (key, _), found in problems.items()), key=_position)


def _position(line: str) -> tuple[str, int]:
    file, _, rest = line.partition(":")
    number = rest.partition(":")[0]
    return file, int(number) if number.isdigit() else 0


def _trimmed(loc: Key, tree: Any) -> Key:
    """A location without the names of a type's alternatives, which pydantic writes between or behind the keys."""
    key: Key = ()
    for name in loc:
        if isinstance(tree, Mapping):
            tree = tree.get(name)
        elif isinstance(tree, list) and isinstance(name, int):
            tree = tree[name] if name < len(tree) else None
        else:
            continue
        key = (*key, name)
    return key


def _line(key: Key, error: Mapping[str, Any], source: Source, fields: Fields, every_key: Sequence[str]) -> str:
    kind, name = error["type"], dotted(key) or "config"
    if kind == "extra_forbidden":
        return f"{source.where(key)}: {name}: unknown key{_meant(key, fields(key[:-1]), every_key)}."
    about = fields(key[:-1]).get(str(key[-1]), "") if key else ""
    about = f" ({about.rstrip('.')})" if about else ""
    if kind == "missing":
        if isinstance(key[-1], int):
            listed = f"{source.where(key[:-1])}: {dotted(key[:-1])}"
            return f"{listed}: the list is too short: it has {key[-1]}, and more are needed."
        return f"{source.where(key[:-1])}: {name}: this key is needed{about}. Add it, or the override {name}=... ."
    text = error["msg"].removeprefix("Value error, ").rstrip(".")
    if kind == "conflict" or isinstance(error["input"], Mapping) and kind == "value_error":
        return f"{source.where(key)}: {name}: {text}."
    return f"{source.where(key)}: {name}: {_shown(error['input'])} {_expected(error, text)}{about}."


def _expected(error: Mapping[str, Any], text: str) -> str:
    """What the value should be, in words that need no Python."""
    kind = error["type"]
    if kind in ("literal_error", "enum"):
        choices = error["ctx"]["expected"].replace(" or ", ", ")
        return (
            f"should be one of {choices}{nearest(str(error['input']), [c.strip(chr(39)) for c in choices.split(', ')])}"
        )
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    family, _, rest = kind.partition("_")
    if family in _EXPECTED and rest in ("parsing", "type", "from_float", "parsing_size"):
        return _EXPECTED[family]
    return text.removeprefix("Input ").replace("String should", "should").replace("Tuple should", "should")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _meant(key: Key, fields: Mapping[str, str], every_key: Sequence[str]) -> str:
    """The nearest key of the section, or the section to which the key belongs; and what there is."""
    close = difflib.get_close_matches(str(key[-1]), list(fields), n=1, cutoff=0.6)
    candidates = [dotted((*key[:-1], name)) for name in close]
    candidates = candidates or [path for path in every_key if path.rpartition(".")[2] == key[-1]][:3]
    hint = f"; did you mean {' or '.join(map(repr, candidates))}?" if candidates else "; remove it."
    return f"{hint} {dotted(key[:-1]) or 'A config'} has: {', '.join(fields)}"
