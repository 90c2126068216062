"""One tiny SD3 for all tests of the models: importing a diffusers pipeline takes most of their time."""

import pytest

from tests.models.tiny import tiny_sd3

__all__ = ["sd3", "tiny_sd3"]


@pytest.fixture(scope="session")
def sd3(tiny_sd3):
    """The model; a test that changes it must load its own."""
    from flowrl.models import load

    return load(tiny_sd3)
