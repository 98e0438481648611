"""Which kernels a host computes with."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.loader import Params
from workers.kernels.cpu.bindings import NativeKernelsError
from workers.kernels.cpu.kernels import INSTRUCTION_SETS, native_kernels, use_instruction_set
from workers.kernels.gpu.kernels import GPU
from workers.kernels.interface import ACCELERATOR, PORTABLE, Kernels
from workers.kernels.tpu.kernels import TPU, kernels_for
from workers.messages.plan import EngineShape
from workers.messages.specs import MeshSpec, ModelSpec
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.kv_cache import page_shapes
from workers.runtime.mesh import tell

_LOG = logging.getLogger(__name__)


def select_kernels(model: ModelSpec, mesh: MeshSpec, checkpoint: Checkpoint) -> Kernels:
    """Those of the platform: Pallas on TPUs and GPUs, native ones on CPU hosts where they fit and were built; else plain JAX.

    Those for GPUs multiply in bfloat16, which activations then must be; they do not know weights that are split along the
    embedding. Native ones fit 8-bit weights with bfloat16 scales, also in 4 bits, float32 activations and pages of floats,
    split as for GPUs.

    Raises:
      ValueError: `weights` ask for the native kernels, which are not to be had.
    """
    if mesh.platform != "cpu" and model.weights != "int8-unrounded":
        if mesh.platform == "tpu":
            return TPU
        return GPU if model.activations == "bfloat16" and mesh.rules != "xai" else ACCELERATOR
    quantized = [file for info, file in checkpoint.tensors if info.quantized]
    packable = all(file.scales is not None and file.scales.dtype.name == "bfloat16" for file in quantized)
    float32 = model.activations == "float32"
    plain = float32 and mesh.rules != "xai" and model.kv_cache != "int8"
    fits = mesh.platform == "cpu" and packable and plain and model.weights.startswith("int")
    try:
        if fits:
            return native_kernels()
        problem = (
            "they take CPU hosts, bfloat16 scales, float32 activations, a KV cache of floats and mesh.rules but xai"
        )
    except NativeKernelsError as error:
        problem = str(error)
        _LOG.warning("%s; computing with plain JAX, which is many times slower", error)
    if model.weights in ("int8-unrounded", "int4"):
        raise ValueError(f"model.weights={model.weights} needs the native kernels: {problem}; use int8")
    return PORTABLE


def hold_to_promise(
    config: GrokConfig, shape: EngineShape, partition: Partition, params: Params, kv_dtype: Any
) -> tuple[EngineShape, Partition]:
    """Shape and partition of an engine, which promises batch invariance only if the kernels cover a device's part of its
    parameters and pages."""

    def part(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert array.sharding is not None
        return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)

    kernels, pages = partition.kernels, page_shapes(config, shape, partition, kv_dtype)
    if not kernels.batch_invariant or kernels.covers(*jax.tree.map(part, (params, pages[1]))):
        return shape, partition
    _LOG.warning(
        "no whole tiles, or an array of 2 to 4 GiB: plain XLA computes what the %s kernels leave, not batch-invariant",
        kernels.name,
    )
    held = dataclasses.replace(kernels, batch_invariant=False)
    return dataclasses.replace(shape, batch_invariant=False), dataclasses.replace(partition, kernels=held)


def negotiate(kernels: Kernels, seconds: float) -> Kernels:
    """The best kernels that all processes of the mesh have; all must call this alike, within `seconds`.

    What every host computes for itself, routes and norms, must come out the same on all. TPUs of a slice are of one kind, which
    only now is known.
    """
    if kernels is TPU:
        return kernels_for(jax.devices()[0].device_kind)
    if jax.process_count() == 1 or kernels.accelerator:
        return kernels
    levels = (PORTABLE.name, *INSTRUCTION_SETS)
    common = min(tell("kernels", kernels.name, seconds), key=levels.index)
    if common != kernels.name:
        _LOG.warning("another host has no %s kernels; computing with %s", kernels.name, common)
    if common == PORTABLE.name:
        return PORTABLE
    use_instruction_set(common)
    return native_kernels()
