"""Attention over pages on NVIDIA GPUs.

As a cap bounds the logits, the softmax needs no running maximum (see `xla.paged_attention`): sums over parts of the positions
only have to be added. Each part has `_PART` positions wherever it is computed, and parts are added in their order, so that a
row's bits do not depend on the program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels import kv_pages
from workers.kernels.gpu.tiles import FEW, addressable
from workers.kernels.kv_pages import Pages
from workers.kernels.xla import heads_first
from workers.kernels.xla.paged_attention import SMALLEST
from workers.kernels.xla.rotary import rotate

#: Positions that are added up before they meet others.
_PART = 256
#: [R, C] and [R] float32.
_Sums = tuple[jax.Array, jax.Array]
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
    if not fits_pages(value_pages):
        mixed = heads_first.attend(rotated, key_pages, value_pages, table, positions, scale=scale, cap=cap)
        return mixed, key_pages, value_pages
    rotated = rotated.astype(jnp.bfloat16)
    rows = rotated.reshape(batch, length, kv_heads, grouped, width).swapaxes(1, 2)
    rows = rows.reshape(batch, kv_heads, length * grouped, width)
    a_part = max(1, _PART // kv_pages.page_size(value_pages))
    share = max(1, _SHARE // kv_heads) if length == 1 else 0
    form = _Form(grouped, kv_pages.page_size(value_pages), a_part, min(share, -(-table.shape[1] // a_part)), scale, cap)
    mixed = _attend(form, rows, key_pages, value_pages, table, positions, interpret)  # [B, K, T * H/K, C]
    mixed = mixed.reshape(batch, kv_heads, length, grouped, width).swapaxes(1, 2)
    return mixed.reshape(query.shape), key_pages, value_pages


def fits_pages(pages: Pages) -> bool:
    """Whether `attend` reads pages [K, P, page, C] itself."""
    values = jax.tree.leaves(pages)[0]
    return all(size >= 16 and not size & (size - 1) for size in values.shape[2:]) and addressable(values)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How attention is computed.

    Attributes:
      grouped: query heads of a key's head.
      page: positions of a page.
      a_part: pages of a part.
      share: programs that share the past of a sequence, each part's sums apart; 0 if one adds up all of them.
      scale, cap: of the logits.
    """

    grouped: int
    page: int
    a_part: int
    share: int
    scale: float
    cap: float


def _attend(
    form: _Form, query: jax.Array, keys: Pages, values: Pages, table: jax.Array, positions: jax.Array, interpret: bool
) -> jax.Array:
    """Query [B, K, R, C], R = T * grouped, over pages [K, P, page, C]: [B, K, R, C] bfloat16."""
    batch, kv_heads, rows, _ = query.shape
    parts = -(-table.shape[1] // form.a_part)
    sums = [
        jax.ShapeDtypeStruct((parts, *query.shape), jnp.float32),
        jax.ShapeDtypeStruct((parts, *query.shape[:3]), jnp.float32),
    ]
    found = pl.pallas_call(
        functools.partial(_attend_block, form),
        grid=(-(-rows // FEW.rows), kv_heads, batch * max(1, form.share)),
        out_shape=sums if form.share else [jax.ShapeDtypeStruct(query.shape, jnp.bfloat16)],
        compiler_params=FEW.compiler,
        interpret=interpret,
        name="attend",
    )(table, positions, query, *jax.tree.leaves((keys, values)))
    one: jax.Array = found[0]
    return _mix(positions[:, 0], one, found[1], form.page * form.a_part, interpret) if form.share else one


def _attend_block(form: _Form, table: Any, positions: Any, query: Any, *refs: Any) -> None:
    """The kernel: a block of rows of one sequence and head, over its whole past or every `share`th part of it."""
    quantized = len(refs) - (2 if form.share else 1) == 4
    kinds = 2 if quantized else 1
    key, value, outs = refs[:kinds], refs[kinds : 2 * kinds], refs[2 * kinds :]
    _, _, rows, width = query.shape
    block, head, one = (pl.program_id(i) for i in range(3))
    sequence, turn = (one // form.share, one % form.share) if form.share else (one, 0)
    row, own = block * FEW.rows + jnp.arange(FEW.rows, dtype=jnp.int32), pl.ds(block * FEW.rows, FEW.rows)
    mask = jnp.broadcast_to((row < rows)[:, None], (FEW.rows, width))
    position = pltriton.load(positions.at[sequence, row // form.grouped], mask=row < rows, other=-1)  # [FEW.rows]
    asked = pltriton.load(query.at[sequence, head, own, :], mask=mask, other=0.0)
    last = jnp.max(position)

    def read(i: Any) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        at = table[sequence, i]
        keys, values = (
            (kind[0][head, at, :, :].astype(jnp.bfloat16), *((kind[1][head, at, :],) if quantized else ()))
            for kind in (key, value)
        )
        return keys, values

    def sums(part: Any) -> _Sums:
        first = part * form.a_part
        end = jnp.minimum(first + form.a_part, last // form.page + 1)
        return _sums_over(form, first, jnp.maximum(end, first), position, asked, read)

    used = last // (form.page * form.a_part) + 1  # parts; 0 for padding
    if form.share:

        def keep(i: Any, _: Any) -> None:
            part = turn + i * form.share
            weighted, total = sums(part)
            pltriton.store(outs[0].at[part, sequence, head, own, :], weighted, mask=mask)
            pltriton.store(outs[1].at[part, sequence, head, own], total, mask=row < rows)

        lax.fori_loop(0, jnp.maximum(used - turn + form.share - 1, 0) // form.share, keep, None)
        return

    def add(part: Any, before: _Sums) -> _Sums:
        weighted, total = sums(part)
        return before[0] + weighted, before[1] + total

    weighted, total = lax.fori_loop(1, used, add, sums(0))
    mixed = weighted / jnp.maximum(total, SMALLEST)[:, None]
    pltriton.store(outs[0].at[sequence, head, own, :], mixed.astype(jnp.bfloat16), mask=mask)


def _sums_over(form: _Form, first: Any, end: Any, position: jax.Array, asked: jax.Array, read: Any) -> _Sums:
    """Sums of weighted values and of weights over some pages, which `read` gives as bfloat16 and, perhaps, their scales."""

    def over_page(i: Any, sums: _Sums) -> _Sums:
        keys, values = read(i)
        logits = pltriton.dot(asked, keys[0].T)  # [FEW.rows, page]
        if len(keys) > 1:
            logits = logits * keys[1][None, :]
        logits = form.cap * jnp.tanh(logits * (form.scale / form.cap))
        visible = i * form.page + jnp.arange(form.page) <= position[:, None]
        weights = jnp.where(visible, jnp.exp(logits - form.cap), 0.0)
        total = sums[1] + jnp.sum(weights, axis=1)
        if len(values) > 1:
            weights = weights * values[1][None, :]
        return sums[0] + pltriton.dot(weights.astype(jnp.bfloat16), values[0]), total

    zero = (jnp.zeros(asked.shape, jnp.float32), jnp.zeros(asked.shape[0], jnp.float32))
    found: _Sums = lax.fori_loop(first, end, over_page, zero)
    return found


def _mix(position: jax.Array, weighted: jax.Array, total: jax.Array, span: int, interpret: bool) -> jax.Array:
    """The parts' sums [parts, B, K, R, C] and [parts, B, K, R], each of `span` positions, as [B, K, R, C] bfloat16."""
    _, batch, kv_heads, rows, width = weighted.shape
    height = pl.next_power_of_2(rows)

    def kernel(position: Any, weighted: Any, total: Any, out: Any) -> None:
        sequence, head, own = pl.program_id(0), pl.program_id(1), pl.ds(0, height)
        inside = jnp.arange(height) < rows
        mask = jnp.broadcast_to(inside[:, None], (height, width))

        def add(part: Any, sums: _Sums) -> _Sums:
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
