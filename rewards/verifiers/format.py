"""Is the response of the form that was asked for? It says nothing about what it answers.

GLM-4.5V trains without such a reward, since a model that was shown the form keeps it; as a gate or with a small weight
it does less harm than as a summand of its own: {use: verifiers.format.thinking, weight: 0, gate: {min: 1}}.
"""

from __future__ import annotations

from rewards.verifiers.extract import last_boxed, spoken
from rewards.verifiers.types import verifier

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@verifier()
def thinking(response: str) -> float:
    """1 if it is `<think>...</think> <answer>...</answer>` and nothing else, each tag once (DeepSeek-R1), else 0."""
    return float(_once_each(response) and _in_form(response.strip()))


@verifier()
def tags(response: str) -> float:
    """A quarter for each of `<think>`, `</think>`, `<answer>` and `</answer>` that is there exactly once (V-Triune)."""
    return sum(response.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


@verifier()
def boxed(response: str) -> float:
    r"""1 if what is said after thinking has a balanced `\boxed{...}`, else 0."""
    return float(last_boxed(spoken(response)) is not None)


def _once_each(response: str) -> bool:
    return all(response.count(tag) == 1 for tag in _TAGS)


def _in_form(response: str) -> bool:
    """The four tags in their order, with white space between the second and the third, and nothing outside."""
    thought, _, rest = response.partition("</think>")
    return thought.startswith("<think>") and rest.lstrip().startswith("<answer>") and rest.endswith("</answer>")
