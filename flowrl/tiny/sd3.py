"""Stable Diffusion 3 with all three text encoders: 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

INFERENCE = {
    "sd3": {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 8, "height": 32, "width": 32}
}


def sd3() -> Any:
    """A StableDiffusion3Pipeline of 0.1M numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=16,
        pooled_projection_dim=32, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    (first, words), (second, words_2), (third, words_3) = (
        _text.clip(projection=16), _text.clip(projection=16), _text.t5(32)
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_text.autoencoder_kl(),
        text_encoder=first, tokenizer=words, text_encoder_2=second, tokenizer_2=words_2,
        text_encoder_3=third, tokenizer_3=words_3,
    )  # fmt: skip
