"""Generators of pictures and videos as the acting half of a run: rollouts, decoding, rewards, evaluation, export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowrl import tiny
from flowrl.actor import watched
from flowrl.algorithms.schedule import plans_of
from flowrl.collect import (
    Conditions,
    Geometry,
    Guidance,
    StoredSamples,
    check_sources,
    check_stored,
    decode_and_submit,
    example_of,
    roll_out,
    sample,
)  # fmt: skip
from flowrl.config import Config, ModelConfig, media_problems, stored_per_prompt
from flowrl.configfile import Key
from flowrl.costs import describe, expected_cost
from flowrl.data import BUILT_IN, BUILT_IN_VIDEO, fingerprint, load_prompts
from flowrl.engine import Engine
from flowrl.evaluate import Evaluation, evaluate, evaluation_prompts
from flowrl.memory import explained, fit, loading_options
from flowrl.models.pipeline import ModelError, load
from flowrl.policy import Policy, load_weights
from flowrl.record import Recorder
from flowrl.replay import Replayed
from flowrl.report import save_grid
from flowrl.resolve import resolve
from flowrl.rollouts import write_rollout
from flowrl.types import AnyBatch, Batch, Prompt, TokenBatch, Tokens
from flowrl.weights import FORMATS, Format
from rewards import HubResult, RewardHub, catalogue
from rewards.combine import Rule
from samplers import Plan, Trajectory

LARGEST_SIDE = 256
"""Pixels; a model that generates larger pictures is tried with this."""
MOST_FRAMES = 9
"""A multiple of 8 and one more, which suits every video family."""
MEMORY_SHARE = 0.5
"""Share of the free memory that the graphs of a single-pass update may take where nobody asked for it."""


class MediaActor:
    """`flowrl.actor.Actor` of a generator in flow coordinates."""

    denoises = True
    guide: Guidance | None = None

    def __init__(self, config: Config, algorithm: Any, engine: Engine) -> None:
        self.config, self.algorithm, self.engine = config, algorithm, engine
        data = config.data
        self.prompts = load_prompts(data.prompts, "train")
        if hasattr(algorithm, "check_prompts"):
            algorithm.check_prompts(self.prompts)
        if wanted := stored_per_prompt(config):
            check_stored(self.prompts, wanted)
        self.eval_prompts = evaluation_prompts(
            load_prompts(data.eval_prompts or data.prompts, "held_out"), data.evaluation.num_samples
        )
        self.hub = RewardHub([entry.entry() for entry in config.rewards], device=engine.device, max_nan_frac=None)
        self._held_out = _held_out(config, self.hub, engine.device)
        needs = algorithm.needs
        if needs.gradient:
            self.hub.check_differentiable()
        if needs.features:
            self.hub.embedder()
        self.measures = [resolve(name, "flowrl.shapes") for name in data.evaluation.measures]
        self.judges = data.samples == "rollout" and needs.rewards

    @staticmethod
    def problems(config: Config) -> Iterator[tuple[Key, str]]:
        """What is wrong with a config before weights are loaded."""
        return media_problems(config)

    @staticmethod
    def notes(config: Config) -> Iterator[str]:
        """Weights, packages and programs that rewards lack here."""
        for entry in (*config.rewards, *config.eval_rewards):
            for _, mend in catalogue.describe(entry.use, entry.options).obstacles:
                yield f"reward {entry.use!r} cannot run here yet: {mend}"

    @staticmethod
    def small(config: Config) -> dict[str, Any]:
        """Few steps, and sides and frames that any machine can take.

        Sides above 256 pixels, and those that a hub's model chooses itself, become 256. A tiny pipeline has a size,
        frames, prompt length and precision of its own.
        """
        steps = {"data.evaluation.num_steps": min(4, config.data.evaluation.num_steps)}
        if not config.model.path.startswith(tiny.PREFIX):
            return steps | {f"model.{key}": value for key, value in _small_size(config.model).items()}
        own = ("height", "width", "frames", "max_sequence_length")
        return steps | {f"model.{key}": "null" for key in own} | {"model.dtype": "float32"}

    @staticmethod
    def forms(config: Config) -> tuple[str, ...]:
        """Those of `flowrl.weights`."""
        return FORMATS

    @staticmethod
    def forecast(
        config: Config, devices: int, tflops: float | None, memory: float | None
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """From a pipeline without weights, walked once (`flowrl.estimate`)."""
        from flowrl import estimate

        algorithm, data = config.algorithm.build(), config.data
        model = estimate.sketch(config)
        check_sources(model, load_prompts(data.prompts, "train"))
        policy = Policy(model, lora=config.model.lora and config.model.lora.model_dump())
        size = geometry_of(config, model)
        times = model.times(algorithm.num_steps, size.height, size.width, size.frames)
        plans = plans_of(algorithm, times, 0, data.samples_per_prompt, config.seed)
        speed = estimate.speed_of(config, tflops)
        cost = expected_cost(config, algorithm, plans)
        told = describe(config, algorithm, plans, trainable=policy.num_trainable, world=devices)
        return told, estimate.lines(config, policy, cost, devices, speed, memory)

    @property
    def held_out(self) -> dict[str, Rule]:
        """Rewards that are only watched."""
        return {} if self._held_out is None else dict(self._held_out.rules)

    def fingerprint(self, prompts: Sequence[Prompt]) -> str:
        """A hash of texts, metadata and pictures."""
        return fingerprint(prompts)

    def load(self) -> None:
        """The pipeline, its policy, and what decodes and scores with gradients where the method asks."""
        config, needs = self.config, self.algorithm.needs
        with explained(config, "loading"):
            self._take(self._build_policy())
        check_sources(self.policy.model, [*self.prompts, *self.eval_prompts])
        self.stored = StoredSamples(policy=self.policy, geometry=self.geometry) if self._from_disk else None
        """Where samples come from instead of a rollout."""
        self.critic = None
        if needs.gradient:
            from flowrl.critic import Critic

            self.critic = Critic(self.policy, self.hub, decode_batch=config.model.decode_micro_batch)
            self.critic.fps = self.geometry.fps

    def load_finished(self, weights: Path | None) -> None:
        """The pipeline, frozen, with exported weights or without."""
        self._take(self._finished(weights, load_model(self.config, self.engine.device)))

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """The policy of a checkpoint, without its critic, teachers and old policy."""
        config = self.config
        policy = Policy(
            load_model(config), lora=config.model.lora and config.model.lora.model_dump(),
            guidance=config.model.guidance, ema_decay=config.optimizer.ema_decay,
        )  # fmt: skip
        policy.load_state_dict(state)
        self._take(policy)

    def _take(self, policy: Policy) -> None:
        self.policy = policy
        self.geometry = geometry_of(self.config, policy.model)
        self.conditions = Conditions(encode=policy.encode, device=policy.device)

    def _finished(self, weights: Path | None, model: Any) -> Policy:
        policy = Policy(model, frozen=True, guidance=self.config.model.guidance, device=self.engine.device)
        if weights is not None:
            load_weights(policy, weights)
        return policy

    @property
    def _from_disk(self) -> bool:
        return self.config.data.samples == "stored"

    def describe(self) -> list[tuple[str, str]]:
        """Calls, steps and updates of an iteration."""
        trainable, world = self.policy.num_trainable, self.engine.world
        return describe(self.config, self.algorithm, self.plan(0), trainable=trainable, world=world)

    def warmup(self, everywhere: bool) -> None:
        """Try each reward once, and its gradient where the method asks."""
        self.hub.warmup(gradient=self.algorithm.needs.gradient)
        if self._held_out is not None and everywhere:
            self._held_out.warmup()

    # -------------------------------------------------------------------------------------------- samples

    def plan(self, iteration: int) -> tuple[Plan, ...]:
        """The algorithm's plan, or plans."""
        config = self.config
        return plans_of(self.algorithm, self.times, iteration, config.data.samples_per_prompt, config.seed)

    def collect(self, plan: tuple[Plan, ...], prompts: Sequence[Prompt], slots: Sequence[int], iteration: int) -> Batch:
        """Samples of the policy, or those that the prompts' rows name."""
        config = self.config
        with explained(config, "rollout"):
            if self.stored is not None:
                batch = self.stored(prompts, slots, self.conditions, iteration=iteration, seed=config.seed)
            else:
                batch = roll_out(
                    self.policy, self.algorithm, plan, prompts, slots, self.conditions, self.geometry,
                    samples_per_prompt=config.data.samples_per_prompt, iteration=iteration, seed=config.seed,
                    recorder=self._recorder(plan, iteration),
                )  # fmt: skip
        return replace(batch, times=self.times)

    def submit(self, batch: AnyBatch) -> Callable[[], HubResult]:
        """Decode, a few groups at a time, each handed to the rewards at once."""
        assert isinstance(batch, Batch)
        if not self.judges:
            return lambda: _unjudged(batch)
        with explained(self.config, "decode"):
            tickets = decode_and_submit(self.policy, batch, self.hub, self.geometry)
        return lambda: _join([self.hub.result(ticket) for ticket in tickets])

    def prepared(self, batch: AnyBatch) -> AnyBatch:
        """With the critic, and the draws of methods that keep finished samples."""
        assert isinstance(batch, Batch)
        batch = replace(batch, critic=self.critic)
        return replace(batch, draws=self.algorithm.draws(batch))

    def facts(self, batch: AnyBatch) -> dict[str, Tensor]:
        """Nothing besides the scores."""
        return {}

    def metrics(
        self, prompts: Sequence[Prompt], batch: AnyBatch, table: Tensor, scores: Mapping[str, Tensor],
        facts: Mapping[str, Tensor], seconds: float,
    ) -> dict[str, float]:  # fmt: skip
        """Whether the update took the rollout's own graphs."""
        assert isinstance(batch, Batch)
        return {"single_pass": float(batch.velocity is not None)}

    def join(self, batches: Sequence[AnyBatch]) -> AnyBatch:
        """The samples of several tries under each other; graphs of a single pass do not survive it."""
        parts = [batch for batch in batches if isinstance(batch, Batch)]
        if len(parts) == 1:
            return parts[0]
        prompts = [prompt for part in parts for prompt in part.prompts]
        offsets = [sum(len(part.prompts) for part in parts[:i]) for i in range(len(parts))]
        moved = [
            replace(part.trajectory, prompt=part.trajectory.prompt + o, leaf_prompt=part.trajectory.leaf_prompt + o)
            for part, o in zip(parts, offsets, strict=True)
        ]
        trajectory = Trajectory.cat(moved)
        media = None if parts[0].media is None else torch.cat([p.media for p in parts if p.media is not None])
        return replace(
            parts[0], prompts=prompts, cond=self.conditions(prompts), trajectory=trajectory,
            leaf_prompt=trajectory.leaf_prompt, media=media,
        )  # fmt: skip

    def revive(self, batch: AnyBatch, dead: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """A picture cannot be begun by its solution."""
        return []

    def replayed(self, batch: TokenBatch, again: Replayed[Tokens], mine: Tensor) -> TokenBatch:
        """Only answers are remembered; the config says so."""
        raise NotImplementedError("data.replay is for models that write")

    def record(self, folder: Path, iteration: int, batch: AnyBatch, result: HubResult) -> None:
        """The first groups as a sheet of pictures, and a line each."""
        assert isinstance(batch, Batch)
        write_rollout(folder, iteration, batch, result)

    # -------------------------------------------------------------------------------------------- for people

    def evaluate(self) -> Evaluation:
        """The same prompts and noise every time."""
        settings = self.config.data.evaluation
        return evaluate(
            self.policy, self.eval_prompts, self.hub, self.conditions, self.geometry, num_steps=settings.num_steps,
            seed=settings.seed, measures=self.measures, batch=settings.batch_size, guide=self.guide,
            held_out=self._held_out,
        )  # fmt: skip

    def show(self, found: Evaluation, path: Path) -> None:
        """A grid of pictures above their prompts; of videos it moves."""
        save_grid(found, path, self.config.data.evaluation.grid_prompts, fps=self.geometry.fps)

    def export(self, folder: Path, *, form: str | None = None, averaged: bool = True) -> str:
        """Weights, with the steps and the size of the evaluations and their first sample as an example."""
        example = example_of(self.policy, self.eval_prompts, self.geometry, self.config.data.evaluation.seed)
        self.policy.export(
            folder, averaged=averaged, inference=inference_settings(self.config), example=example,
            form=cast(Format, form or FORMATS[0]),
        )  # fmt: skip
        return "for diffusers"

    def check_export(self, folder: Path) -> None:
        """Load them into a model of their own, and draw the first held-out prompt."""
        policy = self._finished(folder, load_model(self.config))
        conditions = Conditions(encode=policy.encode, device=policy.device)
        media = sample(policy, self.eval_prompts[:1], [0], conditions, self.geometry, num_steps=2, seed=0)
        if not bool(media.isfinite().all()):
            raise ModelError(f"the exported weights in {folder} give samples that are not finite.")

    def close(self) -> None:
        """Close the rewards."""
        self.hub.close()
        if self._held_out is not None:
            self._held_out.close()

    # -------------------------------------------------------------------------------------------- parts of it

    def _build_policy(self) -> Policy:
        config = self.config
        needs = self.algorithm.needs
        model = load_model(config)
        self.in_effect = fit(model, config.model, self.engine.device)
        return Policy(
            model, lora=config.model.lora and config.model.lora.model_dump(),
            guidance=config.model.guidance, ema_decay=config.optimizer.ema_decay,
            reference=needs.reference or None in needs.teachers, old=needs.old,
            teachers=[t for t in needs.teachers if t is not None],
            largest_guidance=needs.guidance,
            device=self.engine.device, seed=config.seed,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )  # fmt: skip

    @property
    def times(self) -> Tensor:
        """The grid of a training rollout that the model's own pipeline would take."""
        g = self.geometry
        return self.policy.model.times(self.algorithm.num_steps, g.height, g.width, g.frames)

    def _recorder(self, plans: tuple[Plan, ...], iteration: int) -> Recorder | None:
        """What keeps the rollout's graphs where the update takes them; see `optimizer.update`."""
        expected = expected_cost(self.config, self.algorithm, plans, iteration)
        if not expected.single_pass or self.config.data.max_tries > 1:
            return None
        asked = self.config.optimizer.update == "single_pass"
        states = math.ceil(expected.stored / self.engine.world)
        return Recorder(policy=self.policy, states=states, memory_share=None if asked else MEMORY_SHARE)


def _held_out(config: Config, trained: RewardHub, device: Any) -> RewardHub | None:
    """The rewards that are not trained on. One that fails stops nothing, and its mean is missing."""
    if not config.eval_rewards:
        return None
    # Each has a weight, which has no meaning here but that it is no mistake.
    hub = RewardHub([e.entry() | {"weight": 1.0} for e in config.eval_rewards], device=device, max_nan_frac=None)
    return watched(hub, trained)


def _small_size(section: ModelConfig) -> dict[str, int]:
    inside = section.path in (BUILT_IN, BUILT_IN_VIDEO)
    sides = {side: getattr(section, side) or (0 if inside else LARGEST_SIDE + 1) for side in ("height", "width")}
    large = {side: LARGEST_SIDE for side, pixels in sides.items() if pixels > LARGEST_SIDE}
    return large | ({"frames": MOST_FRAMES} if (section.frames or 1) > MOST_FRAMES else {})


def options_of(section: ModelConfig) -> dict[str, Any]:
    """What a config says to the constructor of a family's class."""
    names = ("height", "width", "frames", "fps", "max_sequence_length", "embedded_guidance", "negative_prompt")
    return {name: getattr(section, name) for name in names if getattr(section, name) is not None}


def load_model(config: Config, device: torch.device | str | None = None) -> Any:
    """The generator of a config, still on the CPU; with `device` it is made to fit there (`flowrl.memory.fit`)."""
    section = config.model
    model = load(
        section.path, family=section.family, dtype=getattr(torch, section.dtype), loading=loading_options(section),
        inference=section.inference, **options_of(section),
    )  # fmt: skip
    own = getattr(model, "guidance_argument", "")
    if own and own in (section.inference or {}):
        raise ModelError(f"model.inference sets {own}, which is model.guidance here. Set that, and leave this out.")
    if config.model.decode_tiling:
        model.enable_tiling()
    if device is not None:
        fit(model, section, device)
    return model


def geometry_of(config: Config, model: Any) -> Geometry:
    """What a config generates, where it says nothing the model's own size."""
    return Geometry(
        height=config.model.height or model.height, width=config.model.width or model.width,
        frames=config.model.frames or getattr(model, "frames", 1), fps=config.model.fps or getattr(model, "fps", None),
        rollout_batch=config.model.rollout_micro_batch,
        decode_batch=config.model.decode_micro_batch, store="cpu" if config.model.offload_trajectory else None,
    )  # fmt: skip


def inference_settings(config: Config) -> dict[str, Any]:
    """What the weights of a run should be used with: the steps and the size of its evaluations."""
    size = {"height": config.model.height, "width": config.model.width, "num_frames": config.model.frames}
    given = {key: value for key, value in size.items() if value is not None}
    return {"num_inference_steps": config.data.evaluation.num_steps, **given}


def _unjudged(batch: Batch) -> HubResult:
    """What samples that no reward has seen are worth: what was recorded with them, or no verdict."""
    total = torch.full((len(batch.leaf_prompt),), math.nan) if batch.rewards is None else batch.rewards
    return HubResult(total=total.float(), scores={}, parts={}, info=[{} for _ in total], seconds={})


def _join(results: list[HubResult]) -> HubResult:
    """The results of several tickets under each other; a part that a ticket lacks, where a reward failed, is NaN."""
    names = {name: dict.fromkeys(part for r in results for part in r.parts[name]) for name in results[0].scores}
    return HubResult(
        total=torch.cat([r.total for r in results]),
        scores={name: torch.cat([r.scores[name] for r in results]) for name in names},
        parts={
            name: {
                part: torch.cat([r.parts[name].get(part, torch.full_like(r.total, math.nan)) for r in results])
                for part in parts
            }
            for name, parts in names.items()
        },
        info=[row for r in results for row in r.info],
        seconds={name: sum(r.seconds[name] for r in results) for name in names},
    )
