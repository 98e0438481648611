"""The global mesh of all devices of all hosts."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "model")
TYPES = (AxisType.Auto, AxisType.Auto)


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """A mesh `data` x `model` of no devices in particular."""
    return AbstractMesh((data, model), AXES, axis_types=TYPES)


def all_devices() -> list[jax.Device]:
    """All devices of all processes. Raises ValueError if CUDA finds no GPU, RuntimeError if another platform has no devices."""
    try:
        return list(jax.devices())
    except AssertionError:  # all that JAX says then
        raise ValueError(
            "CUDA finds no GPU: does nvidia-smi show one, and is the folder of its libcuda.so in LD_LIBRARY_PATH?"
        ) from None


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh `data` x `model` of all devices of all processes, hosts in rank order along `data` first.

    Raises:
      ValueError: the number of devices is not data * model, or CUDA finds no GPU.
      RuntimeError: another platform has no devices.
    """
    devices = sorted(all_devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) != data * model:
        raise ValueError(f"a mesh of {data} x {model} needs {data * model} devices; {len(devices)} are there")
    return Mesh(np.array(devices).reshape(data, model), AXES, axis_types=TYPES)
