"""Each host's mirror of the slots, kept by applying plans, and the packed rows that the compiled programs read.

All of a row's numbers travel to the device in one int32 array, floats as their bits: one transfer a call.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from workers.engine.plan import Admission, Chunk, EngineShape
from workers.runtime.sampling import SamplingRows

IntArray = np.ndarray[Any, np.dtype[np.int32]]

#: Columns of a packed row; the pages follow, and in a prefill row the chunk's tokens follow them.
SLOT, POSITION, LENGTH, DRAWS, TOP_K, SEED_LOW, SEED_HIGH, TEMPERATURE, TOP_P, PAGES = range(10)


class SlotTable:
    """The state of all slots of an engine as plans have made it. The same on every host after the same plans."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._rows: IntArray = np.zeros((shape.slots, PAGES + shape.table_width), np.int32)
        self._rows[:, SLOT] = np.arange(shape.slots)

    def admit(self, admission: Admission) -> None:
        """Fills a slot's row: sampling parameters and pages."""
        row, sampling = self._rows[admission.slot], admission.sampling
        row[POSITION:] = 0
        row[TOP_K] = sampling.top_k
        row[SEED_LOW : SEED_HIGH + 1].view(np.uint32)[:] = (sampling.seed & 0xFFFFFFFF, sampling.seed >> 32)
        row[TEMPERATURE : TOP_P + 1].view(np.float32)[:] = (sampling.temperature, sampling.top_p)
        row[PAGES : PAGES + len(admission.pages)] = admission.pages

    def prefill(self, chunks: tuple[Chunk, ...]) -> IntArray:
        """The packed rows [groups, PAGES + N + chunk] of one prefill call; moves the slots' positions on."""
        shape = self._shape
        width = self._rows.shape[1]
        packed = np.zeros((shape.groups, width + shape.chunk), np.int32)
        for chunk in chunks:
            row = self._rows[chunk.slot]
            row[POSITION] = chunk.start + len(chunk.tokens)
            target = packed[shape.group_of(chunk.slot)]
            target[:width] = row
            target[POSITION] = chunk.start
            target[LENGTH] = len(chunk.tokens)
            target[DRAWS] = chunk.last
            target[width : width + len(chunk.tokens)] = chunk.tokens
        return packed

    def decode(self, slots: tuple[int, ...]) -> IntArray:
        """The packed rows [slots, PAGES + N] of one decode call; moves the positions of `slots` on by one."""
        packed = self._rows.copy()
        active = np.array(slots, np.int32)
        packed[active, LENGTH] = 1
        packed[active, DRAWS] = 1
        self._rows[active, POSITION] += 1
        return packed


def positions(packed: jax.Array, length: int) -> jax.Array:
    """The positions [B, length] of the tokens of packed rows, -1 where a row has fewer."""
    offset = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(offset < packed[:, LENGTH, None], packed[:, POSITION, None] + offset, -1)


def sampling_rows(packed: jax.Array) -> SamplingRows:
    """The sampling parameters of packed rows. The token to draw follows the row's last position."""

    def bits(column: int, dtype: jnp.dtype | type) -> jax.Array:
        return lax.bitcast_convert_type(packed[:, column], dtype)

    return SamplingRows(
        seed_low=bits(SEED_LOW, jnp.uint32),
        seed_high=bits(SEED_HIGH, jnp.uint32),
        position=packed[:, POSITION] + packed[:, LENGTH],
        temperature=bits(TEMPERATURE, jnp.float32),
        top_p=bits(TOP_P, jnp.float32),
        top_k=packed[:, TOP_K],
    )
