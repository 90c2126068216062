"""Generators as velocities in flow coordinates: one file a family, found by listing this folder."""

from flowrl.models.pipeline import (
    BUILT_IN,
    ModelError,
    families,
    family_of,
    load,
    load_pipeline,
    read_inference,
    resolve,
)

__all__ = ["BUILT_IN", "ModelError", "families", "family_of", "load", "load_pipeline", "read_inference", "resolve"]
