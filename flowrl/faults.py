"""Dying on purpose, so that tests can kill a run at the very places where it would hurt."""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "FLOWRL_FAULT"

_reached: Counter[str] = Counter()


def fault(point: str) -> None:
    """Kill this process with SIGKILL when `FLOWRL_FAULT=point[:n]` names this point and it is reached the n-th time.

    SIGKILL and not an exception: no handler, no `finally` and no buffer flush runs, just as in a power cut.
    """
    asked, _, count = os.environ.get(VARIABLE, "").partition(":")
    if asked != point:
        return
    _reached[point] += 1
    if _reached[point] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
