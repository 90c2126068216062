"""LoRA files with the layer names of ComfyUI's networks: one table a network, tested by diffusers' importers.

A table takes layers from their names in diffusers to those that ComfyUI's loader looks up (comfy/lora.py). Where that
loader knows the names of diffusers, they are kept, since nothing has to be fused then.

Note: ComfyUI itself was not run. diffusers' importer of foreign LoRA files (loaders/lora_conversion_utils.py) takes
every file but HunyuanVideo's, whose text refiner it takes apart wrongly.

Symbols: r rank of an adapter, A [r,in] and B [out,r] its factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl.models.pipeline import ModelError

Factors = tuple[Tensor, Tensor]
"""A [r,in] and B [out,r]; of a convolution with the dimensions of its kernel."""


class Block(NamedTuple):
    """Layers whose names begin alike."""

    here: str
    """Pattern of the beginning of their names in diffusers, up to a dot."""
    there: str
    """The beginning in ComfyUI; \\1 is the pattern's first group."""
    layers: Mapping[str, tuple[str, ...]] | None = None
    """{layer there: the layers here that it is made of, from its first output to its last}; None: the same names."""


class _Place(NamedTuple):
    name: str
    """Of the layer there."""
    members: tuple[str, ...]
    """The layers here that it is made of, by their whole names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one network's LoRA is spelt."""

    prefix: str
    """Before every name."""
    blocks: tuple[Block, ...]
    alpha: bool = True
    """Whether a layer's alpha is a key of the file. Otherwise alpha / r is multiplied into B, because diffusers'
    importer refuses such a key; where there is none, every reader takes alpha to be r."""
    flat: bool = False
    """kohya's spelling: dots are underscores, and the factors are lora_down and lora_up."""
    importer: bool = True
    """Whether diffusers' `load_lora_weights` takes the file too."""

    def place(self, layer: str) -> _Place | None:
        """Where a layer of diffusers goes; None where the table has no name for it."""
        for block in self.blocks:
            found = re.fullmatch(rf"(?P<block>{block.here})\.(?P<layer>.+)", layer)
            if found is None:
                continue
            here, own = found["block"], found["layer"]
            there = re.sub(block.here, block.there, here)
            if block.layers is None:
                return _Place(f"{there}.{own}", (layer,))
            for name, members in block.layers.items():
                if own in members:
                    return _Place(f"{there}.{name}", tuple(f"{here}.{member}" for member in members))
        return None

    def spelt(self, name: str, factors: Factors, scale: float) -> dict[str, Tensor]:
        """The keys of one layer; its weight changes by scale B A."""
        a, b = factors
        name = self.prefix + (name.replace(".", "_") if self.flat else name)
        down, up = ("lora_down", "lora_up") if self.flat else ("lora_A", "lora_B")
        if not self.alpha:
            return {f"{name}.{down}.weight": a, f"{name}.{up}.weight": scale * b}
        alpha = torch.tensor(scale * len(a))
        return {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b, f"{name}.alpha": alpha}


def _kept(*patterns: str) -> tuple[Block, ...]:
    return tuple(Block(pattern, r"\g<0>") for pattern in patterns)


_WAN = Block(
    r"blocks\.(\d+)", r"blocks.\1",
    {
        "self_attn.q": ("attn1.to_q",), "self_attn.k": ("attn1.to_k",), "self_attn.v": ("attn1.to_v",),
        "self_attn.o": ("attn1.to_out.0",),
        "cross_attn.q": ("attn2.to_q",), "cross_attn.k": ("attn2.to_k",), "cross_attn.v": ("attn2.to_v",),
        "cross_attn.o": ("attn2.to_out.0",),
        "cross_attn.k_img": ("attn2.add_k_proj",), "cross_attn.v_img": ("attn2.add_v_proj",),
        "ffn.0": ("ffn.net.0.proj",), "ffn.2": ("ffn.net.2",),
    },
)  # fmt: skip

_HUNYUAN = (
    Block(
        r"transformer_blocks\.(\d+)", r"double_blocks.\1",
        {
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn_proj": ("attn.to_out.0",), "txt_attn_proj": ("attn.to_add_out",),
            "img_mlp.fc1": ("ff.net.0.proj",), "img_mlp.fc2": ("ff.net.2",),
            "txt_mlp.fc1": ("ff_context.net.0.proj",), "txt_mlp.fc2": ("ff_context.net.2",),
        },
    ),
    Block(
        r"single_transformer_blocks\.(\d+)", r"single_blocks.\1",
        {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)},
    ),
    Block(
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)", r"txt_in.individual_token_refiner.blocks.\1",
        {"self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "self_attn_proj": ("attn.to_out.0",)},
    ),
)  # fmt: skip

_BLOCKS = _kept(r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+")

LAYOUTS: dict[str, Layout] = {
    "SD3Transformer2DModel": Layout(prefix="transformer.", blocks=_BLOCKS, alpha=False),
    "FluxTransformer2DModel": Layout(prefix="transformer.", blocks=_BLOCKS),
    "Flux2Transformer2DModel": Layout(prefix="transformer.", blocks=_BLOCKS, alpha=False),
    "QwenImageTransformer2DModel": Layout(prefix="diffusion_model.", blocks=_BLOCKS),
    "ZImageTransformer2DModel": Layout(
        prefix="diffusion_model.", blocks=_kept(r"layers\.\d+", r"noise_refiner\.\d+", r"context_refiner\.\d+")
    ),
    "UNet2DConditionModel": Layout(
        prefix="lora_unet_", blocks=_kept(r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"), flat=True
    ),
    "WanTransformer3DModel": Layout(prefix="diffusion_model.", blocks=(_WAN,)),
    "HunyuanVideoTransformer3DModel": Layout(prefix="transformer.", blocks=_HUNYUAN, alpha=False, importer=False),
    "LTXVideoTransformer3DModel": Layout(prefix="diffusion_model.", blocks=_BLOCKS, alpha=False),
}
"""By the class of the network in diffusers."""


def layout_of(module: Any) -> Layout:
    """The table of a network; ModelError where there is none."""
    kind = type(module).__name__
    if kind not in LAYOUTS:
        raise ModelError(
            f"format comfyui: there is no table of ComfyUI's layer names for {kind}; there are tables for "
            f"{', '.join(LAYOUTS)}. Take format diffusers, peft or merged."
        )
    return LAYOUTS[kind]


def tensors(module: Any, factors: Mapping[str, Factors], adapter: str) -> dict[str, Tensor]:
    """The file's tensors for an adapter of a network: {layer in diffusers: its factors} by ComfyUI's names.

    Layers that are one there are fused: A's under each other, B's along a diagonal, and r is the sum of theirs.
    ModelError for a layer without a name there.
    """
    layout, found = layout_of(module), {}
    for layer in factors:
        place = layout.place(layer)
        if place is None:
            raise ModelError(
                f"format comfyui: the adapter of {layer} has no name in the table of {type(module).__name__}. Take "
                "format diffusers, peft or merged, or train with model.lora.targets that leave the layer out."
            )
        found[place] = module.get_submodule(layer).scaling[adapter]
    spelt: dict[str, Tensor] = {}
    for place, scale in found.items():
        spelt |= layout.spelt(place.name, _fused(module, place.members, factors), scale)
    return {key: tensor.contiguous() for key, tensor in spelt.items()}


def _fused(module: Any, members: tuple[str, ...], factors: Mapping[str, Factors]) -> Factors:
    """One pair of factors for layers that are one there; outputs of layers without an adapter get zeros."""
    if len(members) == 1:
        return factors[members[0]]
    down = torch.cat([factors[member][0] for member in members if member in factors])
    rows, start = [], 0
    for member in members:
        row = down.new_zeros(module.get_submodule(member).out_features, len(down))
        if member in factors:
            up = factors[member][1]
            row[:, start : start + up.shape[1]] = up
            start += up.shape[1]
        rows.append(row)
    return down, torch.cat(rows)
