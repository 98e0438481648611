"""Attention over pages on TPUs. Heads come before pages, as JAX's own kernel wants it: a head's pages then are whole tiles."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention.paged_attention_kernel import paged_attention as decode_attention

from workers.kernels import kv_pages
from workers.kernels.kv_pages import Pages
from workers.kernels.xla import heads_first
from workers.kernels.xla.paged_attention import SMALLEST
from workers.kernels.xla.rotary import rotate

#: Positions that JAX's kernel takes at a time.
_BLOCK = 512
#: New positions of a block, and pages that it meets at a time, each a copy of its own.
_POSITIONS, _PAGES = 128, 8


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
    interpret: bool = False,
) -> tuple[jax.Array, Pages, Pages]:
    """As `workers.kernels.xla.portable.attend`, but both kinds of pages are [K, P, page, C].

    A row's positions follow each other, padding comes last. One new position a row is attended by the kernel that JAX ships,
    several by one of our own; pages in 8 bits by plain JAX, as those kernels would want a scale for each value.
    """
    key_pages, value_pages = heads_first.write(key, value, key_pages, value_pages, table, positions, rope_base)
    rotated = rotate(query, positions, rope_base)
    if not (isinstance(key_pages, jax.Array) and isinstance(value_pages, jax.Array)):
        mixed = heads_first.attend(rotated, key_pages, value_pages, table, positions, scale=scale, cap=cap)
    elif query.shape[1] > 1:
        mixed = _attend_chunk(rotated, key_pages, value_pages, table, positions, scale, cap, interpret)
    else:
        per_block = max(1, _BLOCK // kv_pages.page_size(value_pages))
        with pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
            mixed = decode_attention(
                rotated[:, 0] * scale,
                key_pages,
                value_pages,
                jnp.maximum(positions[:, 0], 0) + 1,
                jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block))),
                attn_logits_soft_cap=cap,
                pages_per_compute_block=per_block,
            )[:, None]
    return mixed, key_pages, value_pages


def _attend_chunk(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    scale: float,
    cap: float,
    interpret: bool,
) -> jax.Array:
    """`paged_attention` of rotated queries [B, T, H, C] to pages [K, P, page, C]: [B, T, H, C] float32.

    A block takes the queries of some positions that read the same head, and meets a few pages a turn.
    """
    batch, length, heads, width = query.shape
    kv_heads, _, page, _ = key_pages.shape
    group, span = heads // kv_heads, _PAGES * page
    block = min(_POSITIONS, pl.next_power_of_2(length))
    blocks = -(-length // block)
    rows = group * block
    padded = jnp.pad(query.astype(key_pages.dtype), ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    split = padded.reshape(batch, blocks, block, kv_heads, group, width).transpose(0, 3, 1, 4, 2, 5)
    first, end = positions[:, 0], jnp.max(positions, axis=1) + 1  # [B], [B]
    turns = jnp.maximum(-(-jnp.max(end) // span), 1)

    def at_block(b: Any, head: Any, q: Any, _turn: Any, *_: Any) -> Any:
        return b, head, q, 0, 0

    def at_page(i: int, b: Any, head: Any, _q: Any, turn: Any, table: Any, _first: Any, end: Any) -> Any:
        # None is fetched beyond a row's last one.
        return head, table[b, jnp.clip(turn * _PAGES + i, 0, jnp.maximum(end[b] - 1, 0) // page)], 0, 0

    def kernel(_table: Any, first: Any, end: Any, queries: Any, *refs: Any) -> None:
        (*pages, out, weighted, total), turn = refs, pl.program_id(3)
        start = first[pl.program_id(0)] + pl.program_id(2) * block
        stop = jnp.minimum(start + block, end[pl.program_id(0)])

        @pl.when(turn == 0)
        def _() -> None:
            weighted[...] = jnp.zeros_like(weighted)
            total[...] = jnp.zeros_like(total)

        @pl.when(turn * span < stop)
        def _() -> None:
            keys, values = (
                jnp.concatenate([ref[0, 0] for ref in some], axis=0) for some in (pages[:_PAGES], pages[_PAGES:])
            )  # [span, C]
            logits = jax.lax.dot_general(
                queries[0, 0, 0], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )  # [rows, span]
            own = start + (jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) & (block - 1))
            met = turn * span + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            bent = cap * jnp.tanh(logits * (scale / cap))
            # No running maximum: see `paged_attention`.
            weights = jnp.where((met <= own) & (own < stop), jnp.exp(bent - cap), 0.0)
            weighted[...] += jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            total[...] += jnp.sum(weights, axis=1, keepdims=True)

        @pl.when(turn == pl.num_programs(3) - 1)
        def _() -> None:
            out[0, 0, 0] = weighted[...] / jnp.maximum(total[...], SMALLEST)

    of_pages = [pl.BlockSpec((1, 1, page, width), functools.partial(at_page, i)) for i in range(_PAGES)]
    mixed = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, blocks, turns),
            in_specs=[pl.BlockSpec((1, 1, 1, rows, width), at_block), *of_pages, *of_pages],
            out_specs=pl.BlockSpec((1, 1, 1, rows, width), at_block),
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32), pltpu.VMEM((rows, 1), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, blocks, rows, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="attend_chunk",
    )(
        table,
        first,
        end,
        split.reshape(batch, kv_heads, blocks, rows, width),
        *(key_pages,) * _PAGES,
        *(value_pages,) * _PAGES,
    )
    back = mixed.reshape(batch, kv_heads, blocks, group, block, width).transpose(0, 2, 4, 1, 3, 5)
    whole: jax.Array = back.reshape(batch, blocks * block, heads, width)
    return whole[:, :length]
