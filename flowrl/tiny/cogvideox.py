"""CogVideoX 1.0 and 1.5, from text: 16 x 16 pixels (made for 16 x 32, the most that 1.5 has places for), 9 frames."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_CALL = {
    "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 24, "height": 16, "width": 16,
    "num_frames": 9,
}  # fmt: skip
INFERENCE = {"cogvideox": _CALL, "cogvideox15": _CALL}


def cogvideox() -> Any:
    """A CogVideoXPipeline of 0.1M numbers."""
    return _pipeline(patch_size_t=None, patch_bias=True)


def cogvideox15() -> Any:
    """A CogVideoXPipeline of 0.1M numbers, whose network sees latents in pairs, as that of version 1.5."""
    return _pipeline(patch_size_t=2, patch_bias=False)


def _pipeline(**transformer: Any) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    network = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=4, sample_frames=9, patch_size=2,
        max_text_seq_length=24, use_rotary_positional_embeddings=True, **transformer,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=16, sample_width=16,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    encoder, words = _text.t5(32)
    return CogVideoXPipeline(transformer=network, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words)
