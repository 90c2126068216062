"""Sana: Gemma2, the deep-compression autoencoder and linear attention; 32 x 32 pixels, which are 4 x 4 latents."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

INFERENCE = {
    "sana": {
        "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 12, "height": 32, "width": 32,
        "complex_human_instruction": ["make it vivid", "user prompt "], "use_resolution_binning": False,
    }
}  # fmt: skip


def sana() -> Any:
    """A SanaPipeline of 0.1M numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=4, patch_size=1, interpolation_scale=None,
    )  # fmt: skip
    encoder, tokenizer = _gemma2()
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_autoencoder_dc(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _gemma2() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_text.LETTERS]
    config = Gemma2Config(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config), GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])


def _autoencoder_dc() -> Any:
    from diffusers import AutoencoderDC

    channels, scales = (8, 8, 8, 16), ((), (), (), (5,))
    kinds = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.41407,
        encoder_block_types=kinds, encoder_block_out_channels=channels, encoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=scales, decoder_block_types=kinds, decoder_block_out_channels=channels,
        decoder_layers_per_block=(1, 1, 1, 1), decoder_qkv_multiscales=scales,
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
