"""Weights as the native CPU kernels read them; `workers.kernels.packing` says how they are packed."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from workers.kernels.packing import RUN, STRIP

Form = Literal["rounded", "unrounded", "int4"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A `QuantizedWeight` of `rows` rows, packed.

    Attributes:
      values: [..., blocks, strips, 4 * rows of a block] int8; of 4 bits half of it.
      scales: [..., G, N] bfloat16; of 4 bits one for each 128 rows that a device holds.
      rows: K, of the whole weight, wherever its parts lie.
      form: `rounded`: products of value and scale are rounded to bfloat16, as in xAI's code; `unrounded`: they are not; `int4`:
        nor are they, and values are of 4 bits, see `workers.kernels.int4`.
    """

    values: jax.Array
    scales: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    form: Form = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values before packing."""
        return (*self.scales.shape[:-2], self.rows, self.scales.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """That of the bytes: int8."""
        return self.values.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTable:
    """An embedding table [V, D] in 16 bits a value: (256 * high + low) * scale, off by at most 2^-16 of a row's largest.

    Attributes:
      values: [blocks, strips, 2 * 4 * columns of a block] int8: of each run of 64 columns the high plane, then the low one.
      scales: [V, 1] float32.
      width: D.
    """

    values: jax.Array
    scales: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the table."""
        return (self.scales.shape[0], self.width)

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values: int8."""
        return self.values.dtype


def rows_of(table: PackedTable, tokens: jax.Array) -> jax.Array:
    """The table's rows for `tokens` [...], all within it: [..., D] float32."""
    blocks, strips, size = table.values.shape
    runs = table.values.reshape(blocks, strips, size // (2 * STRIP * RUN), 2, STRIP, RUN)
    taken = runs[:, tokens // STRIP, :, :, tokens % STRIP].astype(jnp.float32)  # [..., blocks, runs, 2, RUN]
    joined = (256.0 * taken[..., 0, :] + taken[..., 1, :]).reshape(*tokens.shape, -1)
    return joined[..., : table.width] * table.scales[tokens]
