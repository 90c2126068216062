"""What a judge is asked and how its answer is read: a YAML file, so that a judge of your own is one too.

    user: Does this {kind} show "{prompt}"? Answer with one word, Yes or No.
    parser: levels
    options: {levels: {"Yes": 1, "No": 0}}

Words in braces are put in as they are, the prompt last, so that braces in a prompt stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rewards._answers import PARSERS, Levels, Parser
from rewards.functions import nearest
from rewards.types import MediaKind, RewardError

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One way of asking; its fields are the keys of the file, but for `options`, which become the parser's."""

    user: str
    """The question; {kind} becomes image or video, and {prompt} the sample's prompt."""
    parser: Parser
    """Reads the answer: a name of `rewards._answers.PARSERS`, with its `options`."""
    system: str = ""
    """The system's message; "" = none."""
    shows: Literal["sample", "edit", "pair"] = "sample"
    """The sample; or meta["source"] as image 1 and the sample as image 2; or two samples to compare."""
    labels: bool = True
    """Whether "Image 1:", "Image 2:" stand before the media, where there are two."""
    media: frozenset[MediaKind] = frozenset({"image", "video"})
    range: tuple[float, float] = (0.0, 1.0)
    """Scores of the lowest and the highest answer."""
    max_tokens: int = 512
    """Length of the answer; for `levels` as far as its place."""
    source: str = ""
    """Where the words are from."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer is read from probabilities."""
        return isinstance(self.parser, Levels)

    def ask(self, kind: MediaKind, prompt: str) -> str:
        """The question about a prompt."""
        return self.user.replace("{kind}", kind).replace("{prompt}", prompt)


KEYS = (*(field.name for field in fields(Template)), "options")

OF_THE_PARSER = ("options", "max_tokens")
"""Keys that mean nothing to another parser: its options, and how long the answer is that it reads."""


def modes(reward: str) -> list[str]:
    """The templates that a reward comes with."""
    return sorted(path.stem for path in (FOLDER / reward).glob("*.yaml"))


def read_template(reward: str, mode: str, path: str | None = None) -> Template:
    """The template of a mode; the keys that a file of yours has replace its own.

    Where it names another parser, those `OF_THE_PARSER` are not inherited. A file that does not end in .yaml or .yml is
    the text of the question, which is shown as it is: without labels.
    """
    known = modes(reward)
    if mode not in known:
        raise RewardError(f"{reward}: mode is {mode!r}{nearest(str(mode), known)}; expected one of {', '.join(known)}")
    own = FOLDER / reward / f"{mode}.yaml"
    inherited, replacing = _mapping(own), {} if path is None else _read(Path(path).expanduser())
    if replacing.get("parser", inherited["parser"]) != inherited["parser"]:
        inherited = {key: value for key, value in inherited.items() if key not in OF_THE_PARSER}
    given = inherited | replacing
    try:
        _check_keys("a template has no key", given, KEYS)
        return _made(given)
    except RewardError as error:
        raise RewardError(f"{reward}: template {path or own.name}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RewardError(f"template {str(path)!r} does not exist; a relative path starts at the working directory")
    if path.suffix in (".yaml", ".yml"):
        return _mapping(path)
    return {"user": path.read_text(encoding="utf-8"), "labels": False, "source": str(path)}


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RewardError(f"template {str(path)!r} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RewardError(f"template {str(path)!r}: expected keys with values, such as `user: ...`")
    return found


def _made(given: Mapping[str, Any]) -> Template:
    """A template of checked values."""
    for key in ("user", "system", "source"):
        _check(isinstance(given.get(key, ""), str), key, given.get(key), "text")
    _check(bool(given["user"].strip()), "user", given["user"], "the question")
    _check(
        given.get("shows", "sample") in ("sample", "edit", "pair"), "shows", given.get("shows"), "sample, edit, pair"
    )
    _check(isinstance(given.get("labels", True), bool), "labels", given.get("labels"), "true or false")
    tokens = given.get("max_tokens", 1)
    _check(isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0, "max_tokens", tokens, "at least 1")
    values = {key: value for key, value in given.items() if key not in ("parser", "options", "media", "range")}
    if "media" in given:
        kinds = given["media"]
        sound = isinstance(kinds, list) and 0 < len(kinds) == len({"image", "video"} & set(map(str, kinds)))
        _check(sound, "media", kinds, "[image], [video] or [image, video]")
        values["media"] = frozenset(kinds)
    if "range" in given:
        values["range"] = _range(given["range"])
    return Template(**values, parser=_parser(given["parser"], given.get("options") or {}))


def _parser(name: Any, options: Any) -> Parser:
    _check(isinstance(name, str) and name in PARSERS, "parser", name, f"one of {', '.join(PARSERS)}")
    _check(isinstance(options, Mapping), "options", options, "the parser's options by name")
    form = PARSERS[name]
    _check_keys(f"parser {name!r} has no option", options, [field.name for field in fields(form)])
    missing = [field.name for field in fields(form) if field.default is MISSING and field.name not in options]
    if missing:
        raise RewardError(f"parser {name!r} is missing its option{'s' * (len(missing) > 1)} {' and '.join(missing)}")
    try:
        parser: Parser = form(**options)
    except RewardError as error:
        raise RewardError(f"parser {name!r}: {error}") from error
    return parser


def _check_keys(wrong: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise RewardError(f"{wrong} {key!r}{nearest(str(key), known)}. It has: {', '.join(known)}.")


def _range(bounds: Any) -> tuple[float, float]:
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(each) in (int, float) for each in bounds)
    _check(numbers and bounds[0] < bounds[1], "range", bounds, "[lowest, highest]")
    return float(bounds[0]), float(bounds[1])


def _check(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise RewardError(f"{key} is {value!r}; expected {expected}")
