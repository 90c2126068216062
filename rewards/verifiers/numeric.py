"""Numbers that may be a little off: values read from charts, measurements, regression.

p is the number that the response gives (`rewards.verifiers.extract`, then the last number in it), g the right one in
`meta["answer"]`. A percent sign on one side only may be read either way: "20%" is 20 and 0.2.
"""

from __future__ import annotations

from typing import Any

from rewards.verifiers._numbers import Quantity, quantity_of, readings, right_quantity
from rewards.verifiers.types import verifier


@verifier()
def within(response: str, answer: Any, tolerance: float = 0.05, strict: bool = False) -> float:
    """1 if |p - g| <= tolerance |g|, else 0; 5% is ChartQA's relaxed accuracy (arXiv:2203.10244).

    tolerance   relative; absolute where g = 0
    strict      only a marked answer counts
    """
    right, said = right_quantity(answer), quantity_of(response, strict)
    if said is None:
        return 0.0
    bound = tolerance * (abs(right.value) or 1.0) * (1 + 1e-12)  # 0.05 * 20 is a hair below 21 - 20 in floats
    return float(any(abs(value - right.value) <= bound for value in readings(said, right)))


@verifier()
def regression(response: str, answer: Any, strict: bool = False) -> float:
    """1 - min(1, |p - g| / |g|) (Video-R1, arXiv:2503.21776); where g = 0, 1 for 0 and else 0."""
    right, said = right_quantity(answer), quantity_of(response, strict)
    if said is None:
        return 0.0
    if right.value == 0:
        return float(said.value == 0)
    return max(1 - min(1.0, abs(value - right.value) / abs(right.value)) for value in readings(said, right))


@verifier()
def rounded(response: str, answer: Any, decimals: int = 2, strict: bool = False) -> float:
    """1 if p and g are equal to `decimals` places and both are, or both are not, written with some (Video-R1)."""
    right, said = right_quantity(answer), quantity_of(response, strict)
    if said is None or _has_decimals(said) != _has_decimals(right):
        return 0.0
    return float(round(said.value, decimals) == round(right.value, decimals))


def _has_decimals(number: Quantity) -> bool:
    return "." in number.written
