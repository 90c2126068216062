"""LTX-Video: 32 x 32 pixels, nine frames."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

INFERENCE = {
    "ltx": {
        "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 24, "height": 32, "width": 32,
        "num_frames": 9,
    }
}  # fmt: skip


def ltx() -> Any:
    """An LTXPipeline of 0.1M numbers, with the published scheduler: a shift by tokens, and an end at 0.1."""
    import torch
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2, patch_size_t=1,
    )  # fmt: skip
    vae.latents_mean.copy_(0.1 * torch.randn(8))
    vae.latents_std.copy_(0.5 + torch.rand(8))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05,
        shift_terminal=0.1,
    )  # fmt: skip
    encoder, words = _text.t5(32)
    return LTXPipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words)
