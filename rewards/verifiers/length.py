"""How long is the response? Punishments of what is too long, in tokens as the sampler counts them.

`verifiers.cosine` lets the worth of a right or wrong answer depend on its length instead.
"""

from __future__ import annotations

from rewards.types import RewardContractError
from rewards.verifiers.types import NoVerdict, verifier


@verifier(range=(-1.0, 0.0))
def overlong(response: str, tokens: int | None, limit: int = 20480, buffer: int = 4096, floor: bool = True) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476) of n tokens: 0 up to limit - buffer, -1 from the limit.

        ((limit - buffer) - n) / buffer in between

    `floor: false` lets it fall below -1 beyond the limit, as verl and AReaL do; its range is then no range.
    """
    if not 0 < buffer <= limit:
        raise RewardContractError(f"overlong: limit is {limit}, buffer is {buffer}; expected 0 < buffer <= limit")
    punishment = min(0.0, (limit - buffer - known(tokens)) / buffer)
    return max(-1.0, punishment) if floor else punishment


@verifier(range=(-1.0, 0.0))
def truncated(response: str, truncated: bool) -> float:
    """-1 if the limit of tokens cut the response off, else 0; the sampler says so (`Answer.truncated`)."""
    return -float(truncated)


def known(tokens: int | None) -> int:
    """The number of tokens; NoVerdict where nobody counted them."""
    if tokens is None:
        raise NoVerdict("Answer.tokens is not given, so its length is unknown")
    return tokens
