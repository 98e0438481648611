"""Attention over pages on TPUs, whose own kernel wants the heads before the pages: a head's pages then are whole tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention.paged_attention_kernel import paged_attention as decode_attention

from workers.kernels import kv_pages
from workers.kernels.kv_pages import Pages
from workers.kernels.xla.paged_attention import paged_attention
from workers.kernels.xla.rotary import rotate

#: Positions that the kernel takes at a time.
_BLOCK = 512


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    cap: float,
    rope_base: float,
) -> tuple[jax.Array, Pages, Pages]:
    """As `workers.kernels.xla.portable.attend`, but both kinds of pages are [K, P, page, C].

    One new position a row is attended by the kernel that JAX ships, several by plain JAX; so are pages in 8 bits, of which that
    kernel would want a scale for each value.
    """
    size, every = kv_pages.page_size(value_pages), slice(None)
    place = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(table, place // size, axis=1)  # [B, T]
    page = jnp.where(positions >= 0, page, 0)
    at = (every, page, place % size)
    key_pages = kv_pages.write(key_pages, at, rotate(key, positions, rope_base).transpose(2, 0, 1, 3))
    value_pages = kv_pages.write(value_pages, at, value.transpose(2, 0, 1, 3))
    rotated = rotate(query, positions, rope_base)
    if query.shape[1] == 1 and isinstance(key_pages, jax.Array):
        per_block = max(1, _BLOCK // size)
        mixed = decode_attention(
            rotated[:, 0] * scale,
            key_pages,
            value_pages,
            place[:, 0] + 1,
            jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block))),
            attn_logits_soft_cap=cap,
            pages_per_compute_block=per_block,
        )
        return mixed[:, None], key_pages, value_pages
    heads, width = key.shape[2:]

    def read(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, count = some.shape
        keys, values = (
            kv_pages.read(kind, (every, some), 4).reshape(heads, batch, count * size, width)
            for kind in (key_pages, value_pages)
        )
        return keys.transpose(1, 0, 3, 2), values.transpose(1, 0, 2, 3)

    mixed = paged_attention(rotated, read, heads, size, table, positions, scale, cap)
    return mixed, key_pages, value_pages
