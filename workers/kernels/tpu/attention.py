"""Attention over pages on TPUs, whose own kernel wants the heads before the pages: a head's pages then are whole tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention.paged_attention_kernel import paged_attention as decode_attention

from workers.kernels import kv_pages
from workers.kernels.kv_pages import Pages
from workers.kernels.xla import heads_first
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
    key_pages, value_pages = heads_first.write(key, value, key_pages, value_pages, table, positions, rope_base)
    rotated = rotate(query, positions, rope_base)
    if query.shape[1] == 1 and isinstance(key_pages, jax.Array):
        per_block = max(1, _BLOCK // kv_pages.page_size(value_pages))
        mixed = decode_attention(
            rotated[:, 0] * scale,
            key_pages,
            value_pages,
            jnp.maximum(positions[:, 0], 0) + 1,
            jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block))),
            attn_logits_soft_cap=cap,
            pages_per_compute_block=per_block,
        )
        return mixed[:, None], key_pages, value_pages
    mixed = heads_first.attend(rotated, key_pages, value_pages, table, positions, scale=scale, cap=cap)
    return mixed, key_pages, value_pages
