"""What a gradient through a reward needs besides its scores: a graph that starts at the pixels, and at them alone.

DRaFT (arXiv:2309.17400), AlignProp (arXiv:2310.03739), ReFL (arXiv:2304.05977) and SRPO (arXiv:2509.06942) maximise a
reward by its own gradient. Three things go wrong there in silence, and are decided here: a reward whose graph does not
reach the media, weights of the reward that learn along, and 0 * NaN, by which a sample without a verdict poisons
everybody's gradient.
Shapes: N samples, M texts, D features, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from rewards.types import RewardContractError

if TYPE_CHECKING:
    from rewards.scorer import Scorer

EMBEDS = ("image_features", "text_features", "scale")
"""What `rewards.types.Embeds` asks for."""

Answer = TypeVar("Answer")


class Valve:
    """Lets gradients back into x [N, ...] only for the rows that turned out to have a verdict.

    A missing verdict has gradient 0, but 0 times an infinite derivative is NaN, and would reach every weight upstream.
    """

    def __init__(self) -> None:
        """Open for all rows."""
        self._open: Tensor | None = None

    def through(self, x: Tensor) -> Tensor:
        """x itself, with its gradients under this valve's control."""
        if not x.requires_grad:
            return x
        out = x.view_as(x)
        out.register_hook(self._pass)  # type: ignore[no-untyped-call]
        return out

    def close(self, missing: Tensor) -> None:
        """Shut the rows where `missing` [N] is true; a single value shuts all of x."""
        if missing.any():
            self._open = ~missing.detach()

    def _pass(self, gradient: Tensor) -> Tensor:
        if self._open is None:
            return gradient
        is_open = self._open.to(gradient.device).reshape(-1, *[1] * (gradient.ndim - 1))
        return torch.where(is_open, gradient, 0.0)


def reaching(
    name: str, media: Sequence[Tensor], call: Callable[[], Answer], value: Callable[[Answer], Tensor]
) -> Answer:
    """`call()`, whose `value` is sure to have a graph back to the `media` that require grad, and to nothing else.

    Weights of the reward that would learn along are frozen for good, and the call is made once more without them.
    RewardContractError if the reward `name` has a verdict but no graph to the media.
    """
    answer = call()
    entrances = {get_gradient_edge(tensor).node for tensor in media if tensor.requires_grad}
    if not entrances:
        return answer
    found = value(answer)
    reached, weights = _explore(found, entrances)
    if not reached and found.isfinite().any():
        raise RewardContractError(
            f"reward {name!r} declares differentiable = True, but the gradient of its scores does not reach "
            "Sample.media. Mend: keep to torch operations on the media, without .detach(), .item(), numpy, PIL, "
            "rounding, torch.no_grad and torch.inference_mode; or declare differentiable = False."
        )
    if weights:
        for weight in weights:
            weight.requires_grad_(False)
        answer = call()
    return answer


def _explore(value: Tensor, entrances: set[Node]) -> tuple[bool, list[Tensor]]:
    """Whether the graph of `value` comes to one of the entrances, and the leaves that it ends in elsewhere."""
    waiting: list[Node | None] = [get_gradient_edge(value).node] if value.requires_grad else []
    seen: set[Node] = set()
    leaves: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in entrances:  # what lies behind is the caller's: decoder and policy
            continue
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
        waiting.extend(following for following, _ in node.next_functions)
    return bool(seen & entrances), leaves


class Embedder:
    """A reward's image and text features (`rewards.types.Embeds`), loaded at first use; what SRPO compares.

    Not for two threads at a time, nor while a lane of the hub scores with the same reward.
    """

    def __init__(self, scorer: Scorer) -> None:
        """`scorer` holds a reward that has `image_features`, `text_features` and, once loaded, `scale`."""
        self._scorer = scorer

    @property
    def name(self) -> str:
        """The reward's."""
        return self._scorer.name

    @property
    def scale(self) -> float:
        """What the product of two features is multiplied with."""
        return float(self._loaded().scale)

    def image_features(self, media: Tensor) -> Tensor:
        """Features [N,D] fp32 of media [N,3,H,W] in [0,1], with their graph, on the media's device.

        Of a video [N,F,3,H,W] the mean of the features of as many frames as the reward's entry says (`frames`); a
        product with a text is linear in them, so it is the mean of the frames' products.
        """
        reward, scorer = self._loaded(), self._scorer
        if media.ndim == 5:
            count = 1 if media.shape[1] == 1 else scorer.frames
            looks = [int((look + 0.5) * media.shape[1] / count) for look in range(count)]
            return torch.stack([self.image_features(media[:, look]) for look in looks]).mean(0)
        placed = media.to(scorer.device, torch.float32)
        batches = torch.split(placed, scorer.batch_size or max(1, len(placed)))
        features: Tensor = reaching(
            self.name, [placed], lambda: torch.cat([reward.image_features(batch) for batch in batches]), lambda f: f
        )
        return self._checked(features, len(media), "image_features").to(media.device, torch.float32)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features [M,D] fp32 of the texts, without a graph, on the reward's device."""
        features = self._loaded().text_features(list(texts))
        return self._checked(features, len(texts), "text_features").detach().to(self._scorer.device, torch.float32)

    def _loaded(self) -> Any:
        self._scorer.load()
        return self._scorer.reward

    def _checked(self, features: Any, count: int, method: str) -> Tensor:
        shape = list(getattr(features, "shape", ()))
        if not isinstance(features, Tensor) or len(shape) != 2 or shape[0] != count:
            raise RewardContractError(
                f"reward {self.name!r}: {method} returned {type(features).__name__} {shape}; expected a tensor "
                f"[{count}, D], one row of length 1 for each that it was given."
            )
        return features
