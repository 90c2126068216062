"""Whole vision-language models of transformers with random weights, written as Hugging Face folders without a download.

A folder is read by `AutoModelForImageTextToText` and `AutoProcessor` exactly as a published one is. Sizes are the
smallest that keep what a class does differently: Qwen2-VL, Qwen2.5-VL and Qwen3-VL pack patches of pictures at their
own size, InternVL and SmolVLM cut a picture into tiles and add a thumbnail, LLaVA crops every picture to one size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowrl.models.pipeline import ModelError
from flowrl.tiny import _text

SEED = 0
"""The seed of all weights: the same bytes each time with the same libraries."""

_HIDDEN = 32
_SPREAD = 0.2
"""Std of the weights, ten times the usual one: at 0.02 all tokens are equally likely and no picture changes that."""

_TEMPLATE = (
    "{%% set media = %s %%}"
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n"
    "{%% if message.content is string %%}{{ message.content }}{%% else %%}{%% for part in message.content %%}"
    "{{ part.text if part.type == 'text' else media[part.type] }}{%% endfor %%}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


def names() -> list[str]:
    """The tiny models that `build` knows."""
    return list(_MAKERS)


def build(name: str, folder: str | Path) -> Path:
    """Write the tiny model `name` and its processor into `folder`, which is made; float32, under 1 MB of weights.

    Every time the same bytes; torch's random state stays as it was. ModelError for a name not in `names()`.
    """
    import torch

    if name not in _MAKERS:
        raise ModelError(f"tiny VLM {name!r}: there is none of this name. Take one of {', '.join(names())}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, processor = _MAKERS[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _qwen2_vl() -> tuple[Any, Any]:
    hf = _transformers()
    words = _qwen_words()
    config = hf.Qwen2VLConfig(
        text_config=_text_config(words, rope_parameters=_mrope()),
        vision_config=_qwen_vision(patch_size=14, embed_dim=_HIDDEN, hidden_size=_HIDDEN, mlp_ratio=2),
        **_qwen_ids(words),
    )
    parts = _qwen_parts(words, patch=14, video=hf.Qwen2VLVideoProcessor)
    return hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2VLProcessor(**parts)


def _qwen2_5_vl() -> tuple[Any, Any]:
    hf = _transformers()
    words = _qwen_words()
    config = hf.Qwen2_5_VLConfig(
        text_config=_text_config(words, rope_parameters=_mrope()),
        vision_config=_qwen_vision(
            patch_size=14, hidden_size=_HIDDEN, intermediate_size=2 * _HIDDEN, out_hidden_size=_HIDDEN,
            window_size=56, fullatt_block_indexes=[1],  # the first block looks at windows of 2 x 2 tokens
        ),
        **_qwen_ids(words),
    )  # fmt: skip
    parts = _qwen_parts(words, patch=14, video=hf.Qwen2VLVideoProcessor)
    return hf.Qwen2_5_VLForConditionalGeneration(config), hf.Qwen2_5_VLProcessor(**parts)


def _qwen3_vl() -> tuple[Any, Any]:
    hf = _transformers()
    words = _qwen_words()
    config = hf.Qwen3VLConfig(
        text_config=_text_config(words, head_dim=_HIDDEN // 4, rope_parameters=_mrope(mrope_interleaved=True)),
        vision_config=_qwen_vision(
            patch_size=16, hidden_size=_HIDDEN, intermediate_size=2 * _HIDDEN, out_hidden_size=_HIDDEN,
            num_position_embeddings=16, deepstack_visual_indexes=[0],
        ),
        **_qwen_ids(words),
    )  # fmt: skip
    parts = _qwen_parts(words, patch=16, video=hf.Qwen3VLVideoProcessor)
    return hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3VLProcessor(**parts)


def _internvl() -> tuple[Any, Any]:
    hf = _transformers()
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    media = {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}
    words = _words(media, *named.values(), **named)
    side, patch, tokens = 28, 7, 4  # tokens = (side / patch)^2 downsample_ratio^2
    config = hf.InternVLConfig(
        text_config=_text_config(words, model_type="qwen2"),
        vision_config=_vision_config(image_size=side, patch_size=patch),
        image_token_id=words.context_image_token_id,
        image_seq_length=tokens,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    square = {"height": side, "width": side}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=2),
        tokenizer=words,
        video_processor=hf.InternVLVideoProcessor(size=square),
        image_seq_length=tokens,
        chat_template=words.chat_template,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def _llava() -> tuple[Any, Any]:
    hf = _transformers()
    words = _words({"image": "<image>\n"}, "<image>")
    side, patch = 28, 14
    config = hf.LlavaConfig(
        text_config=_text_config(words, model_type="llama"),
        vision_config=_vision_config(
            model_type="clip_vision_model", image_size=side, patch_size=patch, projection_dim=_HIDDEN
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" takes away again
        chat_template=words.chat_template,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    """SmolVLM with the processor of Idefics3.

    Note: SmolVLM's own differs in videos alone, for which it asks for the package num2words.
    """
    hf = _transformers()
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    around = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    words = _words({"image": "<image>"}, *around, *tiles)
    side, patch, scale = 28, 7, 2
    config = hf.SmolVLMConfig(
        text_config=_text_config(words, model_type="llama"),
        vision_config=_vision_config(image_size=side, patch_size=patch),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=scale,
    )
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}, do_image_splitting=True
        ),
        tokenizer=words,
        image_seq_len=(side // patch // scale) ** 2,
        chat_template=words.chat_template,
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def _words(media: dict[str, str], *special: str, **named: str) -> Any:
    """A tokenizer of bytes that pads on the left; its chat template writes `media[type]` for a part that is no text."""
    return _text.qwen2_tokenizer(_TEMPLATE % json.dumps(media), *special, padding_side="left", **named)


def _text_config(words: Any, **more: Any) -> dict[str, Any]:
    """The language model's config, in the names that Llama, Qwen2 and Qwen3 share."""
    return {
        "vocab_size": len(words), "hidden_size": _HIDDEN, "intermediate_size": 2 * _HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "initializer_range": _SPREAD, "bos_token_id": None, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id, **more,
    }  # fmt: skip


def _vision_config(**more: Any) -> dict[str, Any]:
    """A vision tower's config, in the names that CLIP, SigLIP and InternViT share."""
    return {
        "hidden_size": _HIDDEN, "intermediate_size": 2 * _HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
        "initializer_range": _SPREAD, **more,
    }  # fmt: skip


def _qwen_words() -> Any:
    around = "<|vision_start|>{}<|vision_end|>"
    media = {"image": around.format("<|image_pad|>"), "video": around.format("<|video_pad|>")}
    return _words(media, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_ids(words: Any) -> dict[str, int]:
    parts = (
        ("image_token_id", "image_pad"),
        ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"),
    )
    return {key: words.convert_tokens_to_ids(f"<|{part}|>") for key, part in parts}


def _mrope(**more: Any) -> dict[str, Any]:
    """Rotary positions in time, height and width; the sections add up to half a head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **more}


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": _SPREAD,
        **more,
    }  # fmt: skip


def _qwen_parts(words: Any, *, patch: int, video: Callable[..., Any]) -> dict[str, Any]:
    """What makes a processor with 1 to 16 tokens a picture; a token is 2 x 2 patches, of 2 frames in a video."""
    area = (2 * patch) ** 2
    size = {"shortest_edge": area, "longest_edge": 16 * area}  # of a picture, or of all frames together
    return {
        "image_processor": _transformers().Qwen2VLImageProcessor(patch_size=patch, size=size),
        "video_processor": video(patch_size=patch, size=size),
        "tokenizer": words,
        "chat_template": words.chat_template,
    }


def _transformers() -> Any:
    """The library, imported on first use; its classes carry no types that a checker can follow."""
    import transformers

    return transformers


_MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "llava": _llava,
    "smolvlm": _smolvlm,
}
