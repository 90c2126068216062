"""From prompts to scored samples: roll the policy out along a plan, decode, hand over to the rewards.

Symbols: P prompts of this process, K samples each, R roots, B = P K samples (leaves).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowrl.data import DataError
from flowrl.policy import Policy
from flowrl.record import Recorder
from flowrl.types import T_NEXT, Algorithm, Batch, Cond, Prompt, padded, take
from flowrl.weights import Example
from rewards import RewardHub, Sample
from rewards.folder import reference
from samplers import Plan, Solver, Trajectory, Velocity, deterministic, noise_source, rollout, stable_seed

EVALUATION = -1
"""The iteration that keys the noise of samples which are not trained on."""

Guidance = Callable[[Velocity, Cond], Velocity]
"""guide(velocity, conditions [P, ...]) -> another velocity, whose prompts are indices into these conditions too."""


@dataclass(kw_only=True)
class Conditions:
    """Conditions by prompt and source pictures, encoded once: the encoders are frozen, so they never change.

    Each prompt is encoded alone (`chunk`): in a batch the last bit would depend on its neighbours, and so on which ones
    a resumed run has not seen yet. Kept on the CPU (a large model's take megabytes each), the `limit` used last; given
    out on `device`.
    """

    encode: Callable[..., Cond]
    """encode(texts), or encode(texts, sources) where prompts have source pictures, to conditions [P, ...]."""
    device: torch.device | str = "cpu"
    chunk: int = 1
    limit: int = 4096
    known: dict[tuple[str, ...], Cond] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[Prompt | str]) -> Cond:
        """Conditions [P, ...] of the prompts; where they differ in length, with zeros at the end of the shorter."""
        keys = [(p,) if isinstance(p, str) else (p.text, *p.sources) for p in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            cond = self._encode(part)
            self.known |= {key: {name: tensor[i].cpu() for name, tensor in cond.items()} for i, key in enumerate(part)}
        rows = [self.known[key] for key in keys]
        for key in dict.fromkeys(keys):
            self.known[key] = self.known.pop(key)  # to the end: the first are those that were used longest ago
        for key in list(self.known)[: -self.limit]:
            del self.known[key]
        return {name: padded([row[name].unsqueeze(0) for row in rows]).to(self.device) for name in rows[0]}

    def _encode(self, keys: Sequence[tuple[str, ...]]) -> Cond:
        texts = [text for text, *_ in keys]
        if not any(paths for _, *paths in keys):
            return self.encode(texts)
        return self.encode(texts, [tuple(reference(path, "source") for path in paths) for _, *paths in keys])


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What is generated and in which portions."""

    height: int
    width: int
    frames: int = 1
    fps: float | None = None
    """Frames per second that the rewards of a video are told."""
    rollout_batch: int | None = None
    """Latents in one forward pass; None = all of one depth."""
    store: str | None = None
    """Where a rollout's states wait for the update; None = where they were made."""
    decode_batch: int | None = None
    """Media decoded at a time; the rewards get whole groups of about as many while the next are decoded; None = all."""


def roll_out(
    policy: Policy, algorithm: Algorithm, plans: Sequence[Plan], prompts: Sequence[Prompt], slots: Sequence[int],
    conditions: Conditions, geometry: Geometry, *, samples_per_prompt: int, iteration: int, seed: int,
    recorder: Recorder | None = None,
) -> Batch:  # fmt: skip
    """The samples of these prompts, drawn by the old policy where there is one, with the edges to train on.

    Where the method injects stored samples, they take the places of a prompt's first ones, which are not drawn.

    `slots` are the prompts' places in the whole iteration's list: noise is keyed and plans are dealt by them, so that a
    prompt's samples do not depend on which process makes them, and equal prompts do not get equal noise. A `recorder`
    keeps the graphs of the stored states for a single-pass update.
    """
    _check_solver(plans, policy)
    width = plans[0].leaves_per_root
    prompt, number = roots_of_prompts(plans, len(prompts), samples_per_prompt)
    slot = torch.tensor(list(slots), dtype=torch.long)[prompt]
    shape = policy.model.noise_shape(geometry.height, geometry.width, geometry.frames)
    cond = conditions(prompts)

    def walk(plan: Plan, mine: Tensor) -> Trajectory:
        root = torch.arange(len(mine))
        noise = noise_source(
            shape, seed=seed, iteration=iteration, prompt=slot[mine], member=number[mine] * width, device=policy.device
        )
        return rollout(
            _velocity(policy, cond), _start(policy, noise(root, torch.zeros_like(root), -1), plan), plan,
            algorithm.kernel, eta=algorithm.eta, prompt=prompt[mine], group=slot[mine], noise=noise,
            micro_batch=geometry.rollout_batch, store=geometry.store, keep_mean=algorithm.needs.means,
            stored_velocity=recorder and (lambda x, t, i: recorder(x, t, take(cond, i))),
        )  # fmt: skip

    drawing = nullcontext() if algorithm.needs.on_policy else policy.old()
    given = injected(seed, iteration, slots, algorithm.injection(iteration))[prompt] & (number < algorithm.needs.stored)
    drawn = torch.nonzero(~given).flatten()
    with drawing, policy.role("rollout"):
        trajectory = grow(
            plans, (slot * int(samples_per_prompt // width) + number)[drawn], lambda plan, mine: walk(plan, drawn[mine])
        )
    if given.any():
        rows = [prompts[p].metadata["stored"][n] for p, n in zip(prompt[given], number[given], strict=True)]
        latents = StoredSamples(policy=policy, geometry=geometry).latents(rows)
        latents = latents.to(trajectory.x0.device)
        stored = Trajectory.finished(latents, group=slot[given], leaf_prompt=prompt[given])
        order = torch.cat([drawn, torch.nonzero(given).flatten()]).argsort()
        trajectory = Trajectory.cat([trajectory, stored]).reorder_leaves(order.to(latents.device))
    return Batch(
        prompts=list(prompts), cond=cond, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt, plans=tuple(plans),
        iteration=iteration, seed=seed, velocity=recorder and recorder.result(),
    )  # fmt: skip


def _start(policy: Policy, noise: Tensor, plan: Plan) -> Tensor:
    """The first states [N,*L]: noise, unless the model's grid begins where some of the picture is left."""
    start = getattr(policy.model, "start", None)
    return noise if start is None else start(noise, plan.times[0])


def _velocity(policy: Policy, cond: Cond) -> Callable[..., Tensor]:
    """What a rollout asks; where it says which time the step leads to, that is one more condition."""

    def velocity(x: Tensor, t: Tensor, prompt: Tensor, t_next: Tensor | None = None) -> Tensor:
        here = take(cond, prompt)
        return policy.velocity(x, t, here if t_next is None else {**here, T_NEXT: t_next})

    return velocity


def _check_solver(plans: Sequence[Plan], policy: Policy) -> None:
    """Only a model with two times can say the mean velocity of a step; another would take an Euler step unnoticed."""
    if any(plan.solver == "average" for plan in plans) and solver_of(policy) != "average":
        raise DataError(
            f"solver=average asks for the mean velocity of a step, and {type(policy.model).__name__} knows only that "
            "of a moment. Set algorithm.solver to euler, heun or dpmpp_2m; or model.family to meanflow (two times)."
        )


def example_of(policy: Policy, prompts: Sequence[Prompt], geometry: Geometry, seed: int) -> Example | None:
    """The first sample of an evaluation for an export's README; None where a pipeline's call cannot draw it alone."""
    model: Any = policy.model
    if not hasattr(model, "pipeline_latents") or hasattr(model, "readme") or prompts[0].sources:
        return None
    shape = model.noise_shape(geometry.height, geometry.width, geometry.frames)
    first = torch.zeros(1, dtype=torch.long)
    noise = noise_source(shape, seed=seed, iteration=EVALUATION, prompt=first)(first, first, -1)
    return Example(prompts[0].text, model.pipeline_latents(noise))


def solver_of(policy: Policy) -> Solver:
    """The solver that evaluations and samples of this model are walked with."""
    return getattr(policy.model, "solver", "euler")


def check_stored(prompts: Sequence[Prompt], count: int) -> None:
    """Refuse prompts that do not name `count` stored samples (DataError)."""
    for prompt in prompts:
        if (found := len(prompt.metadata.get("stored", ()))) != count:
            raise DataError(
                f"prompt {prompt.id} ({prompt.text!r}) names {found} stored samples where {count} are wanted. A folder "
                "of pairs has 2 each: give one as data.prompts (flowrl pairs make), with data.samples_per_prompt: 2 "
                "where nothing else is trained on."
            )


def check_sources(model: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts with fewer or more source pictures than the model takes (DataError)."""
    fewest, most = getattr(model, "num_sources", (0, 0))
    for prompt in prompts:
        if not fewest <= (found := len(prompt.sources)) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise DataError(
                f"prompt {prompt.id} ({prompt.text!r}) has {found} source pictures, and {type(model).__name__} takes "
                f"{wanted}. "
                + (
                    'Give data.prompts (and data.eval_prompts) as a .jsonl file: {"prompt": ..., "source": "a.png"}.'
                    if found < fewest
                    else f"Give {most}."
                    if most
                    else "Leave `source` out, or train a model that edits pictures or begins with one."
                )
            )


@dataclass(kw_only=True)
class StoredSamples:
    """Samples from disk: each prompt's metadata names its own, under `stored`.

    `stored` is a list of {"media": path, "reward": number}, as `flowrl.pairs.read_pairs` gives it. The media are
    encoded into the model's latents when they come up.
    """

    policy: Policy
    geometry: Geometry

    def __call__(
        self, prompts: Sequence[Prompt], slots: Sequence[int], conditions: Conditions, *, iteration: int, seed: int
    ) -> Batch:
        """The samples of these prompts instead of a rollout's, with the rewards that were recorded."""
        rows = [row for prompt in prompts for row in prompt.metadata["stored"]]
        prompt = torch.arange(len(prompts)).repeat_interleave(len(rows) // len(prompts))
        slot = torch.tensor(list(slots), dtype=torch.long)[prompt]
        trajectory = Trajectory.finished(self.latents(rows), group=slot, leaf_prompt=prompt)
        return Batch(
            prompts=list(prompts), cond=conditions(prompts), trajectory=trajectory,
            leaf_prompt=trajectory.leaf_prompt, iteration=iteration, seed=seed,
            rewards=torch.tensor([float(row["reward"]) for row in rows]).double(),
        )  # fmt: skip

    def latents(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Clean latents [N,*L] of stored samples; ValueError where they are of another size than the run's."""
        from flowrl.pairs import load_media

        device, size = self.policy.device, self.geometry.decode_batch or len(rows)
        encode = getattr(self.policy.model, "encode_media", None)
        if encode is None:
            raise DataError(
                f"{type(self.policy.model).__name__} cannot encode pictures, so stored samples are of no use to it: "
                "give it encode_media(media [N,F,3,H,W] in [0,1]) -> latents, or set data.samples: rollout."
            )
        parts = []
        for start in range(0, len(rows), size):
            media = torch.stack([self._checked(load_media(row["media"])) for row in rows[start : start + size]])
            parts.append(encode(media.to(device)))
        return torch.cat(parts).float()

    def _checked(self, media: Tensor) -> Tensor:
        g = self.geometry
        found, wanted = (media.shape[0], *media.shape[-2:]), (g.frames, g.height, g.width)
        if found != wanted:
            raise DataError(
                f"a stored medium has {' x '.join(map(str, found))} (frames, height, width), the run makes "
                f"{' x '.join(map(str, wanted))}: set model.frames, model.height and model.width to the media's."
            )
        return media


def injected(seed: int, iteration: int, slots: Sequence[int], probability: float) -> Tensor:
    """Which of these prompts get their stored samples, bool [P]: a function of the prompt's place, equal everywhere."""
    return torch.tensor([stable_seed(seed, iteration, slot, -4) / 2**64 < probability for slot in slots])


def roots_of_prompts(plans: Sequence[Plan], num_prompts: int, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Of each root of P prompts, the prompt's index and the root's number among those of its prompt."""
    each = samples_per_prompt // plans[0].leaves_per_root
    return torch.arange(num_prompts).repeat_interleave(each), torch.arange(each).repeat(num_prompts)


def grow(plans: Sequence[Plan], place: Tensor, walk: Callable[[Plan, Tensor], Trajectory]) -> Trajectory:
    """Every root walked along its plan, with the samples in the order of the roots.

    `place` [R] is each root's number in the whole iteration: plans are dealt by it, in turn. `walk(plan, roots)` rolls
    the roots of these indices out.
    """
    mine = [torch.nonzero(place % len(plans) == index).flatten() for index in range(len(plans))]
    dealt = [(plan, roots) for plan, roots in zip(plans, mine, strict=True) if len(roots)]
    tables = [walk(plan, roots) for plan, roots in dealt]
    if len(tables) == 1:
        return tables[0]
    width = torch.arange(plans[0].leaves_per_root)
    leaf = torch.cat([(roots[:, None] * len(width) + width).flatten() for _, roots in dealt])
    return Trajectory.cat(tables).reorder_leaves(leaf.argsort().to(tables[0].x0.device))


def sample(
    policy: Policy, prompts: Sequence[Prompt], slots: Sequence[int], conditions: Conditions, geometry: Geometry, *,
    num_steps: int, seed: int, iteration: int = EVALUATION, batch: int = 150, tuned_steps: int | None = None,
    guide: Guidance | None = None,
) -> Tensor:  # fmt: skip
    """One sample [N,F,3,H,W] a prompt along the model's own grid, by ODE; noise keyed by (seed, iteration, slot).

    `tuned_steps`: only the first so many steps, the noisiest, are the policy's; the rest are its `reference()`'s, the
    base model's. MixGRPO (arXiv:2507.21802) takes 30 of 50 against reward hacking. None: all. ValueError if there are
    fewer steps than that. `guide` changes the velocity of every step.
    """
    latents = draw(
        policy, prompts, slots, conditions, geometry, num_steps=num_steps, seed=seed, iteration=iteration, batch=batch,
        tuned_steps=tuned_steps, guide=guide,
    )  # fmt: skip
    return torch.cat([decode(policy, x0, geometry.decode_batch) for x0 in latents])


def draw(
    policy: Policy, prompts: Sequence[Prompt], slots: Sequence[int], conditions: Conditions, geometry: Geometry, *,
    num_steps: int, seed: int, iteration: int = EVALUATION, batch: int = 150, tuned_steps: int | None = None,
    guide: Guidance | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The clean latents [n,*L] that `sample` decodes, `batch` of them at a time."""
    plan = deterministic(
        policy.model.times(num_steps, geometry.height, geometry.width, geometry.frames), solver_of(policy)
    )
    if guide and plan.solver == "average":
        raise DataError(
            "a guide bends the velocity of a moment, but a model with two times takes the mean of a whole step. "
            "Sample without a guide, or set model.family to that of the one-time model."
        )
    last = plan.num_steps if tuned_steps is None else tuned_steps
    if not 0 <= last <= plan.num_steps:
        raise DataError(f"tuned_steps is {tuned_steps}, of {plan.num_steps} steps: choose from 0 to {plan.num_steps}.")
    handover = plan.grid(policy.device)[last]  # the state at this time is the base model's to go on from
    shape = policy.model.noise_shape(geometry.height, geometry.width, geometry.frames)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        cond = conditions(part)
        slot = torch.tensor(list(slots[start : start + batch]), dtype=torch.long)
        index = torch.arange(len(part))
        noise = noise_source(shape, seed=seed, iteration=iteration, prompt=slot, device=policy.device)

        asked = _velocity(policy, cond)

        def velocity(x: Tensor, t: Tensor, *where: Tensor, asked: Callable[..., Tensor] = asked) -> Tensor:
            tuned = last == plan.num_steps or bool(t[0] > handover)
            with nullcontext() if tuned else policy.reference(), policy.role("eval"):
                return asked(x, t, *where)

        x_init = _start(policy, noise(index, torch.zeros_like(index), -1), plan)
        yield rollout(guide(velocity, cond) if guide else velocity, x_init, plan, prompt=index, group=slot).x0


@torch.no_grad()
def decode(policy: Policy, x0: Tensor, batch: int | None) -> Tensor:
    """Media [B,F,3,H,W] in [0,1] on the CPU, decoded in portions."""
    parts = (part.to(policy.device) for part in x0.split(batch or len(x0)))
    return torch.cat([policy.model.decode(part).clamp(0, 1).float().cpu() for part in parts])


def samples_of(
    media: Tensor, prompts: Sequence[Prompt], index: Tensor, group: Tensor, fps: float | None = None
) -> list[Sample]:
    """What the rewards see of media [B,F,3,H,W]: one frame is an image, several are a video."""
    return [
        Sample(media=clip[0], prompt=prompts[p].text, group=g, meta=prompts[p].metadata)
        if len(clip) == 1
        else Sample(media=clip, prompt=prompts[p].text, group=g, meta=prompts[p].metadata, fps=fps)
        for clip, p, g in zip(media, index.tolist(), group.tolist(), strict=True)
    ]


def decode_and_submit(policy: Policy, batch: Batch, hub: RewardHub, geometry: Geometry) -> Any:
    """Decode whole groups at a time; they are scored in the hub's lanes while the next are decoded. The tickets."""
    tickets, media = [], []
    for leaves in _whole_groups(batch.trajectory.group, geometry.decode_batch or len(batch.trajectory.group)):
        part = decode(policy, batch.trajectory.x0[leaves], geometry.decode_batch)
        media.append(part)
        group = batch.trajectory.group[leaves]
        tickets.append(hub.submit(samples_of(part, batch.prompts, batch.leaf_prompt[leaves], group, geometry.fps)))
    batch.media = torch.cat(media)
    return tickets


def _whole_groups(group: Tensor, batch: int) -> Iterator[slice]:
    """Slices of the leaves that do not cut a group (leaves of a group stand together), about `batch` long."""
    ends = (torch.nonzero(group[1:] != group[:-1]).flatten() + 1).tolist() + [len(group)]
    start = 0
    for i, end in enumerate(ends):
        if i == len(ends) - 1 or ends[i + 1] - start > batch:
            yield slice(start, end)
            start = end
