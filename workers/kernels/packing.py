"""How native CPU kernels want weights: in blocks of strips of four columns, so that each byte is read once, in order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: Columns of a strip, values of a column that follow each other, and how many of a column are at most a block; as in
#: kernels/cpu/src/kernels.h.
STRIP = 4
RUN = 64
BLOCK = 1024
#: The largest magnitude of a value of two planes, 256 * high + low.
TWO_PLANES = 32512


def packed_shape(rows: int, columns: int, groups: int, planes: int = 1, bits: int = 8) -> tuple[int, int, int]:
    """Blocks, strips and bytes of a strip in a block, for `groups` groups of rows: each has as few equal blocks as will do.

    Rows are bytes: of 4 bits each is two.
    """
    runs = -(-(rows // groups) // RUN)
    blocks = -(-runs * RUN // (BLOCK * bits // 8))
    return groups * blocks, -(-columns // STRIP), planes * STRIP * RUN * -(-runs // blocks)


def pack(weight: Array, groups: int, bits: int = 8) -> Array:
    """int8 [..., K, N] with `groups` groups of rows -> [..., *packed_shape(K, N, groups, bits=bits)].

    The last strip is filled up with zero columns, and each group with zero rows.
    """
    *lead, rows, columns = weight.shape
    blocks, strips, size = packed_shape(rows, columns, groups, bits=bits)
    depth, padded = rows // groups, blocks // groups * size // STRIP
    grouped = weight.reshape(*lead, groups, depth, columns)
    filled = np.pad(grouped, [(0, 0)] * (len(lead) + 1) + [(0, padded - depth), (0, strips * STRIP - columns)])
    split = filled.reshape(-1, blocks, size // STRIP // RUN, RUN, strips, STRIP)
    packed = empty((*lead, blocks, strips, size))
    packed.reshape(-1, blocks, strips, size // STRIP // RUN, STRIP, RUN)[...] = split.transpose(0, 1, 4, 2, 5, 3)
    return packed


def pack_table(table: Array) -> tuple[Array, Array]:
    """[V, D] float -> values and scales of a `PackedTable`."""
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


def empty(shape: tuple[int, ...], dtype: Any = np.int8) -> Array:
    """An array that begins at a multiple of 64 bytes, so that JAX can take it as it lies."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: Array = memory[start : start + size].view(dtype)
    return array.reshape(shape)
