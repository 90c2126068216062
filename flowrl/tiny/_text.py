"""Tokenizers and text encoders of a few letters, which the tiny pipelines share; no vocabulary file is read.

Sizes are ordinary small numbers. Build them inside a function whose random seed is set by the caller.
"""

from __future__ import annotations

import string
from typing import Any

LETTERS = string.ascii_lowercase


def clip(hidden: int = 16, words: int = 24, *, projection: int | None = None, layers: int = 2) -> tuple[Any, Any]:
    """A CLIPTextModel, or one with a projection, and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=words)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=words, projection_dim=projection or hidden,
        bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1,
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), tokenizer


def t5(hidden: int = 32, *, kind: str = "T5") -> tuple[Any, Any]:
    """A T5EncoderModel (or `kind` "UMT5") and its tokenizer."""
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(pieces), d_model=hidden, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    return getattr(transformers, f"{kind}EncoderModel")(config), tokenizer


def qwen2_tokenizer(
    template: str = "{% for m in messages %}{{ m['content'] }}{% endfor %}", *extra: str, **options: Any
) -> Any:
    """Qwen2's tokenizer over the byte alphabet, with a chat template, further special tokens, its other arguments."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    pieces = [*bytes_to_unicode().values(), *special]
    tokenizer = Qwen2Tokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<|endoftext|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=special[1:], **options,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def autoencoder_kl(channels: int = 4, *, factor: int = 2, **config: Any) -> Any:
    """An AutoencoderKL with `channels` of latents at 1/factor of the size (a power of two)."""
    from diffusers import AutoencoderKL

    blocks = factor.bit_length()
    return AutoencoderKL(
        **{
            "block_out_channels": (8,) * blocks, "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks, "layers_per_block": 1, "latent_channels": channels,
            "norm_num_groups": 4, "sample_size": 32, "scaling_factor": 1.5, "shift_factor": 0.06,
            "use_quant_conv": False, "use_post_quant_conv": False, **config,
        }
    )  # fmt: skip
