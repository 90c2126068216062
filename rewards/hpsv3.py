"""HPSv3 (arXiv:2508.03789): how much people would prefer a picture for its prompt, by a Qwen2-VL 7B with a small head.

    (mu, sigma) = head(hidden state at <|Reward|>)        head = 3584 -> 1024 -> ReLU -> 16 -> ReLU -> 2, fp32
    score       = mu

mu is a Bradley-Terry logit: differences between pictures of one prompt mean something, differences between prompts do
not. The picture is resized to about 256 x 28 x 28 pixels (1024 x 1024 to 448 x 448): small details are not seen.

Published numbers need upstream's template: it is a part of the input that the network was trained on, byte by byte with
its white space. Ours is another wording, so that scores with it are not HPSv3's. `template` takes the user's copy.

Note: whether scores with the real weights equal those of the authors' own code has not been checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rewards._qwen2vl import PIXELS, HeadedQwen2VL, Plan, Template, base_weights, read_checkpoint
from rewards.card import Card
from rewards.files import Weights
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["HPSv3"]

_WEIGHTS = Weights("MizzenAI/HPSv3", ("HPSv3.safetensors",))
_BASE = base_weights("Qwen/Qwen2-VL-7B-Instruct")
_MARKS = ("<|Reward|>",)
_PICTURE = 256 * PIXELS
_QUESTION = """
Judge a picture that was made from a text. Give one number for how much people would like it: higher is better.

First, is it well made? Bodies, things and places should be possible, the picture sharp and rich in detail, light,
colours and composition pleasing, and nothing in it harmful.
Second, is it what the text asks for? Look for the things that are named, how many, what they are like and what they
do, for the place, and for the style.

The text: {prompt}

The number: <|Reward|>
"""


class HPSv3:
    """Human preference by HPSv3 (arXiv:2508.03789): the mean mu of a Bradley-Terry logit, differentiable; no bounds.

    Parts: mu, sigma (the network's second output as it is). No verdict for a prompt with a control token of the model
    in it, or a picture whose sides differ by more than a factor of 200. Published numbers need upstream's template:
    see `template`.
    """

    name = "hpsv3"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    differentiable = True
    card = Card(
        source="arXiv:2508.03789, MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct",
        licence="see their cards",
        weights=(_WEIGHTS, _BASE),
        memory_gb=16.6,
        note="Published numbers need upstream's template (`template: <file>`); ours is the default. "
        "Only differences between pictures of one prompt mean something.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str = "main",
        base: str | None = None,
        template: str | None = None,
    ) -> None:
        """Where things are; nothing is read yet, but for the template.

        model      HPSv3.safetensors, a folder that has it (or shards with an index), or a hub id
        revision   branch, tag or commit of a hub id in `model`
        base       folder or hub id of the Qwen2-VL, of which config, tokenizer and chat template are used
        template   a text file with {prompt} and <|Reward|> in it: your copy of upstream's question
        """
        self._weights, self._base = _WEIGHTS.at(model, revision), _BASE.at(base)
        self._template = Template.read(self.name, template, _QUESTION, _MARKS)
        self._network: HeadedQwen2VL | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read tokenizer and weights; the head stays fp32 whatever `dtype` is. RewardError if anything does not fit."""
        plan = Plan(
            reward=self.name,
            kind="image",
            template=self._template,
            min_pixels=_PICTURE,
            max_pixels=_PICTURE,
        )
        tensors = read_checkpoint(self._weights, self.name)
        self._network = HeadedQwen2VL.load(plan, self._base, tensors, _head, device, dtype, self._weights.source)

    def unload(self) -> None:
        """Let network and tokenizer go."""
        self._network = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """mu [N], unbounded; its gradient reaches the media."""
        if self._network is None:
            raise RewardError("reward 'hpsv3' is not loaded; the hub does that, or call .load(device, dtype) first")
        out, info = self._network.read(samples, lambda sample: sample.media[None])
        mu, sigma = out[:, 0, 0], out[:, 0, -1]
        return Scores(value=mu.float(), parts={"mu": mu.detach().float(), "sigma": sigma.detach().float()}, info=info)


def _head(width: int) -> nn.Module:
    """The third is the dropout of training, which counts in the names of the weights."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
