"""An engine's programs before there are devices: what is computed, and the shapes of what it is computed on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from workers.checkpoint.loader import Params
from workers.kernels.sampling import SamplingState
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.kv_cache import page_shapes
from workers.runtime.programs import Programs, State
from workers.runtime.slots import SlotTable


class ProgramSet:
    """The programs of an engine on an abstract mesh. Tracing them needs neither devices nor parameters, so that a process that
    stands by does it while its time has not come."""

    def __init__(
        self,
        config: GrokConfig,
        shape: EngineShape,
        partition: Partition,
        params: Params,
        dtype: jnp.dtype | type = jnp.float32,
        kv_dtype: jnp.dtype | type | None = None,
    ) -> None:
        """The programs, nothing traced yet.

        Args:
          config, shape, partition: of the model, the engine and the mesh, which may be abstract.
          params: the parameters, or their shapes; see `parameter_shapes`.
          dtype: of the activations.
          kv_dtype: of keys and values; as the activations if None.
        """
        self.config = config
        self.shape = shape
        self.dtype = dtype
        assert partition.mesh is not None
        whole = partition.sharding(())

        def array(*dims: int, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=whole)

        sampling = SamplingState(
            bias=array(shape.slots, config.vocab_size, dtype=jnp.float32),
            counts=array(shape.slots, config.vocab_size, dtype=jnp.int32),
            mask=array(shape.slots, -(-config.vocab_size // 32), dtype=jnp.int32),
        )
        pages = page_shapes(config, shape, partition, kv_dtype or dtype)
        #: Shapes of the state that the programs keep.
        self.state = State(pages, array(shape.slots, dtype=jnp.int32), sampling)
        programs, slots = Programs(config, shape, partition, dtype), SlotTable(shape)
        known = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.NamedSharding(whole.mesh, x.sharding.spec)
            ),
            params,
        )
        state = (known, self.state)
        self._calls: dict[str, tuple[Any, ...]] = {
            "prefill": (programs.prefill, *state, slots.prefill(())),
            "score": (programs.score, *state, slots.score(())),
            "decode": (programs.decode, *state, slots.decode(())),
        }
        if shape.batch_invariant:
            self._calls["verify"] = (programs.verify, *state, slots.verify((), ()))
        for name, rows in vars(sampling).items():
            self._calls[name] = (programs.set_row, rows, np.int32(0), np.zeros(rows.shape[1], rows.dtype))
        self._traced: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self._calls)

    def trace(self, name: str) -> Any:
        """A program as `jax.stages.Traced`, whose first call traces it."""
        traced = self._traced.get(name)
        if traced is None:
            function, *arguments = self._calls[name]
            traced = self._traced[name] = function.trace(*arguments)
        return traced
