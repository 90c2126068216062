"""What one should know about a reward before running it, and whether it can run here: what `flowrl reward list` shows.

A reward says it once, beside its code: `card = Card(...)` in a class, `@declare(card=Card(...))` on a function. Nothing
here loads a reward or asks a network.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field

from rewards.files import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Origin, licence, and what a reward needs in order to run."""

    source: str
    """Paper or repository that it comes from."""
    licence: str = "Apache-2.0"
    """Of code and weights; a reward without weights has this project's. "see its card" where we could not read it."""
    weights: tuple[Weights, ...] = ()
    """What has to be on the disk, or fetched."""
    memory_gb: float | None = None
    """Of the weights in memory, at the precision that they are published in; None without weights, or if unknown."""
    packages: dict[str, str] = field(default_factory=dict)
    """{what is imported: the pip command that installs it}, for what is not a dependency of the package itself."""
    programs: dict[str, str] = field(default_factory=dict)
    """{program on the PATH: the command that installs it}"""
    options: tuple[str, ...] = ()
    """Options without which it cannot run, such as the address of a server."""
    note: str = ""
    """What else decides whether its scores mean anything."""


def obstacles(card: Card | None) -> list[tuple[str, str]]:
    """Why a reward cannot run on this machine as it is: (what is missing, the command that mends it); [] if it can."""
    if card is None:
        return []
    found = [(name, mend) for name, mend in card.packages.items() if importlib.util.find_spec(name) is None]
    found += [(name, mend) for name, mend in card.programs.items() if shutil.which(name) is None]
    found += [(f"option {name}", f"{{use: ..., {name}: ...}}") for name in card.options]
    found += [(f"{each.source}", each.command) for each in card.weights if not each.is_here()]
    return found
