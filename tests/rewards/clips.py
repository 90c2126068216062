"""Tiny random models of the classes that compare pictures with texts, in the file layouts of their authors."""

import json
from functools import cache
from pathlib import Path

import torch

SIDE = 32
"""Of the pictures that they take."""
WORDS = ["a", "red", "circle", "sign", "that", "says", "two", "squares", "blue", "triangle", "above", "star"]


def loud(make, seed=0):
    """`make()` with random weights that matter: a fresh model answers almost the same to everything."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for weight in model.parameters():
            if weight.ndim:
                weight += 0.15 * torch.randn_like(weight)
    return model


def clip_tokenizer():
    """CLIP's byte-level BPE with a few merges; its end of text has the largest id, as in the real one."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("t", "w"), ("tw", "o</w>")]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=77,
        pad_token="<|endoftext|>",
    )


def _towers(vocabulary, end, length):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": end}
    return {"text_config": text, "vision_config": {**size, "image_size": SIDE, "patch_size": 8}}


def build_clip(folder, projection=12, resized=SIDE):
    """A CLIPModel with tokenizer and preprocessor_config.json, as openai/clip-vit-large-patch14 has them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer()
    towers = _towers(len(tokenizer), tokenizer.eos_token_id, 77)
    towers["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = loud(lambda: CLIPModel(CLIPConfig(projection_dim=projection, logit_scale_init_value=4.6052, **towers)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": resized}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def build_siglip(folder):
    """A SiglipModel with tokenizer and preprocessor_config.json, as google/siglip2-base-patch16-224 has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    pieces = ["<pad>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    loud(lambda: SiglipModel(SiglipConfig(**_towers(len(pieces), 0, 16)))).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(folder)
    return str(folder)


def build_dino(folder):
    """A Dinov2Model with preprocessor_config.json, as facebook/dinov2-base has them: resize to 40, cut of 32."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8)
    loud(lambda: Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def build_vit(folder):
    """A ViTForImageClassification of two classes, as aesthetic-shadow-v2 is: squashed, bilinear."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8,
        id2label={0: "hq", 1: "lq"}, label2id={"hq": 0, "lq": 1},
    )  # fmt: skip
    loud(lambda: ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(folder)
    return str(folder)


OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def build_open_clip(folder, name="tiny-reward-clip"):
    """Make a tiny architecture known to open_clip under `name`, and return a random network of it."""
    import open_clip

    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps(OPEN_CLIP), encoding="utf-8")
    open_clip.add_model_config(path)
    return loud(lambda: open_clip.CLIP(**open_clip.get_model_config(name)))


@cache
def photo(height, width, seed=0):
    """A PIL image [H,W] whose neighbouring pixels are alike, as in photographs: noise with a 1/f spectrum."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).standard_normal((3, height, width))
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    shaped = np.fft.ifft2(np.fft.fft2(noise) / np.maximum(np.hypot(fy, fx), 1 / max(height, width))).real
    levels = 127.5 + 50 * shaped / shaped.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))
