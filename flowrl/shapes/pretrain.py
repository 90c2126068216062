"""Pretrain the built-in world's base model from nothing: a real, tiny Stable Diffusion 3 pipeline (arXiv:2403.03206).

Two stages, both seeded and resumable: an autoencoder (AutoencoderTiny, factor 8) on rendered scenes, then the denoiser
(SD3Transformer2DModel, rectified flow) together with its two CLIP text encoders on captioned latents. As with captions
from the web, some captions are wrong (`caption_noise`): the base model knows how to draw what a prompt says, but does
not always do so, which is what reinforcement learning then mends.

`flowrl shapes pretrain --output DIR` runs it; the result is a folder in diffusers format.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl.shapes.scenes import Scenes, draw, prompts, render
from rewards.shapes import CATEGORIES, COLORS, NUMBERS, RELATIONS, SHAPES, Spec, Thing, parse

MAX_TOKENS = 10
LATENT = (4, 12, 12)
WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a pretraining run. The defaults made the weights that flowrl ships."""

    seed: int = 0
    pool: int = 60_000
    """Scenes rendered once and drawn from ever after."""
    autoencoder_steps: int = 3_000
    autoencoder_batch: int = 32
    latent_noise: float = 0.35
    """Largest std of the Gaussian noise that the decoder learns to undo: small errors of the denoiser do not show."""
    denoiser_steps: int = 9_000
    denoiser_batch: int = 64
    caption_noise: float = 0.3
    """Share of captions in which one word is replaced by another of its kind."""
    caption_drop: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance (arXiv:2207.12598)."""
    focus_from: int = 6_500
    """From this step on half of every batch is hard prompts at high noise, where layout and binding are decided."""
    ema: float = 0.998
    save_every: int = 500


# Relations and bindings are the hard part of the world, so half of the pool is about them, and most of the focus is.
_MIX = {"single": 1, "two": 2, "counting": 2, "colors": 1, "position": 3, "attribution": 3}
_FOCUS = {"position": 0.6, "attribution": 0.3, "counting": 0.1}
_FOCUS_NOISE = 0.6  # lowest t of the focus


# ------------------------------------------------------------------------------------------------ parts


def build_tokenizer() -> Any:
    """A CLIP tokenizer made offline, in which every word of the grammar is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = sorted({w for s in prompts("train") + prompts("held_out") for w in s.prompt.split()} | {"an", "of"})
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words * 2, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *("".join(pair) for pair in merges)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer splits {word!r}: {tokenizer.tokenize(word)}")
    return tokenizer


def build_text_encoder(tokenizer: Any) -> nn.Module:
    """A randomly initialised CLIP text encoder of three layers, 64 wide."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def build_denoiser() -> nn.Module:
    """A randomly initialised SD3 transformer: 4 joint blocks, 128 wide, 6 x 6 image tokens."""
    from diffusers import SD3Transformer2DModel

    channels, side, _ = LATENT
    denoiser = SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=channels, out_channels=channels, num_layers=4,
        attention_head_dim=32, num_attention_heads=WIDTH // 32, joint_attention_dim=128, caption_projection_dim=WIDTH,
        pooled_projection_dim=128, pos_embed_max_size=side, qk_norm="rms_norm",
    )  # fmt: skip
    nn.init.zeros_(denoiser.proj_out.weight)
    return denoiser


def build_autoencoder() -> nn.Module:
    """A randomly initialised AutoencoderTiny of factor 8; most of its work is done at low resolution, for speed."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, latent_channels=LATENT[0],
        num_encoder_blocks=(0, 1, 1, 2), num_decoder_blocks=(2, 2, 1, 0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ data


def misread(spec: Spec, rng: random.Random) -> Spec:
    """The spec with one word replaced by another of its kind: what a careless caption writer would have written."""

    def other(current: Any, kind: list[Any]) -> Any:
        return rng.choice([k for k in kind if k != current])

    slots = [("shape", i) for i in range(len(spec.things))]
    slots += [("color", i) for i, t in enumerate(spec.things) if t.color]
    slots += [("count", 0)] * (spec.category == "counting") + [("relation", 0)] * bool(spec.relation)
    what, i = rng.choice(slots)
    things = list(spec.things)
    thing = things[i]
    if what == "relation":
        return Spec(spec.category, spec.things, other(spec.relation, list(RELATIONS)))
    if what == "shape":
        things[i] = Thing(other(thing.shape, list(SHAPES)), thing.color, thing.count)
    elif what == "color":
        things[i] = Thing(thing.shape, other(thing.color, list(COLORS)), thing.count)
    else:
        things[i] = Thing(thing.shape, thing.color, other(thing.count, list(NUMBERS.values())))
    return Spec(spec.category, tuple(things), spec.relation)


def captioned_scenes(count: int, seed: int, caption_noise: float) -> tuple[list[str], Scenes]:
    """`count` scenes and the captions they come with, a share `caption_noise` of which has one wrong word."""
    rng = random.Random(seed)
    everything = prompts("train") + prompts("held_out")
    by_category = {c: [s for s in everything if s.category == c] for c in CATEGORIES}
    names, weights = list(_MIX), list(_MIX.values())
    shown = [rng.choice(by_category[c]) for c in rng.choices(names, weights, k=count)]
    said = [misread(s, rng) if rng.random() < caption_noise else s for s in shown]
    return [s.prompt for s in said], draw(shown, seed)


def pictures(scenes: Scenes, chunk: int = 500) -> Iterator[Tensor]:
    """The scenes' pictures in chunks [n,3,S,S], scaled to [-1, 1] as autoencoders want them."""
    for i in range(0, len(scenes.shape), chunk):
        yield render(Scenes(*(field[i : i + chunk] for field in scenes))) * 2 - 1


# ------------------------------------------------------------------------------------------------ optimisation


def orthogonalised(update: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to `update` [N,m,n], by Muon's Newton-Schulz iteration (Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan 2024), all of one shape in one batch.

    Note: torch.optim.Muon orthogonalises one matrix at a time in bfloat16, three times slower on a CPU at this size.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        shapes = sorted({p.shape for p in matrices})
        groups = [{"params": [p for p in matrices if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nesterov momentum, orthogonalised, scaled so that the step is the same for every aspect ratio."""
        for group in self.param_groups:
            parameters, mu = group["params"], group["momentum"]
            updates = []
            for p in parameters:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                updates.append(p.grad.lerp(buffer, mu))
            rows, columns = parameters[0].shape
            for p, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def schedule(step: int, steps: int, warmup: int = 200, decay: float = 0.4) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (decay * steps)))


class Stage:
    """One resumable training stage: modules, their averages and optimisers, saved every so often as safetensors."""

    def __init__(
        self, folder: Path, modules: nn.ModuleDict, optimizers: list[torch.optim.Optimizer], ema: float
    ) -> None:
        self.folder, self.modules, self.optimizers, self.ema = folder, modules, optimizers, ema
        self.average = {name: p.detach().clone() for name, p in modules.named_parameters()}
        self.base_lr = [[group["lr"] for group in opt.param_groups] for opt in optimizers]
        self.step = 0

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"model.{k}": v.detach().contiguous() for k, v in self.modules.named_parameters()}
        out |= {f"average.{k}": v for k, v in self.average.items()}
        for i, opt in enumerate(self.optimizers):
            for j, p in enumerate(p for group in opt.param_groups for p in group["params"]):
                out |= {f"optimizer{i}.{j}.{k}": v for k, v in opt.state[p].items() if isinstance(v, Tensor)}
        return {k: v.clone(memory_format=torch.contiguous_format) for k, v in out.items()}

    def save(self) -> None:
        """Write the state, then move it over the old one, so that a kill in between costs nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".state.safetensors"
        save_file(self._tensors(), temporary, metadata={"step": str(self.step)})
        temporary.replace(self.folder / "state.safetensors")

    def resume(self) -> None:
        """Continue from the saved state, when there is one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as f:
            self.step = int(f.metadata()["step"])
        tensors = load_file(path)
        for name, p in self.modules.named_parameters():
            p.data.copy_(tensors[f"model.{name}"])
            self.average[name] = tensors[f"average.{name}"]
        for i, opt in enumerate(self.optimizers):
            for j, p in enumerate(p for group in opt.param_groups for p in group["params"]):
                prefix = f"optimizer{i}.{j}."
                opt.state[p] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def run(self, steps: int, loss: Callable[[torch.Generator], Tensor], seed: int, save_every: int) -> None:
        """Minimise `loss` for `steps` steps; each draws from its own generator: a resume changes nothing."""
        self.resume()
        started, first = time.monotonic(), self.step
        while self.step < steps:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
            for opt, rates in zip(self.optimizers, self.base_lr, strict=True):
                for group, rate in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(self.step, steps)
            value = loss(generator)
            self.modules.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for opt in self.optimizers:
                opt.step()
            self.step += 1
            decay = min(self.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, p in self.modules.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
            if self.step % 100 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"{self.folder.name} {self.step}/{steps}  loss {value.item():.4f}  {pace * 1000:.0f} ms/step",
                    flush=True,
                )
            if self.step % save_every == 0 or self.step == steps:
                self.save()

    def finish(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for name, p in self.modules.named_parameters():
                p.copy_(self.average[name])


# ------------------------------------------------------------------------------------------------ stages


def train_autoencoder(recipe: Recipe, folder: Path) -> nn.Module:
    """Stage 1: reconstruct rendered scenes through noisy latents whose channels are kept near mean 0 and variance 1."""
    torch.manual_seed(recipe.seed)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-3)
    stage = Stage(folder / "autoencoder", nn.ModuleDict({"autoencoder": autoencoder}), [optimizer], recipe.ema)
    stage.resume()
    if stage.step < recipe.autoencoder_steps:
        _, scenes = captioned_scenes(recipe.pool // 4, recipe.seed + 1, 0.0)
        pool = torch.cat([((x + 1) * 127.5).round().byte() for x in pictures(scenes)])

        def loss(generator: torch.Generator) -> Tensor:
            x = pool[torch.randint(len(pool), (recipe.autoencoder_batch,), generator=generator)].float() / 127.5 - 1
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                z = autoencoder.encoder(x)
            z = z.float()
            mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
            scale = recipe.latent_noise * torch.rand(len(z), 1, 1, 1, generator=generator)
            noisy = z + scale * torch.randn(z.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                y = autoencoder.decoder(noisy)
            error = y.float() - x
            # Objects cover a few per cent of the picture: weigh them up, or flat background wins.
            weight = 1 + 4 * ((x - x.amax((2, 3), keepdim=True)).abs().amax(1, keepdim=True) > 0.1)
            return (weight * (error.abs() + error**2)).mean() + 0.02 * (
                mean**2 + var - 1 - torch.log(var + 1e-6)
            ).mean()

        stage.run(recipe.autoencoder_steps, loss, recipe.seed, recipe.save_every)
    stage.finish()
    return autoencoder.eval()


@torch.no_grad()
def latent_pool(recipe: Recipe, autoencoder: nn.Module) -> tuple[list[str], Tensor, dict[str, float]]:
    """Captions, standardised latents [N,*L], and the shift and scale that make them so (in the VAE config's sense)."""
    captions, scenes = captioned_scenes(recipe.pool, recipe.seed + 2, recipe.caption_noise)
    latents = torch.cat(
        [autoencoder.encoder(x.contiguous(memory_format=torch.channels_last)) for x in pictures(scenes)]
    )
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    return captions, ((latents - shift) * scale).contiguous(), {"shift_factor": shift, "scaling_factor": scale}


def embed(encoders: list[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [N,S,128] and pooled ones [N,128], as StableDiffusion3Pipeline makes them of two CLIPs."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


def train_denoiser(recipe: Recipe, folder: Path, autoencoder: nn.Module) -> tuple[nn.ModuleDict, Any, dict[str, float]]:
    """Stage 2: rectified-flow matching of captioned latents, text encoders included."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    modules = nn.ModuleDict({"transformer": build_denoiser()})
    modules["text_encoder"], modules["text_encoder_2"] = build_text_encoder(tokenizer), build_text_encoder(tokenizer)
    matrices = [
        p for name, p in modules.named_parameters()
        if p.ndim == 2 and ("transformer_blocks" in name or "encoder.layers" in name) and ".norm1" not in name
    ]  # fmt: skip
    taken = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in taken]
    optimizers = [Muon(matrices), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-3)]
    stage = Stage(folder / "denoiser", modules, optimizers, recipe.ema)

    captions, latents, factors = latent_pool(recipe, autoencoder)
    vocabulary = {text: i for i, text in enumerate(["", *sorted(set(captions))])}
    ids = tokenizer(list(vocabulary), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    caption_of = torch.tensor([vocabulary[c] for c in captions])
    encoders = [modules["text_encoder"], modules["text_encoder_2"]]
    category = [spec.category if (spec := parse(text)) else "" for text in captions]
    size = Counter(category)
    share = torch.tensor([_FOCUS.get(c, 0.0) / size[c] for c in category])

    def loss(generator: torch.Generator) -> Tensor:
        n = recipe.denoiser_batch
        pick = torch.randint(len(latents), (n,), generator=generator)
        dropped = torch.rand(n, generator=generator) < recipe.caption_drop
        eps = torch.randn(n, *LATENT, generator=generator)
        t = torch.sigmoid(0.2 + 1.2 * torch.randn(n, generator=generator))  # logit-normal, as SD3
        if stage.step >= recipe.focus_from:
            pick[: n // 2] = torch.multinomial(share, n // 2, generator=generator)
            t[: n // 2] = _FOCUS_NOISE + (1 - _FOCUS_NOISE) * torch.rand(n // 2, generator=generator)
        text, x0 = torch.where(dropped, 0, caption_of[pick]), latents[pick]
        x = torch.lerp(x0, eps, t[:, None, None, None])
        unique, inverse = text.unique(return_inverse=True)
        tokens, pooled = embed(encoders, ids.input_ids[unique])
        v = modules["transformer"](
            hidden_states=x, timestep=t * 1000, encoder_hidden_states=tokens[inverse],
            pooled_projections=pooled[inverse], return_dict=False,
        )[0]  # fmt: skip
        return F.mse_loss(v, eps - x0)

    stage.run(recipe.denoiser_steps, loss, recipe.seed, recipe.save_every)
    stage.finish()
    return modules.eval(), tokenizer, factors


def assemble(modules: nn.ModuleDict, tokenizer: Any, autoencoder: nn.Module, factors: dict[str, float]) -> Any:
    """The parts as a StableDiffusion3Pipeline.

    The scheduler's grid ends at 0.1 before 0: by default diffusers ends at 0.001, which wastes the last step.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    autoencoder.register_to_config(**factors)
    return StableDiffusion3Pipeline(
        transformer=modules["transformer"], scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.1),
        vae=autoencoder, text_encoder=modules["text_encoder"], tokenizer=tokenizer,
        text_encoder_2=modules["text_encoder_2"], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


INFERENCE = {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 0, "height": 96, "width": 96}


def pretrain(output: Path, recipe: Recipe = Recipe()) -> Path:
    """Run both stages (or continue them) and write the pipeline to `output` in diffusers format, weights in float16."""
    work = output / ".pretrain"
    autoencoder = train_autoencoder(recipe, work)
    modules, tokenizer, factors = train_denoiser(recipe, work, autoencoder)
    pipeline = assemble(modules, tokenizer, autoencoder, factors)
    pipeline.to(torch.float16).save_pretrained(output)
    (output / "inference.json").write_text(json.dumps(INFERENCE, indent=2) + "\n")
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.rmtree(work)
    return output
