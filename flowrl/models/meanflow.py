"""Average velocities for few-step generators (MeanFlow, arXiv:2505.13447): the network knows where a step ends.

    u(x, r, t) = 1/(t - r) integral_r^t v        x_r = x_t - (t - r) u, exact however long the step

The condition `t_next` [N] is r; without it r = t, where u is the velocity v of the moment. The network is that of
another family with an embedding of t - r added to its time embedding. Only the ODE solver `average` asks for r.

Shapes: N samples, *L latent dimensions, D width of the network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowrl import resolve as names
from flowrl.models.pipeline import FAMILIES, ModelError, family_of, resolve
from flowrl.types import T_NEXT, Cond
from samplers import Solver

FOLDER = "meanflow"
"""Folder of the two-time network inside a model's, beside that of its one-time network."""
NUM_STEPS = 4

_ELAPSED: ContextVar[Tensor | None] = ContextVar("elapsed", default=None)
"""t - r [N] of the forward pass at hand. The family that calls the network knows one time only, and engines wrap it."""


_README = """# {what} for the average velocities of {path}

Trained with flowrl. A step of this network ends at the time `t_next`. No pipeline of diffusers tells it that: there it
would be a one-time model, and poor in few steps. To use it, in the folder above this one:

```python
import torch
from torchvision.utils import save_image
from flowrl.models import load
from flowrl.policy import load_weights
model = load("{path}", family="{family}")
load_weights(model, "{folder}")
cond = model.encode(["your prompt"])
x = torch.randn(1, *model.noise_shape(model.height, model.width), generator=torch.manual_seed(0))
times = model.times({steps}, model.height, model.width)
with torch.no_grad():
    for t, t_next in zip(times[:-1], times[1:]):
        x = x - (t - t_next) * model.velocity(x, t.expand(1), cond | {{"t_next": t_next.expand(1)}})
    save_image(model.decode(x)[0], "image.png")
```
"""


class MeanFlow:
    """A model of another family with average velocities (MeanFlow, arXiv:2505.13447); what it lacks is that family's.

    The two-time network is read from the folder `meanflow` of the model; with `fresh` it is made from the model's own,
    and gives the velocity of the moment whatever r is. ModelError where there is none to be read, or it does not fit.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    solver: ClassVar[Solver] = "average"
    """Solver that its samples are walked with."""

    def __init__(
        self, pipe: Any, *, path: str = "", inference: Mapping[str, Any] | None = None, fresh: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        transformer = getattr(pipe, "transformer", None)  # some have a U-Net instead
        pipe.transformer = _fresh(transformer) if fresh else _stored(transformer, path)
        family = names.resolve(family_of(path), FAMILIES)
        self._one_time = family(
            pipe, path=path, inference={**(inference or {}), "num_inference_steps": NUM_STEPS}, **options
        )

    def __getattr__(self, name: str) -> Any:
        if name == "_one_time":  # copying asks before there is one
            raise AttributeError(name)
        return getattr(self._one_time, name)

    @property
    def trainable(self) -> nn.Module:
        """The two-time network."""
        module: nn.Module = self._one_time.trainable
        return module

    @trainable.setter
    def trainable(self, module: nn.Module) -> None:
        self._one_time.trainable = module

    def times(self, num_steps: int, height: int, width: int, frames: int = 1) -> Tensor:
        """Equal steps from 1 to 0 [T+1]: an average needs no small last step."""
        return torch.linspace(1, 0, num_steps + 1)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Average velocity [N,*L] float32 between t [N] and the condition `t_next` [N]; without it, that at t."""
        t_next = cond.get(T_NEXT, t).to(t)
        one_time = {name: tensor for name, tensor in cond.items() if name != T_NEXT}
        with _between(t - t_next):
            v: Tensor = self._one_time.velocity(x, t, one_time, guidance)
        return v

    def to(self, device: str | torch.device) -> MeanFlow:
        """Moves every network."""
        self._one_time.to(device)
        return self

    def readme(self, folder: str, lora: bool) -> str:
        """What an export says about its use: a pipeline of diffusers would walk it as if it had one time."""
        what = "LoRA" if lora else "Weights"
        return _README.format(what=what, path=self.path, folder=folder, steps=NUM_STEPS, family=FOLDER)


class _ElapsedEmbedder(nn.Module):
    """Embedding [N,D] of t - r [N]: exactly 0 where r = t, since sines and layers without bias keep a 0.

    Its last layer is zero at first, so that the network begins as the one that it was made from.
    """

    def __init__(self, width: int, frequencies: int = 16, highest: float = 32.0) -> None:
        super().__init__()
        self.frequencies, self.highest = frequencies, highest
        self.linear_1 = nn.Linear(frequencies, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, elapsed: Tensor) -> Tensor:
        """[N] -> [N,D]."""
        w = torch.logspace(-1, 0, self.frequencies, base=2 * self.highest, device=elapsed.device) * self.highest
        features = torch.sin(elapsed.float()[:, None] * w).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(nn.functional.silu(self.linear_1(features)))
        return out


@functools.cache
def _two_times(kind: type) -> type:
    """The transformer class `kind` of diffusers with a second time; loading and saving are its own."""

    class TwoTimes(kind):
        @functools.wraps(kind.__init__)  # diffusers reads its arguments
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.time_text_embed.elapsed_embed = _ElapsedEmbedder(self.inner_dim)
            self.time_text_embed.register_forward_hook(_add_elapsed)

    TwoTimes.__name__ = TwoTimes.__qualname__ = f"TwoTimes{kind.__name__}"
    return TwoTimes


def _add_elapsed(embed: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    elapsed = _ELAPSED.get()
    if elapsed is None:
        return output
    added = embed.elapsed_embed(elapsed.to(output.device)).to(output.dtype)
    return output + added.repeat(len(output) // len(added), 1)  # with guidance the batch comes twice


@contextmanager
def _between(elapsed: Tensor) -> Iterator[None]:
    token = _ELAPSED.set(elapsed)
    try:
        yield
    finally:
        _ELAPSED.reset(token)


def _fresh(transformer: Any) -> Any:
    """A two-time copy of a one-time transformer, equal to it for every r."""
    with torch.random.fork_rng(devices=[]):  # the same each time, and the caller's randomness is left alone
        torch.manual_seed(0)
        made = _two_times(type(transformer)).from_config(transformer.config)
    made = made.to(transformer.device, transformer.dtype)
    made.load_state_dict(transformer.state_dict(), strict=False)
    made.requires_grad_(False)
    return made.eval()


def _stored(transformer: Any, path: str) -> Any:
    """The two-time transformer in a model's folder; ModelError unless every weight of it is there."""
    folder = Path(resolve(path)) / FOLDER
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {path!r} has no two-time network (no {FOLDER}/config.json in its folder). Take the built-in "
            "'shapes', or the --output of `flowrl shapes meanflow`; or set model.family to that of the one-time model."
        )
    made, told = _two_times(type(transformer)).from_pretrained(
        folder, dtype=transformer.dtype, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
    )
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    if wrong:
        raise ModelError(
            f"{folder} is no two-time network of this model: {len(wrong)} weights are missing or differ, e.g. "
            f"{wrong[0]}. Without its embedding of the second time it would be the base model in few steps."
        )
    made.requires_grad_(False)
    return made.to(transformer.device).eval()
