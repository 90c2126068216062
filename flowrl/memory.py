"""What makes a big model fit: each a small function on a loaded diffusers pipeline that does it, or says why it cannot.

    load(path, loading=loading_options(config.model))     quantised while it is read
    fit(model, config.model, device)                      the rest, before adapters are added and before the model moves
    with explained(config, "update"): ...                 out of memory becomes the next cheaper setting

Everything is off unless the config's section `model` asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flowrl import attention
from flowrl.config import OF_MEDIA
from flowrl.models.pipeline import ModelError

if TYPE_CHECKING:
    from flowrl.config import Config, ModelConfig

Phase = Literal["loading", "rollout", "decode", "update", "evaluation"]
_PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}
_TEXT_ENCODER = "text_encoder"
_LARGE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that hold nearly all weights of a denoiser."""


class OutOfMemory(RuntimeError):
    """The accelerator's memory was too small for a run's settings; the message has the next cheaper ones."""


# ------------------------------------------------------------------------------------------------ while loading


def loading_options(settings: ModelConfig) -> dict[str, Any]:
    """Arguments of `DiffusionPipeline.from_pretrained` that quantise the components of `settings.quantization`.

    ModelError where a package is missing, or where bitsandbytes finds no accelerator (diffusers asks for one).
    """
    if not settings.quantization:
        return {}
    for component, method in settings.quantization.items():
        _check_quantisation(component, method)
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    dtype = getattr(torch, settings.dtype)
    mapping = {name: _quantisation(name, method, dtype) for name, method in settings.quantization.items()}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def _check_quantisation(component: str, method: str) -> None:
    maker = method.partition("_")[0]
    where, package = f"model.quantization: {component}: {method}", _PACKAGES[maker]
    if find_spec(package) is None:
        raise ModelError(f'{where} needs the package {package}: pip install -e ".[quant]", or leave it out.')
    if maker == "bnb" and not torch.accelerator.is_available():
        raise ModelError(f"{where} needs an accelerator, and here is none. Set torchao_int8, or leave it out.")


def _quantisation(component: str, method: str, dtype: torch.dtype) -> Any:
    """The quantisation config of one component: text encoders are of transformers, the rest of diffusers."""
    import diffusers
    import transformers

    library: Any = transformers if component.startswith(_TEXT_ENCODER) else diffusers
    if method == "bnb_4bit":
        return library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    if method == "bnb_8bit":
        return library.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = {"torchao_int8": Int8WeightOnlyConfig, "torchao_float8": Float8WeightOnlyConfig}[method]
    return library.TorchAoConfig(kind())


# ------------------------------------------------------------------------------------------------ after loading


def fit(model: Any, settings: ModelConfig, device: torch.device | str) -> list[str]:
    """Does to a loaded model what `settings` asks for, so that it runs on `device`; returns lines: what is in effect.

    For a frozen model that still is on the CPU and has no adapters: those are added later, and stay on the device in
    float32. ModelError where something cannot be done with this model or on this device.
    """
    place = torch.device(device)
    said = [f"attention: {attention.use(model.trainable, settings.attention, place)}"]
    if settings.quantization:
        said.append("quantised: " + ", ".join(f"{name} ({how})" for name, how in settings.quantization.items()))
    for name, part in _denoisers(model, settings).items():
        if settings.layerwise_casting:
            said.append(f"{name}: {cast_layerwise(part, model.dtype)}")
        if settings.offload == "group":
            said.append(f"{name}: {offload_layers(part, place)}")
            model.stays.add(name)
        if settings.compile:
            said.append(f"{name}: {compile_blocks(part, place)}")
    if settings.offload_text_encoders:
        said.append(offload_text_encoders(model, place))
    return said


def cast_layerwise(module: Any, dtype: torch.dtype) -> str:
    """Keeps the weights of linear layers and convolutions in 8 bits (float8_e4m3fn), and computes in `dtype`.

    What diffusers' own layerwise casting leaves alone (embeddings, norms, what the class excepts) stays as it is. The
    weights are rounded for good: the rounded model is the reference too, and what an exported adapter was trained on.
    Note: peft draws an adapter in the dtype of its layer's weight, so its first values are rounded like that.
    """
    before, excepted = _size(module), _excepted(module)
    for name, layer in module.named_modules():
        if isinstance(layer, _LARGE) and not any(re.search(pattern, name) for pattern in excepted):
            _put(layer, _rounded)
            _fetch(layer, lambda weight: weight.to(dtype))
    return f"weights in float8, {_megabytes(before)} -> {_megabytes(_size(module))}"


def offload_layers(module: Any, device: torch.device) -> str:
    """Keeps the weights of linear layers and convolutions in main memory; a copy comes when its layer computes.

    The rest of the module moves to `device`. With gradient checkpointing the copies go as soon as they have served.
    """
    size = 0
    behind: set[int] = set()
    for part in module.modules():
        if isinstance(part, _LARGE):
            _put(part, lambda tensor: _home(tensor, device))
            _fetch(part, lambda weight: weight.to(device, non_blocking=True))
            size, behind = size + _size(part), behind | {id(p) for p in part.parameters()}
        else:
            _put(part, lambda tensor: tensor.to(device))

    def bring_adapters(*_: Any) -> None:
        """They are made where the weight of their layer is."""
        for parameter in module.parameters():
            if parameter.device != device and id(parameter) not in behind:
                parameter.data = parameter.data.to(device)

    module.register_forward_pre_hook(bring_adapters)
    if device.type == "cpu":
        return (
            f"weights ({_megabytes(size)}) stay in main memory, where the run is too: offload=group saves nothing here"
        )
    return f"weights ({_megabytes(size)}) in main memory, layer by layer on {device.type}"


def offload_text_encoders(model: Any, device: torch.device) -> str:
    """Text encoders lie in main memory; they come to `device` to encode, and leave before the denoiser runs next.

    So they come once for all new prompts of an iteration. ModelError where the pipeline has none.
    """
    encoders = {
        name: part
        for name, part in model.pipe.components.items()
        if name.startswith(_TEXT_ENCODER) and isinstance(part, nn.Module)
    }
    if not encoders:
        raise ModelError(
            f"{type(model.pipe).__name__} has no text encoders that could be offloaded; "
            "set model.offload_text_encoders=false."
        )
    visitors = Visitors(list(encoders.values()), device)
    model.stays.update(encoders)
    encode = model.encode

    def encode_there(*args: Any, **options: Any) -> Any:
        visitors.come()
        return encode(*args, **options)

    model.encode = encode_there
    for name in model.components:
        getattr(model.pipe, name).register_forward_pre_hook(lambda *_: visitors.leave())
    return f"{', '.join(encoders)}: in main memory between prompts ({_megabytes(visitors.size)})"


class Visitors:
    """Frozen modules that live in main memory (pinned, for CUDA) and visit `device`; nothing is copied back."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.device, self.here = device, False
        self._modules = [part for module in modules for part in module.modules()]
        self._homes: dict[int, Tensor] = {}
        for tensor in (tensor for module in modules for tensor in (*module.parameters(), *module.buffers())):
            tensor.data = self._homes[id(tensor)] = _home(tensor, device)
        self._own = [(dict(part._parameters), dict(part._buffers)) for part in self._modules]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(home.nbytes for home in self._homes.values())

    def come(self) -> None:
        """To the device."""
        if self.here:
            return
        copies = {key: home.to(self.device, non_blocking=True) for key, home in self._homes.items()}  # tied ones once
        for part in self._modules:
            _put(part, lambda tensor: copies[id(tensor)])
        self.here = True

    def leave(self) -> None:
        """Back to main memory."""
        if self.here:
            for part, (parameters, buffers) in zip(self._modules, self._own, strict=True):
                part._parameters.update(parameters)
                part._buffers.update(buffers)
            self.here = False


def compile_blocks(module: Any, device: torch.device) -> str:
    """Compiles the repeated blocks of a network, each when it first runs: minutes at the start, faster steps later.

    ModelError where the class does not say which they are and has no list `transformer_blocks`, or where nothing can be
    compiled for `device`, which a small function decides.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # compilers are found missing in many ways
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.compile: torch.compile fails on {device.type}: {reason} Leave it out.") from error
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()
        return f"compiled blocks: {', '.join(module._repeated_blocks)}"
    blocks = getattr(module, "transformer_blocks", None)
    if not blocks:
        raise ModelError(f"{type(module).__name__} does not say which of its blocks repeat; set model.compile=false.")
    for block in blocks:
        block.compile()
    return f"compiled blocks: {len(blocks)} of transformer_blocks"


def _denoisers(model: Any, settings: ModelConfig) -> Mapping[str, Any]:
    """The parts that learn, by name; none where nothing is asked of them."""
    if not (settings.layerwise_casting or settings.offload == "group" or settings.compile):
        return {}
    if not hasattr(model, "stays"):
        raise ModelError(
            f"{type(model).__name__} is no flowrl.models.base.PipelineModel, and only those can be offloaded, cast or "
            "compiled here; leave model.offload, model.layerwise_casting and model.compile out."
        )
    return {name: getattr(model.pipe, name) for name in model.components}


def _put(module: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
    """Replaces the frozen parameters and the buffers of one module, not of its parts, by what is made of them."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(made(parameter), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, made(buffer))


def _excepted(module: Any) -> tuple[str, ...]:
    """Patterns of names whose weights diffusers' layerwise casting leaves alone: they set the precision of the rest."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    own = (getattr(module, name, None) or () for name in ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules"))
    return (*DEFAULT_SKIP_MODULES_PATTERN, *(pattern for patterns in own for pattern in patterns))


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


def _fetch(layer: nn.Module, fetched: Callable[[Tensor], Tensor]) -> None:
    """Lets a layer compute with `fetched(weight)` in the place of each of its weights, which stay as they are kept.

    Note: not by diffusers' `enable_layerwise_casting` and `enable_group_offload`. These change a weight's values in
    place and back; autograd keeps a frozen weight of a norm or convolution by reference, so a backward pass, or the
    second forward pass of gradient checkpointing, finds it on another device or in 8 bits (CheckpointError).
    """
    forward = layer.forward

    def compute(*args: Any, **options: Any) -> Any:
        kept = dict(layer._parameters)
        layer._parameters.update({name: fetched(p) for name, p in kept.items() if p is not None})  # type: ignore[misc]
        try:
            return forward(*args, **options)
        finally:
            layer._parameters.update(kept)

    layer.forward = compute


def _home(tensor: Tensor, device: torch.device) -> Tensor:
    data = tensor.detach().cpu()
    return data.pin_memory() if device.type == "cuda" else data


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


# ------------------------------------------------------------------------------------------------ out of memory


class Saving(NamedTuple):
    """One setting that needs less memory."""

    key: str
    value: Any
    why: str


_PLAN = (
    "model.dtype", "model.lora", "model.quantization", "model.rollout_micro_batch", "model.decode_micro_batch",
    "model.decode_tiling", "optimizer.update", "optimizer.micro_batch", "model.gradient_checkpointing",
    "model.offload_text_encoders", "model.offload_trajectory", "model.layerwise_casting", "model.offload",
)  # fmt: skip
"""The keys that memory depends on, besides sizes."""


def cheaper(config: Config, during: Phase | None = None) -> list[Saving]:
    """Settings that need less memory than those of `config`, cheapest in time and quality first; each is valid alone.

    `during` leaves out portions that do not matter where the memory ran out; None keeps all.
    """
    if config.generation is None:
        return [*_smaller_portions(config, during), *_kept_elsewhere(config), *_kept_less(config)]
    kept = (*_kept_elsewhere(config), *_kept_less(config))
    return [*_fewer_answers(config, during), *(saving for saving in kept if _is_for(config, saving.key))]


def _is_for(config: Config, key: str) -> bool:
    """Whether a key means something to the model of a config."""
    return config.generation is None or key not in (*(f"model.{name}" for name in OF_MEDIA), "optimizer.update")


@contextmanager
def explained(config: Config, during: Phase) -> Iterator[None]:
    """Turns torch's out-of-memory error into one that names the plan and the next cheaper setting."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_advice(config, during, error)) from error


def _smaller_portions(config: Config, during: Phase | None) -> Iterator[Saving]:
    """The same numbers in smaller portions."""
    model, optimizer, evaluation = config.model, config.optimizer, config.data.evaluation
    samples = config.data.prompts_per_iteration * config.data.samples_per_prompt
    halves = (
        ("evaluation", "data.evaluation.batch_size", evaluation.batch_size, "fewer samples of an evaluation at a time"),
        ("rollout", "model.rollout_micro_batch", model.rollout_micro_batch or samples, "fewer latents in one pass"),
        (
            "decode evaluation",
            "model.decode_micro_batch",
            model.decode_micro_batch or samples,
            "fewer decoded at a time",
        ),
    )
    for phases, key, size, why in halves:
        if size > 1 and (during is None or during in phases):
            yield Saving(key, size // 2, f"{why}; nearly as fast, the same result")
    if during in (None, "decode", "evaluation") and not model.decode_tiling:
        yield Saving("model.decode_tiling", True, "decodes in tiles; slower, seams hardly visible")
    if during in (None, "rollout", "update") and optimizer.update_of(model.gradient_checkpointing) != "recompute":
        yield Saving("optimizer.update", "recompute", "does not keep the rollout's graphs; evaluates its states again")
    elif during in (None, "update") and (optimizer.micro_batch or samples) > 1:
        half = (optimizer.micro_batch or samples) // 2
        yield Saving("optimizer.micro_batch", half, "fewer states in one backward pass; nearly as fast")


def _fewer_answers(config: Config, during: Phase | None) -> Iterator[Saving]:
    """The same answers in smaller portions."""
    assert config.generation is not None
    answers = config.data.prompts_per_iteration * config.data.samples_per_prompt
    portions = (
        ("evaluation", "data.evaluation.batch_size", config.data.evaluation.batch_size, "of an evaluation at a time"),
        ("rollout", "generation.batch_size", config.generation.batch_size or answers, "written at a time, slower"),
        ("update", "optimizer.micro_batch", config.optimizer.micro_batch or answers, "in one backward pass"),
    )
    for phase, key, size, why in portions:
        if size > 1 and during in (None, phase):
            yield Saving(key, size // 2, f"fewer answers {why}; the same result")


def _kept_elsewhere(config: Config) -> Iterator[Saving]:
    """What can wait in main memory, and what can be computed again."""
    model = config.model
    quantised = any(name.startswith(_TEXT_ENCODER) for name in model.quantization or ())
    if not model.offload_text_encoders and not quantised:
        yield Saving("model.offload_text_encoders", True, "they come to the device for new prompts only")
    if not model.offload_trajectory:
        yield Saving("model.offload_trajectory", True, "the rollout's states wait in main memory")
    if not model.gradient_checkpointing and config.optimizer.update != "single_pass":
        yield Saving("model.gradient_checkpointing", True, "activations are computed again; a third more time")


def _kept_less(config: Config) -> Iterator[Saving]:
    """Fewer or shorter numbers, and weights that are fetched for every layer."""
    model = config.model
    if model.dtype == "float32":
        yield Saving("model.dtype", "bfloat16", "half the memory of frozen weights and activations; rounds more")
    if model.lora is None:
        yield Saving("model.lora.rank", 32, "adapters learn; no gradients, moments and copies of all weights")
        return
    weights_may_move = model.gradient_checkpointing and not model.compile and not quantised_denoiser(model)
    if weights_may_move and not model.layerwise_casting:
        yield Saving("model.layerwise_casting", True, "frozen weights in 8 bits; rounds them, a little slower")
    if weights_may_move and model.offload == "none":
        yield Saving("model.offload", "group", "weights come layer by layer; much slower")


def quantised_denoiser(settings: ModelConfig) -> bool:
    """Whether more than text encoders is quantised."""
    return any(not name.startswith(_TEXT_ENCODER) for name in settings.quantization or ())


def _advice(config: Config, during: Phase, error: Exception) -> str:
    flat = {key: _value_at(config, key) for key in _PLAN if _is_for(config, key)}
    plan = ", ".join(f"{key}={_yaml(value)}" for key, value in flat.items())
    first, *others = [f"{s.key}={_yaml(s.value)} ({s.why})" for s in cheaper(config, during)] or [""]
    mend = (
        f"Next cheaper: {first}." + (f" After that: {'; '.join(others)}." if others else "")
        if first
        else f"Nothing cheaper is left to set: take {_smaller(config)}, a smaller model, or a larger device."
    )
    said = ". ".join(str(error).split(". ")[:2]).rstrip(".")  # and not where every byte is
    return f"out of memory during {during}: {said}. The run has {plan}. {mend}"


def _smaller(config: Config) -> str:
    if config.generation is None:
        return "a smaller height, width or frames"
    return "a smaller generation.max_new_tokens"


def _value_at(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    return value


def _yaml(value: Any) -> str:
    """A value as it is written in an override."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
