"""Stable Diffusion 1.5, 2.1 and XL: 32 x 32 pixels, which are 4 x 4 latents."""

from __future__ import annotations

from typing import Any

from flowrl.tiny import _text

_CALL = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}
INFERENCE = {"sd15": _CALL, "sd21": _CALL, "sdxl": _CALL}


def sd15() -> Any:
    """A StableDiffusionPipeline of 0.1M numbers that predicts the noise, with the times of 1.5."""
    return _stable_diffusion(_ddim())


def sd21() -> Any:
    """The same with the v-prediction of 2.1 at 768 pixels, and a schedule that ends in pure noise."""
    return _stable_diffusion(
        _ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        use_linear_projection=True,
    )


def sdxl() -> Any:
    """A StableDiffusionXLPipeline of 0.1M numbers with both text encoders and the scheduler of SDXL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (first, words), (second, words_2) = _text.clip(), _text.clip(projection=16)
    unet = _unet(
        cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler, vae=_vae(), text_encoder=first, tokenizer=words, text_encoder_2=second,
        tokenizer_2=words_2, add_watermarker=False,
    )  # fmt: skip


def _stable_diffusion(scheduler: Any, **unet: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    encoder, tokenizer = _text.clip()
    return StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=16, **unet), scheduler=scheduler, vae=_vae(), text_encoder=encoder,
        tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4, **config,
    )  # fmt: skip


def _vae() -> Any:
    return _text.autoencoder_kl(
        4, factor=8, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True
    )


def _ddim(**config: Any) -> Any:
    """The schedule of Stable Diffusion; real checkpoints have set_alpha_to_one=False, and stop a little above t = 0."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **{
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "set_alpha_to_one": True, "steps_offset": 1, **config,
        }
    )  # fmt: skip
