"""What a worker can do for its engine before it has joined a mesh, and so before it has devices."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import parameter_shapes
from workers.checkpoint.storage import locate
from workers.host.environment import share_devices
from workers.host.kernel_selection import hold_to_promise, select_kernels
from workers.kernels.interface import Kernels
from workers.messages.plan import EngineShape
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec
from workers.model.partition import Partition
from workers.runtime.mesh import abstract_mesh
from workers.runtime.program_set import ProgramSet

#: By the names of the configuration.
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


class StandbyEngine:
    """A model, opened, and the program_set of its engine. Made before JAX starts its backend, whose platform it chooses."""

    def __init__(self, model: ModelSpec, mesh: MeshSpec, engine: EngineSpec) -> None:
        """Raises CheckpointError; ValueError if model, mesh and engine do not fit each other."""
        _choose_platform(mesh)
        self._model = model
        self._mesh = mesh
        self._engine = engine
        self.checkpoint = open_checkpoint(locate(model.checkpoint))
        self.dtype = DTYPES[model.activations]
        self.kernels = select_kernels(model, mesh, self.checkpoint)
        self._draw()

    def adopt(self, kernels: Kernels) -> None:
        """Uses these kernels, if they are others than this host would choose."""
        if kernels.name != self.kernels.name:
            self.kernels = kernels
            self._draw()

    def trace(self) -> None:
        for name in self.program_set.names:
            self.program_set.trace(name)

    def _draw(self) -> None:
        model, mesh, config, kernels = self._model, self._mesh, self.checkpoint.config, self.kernels
        partition = Partition.create(config, abstract_mesh(mesh.data, mesh.model), mesh.rules, kernels)
        shapes = parameter_shapes(self.checkpoint, partition, weights=model.weights, dtype=self.dtype)
        kv_dtype = DTYPES[model.kv_cache or model.activations]
        shape = engine_shape(self._engine, config.sequence_len, partition.batch_groups, kernels.batch_invariant)
        shape, partition = hold_to_promise(config, shape, partition, shapes, kv_dtype)
        self.kernels = partition.kernels
        self.program_set = ProgramSet(config, shape, partition, shapes, self.dtype, kv_dtype)


def _choose_platform(mesh: MeshSpec) -> None:
    """Settles what JAX makes its devices of. It takes nothing else: where a driver is missing, that is what its error says."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(mesh.platform, mesh.platform))
    share_devices(mesh.platform, os.environ)
    if mesh.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", mesh.devices_per_host)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")


def engine_shape(engine: EngineSpec, model_context: int, groups: int, batch_invariant: bool) -> EngineShape:
    """The engine's sizes for a model of `model_context` on a mesh with `groups` batch groups.

    Raises:
      ValueError: the context is longer than the model's, or slots do not divide over the groups.
    """
    context = engine.context or model_context
    if context > model_context:
        raise ValueError(f"engine.context={context} exceeds the model's context of {model_context}")
    everything = engine.slots // groups * -(-context // engine.page_size) + 1
    return EngineShape(
        slots=engine.slots,
        groups=groups,
        pages=everything if engine.kv_pages is None else engine.kv_pages // groups,
        page_size=engine.page_size,
        chunk=engine.prefill_chunk,
        context=context,
        batch_invariant=batch_invariant,
    )
