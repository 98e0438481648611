"""Pages [K, P, page, C], whose heads come before them, as accelerators' kernels want them: a head's pages lie together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from workers.kernels import kv_pages
from workers.kernels.kv_pages import Pages
from workers.kernels.xla.paged_attention import paged_attention
from workers.kernels.xla.rotary import rotate


def write(
    key: jax.Array,
    value: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    table: jax.Array,
    positions: jax.Array,
    rope_base: float,
) -> tuple[Pages, Pages]:
    """The pages with new keys, which are rotated here, and values; see `portable.attend`. Padding is written nowhere."""
    size, every = kv_pages.page_size(value_pages), slice(None)
    place = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(table, place // size, axis=1)  # [B, T]
    # Beyond the last page: one that all padding is written to would have its rows wait for each other.
    page = jnp.where(positions >= 0, page, jax.tree.leaves(key_pages)[0].shape[1])
    at = (every, page, place % size)
    return (
        kv_pages.write(key_pages, at, rotate(key, positions, rope_base).transpose(2, 0, 1, 3), unique=True),
        kv_pages.write(value_pages, at, value.transpose(2, 0, 1, 3), unique=True),
    )


def attend(
    query: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    cap: float,
) -> jax.Array:
    """`paged_attention` of rotated queries [B, T, H, C] to such pages."""
    heads, _, size, width = jax.tree.leaves(value_pages)[0].shape

    def read(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, count = some.shape
        keys, values = (
            kv_pages.read(kind, (slice(None), some), 4).reshape(heads, batch, count * size, width)
            for kind in (key_pages, value_pages)
        )
        return keys.transpose(1, 0, 3, 2), values.transpose(1, 0, 2, 3)

    return paged_attention(query, read, heads, size, table, positions, scale, cap)
