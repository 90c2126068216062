"""Every reward there is, with what one should know before using it: the table of `flowrl reward list`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.card import Card, obstacles
from rewards.resolve import available, build, resolve
from rewards.types import RewardError, Traits, traits_of

NO_CARD = Card(source="–", licence="–")
"""Of a reward that does not say where it comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One reward as the table shows it."""

    name: str
    summary: str
    """First line of its docstring."""
    traits: Traits
    card: Card
    obstacles: tuple[tuple[str, str], ...]
    """(what is missing on this machine, the command that mends it); empty where it can run."""

    @property
    def runs(self) -> bool:
        """Whether it can run here and now."""
        return not self.obstacles

    @property
    def size(self) -> str:
        """Memory of its weights."""
        if self.card.memory_gb is None:
            return "–" if not self.card.weights else "?"
        return f"{self.card.memory_gb:.2g} GB"

    @property
    def range(self) -> str:
        """Lowest to highest score."""
        return "–" if self.traits.range is None else f"{self.traits.range[0]:g} … {self.traits.range[1]:g}"


def catalogue() -> list[Listed]:
    """All rewards that have a name; nothing is loaded. One that cannot even be imported is listed with its error."""
    return [_listed(name) for name in available()]


def _listed(name: str) -> Listed:
    try:
        return describe(name)
    except RewardError as error:  # an entry point of another package
        return Listed(
            name=name, summary="", traits=Traits(), card=NO_CARD, obstacles=((str(error), "mend its package"),)
        )


def describe(name: str, options: Mapping[str, Any] | None = None) -> Listed:
    """One reward by its name or path; with `options`, as it would be with them."""
    target = resolve(name)
    try:
        reward: Any = build(target, options)
    except RewardError:
        if options or not getattr(getattr(target, "card", None), "options", ()):
            raise
        reward = target  # it needs an option: what its class says is all there is to say
    traits = traits_of(reward)
    card = traits.card or NO_CARD
    given = frozenset(options or ())
    return Listed(
        name=name,
        summary=summary_of(target),
        traits=traits,
        card=card,
        obstacles=tuple(found for found in obstacles(card) if found[0].removeprefix("option ") not in given),
    )


def summary_of(target: Any) -> str:
    """First line of what a reward says about itself."""
    text = inspect.getdoc(target) or ""
    return text.splitlines()[0] if text else ""


def options_of(name: str) -> list[tuple[str, str]]:
    """The options of a reward and their defaults, as text."""
    target = resolve(name)
    parameters = list(inspect.signature(target).parameters.values()) if callable(target) else []
    if not inspect.isclass(target):
        parameters = [p for p in parameters if p.default is not p.empty]
    return [
        (p.name, "needed" if p.default is p.empty else repr(p.default))
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
