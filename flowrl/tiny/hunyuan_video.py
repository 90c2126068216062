"""HunyuanVideo and HunyuanVideo 1.5: 16 x 16 pixels, five frames."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_SIZE = {"num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 5}
INFERENCE = {
    "hunyuan_video": {
        **_SIZE, "true_cfg_scale": 1.0, "guidance_scale": 6.0, "max_sequence_length": 24,
        "prompt_template": {"template": "a video {} end", "crop_start": 7},
    },
    "hunyuan_video15": _SIZE,
}  # fmt: skip


def hunyuan_video() -> Any:
    """A HunyuanVideoPipeline of 0.1M numbers, with an input for guidance as the distilled weights have."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8), down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=4,
        spatial_compression_ratio=4, temporal_compression_ratio=4, mid_block_add_attention=False,
    )  # fmt: skip
    (llama, words), (clip, words_2) = _llama(), _text.clip(words=77)
    return HunyuanVideoPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae,
        text_encoder=llama, tokenizer=words, text_encoder_2=clip, tokenizer_2=words_2,
    )  # fmt: skip


def hunyuan_video15() -> Any:
    """A HunyuanVideo15Pipeline of 4.5M numbers: the layer between ByT5 and the network is 2048 wide in every size."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=16,
        image_embed_dim=16, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    bytes_ = ByT5Tokenizer()
    glyphs = T5EncoderModel(
        T5Config(
            vocab_size=len(bytes_), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
        )
    )
    encoder, words = _qwen()
    return HunyuanVideo15Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), vae=vae, text_encoder=encoder,
        tokenizer=words, text_encoder_2=glyphs, tokenizer_2=bytes_, guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )  # fmt: skip


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaModel, LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *_text.LETTERS]
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return LlamaModel(config), tokenizer


def _qwen() -> tuple[Any, Any]:
    """Qwen2.5-VL's text model; its template is as long as what the pipeline cuts off at the front, 108 tokens."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    tokenizer = _text.qwen2_tokenizer("{{ 'a' * 108 }}{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}")
    tokenizer.padding_side = "right"
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    return Qwen2_5_VLTextModel(config), tokenizer
