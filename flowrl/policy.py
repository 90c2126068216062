"""The trained model: which weights learn, what they were at first, their average, and their export to diffusers.

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
import functools
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import Parameter

from flowrl import tiny
from flowrl.ema import EMA
from flowrl.models.pipeline import BUILT_IN, INFERENCE, LORA_WEIGHTS, ModelError
from flowrl.types import Cond, Model

ADAPTER = "default"
_METADATA = "lora_adapter_metadata"
_UNFIT = "does not fit the model. Give weights that were trained on the base model of model.path"


class Lora(BaseModel):
    """Low-rank adapters (arXiv:2106.09685): weights W + alpha / rank B A, of which A and B learn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    """Module names to adapt, matched at their end; None: the attention layers of the model's family."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A is drawn; B is zero, so that training starts at the model itself."""


class Policy:
    """A model with guidance applied, of which LoRA adapters (`lora`), all weights (None) or nothing (`frozen`) learn.

    What learns is float32 whatever the model's dtype. `reference` keeps a second copy of the transformer, which
    `reference()` needs where all weights learn, or where a full export is loaded into a frozen policy; LoRA gets its
    reference for nothing, by switching the adapters off.

    `teachers` are the folders that `teacher()` can be asked for: runs, or what an export wrote. LoRA teachers are
    adapters on one frozen base, the student's own where it trains LoRA itself; a teacher with full weights is a copy of
    the transformer. None of them learns, is averaged, saved or exported. `largest_guidance` is the teachers'.

    `old` keeps a second set of weights, which follows those that learn: `old()`, moved by `follow`.
    """

    def __init__(
        self,
        model: Model,
        *,
        lora: Lora | Mapping[str, Any] | None = None,
        frozen: bool = False,
        guidance: float = 1.0,
        ema_decay: float | None = None,
        ema_warmup: bool = True,
        reference: bool = False,
        old: bool = False,
        teachers: Sequence[str] = (),
        largest_guidance: float = 1.0,
        gradient_checkpointing: bool = False,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.guidance = model, guidance
        if hasattr(model, "check_guidance"):
            model.check_guidance(guidance)
        self._largest_guidance = max(guidance, largest_guidance)
        self.lora = Lora.model_validate(lora) if lora is not None and not frozen else None
        self.calls: Counter[str] = Counter()
        self._role = "train"
        self._device = torch.device(device) if device is not None else None
        if device is not None:
            model.to(device)  # type: ignore[attr-defined]
        # An engine may wrap `model.trainable` later; weights and adapters are reached through the module itself.
        self._module: Any = model.trainable
        self._module.requires_grad_(False)
        self._parts = parts_of(model, self._module)
        shapes = {name: _shapes(part) for name, part in self._parts.items()}
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
        self._parameters: dict[str, Parameter] = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(self.device, torch.float32)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[attr-defined]
        self._initial: torch.nn.Module | None = None
        self._overwritten = False
        folders = {name: exported_weights(name) for name in teachers}
        if self.lora is None and (reference or any(map(_is_lora, folders.values()))):
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
    def role(self, name: str) -> Iterator[None]:
        """Within it `velocity` counts under `name`; a count is a sample times a guidance branch."""
        before, self._role = self._role, name
        try:
            yield
        finally:
            self._role = before

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `velocity` is that of the weights before training, or before an export was loaded.

        Cutting gradients is left to the caller. ModelError where those weights are gone for want of a copy.
        """
        with self.role("reference"), self._initial_weights():
            yield

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

    @contextmanager
    def old(self) -> Iterator[None]:
        """Within it `velocity` is that of the weights that follow the trained ones, and counts as "old".

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

    def export(self, folder: str | Path, *, averaged: bool = True, inference: Mapping[str, Any] | None = None) -> Path:
        """Writes what was learnt in diffusers' own format, with `inference.json` and a README that shows its use.

        LoRA: what `pipe.load_lora_weights(folder)` takes. Full: the component, which `from_pretrained` takes.
        `inference` are arguments of the pipeline's call, over those of the model; guidance is the policy's.
        """
        if not self._parameters:
            raise ModelError("a frozen policy has learnt nothing that could be exported.")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        with self.averaged() if averaged else nullcontext():
            if self.lora is not None:
                for name, part in self._parts.items():
                    _save_lora(model, name, part, target)
            else:
                for name, part in self._parts.items():
                    save_component(part, target / name)
        call = model.arguments(guidance=self.guidance, **(inference or {}))
        (target / INFERENCE).write_text(json.dumps(call, indent=2) + "\n")
        # A model that no pipeline of diffusers can walk says itself how it is used.
        write = getattr(model, "readme", None) or functools.partial(_readme, model)
        (target / "README.md").write_text(write(target.name, self.lora is not None))
        return target

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
        if not _is_lora(folder):
            copies = {
                part: _load_copy(type(own), folder / part, model.dtype, shapes[part]).to(self.device)
                for part, own in self._parts.items()
            }
            return (next(iter(copies.values())) if len(copies) == 1 else type(self._module)(copies)), None
        module: Any = self._module if self.lora is not None else self._initial
        parts = parts_of(model, module)
        adapter = f"teacher_{max(len(getattr(part, 'peft_config', ())) for part in parts.values())}"
        for part, own in parts.items():
            file = lora_file(model, part)
            _load_adapter(own, file.prefix, folder / file.name, adapter)
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


def exported_weights(folder: str | Path) -> Path:
    """The folder of the exported weights at `folder`: a run that has ended, its `weights`, or any export.

    ModelError where there are none.
    """
    source = Path(folder).expanduser()
    for candidate in (source / "weights", source):
        if (candidate / INFERENCE).is_file() or _is_lora(candidate):
            return candidate
    reason = "has no exported weights" if source.is_dir() else "is no folder"
    raise ModelError(
        f"weights {str(folder)!r}: {source.absolute()} {reason}. Give the output_dir of a run that has ended, or what "
        "an export wrote (flowrl export RUN --output FOLDER)."
    )


def load_weights(target: Any, folder: str | Path) -> None:
    """Applies an exported folder to a policy, a model or a diffusers pipeline; the base model must be the same.

    A LoRA export goes into a LoRA policy's own adapters (same rank, alpha and targets), and their average starts anew;
    into a model or pipeline it goes as one more adapter. A full export replaces the component's values.
    """
    source = Path(folder).expanduser()
    model: Any = target.model if isinstance(target, Policy) else target
    pipe = getattr(model, "pipe", model)
    components = _components(model)
    lora = _is_lora(source)
    if not lora and not (source / components[0]).is_dir():
        raise ModelError(
            f"weights {str(folder)!r}: neither {LORA_WEIGHTS} nor a folder {components[0]}/ in it. "
            "Give the folder that an export wrote, e.g. runs/<name>/weights."
        )
    if isinstance(target, Policy) and target.lora is not None:
        if not lora:
            raise ModelError(f"weights {str(folder)!r} are a full export, the policy trains LoRA: build it without.")
        _load_lora_into(target, source)
    elif lora:
        if isinstance(target, Policy) and target.trainable_parameters():
            raise ModelError(
                f"weights {str(folder)!r} are LoRA, the policy trains all weights: build it with that lora."
            )
        for component in components:
            file = lora_file(model, component)
            pipe.load_lora_weights(str(source), weight_name=file.name, **file.options)
            getattr(pipe, component).requires_grad_(False)
    else:
        for component in components:
            _load_component(getattr(pipe, component), source / component)
        if isinstance(target, Policy):
            target._overwritten = True
    if isinstance(target, Policy):
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
    names = _components(model)
    return {names[0]: module} if len(names) == 1 else {name: module[name] for name in names}


def _components(target: Any) -> tuple[str, ...]:
    """The parts that learn, of a model, or of a bare pipeline, whose own `components` are all of its parts."""
    if hasattr(target, "trainable"):
        return tuple(getattr(target, "components", ("transformer",)))
    known = ("transformer", "transformer_2", "unet")
    return tuple(name for name in known if getattr(target, name, None) is not None)


def _has_adapters(parts: Mapping[str, Any]) -> bool:
    return any(getattr(part, "peft_config", None) for part in parts.values())


class LoraFile(NamedTuple):
    """Where the adapters of a component lie in an export, and how diffusers is told so."""

    name: str
    prefix: str
    options: dict[str, Any]
    """Arguments of `load_lora_weights` besides the name of the file."""


def lora_file(model: Any, component: str) -> LoraFile:
    """The file of a component's adapters: experts after the first have one each, with the first one's key names."""
    first, *others = _components(model)
    if component == first:
        return LoraFile(LORA_WEIGHTS, first, {})
    name = LORA_WEIGHTS.replace(".", f"_{others.index(component) + 2}.")
    return LoraFile(name, first, {f"load_into_{component}": True})


def _save_lora(model: Any, component: str, module: Any, folder: Path) -> None:
    """Adapters and their configuration, without which diffusers takes alpha to be the rank and loses the scale."""
    from peft.utils import get_peft_model_state_dict

    file = lora_file(model, component)
    model.pipe.save_lora_weights(
        folder,
        weight_name=file.name,
        **{
            f"{file.prefix}_lora_layers": get_peft_model_state_dict(module, adapter_name=ADAPTER),
            f"{file.prefix}_{_METADATA}": module.peft_config[ADAPTER].to_dict(),
        },
    )


def save_component(module: Any, folder: Path) -> None:
    """Writes a diffusers module, without the path of the machine that it came from."""
    module.save_pretrained(folder, safe_serialization=True)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)  # a path of the machine that trained
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _load_lora_into(policy: Policy, folder: Path) -> None:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for component in policy._parts:
        file = lora_file(policy.model, component)
        prefix, place = f"{file.prefix}.", f"{component}." if len(policy._parts) > 1 else ""
        with safe_open(str(folder / file.name), framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get(_METADATA, "{}"))
            for key in stored.keys():
                found[place + _with_adapter(key.removeprefix(prefix))] = stored.get_tensor(key)
        alpha = metadata.get(f"{prefix}lora_alpha")
        if policy.lora is not None and alpha is not None and alpha != policy.lora.alpha:
            raise ModelError(
                f"weights {str(folder / file.name)!r} have lora alpha {alpha}, the policy {policy.lora.alpha}: "
                "make them equal."
            )
    policy._assign(found)


def _with_adapter(name: str) -> str:
    """`a.lora_A.weight`, as it is stored, to `a.lora_A.default.weight`, as the parameter is called."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ADAPTER}.{last}"


def _load_component(module: Any, folder: Path) -> None:
    stored = type(module).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    try:
        module.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise ModelError(f"weights {str(folder)!r} do not fit the model: {error}") from error


def _is_lora(folder: Path) -> bool:
    return (folder / LORA_WEIGHTS).is_file()


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _load_copy(kind: Any, folder: Path, dtype: torch.dtype, shapes: Mapping[str, torch.Size]) -> torch.nn.Module:
    """A frozen module of the class `kind` from a full export; ModelError unless its parameters have these shapes."""
    try:
        module: torch.nn.Module = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"teacher {str(folder)!r} could not be read: {error}") from error
    _check_teacher(folder, _shapes(module), shapes)
    return module.requires_grad_(False).eval()


def _load_adapter(module: Any, component: str, file: Path, adapter: str) -> None:
    """One more adapter on a module, with the rank, alpha and targets of its export; ModelError if it does not fit."""
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        own = [key for key in stored.keys() if key.startswith(f"{component}.")]
        asked = {key.removeprefix(f"{component}."): torch.Size(stored.get_slice(key).get_shape()) for key in own}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            module.load_lora_adapter(
                str(file.parent), prefix=component, weight_name=file.name, use_safetensors=True, adapter_name=adapter
            )
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"teacher {str(file)!r} {_UNFIT} ({error})") from error
    found = get_peft_model_state_dict(module, adapter_name=adapter) if own else {}
    _check_teacher(file, asked, {name: tensor.shape for name, tensor in found.items()})


def _check_teacher(source: Path, stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    wrong = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if wrong or not stored:
        example = f"{len(wrong)} tensors differ in name or shape, e.g. {wrong[0]}" if wrong else "it has no tensors"
        raise ModelError(f"teacher {str(source)!r} {_UNFIT} ({example})")


_DRAW = 'pipe("your prompt", generator=torch.manual_seed(0), **settings)'
_SHOW_IMAGE = (f'{_DRAW}.images[0].save("image.png")',)
_SHOW_VIDEO = (
    "from diffusers.utils import export_to_video",
    f'export_to_video({_DRAW}.frames[0], "video.mp4")',
)


def _readme(model: Any, folder: str, lora: bool) -> str:
    pipe, name, parts = model.pipe, type(model.pipe).__name__, model.components
    # diffusers reloads a pipeline that has no T5, say, only where it is told so.
    extra = "".join(
        f", {key}=None"
        for key, value in pipe.components.items()
        if value is None and key not in pipe._optional_components
    )
    head, base = ["import json, torch"], f'"{model.path}"'
    if model.path in BUILT_IN or model.path.startswith(tiny.PREFIX):  # names that only flowrl can turn into a folder
        head.append("from flowrl.models import resolve")
        base = f"resolve({base})"
    if lora:
        body = [
            f"from diffusers import {name}",
            f"pipe = {name}.from_pretrained({base}, dtype={model.dtype}{extra})",
        ]
        for part in parts:
            file = lora_file(model, part)
            given = "".join(f", {key}={value}" for key, value in file.options.items())
            body.append(f'pipe.load_lora_weights("{folder}", weight_name="{file.name}"{given})')
    else:
        kinds = {part: type(getattr(pipe, part)).__name__ for part in parts}
        given = ", ".join(f"{part}={part}" for part in parts)
        body = [
            f"from diffusers import {', '.join(sorted({*kinds.values(), name}))}",
            *(
                f'{part} = {kind}.from_pretrained("{folder}/{part}", dtype={model.dtype})'
                for part, kind in kinds.items()
            ),
            f"pipe = {name}.from_pretrained({base}, {given}, dtype={model.dtype}{extra})",
        ]
    tail = [
        f'settings = json.load(open("{folder}/{INFERENCE}"))  # guidance, size and steps of the training',
        *(_SHOW_VIDEO if getattr(model, "video", False) else _SHOW_IMAGE),
    ]
    code = "\n".join([*head, *body, *tail])
    title = f"{'LoRA' if lora else 'Weights'} for {model.path}"
    return f"# {title}\n\nTrained with flowrl. To use it, in the folder above this one:\n\n```python\n{code}\n```\n"
