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

from flowrl import resolve as names
from flowrl.config import Config
from flowrl.costs import Cost
from flowrl.memory import cheaper
from flowrl.models.pipeline import FAMILIES, family_of, read_inference, sketch_pipeline
from flowrl.train import options_of

GIB = 2**30
BACKWARD = 2
"""A backward pass takes about twice the operations of its forward pass."""
MFU = 0.4
"""Share of a device's peak that such a network reaches; what is seen lies between 0.3 and 0.5."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One forward pass of the trained network for one sample and one branch of guidance."""

    flops: float
    saved: float
    """Numbers that autograd keeps for the backward pass."""
    largest: float
    """Numbers in the largest tensor between blocks: what gradient checkpointing keeps of each."""
    blocks: int


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
    """The trained network of a model without storage, walked once; at float32, whatever the run's precision is."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(1, *model.noise_shape(height, width, frames), device="meta")
    with _encoders_that_only_have_shapes(model.pipe):
        cond = model.encode_text(["a picture"], ())
    model.trainable.requires_grad_(True)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.trainable.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    # Some networks read lengths from masks, or choose an expert by the time; others multiply with them.
    tries = (("cpu", "meta"), ("meta", "meta"), ("cpu", "cpu"))
    for number, (masks, clock) in enumerate(tries, start=1):
        here = {name: tensor.to("meta" if tensor.is_floating_point() else masks) for name, tensor in cond.items()}
        kept.clear()
        fused = _FusedAttention()
        try:
            with FlopCounterMode(display=False) as counter, fused, saved_tensors_hooks(keep, lambda tensor: tensor):
                model.predict(x, torch.full((1,), 0.5, device=clock), here)
            break
        except (RuntimeError, NotImplementedError):
            if number == len(tries):
                raise
    saved = sum(tensor.numel() for key, tensor in kept.items() if key not in parameters)
    blocks = [module for module in model.trainable.modules() if isinstance(module, nn.ModuleList)]
    stack = max(blocks, key=lambda b: sum(p.numel() for p in b.parameters()), default=nn.ModuleList())
    return Walk(
        flops=(counter.get_total_flops() + fused.flops), saved=saved, largest=fused.largest, blocks=max(1, len(stack))
    )


def memory(config: Config, policy: Any, cost: Cost, walked: Walk | None, world: int = 1) -> Memory:
    """Bytes that a run takes on each device; activations are 0 where the network could not be walked."""
    section, o, model = config.model, config.optimizer, policy.model
    wide = 2 if section.dtype == "bfloat16" else 4
    components = [getattr(model.pipe, name) for name in model.components]
    trained = policy.num_trainable
    frozen = sum(_numbers(part) for part in components) - trained
    encoders = [p for n, p in model.pipe.components.items() if n.startswith(("text_encoder", "image_encoder"))]
    needs = config.algorithm.build().needs
    copies = (o.ema_decay is not None) + needs.old + (needs.reference and section.lora is None)
    rows = min(o.micro_batch or cost.states, cost.states) / (1 if o.micro_batch else world * o.updates_per_iteration)
    branches = 2 if section.guidance > 1 else 1
    latent = torch.Size(model.noise_shape(*_size(config, model))).numel()
    return Memory(
        network=frozen * wide * quantised(config),
        encoders=0.0 if section.offload_text_encoders else sum(_numbers(part) for part in encoders) * wide,
        vae=_numbers(getattr(model.pipe, "vae", None)) * 4,
        training=trained * 4 * 4,
        copies=trained * 4 * copies,
        activations=0.0 if walked is None else max(1.0, rows) * branches * wide * _kept(walked, config),
        states=latent * 4 * (2 * cost.stored + cost.samples) / world,
    )


def quantised(config: Config) -> float:
    """Bytes of a frozen weight over those of its dtype."""
    kinds = " ".join((config.model.quantization or {}).values())
    wide = 2 if config.model.dtype == "bfloat16" else 4
    return 0.5 / wide if "4" in kinds else 1 / wide if kinds or config.model.layerwise_casting else 1.0


def operations(cost: Cost, walked: Walk, checkpointing: bool) -> float:
    """Floating-point operations of an iteration over all devices."""
    again = 1 if checkpointing else 0
    trained = cost.train * (1 + BACKWARD + again) if not cost.single_pass else cost.rollout * BACKWARD
    return walked.flops * (cost.rollout + cost.old + cost.reference + cost.teacher + trained)


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
        f"{name} {_gib(getattr(found, name))}" for name in found.__dataclass_fields__ if getattr(found, name) > 0
    )
    told = [f"memory, estimated: {_gib(found.total)} GiB a device ({parts})"]
    if walked is None:
        told.append(f"  without activations, and no time: this network cannot be walked without numbers ({reason})")
    else:
        work = operations(cost, walked, config.model.gradient_checkpointing)
        seconds = work / (speed * MFU * world)
        told.append(
            f"work, estimated: {work / 1e12:,.3g} TFLOP an iteration: {seconds:,.3g} s, if {MFU:.0%} of "
            f"{speed / 1e12:,.3g} TFLOP/s a device is reached; {seconds * config.iterations / 3600:,.3g} h in all"
        )
    if limit is not None and found.total > limit * GIB:
        told.append(f"that is more than {limit:g} GiB. What needs less, the cheapest first:")
        told += [f"  {key}={value}   {why}" for key, value, why in cheaper(config)]
    return told


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.0f}"


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


def _kept(walked: Walk, config: Config) -> float:
    """Numbers kept of one sample: all, or the blocks' inputs and one block's own."""
    if not config.model.gradient_checkpointing:
        return walked.saved
    return walked.blocks * walked.largest + walked.saved / walked.blocks


def _size(config: Config, model: Any) -> tuple[int, int, int]:
    section = config.model
    return section.height or model.height, section.width or model.width, section.frames or model.frames


def _numbers(part: Any) -> int:
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


class _FusedAttention(torch.overrides.TorchFunctionMode):
    """Attention as a fused kernel would do it, in what it keeps and in what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.largest = 0.0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, k, v = given["query"], given["key"], given["value"]
        self.flops += 2.0 * q.numel() * k.shape[-2] * 2
        self.largest = max(self.largest, float(q.numel()))
        out: Tensor = _Fused.apply(q, k, v)
        return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("only the forward pass is counted")
