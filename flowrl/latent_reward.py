"""A reward that judges noised latents, to guide sampling with: Flow-NRG (arXiv:2501.13918).

    reward = LatentReward.of(model, blocks=2)
    reward.save("latent")                                       # once flowrl.train_latent has fitted it
    media = sample(..., guide=guided_by([(LatentReward.load("latent", model), 0.5)]))

It needs no decoder: it is the first blocks of the generator itself with a small head, trained on latents that were
scored once, after decoding.

Symbols: P prompts, N states, *L = (C, h, w) a latent; t in [0, 1], 1 = noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl.collect import Guidance
from flowrl.types import Cond, take
from samplers import Velocity, reward_guided

FORMAT = 1
WEIGHTS, FACTS = "latent_reward.safetensors", "latent_reward.json"
HIDDEN = 128

_SHARED = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
"""Parts of the generator's transformer that the reward begins with."""


class LatentRewardError(ValueError):
    """A latent reward that cannot be built, trained, saved or loaded as asked, with the reason and the way out."""


class LatentReward(nn.Module):
    """r(x_t, t, prompt): the first blocks of a generator's transformer, and a head on their image tokens.

    Every token passes a small network, and the mean over the tokens becomes one number, 0 before training. Float32
    whatever the generator's dtype. Trained by pairs (Bradley-Terry) a difference of 1 means odds of e : 1.

    Note: the paper says that the first layers of the generator are used, not how they are read; the head is ours.
    """

    def __init__(self, config: Mapping[str, Any], blocks: int, *, time_scale: float = 1000.0, seed: int = 0) -> None:
        """Random weights in the form that a transformer's `config` and the number of `blocks` give.

        `time_scale` is what the generator multiplies t by.
        """
        from diffusers import SD3Transformer2DModel

        super().__init__()
        self.config, self.time_scale = dict(config), time_scale
        layers = int(config["num_layers"])
        if not 1 <= blocks <= layers:
            raise LatentRewardError(f"blocks is {blocks}, but the model has {layers}: choose from 1 to {layers}.")
        # The last block of a transformer has another form, so one more is built than is kept.
        form = {**{k: v for k, v in config.items() if not k.startswith("_")}, "num_layers": min(blocks + 1, layers)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trunk: Any = SD3Transformer2DModel.from_config(form)  # type: ignore[no-untyped-call]
            self.pos_embed, self.time_text_embed = trunk.pos_embed, trunk.time_text_embed
            self.context_embedder = trunk.context_embedder
            self.transformer_blocks = nn.ModuleList(trunk.transformer_blocks[:blocks])
            self.head = nn.Sequential(nn.LayerNorm(trunk.inner_dim), nn.Linear(trunk.inner_dim, HIDDEN), nn.GELU())
            self.score = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    @property
    def blocks(self) -> int:
        """How many of the generator's blocks it has."""
        return len(self.transformer_blocks)

    @classmethod
    def of(cls, model: Any, blocks: int = 2, *, seed: int = 0) -> LatentReward:
        """One that begins as the first `blocks` of this model; a LatentRewardError where its transformer has none."""
        config = _config_of(model)
        reward = cls(config, blocks, time_scale=float(model.pipe.scheduler.config.num_train_timesteps), seed=seed)
        wanted = {name for name in reward.state_dict() if name.startswith(_SHARED)}
        given = {name: tensor.float() for name, tensor in model.trainable.state_dict().items() if name in wanted}
        if absent := sorted(wanted - set(given)):
            raise LatentRewardError(
                f"the model's transformer lacks {len(absent)} of the weights that its config promises, e.g. "
                f"{absent[0]}. If it carries adapters, build the reward on the bare model."
            )
        reward.load_state_dict(given, strict=False)
        return reward.to(next(model.trainable.parameters()).device)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Reward [N] of states x [N,*L] at times t [N]; conditions [N, ...] as the model's `encode` gives them."""
        image = self.pos_embed(x.float()).contiguous()
        context = self.context_embedder(cond["prompt_embeds"].to(image))
        time = self.time_text_embed(t.to(image) * self.time_scale, cond["pooled_prompt_embeds"].to(image))
        for block in self.transformer_blocks:
            context, image = block(hidden_states=image, encoder_hidden_states=context, temb=time)
        return self.score(self.head(image).mean(1)).squeeze(1)

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> Path:
        """Writes weights and a json of what they are, with `facts` about their training; returns the folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
                  target / WEIGHTS)  # fmt: skip
        form = {"format": FORMAT, "blocks": self.blocks, "time_scale": self.time_scale, "transformer": self.config}
        (target / FACTS).write_text(json.dumps({**form, **(facts or {})}, indent=2) + "\n")
        return target

    @classmethod
    def load(cls, folder: str | Path, model: Any) -> LatentReward:
        """A saved one, frozen and on the device of the model that it is to guide.

        LatentRewardError where files are missing or broken, or where it was trained on a model of another form.
        """
        source, form = Path(folder), read_facts(folder)
        own, its = _config_of(model), form["transformer"]
        other = [name for name in sorted(own.keys() | its.keys()) if own.get(name) != its.get(name)]
        if other:
            raise LatentRewardError(
                f"the latent reward in {source} does not fit this model: {other[0]} is {its.get(other[0])!r} there and "
                f"{own.get(other[0])!r} here. It can guide only the model that it was trained on, or what was "
                "fine-tuned from it: train one with `flowrl reward train-latent`."
            )
        reward = cls(its, form["blocks"], time_scale=form["time_scale"])
        try:
            reward.load_state_dict(load_file(source / WEIGHTS))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise LatentRewardError(f"{source / WEIGHTS} cannot be read ({error}); train it again.") from error
        return reward.requires_grad_(False).eval().to(next(model.trainable.parameters()).device)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What the json beside a latent reward's weights says; a LatentRewardError where there is none to be understood."""
    path = Path(folder) / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = facts["format"] == FORMAT and {"blocks", "time_scale", "transformer"} <= facts.keys()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LatentRewardError(
            f"{folder} holds no latent reward ({FACTS}: {error}). Give the --output of `flowrl reward train-latent`."
        ) from error
    if not whole:
        raise LatentRewardError(f"{path} is of another format than {FORMAT}: train the reward again.")
    return facts


def _config_of(model: Any) -> dict[str, Any]:
    """The form of a model's transformer; a LatentRewardError where it has not the parts that are needed."""
    transformer: Any = getattr(model, "trainable", None)
    absent = [part for part in _SHARED if not hasattr(transformer, part)]
    if absent or not hasattr(transformer, "config"):
        raise LatentRewardError(
            f"a latent reward is made of the first blocks of a Stable Diffusion 3 transformer; this model's "
            f"{type(transformer).__name__} has no {', '.join(absent or ['config'])}. Choose a model of that family."
        )
    # As JSON would give it back: tuples become lists.
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in transformer.config.items() if k[0] != "_"}))
    return found


def guided_by(
    guides: Sequence[tuple[LatentReward, float]], *, max_factor: float = 10.0,
    t_range: tuple[float, float] = (0.0, 1.0), max_ratio: float | None = None,
) -> Guidance:  # fmt: skip
    """For `sample` and `evaluate`: the velocity corrected by each reward's gradient times its weight.

    Limits as in `samplers.reward_guided`.
    """

    def guide(velocity: Velocity, cond: Cond) -> Velocity:
        pairs = [(_at(reward, cond), weight) for reward, weight in guides]
        return reward_guided(velocity, pairs, max_factor=max_factor, t_range=t_range, max_ratio=max_ratio)

    return guide


def _at(reward: LatentReward, cond: Cond) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, index: reward(x, t, take(cond, index))
