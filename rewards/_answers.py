"""What a judge says, and the numbers in it: strict parsers, each of which knows one form and refuses all others.

    scores     lines `Label: 4`                            a point score, or one with several aspects
    choice     a line that is one of some phrases          which of two is better
    winner     JSON with a winner and winners by category  which of two is better
    numbers    JSON with a list of numbers                 an edit
    pattern    a regular expression of your own
    levels     the probabilities of some words             yes or no; 1 to 5; bad to excellent

A parser gives a number in [0, 1] of the scale that the judge was given. An answer in which the asked-for thing is not
there, is there twice with different values, or is out of its scale is `Unreadable`: a refusal is no middling score.
Thinking (`<think>...</think>`) is left out first, and with `tag` all but what stands in `<tag>...</tag>`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rewards.contract import short
from rewards.types import RewardError

MOST_CHARACTERS = 1 << 17
"""A longer answer is not read: no judge writes this much, so something is broken."""

_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"


class Unreadable(ValueError):
    """An answer that is not of the form that was asked for; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One token that was written, with the likeliest at its place."""

    token: str
    likeliest: tuple[tuple[str, float], ...]
    """(text, log-probability) of tokens, the written one among them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a chat model wrote."""

    text: str
    finished: bool = True
    """False: it was cut off by the limit of tokens."""
    steps: tuple[Step, ...] = ()
    """The tokens from the first on, where log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was read."""

    fraction: float
    """In [0, 1]: 0 is the lowest and 1 the highest that the judge could say."""
    parts: dict[str, float] = field(default_factory=dict)
    """What was written or measured, by name, as it is."""


class Parser(Protocol):
    """Reads replies of one form; its options are its fields."""

    def __call__(self, reply: Reply, /) -> Verdict:
        """The verdict; Unreadable if there is none."""
        ...


# ------------------------------------------------------------------------------------------------ parsers of text


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLines:
    """Lines `<label>: <number>`, one for each label; the score is the mean over them.

    The line may be in bold or an item of a list, repeat the scale in brackets, and end in "/5" or "out of 5".
    """

    labels: Mapping[str, str]
    """{name of the part: what stands before the colon}"""
    scale: tuple[float, float]
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could never be read."""
        _check(isinstance(self.labels, Mapping) and len(self.labels) > 0, "labels", self.labels, "{part: label}")
        object.__setattr__(self, "scale", _scale(self.scale))

    def __call__(self, reply: Reply) -> Verdict:
        """One number a label."""
        answer = answer_of(reply.text, self.tag)
        parts = {name: self._number(label, answer) for name, label in self.labels.items()}
        return Verdict(_mean([_fraction(value, self.scale) for value in parts.values()]), parts)

    def _number(self, label: str, answer: str) -> float:
        low, high = (re.escape(f"{bound:g}") for bound in self.scale)
        form = re.compile(
            rf"(?:[-•] )?{re.escape(label)}(?: ?\({low} ?(?:-|–|to) ?{high}\))? ?[:=] ?"
            rf"({_NUMBER})(?: ?(?:/|out of) ?{high})?\.?",
            re.IGNORECASE,
        )
        found = {float(match[1]) for line in _lines(answer) if (match := form.fullmatch(line))}
        return _only(found, f"a line '{label}: <number>'", self.scale, answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A line that is one of some phrases, whatever its case: 1 if the first is better, 0 the second, 1/2 a tie."""

    first: Sequence[str]
    second: Sequence[str]
    tie: Sequence[str] = ()
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse phrases that mean two things."""
        _check_sides(self.first, self.second, self.tie)

    def __call__(self, reply: Reply) -> Verdict:
        """The one side that is named."""
        answer = answer_of(reply.text, self.tag)
        sides = [_side(line, self.first, self.second, self.tie) for line in _lines(answer)]
        found = {side for side in sides if side is not None}
        return Verdict(_only(found, f"a line such as {self.first[0]!r} or {self.second[0]!r}", (0, 1), answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """JSON `{"categories": [{"cat_winner": side}, ...], "winner": side}`: 1 if the first is better, 0 the second.

        (1 - blend) [winner] + blend * mean over the categories of [cat_winner]         a tie counts 1/2

    which is finer than the winner alone.
    """

    first: Sequence[str]
    second: Sequence[str]
    tie: Sequence[str] = ()
    blend: float = 0.5
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse phrases that mean two things, and a blend that is none."""
        _check_sides(self.first, self.second, self.tie)
        _check(is_number(self.blend) and 0 <= self.blend <= 1, "blend", self.blend, "a number from 0 to 1")

    def __call__(self, reply: Reply) -> Verdict:
        """Parts: winner, categories."""
        found = _object(answer_of(reply.text, self.tag))
        winner, categories = self._read(found, "winner"), found.get("categories")
        if not isinstance(categories, list) or not categories:
            raise Unreadable(f'"categories" is {short(categories)}; expected a list of objects')
        share = _mean([self._read(category, "cat_winner") for category in categories])
        parts = {"winner": winner, "categories": share}
        return Verdict((1 - self.blend) * winner + self.blend * share, parts)

    def _read(self, where: Any, key: str) -> float:
        named = where.get(key) if isinstance(where, Mapping) else None
        side = _side(named, self.first, self.second, self.tie) if isinstance(named, str) else None
        if side is None:
            raise Unreadable(f'"{key}" is {short(named)}; expected {self.first[0]!r}, {self.second[0]!r} or a tie')
        return side


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """JSON `{"<key>": [a, b, ...]}` with one number a name; the score is the least of them, or their mean."""

    names: Sequence[str]
    scale: tuple[float, float]
    key: str = "score"
    combine: Literal["min", "mean"] = "min"
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could never be read."""
        _check(_is_texts(self.names) and len(self.names) > 0, "names", self.names, "a list of names")
        _check(self.combine in ("min", "mean"), "combine", self.combine, "min or mean")
        object.__setattr__(self, "scale", _scale(self.scale))

    def __call__(self, reply: Reply) -> Verdict:
        """One part a name."""
        found = _object(answer_of(reply.text, self.tag)).get(self.key)
        if not isinstance(found, list) or len(found) != len(self.names) or not all(map(is_number, found)):
            raise Unreadable(f'"{self.key}" is {short(found)}; expected a list of {len(self.names)} numbers')
        parts = {
            name: _within(float(number), f'"{self.key}"', self.scale)
            for name, number in zip(self.names, found, strict=True)
        }
        fractions = [_fraction(value, self.scale) for value in parts.values()]
        return Verdict(min(fractions) if self.combine == "min" else _mean(fractions), parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A regular expression whose one group is the number; all that it finds must be the same."""

    pattern: str
    scale: tuple[float, float]
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse an expression that is none, or has not one group."""
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, TypeError) as error:
            raise RewardError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        _check(groups == 1, "pattern", self.pattern, "an expression with one group (...), around the number")
        object.__setattr__(self, "scale", _scale(self.scale))

    def __call__(self, reply: Reply) -> Verdict:
        """The number as the part `score`."""
        answer = answer_of(reply.text, self.tag)
        said = [match[1] for match in re.finditer(self.pattern, answer, re.MULTILINE)]
        broken = [each for each in said if re.fullmatch(_NUMBER, each or "") is None]
        if broken:
            raise Unreadable(f"the pattern finds {short(broken[0])}, which is no number")
        value = _only({float(each) for each in said}, f"what the pattern {self.pattern!r} finds", self.scale, answer)
        return Verdict(_fraction(value, self.scale), {"score": value})


# ------------------------------------------------------------------------------------------------ parser of likelihoods


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The expected level, sum_k v_k p(k) / sum_k p(k), from the probabilities p of the words k at the answer's place.

    {Yes: 1, No: 0} gives P(Yes) / (P(Yes) + P(No)). p(k) is the sum over the tokens that are the word k, whatever their
    case and the white space around them. The answer's place is the first token, or the one behind one of the texts in
    `after`; what is written there must be one of the words, else the judge said something else: no verdict.

    Note: an endpoint tells the 20 likeliest tokens only; a word that is not among them counts as 0.
    """

    levels: Mapping[str, float]
    """{word, one token: its value}"""
    after: Sequence[str] = ("",)

    def __post_init__(self) -> None:
        """Refuse words that are none."""
        levels = self.levels if isinstance(self.levels, Mapping) else {}
        if any(isinstance(word, bool) for word in levels):
            raise RewardError(f"levels is {levels!r}: YAML reads Yes and No as true and false; put them in quotes")
        plain = {_plain(str(word)): value for word, value in levels.items()}
        sound = len(plain) == len(levels) >= 2 and all(plain) and all(map(is_number, plain.values()))
        _check(sound and len(set(plain.values())) > 1, "levels", self.levels, "{word: value}, different ones")
        _check(_is_texts(self.after) and len(self.after) > 0, "after", self.after, "a list of texts")
        object.__setattr__(self, "levels", plain)
        object.__setattr__(self, "after", tuple(map(_plain, self.after)))

    def __call__(self, reply: Reply) -> Verdict:
        """Parts: level, the expectation; mass, the probability that the answer is one of the words at all."""
        step = self._place(reply.steps)
        chance = dict.fromkeys(self.levels, 0.0)
        for token, logprob in step.likeliest:
            if _plain(token) in chance:
                chance[_plain(token)] += math.exp(logprob)
        mass = sum(chance.values())
        if not mass > 0:
            raise Unreadable(f"no probability is told for any of {', '.join(self.levels)}")
        level = sum(self.levels[word] * p for word, p in chance.items()) / mass
        low, high = min(self.levels.values()), max(self.levels.values())
        return Verdict(min(1.0, max(0.0, (level - low) / (high - low))), {"level": level, "mass": mass})

    def _place(self, steps: Sequence[Step]) -> Step:
        said = ""
        for step in steps:
            if _plain(step.token) in self.levels and _plain(said) in self.after:
                return step
            said += step.token
        raise Unreadable(f"the answer is none of {', '.join(self.levels)}; {_ending(said)}")


PARSERS: dict[str, type[Any]] = {
    "scores": ScoreLines,
    "choice": Choice,
    "winner": Winner,
    "numbers": Numbers,
    "pattern": Pattern,
    "levels": Levels,
}


# ------------------------------------------------------------------------------------------------ text


def answer_of(text: str, tag: str | None = None) -> str:
    """What is meant as the answer: behind the thinking, and within `<tag>...</tag>` where a tag is asked for."""
    if len(text) > MOST_CHARACTERS:
        raise Unreadable(f"the answer has {len(text)} characters; more than {MOST_CHARACTERS} are not read")
    answer = text.rpartition("</think>")[2]
    if "<think>" in answer:
        raise Unreadable("its thinking never ends: there is <think> without </think>")
    if tag is None:
        return answer
    blocks = answer.split(f"<{tag}>")
    if len(blocks) != 2 or blocks[1].count(f"</{tag}>") != 1:
        raise Unreadable(f"expected one <{tag}>...</{tag}>; {_ending(answer)}")
    return blocks[1].partition(f"</{tag}>")[0]


def _lines(text: str) -> list[str]:
    """Lines without markdown's marks, single spaces between words."""
    return [" ".join(re.sub(r"[*`#]", "", line).split()) for line in text.splitlines()]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _side(said: str, first: Sequence[str], second: Sequence[str], tie: Sequence[str]) -> float | None:
    """1 for a phrase of `first`, 0 for one of `second`, 1/2 for a tie; None for anything else."""
    plain = _plain(said).rstrip(".!")
    for value, phrases in ((1.0, first), (0.0, second), (0.5, tie)):
        if plain in map(_plain, phrases):
            return value
    return None


def _object(text: str) -> dict[str, Any]:
    """The one JSON object of a text: in a fence (```), or from its first brace to its last.

    A comma behind the last item is forgiven, since the form that UnifiedReward-Edit was trained on has one.
    """
    fences = re.findall(r"```(?:json)?[^\S\n]*\n(.*?)```", text, re.DOTALL)  # one way to match: linear
    if len(fences) > 1:
        raise Unreadable(f"it has {len(fences)} blocks of code; expected one JSON object")
    body = fences[0] if fences else text
    start, end = body.find("{"), body.rfind("}")
    if start < 0 or end < start:
        raise Unreadable(f"it has no JSON object; {_ending(text)}")
    plain = re.sub(r",(\s*[}\]])", r"\1", body[start : end + 1])
    try:
        found = json.loads(plain, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"what stands in braces is no JSON object: {error}") from error
    assert isinstance(found, dict)  # it starts with a brace
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _only(found: set[float], what: str, scale: tuple[float, float], answer: str) -> float:
    """The one value that was found in an answer, within its scale."""
    if len(found) != 1:
        values = [f"{value:g}" for value in sorted(found)[:4]]
        several = f"says {' and '.join(values[:3])}{' and more' * (len(values) > 3)}"
        raise Unreadable(f"expected {what}, once: it {several if found else f'is not there; {_ending(answer)}'}")
    return _within(next(iter(found)), what, scale)


def _within(value: float, what: str, scale: tuple[float, float]) -> float:
    if not scale[0] <= value <= scale[1]:
        raise Unreadable(f"{what} says {value:g}, which is not between {scale[0]:g} and {scale[1]:g}")
    return value


def _fraction(value: float, scale: tuple[float, float]) -> float:
    return (value - scale[0]) / (scale[1] - scale[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ending(text: str) -> str:
    """What an answer says in the end, where verdicts stand."""
    lines = text.split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return "the answer is empty" if last is None else f"the answer ends in {short(last)}"


# ------------------------------------------------------------------------------------------------ checks of options


def _check(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise RewardError(f"{key} is {value!r}; expected {expected}")


def _check_sides(first: Any, second: Any, tie: Any) -> None:
    for key, phrases in (("first", first), ("second", second), ("tie", tie)):
        _check(_is_texts(phrases) and (len(phrases) > 0 or key == "tie"), key, phrases, "a list of phrases")
    plain = [_plain(phrase) for phrase in (*first, *second, *tie)]
    _check(len(set(plain)) == len(plain), "first, second and tie", [*first, *second, *tie], "no phrase twice")


def _scale(scale: Any) -> tuple[float, float]:
    pair = isinstance(scale, Sequence) and len(scale) == 2 and all(map(is_number, scale))
    _check(pair and scale[0] < scale[1], "scale", scale, "[lowest, highest]")
    return float(scale[0]), float(scale[1])


def _is_texts(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no whole one of JSON or YAML that is too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
