"""Memory and work of a run, estimated from the model's configuration: no weights are read, nothing is computed.

The network is built without storage (torch's meta device) and walked once. What autograd keeps of that walk, and how
many floating-point operations it takes, is counted op by op, at the size that the run generates. Attention counts as a
fused kernel: it keeps its inputs and its output, not the matrix between them.

Note: an estimate. It leaves out temporary buffers, fragmentation, the rewards' networks and the decoder's activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from flowrl import resolve as names
from flowrl.config import Config
from flowrl.costs import Cost
from flowrl.engine import default_device
from flowrl.media import options_of
from flowrl.memory import cheaper
from flowrl.models.pipeline import FAMILIES, family_of, read_inference, sketch_pipeline
from flowrl.numerics import stand_ins
from flowrl.types import Cond

GIB = 2**30
MFU = 0.4
"""Share of a device's peak that such a network reaches; what is seen lies between 0.3 and 0.5."""
_NUMBER = 4
"""Bytes of a number in the walk."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One forward and one backward pass of the trained network, for one sample and one branch of guidance."""

    forward: float
    """Floating-point operations."""
    backward: float
    """Likewise; of frozen layers it is half of what it is of those that learn."""
    saved: float
    """Numbers that autograd keeps for the backward pass, weights excepted."""
    checkpointed: float
    """Numbers that are there at once with gradient checkpointing: inputs of all blocks, and what one block keeps."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by what they are for."""

    network: float
    encoders: float
    vae: float
    training: float
    """What learns, in float32, with gradients and the optimiser's two moments."""
    copies: float
    """Averaged weights, old policy, reference."""
    activations: float
    states: float
    """Stored states of the rollout, and the samples."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def walk(model: Any, height: int, width: int, frames: int) -> Walk:
    """The trained network of a model without storage, walked once; at float32, whatever the run's precision is.

    What learns is what asks for gradients: a `Policy` around the model has set that. A model that must see source
    pictures sees as few as it may, black ones of the size that it generates.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, *model.noise_shape(height, width, frames))
    fused = NumbersAndShapes()
    with torch.no_grad(), fused:
        cond = _conditions(model, height, width)
    parameters = [parameter for parameter in model.trainable.parameters() if parameter.requires_grad]
    kept: dict[int, Tensor] = {}
    blocks = _Blocks(kept)

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(storage(tensor), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with fused, blocks.called_by(model), saved_tensors_hooks(keep, lambda tensor: tensor):
            v = model.predict(x, torch.full((1,), 0.5), cond)
        forward = counter.get_total_flops() + fused.flops
        if parameters:
            v.backward(torch.empty_like(v))
            model.trainable.zero_grad()
        backward = counter.get_total_flops() + fused.flops - forward
    weights = {storage(tensor): tensor for tensor in model.trainable.parameters()}
    return Walk(
        forward=forward,
        backward=min(backward, 2 * forward),  # the counter forgets the groups of a convolution on the way back
        saved=size_of(kept, weights),
        checkpointed=blocks.size_with_checkpointing(weights),
    )  # fmt: skip


def _conditions(model: Any, height: int, width: int) -> Cond:
    """Those of one prompt, with as many source pictures as the model must have."""
    sources = stand_ins(model, height, width)
    with _encoders_that_only_have_shapes(model.pipe):
        cond: Cond = model.encode_text(["a picture"], sources)
        return cond | (model.encode_sources(sources) if sources else {})


def memory(config: Config, policy: Any, cost: Cost, walked: Walk | None, world: int = 1) -> Memory:
    """Bytes that a run takes on each device; activations are 0 where the network could not be walked."""
    section, o, model = config.model, config.optimizer, policy.model
    wide = 2 if section.dtype == "bfloat16" else 4
    components = [getattr(model.pipe, name) for name in model.components]
    trained = policy.num_trainable
    frozen = sum(numbers(part) for part in components) - trained
    encoders = [p for n, p in model.pipe.components.items() if n.startswith(("text_encoder", "image_encoder"))]
    needs = config.algorithm.build().needs
    copies = (o.ema_decay is not None) + needs.old + (needs.reference and section.lora is None)
    rows = _states_at_once(config, cost, world)
    branches = 2 if section.guidance > 1 else 1
    latent = torch.Size(model.noise_shape(*_size(config, model))).numel()
    return Memory(
        network=frozen * wide * quantised(config),
        encoders=0.0 if section.offload_text_encoders else sum(numbers(part) for part in encoders) * wide,
        vae=numbers(getattr(model.pipe, "vae", None)) * 4,
        # Autocast makes a copy of what learns in the run's precision, and a graph keeps it.
        training=trained * (4 * 4 + (wide if wide < 4 else 0)),
        copies=trained * 4 * copies,
        activations=0.0 if walked is None else rows * branches * wide * _kept(walked, config),
        states=latent * 4 * (2 * cost.stored + cost.samples) / world,
    )


def quantised(config: Config) -> float:
    """Bytes of a frozen weight over those of its dtype."""
    kinds = " ".join((config.model.quantization or {}).values())
    wide = 2 if config.model.dtype == "bfloat16" else 4
    return 0.5 / wide if "4" in kinds else 1 / wide if kinds or config.model.layerwise_casting else 1.0


def _states_at_once(config: Config, cost: Cost, world: int) -> float:
    """States of one device whose graphs are there at the same time; each counts once, guided or not."""
    o = config.optimizer
    if cost.single_pass:
        return max(1.0, cost.stored / world)
    return max(1.0, min(o.micro_batch or cost.states, cost.states / world / o.updates_per_iteration))


def operations(cost: Cost, walked: Walk, checkpointing: bool) -> float:
    """Floating-point operations of an iteration over all devices."""
    again = walked.forward if checkpointing else 0.0
    calls = cost.rollout + cost.old + cost.reference + cost.teacher
    if cost.single_pass:
        return calls * walked.forward + cost.rollout * walked.backward
    return calls * walked.forward + cost.train * (walked.forward + walked.backward + again)


def sketch(config: Config) -> Any:
    """The model of a config without weights; what it reads of a hub's model are a few megabytes."""
    section = config.model
    make = names.resolve(section.family or family_of(section.path), FAMILIES)
    pipe = sketch_pipeline(section.path)
    return make(
        pipe, path=section.path, inference=read_inference(section.path, pipe, section.inference), **options_of(section)
    )


def lines(config: Config, policy: Any, cost: Cost, world: int, speed: float, limit: float | None = None) -> list[str]:
    """The estimate in sentences; `speed` is what one device does in a second, `limit` its memory in GiB.

    Where the memory does not suffice, the settings that need less, the cheapest first.
    """
    height, width, frames = _size(config, policy.model)
    try:
        walked: Walk | None = walk(policy.model, height, width, frames)
        reason = ""
    except Exception as error:  # a network of any family: what it cannot do without numbers is not known beforehand
        walked, reason = None, f"{type(error).__name__}: {error}".splitlines()[0][:80]
    found = memory(config, policy, cost, walked, world)
    parts = ", ".join(
        f"{name} {gib(getattr(found, name))}" for name in found.__dataclass_fields__ if getattr(found, name) > 0
    )
    told = [f"memory, estimated: {gib(found.total)} GiB a device ({parts})"]
    if walked is None:
        told.append(f"  without activations, and no time: this network cannot be walked without numbers ({reason})")
    else:
        work = operations(cost, walked, config.model.gradient_checkpointing)
        seconds = work / (speed * MFU * world)
        told.append(
            f"work, estimated: {flop(work)} an iteration: {duration(seconds)}, if {MFU:.0%} of {flop(speed)}/s a "
            f"device is reached; {duration(seconds * config.iterations)} in all, without rewards and evaluations"
        )
    if limit is not None and found.total > limit * GIB:
        told.append(f"that is more than {limit:g} GiB. What needs less, the cheapest first:")
        told += list(savings(config, found.total, lambda other: memory(other, policy, cost, walked, world).total))
    return told


def savings(config: Config, total: float, needed: Callable[[Config], float]) -> Iterator[str]:
    """Settings that need less than `total` bytes, and what `needed` then says; some save what it leaves out.

    Keys of a key, such as those of adapters, have no figure: they make another model.
    """
    for key, value, why in cheaper(config):
        section, name = key.split(".", 1)
        then = ""
        if "." not in name:
            other = getattr(config, section).model_copy(update={name: value})
            less = needed(config.model_copy(update={section: other}))
            then = f" -> {gib(less)} GiB" if less < total else ""
        yield f"  {key}={str(value).lower()}{then}   {why}"


def gib(size: float) -> str:
    """Bytes, in GiB."""
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.0f}"


def flop(number: float) -> str:
    """Operations with a unit that suits their number."""
    name, unit = next((n, u) for n, u in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1.0)) if number >= u or u == 1.0)
    return f"{number / max(unit, 1e6):.3g} {name}FLOP"


def duration(seconds: float) -> str:
    """A time with a unit that suits it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def matmul_flops(device: str | torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of a large matrix product on this device: its peak in practice."""
    side = 1024 if torch.device(device).type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    synchronize: Callable[[], None] = torch.cuda.synchronize if a.is_cuda else (lambda: None)
    a @ a
    synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        synchronize()
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - start)


def speed_of(config: Config, tflops: float | None) -> float:
    """Operations a second of one device: what is said to be its peak, or what this machine's reaches on a matmul."""
    if tflops:
        return tflops * 1e12
    return matmul_flops(default_device(config.engine.device), getattr(torch, config.model.dtype))


def _kept(walked: Walk, config: Config) -> float:
    """Numbers kept of one sample."""
    return walked.checkpointed if config.model.gradient_checkpointing else walked.saved


def _size(config: Config, model: Any) -> tuple[int, int, int]:
    section = config.model
    return section.height or model.height, section.width or model.width, section.frames or model.frames


def numbers(part: Any) -> int:
    """Of a module's parameters; 0 of anything else."""
    return sum(p.numel() for p in part.parameters()) if isinstance(part, nn.Module) else 0


class _Shapes(nn.Module):
    """A text encoder's outputs, all zeros: what a prompt's conditions are shaped like, without its weights."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = encoder.config, torch.float32, torch.device("cpu")
        self.projects = hasattr(encoder, "text_projection")

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        from transformers.utils import ModelOutput

        config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        width = getattr(config, "hidden_size", None) or config.d_model
        layers = getattr(config, "num_hidden_layers", None) or config.num_layers
        hidden = torch.zeros(*input_ids.shape, width)
        pooled = torch.zeros(len(input_ids), getattr(config, "projection_dim", width))
        # Pipelines take the first output by its place.
        own = {"text_embeds": pooled} if self.projects else {}
        return ModelOutput(
            **own, last_hidden_state=hidden, pooler_output=hidden[:, 0], hidden_states=(hidden,) * (layers + 1)
        )


@contextmanager
def _encoders_that_only_have_shapes(pipe: Any) -> Iterator[None]:
    """Within it the pipeline encodes prompts on the CPU, without weights."""
    kind = type(pipe)
    real = {
        name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None
    }
    here = property(lambda _: torch.device("cpu"))
    pipe.__class__ = type(kind.__name__, (kind,), {"_execution_device": here, "device": here})
    try:
        for name, part in real.items():
            setattr(pipe, name, _Shapes(part))
        yield
    finally:
        for name, part in real.items():
            setattr(pipe, name, part)
        pipe.__class__ = kind


def storage(tensor: Tensor) -> int:
    """What tells a tensor's memory apart, without numbers too."""
    return tensor.untyped_storage()._cdata


def size_of(tensors: dict[int, Tensor], without: dict[int, Tensor]) -> float:
    """Numbers in storages: a view keeps the whole of what it is a view of."""
    own = (tensor for key, tensor in tensors.items() if key not in without)
    return sum(tensor.untyped_storage().nbytes() for tensor in own) / _NUMBER


class _Blocks:
    """Called where gradient checkpointing would call a block: what goes in, and what the block keeps for itself."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        self.kept, self.inside = kept, set[int]()
        self.inputs: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        self.inputs |= {storage(x): x for x in tree_leaves(inputs) if isinstance(x, Tensor)}
        before = set(self.kept)
        out = block(*inputs)
        own = {key: tensor for key, tensor in self.kept.items() if key not in before}
        self.inside |= own.keys()
        self.largest = max(self.largest, own, key=lambda tensors: size_of(tensors, {}))
        return out

    @contextmanager
    def called_by(self, model: Any) -> Iterator[None]:
        """Within it by the blocks' owners."""
        networks = [getattr(model.pipe, name) for name in model.components]
        for network in networks:
            network.enable_gradient_checkpointing(self)
        try:
            yield
        finally:
            for network in networks:
                network.disable_gradient_checkpointing()

    def size_with_checkpointing(self, weights: dict[int, Tensor]) -> float:
        """Numbers in the blocks' inputs, in what is kept between blocks, and in what the largest block keeps."""
        between = {key: tensor for key, tensor in self.kept.items() if key not in self.inside}
        return size_of(between | self.inputs, weights) + size_of(self.largest, weights | self.inputs)


class NumbersAndShapes(torch.overrides.TorchFunctionMode):
    """Lets tensors with numbers meet tensors that only have a shape, and counts attention as a fused kernel.

    States, masks, times and places keep their numbers until they meet weights: networks read lengths from them, choose
    an expert, or look whether a picture is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self._shapes: dict[Any, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _Fused.apply(self, *(self._shape(given[name]) for name in ("query", "key", "value")))
        if function is Tensor.__getitem__ and args[0].is_meta:
            args = (args[0], self._places(args[1]))
        if function is Tensor.to and (args[0].is_meta or _to_meta(*args[1:], *kwargs.values())):
            return self._shape(args[0]).type(_dtype_among(args[0].dtype, *args[1:], *kwargs.values()))
        if any(isinstance(each, Tensor) and each.is_meta for each in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(self._shape, (args, kwargs))
        return function(*args, **kwargs)

    def _shape(self, value: Any) -> Any:
        """A tensor's shape without its numbers, the same one every time; anything else as it is."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        key = (storage(value), value.dtype, value.shape, value.stride(), value.storage_offset())
        if key not in self._shapes:
            self._shapes[key] = (value, value.to("meta"))  # with the tensor itself, so that its storage stays its own
        return self._shapes[key][1]

    def _places(self, index: Any) -> Any:
        """An index whose result has a shape that does not depend on numbers: a mask by the places where it is true."""
        if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
            return tuple(self._shape(each) for each in index.nonzero(as_tuple=True))
        return index


def _to_meta(*given: Any) -> bool:
    """Whether the device among arguments is the one without storage."""
    return any(isinstance(g, torch.device | str) and torch.device(g).type == "meta" for g in given)


def _dtype_among(*given: Any) -> torch.dtype:
    """The last dtype among arguments, or that of a tensor among them."""
    return [g.dtype if isinstance(g, Tensor) else g for g in given if isinstance(g, torch.dtype | Tensor)][-1]


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel does it: it keeps its inputs, its output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, count: NumbersAndShapes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # laid out as the queries: whether the next layer makes a copy depends on it
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        ctx.count, ctx.flops = count, 4.0 * q.numel() * k.shape[-2]
        count.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.count.flops += 2 * ctx.flops
        q, k, v, *_ = ctx.saved_tensors
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
