"""The trained model: which weights learn, what they were at first, their average, and their export.

`Trained` is all of that for any network; `Policy` is a generator of media. One that writes is `flowrl.vlm.policy`.

    policy = Policy(load("shapes"), lora={"rank": 16, "alpha": 32}, ema_decay=0.95)
    with policy.role("rollout"):
        v = policy.velocity(x, t, policy.encode(prompts))
    with policy.reference():
        v_ref = policy.velocity(x, t, cond)
    policy.export("weights", inference={"num_inference_steps": 10})

Symbols: P prompts, N samples, *L latent dimensions.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import Parameter

from flowrl.ema import EMA
from flowrl.models.pipeline import ModelError
from flowrl.types import Cond, Model
from flowrl.weights import (
    ADAPTER,
    Example,
    Format,
    Learnt,
    check_readable,
    components_of,
    exported_weights,
    is_lora,
    load_adapter,
    load_components,
    load_copy,
    load_lora,
    lora_file,
    read_lora,
    shapes_of,
    write,
)


class Lora(BaseModel):
    """Low-rank adapters (arXiv:2106.09685): weights W + alpha / rank B A, of which A and B learn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    """Module names to adapt, matched at their end; None: the attention layers of the model's family."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A is drawn; B is zero, so that training starts at the model itself."""


class Trained:
    """A model of which LoRA adapters (`lora`), all weights (None) or nothing (`frozen`) learn, whatever it is asked.

    What learns is float32 whatever the model's dtype. `reference` keeps a second copy of the network, which
    `reference()` needs where all weights learn, or where a full export is loaded into a frozen policy; LoRA gets its
    reference for nothing, by switching the adapters off.

    `old` keeps a second set of weights, which follows those that learn: `old()`, moved by `follow`.
    """

    def __init__(
        self,
        model: Any,
        *,
        lora: Lora | Mapping[str, Any] | None = None,
        frozen: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = True,
        reference: bool = False,
        old: bool = False,
        teachers: Sequence[str] = (),
        gradient_checkpointing: bool = False,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.lora = Lora.model_validate(lora) if lora is not None and not frozen else None
        self.calls: Counter[str] = Counter()
        self._role = "train"
        self._device = torch.device(device) if device is not None else None
        if device is not None:
            model.to(device)
        # An engine may wrap `model.trainable` later; weights and adapters are reached through the module itself.
        self._module: Any = model.trainable
        self._module.requires_grad_(False)
        self._parts = parts_of(model, self._module)
        shapes = {name: shapes_of(part) for name, part in self._parts.items()}
        if not frozen and _has_adapters(self._parts):
            raise ModelError(
                "the model carries adapters already, which training would silently switch off or mix in. "
                "Build the policy on the bare model, then load_weights(policy, folder)."
            )
        if self.lora is not None:
            for part in self._parts.values():
                _add_lora(part, self.lora, getattr(model, "lora_targets", ()), seed)
        elif not frozen:
            self._module.requires_grad_(True)
        if hasattr(model, "choose_trained") and not frozen:
            model.choose_trained(self.lora is not None)
        self._parameters: dict[str, Parameter] = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(self.device, torch.float32)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self._initial: torch.nn.Module | None = None
        self._overwritten = False
        folders = {name: exported_weights(name) for name in teachers}
        if self.lora is None and (reference or any(map(is_lora, folders.values()))):
            self._initial = copy.deepcopy(self._module).requires_grad_(False)
        self._teachers = {name: self._load_teacher(name, folder, shapes) for name, folder in folders.items()}
        self.ema = EMA(self._parameters, ema_decay, ema_warmup) if ema_decay is not None and self._parameters else None
        self._old = EMA(self._parameters, 0.0, warmup=False) if old else None
        self.old_is_current = True
        """Whether the weights of `old()` are the trained ones: then what these say need not be asked twice."""

    @property
    def num_trainable(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def device(self) -> torch.device:
        """Where the weights are when they compute: those of a group-offloaded module lie elsewhere in between."""
        return self._device or next(self._module.parameters()).device

    def trainable_parameters(self) -> list[Parameter]:
        """What an optimiser takes; the order is always the same."""
        return list(self._parameters.values())

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Within it what the network is asked counts under `name`; of a generator, a sample times a guidance branch."""
        before, self._role = self._role, name
        try:
            yield
        finally:
            self._role = before

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the answers are those of the weights before training, or before an export was loaded.

        Cutting gradients is left to the caller. ModelError where those weights are gone for want of a copy.
        """
        with self.role("reference"), self._initial_weights():
            yield

    @contextmanager
    def old(self) -> Iterator[None]:
        """Within it the answers are those of the weights that follow the trained ones, and count as "old".

        Without such a policy of its own, the trained one. Values change places: enter it before the trained policy is
        evaluated with a graph, or the backward pass refuses.
        """
        apart = self._old is not None and not self.old_is_current
        with self.role("old"), self._old.applied() if self._old and apart else nullcontext():
            yield

    def follow(self, decay: float) -> None:
        """After an iteration: old <- decay old + (1 - decay) trained; 0 makes them equal."""
        if self._old is not None:
            self._old.update(decay)
            self.old_is_current = decay == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the averaged weights are in place; without an average, the weights themselves."""
        with self.ema.applied() if self.ema else nullcontext():
            yield

    def update_average(self) -> None:
        """Once after each optimiser step: the average moves, and the old policy is no longer the trained one."""
        if self.ema:
            self.ema.update()
        self.old_is_current = self._old is None

    def state_dict(self) -> dict[str, Tensor]:
        """`weights.<name>` of what learns, `ema.<name>` and `old.<name>` of what follows it; copies on the CPU."""
        # First: they refuse while their values are in place of the weights.
        kept = {kind: ema.state_dict() for kind, ema in self._followers.items()}
        followers = {f"{kind}.{name}": tensor for kind, state in kept.items() for name, tensor in state.items()}
        weights = {f"weights.{name}": p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        return {**weights, **followers}

    @property
    def _followers(self) -> dict[str, EMA]:
        return {name: ema for name, ema in (("ema", self.ema), ("old", self._old)) if ema is not None}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, bit by bit; other names or shapes are a ModelError."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "old": {}}
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        for kind, what, mend in (
            ("ema", "an average of weights", "ema_decay"), ("old", "weights that follow", "the algorithm"),
        ):  # fmt: skip
            if bool(parts[kind]) != (kind in self._followers):
                there, here = ("has", "none") if parts[kind] else ("lacks", "them")
                raise ModelError(
                    f"the saved state {there} {what}, this policy has {here}. Set {mend} as in the run that saved it."
                )
        self._assign(parts["weights"])
        for kind, follower in self._followers.items():
            follower.load_state_dict(parts[kind])
        self.old_is_current = self._old is None or self._old.equals_weights()

    @contextmanager
    def _initial_weights(self) -> Iterator[None]:
        if self._initial is not None:
            with self._instead(self._initial):
                yield
        elif _has_adapters(self._parts):
            for part in self._parts.values():
                part.disable_adapters()
            try:
                yield
            finally:
                for part in self._parts.values():
                    part.enable_adapters()
                if not self._parameters:
                    self._module.requires_grad_(False)  # switching adapters on makes them learn
        elif self._parameters or self._overwritten:
            raise ModelError(
                "full weights, trained or loaded, keep no reference unless told so, because it takes a second copy: "
                "build the policy with reference=True, or take LoRA adapters, whose reference is free."
            )
        else:
            yield

    @contextmanager
    def _instead(self, module: torch.nn.Module) -> Iterator[None]:
        """Another module takes the place, not other values.

        Values changed between a forward and its backward pass would break the gradient of a loss that compares the two.
        """
        current, self.model.trainable = self.model.trainable, module
        try:
            yield
        finally:
            self.model.trainable = current

    def _load_teacher(
        self, name: str, folder: Path, shapes: Mapping[str, Mapping[str, torch.Size]]
    ) -> tuple[torch.nn.Module, str | None]:
        """A module, and which of its adapters is the teacher (None: the module has none)."""
        model: Any = self.model
        if not is_lora(folder):
            copies = {
                part: load_copy(type(own), folder / part, model.dtype, shapes[part]).to(self.device)
                for part, own in self._parts.items()
            }
            return (next(iter(copies.values())) if len(copies) == 1 else type(self._module)(copies)), None
        module: Any = self._module if self.lora is not None else self._initial
        parts = parts_of(model, module)
        adapter = f"teacher_{max(len(getattr(part, 'peft_config', ())) for part in parts.values())}"
        for part, own in parts.items():
            file = lora_file(model, part)
            load_adapter(own, file.prefix, folder / file.name, adapter)
        self._activate(module, ADAPTER if self.lora is not None else None)
        return module, adapter

    @contextmanager
    def _teacher_weights(self, module: torch.nn.Module, adapter: str | None) -> Iterator[None]:
        own = module is self._module  # which an engine may have wrapped: it stays where it is
        with nullcontext() if own else self._instead(module):
            if adapter is None:
                yield
                return
            self._activate(module, adapter)
            try:
                yield
            finally:
                self._activate(module, ADAPTER if own else None)

    def _activate(self, module: Any, adapter: str | None) -> None:
        """Lets one adapter of a module compute, or none of them; what learns stays as it is."""
        for part in parts_of(self.model, module).values():
            if adapter is None:
                part.disable_adapters()
            else:
                part.set_adapter(adapter)
                part.enable_adapters()
        # peft makes what it switches on learn, and freezes the rest.
        module.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        """Copies the values of every trained parameter in."""
        wrong = [n for n, p in self._parameters.items() if n not in weights or weights[n].shape != p.shape]
        wrong += [n for n in weights if n not in self._parameters]
        if wrong:
            raise ModelError(
                f"the weights do not fit: {len(wrong)} differ in name or shape from the {len(self._parameters)} of the "
                f"policy, e.g. {wrong[0]}. They come from another model, or from other lora settings (rank, targets)."
            )
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])


class Policy(Trained):
    """A generator with guidance applied, of which LoRA adapters, all weights or nothing learn (see `Trained`).

    `teachers` are the folders that `teacher()` can be asked for: runs, or what an export wrote. LoRA teachers are
    adapters on one frozen base, the student's own where it trains LoRA itself; a teacher with full weights is a copy of
    the transformer. None of them learns, is averaged, saved or exported. `largest_guidance` is the teachers'.
    """

    def __init__(self, model: Model, *, guidance: float = 1.0, largest_guidance: float = 1.0, **trained: Any) -> None:
        self.guidance = guidance
        self._largest_guidance = max(guidance, largest_guidance)
        if hasattr(model, "check_guidance"):
            model.check_guidance(self._largest_guidance)
        super().__init__(model, **trained)

    def encode(self, prompts: Sequence[str], *sources: Any) -> Cond:
        """Conditions [P, ...] of the prompts; the empty prompt's are left out where guidance does not need them.

        `sources`: at most one argument, the source pictures of each prompt, for a model that takes some.
        """
        cond = self.model.encode(prompts, *sources)
        return cond if self._largest_guidance > 1 else {k: v for k, v in cond.items() if not k.startswith("negative_")}

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [N,*L] at states x [N,*L] and times t [N], guidance applied; adds to `calls`."""
        self.calls[self._role] += len(x) * (2 if self.guidance > 1 else 1)
        return self.model.velocity(x, t, cond, self.guidance)

    @contextmanager
    def teacher(self, weights: str | None, guidance: float) -> Iterator[None]:
        """Within it `velocity` is that of a frozen teacher with a guidance of its own, and counts as "teacher".

        `weights` is one of the `teachers` that the policy was built with, or None for what `reference()` gives.
        Cutting gradients is left to the caller. ModelError for other weights, or a guidance beyond `largest_guidance`.
        """
        if weights is not None and weights not in self._teachers:
            known = ", ".join(map(repr, self._teachers)) or "none"
            raise ModelError(f"teacher {weights!r} was not loaded ({known}): name it in the policy's `teachers`.")
        if guidance > self._largest_guidance:
            raise ModelError(
                f"a teacher's guidance is {guidance:g}, but conditions were encoded for {self._largest_guidance:g} at "
                "most: build the policy with that largest_guidance (an algorithm asks for it in needs.guidance)."
            )
        inside = self._initial_weights() if weights is None else self._teacher_weights(*self._teachers[weights])
        before, self.guidance = self.guidance, guidance
        try:
            with self.role("teacher"), inside:
                yield
        finally:
            self.guidance = before

    def export(
        self, folder: str | Path, *, averaged: bool = True, inference: Mapping[str, Any] | None = None,
        form: Format = "diffusers", example: Example | None = None,
    ) -> Path:  # fmt: skip
        """Writes what was learnt in one of the formats of `flowrl.weights`, with `inference.json` and a README.

        `inference` are arguments of the pipeline's call, over those of the model; guidance is the policy's. `example`
        is what the README's code draws.
        """
        if not self._parameters:
            raise ModelError("a frozen policy has learnt nothing that could be exported.")
        learnt = Learnt(
            model=self.model, parts=self._parts, lora=self.lora is not None, guidance=self.guidance,
            inference=inference or {}, example=example,
        )  # fmt: skip
        with self.averaged() if averaged else nullcontext():
            write(learnt, Path(folder), form)
        return Path(folder)


def load_weights(target: Any, folder: str | Path) -> None:
    """Applies an exported folder to a policy, a model or a diffusers pipeline; the base model must be the same.

    A LoRA export goes into a LoRA policy's own adapters (same rank, alpha and targets), and their average starts anew;
    into a model or pipeline it goes as one more adapter. A full export replaces the component's values.
    """
    source = Path(folder).expanduser()
    model: Any = target.model if isinstance(target, Trained) else target
    check_readable(source, components_of(model)[0])
    lora = is_lora(source)
    if isinstance(target, Trained) and target.lora is not None:
        if not lora:
            raise ModelError(f"weights {str(folder)!r} are a full export, the policy trains LoRA: build it without.")
        target._assign(read_lora(model, target._parts, source, target.lora.alpha))
    elif lora:
        if isinstance(target, Trained) and target.trainable_parameters():
            raise ModelError(
                f"weights {str(folder)!r} are LoRA, the policy trains all weights: build it with that lora."
            )
        load_lora(model, source)
    else:
        load_components(model, source)
        if isinstance(target, Trained):
            target._overwritten = True
    if isinstance(target, Trained):
        for follower in target._followers.values():
            follower.reset()


def _add_lora(module: Any, lora: Lora, targets: Sequence[str], seed: int) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.targets or targets),
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,  # True is kaiming-uniform
    )
    with torch.random.fork_rng(devices=[]):  # equal on every process, and the caller's randomness is left alone
        torch.manual_seed(seed)
        try:
            module.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ModelError(f"lora: {error}") from error


def parts_of(model: Any, module: Any) -> dict[str, Any]:
    """The components in a model's trainable module, or in one that stands for it, by their names in the pipeline."""
    names = components_of(model)
    return {names[0]: module} if len(names) == 1 else {name: module[name] for name in names}


def _has_adapters(parts: Mapping[str, Any]) -> bool:
    return any(getattr(part, "peft_config", None) for part in parts.values())
