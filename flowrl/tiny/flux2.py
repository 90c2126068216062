"""FLUX.2 with its language model: 64 x 64 pixels, the least that its pipelines take of a source picture."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_CALL = {
    "num_inference_steps": 4,
    "max_sequence_length": 24,
    "text_encoder_out_layers": [1, 2],
    "height": 64,
    "width": 64,
}
INFERENCE = {"flux2": {**_CALL, "guidance_scale": 4.0}, "flux2_klein": {**_CALL, "guidance_scale": 1.0}}

_HIDDEN = 16
_LANGUAGE = {
    "hidden_size": _HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
# The real one's message begins with long instructions, which would leave nothing of a prompt in 24 tokens.
_TEMPLATE = "{% for m in messages[1:] %}{{ m['content'] | map(attribute='text') | join }}{% endfor %}"


def flux2() -> Any:
    """A Flux2Pipeline of 0.1M numbers, with Mistral 3 and guidance embedded."""
    from diffusers import Flux2Pipeline
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    words = _text.qwen2_tokenizer(_TEMPLATE, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    eyes = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = Mistral3Config(
        text_config=MistralConfig(vocab_size=len(words), **_LANGUAGE), vision_config=eyes,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    processor = PixtralProcessor(PixtralImageProcessor(), words, patch_size=8, chat_template=_TEMPLATE)
    return Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=processor, **_parts(guided=True)
    )


def flux2_klein() -> Any:
    """A Flux2KleinPipeline of 0.1M numbers, with Qwen3; not distilled."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = _text.qwen2_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **_LANGUAGE))
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=words, **_parts(guided=False))


def _parts(*, guided: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()  # of a batch norm that saw nothing they would be 0 and 1
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * _HIDDEN, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}
