"""Which kernel computes attention, set for one model alone and said truthfully: `use` returns what will really run.

    attention.use(model.trainable, "flash", device)      "flash (cuda)", or a ModelError that says why not
    attention.backends(model.trainable, device)          names that would run there

Two kinds of layers exist in diffusers. The newer ones dispatch: their processor has the name of a backend. The older
ones call torch's scaled_dot_product_attention whatever that name is; a few of them have a twin that calls xformers.

Note: the log-probs of a rollout and of its update must come from the same arithmetic. A backend is therefore part of a
run and holds in both, and `ratio_first_update` shows what is left; one that rounds to 8 bits (sage) has no gradient
besides, and is refused in training.

Symbols: N samples, S tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowrl.models.pipeline import ModelError
from flowrl.resolve import nearest

NATIVE, XFORMERS = "native", "xformers"
TOKENS, HEADS = 32, 2
"""Size of the call that decides whether a backend runs."""
_LONGEST = 400
REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, OSError, AssertionError)
"""What kernels raise where they cannot run."""


class _Layers(NamedTuple):
    """The attention layers of a module, by what decides about their kernel."""

    dispatching: list[Any]
    fixed: list[Any]

    def __len__(self) -> int:
        """All of them; a NamedTuple would count its fields."""
        return len(self.dispatching) + len(self.fixed)


def use(
    module: nn.Module, name: str = NATIVE, device: torch.device | str | None = None, *, gradient: bool = True
) -> str:
    """Computes attention of every layer of `module` that can with backend `name`; returns what really will.

    A small call on `device` (None: where the module is) decides, with the module's dtype, and with its gradient unless
    `gradient` is False. Only the module's own processors are changed, never diffusers' process-wide choice. ModelError
    where the backend is unknown, not installed, cannot run there, gives no gradient, or does nothing on this module;
    the module then is as it was.
    """
    place, layers = torch.device(device or _device(module)), layers_of(module)
    followers = _followers(layers, name)
    if name == NATIVE:
        kernel = _sdpa_kernel(module, layers, place)
        _set(layers, followers, name)
        return f"native ({place.type}: {kernel})" if len(layers) else "native (no attention layers)"
    _check_name(name)
    if not followers:
        raise ModelError(_without_effect(module, layers, name))
    error = _probe(module, layers, name, place, gradient)
    _set(layers, followers, name)
    share = "" if len(followers) == len(layers) else f": {len(followers)} of {len(layers)} layers, the rest native"
    exact = error <= 16 * torch.finfo(_dtype(module)).eps
    return f"{name} ({place.type}{share}{'' if exact else f'; inexact: differs by {error:.0e}'})"


@contextmanager
def using(
    module: nn.Module, name: str, device: torch.device | str | None = None, *, gradient: bool = True
) -> Iterator[str]:
    """Within it `module` computes attention with `name` (see `use`, whose answer it gives); then as before."""
    layers = [layer for layer in module.modules() if _processor(layer) is not None]
    before = [(layer, layer.processor, getattr(layer.processor, "_attention_backend", None)) for layer in layers]
    try:
        yield use(module, name, device, gradient=gradient)
    finally:
        for layer, processor, backend in before:
            layer.processor = processor
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = backend


def backends(module: nn.Module, device: torch.device | str | None = None, *, gradient: bool = True) -> list[str]:
    """The names that `use` would take for this module on `device`; always `native`, first."""
    found = [NATIVE]
    for name in known():
        try:
            with using(module, name, device, gradient=gradient):
                found += [name] if name != NATIVE else []
        except ModelError:
            continue
    return found


def agreement(module: nn.Module, name: str, velocity: Callable[[], Tensor]) -> float:
    """Largest difference of `velocity()` [N,*L] between native attention and `name`, over the largest native value.

    `velocity` must evaluate `module`, without a gradient being asked for. ModelError as `use`.
    """
    with torch.no_grad():
        with using(module, NATIVE):
            exact = velocity()
        with using(module, name, gradient=False):
            other = velocity()
    return float((exact - other).abs().max() / exact.abs().max())


def known() -> list[str]:
    """Every backend that diffusers names, besides those that it would fetch as code from the hub."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]


def layers_of(module: nn.Module) -> _Layers:
    """The attention layers of a module: those whose processor asks for a backend, and those that always call torch."""
    layers = [layer for layer in module.modules() if _processor(layer) is not None]
    dispatching = [layer for layer in layers if hasattr(layer.processor, "_attention_backend")]
    return _Layers(dispatching, [layer for layer in layers if not hasattr(layer.processor, "_attention_backend")])


def _processor(layer: nn.Module) -> Any:
    return getattr(layer, "processor", None)


def _twins() -> dict[type, type]:
    """Processors that always call torch, and their twins that call xformers."""
    from diffusers.models import attention_processor as p

    return {
        p.JointAttnProcessor2_0: p.XFormersJointAttnProcessor,
        p.AttnProcessor2_0: p.XFormersAttnProcessor,
        p.AttnAddedKVProcessor2_0: p.XFormersAttnAddedKVProcessor,
    }


def _followers(layers: _Layers, name: str) -> list[Any]:
    """The layers that `name` has an effect on."""
    if name == NATIVE:
        return [*layers.dispatching, *layers.fixed]
    if name != XFORMERS or layers.dispatching or not layers.fixed:
        return layers.dispatching  # the few old layers of a newer model have masks that the twins do not take
    twins = _twins()
    pairs = {*twins, *twins.values()}
    return [layer for layer in layers.fixed if type(layer.processor) in pairs]


def _set(layers: _Layers, followers: list[Any], name: str) -> None:
    if layers.dispatching:
        from diffusers.models.attention_dispatch import AttentionBackendName

        for layer in layers.dispatching:
            # Also `native` by its name: None would follow the process-wide choice, which another model may have made.
            layer.processor._attention_backend = AttentionBackendName(name)
    fixed = [layer for layer in layers.fixed if any(layer is follower for follower in followers)]
    if not fixed:
        return
    twins = _twins()
    wanted = twins if name == XFORMERS else {twin: plain for plain, twin in twins.items()}
    for layer in fixed:
        kind = wanted.get(type(layer.processor))
        if kind is not None:
            layer.set_processor(kind())


def _check_name(name: str) -> None:
    if name.endswith("_hub"):
        raise ModelError(
            f"attention {name!r} fetches compiled code from the hub and runs it, which flowrl does not do. "
            f"Install the package instead, and set model.attention={name.split('_')[0]}."
        )
    names = known()
    if name not in names:
        raise ModelError(f"attention {name!r}: no such backend{nearest(name, names)}. There are: {', '.join(names)}.")


def _without_effect(module: nn.Module, layers: _Layers, name: str) -> str:
    kinds = ", ".join(sorted({type(layer.processor).__name__ for layer in layers.fixed})) or "none"
    other = f", or {XFORMERS}, which it has a processor for" if _followers(layers, XFORMERS) else ""
    return (
        f"attention {name!r} does nothing on {type(module).__name__}: its attention layers ({kinds}) choose their "
        f"kernel by themselves. Set model.attention={NATIVE}{other}."
    )


def _probe(module: nn.Module, layers: _Layers, name: str, device: torch.device, gradient: bool) -> float:
    """Runs the backend once there; its largest error against attention written out. ModelError where it cannot."""
    dtype = _dtype(module)
    query, key, value = _inputs(module, layers, device)
    where = f"attention {name!r} cannot run on {device.type} in {str(dtype).removeprefix('torch.')}"
    for tensor in (query, key, value):
        tensor.requires_grad_(gradient)
    try:
        out = _call(query, key, value, name, bool(layers.dispatching))
        if _always_masked(module):
            everything = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool, device=device)
            _call(query, key, value, name, bool(layers.dispatching), everything)
    except REFUSALS as error:
        raise ModelError(f"{where}: {_reason(error)} {_advice(name)}") from error
    if gradient:
        try:
            if not out.requires_grad:
                raise RuntimeError("it gives no gradient, so that training would pass attention by.")
            gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
            if not all(bool(each.isfinite().all()) for each in gradients):
                raise RuntimeError("its gradient is not finite.")
        except REFUSALS as error:
            raise ModelError(
                f"{where} with a gradient, which training needs: {_reason(error)} Set model.attention={NATIVE}."
            ) from error
    return float((out.detach().float() - _exact(query.float(), key.float(), value.float())).abs().max())


def _always_masked(module: nn.Module) -> bool:
    """Whether the network's call has a mask of the prompt's tokens, which its attention then is given every time."""
    return "encoder_attention_mask" in inspect.signature(module.forward).parameters


def _call(
    query: Tensor, key: Tensor, value: Tensor, name: str, dispatching: bool, mask: Tensor | None = None
) -> Tensor:
    """Attention [N,S,H,D] of `name`, through the same door as the layers that will use it."""
    if not dispatching:
        import xformers.ops

        return xformers.ops.memory_efficient_attention(query, key, value)
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    with attention_backend(name):  # checks that the package is there, and puts the process-wide choice back
        return dispatch_attention_fn(query, key, value, attn_mask=mask)


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K' / sqrt D) V of [N,S,H,D], written out (arXiv:1706.03762, equation 1)."""
    weights = torch.einsum("nshd,nthd->nhst", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("nhst,nthd->nshd", weights, value).detach()


def _inputs(module: nn.Module, layers: _Layers, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1,S,H,D] with the width of the module's own heads; equal every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, TOKENS, HEADS, _head_width(layers))
    query, key, value = torch.randn(shape, generator=generator).to(device, _dtype(module)).unbind()
    return query, key, value


def _head_width(layers: _Layers) -> int:
    for layer in (*layers.dispatching, *layers.fixed):
        if (width := getattr(layer, "head_dim", None)) is not None:
            return int(width)
        if (inner := getattr(layer, "inner_dim", None)) is not None:
            return int(inner) // int(layer.heads)
    return 64


def _sdpa_kernel(module: nn.Module, layers: _Layers, device: torch.device) -> str:
    """Which kernel torch's scaled_dot_product_attention takes there, in small letters: flash, efficient, math, ..."""
    from torch.nn.attention import SDPBackend

    query, key, value = (tensor.transpose(1, 2) for tensor in _inputs(module, layers, device))
    return SDPBackend(torch._fused_sdp_choice(query, key, value)).name.lower().removesuffix("_attention")


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the module computes in: quantised or 8-bit weights are not it."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(floating, torch.float32)


def _reason(error: BaseException) -> str:
    """What a kernel said, on one line; some list every reason of every variant."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= _LONGEST else text[:_LONGEST] + " ...").rstrip(".") + "."


def _advice(name: str) -> str:
    install = {XFORMERS: ' Its extra: pip install -e ".[xformers]".'}.get(name, "")
    return f"{install} Or set model.attention={NATIVE}.".strip()
