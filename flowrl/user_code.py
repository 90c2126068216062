"""What is told of a function that a user wrote: an exception with the line of its file, a form that does not fit."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any


def told(error: BaseException) -> str:
    """An exception that a call of somebody's function raised, "KeyError: 'unit' (mine.py:12)".

    To be asked where the exception is caught, in the file that made the call. The line is the last one of the first
    other file that the call led to; none where it led to none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    caller = frames[0].filename
    own = next((frame.filename for frame in frames if frame.filename != caller), caller)
    lines = [frame.lineno for frame in frames[1:] if frame.filename == own]
    return f"{type(error).__name__}: {error}" + (f" ({own}:{lines[-1]})" if lines else "")


def misfit(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Why a function cannot be called with these arguments; "" where it can, or does not say."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C do not tell theirs
        return ""
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        return f"takes {signature}: {error}"
    return ""
