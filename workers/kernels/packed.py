"""Weights as the native CPU kernels read them: blocks of strips of four columns, so that each byte is read once, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: Columns of a strip, values of a column that follow each other, and how many of a column are at most a block; as in
#: kernels/cpu/src/kernels.h.
STRIP = 4
RUN = 64
BLOCK = 1024
#: The largest magnitude of a value of two planes, 256 * high + low.
TWO_PLANES = 32512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A `QuantizedWeight` of `rows` rows, packed.

    Attributes:
      values: [..., blocks, strips, 4 * rows of a block] int8.
      scales: [..., G, N] bfloat16.
      rows: K, of the whole weight, wherever its parts lie.
      rounded: whether products of value and scale are rounded to bfloat16, as in xAI's code.
    """

    values: jax.Array
    scales: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    rounded: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values before packing."""
        return (*self.scales.shape[:-2], self.rows, self.scales.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values: int8."""
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


def packed_shape(rows: int, columns: int, groups: int, planes: int = 1) -> tuple[int, int, int]:
    """Blocks, strips and bytes of a strip in a block, for `groups` groups of rows: each has as few equal blocks as will do."""
    runs = -(-(rows // groups) // RUN)
    blocks = -(-runs * RUN // BLOCK)
    return groups * blocks, -(-columns // STRIP), planes * STRIP * RUN * -(-runs // blocks)


def pack(weight: Array, groups: int) -> Array:
    """int8 [..., K, N] with `groups` groups of rows -> [..., *packed_shape(K, N, groups)].

    The last strip is filled up with zero columns, and each group with zero rows.
    """
    *lead, rows, columns = weight.shape
    blocks, strips, size = packed_shape(rows, columns, groups)
    depth, padded = rows // groups, blocks // groups * size // STRIP
    grouped = weight.reshape(*lead, groups, depth, columns)
    filled = np.pad(grouped, [(0, 0)] * (len(lead) + 1) + [(0, padded - depth), (0, strips * STRIP - columns)])
    split = filled.reshape(-1, blocks, size // STRIP // RUN, RUN, strips, STRIP)
    packed = empty((*lead, blocks, strips, size))
    packed.reshape(-1, blocks, strips, size // STRIP // RUN, STRIP, RUN)[...] = split.transpose(0, 1, 4, 2, 5, 3)
    return packed


def pack_table(table: Array, pack: Callable[[Array, int], Array] = pack) -> tuple[Array, Array]:
    """[V, D] float -> values and scales of a `PackedTable`; `pack` packs both planes."""
    wide = table.astype(np.float32)
    scales = np.abs(wide).max(axis=1, keepdims=True) / TWO_PLANES
    quantized = np.rint(wide / np.where(scales > 0, scales, 1.0)).astype(np.int32)
    high = (quantized + 128) >> 8
    planes = [pack(plane.astype(np.int8).T, 1) for plane in (high, quantized - 256 * high)]
    blocks, strips, size = planes[0].shape
    values = empty((blocks, strips, 2 * size))
    runs = [plane.reshape(blocks, strips, -1, STRIP * RUN) for plane in planes]
    np.stack(runs, axis=3, out=values.reshape(blocks, strips, -1, 2, STRIP * RUN))
    return values, scales


def empty(shape: tuple[int, ...]) -> Array:
    """An int8 array that begins at a multiple of 64 bytes, so that JAX can take it as it lies."""
    size = int(np.prod(shape))
    memory = np.empty(size + 64, np.int8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)


def rows_of(table: PackedTable, tokens: jax.Array) -> jax.Array:
    """The table's rows for `tokens` [...], all within it: [..., D] float32."""
    blocks, strips, size = table.values.shape
    runs = table.values.reshape(blocks, strips, size // (2 * STRIP * RUN), 2, STRIP, RUN)
    taken = runs[:, tokens // STRIP, :, :, tokens % STRIP].astype(jnp.float32)  # [..., blocks, runs, 2, RUN]
    joined = (256.0 * taken[..., 0, :] + taken[..., 1, :]).reshape(*tokens.shape, -1)
    return joined[..., : table.width] * table.scales[tokens]
