"""A whole StableDiffusion3Pipeline with random weights, built without any download: 0.2M numbers, 32 x 32 pixels."""

import json
import string
from pathlib import Path

import pytest
import torch

WORDS = 24
JOINT = 32
POOLED = 16  # of each CLIP; the transformer sees both


def build_sd3(folder: Path, *, t5: bool = True, seed: int = 0) -> Path:
    """Saves the pipeline in `folder`; with `t5` it has all three encoders, as SD3.5 has."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=JOINT, caption_projection_dim=32, pos_embed_max_size=16,
            pooled_projection_dim=2 * POOLED, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        encoders = [_clip() for _ in range(2)]
        third = _t5() if t5 else (None, None)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=encoders[0][0], tokenizer=encoders[0][1], text_encoder_2=encoders[1][0],
        tokenizer_2=encoders[1][1], text_encoder_3=third[0], tokenizer_3=third[1],
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def _clip():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = string.ascii_lowercase
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=WORDS)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WORDS, projection_dim=POOLED, bos_token_id=len(pieces) - 2,
        eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config), tokenizer


def _t5():
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=JOINT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


@torch.no_grad()
def euler(velocity, x, times, cond):
    """The ODE from noise x [N,...] along `times`, written out: what the pipeline's scheduler does."""
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = x + (t_next - t) * velocity(x, t.expand(len(x)), cond)
    return x


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """The folder of the tiny pipeline, with settings of its own; import it where it is needed."""
    if "folder" not in _BUILT:
        folder = build_sd3(tmp_path_factory.mktemp("tiny_sd3"))
        (folder / "inference.json").write_text(json.dumps({"num_inference_steps": 4, "max_sequence_length": 8}))
        _BUILT["folder"] = folder
    return _BUILT["folder"]


_BUILT: dict[str, Path] = {}
