"""Z-Image with a Qwen3 text encoder: 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

INFERENCE = {
    "z_image": {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 64, "height": 32, "width": 32}
}
"""Guidance as the pipeline counts it: 0 is none."""

_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


def z_image() -> Any:
    """A ZImagePipeline of 0.4M numbers, most of them in its embedding of time, whose width is not free."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    words = _text.qwen2_tokenizer(_TEMPLATE)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=128, bos_token_id=None,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_text.autoencoder_kl(),
        text_encoder=encoder, tokenizer=words,
    )  # fmt: skip
