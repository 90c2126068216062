"""Generators as velocities in flow coordinates: one file a family, found by listing this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowrl import resolve as names
from flowrl.models.pipeline import (
    BUILT_IN,
    INDEX,
    ModelError,
    load_pipeline,
    read_inference,
    read_json,
    resolve,
)
from flowrl.types import Model

__all__ = ["BUILT_IN", "ModelError", "families", "family", "load", "load_pipeline", "resolve"]


def families() -> dict[str, tuple[str, ...]]:
    """The diffusers pipelines that each family serves, by the family's name: the `pipelines` of its class."""
    return {name: names.resolve(name, __name__).pipelines for name in names.available(__name__)}


def family(path: str | Path) -> str:
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
    as_family: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Model:
    """The model at `path`, frozen and on `device`; `options` go to the constructor of its family's class.

    `dtype` is that of text encoders and transformer; the VAE stays float32. `as_family` is a family's name, or
    package.module:Class, or ./file.py:Class; None reads it from the model's files.
    Example: load("shapes") or load("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16, device="cuda").
    """
    source = resolve(path)
    make = names.resolve(as_family or family(path), __name__)
    pipe = load_pipeline(path, device=device, dtype=dtype)
    model: Model = make(pipe, path=str(path), inference=read_inference(source, pipe), **options)
    return model
