"""What travels between the parts of flowrl: prompts, conditions, one iteration's batch, the protocols of its makers.

Symbols: P prompts, B samples (leaves), E stored stochastic edges, *L latent dimensions, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

if TYPE_CHECKING:
    from samplers import Kernel, Plan, Trajectory

Cond = dict[str, Tensor]
"""What a model is conditioned on: named tensors whose first dimension is the prompt, [P, ...]."""


def take(cond: Mapping[str, Tensor], index: Tensor) -> Cond:
    """The conditions of the prompts at `index` [N]: every tensor [P, ...] becomes [N, ...]."""
    return {name: tensor[index.to(tensor.device)] for name, tensor in cond.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a data set. Groups are formed by `id`, never by text, so equal sentences stay apart."""

    id: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Batch:
    """One iteration's samples and what became of them; the later fields are filled in by the later phases."""

    prompts: list[Prompt]
    """P prompts; `trajectory.prompt` [E] and `leaf_prompt` [B] index into this list."""
    cond: Cond
    """Conditions, stored once a prompt: each [P, ...]."""
    trajectory: Trajectory
    leaf_prompt: Tensor
    """Index of each sample's prompt, int [B]."""
    media: Tensor | None = None
    """Decoded samples [B,F,3,H,W] in [0,1]; F = 1 for images."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Raw score of each reward, [B]; NaN = no verdict."""
    rewards: Tensor | None = None
    """What is trained on: the combined reward, float64 [B]; NaN = no verdict."""
    advantages: Tensor | None = None
    """Credit of each stored edge, [E]."""

    def cond_at(self, prompt: Tensor) -> Cond:
        """The conditions of the prompts at `prompt` [N]."""
        return take(self.cond, prompt)


class Loss(NamedTuple):
    """What an algorithm hands back for one minibatch: the value to differentiate and detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor]


class Needs(NamedTuple):
    """What an algorithm asks of a run, so that impossible configurations are refused before anything is loaded."""

    logprobs: bool = True
    reference: bool = False
    differentiable_reward: bool = False


class Policy(Protocol):
    """The model as an algorithm sees it: a velocity with guidance applied, and the weights it started from."""

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] of the current weights at states x [N,*L] and times t [N], guidance applied."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it `velocity` is that of the frozen initial weights."""
        ...


@runtime_checkable
class Model(Protocol):
    """A generator in flow coordinates; one file a family under `flowrl.models`."""

    trainable: torch.nn.Module
    height: int
    """Pixels that it generates by default."""
    width: int

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


class Algorithm(Protocol):
    """A method: which steps are stochastic, what each edge is worth, and the loss. One file each."""

    num_steps: int
    eta: float

    @property
    def needs(self) -> Needs:
        """What the run must offer."""
        ...

    @property
    def kernel(self) -> Kernel:
        """How a stochastic step moves."""
        ...

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """Which steps of the grid `times` [T+1] are stochastic or branch: a pure function, equal on every process."""
        ...

    def credit(self, batch: Batch) -> Tensor:
        """Advantage of each stored edge, [E], from `batch.rewards` [B]; 0 for what must not be trained on."""
        ...

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch whose trajectory holds only its own edges."""
        ...
