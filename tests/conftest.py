"""Eight CPU devices in the test process, and the golden sets."""

from __future__ import annotations

import pathlib

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = pathlib.Path(__file__).parent / "golden"
DEMO = pathlib.Path(__file__).parent.parent / "models" / "demo"


@pytest.fixture(scope="session", params=["nano-s1", "text-s1"])
def golden(request: pytest.FixtureRequest) -> pathlib.Path:
    """Each golden set in turn."""
    return GOLDEN / str(request.param)
