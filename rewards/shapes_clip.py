"""A small CLIP (arXiv:2103.00020) of the built-in world: differentiable, and shipped in `weights/shapes_clip`.

It says how well a picture fits a sentence as the cosine of two features, and its gradient reaches the pixels: what
SRPO, ReFL and DRaFT learn from. `flowrl shapes train-scorer` made the weights; their README says how often it is right.

Symbols: N pictures, M texts, L words, D = width of the features, W = width of the towers, S = picture side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.card import Card
from rewards.shapes import COLORS, NUMBERS, RELATIONS, SHAPES, SIZE, resize
from rewards.types import MediaKind, RewardError, Sample

WEIGHTS = Path(__file__).parent / "weights" / "shapes_clip"
CONTROLS = ("clean", "blurry", "noisy", "faded", "cluttered")
"""Words about how a picture looks; one may stand before a prompt: "clean. a red circle"."""
WORDS = (
    "a", "and", *SHAPES, *(f"{shape}s" for shape in SHAPES), *COLORS, *NUMBERS,
    *dict.fromkeys(word for relation in RELATIONS for word in relation.split()), *CONTROLS,
)  # fmt: skip
MAX_WORDS = 12
"""What a text has beyond them is not read; the longest of this world has ten."""
_PADDING, _UNKNOWN = 0, 1
_GROUPS = 8  # of the GroupNorms
_HEADS = 4


# ------------------------------------------------------------------------------------------------ network


class _Attention(nn.Module):
    """One pre-norm transformer block on tokens [N,L,W]; `mask` [N,1,1,L] is False where there is nothing to see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, channels), nn.GroupNorm(_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(x)))


class TwoTowers(nn.Module):
    """The two encoders and the temperature. Everything is smooth, so that the gradient of a score is of use.

    Pictures: convolutions down to 6 x 6 places, which keep their positions, then two transformer blocks over them.
    Texts: one token a word of `words` (others are one and the same unknown word), two transformer blocks.
    """

    def __init__(self, words: Sequence[str], width: int = 128, text_width: int = 96, features: int = 128) -> None:
        super().__init__()
        self.index = {word: i for i, word in enumerate(words, start=_UNKNOWN + 1)}
        c1, c2, c3 = width // 8, width // 4, width // 2
        self.picture = nn.Sequential(
            nn.Conv2d(3, c1, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(c1, c2, 3, stride=2, padding=1),
            nn.GroupNorm(_GROUPS, c2),
            nn.SiLU(),
            nn.Conv2d(c2, c3, 3, stride=2, padding=1),
            _Residual(c3),
            nn.GroupNorm(_GROUPS, c3),
            nn.SiLU(),
            nn.Conv2d(c3, width, 3, stride=2, padding=1),
        )
        self.place = nn.Parameter(0.1 * torch.randn((SIZE // 16) ** 2, width))
        self.picture_blocks = nn.ModuleList(_Attention(width) for _ in range(2))
        self.picture_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features))

        self.word = nn.Embedding(_UNKNOWN + 1 + len(words), text_width, padding_idx=_PADDING)
        self.order = nn.Parameter(torch.randn(MAX_WORDS, text_width))  # as loud as the words
        self.near = nn.Conv1d(text_width, text_width, 3, padding=1)
        self.text_blocks = nn.ModuleList(_Attention(text_width) for _ in range(2))
        self.text_out = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, features))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Word ids [M, MAX_WORDS] of texts, padded; a text without a word is one unknown word."""
        rows = torch.full((len(texts), MAX_WORDS), _PADDING)
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"[^\W_]+", text.lower())[:MAX_WORDS]
            ids = [self.index.get("a" if word == "an" else word, _UNKNOWN) for word in words] or [_UNKNOWN]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def images(self, media: Tensor) -> Tensor:
        """L2-normalised features [N,D] of pictures [N,3,96,96] in [0,1]."""
        places = self.picture(2 * media - 1).flatten(2).mT + self.place
        for block in self.picture_blocks:
            places = block(places)
        return F.normalize(self.picture_out(places.mean(1)), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """L2-normalised features [M,D] of word ids [M,L]."""
        real = tokens != _PADDING
        words = self.word(tokens) + self.order
        words = words + self.near(words.mT).mT  # which colour is whose: it stands beside it
        for block in self.text_blocks:
            words = block(words, real[:, None, None])
        pooled = (words * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return F.normalize(self.text_out(pooled), dim=-1)


# ------------------------------------------------------------------------------------------------ reward


class ShapesClip:
    """How well a picture fits its prompt: the cosine of CLIP features (arXiv:2103.00020) of the built-in world.

    A picture of another size is resized to 96 x 96 with antialiasing. A prompt may begin with one of CONTROLS. Words
    that the world does not have are all one unknown word: a prompt of nothing else gets a score without a meaning.
    """

    name = "shapes_clip"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (-1.0, 1.0)
    deterministic = True
    differentiable = True
    card = Card(
        source="this project; trained as CLIP is (arXiv:2103.00020)",
        memory_gb=0.0013,
        note="knows the built-in world and nothing else; its weights are shipped",
    )

    def __init__(self, weights: str | None = None) -> None:
        """`weights`: a folder that `flowrl shapes train-scorer` wrote; default: the shipped one."""
        self._folder = WEIGHTS if weights is None else Path(weights).expanduser()
        self._loaded: TwoTowers | None = None

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Read config.json and model.safetensors of the folder."""
        from safetensors.torch import load_file

        for name in ("config.json", "model.safetensors"):
            if not (self._folder / name).is_file():
                raise RewardError(
                    f"shapes_clip: {self._folder} has no {name}; set `weights` to a folder that "
                    "`flowrl shapes train-scorer --output DIR` wrote, or leave it out for the shipped weights"
                )
        network = TwoTowers(**json.loads((self._folder / "config.json").read_text(encoding="utf-8")))
        network.load_state_dict(load_file(self._folder / "model.safetensors"))
        self._loaded = network.requires_grad_(False).eval().to(device, dtype)

    def unload(self) -> None:
        """Let the network go."""
        self._loaded = None

    @property
    def scale(self) -> float:
        """The learned inverse temperature: what a cosine is multiplied with to be a logit of the contrastive loss."""
        return self._network.log_scale.exp().item()

    def image_features(self, media: Tensor) -> Tensor:
        """L2-normalised features [N,D] of pictures [N,3,H,W] in [0,1]; gradients reach the pixels."""
        place = self._network.place
        return self._network.images(resize(media).to(place.device, place.dtype))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised features [M,D] of texts."""
        return self._network.texts(self._network.tokens(texts).to(self._network.place.device))

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Cosines [N] in [-1,1] of pictures and their prompts, fp32 (float64 where it was loaded as such)."""
        pictures = torch.cat([resize(sample.media[None]) for sample in samples])
        images, texts = self.image_features(pictures), self.text_features([sample.prompt for sample in samples])
        cosine = (images * texts).sum(-1)
        return cosine.to(torch.promote_types(cosine.dtype, torch.float32))

    @property
    def _network(self) -> TwoTowers:
        if self._loaded is None:
            raise RewardError("shapes_clip has no weights yet; call load(device, dtype) first (a RewardHub does)")
        return self._loaded
