"""Checkpoints that are complete or absent, and never run code.

    checkpoints/000120/state.safetensors     the tensors
    checkpoints/000120/manifest.json         iteration, meta, name + size + sha256 of every file, sha256 of itself

A checkpoint is written into a temporary folder, synced to disk, and renamed: at whatever instant the process is killed,
a reader finds whole checkpoints only. Nothing is ever unpickled. The hashes tell damage, not forgery: whoever can write
the folder can write matching hashes, and gets tensors and numbers into the run, but no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.faults import fault

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
MAX_MANIFEST_BYTES = 64 * 1024**2

_NUMBERED = re.compile(r"\d{6,}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """The state of a run after `iteration` iterations."""

    iteration: int
    tensors: dict[str, Tensor]
    """On the CPU, in the precision in which they were saved."""
    meta: dict[str, Any]
    path: Path


# ------------------------------------------------------------------------------------------------ writing


def save(
    folder: str | Path, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 3
) -> Path:
    """Write `folder/<iteration>` and, once it is complete, remove all but the newest `keep`.

    `meta` is anything that JSON can hold. Checkpoints of later iterations are removed as well: they belong to a
    history that was left when the run was resumed before them.
    """
    folder = Path(folder)
    _refuse_unwritable(tensors, meta)
    temporary, final = folder / f"{_TEMPORARY}{iteration:06d}-{os.getpid()}", folder / f"{iteration:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        temporary.mkdir()
        save_file(_storable(tensors), temporary / STATE)
        fault("ckpt.after_tensors")
        _write_manifest(temporary, iteration, meta)
        for path in (temporary / STATE, temporary / MANIFEST, temporary):
            _sync(path)
        fault("ckpt.before_rename")
        if final.exists():
            final.rename(folder / f"{_REPLACED}{final.name}")
        temporary.rename(final)
        _sync(folder)
        fault("ckpt.after_rename")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {final}: {_reason(error)}. Earlier checkpoints are untouched. "
            "Free some space or mend the folder, and go on with --resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _purge(folder, iteration, keep)
    return final


def tidy(folder: str | Path) -> None:
    """Clear away what a killed writer left; only the run that holds the folder's lock may do that."""
    for path in _stranded(Path(folder)):
        path.rename(path.with_name(path.name.removeprefix(_REPLACED)))
    for path in [*Path(folder).glob(f"{_REPLACED}*"), *Path(folder).glob(f"{_TEMPORARY}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _refuse_unwritable(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise CheckpointError(
            f"refused to save values that are not finite (NaN or Inf) in {_some(bad)}; the last checkpoint is the last "
            "good state. Lower optimizer.lr, and go on from there with --resume."
        )
    try:
        json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata of a checkpoint must be plain JSON values: {error}") from error


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; those that share memory are copied, since safetensors refuses them."""
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        made[name] = tensor
    return made


def _write_manifest(folder: Path, iteration: int, meta: Mapping[str, Any]) -> None:
    file = folder / STATE
    record = {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {"format": FORMAT, "iteration": iteration, "files": [record], "meta": meta}
    manifest = json.loads(json.dumps(manifest))  # as a reader will see it: numbers as keys become text
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _own_hash(manifest)}))


def _own_hash(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _purge(folder: Path, iteration: int, keep: int) -> None:
    older = [path for path in entries(folder) if int(path.name) < iteration]
    newer = [path for path in entries(folder) if int(path.name) > iteration]
    replaced = list(folder.glob(f"{_REPLACED}*"))
    for path in [*older[: max(0, len(older) - keep + 1)], *newer, *replaced]:
        try:  # renamed first: a process killed half-way through must not leave half a checkpoint under its name
            doomed = path.rename(folder / f"{_TEMPORARY}purge-{path.name}")
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"could not remove the old checkpoint {path}: {_reason(error)}", stacklevel=3)


# ------------------------------------------------------------------------------------------------ reading


def entries(folder: str | Path) -> list[Path]:
    """The folders under the name of a checkpoint, oldest first, valid or not."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def load(path: str | Path) -> Checkpoint:
    """One checkpoint, after checking its names, sizes, hashes and values; CheckpointError says what is wrong."""
    path = Path(path)
    _check_kind(path, stat.S_ISDIR, "a folder")
    manifest = _read_manifest(path / MANIFEST)
    tensors: dict[str, Tensor] = {}
    for record in manifest["files"]:
        file = _checked_file(path, record)
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a safetensors file: {error}") from error
        bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if bad:
            raise CheckpointError(f"{file}: values that are not finite (NaN or Inf) in {_some(bad)}")
    return Checkpoint(manifest["iteration"], tensors, manifest["meta"], path)


def latest_valid(folder: str | Path, report: Callable[[str], None] | None = None) -> Checkpoint:
    """The newest valid checkpoint of a run; `report` (by default a warning) hears of each newer one that is damaged.

    Raises CheckpointError when there is none: to go on must never silently mean to start anew.
    """
    folder, damaged = Path(folder), []
    for path in reversed(sorted([*entries(folder), *_stranded(folder)], key=_number)):
        try:
            found = load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            text = f"skipped a damaged checkpoint: {problem}. Going on from {found.path}."
            report(text) if report else warnings.warn(text, stacklevel=2)
        return found
    if not damaged:
        raise CheckpointError(f"no checkpoint in {folder.absolute()}; start without --resume, or mend output_dir.")
    raise CheckpointError(
        f"no checkpoint in {folder.absolute()} is valid:\n  " + "\n  ".join(damaged) + "\n"
        "Restore one of them, or start anew in another output_dir."
    )


def _number(path: Path) -> int:
    return int(path.name.removeprefix(_REPLACED))


def _stranded(folder: Path) -> list[Path]:
    """Checkpoints that were moved away for a successor that never arrived."""
    replaced = [path for path in folder.glob(f"{_REPLACED}*") if _NUMBERED.fullmatch(path.name.removeprefix(_REPLACED))]
    return [path for path in replaced if not path.with_name(path.name.removeprefix(_REPLACED)).exists()]


def _read_manifest(file: Path) -> dict[str, Any]:
    _check_kind(file, stat.S_ISREG, "a file")
    size = file.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{file}: {size} bytes are no manifest")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: broken JSON ({error or 'nested too deeply'})") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{file}: not a manifest of flowrl")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest['format']!r}, but this version reads format {FORMAT}; update flowrl"
        )
    if manifest.get("sha256") != _own_hash(manifest):
        raise CheckpointError(f"{file}: its contents do not have the sha256 that it states; it was damaged or edited")
    shape = {"iteration": int, "files": list, "meta": dict}
    wrong = [key for key, kind in shape.items() if not isinstance(manifest.get(key), kind)]
    if wrong:
        raise CheckpointError(f"{file}: {', '.join(wrong)} is missing or of the wrong type")
    return manifest


def _checked_file(folder: Path, record: Any) -> Path:
    """The file of a manifest's record, if it is plainly inside the folder and has the size and hash of the record."""
    name = record.get("name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / MANIFEST}: {name!r} is not a name that a checkpoint's file may have")
    file = folder / name
    _check_kind(file, stat.S_ISREG, "a file")
    size = file.stat().st_size
    if size != record.get("bytes"):
        raise CheckpointError(f"{file}: {size} bytes instead of {record.get('bytes')}; it was cut short or changed")
    if _sha256(file) != record.get("sha256"):
        raise CheckpointError(f"{file}: its sha256 is not that of the manifest; it was damaged or changed")
    return file


def _check_kind(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: missing ({_reason(error)})") from error
    if not is_kind(mode):
        raise CheckpointError(f"{path}: {'a symbolic link' if stat.S_ISLNK(mode) else 'something else'}, not {kind}")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk confirm that it holds a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """An error with its number, also where safetensors hides the number in its text."""
    number = error.errno if isinstance(error, OSError) else None
    hidden = re.search(r"os error (\d+)", str(error))
    number = int(hidden[1]) if number is None and hidden else number
    return str(error) if number is None else f"{os.strerror(number)} (errno {number})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------ optimizer state


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors with flat names, and the rest of it as JSON values."""
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(optimizer.state_dict(), "", tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Put a flattened state back, bit for bit; the parameters must be those it was taken from, in the same order."""
    state = _unflatten(meta, tensors)
    saved = [len(group["params"]) for group in state["param_groups"]]
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if saved != mine:
        raise CheckpointError(
            f"the optimizer state is for {saved} parameters (one number a group), this run has {mine}"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != params[index].shape:
                shapes = f"{list(value.shape)}, the parameter {list(params[index].shape)}"
                raise CheckpointError(f"the optimizer state {name} of parameter {index} has shape {shapes}")
    optimizer.load_state_dict(state)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values in which a tensor is its name, and what JSON would change is spelt out."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        pairs = [[key, _flatten(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$pairs": pairs}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{index}".lstrip("."), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{name}: a {type(value).__name__} cannot be saved without pickle")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "$tensor" in value:
        if value["$tensor"] not in tensors:
            raise CheckpointError(f"the tensor {value['$tensor']} of the optimizer state is missing")
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unflatten(item, tensors) for item in value["$tuple"])
    if "$pairs" in value:
        return {key: _unflatten(item, tensors) for key, item in value["$pairs"]}
    return {key: _unflatten(item, tensors) for key, item in value.items()}


# ------------------------------------------------------------------------------------------------ one run a folder


class RunLock:
    """The right to write into an output folder, held from construction to `release` or the end of the process.

    The kernel's lock on `run.lock` decides on one machine: it goes with its process, however that dies, so a lock file
    of a dead run is taken over. Between machines that share the folder, what stands in the file decides.
    """

    def __init__(self, folder: str | Path, resume: bool = True) -> None:
        """Raises CheckpointError if another run has the folder, or, unless `resume`, if checkpoints are in it."""
        folder = Path(folder)
        self.path = folder / "run.lock"
        self._file: IO[str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            raise CheckpointError(f"cannot write into output_dir {folder}: {_reason(error)}") from error
        file.seek(0)
        holder = _holder(file.read(10_000))
        if not _try_lock(file) or (holder and holder["host"] != socket.gethostname()):
            file.close()
            raise CheckpointError(_held(folder, self.path, holder))
        if not resume and entries(folder / "checkpoints"):
            file.close()
            raise CheckpointError(
                f"{folder} holds the checkpoints of an earlier run. Go on with it: --resume. Start anew: set another "
                "output_dir (or name), or remove the folder."
            )
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the folder back. The empty file stays: removing it would let two others lock two different files."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLock:
        """The lock itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.release()


def _try_lock(file: IO[str]) -> bool:
    if fcntl is None:  # no such lock here: a file that was not emptied on release counts as held
        return not Path(file.name).stat().st_size
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(text: str) -> dict[str, Any] | None:
    """Who wrote the lock file; None if nobody, or if the line was cut short by a crash."""
    try:
        found = json.loads(text)
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (ValueError, KeyError, TypeError):
        return None


def _held(folder: Path, path: Path, holder: dict[str, Any] | None) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    away = "" if holder is None or holder["host"] == socket.gethostname() else f", or, if it is dead, remove {path}"
    return f"output_dir {folder} is in use by {who}. Wait for it, set another output_dir (or name){away}."
