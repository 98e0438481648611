"""Keys and values in 8 bits, with a scale for each position of a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedPages:
    """Pages as their `values` int8, in the layout of pages that are not quantized, and `scales` float32 [.., .., page]."""

    values: jax.Array
    scales: jax.Array


Pages = jax.Array | QuantizedPages


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., C] as int8 values and scales [...] float32: the largest of a row becomes 127 or -127."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127.0
    values = jnp.round(wide / jnp.where(scales > 0, scales, 1.0)[..., None])
    return values.astype(jnp.int8), scales


def write(pages: Pages, index: tuple[Any, ...], new: jax.Array, unique: bool = False) -> Pages:
    """`pages` with `new` [.., C] at `index`, which has a slice for C where that is not the last dimension.

    If places are `unique`, nothing waits for anything; what lies outside of the pages is dropped.
    """
    if not isinstance(pages, QuantizedPages):
        return pages.at[index].set(new.astype(pages.dtype), unique_indices=unique)
    values, scales = quantize(new)
    of_scale = index if len(index) < pages.values.ndim else (index[0], index[1], index[3])
    return QuantizedPages(
        pages.values.at[index].set(values, unique_indices=unique),
        pages.scales.at[of_scale].set(scales, unique_indices=unique),
    )


def read(pages: Pages, index: tuple[Any, ...], size_axis: int) -> jax.Array:
    """What lies at `index`, whose dimension `size_axis` is C."""
    if not isinstance(pages, QuantizedPages):
        return pages[index]
    return pages.values[index].astype(jnp.float32) * jnp.expand_dims(pages.scales[index], size_axis)


def page_size(values: Pages) -> int:
    """Positions of a page, of pages [.., .., page, C]."""
    array = values.values if isinstance(values, QuantizedPages) else values
    return int(array.shape[2])
