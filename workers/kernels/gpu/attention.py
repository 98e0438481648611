"""Attention over pages on NVIDIA GPUs.

As a cap bounds the logits, the softmax needs no running maximum (see `xla.paged_attention`): sums over parts of the positions
only have to be added. Each part has `_PART` positions wherever it is computed, and parts are added in their order, so that a
row's bits do not depend on the program.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels import kv_pages
from workers.kernels.gpu.tiles import FEW, addressable
from workers.kernels.kv_pages import Pages, QuantizedPages
from workers.kernels.xla import heads_first
from workers.kernels.xla.paged_attention import SMALLEST
from workers.kernels.xla.rotary import rotate

#: Positions that are added up before they meet others.
_PART = 256
#: Programs that share the past of a sequence that has one new position: so many over all heads.
_SHARE = 64


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
    """As `workers.kernels.xla.portable.attend`, but both kinds of pages are [K, P, page, C]. Products are taken in bfloat16."""
    key_pages, value_pages = heads_first.write(key, value, key_pages, value_pages, table, positions, rope_base)
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = heads // kv_heads
    rotated = rotate(query, positions, rope_base)
    tiled = all(size >= 16 and not size & (size - 1) for size in (width, kv_pages.page_size(value_pages)))
    if not (tiled and addressable(jax.tree.leaves(key_pages)[0])):
        mixed = heads_first.attend(rotated, key_pages, value_pages, table, positions, scale=scale, cap=cap)
        return mixed, key_pages, value_pages
    rotated = rotated.astype(jnp.bfloat16)
    rows = rotated.reshape(batch, length, kv_heads, grouped, width).swapaxes(1, 2)
    rows = rows.reshape(batch, kv_heads, length * grouped, width)
    call = functools.partial(_attend, scale=scale, cap=cap, grouped=grouped, interpret=interpret)
    mixed = call(rows, key_pages, value_pages, table, positions)  # [B, K, T * H/K, C]
    mixed = mixed.reshape(batch, kv_heads, length, grouped, width).swapaxes(1, 2)
    return mixed.reshape(query.shape), key_pages, value_pages


def _attend(
    query: jax.Array,
    keys: Pages,
    values: Pages,
    table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    cap: float,
    grouped: int,
    interpret: bool,
) -> jax.Array:
    """Query [B, K, R, C], R = T * grouped, over pages [K, P, page, C]: [B, K, R, C] bfloat16."""
    batch, kv_heads, rows, width = query.shape
    page, pages = kv_pages.page_size(values), table.shape[1]
    a_part = max(1, _PART // page)
    parts = -(-pages // a_part)
    # One new position leaves most processors idle unless they share its past.
    apart = positions.shape[1] == 1
    share = min(parts, max(1, _SHARE // kv_heads)) if apart else 1
    arrays = [a for kind in (keys, values) for a in jax.tree.leaves(kind)]
    quantized = isinstance(keys, QuantizedPages)

    def kernel(table: Any, positions: Any, query: Any, *refs: Any) -> None:
        row_block, head, one = (pl.program_id(i) for i in range(3))
        sequence, turn = one // share, one % share
        row = row_block * FEW.rows + jnp.arange(FEW.rows, dtype=jnp.int32)
        position = pltriton.load(positions.at[sequence, row // grouped], mask=row < rows, other=-1)  # [FEW.rows]
        last = jnp.max(position)
        own = pl.ds(row_block * FEW.rows, FEW.rows)
        mask = jnp.broadcast_to((row < rows)[:, None], (FEW.rows, width))
        asked = pltriton.load(query.at[sequence, head, own, :], mask=mask, other=0.0)
        key, value = refs[: len(arrays) // 2], refs[len(arrays) // 2 : len(arrays)]

        def over_page(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            weighted, total = sums
            at = table[sequence, i]
            logits = pltriton.dot(asked, key[0][head, at, :, :].astype(jnp.bfloat16).T)  # [FEW.rows, page]
            if quantized:
                logits = logits * key[1][head, at, :][None, :]
            logits = cap * jnp.tanh(logits * (scale / cap))
            visible = i * page + jnp.arange(page) <= position[:, None]
            weights = jnp.where(visible, jnp.exp(logits - cap), 0.0)
            total = total + jnp.sum(weights, axis=1)
            if quantized:
                weights = weights * value[1][head, at, :][None, :]
            mixed = pltriton.dot(weights.astype(jnp.bfloat16), value[0][head, at, :, :].astype(jnp.bfloat16))
            return weighted + mixed, total

        def over_part(part: Any) -> tuple[jax.Array, jax.Array]:
            first = part * a_part
            end = jnp.minimum(first + a_part, last // page + 1)
            zero = (jnp.zeros((FEW.rows, width), jnp.float32), jnp.zeros(FEW.rows, jnp.float32))
            sums: tuple[jax.Array, jax.Array] = lax.fori_loop(first, jnp.maximum(end, first), over_page, zero)
            return sums

        def add(part: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            more = over_part(part)
            return sums[0] + more[0], sums[1] + more[1]

        used = last // (page * a_part) + 1  # parts; 0 for padding
        outs = refs[len(arrays) :]

        if apart:

            def keep(i: Any, _: Any) -> None:
                part = turn + i * share
                weighted, total = over_part(part)
                pltriton.store(outs[0].at[part, sequence, head, own, :], weighted, mask=mask)
                pltriton.store(outs[1].at[part, sequence, head, own], total, mask=row < rows)

            lax.fori_loop(0, jnp.maximum(used - turn + share - 1, 0) // share, keep, None)

        else:
            weighted, total = lax.fori_loop(1, used, add, over_part(0))
            mixed = weighted / jnp.maximum(total, SMALLEST)[:, None]
            pltriton.store(outs[0].at[sequence, head, own, :], mixed.astype(jnp.bfloat16), mask=mask)

    sums = [
        jax.ShapeDtypeStruct((parts, *query.shape), jnp.float32),
        jax.ShapeDtypeStruct((parts, *query.shape[:3]), jnp.float32),
    ]
    found = pl.pallas_call(
        kernel,
        grid=(-(-rows // FEW.rows), kv_heads, batch * share),
        out_shape=sums if apart else [jax.ShapeDtypeStruct(query.shape, jnp.bfloat16)],
        compiler_params=FEW.compiler,
        interpret=interpret,
        name="attend",
    )(table, positions, query, *arrays)
    return _mix(positions[:, 0], found[0], found[1], page * a_part, interpret) if apart else found[0]


def _mix(position: jax.Array, weighted: jax.Array, total: jax.Array, span: int, interpret: bool) -> jax.Array:
    """The parts' sums [parts, B, K, R, C] and [parts, B, K, R], each of `span` positions, as [B, K, R, C] bfloat16."""
    _, batch, kv_heads, rows, width = weighted.shape
    height = pl.next_power_of_2(rows)

    def kernel(position: Any, weighted: Any, total: Any, out: Any) -> None:
        sequence, head, own = pl.program_id(0), pl.program_id(1), pl.ds(0, height)
        inside = jnp.arange(height) < rows
        mask = jnp.broadcast_to(inside[:, None], (height, width))

        def add(part: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            more = pltriton.load(weighted.at[part, sequence, head, own, :], mask=mask, other=0.0)
            return sums[0] + more, sums[1] + pltriton.load(total.at[part, sequence, head, own], mask=inside, other=0.0)

        zero = (jnp.zeros((height, width), jnp.float32), jnp.zeros(height, jnp.float32))
        summed, whole = lax.fori_loop(0, position[sequence] // span + 1, add, zero)
        mixed = summed / jnp.maximum(whole, SMALLEST)[:, None]
        pltriton.store(out.at[sequence, head, own, :], mixed.astype(jnp.bfloat16), mask=mask)

    out: jax.Array = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads),
        out_shape=jax.ShapeDtypeStruct(weighted.shape[1:], jnp.bfloat16),
        compiler_params=FEW.compiler,
        interpret=interpret,
        name="mix",
    )(position, weighted, total)
    return out
