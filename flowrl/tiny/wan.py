"""Wan 2.1 and 2.2: 32 x 32 pixels, 5 frames. Real checkpoints have a UniPC scheduler; here it is the Euler one."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_CALL = {
    "num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5,
    "max_sequence_length": 16,
}  # fmt: skip
INFERENCE = {
    "wan": _CALL,
    "wan_i2v": _CALL | {"max_sequence_length": 512},  # of the text; before these are those of the picture
    "wan22": _CALL | {"guidance_scale_2": 2.0},
    "wan22_i2v": _CALL,
    "wan22_ti2v": _CALL,
    "wan22_ti2v_image": _CALL,
}
_CHANNELS = 4
_WORDS = 32
_WIDTH = 24


def wan() -> Any:
    """A WanPipeline of Wan 2.1, 0.1M numbers."""
    from diffusers import WanPipeline

    return WanPipeline(transformer=_transformer(), **_parts())


def wan_i2v() -> Any:
    """A WanImageToVideoPipeline of Wan 2.1: the first frame as channels, and as a CLIP sees it."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    seen = 16
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=seen, intermediate_size=2 * seen, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8,
        )
    )  # fmt: skip
    return WanImageToVideoPipeline(
        transformer=_transformer(in_channels=_CHANNELS + 4 + _CHANNELS, image_dim=seen, added_kv_proj_dim=_WIDTH),
        image_encoder=encoder, image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), **_parts(),
    )  # fmt: skip


def wan22() -> Any:
    """A WanPipeline of Wan 2.2: two experts."""
    from diffusers import WanPipeline

    return WanPipeline(transformer=_transformer(), transformer_2=_transformer(), boundary_ratio=0.875, **_parts())


def wan22_i2v() -> Any:
    """A WanImageToVideoPipeline of Wan 2.2: two experts, the first frame as channels only."""
    from diffusers import WanImageToVideoPipeline

    channels = _CHANNELS + 4 + _CHANNELS
    return WanImageToVideoPipeline(
        transformer=_transformer(in_channels=channels), transformer_2=_transformer(in_channels=channels),
        boundary_ratio=0.9, **_parts(),
    )  # fmt: skip


def wan22_ti2v() -> Any:
    """A WanPipeline of Wan 2.2 TI2V: a time for every token, and the VAE of 16 pixels to a latent."""
    from diffusers import WanPipeline

    return WanPipeline(transformer=_transformer(), expand_timesteps=True, **_parts(_residual_vae()))


def wan22_ti2v_image() -> Any:
    """The same parts in a WanImageToVideoPipeline: the first latent frame is that of a picture."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(transformer=_transformer(), expand_timesteps=True, **_parts(_residual_vae()))


def _parts(vae: Any = None) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

    text_encoder, tokenizer = _text.t5(_WORDS, kind="UMT5")
    return {
        "text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae or AutoencoderKLWan(**_vae()),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def _transformer(in_channels: int = _CHANNELS, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=in_channels, out_channels=_CHANNELS, num_attention_heads=2, attention_head_dim=_WIDTH // 2,
        text_dim=_WORDS, freq_dim=32, ffn_dim=2 * _WIDTH, num_layers=2, rope_max_seq_len=32, **config,
    )  # fmt: skip


def _vae(**config: Any) -> dict[str, Any]:
    return {
        "base_dim": 4, "z_dim": _CHANNELS, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [-0.1, 0.2, 0.0, 0.3], "latents_std": [0.9, 1.2, 1.1, 0.8], **config,
    }  # fmt: skip


def _residual_vae() -> Any:
    from diffusers import AutoencoderKLWan

    config = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    return AutoencoderKLWan(**_vae(**config))
