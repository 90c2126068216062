"""Pretrain the base model of the world that moves from nothing: a real, tiny Wan 2.1 pipeline (arXiv:2503.20314).

The stages of `flowrl.shapes.pretrain` for clips: a causal video autoencoder (AutoencoderKLWan, factor 8 in space and 4
in time), its decoder once more by itself, then the denoiser (WanTransformer3DModel, rectified flow) together with its
UMT5 text encoder. Some
captions are wrong on purpose (`caption_noise`), which is what reinforcement learning then mends.

`flowrl shapes pretrain --video --output DIR` runs it; the result is a folder in diffusers format.
Symbols: N clips, F frames, S x S pixels; L = (16, 3, 4, 4) the shape of a latent.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.shapes.clips import Tracks, draw, prompts, render
from flowrl.shapes.pretrain import Muon, Stage
from rewards.motion import CATEGORIES, DIRECTIONS, EVENTS, FRAMES, SHAPES, SIZE, TRAVEL, Clip
from rewards.shapes import COLORS

MAX_TOKENS = 12  # the longest sentence and its end
LATENT = (16, 3, 4, 4)
WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a pretraining run. The defaults made the weights that flowrl ships."""

    seed: int = 0
    pool: int = 40_000
    """Clips rendered once and drawn from ever after."""
    autoencoder_steps: int = 1_600
    autoencoder_batch: int = 24
    decoder_share: float = 0.375
    """As many steps more, of those of the autoencoder, that the decoder is trained for by itself."""
    latent_noise: float = 0.35
    """Largest std of the Gaussian noise that the decoder learns to undo: small errors of the denoiser do not show."""
    denoiser_steps: int = 4_000
    denoiser_batch: int = 64
    caption_noise: float = 0.3
    """Share of captions in which one word is replaced by another of its kind."""
    caption_drop: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance (arXiv:2207.12598)."""
    ema: float = 0.998
    save_every: int = 250


AUTOENCODER_SHAPES = ("circle", "square", "triangle")
"""What the autoencoder is trained on: it should know more than the sentences speak of."""
_MIX = {"move": 2, "speed": 3, "event": 2, "two": 5}  # two movers are the hard part of the world


# ------------------------------------------------------------------------------------------------ parts


def build_tokenizer() -> Any:
    """A T5 tokenizer made offline, in which every word of the grammar is one token."""
    from transformers import T5Tokenizer

    words = sorted({word for clip in prompts("train") + prompts("held_out") for word in clip.prompt.split()})
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words)]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: Any) -> nn.Module:
    """A randomly initialised UMT5 encoder of three layers, 64 wide."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config)


def build_denoiser() -> nn.Module:
    """A randomly initialised Wan transformer: 4 blocks, 128 wide, 3 x 4 x 4 tokens."""
    from diffusers import WanTransformer3DModel

    denoiser = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=WIDTH // 32, attention_head_dim=32, in_channels=LATENT[0],
        out_channels=LATENT[0], text_dim=64, freq_dim=64, ffn_dim=4 * WIDTH, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    nn.init.zeros_(denoiser.proj_out.weight)
    return denoiser


def build_autoencoder() -> nn.Module:
    """A randomly initialised AutoencoderKLWan that works on patches of 2 x 2 pixels and is a plain autoencoder.

    Its posterior has next to no variance: what the pipeline decodes is what training saw.
    """
    from diffusers import AutoencoderKLWan

    channels = LATENT[0]
    autoencoder = AutoencoderKLWan(
        base_dim=16, decoder_base_dim=24, z_dim=channels, dim_mult=[1, 1, 1], num_res_blocks=0,
        temperal_downsample=[True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_temporal=4, scale_factor_spatial=8,
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    )  # fmt: skip
    with torch.no_grad():
        autoencoder.quant_conv.weight[channels:] = 0
        autoencoder.quant_conv.bias[channels:] = -10.0  # log-variance
    return channels_last(autoencoder)


def channels_last(autoencoder: nn.Module) -> nn.Module:
    """The autoencoder with its convolutions' weights in the memory order that a CPU is twice as fast with."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return autoencoder


# ------------------------------------------------------------------------------------------------ data


def misread(clip: Clip, rng: random.Random) -> Clip:
    """The clip with one word replaced by another of its kind: what a careless caption writer would have written."""
    i = rng.randrange(len(clip.actors))
    actor = clip.actors[i]
    taken = {a.color for a in clip.actors}
    kinds: dict[str, list[Any]] = {"shape": list(SHAPES), "color": [c for c in COLORS if c not in taken]}
    kinds["does"] = list(EVENTS if actor.does in EVENTS else DIRECTIONS)
    if actor.speed:
        kinds["speed"] = [speed for speed in TRAVEL if speed]
    field = rng.choice(list(kinds))
    word = rng.choice([word for word in kinds[field] if word != getattr(actor, field)])
    actors = list(clip.actors)
    actors[i] = replace(actor, **{field: word})
    return Clip(clip.category, tuple(actors))


def captioned_clips(
    count: int, seed: int, caption_noise: float, shapes: tuple[str, ...] = SHAPES
) -> tuple[list[str], Tracks]:
    """`count` clips and the captions they come with, a share `caption_noise` of which has one wrong word."""
    rng = random.Random(seed)
    everything = prompts("train", shapes) + prompts("held_out", shapes)
    by_category = {c: [clip for clip in everything if clip.category == c] for c in CATEGORIES}
    shown = [rng.choice(by_category[c]) for c in rng.choices(list(_MIX), list(_MIX.values()), k=count)]
    said = [misread(clip, rng) if rng.random() < caption_noise else clip for clip in shown]
    return [clip.prompt for clip in said], draw(shown, seed)


def videos(tracks: Tracks, chunk: int = 500) -> Iterator[Tensor]:
    """The clips in chunks [n,3,F,S,S], scaled to [-1, 1] as autoencoders want them."""
    for i in range(0, len(tracks.shape), chunk):
        yield render(Tracks(*(field[i : i + chunk] for field in tracks))).movedim(1, 2) * 2 - 1


# ------------------------------------------------------------------------------------------------ stages


def train_autoencoder(recipe: Recipe, folder: Path) -> nn.Module:
    """Stage 1: reconstruct rendered clips through noisy latents whose channels are kept near mean 0 and variance 1."""
    torch.manual_seed(recipe.seed)
    autoencoder = build_autoencoder()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    stage = Stage(folder / "autoencoder", nn.ModuleDict({"autoencoder": autoencoder}), [optimizer], recipe.ema)
    stage.resume()
    if stage.step < recipe.autoencoder_steps:
        pool = pixel_pool(recipe, recipe.seed + 1, AUTOENCODER_SHAPES)

        def loss(generator: torch.Generator) -> Tensor:
            x = _pick(pool, recipe, generator)
            z = autoencoder.encode(x).latent_dist.mode()
            mean, var = z.mean((0, 2, 3, 4)), z.var((0, 2, 3, 4))
            spread = (mean**2 + var - 1 - torch.log(var + 1e-6)).mean()
            return reconstruction(autoencoder, x, z, recipe.latent_noise, generator) + 0.02 * spread

        stage.run(recipe.autoencoder_steps, loss, recipe.seed, recipe.save_every)
    stage.finish()
    return autoencoder.eval()


def train_decoder(recipe: Recipe, folder: Path, autoencoder: nn.Module) -> None:
    """Stage 2: the decoder once more, of frozen latents, on the shapes that the sentences speak of."""
    steps = round(recipe.decoder_share * recipe.autoencoder_steps)
    modules = nn.ModuleDict({"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv})
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    stage = Stage(folder / "decoder", modules, [optimizer], recipe.ema)
    stage.resume()
    if stage.step < steps:
        pool = pixel_pool(recipe, recipe.seed + 3, SHAPES)

        def loss(generator: torch.Generator) -> Tensor:
            x = _pick(pool, recipe, generator)
            with torch.no_grad():
                z = autoencoder.encode(x).latent_dist.mode()
            return reconstruction(autoencoder, x, z, recipe.latent_noise, generator)

        stage.run(steps, loss, recipe.seed, recipe.save_every)
    stage.finish()


def pixel_pool(recipe: Recipe, seed: int, shapes: tuple[str, ...]) -> Tensor:
    """Rendered clips [N,3,F,S,S] as bytes, a quarter of the recipe's pool."""
    _, tracks = captioned_clips(recipe.pool // 4, seed, 0.0, shapes)
    return torch.cat([((x + 1) * 127.5).round().byte() for x in videos(tracks)])


def _pick(pool: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A batch of the pool in [-1, 1]."""
    return pool[torch.randint(len(pool), (recipe.autoencoder_batch,), generator=generator)].float() / 127.5 - 1


def reconstruction(
    autoencoder: nn.Module, x: Tensor, z: Tensor, latent_noise: float, generator: torch.Generator
) -> Tensor:
    """Error of clips x [N,3,F,S,S] decoded from their latents z under noise of a random std up to `latent_noise`."""
    scale = latent_noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
    error = autoencoder.decode(z + scale * torch.randn(z.shape, generator=generator)).sample - x
    # Actors cover a few per cent of a frame: weigh them up, or flat background wins.
    weight = 1 + 4 * ((x - x.amax((3, 4), keepdim=True)).abs().amax(1, keepdim=True) > 0.1)
    return (weight * (error.abs() + error**2)).mean()


@torch.no_grad()
def latent_pool(recipe: Recipe, autoencoder: nn.Module) -> tuple[list[str], Tensor, dict[str, list[float]]]:
    """Captions, standardised latents [N,*L], and each channel's mean and std (as the VAE's config names them)."""
    captions, tracks = captioned_clips(recipe.pool, recipe.seed + 2, recipe.caption_noise)
    latents = torch.cat([autoencoder.encode(x).latent_dist.mode() for x in videos(tracks)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    latents = (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return captions, latents.contiguous(), {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def embed(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Prompt embeddings [N,S,64] as WanPipeline makes them: zero after the end of the sentence."""
    return encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]


def _matrices(modules: nn.ModuleDict) -> list[nn.Parameter]:
    """The weights inside of the blocks, which Muon trains."""
    inner = ("transformer.blocks.", "text_encoder.encoder.block.")
    return [
        p for name, p in modules.named_parameters()
        if p.ndim == 2 and name.startswith(inner) and "relative_attention_bias" not in name
    ]  # fmt: skip


def train_denoiser(
    recipe: Recipe, folder: Path, autoencoder: nn.Module
) -> tuple[nn.ModuleDict, Any, dict[str, list[float]]]:
    """Stage 3: rectified-flow matching of captioned latents, text encoder included."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    modules = nn.ModuleDict({"transformer": build_denoiser(), "text_encoder": build_text_encoder(tokenizer)})
    matrices = _matrices(modules)
    taken = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in taken]
    optimizers = [Muon(matrices), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-3)]
    stage = Stage(folder / "denoiser", modules, optimizers, recipe.ema)

    captions, latents, factors = latent_pool(recipe, autoencoder)
    vocabulary = {text: i for i, text in enumerate(["", *sorted(set(captions))])}
    tokens = tokenizer(list(vocabulary), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    caption_of = torch.tensor([vocabulary[c] for c in captions])

    def loss(generator: torch.Generator) -> Tensor:
        n = recipe.denoiser_batch
        pick = torch.randint(len(latents), (n,), generator=generator)
        dropped = torch.rand(n, generator=generator) < recipe.caption_drop
        eps = torch.randn(n, *LATENT, generator=generator)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(n, generator=generator))  # logit-normal, as SD3
        text, x0 = torch.where(dropped, 0, caption_of[pick]), latents[pick]
        unique, inverse = text.unique(return_inverse=True)
        embeddings = embed(modules["text_encoder"], tokens.input_ids[unique], tokens.attention_mask[unique])
        v = modules["transformer"](
            hidden_states=torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1)), timestep=t * 1000,
            encoder_hidden_states=embeddings[inverse], return_dict=False,
        )[0]  # fmt: skip
        return F.mse_loss(v, eps - x0)

    stage.run(recipe.denoiser_steps, loss, recipe.seed, recipe.save_every)
    stage.finish()
    return modules.eval(), tokenizer, factors


def assemble(modules: nn.ModuleDict, tokenizer: Any, autoencoder: nn.Module, factors: dict[str, list[float]]) -> Any:
    """The parts as a WanPipeline.

    The scheduler's grid ends at 0.1 before 0: by default diffusers ends at 0.001, which wastes the last step.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    autoencoder.register_to_config(**factors)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=modules["text_encoder"], vae=autoencoder, transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.1),
    )  # fmt: skip


INFERENCE = {
    "num_inference_steps": 10, "guidance_scale": 1.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES,
    "max_sequence_length": MAX_TOKENS,
}  # fmt: skip


def pretrain(output: Path, recipe: Recipe = Recipe()) -> Path:
    """Run all stages (or continue them) and write the pipeline to `output` in diffusers format, weights in float16."""
    work = output / ".pretrain"
    autoencoder = train_autoencoder(recipe, work)
    train_decoder(recipe, work, autoencoder)
    modules, tokenizer, factors = train_denoiser(recipe, work, autoencoder)
    pipeline = assemble(modules, tokenizer, autoencoder, factors)
    pipeline.to(torch.float16).save_pretrained(output)
    (output / "inference.json").write_text(json.dumps(INFERENCE, indent=2) + "\n")
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.rmtree(work)
    return output
