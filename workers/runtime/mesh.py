"""The global mesh of all devices of all hosts."""

from __future__ import annotations

import jax
import numpy as np
from jax._src import distributed
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


def tell(topic: str, text: str, seconds: float) -> list[str]:
    """What all processes of the mesh, which must call this alike, tell each other on a topic, by rank.

    Raises JaxRuntimeError when one has told nothing in time. JAX's own way is a collective, for which its processes must have
    connected.
    """
    count, client = jax.process_count(), distributed.global_state.client
    if client is None:
        return [text]
    client.key_value_set(f"grokmesh/{topic}/{jax.process_index()}", text)
    wait = int(seconds * 1000)
    return [client.blocking_key_value_get(f"grokmesh/{topic}/{rank}", wait) for rank in range(count)]


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
