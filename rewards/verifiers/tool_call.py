"""Whether a response asked for a tool."""

from __future__ import annotations

import json

from rewards.verifiers.types import verifier

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LONGEST = 4096
"""Characters of a call that is read."""


@verifier(range=(0, 1))
def tool_call(response: str, tool: str | None = None) -> float:
    """1 if there is a call `<tool_call> {"name": ..., "arguments": {...}} </tool_call>`, of `tool` where named, else 0.

    The tool reward of DeepEyes (arXiv:2505.14362) is `{use: verifiers.tool_call, only_where: {right: 1}}`: a bonus for
    right answers alone, since one for any call teaches to call for nothing. Whether the tool could do what it was asked
    is not seen here.
    """
    calls = (part.partition(_CLOSE) for part in response.split(_OPEN)[1:])
    names = [_name(body) for body, close, _ in calls if close]
    return float(any(name is not None and tool in (None, name) for name in names))


def _name(body: str) -> str | None:
    """The tool that a call names; None where it is no call."""
    if len(body) > _LONGEST:
        return None
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("arguments", {}), dict):
        return None
    return call["name"] if isinstance(call.get("name"), str) else None
