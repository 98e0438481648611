"""The hot operations in plain JAX, for any platform."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from workers.kernels import kv_pages
from workers.kernels.kv_pages import Pages
from workers.kernels.weights import Weight, dequantize
from workers.kernels.xla.grouped_matmul import grouped_matmul
from workers.kernels.xla.paged_attention import ReadPages, paged_attention
from workers.kernels.xla.rotary import rotate

#: (x [M, K] sorted by group, weight [G, K, N], group_sizes [G]) -> [M, N]
GroupedMatmul = Callable[[jax.Array, Weight, jax.Array], jax.Array]


def norm(
    x: jax.Array, valid: jax.Array, scale: Weight, residual: jax.Array | None = None, *, epsilon: float
) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dimension (https://arxiv.org/abs/1910.07467), in float32."""
    del valid
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    normed = normed * dequantize(scale)
    return normed if residual is None else residual + normed


def route(x: jax.Array, valid: jax.Array, weight: Weight, selected: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gates [M, S], experts [M, S] and probabilities [M, E]: softmax in float32 over **all** experts, then the largest."""
    del valid
    # The highest precision: accelerators otherwise multiply float32 as bfloat16, and choose other experts.
    logits = jnp.matmul(x.astype(jnp.float32), dequantize(weight), precision=lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(logits)
    gates, experts = lax.top_k(probabilities, selected)
    return gates, experts, probabilities


def project(x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
    """x [M, K] times each weight [K, N_i], taken in x's dtype: [M, N_i] float32."""
    del valid
    return tuple(jnp.matmul(x, dequantize(w, x.dtype), preferred_element_type=jnp.float32) for w in weights)


def experts(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    valid: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    reduce: Callable[[tuple[jax.Array, jax.Array]], tuple[jax.Array, jax.Array]] | None,
    *,
    multiply: GroupedMatmul = grouped_matmul,
) -> jax.Array:
    """Sum over the selected experts of gate * down(gelu(gate(x)) * up(x)); see `Kernels.experts`."""
    selected, count = experts.shape[1], gate.shape[0]
    counted = jnp.repeat(valid, selected)  # [M * S]
    flat = jnp.where(counted, experts.reshape(-1), count)
    order = jnp.argsort(flat, stable=True)  # rows by expert, padding last
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
    taken = x[order // selected]  # [M * S, D]

    gated = multiply(taken, gate, sizes)  # [M * S, F]
    lifted = multiply(taken, up, sizes)  # [M * S, F]
    if reduce is not None:
        gated, lifted = reduce((gated, lifted))
    hidden = (jax.nn.gelu(gated, approximate=True) * lifted).astype(x.dtype)
    results = multiply(hidden, down, sizes)  # [M * S, D]

    results = jnp.zeros_like(results).at[order].set(results, unique_indices=True)
    results = jnp.where(counted[:, None], results, 0.0).reshape(*experts.shape, -1)  # [M, S, D]
    return jnp.sum(results * gates[..., None], axis=1)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `table` [V, D]."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def logits(hidden: jax.Array, valid: jax.Array, table: jax.Array) -> jax.Array:
    """`hidden` [M, D] times the transposed `table` [V, D]: [M, V] float32."""
    del valid
    return jnp.einsum("md,vd->mv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


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
    """Rotates queries and keys, writes keys and values to their pages, attends to all pages.

    Padding (position -1) is written to page 0, which no sequence owns.

    Args:
      query: [B, T, H, C], not rotated yet.
      key, value: [B, T, K, C].
      key_pages: [P, K, C, page], so that the positions of a head's keys lie side by side. Both may be QuantizedPages.
      value_pages: [P, K, page, C].
      table: [B, N], the page of each stretch of positions.
      positions: [B, T], -1 for padding.
      scale, cap: factor of the logits, and what bounds them then; see `paged_attention`.
      rope_base: see `rotate`.

    Returns:
      [B, T, H, C] float32, and the updated pages.
    """
    size = kv_pages.page_size(value_pages)
    place = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(table, place // size, axis=1)  # [B, T]
    page = jnp.where(positions >= 0, page, 0)
    every = slice(None)
    key_pages = kv_pages.write(key_pages, (page, every, every, place % size), rotate(key, positions, rope_base))
    value_pages = kv_pages.write(value_pages, (page, every, place % size), value)
    read = read_pages(key_pages, value_pages)
    rotated = rotate(query, positions, rope_base)
    mixed = paged_attention(rotated, read, key.shape[2], size, table, positions, scale, cap)
    return mixed, key_pages, value_pages


def read_pages(key_pages: Pages, value_pages: Pages) -> ReadPages:
    """How `paged_attention` reads pages [P, K, C, page] and [P, K, page, C]."""

    def read(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = kv_pages.read(key_pages, (some,), 3).transpose(0, 2, 3, 1, 4)  # [B, K, C, n, page]
        values = kv_pages.read(value_pages, (some,), 4).transpose(0, 2, 1, 3, 4)  # [B, K, n, page, C]
        return keys.reshape(*keys.shape[:3], -1), values.reshape(*values.shape[:2], -1, values.shape[4])

    return read
