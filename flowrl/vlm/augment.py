"""What is done to a question before it is asked: distorted or masked pictures, and help where all answers are wrong.

Everything here is a pure function of its arguments; what is random is keyed by (seed, iteration, prompt), so that it
depends neither on the order of the prompts nor on the number of processes.

    NoisyRollout   a part of a group's answers see a distorted picture; the update shows all of them the clean one
    masked         patches blacked out, for PAPO's perception term
    shuffled       a question's videos with their frames in another order, for T-GRPO's comparison
    hint           a dead group's question again, with the beginning of the gold solution (GHPO)
    inpaint        the same, but the answer itself begins with it (after IGPO)
    correct        some of its wrong answers are replaced by the gold solution (EDGE-GRPO)

The last three take a `Prompt` whose metadata hold a `solution`, and return the prompt for the next try, or None where
there is nothing (more) to give away. A prompt says by its own metadata how far it has been helped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from flowrl.resolve import ResolveError, nearest, resolve
from flowrl.user_code import misfit, told
from samplers import stable_seed

if TYPE_CHECKING:
    from flowrl.types import Prompt

Picture = Image.Image

SOLUTION = "solution"
"""Metadata: a gold answer, thinking included."""
GIVEN = "given"
"""Metadata: the share of the solution that was given away."""
ASKED = "asked"
"""Metadata: the question without its hint."""
BEGIN = "begin"
"""Metadata: the text that every answer begins with; its tokens are present, and none of them is the policy's choice."""
CORRECTED = "corrected"
"""Metadata: the share of wrong answers that the solution replaces."""

SHUFFLED = "seed_of_shuffled_frames"
"""Metadata: the seed of another order of its videos' frames; no name that a row of one's own has by chance."""

# The last numbers of the keys, which keep their draws apart.
_DISTORTION, _MASK, _CORRECTION, _SHUFFLE = -11, -12, -13, -14


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyRollout:
    """Answers to distorted pictures among a group's, weaker and weaker along the run (arXiv:2504.13055).

    strength_at(p) = strength sigmoid(steepness (midpoint - p)), p = the share of the run that is done

    All distorted answers of a group see the same picture, and share the group's mean and std with the others.
    Note: the paper adds the noise of a diffusion model's step 500; here the strength is the noise's std in pixels of
    [0, 1], or for `blur` the radius and for `crop` the margin as a share of the sides.
    """

    strength: float = 0.5
    """At the start of the run."""
    share: float = 0.5
    """Of a group's answers."""
    kind: Literal["noise", "blur", "crop"] = "noise"
    midpoint: float = 2 / 3
    steepness: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.kind not in _DISTORTIONS:
            raise ValueError(f"noisy.kind is {self.kind!r}; write one of {', '.join(_DISTORTIONS)}.")
        if not (0 <= self.share <= 1 and self.strength >= 0):
            raise ValueError(f"noisy: share={self.share} in [0, 1] and strength={self.strength} >= 0 are needed.")

    def strength_at(self, progress: float) -> float:
        """The strength after this share of the run."""
        return self.strength / (1 + math.exp(self.steepness * (progress - self.midpoint)))

    def members(self, count: int) -> list[bool]:
        """Which of a group's answers see the distorted picture: the last ones."""
        noisy = math.floor(self.share * count + 0.5)
        return [member >= count - noisy for member in range(count)]

    def pictures(
        self, pictures: Sequence[Picture], progress: float, *, seed: int, iteration: int, prompt: int
    ) -> list[Picture]:
        """A prompt's pictures, distorted."""
        strength, distort = self.strength_at(progress), _DISTORTIONS[self.kind]
        keys = [(seed, iteration, prompt, number, _DISTORTION) for number in range(len(pictures))]
        return [distort(picture, strength, _random(*key)) for picture, key in zip(pictures, keys, strict=True)]


def _noise(picture: Picture, std: float, random: np.random.Generator) -> Picture:
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    noisy = pixels + 255 * std * random.standard_normal(pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _blur(picture: Picture, radius: float, random: np.random.Generator) -> Picture:
    return picture.convert("RGB").filter(ImageFilter.GaussianBlur(radius * min(picture.size)))


def _crop(picture: Picture, margin: float, random: np.random.Generator) -> Picture:
    width, height = (max(1, round(side * (1 - min(margin, 1.0)))) for side in picture.size)
    left, top = (int(random.integers(0, free + 1)) for free in (picture.width - width, picture.height - height))
    part = picture.convert("RGB").crop((left, top, left + width, top + height))
    return part.resize(picture.size, Image.Resampling.BICUBIC)


_DISTORTIONS: dict[str, Callable[[Picture, float, np.random.Generator], Picture]] = {
    "noise": _noise,
    "blur": _blur,
    "crop": _crop,
}


def masked(
    picture: Picture, share: float, *, seed: int, iteration: int, prompt: int, number: int = 0, patch: int = 14
) -> Picture:
    """A picture with a share of its patches black, drawn without replacement (PAPO, arXiv:2507.06448: 0.6).

    `patch` is the side of a patch in pixels, those at the right and lower border may be cut; `number` says which of
    the prompt's pictures it is.
    """
    if not (0 <= share <= 1 and patch >= 1):
        raise ValueError(f"masked: share={share} in [0, 1] and patch={patch} >= 1 are needed.")
    pixels = np.array(picture.convert("RGB"))
    rows, columns = (-(-side // patch) for side in pixels.shape[:2])
    black = np.zeros(rows * columns, dtype=bool)
    black[_random(seed, iteration, prompt, number, _MASK).permutation(len(black))[: round(share * len(black))]] = True
    grid = black.reshape(rows, columns).repeat(patch, 0).repeat(patch, 1)
    pixels[grid[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels)


def shuffled(prompt: Prompt, *, key: Sequence[int]) -> Prompt:
    """The question about the same videos with their frames out of order (T-GRPO, arXiv:2503.21776)."""
    return replace(prompt, metadata={**prompt.metadata, SHUFFLED: stable_seed(*key, _SHUFFLE)})


def out_of_order(frames: Sequence[Picture], seed: int, number: int) -> list[Picture]:
    """The frames of a question's `number`th video, never in their own order where there are two or more."""
    order = _random(seed, number).permutation(len(frames)).tolist()
    if order == sorted(order):
        order.reverse()
    return [frames[place] for place in order]


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(stable_seed(*key))


# ------------------------------------------------------------------------------------------------ dead groups

Hook = Callable[["Prompt"], "Prompt | None"]
"""hook(prompt of a dead group) -> the prompt of its next try, or None."""


class HookError(ValueError):
    """A help for dead groups of one's own fails; the message names it, what it did, and how to mend it."""


SHARES = (0.25, 0.5, 0.75)
"""Shares of the solution that are given away, try after try (GHPO)."""


def hint(prompt: Prompt) -> Prompt | None:
    """The question with the first words of the solution under it, a larger share each time (GHPO, arXiv:2507.10628).

    The update sees the hint too: the answers were given to it. None after the last share, and without a solution.
    """
    share, begin = _next_part(prompt)
    if not begin:
        return None
    question = prompt.metadata.get(ASKED, prompt.text)
    text = f"{question}\nHint: the solution begins with: {begin}"
    return replace(prompt, text=text, metadata={**prompt.metadata, GIVEN: share, ASKED: question})


def inpaint(prompt: Prompt) -> Prompt | None:
    """The question, whose answers begin with the first words of the solution (after IGPO, arXiv:2509.10396).

    Note: IGPO fills fragments into any place of what a diffusion model writes; a model that writes from left to right
    can only go on after one.
    """
    share, begin = _next_part(prompt)
    if not begin:
        return None
    return replace(prompt, metadata={**prompt.metadata, GIVEN: share, BEGIN: begin})


def correct(prompt: Prompt, share: float = 0.5) -> Prompt | None:
    """The question, of whose wrong answers a share is replaced by the solution (EDGE-GRPO, arXiv:2507.21848).

    `corrections` says which. None without a solution, and for a prompt that was treated already.
    """
    if not _solution(prompt) or CORRECTED in prompt.metadata:
        return None
    return replace(prompt, metadata={**prompt.metadata, CORRECTED: share})


def corrections(prompt: Prompt, is_wrong: Sequence[bool], *, seed: int, iteration: int) -> list[int]:
    """Which of a prompt's answers its solution replaces: a share of the wrong ones, at least one, but never all.

    None are, unless `correct` has treated the prompt. The tokens of the solution are none that the policy chose: it
    has to score them, and they are off its policy.
    """
    wrong = [member for member, is_it in enumerate(is_wrong) if is_it]
    share = prompt.metadata.get(CORRECTED)
    if share is None or not wrong:
        return []
    count = min(max(1, round(share * len(wrong))), len(is_wrong) - 1)
    order = _random(seed, iteration, prompt.id, _CORRECTION).permutation(len(wrong))
    return sorted(wrong[place] for place in order[:count].tolist())


def _next_part(prompt: Prompt) -> tuple[float, str]:
    """The next share of a prompt's solution and its words; no words where there is no such share."""
    given = prompt.metadata.get(GIVEN, 0.0)
    share = next((share for share in SHARES if share > given), None)
    return (0.0, "") if share is None else (share, first_words(_solution(prompt), share))


def first_words(text: str, share: float) -> str:
    """The first `share` of a text's words, rounded up, but never all of them."""
    words = list(re.finditer(r"\S+", text))
    count = min(math.ceil(share * len(words)), len(words) - 1)
    return text[words[0].start() : words[count - 1].end()] if count > 0 else ""


def _solution(prompt: Prompt) -> str:
    solution = prompt.metadata.get(SOLUTION)
    return solution if isinstance(solution, str) else ""


def hook(name: str) -> Hook:
    """What `data.on_dead_group` names: hint, inpaint, correct, package.module:attribute, or ./file.py:attribute.

    ResolveError where there is no such function. One of one's own raises HookError where it fails or answers with
    something else than a prompt or None.
    """
    built_in: dict[str, Hook] = {"hint": hint, "inpaint": inpaint, "correct": correct}
    if name in built_in:
        return built_in[name]
    if ":" not in name and not name.endswith(".py"):
        raise ResolveError(
            f"data.on_dead_group: there is no {name!r}{nearest(name, built_in)}; there are {', '.join(built_in)}, "
            "package.module:attribute and ./file.py:attribute."
        )
    found: Any = resolve(name, "flowrl.vlm")
    if not callable(found):
        raise ResolveError(f"data.on_dead_group: {name!r} is a {type(found).__name__}; give a function of a prompt.")
    if why := misfit(found, None):
        raise ResolveError(f"data.on_dead_group: {name!r} {why}. Give a function of the prompt alone.")
    return partial(_checked, name, found)


def _checked(name: str, own: Callable[[Prompt], Any], prompt: Prompt) -> Prompt | None:
    """What a hook of one's own answers; HookError where that is neither a prompt nor None."""
    from flowrl.types import Prompt

    mend = "Let it return the prompt of the next try (dataclasses.replace(prompt, text=...)), or None to give up."
    try:
        answer = own(prompt)
    except Exception as error:
        raise HookError(
            f"data.on_dead_group: {name} raises {told(error)} for the question {prompt.text[:60]!r}. {mend}"
        ) from error
    if answer is not None and not isinstance(answer, Prompt):
        raise HookError(f"data.on_dead_group: {name} returned {type(answer).__name__} {str(answer)[:60]!r}. {mend}")
    return answer
