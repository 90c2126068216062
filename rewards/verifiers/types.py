"""What a verifier sees and what it answers.

    @verifier(range=(0, 1), wants=("options",))
    def mine(response, answer, options=None, tolerance=0.05): ...

The parameters' names tell what is meant, the first one being `response`:

    prompt, tokens, truncated, meta   that field of the `Answer`
    progress                          how far the training is, 0 to 1; None where the caller does not say
    without a default (answer)        a key of `Answer.meta`, without which there is no verdict
    named in `wants` (options)        a key of `Answer.meta` where it has one
    any other with a default          an option of the config
    **columns                         every other key of `Answer.meta`

It returns a number, None for no verdict, or a `Verdict`; it may raise `NoVerdict("why")`. A class with
`score(answers)`, or `score(answers, progress)`, is a verifier too: N answers in, N scores out, as rewards do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rewards.types import RewardContractError, ScoreLike

FIELDS = ("prompt", "tokens", "truncated", "meta")
"""Parameters of a verifier that are fields of the answer."""


class NoVerdict(ValueError):
    """A verifier cannot say whether an answer is right; the message says why. It is never a 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a model wrote for one prompt.

    Example: `Answer("<answer>3</answer>", prompt="How many dogs?", group=2, meta={"answer": 3, "source": "clevr"})`
    """

    response: str
    """All of it, as decoded, thinking included."""
    prompt: str = ""
    group: int = 0
    """Answers of one group are to the same prompt and are compared with each other."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt's row in the data set carries besides the text: the right answer, its source, options, boxes."""
    tokens: int | None = None
    """How many tokens the model wrote; None where it is unknown."""
    truncated: bool = False
    """The limit of tokens cut it off; the sampler says so, the text cannot."""

    def __post_init__(self) -> None:
        """Refuse what no verifier could read."""
        if not isinstance(self.response, str):
            raise RewardContractError(
                f"Answer.response is a {type(self.response).__name__}; expected one decoded str. "
                "Mend: make one Answer per sample, with tokenizer.decode(ids)."
            )
        if self.tokens is not None and (isinstance(self.tokens, bool) or not isinstance(self.tokens, int)):
            raise RewardContractError(f"Answer.tokens is {self.tokens!r}; expected how many tokens it has, or None")


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """A verifier's answer with more than a number."""

    value: float | None
    """None or NaN: no verdict."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named components worth logging."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What was read; `error` says why there is no verdict."""


class TextReward(Protocol):
    """A verifier with its options bound, as `rewards.verifiers.names.build` makes it."""

    range: tuple[float, float] | None
    needs: tuple[str, ...]

    def score(self, answers: Sequence[Answer], progress: float | None = None) -> ScoreLike:
        """N answers in, N scores out."""
        ...


F = TypeVar("F", bound=Callable[..., Any])


def verifier(*, range: tuple[float, float] | None = (0.0, 1.0), wants: Sequence[str] = ()) -> Callable[[F], F]:
    """Mark a function as a verifier that is found by its name: lowest and highest score, and the metadata it may use.

    What it needs is in its signature. A function that is given as an object or by its path needs no mark.
    """
    if isinstance(wants, str):
        raise RewardContractError(f"wants = {wants!r}; expected a tuple of keys: wants = ({wants!r},)")

    def mark(function: F) -> F:
        unknown = set(wants) - set(inspect.signature(function).parameters)
        if unknown:
            raise RewardContractError(f"{function.__name__}: wants {', '.join(sorted(unknown))}, which is no parameter")
        function.__verifier__ = True  # type: ignore[attr-defined]
        function.range, function.wants = range, tuple(wants)  # type: ignore[attr-defined]
        return function

    return mark


def is_verifier(value: object) -> bool:
    """Whether something is a marked function, or a class with `score`."""
    if inspect.isclass(value):
        return callable(getattr(value, "score", None)) and not getattr(value, "_is_protocol", False)
    return inspect.isfunction(value) and hasattr(value, "__verifier__")
