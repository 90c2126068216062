"""Twin prompts of the built-in world: two sentences that differ in one word, each with its true picture.

What Pair-GRPO (FocusDiff, arXiv:2506.05501) trains on. The result is a pair store: each prompt's own picture is chosen,
its twin's rejected, and the metadata field `twin` says which two belong together.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from flowrl.data import DataError
from flowrl.pairs import PAIRS, save_media
from flowrl.shapes.pretrain import misread
from flowrl.shapes.scenes import draw, prompts, render
from rewards.shapes import CATEGORIES, Spec

TWIN = "twin"
_PATIENCE = 5000
"""Draws in a row without a new twin, after which there are no more."""


def twins(count: int, seed: int = 0) -> list[tuple[Spec, Spec]]:
    """`count` different twins of training prompts, the categories in equal shares; DataError if there are fewer."""
    rng = random.Random(seed)
    known = {spec.prompt: spec for spec in prompts("train")}
    pools = [[spec for spec in known.values() if spec.category == category] for category in CATEGORIES]
    found: dict[frozenset[str], tuple[Spec, Spec]] = {}
    attempt = last = 0
    while len(found) < count and attempt - last < _PATIENCE:
        attempt += 1
        spec = rng.choice(pools[attempt % len(pools)])
        other = misread(spec, rng)
        names = frozenset((spec.prompt, other.prompt))
        if other.prompt in known and names not in found:  # what is held out stays so
            found[names], last = (spec, other), attempt
    if len(found) < count:
        raise DataError(f"the built-in world has only about {len(found)} twin prompts; ask for fewer than {count}.")
    return list(found.values())


def write_twins(output: Path, count: int, seed: int = 0) -> None:
    """A pair store of `count` twins, 2 `count` rows, in a folder that does not hold one yet (DataError)."""
    if (output / PAIRS).exists():
        raise DataError(f"{output} holds pairs already; give another folder.")
    pairs = twins(count, seed)
    specs = [spec for pair in pairs for spec in pair]
    pictures = render(draw(specs, seed))
    files = [save_media(picture[None], output, f"{i:05d}") for i, picture in enumerate(pictures)]
    rows = [
        {
            "prompt": spec.prompt, "chosen": files[i], "rejected": files[i ^ 1],
            "metadata": {TWIN: i // 2, "category": spec.category},
        }
        for i, spec in enumerate(specs)
    ]  # fmt: skip
    (output / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
