"""What a reward sees, what it answers and what it may declare: the whole contract between rewards and everything else.

A reward is any object with `score(samples)`, or a plain function. It may *declare* more about itself through attributes
(see `Traits`); nothing has to be inherited from and nothing has to be registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewards.card import Card

MediaKind: TypeAlias = Literal["image", "video"]
Scope: TypeAlias = Literal["sample", "group"]


class RewardError(RuntimeError):
    """A reward could not be found, built, loaded or run; the message says which, where, and how to mend it."""


class RewardContractError(RewardError):
    """A reward, or what was handed to it, broke the contract of this file: a bug to fix, never a sample to skip."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One generated image or video with the prompt it was made for.

    Example: `Sample(media=torch.rand(3, 64, 64), prompt='a sign that says "open"', group=2, meta={"text": "open"})`
    """

    media: Tensor = field(repr=False)
    """[3, H, W] image or [F, 3, H, W] video, RGB, float in [0, 1]; from the hub fp32 and on the reward's device."""
    prompt: str = ""
    group: int = 0
    """Samples of one group answer the same prompt and are compared with each other."""
    fps: float | None = None
    """Frames per second of a video; None where it is unknown or the media is an image."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt's row in the data set carries besides the text (a target text, a scene, a reference image)."""

    def __post_init__(self) -> None:
        """Refuse media that no reward could read; the values themselves are checked once, by the hub."""
        shape = tuple(self.media.shape)
        if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape:
            raise RewardContractError(
                f"Sample.media has shape {list(shape)}; expected [3, H, W] for an image or [F, 3, H, W] for a video. "
                "One Sample holds one image: make one per image, and permute channels-last data with .permute(2, 0, 1)."
            )
        if not self.media.is_floating_point():
            raise RewardContractError(
                f"Sample.media is {self.media.dtype}; expected floating point in [0, 1]. "
                "Convert bytes with media.float() / 255."
            )

    @property
    def kind(self) -> MediaKind:
        """`"image"` or `"video"`, by the number of dimensions."""
        return "image" if self.media.ndim == 3 else "video"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """A reward's answer for N samples."""

    value: Tensor
    """fp32 [N]; NaN = no verdict. A failure is never 0: a policy would learn that from it."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Named components worth logging, fp32 [N] each."""
    info: list[dict[str, Any]] = field(default_factory=list)
    """Empty, or one dict per sample: what was read, a judge's words; `error` says why there is no verdict.

    `failed: True` beside it: not the sample is to blame but who was asked, such as a server; `on_error: raise` stops.
    """


ScoreLike: TypeAlias = Scores | Tensor | Sequence[float | None]
"""What `score` may return; None in a sequence means the same as NaN."""


@runtime_checkable
class Reward(Protocol):
    """Anything that scores samples. Optional attributes are those of `Traits`, optional methods the two below.

    `load(device, dtype)` brings weights in, and is the only place that may touch the disk, a network, a GPU or a heavy
    import; `unload()` lets them go. A constructor only keeps its options. One that compares images with texts may be
    `Embeds` too.
    """

    def score(self, samples: Sequence[Sample], /) -> ScoreLike:
        """Score all samples in order: N of them in, N values out."""
        ...


class Embeds(Protocol):
    """What a reward may offer besides `score`: features whose product says how well an image fits a text.

    With it the preference for one wording over another can be trained on (SRPO, arXiv:2509.06942): see
    `RewardHub.embedder`. Shapes: N images, M texts, D features.
    """

    scale: float
    """What a product of two features is multiplied with; it may become known in `load`."""

    def image_features(self, media: Tensor, /) -> Tensor:
        """Features [N,D] of length 1 of images [N,3,H,W] in [0,1], with a gradient that reaches them."""
        ...

    def text_features(self, texts: Sequence[str], /) -> Tensor:
        """Features [M,D] of length 1 of the texts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a reward may declare about itself: attributes of these names (a class), or `@declare(...)` (a function)."""

    name: str | None = None
    """Key of its scores; by default the name that it was asked for by."""
    media: frozenset[MediaKind] = frozenset({"image"})
    """What `score` accepts. A reward for images alone judges a video by the mean over some of its frames."""
    scope: Scope = "sample"
    """`"group"`: a score depends on the whole group, so that all of it must be in one call."""
    needs: tuple[str, ...] = ()
    """Keys of `Sample.meta` without which there is no verdict."""
    differentiable: bool = False
    """`score` returns a tensor whose gradient reaches `Sample.media`, where gradients are on and the media ask for one.

    The hub scores with gradients off; `RewardHub.differentiate` is what keeps the graph.
    """
    deterministic: bool = False
    """The same sample always gets the same score, alone or in a batch: it may be cached."""
    range: tuple[float, float] | None = None
    """Lowest and highest possible score, where there are such; `norm: unit` uses it."""
    device: str | None = None
    """Where it wants to run whatever the hub's device (`"cpu"` for rewards that have no GPU code)."""
    card: Card | None = None
    """Origin, licence, weights and dependencies, for `flowrl reward list`."""

    def __post_init__(self) -> None:
        """Refuse what would silently never match."""
        kinds = {self.media} if isinstance(self.media, str) else set(self.media)
        if not kinds or kinds - {"image", "video"}:
            raise RewardContractError(f'media = {self.media!r}; expected a set of "image" and/or "video"')
        if self.scope not in ("sample", "group"):
            raise RewardContractError(f'scope = {self.scope!r}; expected "sample" or "group"')
        if isinstance(self.needs, str):
            raise RewardContractError(f"needs = {self.needs!r}; expected a tuple of keys: needs = ({self.needs!r},)")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise RewardContractError(f"range = {self.range!r}; expected (lowest, highest) with lowest < highest")
        object.__setattr__(self, "media", frozenset(kinds))
        object.__setattr__(self, "needs", tuple(self.needs))


def traits_of(reward: object) -> Traits:
    """Read what a reward declares about itself; whatever it does not mention has `Traits`' default."""
    declared = {key: getattr(reward, key) for key in Traits.__dataclass_fields__ if hasattr(reward, key)}
    return Traits(**declared)


F = TypeVar("F", bound=Callable[..., Any])


def declare(**traits: Any) -> Callable[[F], F]:
    """Mark a function as a reward and declare its traits: `@declare(needs=("text",), range=(0, 1))`.

    A class sets attributes instead, and is known by its `score`. A function given as an object or by its path needs no
    mark: only a module's functions that are to be found by a name do.
    """
    checked = Traits(**traits)

    def mark(function: F) -> F:
        for key in traits:
            setattr(function, key, getattr(checked, key))
        function.__reward__ = True  # type: ignore[attr-defined]
        return function

    return mark


def is_declared(function: object) -> bool:
    """Whether a function was marked as a reward."""
    return inspect.isfunction(function) and hasattr(function, "__reward__")


def no_verdict(count: int) -> Tensor:
    """`count` scores that say nothing: fp32 NaN."""
    return torch.full((count,), float("nan"), dtype=torch.float32)
