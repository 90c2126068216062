"""What travels between the parts of flowrl: prompts, conditions, one iteration's batch, the protocols of its makers.

Symbols: P prompts, B samples (leaves), E stored edges, N draws, *L latent dimensions, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

if TYPE_CHECKING:
    from flowrl.history import PromptHistory
    from samplers import Kernel, Plan, Trajectory


def identity(value: Tensor) -> Tensor:
    """The value itself: what a sum over one process is."""
    return value


Cond = dict[str, Tensor]
"""What a model is conditioned on: named tensors whose first dimension is the prompt, [P, ...]."""

T_NEXT = "t_next"
"""Condition of a model with average velocities: the time [N] that the step at hand leads to; see `flowrl.models`."""


def take(cond: Mapping[str, Tensor], index: Tensor) -> Cond:
    """The conditions of the prompts at `index` [N]: every tensor [P, ...] becomes [N, ...]."""
    return {name: tensor[index.to(tensor.device)] for name, tensor in cond.items()}


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Batches [P, S, ...] under each other, with zeros at the end of those whose S is shorter; a mask's zeros too."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [
            part if part.shape[1] == longest
            else torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], dim=1)
            for part in parts
        ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))  # views stay views


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a data set. Groups are formed by `id`, never by text, so equal sentences stay apart."""

    id: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of its source pictures: what an editing model edits, where a video begins (`source` of its row)."""
        given = self.metadata.get("source", ())
        return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the weighted rewards said about N latents; fp32, on the latents' device."""

    total: Tensor
    """[N] with its graph to the latents; NaN = no verdict: leave the row out of the loss."""
    scores: dict[str, Tensor]
    """{reward: [N]} raw scores, detached."""


class Critic(Protocol):
    """The rewards of a run as differentiable functions of clean latents (`flowrl.critic`)."""

    def media(self, x0: Tensor) -> Tensor:
        """Media [N,F,3,H,W] in [0,1] of x0 [N,*L], with their graph."""
        ...

    def __call__(self, x0: Tensor, prompts: Sequence[Prompt]) -> Judged:
        """The weighted total of x0 [N,*L], each for its prompt."""
        ...

    def relative(
        self, x0: Tensor, prompts: Sequence[Prompt], positive: str, negative: str, k: float | Tensor
    ) -> Tensor:
        """How much more x0 [N,*L] looks like `positive. prompt` than like `negative. prompt`, [N]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Rows of a method that keeps finished samples only: each is a sample, a time to take it to, and a noise.

    The noise is not stored: `key` names it (`flowrl.algorithms.matching.noised` draws it).
    """

    sample: Tensor
    """Index of the row's sample among those of this process, int [N]."""
    t: Tensor
    """Time that the sample is taken to, fp32 [N]."""
    key: Tensor
    """Noise of the row: the place of its prompt in the iteration, the member of the group, the number of the draw; int
    [N,3]. Rows with equal keys share their noise."""
    unit: Tensor
    """Rows of one unit are always in one call of the loss, int [N]: a pair, or a group."""
    t_next: Tensor | None = None
    """A second time, where the method takes the row from one to the other, fp32 [N]."""

    def __len__(self) -> int:
        """N."""
        return len(self.t)

    def select(self, rows: Tensor) -> Self:
        """The rows of a bool mask [N] or an index [M]."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._given.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._given.items()})

    @property
    def _given(self) -> dict[str, Tensor]:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """One flat table of N answers of a model that writes: what it chose, how probable that was, what it saw.

    A row holds everything after the prompt, S places, padded on the right. Places where `mask` is False are not the
    policy's choice (text of a tool, a forced ending, padding) and enter no loss.
    """

    ids: Tensor
    """Token numbers, int64 [N,S]; 0 where there is none."""
    present: Tensor
    """Places that hold a token, bool [N,S]: the first so many of a row."""
    mask: Tensor
    """Places whose token the policy chose and answers for, bool [N,S]; never where `present` is False."""
    logprob: Tensor
    """Its log-probability when it was chosen, fp32 [N,S], temperature and banned tokens included; 0 off the mask."""
    prompt: Tensor
    """Index of the row's prompt in the batch's list, int [N]."""
    inputs: tuple[Any, ...]
    """What the model was given besides, one a row; the policy's own business. Rows of a prompt share the object."""
    behaviour: Tensor | None = None
    """What a foreign engine reported instead, fp32 [N,S]; None: the policy itself made the choices."""

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens that the policy chose, int [N]."""
        return self.mask.sum(1)

    def select(self, rows: Tensor) -> Self:
        """The rows of a bool mask [N] or an index [M], with no more places than the longest of them has."""
        index = torch.nonzero(rows).flatten() if rows.dtype == torch.bool else rows
        kept = {name: tensor[index.to(tensor.device)] for name, tensor in self._given.items()}
        longest = int(kept["present"].sum(1).max()) if len(index) else 0
        cut = {name: tensor[:, :longest] if tensor.dim() == 2 else tensor for name, tensor in kept.items()}
        inputs = tuple(self.inputs[i] for i in index.tolist())
        return replace(self, inputs=inputs, **cut)

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device; `inputs` stay where they are."""
        return replace(self, inputs=self.inputs, **{name: t.to(device) for name, t in self._given.items()})

    @classmethod
    def cat(cls, tables: Sequence[Self], prompt_offsets: Sequence[int] | None = None) -> Self:
        """Tables under each other, padded to the longest; `prompt_offsets` are added to their prompt numbers."""
        offsets = prompt_offsets or [0] * len(tables)
        joined = {
            name: padded_places([t._given[name] for t in tables]) for name in tables[0]._given if name != "prompt"
        }
        prompt = torch.cat([t.prompt + offset for t, offset in zip(tables, offsets, strict=True)])
        return cls(**joined, prompt=prompt, inputs=tuple(row for t in tables for row in t.inputs))

    @property
    def _given(self) -> dict[str, Tensor]:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "inputs"}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def padded_places(parts: Sequence[Tensor]) -> Tensor:
    """Tables [n,S] under each other, those with fewer places S padded with zeros on the right."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


@dataclass(kw_only=True, slots=True)
class SampleBatch:
    """What one iteration's samples have in common, pictures or texts; later fields are filled in by later phases."""

    prompts: list[Prompt]
    """P prompts."""
    iteration: int = 0
    seed: int = 0
    """Of the run: with the iteration it keys what credit draws at random."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Score of each reward that counts, as it enters the sum, float64 [B]; NaN = no verdict."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each of them."""
    history: PromptHistory | None = None
    """Rewards of the prompts in this and earlier iterations, where the run keeps them."""
    groups: list[Prompt] = field(default_factory=list)
    """The prompt of each group, of all processes; for credit."""
    rewards: Tensor | None = None
    """What is trained on: the combined reward, float64 [B]; NaN = no verdict."""
    place: Tensor | None = None
    """Where each sample stands among those of all processes, which `rewards` are of while credit is given, [B]."""
    advantages: Tensor | None = None
    """Credit of each row [R]; of answers perhaps of each of their tokens, [R,S]."""
    progress: float = 0.0
    """Share of the run's iterations that are done, in [0, 1)."""
    total: Callable[[Tensor], Tensor] = identity
    """Adds a tensor up over all processes; while credit is given, all of them must ask equally often."""


@dataclass(kw_only=True, slots=True)
class Batch(SampleBatch):
    """One iteration's media and what became of them."""

    cond: Cond
    """Conditions, stored once a prompt: each [P, ...]."""
    trajectory: Trajectory
    """Its `prompt` [E], and `leaf_prompt` [B], index into the list of prompts."""
    leaf_prompt: Tensor
    """Index of each sample's prompt, int [B]."""
    media: Tensor | None = None
    """Decoded samples [B,F,3,H,W] in [0,1]; F = 1 for images."""
    plans: tuple[Plan, ...] = ()
    """The plans that the iteration's roots were dealt, of all processes."""
    velocity: Tensor | None = None
    """Velocity of each stored state by its number [M,*L], with the rollout's graph, in a single-pass update."""
    times: Tensor | None = None
    """The grid [T+1] that `plan` was given."""
    draws: Draws | None = None
    """The rows that are trained on, where those are not the stored edges."""
    critic: Critic | None = None
    """Decodes and scores with gradients, for methods that differentiate the reward."""

    @property
    def group(self) -> Tensor:
        """The group of each sample, int [B]."""
        return self.trajectory.group

    @property
    def rows(self) -> Trajectory | Draws:
        """What the loss is a mean over."""
        return self.trajectory if self.draws is None else self.draws

    def select(self, rows: Tensor) -> Self:
        """The batch with these rows only (a bool mask or an index), and their credit."""
        advantages = None if self.advantages is None else self.advantages[rows]
        if self.draws is not None:
            return replace(self, draws=self.draws.select(rows), advantages=advantages)
        return replace(self, trajectory=self.trajectory.select(rows), advantages=advantages)

    def to(self, device: torch.device | str) -> Self:
        """The batch where the policy computes; the rollout may have left its states in main memory."""
        if self.trajectory.x0.device == torch.device(device):
            return self
        return replace(
            self, trajectory=self.trajectory.to(device), leaf_prompt=self.leaf_prompt.to(device),
            draws=self.draws and self.draws.to(device),
            advantages=None if self.advantages is None else self.advantages.to(device),
        )  # fmt: skip

    def among(self, size: int, group: Tensor, facts: Mapping[str, Tensor]) -> Self:
        """As `credit` sees it: this process's rows over the samples of all processes, `size` of them in `group`."""
        assert self.place is not None
        edges = self.trajectory
        leaves = torch.zeros(len(edges), size, dtype=torch.bool, device=edges.leaves.device)
        leaves[:, self.place.to(leaves.device)] = edges.leaves
        return replace(self, trajectory=replace(edges, leaves=leaves, group=group.to(leaves.device)))

    def cond_at(self, prompt: Tensor) -> Cond:
        """The conditions of the prompts at `prompt` [N]."""
        return take(self.cond, prompt)


@dataclass(kw_only=True, slots=True)
class TokenBatch(SampleBatch):
    """One iteration's texts and what became of them. A row is an answer, so R = B."""

    tokens: Tokens
    group: Tensor
    """The group of each answer, int [B]; while credit is given, of all processes' answers."""
    facts: dict[str, Tensor] = field(default_factory=dict)
    """What else is known of each answer, float64 [B]: tokens, truncated, forced, calls, ...; of all processes' answers
    while credit is given."""
    samples: tuple[Any, ...] = ()
    """The answers as the rewards see them."""
    values: Tensor | None = None
    """What was expected before each token of the own answers, when they came, fp32 [R,S]: by the value head, or by
    continuations from the states of an answer; NaN where there is no such state."""
    reference: Tensor | None = None
    """Log-probs of the reference for those tokens, fp32 [R,S], where `needs.reference_logprobs`."""

    @property
    def rows(self) -> Tokens:
        """What the loss is a mean over."""
        return self.tokens

    @property
    def leaf_prompt(self) -> Tensor:
        """Index of each answer's prompt, int [B]."""
        return self.tokens.prompt

    def select(self, rows: Tensor) -> Self:
        """The batch with these answers only (a bool mask or an index), and their credit."""
        tokens = self.tokens.select(rows)
        places = tokens.ids.shape[1]
        advantages, values, reference = (
            None if table is None else table[rows] if table.dim() == 1 else table[rows][:, :places]
            for table in (self.advantages, self.values, self.reference)
        )
        index = torch.nonzero(rows).flatten() if rows.dtype == torch.bool else rows
        samples = tuple(self.samples[i] for i in index.tolist()) if self.samples else ()
        facts = {name: fact[rows] if len(fact) == len(self.tokens) else fact for name, fact in self.facts.items()}
        return replace(
            self, tokens=tokens, advantages=advantages, values=values, reference=reference, samples=samples,
            facts=facts, group=self.group[rows], place=None if self.place is None else self.place[rows],
            rewards=None if self.rewards is None else self.rewards[rows],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Self:
        """The batch where the policy computes."""
        advantages, values, reference = (
            None if table is None else table.to(device) for table in (self.advantages, self.values, self.reference)
        )
        return replace(self, tokens=self.tokens.to(device), advantages=advantages, values=values, reference=reference)

    def among(self, size: int, group: Tensor, facts: Mapping[str, Tensor]) -> Self:
        """As `credit` sees it: this process's rows, and groups and facts of all processes' answers."""
        return replace(self, group=group, facts=dict(facts))


AnyBatch = Batch | TokenBatch


class Loss(NamedTuple):
    """What an algorithm hands back for one minibatch: the value to differentiate and detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor]
    counts: Mapping[str, float] = {}
    """Of how many things each metric is the mean, where those are not the batch's rows: what parts are weighed by."""


class Besides(NamedTuple):
    """More answers to each prompt, which are not trained on; their mean reward is a fact of those that are."""

    name: str
    """Of the fact: `batch.facts[name]`, NaN where there are no such answers, or none has a verdict."""
    answers: int = 1
    greedy: bool = False
    """The likeliest answer instead of drawn ones."""
    shuffled: bool = False
    """To its videos with their frames in another order; to prompts with a video alone."""


class Needs(NamedTuple):
    """What an algorithm asks of a run, so that impossible configurations are refused before anything is loaded."""

    tokens: bool = False
    """A model that writes; the batch is a `TokenBatch`, and there is neither plan nor kernel."""
    value: bool = False
    """A value head, and what it expected while the answers were written, in `batch.values`."""
    logprobs: bool = True
    """Stochastic steps: a plan without one is refused."""
    reference: bool = False
    """The initial weights, in `policy.reference()`."""
    reference_logprobs: bool = False
    """Their log-probs of the answers' tokens when the answers came, in `batch.reference`."""
    means: bool = False
    """The means of the rollout's steps, in `trajectory.mean`."""
    whole_samples: bool = False
    """All stored steps of a sample in one optimiser step and one forward pass."""
    whole_groups: bool = False
    """All answers to a prompt in one optimiser step and one forward pass."""
    whole_units: bool = False
    """All draws of a unit stay in training, or none: a pair without one of its samples is no pair."""
    scores: bool = False
    """Each reward by itself, in `batch.scores`."""
    history: int = 0
    """How many rewards of each prompt, of this and earlier iterations, must be remembered in `batch.history`."""
    teachers: tuple[str | None, ...] = ()
    """Exported weights (None: the initial ones) that `policy.teacher` is asked for, one of them at each state."""
    guidance: float = 1.0
    """The largest guidance that `policy.teacher` is asked for."""
    old: bool = False
    """A policy that follows the trained one behind (`policy.old()`), and draws the samples unless `on_policy`."""
    on_policy: bool = False
    """The trained policy draws the samples itself."""
    own_rollout: bool = False
    """States or steps of the rollout itself: samples from disk cannot stand in for its own."""
    rewards: bool = True
    """Finished samples with a reward; without, the loss judges for itself and the plan may end before t = 0."""
    gradient: bool = False
    """Rewards that can be differentiated, in `batch.critic`."""
    features: bool = False
    """One of them with image and text features."""
    stored: int = 0
    """Stored samples that each prompt must name, and that may stand among its own (`injection`)."""
    evaluations: int = 1
    """Velocities of the trained policy that the loss asks for one row."""
    continuations: int = 0
    """Answers that go on from each state of an answer, whose mean reward stands in `batch.values` there; 0: none."""
    state_every: int = 1
    """Tokens from one such state of an answer to the next."""
    besides: Besides | None = None
    """Other answers to each prompt, for their rewards."""
    token_credit: bool = False
    """Nothing, but that `credit` is one number a token [R,S]: it cannot be remembered as one number an answer."""

    @property
    def moving_reference(self) -> bool:
        """Whether what the trained policy is held to are the weights of `policy.old()`, not the initial ones."""
        return self.old and self.on_policy


class TokenStats(NamedTuple):
    """What the policy says about the tokens of N answers, each [N,S] and 0 where no token is its choice."""

    logprob: Tensor
    """fp32, with gradient: temperature and banned tokens as when they were drawn."""
    entropy: Tensor | None = None
    """Of the distribution that each token was drawn from, in nats, with gradient."""
    value: Tensor | None = None
    """What the value head expects before each token, with gradient."""


class TokenPolicy(Protocol):
    """A model that writes, as an algorithm sees it."""

    def evaluate(self, tokens: Tokens, *, entropy: bool = False, value: bool = False) -> TokenStats:
        """What the current weights say about the tokens of N answers."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it `evaluate` is that of the frozen initial weights."""
        ...

    def old(self) -> AbstractContextManager[None]:
        """Within it `evaluate` is that of weights that follow the trained ones; enter it before the trained policy is
        evaluated with a graph, since it changes values in place."""
        ...

    def gold(self, tokens: Tokens) -> Tokens | None:
        """The worked answers that belong to N answers' prompts, row by row; without any token on the mask where a
        prompt has none, None where no prompt has one."""
        ...

    def masked_images(self, ratio: float, seed: int) -> AbstractContextManager[None]:
        """Within it `evaluate` sees pictures of which a share of the patches is masked, drawn anew for each `seed`."""
        ...


def held_to(policy: TokenPolicy, needs: Needs) -> AbstractContextManager[None]:
    """Within it a policy answers as what its method holds it to: the initial weights, or those that follow."""
    return policy.old() if needs.moving_reference else policy.reference()


class Policy(Protocol):
    """The model as an algorithm sees it: a velocity with guidance applied, and the weights it started from."""

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] of the current weights at states x [N,*L] and times t [N], guidance applied."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it `velocity` is that of the frozen initial weights."""
        ...

    def old(self) -> AbstractContextManager[None]:
        """Within it `velocity` is that of weights that follow the trained ones; enter it before the trained policy is
        evaluated with a graph, since it changes values in place."""
        ...

    @property
    def old_is_current(self) -> bool:
        """Whether those weights are the trained ones."""
        ...

    def teacher(self, weights: str | None, guidance: float) -> AbstractContextManager[None]:
        """Within it `velocity` is that of exported weights (None: the initial ones) with a guidance of their own."""
        ...


@runtime_checkable
class Model(Protocol):
    """A generator in flow coordinates; one file a family under `flowrl.models`.

    One that is to be trained on stored media also has `encode_media`: media [N,F,3,H,W] in [0,1] to clean latents.
    """

    trainable: torch.nn.Module
    height: int
    """Pixels that it generates by default."""
    width: int

    # What a model may have besides: `frames` and `fps` of a video; `start(noise, t)`, where its grid begins below 1;
    # `num_sources`, if it takes source pictures, which `encode` then gets as a second argument; `check_guidance`.

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one sample's latent, without the batch dimension."""
        ...

    def times(self, num_steps: int, height: int, width: int, frames: int = 1) -> Tensor:
        """The time grid [T+1], 1 to 0, that the family's pipeline would use."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditions of the prompts, each tensor [P, ...]."""
        ...

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Velocity [N,*L]; with guidance > 1 the conditions carry the empty prompt's under `negative_*`."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Media [N,F,3,H,W] in [0,1] of clean latents [N,*L]."""
        ...


class Hyperparameters(BaseModel):
    """Base of every algorithm's record: frozen, typed, and strict; its fields are the config section `algorithm`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def needs(self) -> Needs:
        """What the run must offer; a method that asks for more says so."""
        return Needs()

    def draws(self, batch: Any) -> Draws | None:
        """The rows to train on; None = the stored edges of the rollout, or the answers."""
        return None

    def mass(self, batch: Any) -> Tensor:
        """What the means of an update are divided by, float64 [k], summed over its parts and processes: its rows."""
        return torch.tensor([len(batch.rows)], dtype=torch.float64)

    def share(self, batch: Any, total: Tensor) -> float:
        """The share of a part's loss in that of its update, whose `mass` is `total` [k]: by its rows."""
        return len(batch.rows) / float(total[0])

    def old_decay(self, iteration: int) -> float:
        """How slowly the old policy follows after this iteration, where `needs.old`; 0 = it is the trained one."""
        return 0.0

    def resets_optimizer(self, iteration: int) -> bool:
        """Whether the optimiser begins anew after this iteration, without momentum."""
        return False

    def injection(self, iteration: int) -> float:
        """Probability with which a prompt's stored samples stand among its own, where `needs.stored`."""
        return 0.0

    def asks_old(self, iteration: int) -> bool:
        """Whether the loss asks the old policy in this iteration."""
        return self.needs.old

    def pairs_answers(self, iteration: int) -> bool:
        """Whether credit makes pairs of answers in this iteration: those that filters drop must be in none."""
        return self.needs.whole_groups

    def starts_at_one(self, batch: Any) -> bool:
        """Whether ratios are 1 before the first update of a batch, being taken against the rollout's policy."""
        return True

    def probes(self, draws: Draws) -> int:
        """Velocities of the old policy that the loss asks for besides those at the rows' own states and times."""
        return 0


class Algorithm(Protocol):
    """A method: which steps are stochastic, what each row is worth, and the loss. One file each."""

    num_steps: int
    eta: float

    @property
    def needs(self) -> Needs:
        """What the run must offer."""
        ...

    @property
    def kernel(self) -> Kernel | None:
        """How a stochastic step moves; None where there are none."""
        ...

    def draws(self, batch: Batch) -> Draws | None:
        """The rows to train on; None = the stored edges of the rollout."""
        ...

    def mass(self, batch: Batch) -> Tensor:
        """What the means of an update are divided by, float64 [k], summed over its parts and processes."""
        ...

    def share(self, batch: Batch, total: Tensor) -> float:
        """The share of a part's loss in that of its update, whose `mass` is `total`."""
        ...

    def old_decay(self, iteration: int) -> float:
        """How slowly the old policy follows after this iteration; 0 = it is the trained one."""
        ...

    def resets_optimizer(self, iteration: int) -> bool:
        """Whether the optimiser begins anew after this iteration."""
        ...

    def asks_old(self, iteration: int) -> bool:
        """Whether the loss asks the old policy in this iteration."""
        ...

    def probes(self, draws: Draws) -> int:
        """Velocities of the old policy that the loss asks for besides those at the rows' own states and times."""
        ...

    def injection(self, iteration: int) -> float:
        """Probability with which a prompt's stored samples stand among its own."""
        ...

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan | Sequence[Plan]:
        """Which steps of the grid `times` [T+1] are stochastic or branch: a pure function, equal on every process.

        Several plans, whose trees have equally many leaves, are dealt in turn to the iteration's roots, prompt by
        prompt.
        """
        ...

    def credit(self, batch: Batch) -> Tensor:
        """Credit of each row of `batch.rows`, [E] or [N], from `batch.rewards` [B].

        NaN takes the row out of training; 0 teaches nothing but counts in the mean of the loss.
        """
        ...

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch that holds only its own rows: a mean over them."""
        ...
