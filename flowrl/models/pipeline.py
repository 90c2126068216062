"""What the families share: finding and loading a diffusers pipeline, frozen, and its recommended settings.

A model is named by the built-in name `shapes`, by a local folder in diffusers format, or by a hub id; a path is the
only difference between them. diffusers is imported when a pipeline is loaded, never when this module is.
"""

from __future__ import annotations

import importlib.resources
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl import resolve as names
from flowrl import tiny
from flowrl.types import Model

BUILT_IN = {"shapes": "flowrl.shapes/weights", "shapes_video": "flowrl.shapes/weights_video"}
"""Names of the models that lie inside this package, and the package/folder that each is in."""

FAMILIES = "flowrl.models"
INDEX = "model_index.json"
INFERENCE = "inference.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class ModelError(ValueError):
    """A model that cannot be had or used as asked, with the reason and the way out."""


def resolve(path: str | Path) -> str:
    """The local folder or hub id that `path` stands for; a ModelError where it can be neither.

    Example: resolve("shapes") is the folder of the built-in weights, resolve("owner/name") the hub id itself.
    """
    name = str(path)
    return _tiny(name) if name.startswith(tiny.PREFIX) else folder_or_id(name, BUILT_IN, INDEX, _advice)


def folder_or_id(name: str, built_in: Mapping[str, str], index: str, advice: Callable[[Path], str]) -> str:
    """The folder with the file `index`, or the hub id, that a name stands for; a ModelError where it can be neither.

    `built_in` are names of models inside this package; `advice` says what is to be done about a folder without `index`.
    """
    folder = Path(name)
    if name in built_in:
        package, _, inside = built_in[name].partition("/")
        folder = Path(str(importlib.resources.files(package) / inside))
    folder = folder.expanduser()
    if (folder / index).is_file():
        return str(folder)
    if name in built_in:
        raise ModelError(
            f"model {name!r}: its weights are missing from this installation (no {index} in {folder}). "
            "They come with the package: reinstall flowrl, or fetch the data files of this checkout."
        )
    if folder.is_dir():
        raise ModelError(f"model {name!r}: the folder has no {index}. {advice(folder)}")
    if _HUB_ID.fullmatch(name):
        return name
    raise ModelError(
        f"model {name!r}: there is no such folder, and a hub id has the form owner/name. "
        f"Check the spelling; built-in models: {', '.join(built_in)}."
    )


def _tiny(name: str) -> str:
    wanted, known = name.removeprefix(tiny.PREFIX), tiny.names()
    if wanted not in known:
        raise ModelError(
            f"model {name!r}: there is no such tiny pipeline{names.nearest(wanted, known)}. "
            f"There are: {', '.join(tiny.PREFIX + each for each in known)}."
        )
    return str(tiny.folder(wanted))


def families() -> dict[str, tuple[str, ...]]:
    """The diffusers pipelines that each family serves, by the family's name: the `pipelines` of its class."""
    found = {name: getattr(names.resolve(name, FAMILIES), "pipelines", ()) for name in names.available(FAMILIES)}
    return {name: pipelines for name, pipelines in found.items() if pipelines}


def family_of(path: str | Path) -> str:
    """The family of the model at `path`, from the pipeline class that its model_index.json names."""
    pipeline = (read_json(resolve(path), INDEX) or {}).get("_class_name")
    known = families()
    for name, pipelines in known.items():
        if pipeline in pipelines:
            return name
    listed = ", ".join(f"{name} ({', '.join(pipelines)})" for name, pipelines in known.items())
    raise ModelError(
        f"model {str(path)!r} is a {pipeline}, which no family of flowrl serves; there are: {listed}. "
        "A family is one file: set model.family to ./file.py:Class, or to a family above if only the name is new."
    )


def load(
    path: str | Path,
    *,
    family: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    inference: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """The model at `path`, frozen and on `device`; `options` go to the constructor of its family's class.

    `inference` are arguments of the pipeline's call, over those that the model's folder recommends.
    `dtype` is that of text encoders and transformer; the VAE stays float32. `family` is a file of this folder, or
    package.module:Class, or ./file.py:Class; None reads it from the model's files. `loading` are further arguments of
    diffusers' `from_pretrained`, such as those of `flowrl.memory.loading_options`.
    Example: load("shapes") or load("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16, device="cuda").
    """
    make = names.resolve(family or family_of(path), FAMILIES)
    pipe = load_pipeline(path, device=device, dtype=dtype, loading=loading)
    model: Model = make(pipe, path=str(path), inference=read_inference(path, pipe, inference), **options)
    return model


def load_pipeline(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    loading: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The diffusers pipeline at `path` in evaluation mode, every weight frozen and no progress bars.

    Note: the VAE is float32 whatever `dtype` is, as in Flow-GRPO's scripts: it is small, and its picture is judged.
    """
    source = resolve(path)
    with _errors(source):
        from diffusers import DiffusionPipeline

        dtypes = {"default": dtype, "vae": torch.float32}
        index = read_json(source, INDEX) or {}
        _check_parts(source, index)
        absent = dict.fromkeys(_absent_parts(index))
        with _quiet() if str(path) in BUILT_IN or str(path).startswith(tiny.PREFIX) else nullcontext():
            # Never a .bin, which is a pickle: a model without safetensors is refused.
            pipe: Any = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                source, dtype=dtypes, use_safetensors=True, **absent, **(loading or {})
            )
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sketch_pipeline(path: str | Path) -> Any:
    """The pipeline at `path` without a single weight: its networks have shapes (torch's meta device), and no storage.

    Only configuration files and tokenizers are read, or fetched: a few megabytes of a model of any size.
    """
    import importlib

    from accelerate import init_empty_weights

    source = resolve(path)
    index = read_json(source, INDEX) or {}
    with _errors(source):
        import diffusers

        kind = getattr(diffusers, index["_class_name"])
        parts = {}
        for name, (library, class_name) in ((n, v) for n, v in index.items() if isinstance(v, list) and len(v) == 2):
            if library is None:
                parts[name] = None
                continue
            module = diffusers if library == kind.__module__.split(".")[-2] else importlib.import_module(library)
            make = getattr(module, class_name)
            if not issubclass(make, torch.nn.Module):
                parts[name] = make.from_pretrained(source, subfolder=name)
                continue
            with init_empty_weights(include_buffers=True):
                if hasattr(make, "load_config"):
                    parts[name] = make.from_config(make.load_config(source, subfolder=name))
                else:
                    parts[name] = make(make.config_class.from_pretrained(source, subfolder=name))
        settings = {n: v for n, v in index.items() if not n.startswith("_") and not isinstance(v, list)}
        pipe = kind(**parts, **settings)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def read_inference(path: str | Path, pipe: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a model's or an export's folder recommends: `inference.json` holds arguments of the call.

    Those `given` come first. ModelError for a name that the call does not have.

    Example: {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 0}; without the file, {}.
    """
    folder = Path(path).expanduser()  # an exported folder is no model, but has this file
    source = str(folder) if (folder / INFERENCE).is_file() else resolve(path)
    inference = {**(read_json(source, INFERENCE, required=False) or {}), **(given or {})}
    unknown = set(inference) - set(inspect.signature(type(pipe).__call__).parameters)
    if unknown:
        raise ModelError(
            f"model {str(path)!r}: {INFERENCE} (or model.inference) has {', '.join(sorted(unknown))}, which the call "
            f"of {type(pipe).__name__} does not take. Remove or rename it: they are passed to that call as they are."
        )
    return inference


def first_given(names: tuple[str, ...], *sources: Mapping[str, Any]) -> dict[str, Any]:
    """For each name the first value in `sources` that is there and not None; names without one are left out."""
    found = {name: [s[name] for s in sources if s.get(name) is not None] for name in names}
    return {name: values[0] for name, values in found.items() if values}


def chunked(function: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """`function` over slices of at most `size` samples of x [N, ...], put together again; None is all at once."""
    if size is None or len(x) <= size:
        return function(x)
    return torch.cat([function(part) for part in torch.split(x, size)])


def read_json(source: str, name: str, required: bool = True) -> dict[str, Any] | None:
    """A JSON file of a resolved folder or hub id; None where it is absent and not required."""
    folder = Path(source)
    file = folder / name if folder.is_dir() else _hub_file(source, name, required)
    if file is None or (not required and not file.is_file()):
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"model {source!r}: {name} is not valid JSON ({error}).") from error
    return content


def _hub_file(source: str, name: str, required: bool) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with _errors(source):
        try:
            return Path(hf_hub_download(source, name))
        except EntryNotFoundError:  # also what the cache answers without a network
            if required:
                raise
            return None


@contextmanager
def _errors(source: str) -> Iterator[None]:
    """Turns what the hub and the file system answer into what, why and how to go on."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise ModelError(
            f"model {source!r} is gated: its authors ask for consent. Accept the terms at "
            f"https://huggingface.co/{source}, then run `hf auth login`; or give the folder of a local copy."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"model {source!r} was not found: no such folder here, and nothing that this account may see at "
            f"https://huggingface.co/{source}. Check the spelling, or run `hf auth login` if it is private."
        ) from error
    except (hub.LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelError(
            f"model {source!r}: no such folder here, not in the local cache, and the hub could not be reached. Fetch "
            f"it where there is a network (`hf download {source}`), give a local folder, or try the built-in 'shapes'."
        ) from error
    except hub.EntryNotFoundError as error:
        raise ModelError(
            f"model {source!r}: its repository is not in diffusers format ({error}). "
            "Look for its diffusers version, whose files include model_index.json."
        ) from error
    except OSError as error:
        raise ModelError(
            f"model {source!r} could not be read: {error} "
            "Where files are missing, fetch it again (`hf download`), or give the folder of a complete copy."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and warnings while the built-in model loads: its files are known, and its users may be beginners."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    bars = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    verbosity = diffusers_log.get_verbosity()
    diffusers_log.set_verbosity_error()
    for log in bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_log.set_verbosity(verbosity)
        for log in bars:
            log.enable_progress_bar()


def _check_parts(source: str, index: Mapping[str, Any]) -> None:
    """Refuse a local folder that lacks a part which its index names."""
    folder = Path(source)
    named = {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    absent = [f"{name}/ ({value[1]})" for name, value in named.items() if not (folder / name).is_dir()]
    if folder.is_dir() and absent:
        raise ModelError(
            f"model {source!r} lacks {', '.join(absent)}, which its {INDEX} names. Fetch it again (`hf download`), or "
            "give the folder of a complete copy."
        )


def _absent_parts(index: Mapping[str, Any]) -> list[str]:
    """Parts that were saved as None; diffusers 0.42 reloads a pipeline without one only if it is told so again."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is None]


def _advice(folder: Path) -> str:
    if (folder / LORA_WEIGHTS).is_file() or (folder / "transformer").is_dir():
        return "It looks like exported weights: load their base model, then flowrl.policy.load_weights(model, folder)."
    return "A diffusers pipeline folder is needed, as save_pretrained writes it; a single checkpoint file is not one."
