"""What does a model of real size cost, and what do precision, batches and attention kernels do to its numbers?

python -m benchmarks.models gpu --size sd35m      published shapes, random weights, three iterations of a run
python -m benchmarks.models batch                 bfloat16 and batch size, for every tiny family
python -m benchmarks.models attention             what each kernel of attention changes, for every tiny family
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flowrl import attention, estimate, resolve, tiny
from flowrl.algorithms.schedule import plans_of
from flowrl.config import Config, load_config
from flowrl.configfile import dump_yaml
from flowrl.costs import expected_cost
from flowrl.media import options_of
from flowrl.models import ModelError, family_of, load, read_inference
from flowrl.models.pipeline import FAMILIES, INDEX, read_json
from flowrl.numerics import deviations, stand_ins
from flowrl.policy import Policy
from flowrl.train import Trainer
from flowrl.types import Cond, take
from samplers import stable_seed

SAMPLES = 8
"""Samples that precision and batches are measured on."""


# ------------------------------------------------------------------------------------------------ models of real size


class Size(NamedTuple):
    """A published model, and the run that it is timed in."""

    tiny: str
    """A tiny pipeline of the same family."""
    parts: Mapping[str, Mapping[str, Any]]
    """What the published configuration files of its network, VAE and scheduler say where it is not the default."""
    conditions: Mapping[str, tuple[int | str, ...]]
    """Shape of each condition of one prompt; a name is a number of the network's configuration."""
    run: Mapping[str, Any]
    """Settings of the run, by their dotted keys: those of a paper, and what fits into 80 GB."""


_VAE_16 = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
    "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
_FLOW = "FlowMatchEulerDiscreteScheduler"

SIZES = {
    "sd35m": Size(
        tiny="sd3",
        parts={
            "transformer": {
                "_class_name": "SD3Transformer2DModel", "sample_size": 128, "num_layers": 24, "attention_head_dim": 64,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                "dual_attention_layers": list(range(13)),
            },
            "vae": {**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
            "scheduler": {"_class_name": _FLOW, "shift": 3.0},
        },
        conditions={"prompt_embeds": (77 + 256, "joint_attention_dim"),
                    "pooled_prompt_embeds": ("pooled_projection_dim",)},
        run={  # Flow-GRPO (arXiv:2505.05470)
            "model.height": 512, "model.width": 512, "model.guidance": 4.5, "optimizer.micro_batch": 4,
            "model.gradient_checkpointing": True,
        },
    ),
    "flux": Size(
        tiny="flux",
        parts={
            "transformer": {
                "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
                "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "pooled_projection_dim": 768, "guidance_embeds": True,
            },
            "vae": {**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            "scheduler": {
                "_class_name": _FLOW, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
                "base_image_seq_len": 256, "max_image_seq_len": 4096,
            },
        },
        conditions={"prompt_embeds": (512, "joint_attention_dim"), "pooled_prompt_embeds": ("pooled_projection_dim",)},
        run={  # MixGRPO (arXiv:2507.21802)
            "model.height": 720, "model.width": 720, "optimizer.micro_batch": 2, "model.gradient_checkpointing": True,
        },
    ),
    "wan13b": Size(
        tiny="wan",
        parts={
            "transformer": {
                "_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128,
                "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096,
            },
            "vae": {"_class_name": "AutoencoderKLWan"},
            "scheduler": {
                "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
                "use_flow_sigmas": True, "flow_shift": 3.0,
            },
        },
        conditions={"prompt_embeds": (512, "text_dim")},
        run={  # Flow-GRPO's run on Wan 2.1
            "model.height": 240, "model.width": 416, "model.frames": 33, "model.guidance": 4.5,
            "optimizer.micro_batch": 2, "model.gradient_checkpointing": True,
        },
    ),
}  # fmt: skip
_ONE_SIZE = ("model.height", "model.width", "model.frames")
"""What a tiny pipeline has its own of."""


def config_of(size: Size, folder: str | Path, device: str, *, small: bool, overrides: Sequence[str] = ()) -> Config:
    """Flow-GRPO with LoRA and a reward that costs nothing: what is timed is the model."""
    values: dict[str, Any] = {
        "name": "models",
        "output_dir": str(folder),
        "iterations": 1,
        "model": {"path": f"tiny/{size.tiny}", "dtype": "bfloat16", "lora": {"rank": 32, "alpha": 64}},
        "algorithm": {"name": "flow_grpo", "num_steps": 10},
        "rewards": ["pixel.brightness"],
        "data": {"prompts": [f"prompt {n}" for n in range(8)], "prompts_per_iteration": 2, "samples_per_prompt": 4},
        "optimizer": {"lr": 1e-4, "update": "recompute"},
        "engine": {"name": "local", "device": device},
    }
    own = [f"{key}={value}" for key, value in size.run.items() if not (small and key in _ONE_SIZE)]
    file = Path(folder) / "models.yaml"
    file.write_text(dump_yaml(values))
    return load_config(file, [*own, *overrides])


def build(size: Size, config: Config, device: str, *, small: bool) -> Any:
    """The model with random weights, made where it is to run; random embeddings stand for the text encoders.

    `small`: network, VAE and scheduler of the tiny pipeline instead of the published ones. On the device "meta" nothing
    has storage.
    """
    import diffusers

    source = str(tiny.folder(size.tiny))
    index = read_json(source, INDEX) or {}
    files = {"transformer": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}
    said = {n: read_json(source, f"{n}/{f}") or {} for n, f in files.items()} if small else dict(size.parts)
    dtype = getattr(torch, config.model.dtype)
    parts = {
        name: _made(getattr(diffusers, values["_class_name"]), values, device, dtype if name == "transformer" else None)
        for name, values in said.items()
    }
    absent = {name: None for name, value in index.items() if isinstance(value, list)}
    pipe = getattr(diffusers, index["_class_name"])(**{**absent, **parts})
    pipe.set_progress_bar_config(disable=True)
    inference = read_inference(source, pipe) if small else {"max_sequence_length": 256}
    model = resolve.resolve(family_of(source), FAMILIES)(
        pipe, path=f"tiny/{size.tiny}", inference=inference, **options_of(config.model)
    )
    shapes = {
        name: [side if isinstance(side, int) else parts["transformer"].config[side] for side in shape]
        for name, shape in size.conditions.items()
    }
    model.encode_text = lambda prompts, sources: _embeddings(prompts, shapes)
    return model


def _made(kind: Any, values: Mapping[str, Any], device: str, dtype: torch.dtype | None) -> Any:
    """One part from its configuration, with random frozen weights."""
    if not issubclass(kind, torch.nn.Module):
        return kind.from_config(dict(values))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            made = kind.from_config(dict(values))
    finally:
        torch.set_default_dtype(before)
    return made.requires_grad_(False).eval()


def _embeddings(prompts: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Cond:
    """Random conditions [P, ...], the same for the same prompt."""
    draws = [torch.Generator().manual_seed(stable_seed(0, *text.encode())) for text in prompts]
    return {name: torch.stack([torch.randn(*shape, generator=g) for g in draws]) for name, shape in shapes.items()}


class Calls:
    """How often the network is called in which way, and with what it was the first time; for `floor`."""

    def __init__(self, network: torch.nn.Module, role: Callable[[], str]) -> None:
        self.network, self._role = network, role
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.inputs: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._handle = network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        shapes = tuple(tuple(each.shape) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        key = ("collect" if self._role() == "rollout" else "update", torch.is_grad_enabled(), shapes)
        self.counts[key] += 1
        if key not in self.inputs:
            self.inputs[key] = tree_map(_copy, (args, kwargs))

    def floor(self, dtype: torch.dtype, synchronize: Callable[[], object]) -> dict[str, float]:
        """Seconds that the same calls of the network take by themselves: the rollout's, and those of the update."""
        self._handle.remove()
        counts, seconds = dict(self.counts), {"collect": 0.0, "update": 0.0}
        device = next(self.network.parameters()).device
        for (phase, graded, shapes), count in counts.items():
            args, kwargs = self.inputs[phase, graded, shapes]
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                with (
                    torch.set_grad_enabled(graded),
                    torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
                ):
                    out = tree_leaves(self.network(*args, **kwargs))
                if graded:
                    torch.stack([each.float().sum() for each in out]).sum().backward()
            synchronize()
            seconds[phase] += time.perf_counter() - start
        return seconds


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Timing(NamedTuple):
    """What a run cost: medians of its iterations."""

    seconds: dict[str, float]
    """By phase, and `iteration`."""
    floor: dict[str, float]
    """Of the network's calls by themselves: `collect` and `update`."""
    calls: float
    """Samples through the network in an iteration, guidance twice."""
    flops: float
    """Operations of an iteration's forward and backward passes; what checkpointing does again is not counted."""
    peak_flops: float
    """Operations a second of a large matrix product there."""
    peak_memory: float | None
    """Bytes that torch had allocated at once in an iteration; None where it does not count them."""
    expected_memory: estimate.Memory
    weights: int
    learning: int

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (arXiv:2204.02311): the share of the peak that the iteration reached."""
        return self.flops / self.seconds["iteration"] / self.peak_flops


def measure(size: Size, config: Config, *, small: bool, iterations: int) -> Timing:
    """`iterations` of a run, after one that does not count; each with its floor right behind it."""
    device = config.engine.device or "cpu"
    cuda = device.startswith("cuda")
    synchronize: Callable[[], object] = torch.cuda.synchronize if cuda else (lambda: None)
    rows, floors, peaks = [], [], []
    with _run(size, config, small) as trainer:
        policy, model = trainer.policy, trainer.policy.model
        for iteration in range(1 + iterations):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            calls = Calls(model.trainable, lambda: policy._role)
            synchronize()
            start = time.perf_counter()
            row = trainer.step(iteration)
            synchronize()
            rows.append(row | {"time/iteration": time.perf_counter() - start})
            peaks.append(torch.cuda.max_memory_allocated() if cuda else 0)
            floors.append(calls.floor(model.dtype, synchronize))
    timed = rows[1:]
    phases = [key for key in timed[0] if re.fullmatch("time/(?!total)[a-z]+", key)]
    flops, memory, (weights, learning) = _expected(size, config, small, timed[-1])
    return Timing(
        seconds={key.removeprefix("time/"): statistics.median(row[key] for row in timed) for key in phases},
        floor={phase: statistics.median(floor[phase] for floor in floors[1:]) for phase in floors[0]},
        calls=_calls(timed[-1]), flops=flops,
        peak_flops=estimate.matmul_flops(device, getattr(torch, config.model.dtype)),
        peak_memory=max(peaks) if cuda else None, expected_memory=memory, weights=weights, learning=learning,
    )  # fmt: skip


class _Run(Trainer):
    """A trainer whose model is built instead of read."""

    def __init__(self, config: Config, size: Size, small: bool) -> None:
        self._make = lambda: build(size, config, config.engine.device or "cpu", small=small)
        super().__init__(config)

    def _load_model(self) -> Any:
        return self._make()


@contextmanager
def _run(size: Size, config: Config, small: bool) -> Iterator[Trainer]:
    """A trainer that is stepped by hand."""
    trainer = _Run(config, size, small)
    try:
        yield trainer
    finally:
        trainer._let_go()


def _expected(
    size: Size, config: Config, small: bool, row: Mapping[str, float]
) -> tuple[float, estimate.Memory, tuple[int, int]]:
    """Operations of an iteration by the calls that it counted, the memory that `flowrl plan` would tell, the sizes."""
    model = build(size, config, "meta", small=small)
    policy = Policy(model, lora=config.model.lora and config.model.lora.model_dump())
    section = config.model
    walked = estimate.walk(
        model, section.height or model.height, section.width or model.width, section.frames or model.frames
    )
    asked = _calls(row) - row["calls/train"]
    flops = asked * walked.forward + row["calls/train"] * (walked.forward + walked.backward)
    algorithm = config.algorithm.build()
    times = torch.linspace(1, 0, algorithm.num_steps + 1)
    plans = plans_of(algorithm, times, 0, config.data.samples_per_prompt, config.seed)
    memory = estimate.memory(config, policy, expected_cost(config, algorithm, plans), walked)
    weights = sum(p.numel() for p in model.trainable.parameters()) - policy.num_trainable
    return flops, memory, (weights, policy.num_trainable)


def _calls(row: Mapping[str, float]) -> float:
    return sum(value for key, value in row.items() if key.startswith("calls/"))


def render_timing(name: str, config: Config, found: Timing) -> str:
    """The timing as Markdown: seconds by phase beside the floor, and what they amount to."""
    whole = {**found.floor, "iteration": sum(found.floor.values())}
    lines = [["phase", "seconds", "bare network", "ratio"], ["---", "---:", "---:", "---:"]]
    for phase, seconds in found.seconds.items():
        if phase in whole or seconds >= 0.01 * found.seconds["iteration"]:
            floor = whole.get(phase)
            lines.append([
                phase, f"{seconds:.3g}", "" if floor is None else f"{floor:.3g}",
                "" if not floor else f"{seconds / floor:.2f}",
            ])  # fmt: skip
    memory = "not measured on this device" if found.peak_memory is None else f"{found.peak_memory / 2**30:.1f} GiB"
    m, d = config.model, config.data
    size = " x ".join(str(side) for side in (m.frames, m.height, m.width) if side) or "its own size"
    facts = [
        f"{name}: {_count(found.weights)} weights, {_count(found.learning)} learn, {m.dtype}, {size}, "
        f"guidance {m.guidance:g}",
        f"{d.prompts_per_iteration} x {d.samples_per_prompt} samples, {found.calls:,.0f} calls of the network, "
        f"{found.calls / found.seconds['iteration']:.3g} a second",
        f"peak memory {memory}; `flowrl plan` estimates {found.expected_memory.total / 2**30:.3g} GiB",
        f"{found.flops / 1e12:.3g} TFLOP an iteration; MFU {found.mfu:.1%} of {found.peak_flops / 1e12:.3g} TFLOP/s "
        "(a large matrix product here)",
    ]
    return "\n".join([*(f"- {fact}" for fact in facts), "", *_markdown(lines)])


# ------------------------------------------------------------------------------------------------ precision, batches


class Effect(NamedTuple):
    """What a precision and the cut of a batch do to a family's numbers."""

    family: str
    dtype: str
    against_float32: float
    """Largest difference of velocities to those in float32, over the largest velocity."""
    one_by_one: float
    """The same between a batch and its samples one by one, in this precision."""
    ratio_same_batch: float
    """Largest |ratio - 1| of an untouched policy whose states are evaluated again in the rollout's own batches."""
    ratio_one_by_one: float


def effects(name: str) -> list[Effect]:
    """float32 and bfloat16 of one tiny family."""
    found, exact = [], None
    for deviation in deviations(f"tiny/{name}", samples=SAMPLES):
        model = load(f"tiny/{name}", dtype=getattr(torch, deviation.dtype))
        together, singly = _velocities(model, SAMPLES), _velocities(model, 1)
        exact = together if exact is None else exact
        found.append(Effect(
            name, deviation.dtype, _apart(together, exact), _apart(singly, together), deviation.same_batch,
            deviation.one_by_one,
        ))  # fmt: skip
    return found


@torch.no_grad()
def _velocities(model: Any, batch: int) -> Tensor:
    """Velocities [N,*L] at fixed states and times, `batch` in one call; guidance off."""
    cond = model.encode(["a red circle and a blue star"], stand_ins(model))
    shape = model.noise_shape(model.height, model.width, model.frames)
    x = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, SAMPLES)
    parts = zip(x.split(batch), t.split(batch), strict=True)
    return torch.cat([model.velocity(a, b, take(cond, torch.zeros(len(b), dtype=torch.long))) for a, b in parts])


def _apart(some: Tensor, others: Tensor) -> float:
    return float((some - others).abs().max() / others.abs().max())


def render_effects(rows: Sequence[Effect]) -> str:
    """The effects as a Markdown table."""
    head = ["family", "dtype", "velocity, to float32", "velocity, one by one", "ratio, same batch", "ratio, one by one"]
    lines = [head, ["---", "---", *["---:"] * 4]]
    lines += [[row.family, row.dtype, *(_small(value) for value in row[2:])] for row in rows]
    return "\n".join(_markdown(lines))


# ------------------------------------------------------------------------------------------------ attention


class Agreement(NamedTuple):
    """What one kernel of attention does to one family."""

    family: str
    backend: str
    difference: float | None
    """Largest difference of velocities to native attention, over the largest; None where it is refused."""
    reason: str
    """Why it is refused."""


def agreements(name: str) -> list[Agreement]:
    """Every kernel that diffusers names, on one tiny family in float32."""
    model = load(f"tiny/{name}")
    found = []
    for backend in attention.known():
        try:
            difference = attention.agreement(model.trainable, backend, lambda: _velocities(model, SAMPLES))
            found.append(Agreement(name, backend, difference, ""))
        except (ModelError, *attention.REFUSALS) as error:
            found.append(Agreement(name, backend, None, " ".join(str(error).split())))
    return found


def render_agreements(rows: Sequence[Agreement]) -> str:
    """A table of the kernels that some family runs, and a list of why the others are refused."""
    runs = [
        backend for backend in attention.known() if any(r.backend == backend and r.difference is not None for r in rows)
    ]
    lines = [["family", *runs], ["---", *["---:"] * len(runs)]]
    refused: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for name in dict.fromkeys(row.family for row in rows):
        found = {row.backend: row for row in rows if row.family == name}
        lines.append([name, *("refused" if (d := found[b].difference) is None else _small(d) for b in runs)])
        for row in (row for row in found.values() if row.difference is None):
            first = row.reason.split(". ")[0].rstrip(".").removeprefix(f"attention {row.backend!r} ")
            names, backends = refused.setdefault(first.replace(f"backend {row.backend!r}", "backend"), ({}, {}))
            names[name], backends[f"`{row.backend}`"] = None, None
    told = [
        f"- {_listed(names, 'families')}: {_listed(backends, 'kernels')}: {reason}."
        for reason, (names, backends) in refused.items()
    ]
    return "\n".join([*_markdown(lines), "", *told])


# ------------------------------------------------------------------------------------------------ the command line


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _listed(names: Iterable[str], kind: str) -> str:
    found = list(names)
    return ", ".join(found) if len(found) <= 6 else f"{len(found)} {kind}"


def _count(number: int) -> str:
    power = 3 * ((len(str(number)) - 1) // 3)
    return f"{number / 10**power:.3g}{('', 'k', 'M', 'B')[power // 3]}"


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = commands.add_parser("gpu", help="three iterations of a model of real size")
    gpu.add_argument("--size", choices=sorted(SIZES), required=True)
    gpu.add_argument("--tiny", action="store_true", help="its tiny pipeline instead, to try the command anywhere")
    gpu.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    gpu.add_argument("--iterations", type=int, default=3, help="timed ones, after one that is not")
    gpu.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run, as flowrl train takes them"
    )
    for command, text in (("batch", "bfloat16 and batch size"), ("attention", "kernels of attention")):
        commands.add_parser(command, help=text).add_argument("--only", nargs="*", default=sorted(tiny.names()))
    options = parser.parse_args(arguments)
    if options.command == "batch":
        print(render_effects([row for name in options.only for row in effects(name)]))
    elif options.command == "attention":
        print(render_agreements([row for name in options.only for row in agreements(name)]))
    else:
        _time(options)
    return 0


def _time(options: argparse.Namespace) -> None:
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(size, folder, options.device, small=options.tiny, overrides=options.overrides)
        found = measure(size, config, small=options.tiny, iterations=options.iterations)
    on = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(f"{on}, torch {torch.__version__}")
    print(render_timing(f"{options.size}{' (tiny)' if options.tiny else ''}", config, found))


if __name__ == "__main__":
    sys.exit(main())
