"""Where a reward's weights are: a path of yours, or the hub's cache; and how they are read without running any code.

    Weights("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors"))     files of a hub repository
    found = weights.at(source, revision).folder("pickscore")                        the folder that has them all

A `source` that exists on the disk is taken as it is. Anything else is a hub id `owner/name`, looked for in the cache
first; HF_HUB_OFFLINE=1 keeps it at that. What is not there is an error that names the file and the command.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from torch import Tensor

from rewards.types import RewardError

Model = TypeVar("Model")

READING = Lock()
"""Held while transformers makes a network: it exchanges functions of its own meanwhile, for all threads."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Files that belong together: a folder, one file, or a repository of the hub."""

    source: str
    """Folder, file, or hub id."""
    names: tuple[str, ...] = ()
    """Files of it, by paths within; () = whatever is needed is asked for by `pretrained`."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""

    def at(self, source: str | None, revision: str | None = None) -> Weights:
        """The same files at another place; None leaves it where it is."""
        return replace(self, source=source or self.source, revision=revision or self.revision)

    @property
    def local(self) -> Path | None:
        """The path, where `source` is one."""
        path = Path(self.source).expanduser()
        return path if path.exists() else None

    @property
    def is_path(self) -> bool:
        """Whether `source` can only be a path: no hub id begins or looks like that."""
        return self.source.startswith((".", "/", "~")) or self.source.count("/") > 1

    @property
    def command(self) -> str:
        """What fetches it."""
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {' '.join([self.source, *self.names])}{revision}"

    def is_here(self) -> bool:
        """Whether all of it is on the disk already, as far as `names` tell; asks no network."""
        names = self.names or ("config.json",)
        if self.local is not None:
            return all(self._found(name) for name in names)
        if self.is_path:
            return False
        from huggingface_hub import try_to_load_from_cache

        return all(isinstance(try_to_load_from_cache(self.source, name, revision=self.revision), str) for name in names)

    def file(self, reward: str, name: str | None = None) -> Path:
        """One file (by default the first of `names`), fetched if that is allowed; RewardError names what is missing."""
        name = name or self.names[0]
        if self.local is not None:
            path = self._found(name)
            if path is not None:
                return path
            lacks = "has no" if self.local.is_dir() else "is a file, and around it there is no"
            raise RewardError(f"reward {reward!r}: {self.local} {lacks} {name}. {self._mend(name)}")
        self._refuse_lost_path(reward)
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.source, name, revision=self.revision))
        except Exception as error:  # offline, no such repository, no access, no such file: all end the same way
            raise RewardError(
                f"reward {reward!r}: {name} of {self.source!r} cannot be had. {self._mend(name)}"
            ) from error

    def _found(self, name: str) -> Path | None:
        """The file `name` of a `source` on the disk; None if it is not there.

        A `source` that is a file is the one of `names` that is called like it, or else the first, under a name of the
        user's; the others are looked for beside it, and as far above as it lies deep in the repository.
        """
        local = self.local
        if local is None:
            return None
        folders = [local]
        if local.is_file():
            own = next((each for each in self.names if Path(each).name == local.name), (*self.names, name)[0])
            if name == own:
                return local
            folders = list(local.absolute().parents[: len(Path(own).parts)])
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def _mend(self, name: str) -> str:
        return f"Fetch it where there is a network (`{self.command}`), or give the path of your copy of {name}."

    def _refuse_lost_path(self, reward: str) -> None:
        if self.is_path and self.local is None:
            raise RewardError(
                f"reward {reward!r}: {self.source} does not exist; give the path of your copy, or a hub id."
            )

    def pretrained(self, reward: str, load: Callable[..., Model], **options: Any) -> Model:
        """`load(source, revision=..., **options)`, a `from_pretrained`, with errors that say what to do."""
        self._refuse_lost_path(reward)
        try:
            return load(str(self.local or self.source), revision=self.revision, **options)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RewardError(
                f"reward {reward!r}: {self.source!r} cannot be loaded: {first} "
                f"Mend: fetch it where there is a network (`{self.command}`), or give the folder of your copy."
            ) from error

    def network(self, reward: str, kind: Any, dtype: torch.dtype, unused: str | None = None) -> Any:
        """A transformers model of the class `kind` from safetensors: frozen, eval, on the CPU, its weights in `dtype`.

        RewardError if the files lack some of its weights: transformers draws those at random, and such a network
        scores without a word. Weights that match the pattern `unused` may be lacking, and are NaN then.
        """
        with READING:
            model, report = self.pretrained(
                reward, kind.from_pretrained, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        spared = {name for name in report["missing_keys"] if unused and re.match(unused, name)}
        for name in spared:
            model.get_parameter(name).data.fill_(float("nan"))
        lacking = sorted(report["missing_keys"] - spared)
        if lacking:
            raise RewardError(
                f"reward {reward!r}: {self.source!r} is no checkpoint of {type(model).__name__}: it lacks "
                f"{len(lacking)} weights ({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}). "
                "Mend: give a model of the kind that the reward's card names (`flowrl reward info`)."
            )
        return in_precision(model, dtype).requires_grad_(False).eval()


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A transformers model that was read in fp32 with its weights in `dtype`, as `from_pretrained` would have them.

    It is not asked for that itself: while it reads, `dtype` is the default of the whole process, and other threads get
    it too. The price is memory: the weights are fp32 for a moment. What a model keeps in fp32 stays so, and so do
    buffers that are made and not read, such as frequencies of rotary positions.
    """
    plan = getattr(model, "_get_dtype_plan", None)  # private to transformers, which has no public name for it
    names = plan(dtype) if plan else getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in names]
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_floating_point() and not any(pattern.search(name) for pattern in kept):
            weight.data = weight.data.to(dtype)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file, or of a .pt / .pth / .bin one, from which only tensors load.

    A checkpoint that keeps its weights under "state_dict", "model" or "module" is unwrapped.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))  # torch < 1.6 wrote none
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, not tensors by name")
    except Exception as error:
        raise RewardError(
            f"{path} is no checkpoint of tensors alone ({type(error).__name__}): it is damaged, of an old format, or "
            "asks for code to run, which is refused. Mend: fetch it again, or convert it to .safetensors."
        ) from error
    for key in ("state_dict", "model", "module"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def fill(module: torch.nn.Module, tensors: dict[str, Tensor], reward: str, where: object) -> None:
    """Load `tensors` into a module that must get all it has and nothing else; RewardError lists the difference."""
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise RewardError(f"reward {reward!r}: the weights in {where} are not of this network: {error}") from error
    if missing or unexpected:
        told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
        raise RewardError(
            f"reward {reward!r}: the weights in {where} are not of this network: {' and '.join(told)}. "
            "Mend: give the file that the reward's card names (`flowrl reward info`)."
        )
