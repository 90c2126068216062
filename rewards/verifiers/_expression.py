r"""Arithmetic as models write it, read without running any of it: LaTeX or plain, numbers, fractions, roots, sets.

    1,234.5   \frac{3}{4}   \dfrac12   1\frac{1}{2}   2\sqrt{3}   \sqrt[3]{8}   \frac{\pi}{6}   60^\circ   20\%
    3\text{ cm}   2(x+1)^2   \{1, 2\}   (0, 3]   x = 5   x = 1 or x = 2   3 \times 10^{4}   2^{2024} - 1

A recursive descent over a bounded number of tokens computes the value while it reads: a `Fraction` as long as that is
exact, else a float. Symbols stand for fixed pseudo-random numbers. Two expressions that agree at several such points
are taken as the same function (Schwartz, Zippel): a chance agreement is rarer by far than a wrong label in a data set.

Note: symbols stand for positive numbers, so that sqrt(x^2) = x here.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

Number: TypeAlias = Fraction | float

MOST_CHARACTERS = 2000
_MOST_TOKENS = 400
_DEEPEST = 40
_MOST_BITS = 1 << 14
_TRIALS = 3


class Unreadable(ValueError):
    """A text that is no expression this file knows."""


class TooLarge(Unreadable):
    """An expression whose value is beyond what is computed here, such as 9**9**9."""


@dataclass(frozen=True, slots=True)
class Value:
    """A number, or an expression in symbols by its values at several points."""

    at: tuple[Number, ...]
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Collection:
    """Several expressions, in brackets ("()", "[)", "{}", ...) or bare ("")."""

    brackets: str
    items: tuple[Value | Collection, ...]


Expression: TypeAlias = Value | Collection


def read(text: str) -> Expression:
    """The expression that a text is; Unreadable if it is none."""
    if len(text) > MOST_CHARACTERS:
        raise TooLarge(f"{len(text)} characters; at most {MOST_CHARACTERS} are read as an expression")
    tokens = _tokens(_without_unit(simplified(text)))
    try:
        return _expression(tokens, 0)
    except OverflowError as error:
        raise TooLarge(str(error)) from error
    except ArithmeticError as error:
        raise Unreadable(str(error)) from error


def same(a: Expression, b: Expression) -> bool:
    """Whether two expressions are equal: exactly where both are exact, else to a relative 1e-6 (1e-9 with symbols).

    20% equals 0.2 and 20. The order in a set, or in a list without brackets, does not matter; elsewhere it does.
    """
    if isinstance(a, Value) and isinstance(b, Value):
        return _same_values(a, b)
    if isinstance(a, Collection) and isinstance(b, Collection):
        if len(a.items) != len(b.items) or (a.brackets != b.brackets and a.brackets and b.brackets):
            return False
        if "{}" in (a.brackets, b.brackets) or a.brackets == b.brackets == "":
            return _same_sets(a.items, b.items)
        return all(same(x, y) for x, y in zip(a.items, b.items, strict=True))
    group, single = (a, b) if isinstance(a, Collection) else (b, a)
    assert isinstance(group, Collection)
    return group.brackets == "{}" and len(group.items) == 1 and same(group.items[0], single)


def _same_values(a: Value, b: Value) -> bool:
    scales = (1, 100) if a.percent != b.percent else (1,)
    if a.percent and not b.percent:
        a, b = b, a
    return any(_agree(a.at, [value / scale for value in b.at]) for scale in scales)


def _agree(a: Sequence[Number], b: Sequence[Number]) -> bool:
    points = max(len(a), len(b))
    tolerance = 1e-6 if points == 1 else 1e-9
    pairs = zip(tuple(a) * (points // len(a)), tuple(b) * (points // len(b)), strict=True)
    return all(_close(x, y, tolerance) for x, y in pairs)


def _close(a: Number, b: Number, tolerance: float) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9)
    except OverflowError:  # one of them is an exact number that no float holds
        return False


def _same_sets(a: Sequence[Expression], b: Sequence[Expression]) -> bool:
    left = list(b)
    for item in a:
        match = next((index for index, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


# ------------------------------------------------------------------------------------------------ text

_SPELLINGS = (
    ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac"), ("\\left", ""), ("\\right", ""),
    ("\\displaystyle", ""), ("\\$", ""), ("$", ""), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", ""), ("\\%", "%"),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\degree", ""), ("°", ""), ("\\!", ""), ("\\,", " "), ("\\;", " "),
    ("\\:", " "), ("\\quad", " "), ("\\ ", " "), ("~", " "), ("{,}", ","), ("\\times", "*"), ("\\cdot", "*"),
    ("\\div", "/"), ("×", "*"), ("·", "*"), ("⋅", "*"), ("÷", "/"), ("−", "-"), ("–", "-"), ("π", "\\pi "),
    ("√", "\\sqrt "), ("∞", "\\infty "), ("²", "^2"), ("³", "^3"), ("\\lbrace", "\\{"), ("\\rbrace", "\\}"),
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_UNIT = re.compile(
    r"(?<=[\d)}\s])\s*(?:(?:square|cubic)\s+)?(?:[mckµ]?m|km|inch(?:es)?|feet|foot|ft|yards?|miles?|[mk]?g|grams?|kilograms?"
    r"|m?s|sec(?:onds?)?|min(?:utes?)?|h|hours?|days?|weeks?|months?|years?|[mc]?l|lit(?:er|re)s?|(?:centi|milli|kilo)?"
    r"met(?:er|re)s?|degrees?|deg|dollars?|cents?|euros?|units?|points?|percent)(?:\s*\^\{?[23]\}?)?$"
)


def simplified(text: str) -> str:
    """One spelling of what can be spelt in several ways; words and units stay, white space is one blank."""
    if len(text) > MOST_CHARACTERS:
        return text.strip()
    for spelling, one in _SPELLINGS:
        text = text.replace(spelling, one)
    text = _TEXT.sub(r" \1 ", text)
    if not any(bracket in text for bracket in "([{"):
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return " ".join(text.split()).removesuffix(".").strip()


def _without_unit(text: str) -> str:
    number = _UNIT.sub("", text).strip()
    return f"{number}%" if number != text and text.endswith("percent") else number or text


_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?)|(?P<command>\\[A-Za-z]+|\\[{}|])"
    r"|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^!()\[\]{},;=%|_:]))"
)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise Unreadable(f"{text[place : place + 10]!r} is no part of an expression")
        tokens.append({"**": "^", ":": "/", ";": ",", "and": ",", "or": ","}.get(match[0].strip(), match[0].strip()))
        place = match.end()
    if not tokens or len(tokens) > _MOST_TOKENS:
        raise Unreadable(f"{len(tokens)} tokens; expected 1 to {_MOST_TOKENS}")
    return tokens


# ------------------------------------------------------------------------------------------------ grammar

_OPEN = {"(": "(", "[": "[", "{": "{", "\\{": "{"}
_CLOSE = {")": ")", "]": "]", "}": "}", "\\}": "}"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "ln": math.log, "exp": math.exp,
    "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e}
_SYMBOLS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega infty ell hbar".split()
)


def _expression(tokens: list[str], depth: int) -> Expression:
    """A value, or a collection of expressions."""
    if depth > _DEEPEST:
        raise Unreadable(f"nested more than {_DEEPEST} deep")
    brackets, parts = _parts(tokens)
    if len(parts) == 1 and brackets in ("", "()", "[]"):
        return _value(_right_side(parts[0]))
    if not parts:
        raise Unreadable("nothing between brackets")
    return Collection(brackets, tuple(_expression(part, depth + 1) for part in parts))


def _parts(tokens: list[str]) -> tuple[str, list[list[str]]]:
    """Brackets around a whole list ("" where there are none, or no list), and what stands between its commas."""
    inner, closed_by = tokens[1:-1], _CLOSE.get(tokens[-1], "")
    is_set = tokens[0] == "\\{"
    if tokens[0] in _OPEN and closed_by and _is_balanced(inner):
        parts = _between_commas(inner)
        if is_set or len(parts) > 1:
            return _OPEN[tokens[0]] + closed_by, parts
    parts = _between_commas(tokens)
    return "", parts if len(parts) > 1 else [tokens]


def _is_balanced(tokens: list[str]) -> bool:
    depth = 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _between_commas(tokens: list[str]) -> list[list[str]]:
    """Tokens between commas outside of brackets; "1, 2, and 3" has an empty part, which is left out."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def _right_side(tokens: list[str]) -> list[str]:
    """What `x = ...` or `f(x) = ...` says that the left side is."""
    if tokens.count("=") != 1:
        return tokens
    sign = tokens.index("=")
    left = tokens[:sign]
    named = len(left) == 1 or (len(left) == 4 and left[1] == "(" and left[3] == ")")
    return tokens[sign + 1 :] if named and left[0][:1].isalpha() else tokens


def _value(tokens: list[str]) -> Value:
    percent = tokens[-1:] == ["%"]
    if percent:
        tokens = tokens[:-1]
    values: list[Number] = []
    for trial in range(_TRIALS):
        parser = _Parser(tokens, trial)
        values.append(parser.value())
        if not parser.symbols:
            break
    return Value(tuple(values), percent)


class _Parser:
    """Computes the value of tokens while it reads them; one parser for one reading.

    sum      product (+|- product)*
    product  power ((*|/)? power)*
    power    - power | atom !* (^ power)?
    """

    def __init__(self, tokens: list[str], trial: int) -> None:
        self._left = tokens[::-1]
        self._trial = trial
        self._depth = 0
        self.symbols: set[str] = set()

    def value(self) -> Number:
        found = self._sum()
        if self._left:
            raise Unreadable(f"{self._left[-1]!r} is not expected there")
        return found

    @property
    def _next(self) -> str:
        return self._left[-1] if self._left else ""

    def _take(self, expected: str = "") -> str:
        if not self._left or (expected and self._next != expected):
            raise Unreadable(f"{self._next or 'the end'!r} where {expected or 'more'!r} is expected")
        return self._left.pop()

    def _sum(self) -> Number:
        total = self._product()
        while self._next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            total = _bounded(total + sign * self._product())
        return total

    def _product(self) -> Number:
        before = self._next
        value = self._power()
        while self._next in ("*", "/") or self._starts_atom(self._next):
            if self._next == "/":
                self._take()
                value = _bounded(value / self._power())
            elif self._next == "*":
                self._take()
                value = _bounded(value * self._power())
            elif self._next == "\\frac" and before.isdigit() and isinstance(value, Fraction):
                value = _bounded(value + self._power())  # the mixed number 1\frac{1}{2}
            elif self._next[0].isdigit() and before[:1].isdigit():
                raise Unreadable("two numbers without a sign between them")
            else:
                value = _bounded(value * self._power())
            before = ""
        return value

    @staticmethod
    def _starts_atom(token: str) -> bool:
        return (
            token[:1].isalnum() or token[:1] == "." or token in ("(", "[", "{") or token[:2].lstrip("\\")[:1].isalpha()
        )

    def _power(self) -> Number:
        sign: Number = Fraction(1)
        while self._next in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        base = self._atom()
        while self._next == "!":
            self._take()
            base = _factorial(base)
        if self._next == "^":
            self._take()
            base = _power(base, self._deeper(self._power))
        return sign * base

    def _deeper(self, read: Callable[[], Number]) -> Number:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable(f"nested more than {_DEEPEST} deep")
        value = read()
        self._depth -= 1
        return value

    def _atom(self) -> Number:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token)
        if token in ("(", "[", "{", "|", "\\|"):
            value = self._deeper(self._sum)
            self._take(_CLOSING.get(token, token))
            return -value if token in ("|", "\\|") and value < 0 else value
        return self._named(token.removeprefix("\\"), command=token[0] == "\\")

    def _named(self, name: str, command: bool) -> Number:
        if name == "frac":
            top = self._argument()
            return _bounded(top / self._argument())
        if name == "sqrt":
            degree: Number = Fraction(2)
            if self._next == "[":
                self._take()
                degree = self._deeper(self._sum)
                self._take("]")
            return _root(self._deeper(self._atom), degree)
        if name in _FUNCTIONS:
            try:
                return _FUNCTIONS[name](float(self._deeper(self._power)))
            except ValueError as error:
                raise Unreadable(f"{name}: {error}") from error
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if not (name in _SYMBOLS if command else len(name) == 1 and name.isalpha()):
            raise Unreadable(f"{name!r} is no symbol")
        return self._symbol(name)

    def _argument(self) -> Number:
        r"""What `\frac` takes: a group, or one digit of a number."""
        if self._next.isdigit() and len(self._next) > 1:
            digits = self._take()
            self._left.append(digits[1:])
            return Fraction(digits[0])
        return self._deeper(self._atom)

    def _symbol(self, name: str) -> float:
        if self._next == "_":
            self._take()
            grouped = self._next == "{"
            if grouped:
                self._take()
            name = f"{name}_{self._take()}"
            if grouped:
                self._take("}")
        self.symbols.add(name)
        return random.Random(f"{self._trial} {name}").uniform(1.0, 2.0)


# ------------------------------------------------------------------------------------------------ bounded arithmetic


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction):
        return value if _bits(value) <= _MOST_BITS else float(value)
    if not math.isfinite(value):
        raise OverflowError("a number beyond the largest float")
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1 and _bits(base) * abs(exponent) <= _MOST_BITS:
            return Fraction(base**exponent.numerator)
        if exponent.numerator == 1:
            return _root(base, Fraction(exponent.denominator))
    powered: float | complex = float(base) ** float(exponent)
    if isinstance(powered, complex):
        raise Unreadable("a broken power of a negative number")
    return _bounded(powered)


def _root(value: Number, degree: Number) -> Number:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 100:
        raise Unreadable(f"a root of degree {float(degree):g}")
    n = degree.numerator
    if value < 0:
        if n % 2 == 0:
            raise Unreadable("an even root of a negative number")
        return -_root(-value, degree)
    if isinstance(value, Fraction):
        top, bottom = _exact_root(value.numerator, n), _exact_root(value.denominator, n)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    return math.pow(value, 1 / n)


def _exact_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    else:
        root = round(value ** (1 / n))
    return root if root**n == value else None


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise Unreadable("the factorial of what is no whole number")
    if value > 1000:
        raise OverflowError("a factorial beyond 1000!")
    return Fraction(math.factorial(value.numerator))
