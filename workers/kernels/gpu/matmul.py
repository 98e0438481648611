"""Matrix products of all rows: attention's projections and the logits."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels.gpu import tiles
from workers.kernels.gpu.tiles import FEW, Tile
from workers.kernels.weights import Weight, layered
from workers.kernels.xla import portable


def project(
    x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...], *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """As `portable.project`, all weights in one kernel."""
    if not all(tiles.fits(layered(weight).stacked) for weight in weights):
        return portable.project(x, valid, weights)
    stacks = tuple(tiles.stack(weight) for weight in weights)
    rows, depth = x.shape
    tile = tiles.tile_of(rows)
    widths = [stack.values.shape[2] for stack in stacks]
    ends = list(itertools.accumulate(width // tile.columns for width in widths))
    parts = tiles.splits(depth, sum(widths) // FEW.columns, stacks)
    # With few rows, programs share the depth. With many, each adds up the same parts in the same order.
    apart = tile is FEW
    lead = parts if apart else 1
    kernel = functools.partial(
        _project,
        ends=ends,
        parts=parts,
        apart=apart,
        tile=tile,
        lengths=[len(stack.arrays) for stack in stacks],
        group_rows=[stack.group_rows for stack in stacks],
    )
    out = pl.pallas_call(
        kernel,
        grid=(ends[-1], lead, -(-rows // tile.rows)),
        out_shape=[jax.ShapeDtypeStruct((lead, rows, width), jnp.float32) for width in widths],
        compiler_params=tile.compiler,
        interpret=interpret,
        name="project",
    )(
        jnp.stack([stack.first for stack in stacks]),
        x,
        *(array for stack in stacks for array in stack.arrays),
    )
    return tuple(functools.reduce(jnp.add, product) for product in out)


def _project(
    first: Any,
    x: Any,
    *refs: Any,
    ends: list[int],
    parts: int,
    apart: bool,
    tile: Tile,
    lengths: list[int],
    group_rows: list[int],
) -> None:
    strip, part, block = (pl.program_id(i) for i in range(3))
    row = block * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    arrays, outs = iter(refs[: sum(lengths)]), refs[sum(lengths) :]
    depth = x.shape[1] // parts
    for i, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        stack = tuple(itertools.islice(arrays, lengths[i]))

        @pl.when((strip >= begin) & (strip < end))
        def _(i: int = i, begin: int = begin, stack: tuple[Any, ...] = stack) -> None:
            column = (strip - begin) * tile.columns

            def product(part: Any) -> tuple[jax.Array, ...]:
                return tiles.products(x, row, (stack,), first[i], column, tile, (group_rows[i],), part * depth, depth)

            (total,) = product(part) if apart else tiles.added(product, parts)
            valid = jnp.broadcast_to((row < x.shape[0])[:, None], total.shape)
            pltriton.store(
                outs[i].at[part, pl.ds(block * tile.rows, tile.rows), pl.ds(column, tile.columns)], total, mask=valid
            )


def fits_table(table: Any) -> bool:
    """Whether `logits` takes a table itself."""
    fits: bool = table.shape[0] % FEW.columns == 0 and table.shape[1] % 128 == 0 and table.dtype == jnp.bfloat16
    return fits


def logits(hidden: jax.Array, valid: jax.Array, table: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As `portable.logits`."""
    rows, tile = hidden.shape[0], FEW
    if not fits_table(table):
        return portable.logits(hidden, valid, table)
    out: jax.Array = pl.pallas_call(
        functools.partial(_logits, tile=tile),
        grid=(table.shape[0] // tile.columns, -(-rows // tile.rows)),
        out_shape=jax.ShapeDtypeStruct((rows, table.shape[0]), jnp.float32),
        compiler_params=tile.compiler,
        interpret=interpret,
        name="logits",
    )(hidden, table)
    return out


def _logits(hidden: Any, table: Any, out: Any, *, tile: Tile) -> None:
    strip, block = pl.program_id(0), pl.program_id(1)
    row = block * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    columns = pl.ds(strip * tile.columns, tile.columns)
    valid = (row < hidden.shape[0])[:, None]
    own = pl.ds(block * tile.rows, tile.rows)

    def turn(i: Any, total: jax.Array) -> Any:
        span = pl.ds(i * 128, 128)
        x = pltriton.load(hidden.at[own, span], mask=jnp.broadcast_to(valid, (tile.rows, 128)), other=0.0)
        return total + pltriton.dot(x.astype(jnp.bfloat16), table[columns, span].T)

    total = lax.fori_loop(0, hidden.shape[1] // 128, turn, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    pltriton.store(out.at[own, columns], total, mask=jnp.broadcast_to(valid, total.shape))
