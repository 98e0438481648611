"""The 8-bit weights of xAI's release."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from workers.kernels.packed import PackedTable, PackedWeight


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairedWeight:
    """A `QuantizedWeight` [..., K, N] of 4-bit values, two a byte.

    Of each group's rows the first half lies, 8 added, in the low bits of `pairs` [..., K / 2, N] int8, the second in the high
    ones. So a byte less its low bits is 16 times the second.
    """

    pairs: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        *lead, rows, columns = self.pairs.shape
        return (*lead, 2 * rows, columns)

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values: int4."""
        dtype: jnp.dtype = jnp.dtype(jnp.int4)
        return dtype

    def apart(self) -> QuantizedWeight:
        """The values, a byte each."""
        *lead, groups, columns = self.scales.shape
        grouped = self.pairs.reshape(*lead, groups, -1, columns)
        values = jnp.concatenate([(grouped & 15) - 8, grouped >> 4], axis=-2)
        return QuantizedWeight(values.reshape(self.shape), self.scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """One layer's weight among those of all layers, `stacked` [L, ...], from where kernels read it. `layer` [] int32."""

    stacked: jax.Array | QuantizedWeight | PairedWeight | PackedWeight
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's values."""
        return self.stacked.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values as stored."""
        return self.stacked.dtype

    def taken(self) -> jax.Array | QuantizedWeight | PairedWeight | PackedWeight:
        """The layer's weight as one of its own."""
        found: jax.Array | QuantizedWeight | PairedWeight | PackedWeight = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), self.stacked
        )
        return found


Weight = jax.Array | QuantizedWeight | PairedWeight | PackedWeight | LayerWeight
Table = jax.Array | PackedTable


def group_of(weight: Weight, group: jax.Array) -> Weight:
    """The matrix [K, N] of a group of a weight [G, K, N]."""
    if not isinstance(weight, LayerWeight):
        one: Weight = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), weight)
        return one

    def take(leaf: jax.Array) -> jax.Array:
        at: list[Any] = [weight.layer, group, *(0 for _ in leaf.shape[2:])]
        return lax.dynamic_slice(leaf, at, (1, 1, *leaf.shape[2:])).reshape(leaf.shape[2:])

    found: Weight = jax.tree.map(take, weight.stacked)
    return found


def taken(weight: Weight) -> jax.Array | QuantizedWeight | PairedWeight | PackedWeight:
    """A weight that may be one layer's among those of all layers, as one of its own."""
    return weight.taken() if isinstance(weight, LayerWeight) else weight


def layered(weight: Weight) -> LayerWeight:
    """A weight as one layer's among those of all layers: of a weight of its own, the only one."""
    if isinstance(weight, LayerWeight):
        return weight
    return LayerWeight(jax.tree.map(lambda leaf: leaf[None], weight), jnp.int32(0))


def dequantize(weight: Weight, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The values [..., K, N] of a weight in `dtype`; an array is only cast.

    A value is `weight[k, n] * scales[k // (K // G), n]` **rounded to bfloat16**, as in xAI's code, whatever `dtype` is.
    The rounding is part of the model: without it logits differ by half a percent of their spread.
    """
    weight = taken(weight)
    if isinstance(weight, PackedWeight):
        raise TypeError("a packed weight is for the native kernels")
    if isinstance(weight, PairedWeight):
        weight = weight.apart()
    if not isinstance(weight, QuantizedWeight):
        return weight.astype(dtype)
    *lead, rows, columns = weight.shape
    groups = weight.scales.shape[-2]
    grouped = weight.weight.reshape(*lead, groups, rows // groups, columns).astype(jnp.float32)
    scaled = (grouped * weight.scales[..., :, None, :].astype(jnp.float32)).astype(jnp.bfloat16)
    return scaled.reshape(weight.shape).astype(dtype)
