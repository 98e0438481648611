"""Which kernels a host computes with."""

from __future__ import annotations

import logging

from workers.assignment import MeshSpec, ModelSpec
from workers.checkpoint.checkpoint import Checkpoint
from workers.kernels.cpu.kernels import NativeKernelsError, native_kernels
from workers.kernels.kernels import PORTABLE, Kernels

_LOG = logging.getLogger(__name__)


def choose_kernels(model: ModelSpec, mesh: MeshSpec, checkpoint: Checkpoint) -> Kernels:
    """The native kernels on CPU hosts where they fit the model and were built; plain JAX elsewhere.

    They fit 8-bit weights with bfloat16 scales and float32 activations, not split along the embedding. All hosts of a
    mesh must be built alike: what they choose decides what they compute.
    """
    if mesh.platform != "cpu":
        return PORTABLE
    quantized = [file for info, file in checkpoint.tensors if info.quantized]
    packable = all(file.scales is not None and file.scales.dtype.name == "bfloat16" for file in quantized)
    if model.weights != "int8" or model.activations != "float32" or mesh.rules == "xai" or not packable:
        return PORTABLE
    try:
        return native_kernels()
    except NativeKernelsError as error:
        _LOG.warning("%s; computing with plain JAX, which is many times slower", error)
        return PORTABLE
