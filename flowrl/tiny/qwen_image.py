"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-Plus with a Qwen2.5-VL that sees.

The editing pipelines bring every source picture to a megapixel. Their VAEs here are coarser and shallower than the real
ones, so that it costs three seconds and a thousand tokens.
"""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_TEXT = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "max_sequence_length": 512}
INFERENCE = {
    "qwen_image": {**_TEXT, "height": 32, "width": 32},
    "qwen_image_edit": {**_TEXT, "height": 64, "width": 96},
    "qwen_image_edit_plus": {**_TEXT, "height": 64, "width": 96},
}

_WIDTH = 32
_PATCH = 7


def qwen_image() -> Any:
    """A QwenImagePipeline of 0.2M numbers: 32 x 32 pixels."""
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(tokenizer=_tokenizer(), **_networks(factor=4, num_res_blocks=1))


def qwen_image_edit() -> Any:
    """A QwenImageEditPipeline of 0.2M numbers: 64 x 96 pixels."""
    from diffusers import QwenImageEditPipeline

    words = _tokenizer()
    return QwenImageEditPipeline(tokenizer=words, processor=_processor(words), **_networks(factor=16, num_res_blocks=0))


def qwen_image_edit_plus() -> Any:
    """A QwenImageEditPlusPipeline of 0.2M numbers, with 2511's own time for the source pictures: 64 x 96 pixels."""
    from diffusers import QwenImageEditPlusPipeline

    words = _tokenizer()
    networks = _networks(factor=16, num_res_blocks=0, zero_cond_t=True)
    return QwenImageEditPlusPipeline(tokenizer=words, processor=_processor(words), **networks)


def _networks(*, factor: int, num_res_blocks: int, **transformer: Any) -> dict[str, Any]:
    """Transformer, VAE with latents at 1/factor of the size, text encoder and scheduler."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    halvings = factor.bit_length() - 1
    return {
        "transformer": QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=_WIDTH, axes_dims_rope=(4, 6, 6), **transformer,
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1] * (halvings + 1), num_res_blocks=num_res_blocks,
            temperal_downsample=[False, *[True] * (halvings - 1)],
            latents_mean=[-0.1, 0.2, 0.0, 0.1], latents_std=[0.9, 1.2, 1.1, 0.8],
        ),
        "text_encoder": _text_encoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02,
        ),
    }  # fmt: skip


def _tokenizer() -> Any:
    return _text.qwen2_tokenizer(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    )  # fmt: skip


def _processor(words: Any) -> Any:
    """What makes patches of a picture and places for them in the text: 2 x 2 places at most."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": (4 * _PATCH) ** 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=_PATCH, size=size),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(patch_size=_PATCH, size=size),
    )


def _text_encoder() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = _tokenizer()
    places = ("image_pad", "video_pad", "vision_start", "vision_end")
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words), "hidden_size": _WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
                "bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": _PATCH,
                "out_hidden_size": _WIDTH, "window_size": 4 * _PATCH, "fullatt_block_indexes": [0],
            },
            **{f"{place.removesuffix('_pad')}_token_id": words.convert_tokens_to_ids(f"<|{place}|>")
               for place in places},
        )
    )  # fmt: skip
