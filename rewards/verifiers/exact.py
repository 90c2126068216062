"""The same words."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

from rewards.types import RewardContractError
from rewards.verifiers.extract import answer_of
from rewards.verifiers.types import verifier


@verifier()
def exact(
    response: str, answer: Any, mismatch: Literal["wrong", "unknown"] = "wrong", strict: bool = False
) -> float | None:
    """1 if the answer is the right one, or one of a list, but for case, white space and a full stop at the end.

    mismatch   wrong: 0 otherwise; unknown: no verdict otherwise, so that a judge can be asked (`verifiers.judge`)
    strict     only a marked answer counts
    """
    if mismatch not in ("wrong", "unknown"):
        raise RewardContractError(f"exact: mismatch is {mismatch!r}; expected wrong or unknown")
    right = [str(each) for each in (answer if isinstance(answer, list | tuple) else [answer])]
    said = answer_of(response, strict=strict)
    if said is not None and folded(said) in [folded(each) for each in right]:
        return 1.0
    return None if mismatch == "unknown" and said is not None else 0.0


def folded(text: str) -> str:
    """Without differences of case, width of letters, and white space, and without a full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").strip()
