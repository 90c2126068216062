"""Which picture would people prefer for this prompt? ImageReward (arXiv:2304.05977), differentiable.

A BLIP (ViT-L/16 and BERT-base) reads the prompt while looking at the picture; five linear layers make a number of its
class token, and the mean and standard deviation of the authors' data make it about N(0, 1), mostly in [-2.3, 2]:

    reward = (mlp(CLS) - 0.16717362830052426) / 1.0333394966054072

The upstream checkpoint is read as it is published, from tensors alone: `renamed` gives its weights the names of
transformers' BLIP, and the sizes of the network come from the checkpoint and `med_config.json`.

Known pitfall: of a prompt only the first 35 tokens are read, as in training. A longer one is half judged.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.card import Card
from rewards.files import Weights, fill, read_tensors
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample

__all__ = ["ImageReward"]

MAX_LENGTH = 35
"""Tokens of a prompt, the first and last mark included."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' data."""

_WEIGHTS = Weights("THUDM/ImageReward", ("ImageReward.pt", "med_config.json"))
_TOKENIZER = Weights("bert-base-uncased", ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
_ADDED = ["[DEC]", "[ENC]"]
"""What BLIP adds to BERT's vocabulary; the checkpoint has rows for them."""
_HEAD_WIDTH = 64
"""Of an attention head, in every ViT of BLIP; a checkpoint does not tell."""

_TEXT_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip
"""Of med_config.json; the size of the vocabulary is the checkpoint's."""

_UNUSED = re.compile(r"position_ids$|^blip\.(vision|text)_proj\.|queue")
"""Buffers, and what only BLIP's pretraining has a use for."""
_NAMES = (
    ("blip.text_encoder.", "text_encoder."),
    ("blip.visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision_model.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision_model.encoder.layers."),
)
_NAMES_IN_BLOCKS = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


# ------------------------------------------------------------------------------------------------ network


class _Network(nn.Module):
    """BLIP's picture encoder, its text encoder that looks at the picture, and the head; N samples, L tokens."""

    vision_model: Any
    text_encoder: Any

    def __init__(self, vision_model: nn.Module, text_encoder: nn.Module, widths: Sequence[int]) -> None:
        """`widths`: of the head, from the class token's to 1. It has no nonlinearities."""
        super().__init__()
        self.vision_model, self.text_encoder = vision_model, text_encoder
        self.mlp = nn.Sequential(*(nn.Linear(before, after) for before, after in pairwise(widths)))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The head's output [N] for pixels [N,3,S,S] and the tokens' ids and mask [N,L]."""
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        read = self.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.mlp(read[:, 0].to(torch.promote_types(read.dtype, torch.float32)))[:, 0]


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `ImageReward.pt` under the names of `_Network`, without those that a score does not use."""
    layers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("mlp.layers.")})
    head = tuple((f"mlp.layers.{layer}.", f"mlp.{place}.") for place, layer in enumerate(layers))
    return {_new_name(name, head): value for name, value in tensors.items() if not _UNUSED.search(name)}


def _new_name(name: str, head: tuple[tuple[str, str], ...]) -> str:
    for old, new in (*head, *_NAMES):
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith("vision_model.encoder."):
        for old, new in _NAMES_IN_BLOCKS:
            name = name.replace(old, new)
    return name


def _read_config(path: Path) -> dict[str, Any]:
    """BERT's sizes, of med_config.json."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # no text, no JSON, or no sizes by name
        raise RewardError(
            f"reward 'imagereward': {path} is no med_config.json ({type(error).__name__}: {error}). "
            f"Mend: fetch it again (`{_WEIGHTS.command}`)."
        ) from error


def _network(tensors: dict[str, Tensor], config: dict[str, Any], where: Path) -> _Network:
    """The network that `tensors` (renamed) and BERT's `config` describe, filled with them."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        positions, width = tensors["vision_model.embeddings.position_embedding"].shape[1:]
        patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
        inner = tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        words = tensors["text_encoder.embeddings.word_embeddings.weight"].shape[0]
        head = [tensors[f"mlp.{place}.weight"].shape for place in range(_count(tensors, "mlp."))]
        text = {key: config[key] for key in _TEXT_SIZES}
    except KeyError as error:
        raise RewardError(
            f"reward 'imagereward': {error} is missing in {where} or in its med_config.json. "
            f"Mend: fetch both again (`{_WEIGHTS.command}`)."
        ) from error
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_count(tensors, "vision_model.encoder.layers."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten at once, and a run's noise stays as is
        network = _Network(
            BlipVisionModel(vision),
            BlipTextModel(
                BlipTextConfig(**text, vocab_size=words, encoder_hidden_size=width, layer_norm_eps=1e-12),
                add_pooling_layer=False,
            ),
            [text["hidden_size"], *(shape[0] for shape in head)],
        )
    fill(network, tensors, "imagereward", where)
    return network


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a name."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


# ------------------------------------------------------------------------------------------------ reward


class ImageReward:
    """Human preference for a picture of a prompt, about N(0, 1) (ImageReward, arXiv:2304.05977).

    Scores have no bounds, so no range is declared.
    """

    name = "imagereward"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    differentiable = True
    card = Card(
        source="ImageReward, arXiv:2304.05977",
        licence="Apache-2.0",
        weights=(_WEIGHTS, _TOKENIZER),
        memory_gb=1.8,
        note="Reads the first 35 tokens of a prompt and the central square of a picture.",
    )

    def __init__(self, model: str | None = None, revision: str | None = None, tokenizer: str | None = None) -> None:
        """`model`: folder or hub id with `ImageReward.pt` and `med_config.json`, or that file with the other beside it.

        Default: THUDM/ImageReward.

        revision    branch, tag or commit of `model` on the hub
        tokenizer   folder or hub id of BERT's tokenizer; default: bert-base-uncased
        """
        self._weights = _WEIGHTS.at(model, revision)
        self._words = _TOKENIZER.at(tokenizer)
        self._network: _Network | None = None
        self._tokenizer: Any = None
        self._preprocess: Preprocess | None = None
        self._warned = False

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read checkpoint and tokenizer; RewardError if a file or a weight is missing. The head is never below fp32."""
        checkpoint = self._weights.file(self.name)
        config = _read_config(self._weights.file(self.name, "med_config.json"))
        tokenizer = self._read_tokenizer()
        network = _network(renamed(read_tensors(checkpoint)), config, checkpoint)
        rows = network.text_encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) != rows:
            raise RewardError(
                f"reward 'imagereward': {self._words.source!r} has {len(tokenizer)} tokens, {' and '.join(_ADDED)} "
                f"included; the checkpoint has {rows}. Mend: give the folder of bert-base-uncased in `tokenizer`."
            )
        network.requires_grad_(False).eval().to(device, dtype)
        network.mlp.to(torch.promote_types(dtype, torch.float32))
        self._network, self._tokenizer = network, tokenizer
        self._preprocess = Preprocess(size=network.vision_model.config.image_size, mode="shortest")

    def unload(self) -> None:
        """Let network and tokenizer go."""
        self._network = self._tokenizer = self._preprocess = None

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], about N(0, 1); gradients reach the pixels."""
        if self._network is None or self._preprocess is None:
            raise RewardError("imagereward has no weights yet; call load(device, dtype) first (a RewardHub does)")
        weight = self._network.text_encoder.get_input_embeddings().weight
        pixels = self._preprocess([sample.media for sample in samples]).to(weight.device, weight.dtype)
        ids, mask = self._tokens([sample.prompt for sample in samples])
        return (self._network(pixels, ids.to(weight.device), mask.to(weight.device)) - MEAN) / STD

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, 35] of the prompts' first tokens; warns, once, if there were more."""
        longest = max(len(ids) for ids in self._tokenizer(list(prompts))["input_ids"])
        if longest > MAX_LENGTH and not self._warned:
            self._warned = True
            warnings.warn(
                f"imagereward reads {MAX_LENGTH} tokens of a prompt, and one has {longest}: what comes after them does "
                "not count. This is said once.",
                stacklevel=2,
            )
        read = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return read["input_ids"], read["attention_mask"]

    def _read_tokenizer(self) -> Any:
        import transformers

        auto: Any = transformers  # most of its functions have no types
        tokenizer = self._words.pretrained(self.name, auto.BertTokenizer.from_pretrained)
        tokenizer.add_tokens(_ADDED, special_tokens=True)
        return tokenizer
