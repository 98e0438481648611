"""Weights in 4 bits, with a scale for each column of a group of rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from workers.kernels.packing import Array, pack, packed_shape

#: Rows that share scales, where a device's part has whole groups of so many.
INT4_ROWS = 128


def quantize_int4(values: Array, group_rows: int) -> tuple[Array, Array]:
    """float32 [..., K, N] -> int4 of the same shape, and bfloat16 scales [..., K / group_rows, N].

    The largest magnitude of a group becomes 7, with the scale as bfloat16 has it.
    """
    *lead, rows, columns = values.shape
    grouped = values.reshape(*lead, rows // group_rows, group_rows, columns)
    scales: Any = (np.abs(grouped).max(axis=-2, keepdims=True) / 7.0).astype(ml_dtypes.bfloat16)
    wide = scales.astype(np.float32)
    quantized = np.clip(np.rint(grouped / np.where(wide > 0, wide, 1.0)), -7, 7)
    return quantized.astype(ml_dtypes.int4).reshape(values.shape), scales[..., 0, :]


def pair(values: Array, group_rows: int) -> Array:
    """int4 [..., K, N] -> int8 [..., K / 2, N], two a byte; see `PairedWeight`."""
    *lead, rows, columns = values.shape
    grouped = values.astype(np.int8).reshape(*lead, rows // group_rows, 2, group_rows // 2, columns)
    low, high = grouped[..., 0, :, :], grouped[..., 1, :, :]
    return ((low + 8) | (high << 4)).reshape(*lead, rows // 2, columns)


def packed_int4_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """As `packed_shape`, of so many rows of 4-bit values, filled up."""
    return packed_shape(-(-rows // INT4_ROWS) * INT4_ROWS // 2, columns, 1, bits=4)


def pack_int4(values: Array) -> tuple[Array, Array]:
    """float32 [..., K, N] -> values and scales [..., ceil(K / 128), N] of a `PackedWeight`.

    Of 128 rows, filled up with zeros, the first half lies in the low bits of 64 bytes and the second in the high ones, each
    with 8 added.
    """
    *lead, rows, _ = values.shape
    filled = np.pad(values, [*[(0, 0)] * len(lead), (0, -rows % INT4_ROWS), (0, 0)])
    quantized, scales = quantize_int4(filled, INT4_ROWS)
    return pack(pair(quantized, INT4_ROWS) ^ np.int8(-128), 1, bits=4), scales
