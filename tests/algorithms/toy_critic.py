"""The toy's rewards with a gradient, by the real critic: latents [N, 2] become flat pictures that show them.

Red is 0.5 + x_0 / 10 and green 0.5 + x_1 / 10, so that a reward can read the latent off the pixels.
"""

import torch
from torch import Tensor

from flowrl.critic import Critic
from rewards import RewardHub, declare

WORDS = {"right": (1.0, 0.2), "left": (-1.0, 0.4), "up": (0.1, 1.0), "down": (0.3, -1.0)}


class Flat:
    """Decodes a latent to a picture of one colour."""

    def decode(self, x0: Tensor) -> Tensor:
        channels = torch.cat([0.5 + x0 / 10, torch.full_like(x0[:, :1], 0.5)], 1)
        return channels[:, None, :, None, None].expand(-1, 1, 3, 4, 4)


def latents(images: Tensor) -> Tensor:
    """The latents [N, 2] that pictures [N, 3, H, W] show."""
    return 10 * (images.mean((2, 3))[:, :2] - 0.5)


@declare(deterministic=True, differentiable=True)
def near_one(images: Tensor, prompts: list[str]) -> Tensor:
    """The toy's reward: -|x0 - 1|^2."""
    return -(latents(images) - 1).square().sum(1)


@declare(deterministic=True, differentiable=True)
def near_one_if_right(images: Tensor, prompts: list[str]) -> Tensor:
    """The same; no verdict for what lies to the left."""
    x0 = latents(images)
    return torch.where(x0[:, 0] < 0, torch.nan, -(x0 - 1).square().sum(1))


class Compass:
    """Features of directions: a picture's is (x_0, x_1, 1), a wording's that of its first word; both normalised.

    `silent`: no features, and so no verdict, for what lies to the left.
    """

    differentiable, scale = True, 2.0

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.asked: list[str] = []

    def image_features(self, media: Tensor) -> Tensor:
        x0 = latents(media)
        features = image_features(x0)
        return torch.where((x0[:, :1] < 0) & self.silent, torch.nan, features)

    def text_features(self, texts: list[str]) -> Tensor:
        self.asked += texts
        return torch.stack([text_features(text) for text in texts])

    def score(self, samples: list) -> Tensor:
        images = self.image_features(torch.stack([sample.media for sample in samples]))
        return (images * self.text_features([sample.prompt for sample in samples])).sum(1)


def image_features(x0: Tensor) -> Tensor:
    """[N, 3] of latents [N, 2]."""
    return torch.nn.functional.normalize(torch.cat([x0, torch.ones_like(x0[:, :1])], 1), dim=1)


def text_features(text: str) -> Tensor:
    """[3] of "word. prompt", a direction; the prompt alone has none."""
    return torch.nn.functional.normalize(torch.tensor([*WORDS.get(text.split(".")[0], (0.0, 0.0)), 0.3]), dim=0)


def critic(*rewards: object) -> Critic:
    """A critic of these rewards, by default `near_one`."""
    return Critic(Flat(), RewardHub(list(rewards) or [near_one]))
