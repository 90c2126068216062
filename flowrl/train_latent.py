"""Training of a latent reward: from scored latents, the model's own or stored pairs (`flowrl reward train-latent`).

    data = draw_scored(policy, prompts, hub, conditions, geometry, samples_per_prompt=8, num_steps=20, seed=0)
    reward = LatentReward.of(policy.model, blocks=2)
    losses = fit(reward, data, steps=300)

Symbols: P prompts, B samples, n of them, *L a latent; t in [0, 1], 1 = noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from flowrl.collect import Conditions, Geometry, decode, draw, samples_of
from flowrl.config import Config
from flowrl.data import PromptSampler, load_prompts
from flowrl.engine import default_device
from flowrl.latent_reward import LatentReward, LatentRewardError
from flowrl.media import geometry_of, load_model
from flowrl.pairs import load_media, read_pairs
from flowrl.policy import Policy
from flowrl.types import Cond, Prompt, take
from rewards import HubResult, RewardHub

Objective = Literal["bradley_terry", "mse"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which the accuracy on held-out pairs is stated."""


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Clean latents and how good they are, several of each prompt."""

    cond: Cond
    """Of the prompts, each [P, ...]."""
    x0: Tensor
    """Latents [B,*L]."""
    prompt: Tensor
    """Index of each latent's prompt, int [B]."""
    reward: Tensor
    """[B]; NaN = no verdict."""

    def of_prompts(self, chosen: Tensor) -> Scored:
        """The samples of the prompts where `chosen`, bool [P], is true."""
        rows = chosen[self.prompt]
        return replace(self, x0=self.x0[rows], prompt=self.prompt[rows], reward=self.reward[rows])

    def groups(self) -> list[Tensor]:
        """The samples of each prompt that have a verdict, as indices."""
        known = self.reward.isfinite()
        return [torch.nonzero((self.prompt == p) & known).flatten() for p in self.prompt[known].unique()]


def draw_scored(
    policy: Policy, prompts: Sequence[Prompt], hub: RewardHub, conditions: Conditions, geometry: Geometry, *,
    samples_per_prompt: int, num_steps: int, seed: int, reward: str | None = None, batch: int = 150,
) -> Scored:  # fmt: skip
    """Samples of the model itself, scored; `reward` names a score, or a part as `reward.part`; None is the total."""
    index = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
    wanted = [prompts[i] for i in index.tolist()]
    batch = samples_per_prompt * max(1, batch // samples_per_prompt)  # a reward may compare the samples of a prompt
    latents, tickets = [], []
    for mine, x0 in zip(
        index.split(batch),
        draw(policy, wanted, range(len(wanted)), conditions, geometry, num_steps=num_steps, seed=seed, batch=batch),
        strict=True,
    ):
        latents.append(x0.cpu())
        media = decode(policy, x0, geometry.decode_batch)
        tickets.append(hub.submit(samples_of(media, prompts, mine, mine, geometry.fps)))
    values = torch.cat([_score_of(hub.result(ticket), reward) for ticket in tickets])
    return Scored(cond=conditions(prompts), x0=torch.cat(latents), prompt=index, reward=values)


def stored_pairs(prompts: Sequence[Prompt], model: Any, conditions: Conditions) -> Scored:
    """The media of a pair store (`flowrl.pairs.read_pairs`), encoded; each pair is compared with itself alone."""
    stored = [(index, medium) for index, prompt in enumerate(prompts) for medium in prompt.metadata["stored"]]
    latents: dict[str, Tensor] = {}
    for _, medium in stored:  # pairs of one group share their media
        if medium["media"] not in latents:
            latents[medium["media"]] = model.encode_media(load_media(medium["media"])[None])[0].cpu()
    sizes = {tuple(x0.shape): name for name, x0 in latents.items()}
    if len(sizes) > 1:
        (one, first), (two, second) = list(sizes.items())[:2]
        raise LatentRewardError(
            f"the pairs' media have several sizes: latents of {first} are {list(one)}, of {second} {list(two)}. "
            "A latent reward learns one size at a time: bring the media to one size, or split the store."
        )
    return Scored(
        cond=conditions(prompts),
        x0=torch.stack([latents[medium["media"]] for _, medium in stored]),
        prompt=torch.tensor([index for index, _ in stored]),
        reward=torch.tensor([float(medium["reward"]) for _, medium in stored]),
    )


def _score_of(result: HubResult, reward: str | None) -> Tensor:
    parts = {f"{name}.{part}": value for name, found in result.parts.items() for part, value in found.items()}
    known = {**result.scores, **parts}
    if reward is not None and reward not in known:
        raise LatentRewardError(f"there is no score {reward!r} in this config; there are: {', '.join(known)}.")
    return result.total if reward is None else known[reward]


# ------------------------------------------------------------------------------------------------ training


def fit(
    model: LatentReward, data: Scored, *, steps: int, objective: Objective = "bradley_terry", lr: float = 3e-4,
    weight_decay: float = 0.01, samples: int = 64, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Trains in place on latents noised at random times, and returns the loss of each step.

    "bradley_terry": -log sigmoid(r_i - r_j), the mean over all pairs of one prompt whose rewards differ, i the better.
    "mse": (r - reward)^2. The samples of one prompt share t in U(0, 1), each has its own noise; a step takes prompts
    until it has at least `samples` samples. AdamW, whose learning rate `lr` falls linearly to 0. Everything random
    depends on `seed` alone.

    LatentRewardError where there is nothing to learn: no verdicts, or for pairs no two samples of a prompt that differ.
    """
    if objective not in OBJECTIVES:
        raise LatentRewardError(f"unknown objective {objective!r}; there are {' and '.join(OBJECTIVES)}.")
    pairwise = objective == "bradley_terry"
    groups = [rows for rows in data.groups() if not pairwise or len(data.reward[rows].unique()) > 1]
    if not groups:
        raise LatentRewardError(
            "there is nothing to learn: no prompt has two samples with different rewards. Draw more samples a prompt, "
            "take prompts that the model sometimes fails at, or a reward with finer steps."
        )
    device = model.score.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    if not pairwise:  # start at the mean, which the head would need long to reach
        nn.init.constant_(model.score.bias, data.reward[torch.cat(groups)].mean().item())
    losses: list[float] = []
    order = _endless(len(groups), generator)
    for step in range(steps):
        for setting in optimizer.param_groups:
            setting["lr"] = lr * (1 - step / steps)
        chosen = [next(order)]
        while sum(len(groups[g]) for g in chosen) < samples and len(chosen) < len(groups):
            chosen.append(next(order))
        rows = torch.cat([groups[g] for g in chosen])
        number = torch.tensor([len(groups[g]) for g in chosen])
        t = torch.rand(len(chosen), generator=generator).repeat_interleave(number)
        noise = torch.randn(data.x0[rows].shape, generator=generator)
        r = _judge(model, data, rows, t, noise)
        loss = _loss(r, data.reward[rows].to(device), data.prompt[rows].to(device), objective)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def better(reward: Tensor, prompt: Tensor) -> Tensor:
    """Whether i beats j, bool [B,B]: one prompt, and a higher reward; never where one of them has no verdict."""
    return (prompt[:, None] == prompt) & (reward[:, None] > reward)


def _loss(r: Tensor, reward: Tensor, prompt: Tensor, objective: Objective) -> Tensor:
    if objective == "mse":
        return (r - reward.to(r)).square().mean()
    return -logsigmoid(r[:, None] - r)[better(reward, prompt)].mean()


def _judge(model: LatentReward, data: Scored, rows: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Reward [n] of these latents, noised to t [n]."""
    device = model.score.weight.device
    share = t.view(-1, *[1] * (noise.ndim - 1))
    x = (1 - share) * data.x0[rows].float() + share * noise
    return model(x.to(device), t.to(device), take(data.cond, data.prompt[rows]))


def _endless(number: int, generator: torch.Generator) -> Iterator[int]:
    """Epoch after epoch of 0 ... number - 1, each in an order of its own."""
    while True:
        yield from torch.randperm(number, generator=generator).tolist()


@torch.no_grad()
def pair_accuracy(model: LatentReward, data: Scored, *, seed: int = 0, batch: int = 256) -> dict[str, dict[str, Any]]:
    """How often the better sample of a pair gets the higher reward, by noise level: {t: {accuracy, se, pairs}}.

    Equal rewards of the model count half. The standard error is over prompts, as the pairs of one share samples. None
    where there are too few.
    """
    found: dict[str, dict[str, Any]] = {}
    for level in LEVELS:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(data.x0.shape, generator=generator)
        t = torch.full((len(data.x0),), level)
        rows = torch.arange(len(data.x0)).split(batch)
        r = torch.cat([_judge(model, data, part, t[part], noise[part]).cpu() for part in rows])
        right = (torch.sign(r[:, None] - r) + 1) / 2
        pairs = better(data.reward, data.prompt)
        each = torch.tensor([right[g][:, g][pairs[g][:, g]].mean() for g in data.groups()], dtype=torch.float64)
        each = each[each.isfinite()]  # prompts without a pair
        found[f"{level:g}"] = {
            "accuracy": each.mean().item() if len(each) else None,
            "se": (each.std() / math.sqrt(len(each))).item() if len(each) > 1 else None,
            "pairs": int(pairs.sum()),
        }
    return found


# ------------------------------------------------------------------------------------------------ the command


def train_latent(
    config: Config, output: str | Path, *, reward: str | None = None, pairs: str | Path | None = None,
    num_prompts: int = 128, samples_per_prompt: int = 8, num_steps: int | None = None, steps: int = 300,
    blocks: int = 2, objective: Objective = "bradley_terry", lr: float = 1e-3, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Fits a latent reward for a config's model, saves it in `output`, and returns what its json says.

    It learns from the model's own samples of the config's training prompts, scored by the config's rewards (`reward`
    names the score; None is the total), or from a pair store. One prompt in eight is held out for the pair accuracy.
    """
    device = default_device(config.engine.device)
    policy = Policy(load_model(config, device), frozen=True, guidance=config.model.guidance, device=device)
    conditions = Conditions(encode=policy.encode, device=policy.device)
    made = LatentReward.of(policy.model, blocks, seed=seed)  # first: a model that has none is refused at once
    if pairs is not None:
        prompts = read_pairs(pairs)
        data = stored_pairs(prompts, policy.model, conditions)
    else:
        known = load_prompts(config.data.prompts, "train")
        prompts = PromptSampler(known, num_prompts, seed, config.data.balance)(0)
        with RewardHub([entry.entry() for entry in config.rewards], device=device) as hub:
            data = draw_scored(
                policy, prompts, hub, conditions, geometry_of(config, policy.model), reward=reward, seed=seed,
                samples_per_prompt=samples_per_prompt, num_steps=num_steps or config.data.evaluation.num_steps,
                batch=config.data.evaluation.batch_size,
            )  # fmt: skip
    held_out = _held_out([p.text for p in prompts], seed)
    losses = fit(made, data.of_prompts(~held_out), steps=steps, objective=objective, lr=lr, seed=seed)
    facts = {
        "model": config.model.path, "reward": "the pairs' own" if pairs is not None else reward or "total",
        "objective": objective, "prompts": len(prompts), "samples": len(data.x0),
        "no_verdict": int(data.reward.isnan().sum()), "steps": steps, "lr": lr, "seed": seed,
        "loss": sum(losses[-20:]) / len(losses[-20:]), "held_out_prompts": int(held_out.sum()),
        "pair_accuracy": pair_accuracy(made, data.of_prompts(held_out), seed=seed),
    }  # fmt: skip
    made.save(output, facts)
    return facts


def _held_out(texts: Sequence[str], seed: int) -> Tensor:
    """Which prompts are kept from training, bool [P]: one text in eight, and all prompts of that text."""
    known = list(dict.fromkeys(texts))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = {known[i] for i in order[: -(-len(known) // 8)]} if len(known) > 1 else set()
    return torch.tensor([text in kept for text in texts])
