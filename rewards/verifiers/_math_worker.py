"""The process in which math-verify runs: a line of JSON [gold, answer] in, a line of JSON true, false or null out.

Its own process, because math-verify stops what takes too long by a signal, which only a main thread may use, and
because the memory and the time of a computer algebra system have no bound. Only LaTeX is parsed: its parser builds an
expression from a grammar, whereas sympy's parser of plain expressions would run a text as code.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY = 4 << 30


def main() -> None:
    """Answer until the input ends."""
    _limit_memory()
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)

    def read(text: str) -> Any:
        configs = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
        boxed = "\\boxed{" + text + "}"
        return parse(boxed, configs, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            gold, answer = (read(text) for text in json.loads(line))
            verdict = bool(verify(gold, answer, float_rounding=6, timeout_seconds=None)) if gold else None
        except Exception:  # whatever a computer algebra system makes of a strange text: it does not know
            verdict = None
        print(json.dumps(verdict), flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the time alone is bounded
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main()
