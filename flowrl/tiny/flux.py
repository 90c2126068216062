"""FLUX.1 with both text encoders: 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_CALL = {
    "num_inference_steps": 4,
    "true_cfg_scale": 1.0,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
    "height": 32,
    "width": 32,
}
INFERENCE = {
    "flux": _CALL,
    "flux_schnell": {**_CALL, "guidance_scale": 0.0},
    # The sizes that the real one prefers are about a megapixel.
    "flux_kontext": {**_CALL, "_auto_resize": False},
}


def flux() -> Any:
    """A FluxPipeline of 0.1M numbers, with guidance embedded as -dev has it."""
    from diffusers import FluxPipeline

    return FluxPipeline(**_parts(guided=True))


def flux_schnell() -> Any:
    """The same without an input for guidance and without a shift of times."""
    from diffusers import FluxPipeline

    return FluxPipeline(**_parts(guided=False))


def flux_kontext() -> Any:
    """A FluxKontextPipeline of 0.1M numbers."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**_parts(guided=True))


def _parts(*, guided: bool) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0}
    (first, words), (second, words_2) = _text.clip(16), _text.t5(32)
    return {
        "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic),
        "vae": _text.autoencoder_kl(), "text_encoder": first, "tokenizer": words, "text_encoder_2": second,
        "tokenizer_2": words_2,
    }  # fmt: skip
