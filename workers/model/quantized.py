"""The 8-bit weights of xAI's release."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from workers.model.packed import PackedTable, PackedWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """int8 `weight` [..., K, N] with one scale a column and group of rows: `scales` [..., G, N], G divides K.

    Row k belongs to group k // (K // G). It stands in the parameter tree where a plain array would, so it has an
    array's `shape` and `dtype` (those of `weight`).
    """

    weight: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.weight.shape

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values as stored: int8."""
        return self.weight.dtype


Weight = jax.Array | QuantizedWeight | PackedWeight
Table = jax.Array | PackedTable


def dequantize(weight: Weight, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The values [..., K, N] of a weight in `dtype`; an array is only cast.

    A value is `weight[k, n] * scales[k // (K // G), n]` **rounded to bfloat16**, as in xAI's code, whatever `dtype` is.
    The rounding is part of the model: without it logits differ by half a percent of their spread.
    """
    if isinstance(weight, PackedWeight):
        raise TypeError("a packed weight is for the native kernels")
    if not isinstance(weight, QuantizedWeight):
        return weight.astype(dtype)
    *lead, rows, columns = weight.shape
    groups = weight.scales.shape[-2]
    grouped = weight.weight.reshape(*lead, groups, rows // groups, columns).astype(jnp.float32)
    scaled = (grouped * weight.scales[..., :, None, :].astype(jnp.float32)).astype(jnp.bfloat16)
    return scaled.reshape(weight.shape).astype(dtype)
