"""Attention of new positions to all earlier ones of their sequence, whose keys and values lie in pages."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

#: Keeps the quotient of padding, 0 / 0, at 0; real sums are at least exp(-2 cap).
SMALLEST = 1e-37

#: Positions that one turn of the loop reads.
BLOCK_POSITIONS = 128


#: (pages [B, n]) -> keys [B, K, C, n * page], values [B, K, n * page, C], in any float type.
ReadPages = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def paged_attention(
    query: jax.Array,
    read: ReadPages,
    kv_heads: int,
    page: int,
    page_table: jax.Array,
    positions: jax.Array,
    scale: float,
    cap: float,
) -> jax.Array:
    """softmax(cap tanh(q.k * scale / cap)) v over all positions of a sequence up to the query's own.

    Reads blocks of pages up to the last one that any row needs. As the cap bounds the logits, the softmax needs no
    running maximum: shifted by the cap, exponentials stay within [exp(-2 cap), 1]. A block that is past a row's last
    position adds exact zeros to it, so that a row's result does not depend on the other rows.

    Args:
      query: [B, T, H, C]; H is a multiple of K, and query head h reads head h // (H // K).
      read: gives what some pages hold.
      kv_heads, page: K, and the positions of a page.
      page_table: [B, N] int32, the page of each stretch of `page` positions of a row.
      positions: [B, T] int32, -1 for padding, whose result is zero.
      scale: factor of the logits.
      cap: logits are bent to (-cap, cap) by a tanh; at most `MOST_LOGIT_CAP` of the configuration.

    Returns:
      [B, T, H, C] float32.
    """
    batch, length, q_heads, size = query.shape
    per_block = max(1, BLOCK_POSITIONS // page)
    span = per_block * page
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % per_block)))
    grouped = query.reshape(batch, length, kv_heads, q_heads // kv_heads, size).astype(jnp.float32)

    def attend(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weighted, total = sums
        keys, values = read(lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1))
        logits = jnp.einsum("btkgc,bkcs->bkgts", grouped, keys.astype(jnp.float32)) * scale
        logits = cap * jnp.tanh(logits / cap)
        visible = i * span + jnp.arange(span) <= positions[:, :, None]  # [B, T, span]
        weights = jnp.where(visible[:, None, None], jnp.exp(logits - cap), 0.0)
        return weighted + jnp.einsum("bkgts,bksc->bkgtc", weights, values.astype(jnp.float32)), total + weights.sum(-1)

    shape = (batch, kv_heads, q_heads // kv_heads, length)
    blocks = (jnp.max(positions) + span) // span
    weighted, total = lax.fori_loop(0, blocks, attend, (jnp.zeros((*shape, size)), jnp.zeros(shape)))
    mixed: jax.Array = weighted / jnp.maximum(total, SMALLEST)[..., None]  # [B, K, H/K, T, C]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)
