"""Exported weights: what a policy learnt in four formats, each with a README that draws with it, and reading it back.

| format | files | for |
|---|---|---|
| `diffusers` | a LoRA file with its alpha, or the whole component | `pipe.load_lora_weights`, `from_pretrained` |
| `peft` | adapter_model.safetensors, adapter_config.json | `peft.PeftModel.from_pretrained` |
| `comfyui` | a LoRA file with ComfyUI's names (`flowrl.comfyui`) | the folder models/loras of ComfyUI |
| `merged` | the whole pipeline, with what was learnt inside | `DiffusionPipeline.from_pretrained` |

`inference.json` beside them has the arguments of the pipeline's call that the weights were trained with.
"""

from __future__ import annotations

import copy
import json
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flowrl import comfyui, tiny
from flowrl.models.pipeline import BUILT_IN, INDEX, INFERENCE, LORA_WEIGHTS, ModelError

Format = Literal["diffusers", "peft", "comfyui", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)
ADAPTER = "default"
NOISE = "noise.safetensors"
COMFYUI_WEIGHTS = "comfyui_lora.safetensors"

_METADATA = "lora_adapter_metadata"
_UNFIT = "does not fit the model. Give weights that were trained on the base model of model.path"


# ------------------------------------------------------------------------------------------------ components


def components_of(target: Any) -> tuple[str, ...]:
    """The parts that learn, of a model, or of a bare pipeline, whose own `components` are all of its parts."""
    if hasattr(target, "trainable"):
        return tuple(getattr(target, "components", ("transformer",)))
    known = ("transformer", "transformer_2", "unet")
    return tuple(name for name in known if getattr(target, name, None) is not None)


class LoraFile(NamedTuple):
    """Where the adapters of a component lie in an export, and how diffusers is told so."""

    name: str
    prefix: str
    options: dict[str, Any]
    """Arguments of `load_lora_weights` besides the name of the file."""


def lora_file(model: Any, component: str, name: str = LORA_WEIGHTS) -> LoraFile:
    """The file of a component's adapters: experts after the first have one each, with the first one's key names."""
    first, *others = components_of(model)
    if component == first:
        return LoraFile(name, first, {})
    numbered = name.replace(".", f"_{others.index(component) + 2}.")
    return LoraFile(numbered, first, {f"load_into_{component}": True})


# ------------------------------------------------------------------------------------------------ writing


class Example(NamedTuple):
    """A sample that the code in the README draws again."""

    prompt: str
    latents: Tensor
    """Its noise, as the pipeline's call takes it, [1,...]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """What is to be written: a model, which of its components learnt, and how it is to be called."""

    model: Any
    parts: Mapping[str, Any]
    """The components by their names in the pipeline, with the adapter `ADAPTER` where `lora`."""
    lora: bool
    guidance: float
    inference: Mapping[str, Any]
    """Arguments of the pipeline's call, over those of the model."""
    example: Example | None = None


def write(learnt: Learnt, folder: Path, form: Format = "diffusers") -> None:
    """Writes one format into a folder, with `inference.json` and a README; ModelError where the format cannot be."""
    _check(learnt, form)
    folder.mkdir(parents=True, exist_ok=True)
    told = _WRITERS[form](learnt, folder)
    if learnt.example is not None:
        _save_noise(learnt.example, folder)
    (folder / INFERENCE).write_text(json.dumps(_arguments(learnt), indent=2) + "\n")
    # A model that no pipeline of diffusers can walk says itself how it is used.
    readme = getattr(learnt.model, "readme", None)
    (folder / "README.md").write_text(told if readme is None else readme(folder.name, learnt.lora))
    share(folder)


def share(folder: Path) -> None:
    """Gives an export's weights the permissions of `inference.json`: safetensors' files are for their owner alone."""
    mode = stat.S_IMODE((folder / INFERENCE).stat().st_mode)
    for pattern in ("*.safetensors", "*/*.safetensors"):
        for file in folder.glob(pattern):
            file.chmod(mode)


def _save_noise(example: Example, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latents": _plain(example.latents)}, folder / NOISE)


def _check(learnt: Learnt, form: Format) -> None:
    """ModelError for a format that this model, or what was trained of it, does not have."""
    if form != "diffusers" and hasattr(learnt.model, "readme"):
        raise ModelError(
            f"format {form}: no pipeline of diffusers draws with {learnt.model.path!r} as it was trained, so that only "
            "flowrl reads its weights back. Take format diffusers."
        )
    if form in ("peft", "comfyui") and not learnt.lora:
        raise ModelError(
            f"format {form} is for LoRA adapters, and here all weights were trained. Take format diffusers (the "
            "component) or merged (the whole pipeline)."
        )
    if form == "comfyui":
        for part in learnt.parts.values():
            comfyui.layout_of(part)


def _arguments(learnt: Learnt) -> dict[str, Any]:
    call: dict[str, Any] = learnt.model.arguments(guidance=learnt.guidance, **learnt.inference)
    return call


def _write_diffusers(learnt: Learnt, folder: Path) -> str:
    if not learnt.lora:
        for name, part in learnt.parts.items():
            save_component(part, folder / name)
        return _readme(learnt, folder, _with_components(learnt, folder))
    lines = []
    for name, part in learnt.parts.items():
        file = lora_file(learnt.model, name)
        _save_lora(part, file.prefix, folder / file.name)
        lines.append(_loading(learnt.model, name, file, folder))
    return _readme(learnt, folder, [*_base(learnt), *lines])


def _write_peft(learnt: Learnt, folder: Path) -> str:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    lines = ["from peft import PeftModel", *_base(learnt)]
    for name, part in learnt.parts.items():
        target = folder / name if len(learnt.parts) > 1 else folder
        target.mkdir(exist_ok=True)
        found = get_peft_model_state_dict(part, adapter_name=ADAPTER)
        stored = {f"base_model.model.{key}": _plain(tensor) for key, tensor in found.items()}
        save_file(stored, target / "adapter_model.safetensors", {"format": "pt"})
        config = copy.copy(part.peft_config[ADAPTER])
        config.inference_mode = True
        config.save_pretrained(target)
        where = f"{folder.name}/{name}" if len(learnt.parts) > 1 else folder.name
        lines.append(f'PeftModel.from_pretrained(pipe.{name}, "{where}")  # puts the adapter into it')
    return _readme(learnt, folder, lines)


def _write_comfyui(learnt: Learnt, folder: Path) -> str:
    from safetensors.torch import save_file

    lines, files, importer = _base(learnt), [], True
    for name, part in learnt.parts.items():
        file = lora_file(learnt.model, name, COMFYUI_WEIGHTS)
        stored = comfyui.tensors(part, _factors(part), ADAPTER)
        save_file({key: _plain(tensor) for key, tensor in stored.items()}, folder / file.name, {"format": "pt"})
        lines.append(_loading(learnt.model, name, file, folder))
        files.append(file.name)
        importer &= comfyui.layout_of(part).importer
    text = (
        f"Put {' and '.join(files)} into the folder models/loras of ComfyUI, and load with LoraLoaderModelOnly at "
        "strength 1: alpha is kept in the file."
    )
    if len(files) > 1:
        text += " The first file belongs to the expert at high noise, the second to that at low noise."
    if not importer:
        return _page(learnt, f"{text}\n\nFor diffusers export once more: `flowrl export RUN --format diffusers`.\n")
    return _readme(learnt, folder, lines, text)


def _write_merged(learnt: Learnt, folder: Path) -> str:
    """Note: a network in bf16 gets its sum with the adapter rounded to bf16; diffusers' `fuse_lora` does the same."""
    pipe = learnt.model.pipeline_with(learnt.guidance)
    try:
        for name, part in learnt.parts.items():
            setattr(pipe, name, _merged(part) if learnt.lora else part)
        pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        for name, part in learnt.parts.items():
            setattr(pipe, name, part)
    for config in (folder / INDEX, *folder.glob("*/*config.json")):
        _without_origin(config)
    kind = type(pipe).__name__
    load = f'pipe = {kind}.from_pretrained("{folder.name}", dtype={learnt.model.dtype}{_absent(pipe)})'
    return _readme(learnt, folder, [f"from diffusers import {kind}", load], whole=True)


_WRITERS: dict[Format, Callable[[Learnt, Path], str]] = {
    "diffusers": _write_diffusers,
    "peft": _write_peft,
    "comfyui": _write_comfyui,
    "merged": _write_merged,
}


def _merged(part: Any) -> Any:
    """A copy on the CPU with the adapter added to the weights, and without it; the part itself trains on."""
    made = copy.deepcopy(part).to("cpu")
    made.fuse_lora(safe_fusing=True, adapter_names=[ADAPTER])
    made.unload_lora()
    return made


def _save_lora(module: Any, prefix: str, file: Path) -> None:
    """Adapters and their configuration, without which diffusers takes alpha to be the rank and loses the scale.

    The layout is that of diffusers' `save_lora_weights`, which not every pipeline has.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    config = {f"{prefix}.{key}": value for key, value in module.peft_config[ADAPTER].to_dict().items()}
    metadata = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets, in an order that is always the same
    stored = {f"{prefix}.{key}": _plain(tensor) for key, tensor in found.items()}
    save_file(stored, file, {"format": "pt", _METADATA: metadata})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _factors(module: Any) -> dict[str, comfyui.Factors]:
    """The factors of each adapted layer, by its name in diffusers."""
    from peft.utils import get_peft_model_state_dict

    found = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    down = ".lora_A.weight"
    return {
        key.removesuffix(down): (_plain(found[key]), _plain(found[key.removesuffix(down) + ".lora_B.weight"]))
        for key in found
        if key.endswith(down)
    }


def save_component(module: Any, folder: Path) -> None:
    """Writes a diffusers module, without the path of the machine that it came from."""
    module.save_pretrained(folder, safe_serialization=True)
    _without_origin(folder / "config.json")


def _without_origin(config: Path) -> None:
    """Takes the path of the machine that trained out of a configuration."""
    content = json.loads(config.read_text())
    origins = [name for name in ("_name_or_path", "name_or_path") if content.pop(name, None) is not None]
    if origins:
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------ the README


def _base(learnt: Learnt) -> list[str]:
    """Code that loads the base model as `pipe`."""
    kind = type(learnt.model.pipe).__name__
    return [f"from diffusers import {kind}", _from_base(learnt, "")]


def _with_components(learnt: Learnt, folder: Path) -> list[str]:
    """Code that loads the base model as `pipe` with trained components in place of its own."""
    dtype = learnt.model.dtype
    kinds = {name: type(part).__name__ for name, part in learnt.parts.items()}
    return [
        f"from diffusers import {', '.join(sorted({*kinds.values(), type(learnt.model.pipe).__name__}))}",
        *(
            f'{name} = {kind}.from_pretrained("{folder.name}/{name}", dtype={dtype})' for name, kind in kinds.items()
        ),
        _from_base(learnt, "".join(f"{name}={name}, " for name in kinds)),
    ]  # fmt: skip


def _from_base(learnt: Learnt, given: str) -> str:
    model = learnt.model
    base = f'resolve("{model.path}")' if _only_here(model) else f'"{model.path}"'
    kind = type(model.pipe).__name__
    return f"pipe = {kind}.from_pretrained({base}, {given}dtype={model.dtype}{_absent(model.pipe)})"


def _only_here(model: Any) -> bool:
    """Whether only flowrl can turn the model's name into a folder."""
    return model.path in BUILT_IN or model.path.startswith(tiny.PREFIX)


def _absent(pipe: Any) -> str:
    """diffusers reloads a pipeline that has no T5, say, only where it is told so."""
    return "".join(
        f", {name}=None"
        for name, value in pipe.components.items()
        if value is None and name not in pipe._optional_components
    )


def _loading(model: Any, component: str, file: LoraFile, folder: Path) -> str:
    """Code that puts a LoRA file into a component of `pipe`."""
    if not hasattr(model.pipe, "load_lora_weights"):
        return f'pipe.{component}.load_lora_adapter("{folder.name}", prefix="{file.prefix}", weight_name="{file.name}")'
    given = "".join(f", {name}={value}" for name, value in file.options.items())
    return f'pipe.load_lora_weights("{folder.name}", weight_name="{file.name}"{given})'


def _readme(learnt: Learnt, folder: Path, load: list[str], text: str = "", whole: bool = False) -> str:
    """The page with code that draws; `whole` = the folder has a pipeline of its own."""
    model = learnt.model
    head = ["import json, torch"]
    if _only_here(model) and not whole:
        head.append("from flowrl.models import resolve")
    draw = [f'settings = json.load(open("{folder.name}/{INFERENCE}"))  # guidance, size and steps of the training']
    if model.guidance_argument not in _arguments(learnt) and learnt.guidance > 1 and not whole:
        draw.append(f"pipe.guider = pipe.guider.new(guidance_scale={learnt.guidance}, enabled=True)")
    if model.num_sources[0]:
        draw.append("from diffusers.utils import load_image")
    if learnt.example is not None:
        draw += [
            "from safetensors.torch import load_file",
            f'latents = load_file("{folder.name}/{NOISE}")["latents"]  # of the first sample of an evaluation',
        ]
    code = "\n".join([*head, *load, *draw, *_drawing(model, learnt.example)])
    use = "To use it with diffusers, in the folder above this one:"
    return _page(learnt, f"{text}\n\n{use}\n\n```python\n{code}\n```\n".lstrip())


def _page(learnt: Learnt, body: str) -> str:
    title = f"{'LoRA' if learnt.lora else 'Weights'} for {learnt.model.path}"
    return f"# {title}\n\nTrained with flowrl. {body}"


def _drawing(model: Any, example: Example | None) -> list[str]:
    """Code that draws with `pipe`: the example again, or a prompt of one's own."""
    source = 'image=load_image("source.png"), ' if model.num_sources[0] else ""
    prompt, noise = ("your prompt", "") if example is None else (example.prompt, "latents=latents, ")
    draw = f"pipe(prompt={json.dumps(prompt)}, {source}{noise}generator=torch.manual_seed(0), **settings)"
    if not model.video:
        return [f'{draw}.images[0].save("image.png")']
    return [
        "from diffusers.utils import export_to_video",
        f'export_to_video({draw}.frames[0], "video.mp4", fps={round(model.fps or 8)})',
    ]


# ------------------------------------------------------------------------------------------------ reading


def exported_weights(folder: str | Path) -> Path:
    """The folder of the exported weights at `folder`: a run that has ended, its `weights`, or any export.

    ModelError where there are none.
    """
    source = Path(folder).expanduser()
    for candidate in (source / "weights", source):
        if (candidate / INFERENCE).is_file() or is_lora(candidate):
            return candidate
    reason = "has no exported weights" if source.is_dir() else "is no folder"
    raise ModelError(
        f"weights {str(folder)!r}: {source.absolute()} {reason}. Give the output_dir of a run that has ended, or what "
        "an export wrote (flowrl export RUN --output FOLDER)."
    )


def is_lora(folder: Path) -> bool:
    """Whether an export is of adapters, in diffusers' format."""
    return (folder / LORA_WEIGHTS).is_file()


def check_readable(folder: Path, component: str) -> None:
    """ModelError unless a folder is an export that can be read back: of the format diffusers or merged."""
    if not is_lora(folder) and not (folder / component).is_dir():
        raise ModelError(
            f"weights {str(folder)!r}: neither {LORA_WEIGHTS} nor a folder {component}/ in it. "
            "Give the folder that an export of format diffusers or merged wrote, e.g. runs/<name>/weights."
        )


def load_lora(target: Any, folder: Path) -> None:
    """Adapters of an export into a model or a diffusers pipeline, as one more adapter that does not learn."""
    pipe = getattr(target, "pipe", target)
    for component in components_of(target):
        file, part = lora_file(target, component), getattr(pipe, component)
        _check_layers(folder / file.name, file.prefix, part)
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(folder), weight_name=file.name, **file.options)
        else:
            part.load_lora_adapter(str(folder), prefix=file.prefix, weight_name=file.name, use_safetensors=True)
        part.requires_grad_(False)


def load_components(target: Any, folder: Path) -> None:
    """A full export's values into the components of a model or a diffusers pipeline; ModelError if they do not fit."""
    pipe = getattr(target, "pipe", target)
    for component in components_of(target):
        module = getattr(pipe, component)
        source = folder / component
        stored = type(module).from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        try:
            module.load_state_dict(stored.state_dict())
        except RuntimeError as error:
            raise ModelError(f"weights {str(source)!r} do not fit the model: {error}") from error


def read_lora(model: Any, parts: Mapping[str, Any], folder: Path, alpha: float) -> dict[str, Tensor]:
    """The values of an export's adapters by the names of the trained parameters; ModelError for another alpha."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for component in parts:
        file = lora_file(model, component)
        prefix, place = f"{file.prefix}.", f"{component}." if len(parts) > 1 else ""
        with safe_open(str(folder / file.name), framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get(_METADATA, "{}"))
            for key in stored.keys():
                found[place + with_adapter(key.removeprefix(prefix))] = stored.get_tensor(key)
        own = metadata.get(f"{prefix}lora_alpha")
        if own is not None and own != alpha:
            raise ModelError(
                f"weights {str(folder / file.name)!r} have lora alpha {own}, the policy {alpha}: make them equal."
            )
    return found


def with_adapter(name: str) -> str:
    """`a.lora_A.weight`, as it is stored, to `a.lora_A.default.weight`, as the parameter is called."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ADAPTER}.{last}"


# ------------------------------------------------------------------------------------------------ reading teachers


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter by its name."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def load_copy(kind: Any, folder: Path, dtype: torch.dtype, wanted: Mapping[str, torch.Size]) -> torch.nn.Module:
    """A frozen module of the class `kind` from a full export; ModelError unless its parameters have these shapes."""
    try:
        module: torch.nn.Module = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"teacher {str(folder)!r} could not be read: {error}") from error
    _check_fit(folder, shapes_of(module), wanted)
    return module.requires_grad_(False).eval()


def load_adapter(module: Any, component: str, file: Path, adapter: str) -> None:
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
    _check_fit(file, asked, {name: tensor.shape for name, tensor in found.items()})


def _check_layers(file: Path, prefix: str, part: Any) -> None:
    """ModelError unless every adapter of a file has its layer in a component: diffusers would leave out the others."""
    from safetensors import safe_open

    layers = dict(part.named_modules())
    with safe_open(str(file), framework="pt") as stored:
        found = {key: torch.Size(stored.get_slice(key).get_shape()) for key in stored.keys()}
    wrong = [key for key, shape in found.items() if not _has_layer(layers, key.removeprefix(f"{prefix}."), shape)]
    if wrong or not found:
        example = (
            f"{len(wrong)} of {len(found)} tensors have no such layer, e.g. {wrong[0]}" if wrong else "it is empty"
        )
        raise ModelError(f"weights {str(file)!r}: the adapter {_UNFIT} ({example})")


def _has_layer(layers: Mapping[str, Any], name: str, shape: torch.Size) -> bool:
    """Whether the layer of an adapter's factor is there, and as wide: the columns of A, the rows of B."""
    path, _, factor = name.rpartition(".lora_")
    weight = getattr(getattr(layers.get(path), "base_layer", layers.get(path)), "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return weight is not None
    return bool(weight.shape[1] == shape[1] if factor.startswith("A") else weight.shape[0] == shape[0])


def _check_fit(source: Path, stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    wrong = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if wrong or not stored:
        example = f"{len(wrong)} tensors differ in name or shape, e.g. {wrong[0]}" if wrong else "it has no tensors"
        raise ModelError(f"teacher {str(source)!r} {_UNFIT} ({example})")
