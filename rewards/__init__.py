"""How good is it: reward functions for generated images and videos, and a hub that runs them.

    from rewards import RewardHub, Sample

    def warm(images, prompts):                                   # any function is a reward
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

    hub = RewardHub(["pixel.contrast", {"use": warm, "weight": 2.0}])
    result = hub([Sample(media=image, prompt="a sunset")])       # result.total [N], result.scores {name: [N]}

A new reward is one file: see `rewards.types` for what it gets and returns, `rewards.resolve` for how it is named, and
`rewards.scorer` for what happens when it fails.
"""

from rewards.hub import HubResult, RewardHub, Ticket
from rewards.resolve import available, build
from rewards.types import (
    Reward,
    RewardContractError,
    RewardError,
    Sample,
    ScoreLike,
    Scores,
    Traits,
    declare,
    traits_of,
)

__all__ = [
    "HubResult",
    "Reward",
    "RewardContractError",
    "RewardError",
    "RewardHub",
    "Sample",
    "ScoreLike",
    "Scores",
    "Ticket",
    "Traits",
    "available",
    "build",
    "declare",
    "traits_of",
]
