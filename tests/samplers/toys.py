"""Velocities that are known in closed form, and one small fixed network; for any test that needs a toy model."""

import math

import torch
from torch import Tensor

from samplers import rows


def gaussian_velocity(x: Tensor, t: Tensor, mean: float = 2.0, std: float = 0.5) -> Tensor:
    """Exact velocity E[eps - x0 | x_t] for data N(mean, std^2) in every dim; linear in x."""
    t = rows(t, x)
    variance = ((1 - t) * std) ** 2 + t**2
    surprise = (x - (1 - t) * mean) / variance
    return t * surprise - (mean + (1 - t) * std**2 * surprise)


def mixture_velocity(x: Tensor, t: Tensor, centres: Tensor, std: float) -> Tensor:
    """Exact velocity for an even mixture of N(centre, std^2); x [N, D], centres [K, D]."""
    t = rows(t, x)
    variance = ((1 - t) * std) ** 2 + t**2
    away = x[:, None] - (1 - t)[..., None] * centres
    weight = (-away.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    surprise = (weight * away).sum(1) / variance
    return t * surprise - ((weight * centres).sum(1) + (1 - t) * std**2 * surprise)


class ToyNet:
    """velocity(x, t, prompt): a fixed two-layer network on [N, *L], different for every prompt; no global seed."""

    def __init__(self, shape: tuple[int, ...], hidden: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        dim = math.prod(shape)
        self.first = torch.randn(dim + 2, hidden, generator=generator) / math.sqrt(dim + 2)
        self.second = torch.randn(hidden, dim, generator=generator) / math.sqrt(hidden)

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """[N, *L] -> [N, *L]."""
        features = torch.cat([x.flatten(1), t[:, None], prompt[:, None].to(x) / 10], 1)
        return (torch.tanh(features @ self.first) @ self.second).view_as(x)
