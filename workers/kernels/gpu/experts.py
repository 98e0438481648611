"""The experts' networks: gate, up and their product in one kernel, down in another, the gates and the sum in a third."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels.expert_blocks import sort_rows
from workers.kernels.gpu import tiles
from workers.kernels.gpu.tiles import FEW, Tile
from workers.kernels.weights import Weight, layered
from workers.kernels.xla import portable

#: Within a kernel: references and a block's number -> its expert, and the rows [tile.rows] of x that it takes, M for none.
_Read = Callable[[Any, Any], tuple[Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Which rows each block multiplies with which expert. A block without rows reads nothing.

    Attributes:
      count: blocks.
      arrays: what `read` takes references to.
      read: see `_Read`.
      place: [M, S] int32, which result is a row's and selected expert's, of [count * kept]; -1 for none.
      tile: of a block.
      kept: rows of a block's results.
    """

    count: int
    arrays: tuple[jax.Array, ...]
    read: _Read
    place: jax.Array
    tile: Tile
    kept: int


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
    interpret: bool = False,
) -> jax.Array:
    """As `portable.experts`."""
    if reduce is not None or not all(tiles.fits(layered(weight).stacked) for weight in (gate, up, down)):
        return portable.experts(x, gates, experts, valid, gate, up, down, reduce)
    stacks = [tiles.stack(weight) for weight in (gate, up, down)]
    few = x.shape[0] <= FEW.rows
    blocks = (_blocks_of_all if few else _sorted_blocks)(experts, valid, gate.shape[0])
    hidden = _widen(x, blocks, stacks[0], stacks[1], few, interpret)
    return _sum(_narrow(hidden, blocks, stacks[2], x.shape[0], few, interpret), gates, blocks.place, interpret)


def _blocks_of_all(experts: jax.Array, valid: jax.Array, count: int) -> _Blocks:
    """A block for each expert, of all rows: few are so cheap that sorting them would cost more."""
    rows, selected = experts.shape
    place = jnp.where(valid[:, None], experts * rows + jnp.arange(rows)[:, None], -1)

    def read(refs: Any, block: Any) -> tuple[Any, jax.Array]:
        row = jnp.arange(FEW.rows, dtype=jnp.int32)
        own = jnp.full(FEW.rows, rows, jnp.int32)
        for i in map(jnp.int32, range(selected)):
            found = pltriton.load(refs[0].at[pl.ds(0, FEW.rows), i], mask=row < rows, other=-1)
            own = jnp.where(found == block * rows + row, row, own)
        return block, own

    return _Blocks(count, (place,), read, place, FEW, rows)


def _sorted_blocks(experts: jax.Array, valid: jax.Array, count: int) -> _Blocks:
    """As many blocks for each expert as its rows fill."""
    rows, selected = experts.shape
    tile = tiles.tile_of(rows)
    blocks = sort_rows(experts, valid, count, tile.rows)
    places = blocks.count * tile.rows
    place = blocks.place.reshape(-1)
    row = jnp.full(places, rows, jnp.int32)
    row = row.at[jnp.where(place < 0, places, place)].set(
        jnp.arange(rows * selected, dtype=jnp.int32) // selected, mode="drop"
    )

    def read(refs: Any, block: Any) -> tuple[Any, jax.Array]:
        return refs[0][block], refs[1][block, :]

    arrays = (blocks.owner, row.reshape(-1, tile.rows))
    return _Blocks(blocks.count, arrays, read, blocks.place, tile, tile.rows)


def _widen(
    x: jax.Array, blocks: _Blocks, gate: tiles.Stack, up: tiles.Stack, apart: bool, interpret: bool
) -> jax.Array:
    """gelu(gate(x)) * up(x): [B * R, F] bfloat16. Rows that are none of a block's hold anything."""
    tile = blocks.tile
    width, lead, depth = gate.values.shape[2], len(blocks.arrays), x.shape[1]
    group_rows = (gate.group_rows, up.group_rows)
    parts = min(_parts(stack, depth, blocks) for stack in (gate, up))
    shared = parts if apart else 1
    whole = shared == 1
    rows = blocks.count * tile.rows

    def kernel(first: Any, *refs: Any) -> None:
        strip, block, part = (pl.program_id(i) for i in range(3))
        expert, own = blocks.read(refs[:lead], block)
        x, *weights = refs[lead : lead + 1 + len(gate.arrays) + len(up.arrays)]
        columns, target = pl.ds(strip * tile.columns, tile.columns), pl.ds(block * tile.rows, tile.rows)

        @pl.when(jnp.min(own) < x.shape[0])
        def _() -> None:
            stacks = (tuple(weights[: len(gate.arrays)]), tuple(weights[len(gate.arrays) :]))

            def product(part: Any) -> tuple[jax.Array, ...]:
                start, matrix = part * (depth // parts), first[0] + expert
                return tiles.products(
                    x, own, stacks, matrix, strip * tile.columns, tile, group_rows, start, depth // parts
                )

            gated, lifted = product(part) if apart else tiles.added(product, parts)
            mask = jnp.broadcast_to((own < x.shape[0])[:, None], gated.shape)
            if whole:
                pltriton.store(refs[-1].at[target, columns], _activated(gated, lifted), mask=mask)
            else:
                kept = pl.ds(block * blocks.kept, tile.rows)
                pltriton.store(refs[-2].at[part, kept, columns], gated, mask=mask)
                pltriton.store(refs[-1].at[part, kept, columns], lifted, mask=mask)

    sums = jax.ShapeDtypeStruct((shared, blocks.count * blocks.kept, width), jnp.float32)
    hidden = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    found = pl.pallas_call(
        kernel,
        grid=(width // tile.columns, blocks.count, shared),
        out_shape=[hidden] if whole else [sums, sums],
        compiler_params=tile.compiler,
        interpret=interpret,
        name="experts_up",
    )(gate.first.reshape(1), *blocks.arrays, x, *gate.arrays, *up.arrays)
    return found[0] if whole else _activate(found[0], found[1], blocks, x.shape[0], interpret)


def _parts(stack: tiles.Stack, depth: int, blocks: _Blocks) -> int:
    """In how many parts a product's depth is added up; at least the selected experts' programs run."""
    strips = stack.values.shape[2] // FEW.columns
    return tiles.splits(depth, strips * blocks.place.shape[1], (stack,))


def _activated(gated: jax.Array, lifted: jax.Array) -> jax.Array:
    return (jax.nn.gelu(gated, approximate=True) * lifted).astype(jnp.bfloat16)


def _activate(gated: jax.Array, lifted: jax.Array, blocks: _Blocks, rows: int, interpret: bool) -> jax.Array:
    """gelu(gated) * lifted, added over the parts of [parts, B * kept, F]: [B * R, F] bfloat16, in the rows that are used."""
    parts, _, width = gated.shape
    selected = blocks.place.shape[1]
    step = _step(width)

    def kernel(place: Any, gated: Any, lifted: Any, hidden: Any) -> None:
        at, columns = place[pl.program_id(0), pl.program_id(1)], pl.ds(pl.program_id(2) * step, step)

        @pl.when(at >= 0)
        def _() -> None:
            sums = (functools.reduce(jnp.add, [kind[i, at, columns] for i in range(parts)]) for kind in (gated, lifted))
            hidden[at // rows * FEW.rows + at % rows, columns] = _activated(*sums)

    hidden: jax.Array = pl.pallas_call(
        kernel,
        grid=(rows, selected, width // step),
        out_shape=jax.ShapeDtypeStruct((blocks.count * FEW.rows, width), jnp.bfloat16),
        compiler_params=FEW.compiler,
        interpret=interpret,
        name="experts_activate",
    )(blocks.place, gated, lifted)
    return hidden


def _step(width: int) -> int:
    """Columns of a row that one program takes."""
    return next(size for size in (2048, 1024, 512, 256, 128) if width % size == 0)


def _narrow(
    hidden: jax.Array, blocks: _Blocks, down: tiles.Stack, rows: int, apart: bool, interpret: bool
) -> jax.Array:
    """down(hidden): [parts, B * kept, D] float32; one part, to which all others were added, unless `apart`."""
    tile = blocks.tile
    depth, width, lead = hidden.shape[1], down.values.shape[2], len(blocks.arrays)
    parts = _parts(down, depth, blocks)
    shared = parts if apart else 1

    def kernel(first: Any, *refs: Any) -> None:
        strip, block, part = (pl.program_id(i) for i in range(3))
        expert, own = blocks.read(refs[:lead], block)
        hidden, *weights = refs[lead:-1]
        columns, used = pl.ds(strip * tile.columns, tile.columns), own < rows

        @pl.when(jnp.min(own) < rows)
        def _() -> None:
            place = jnp.arange(tile.rows, dtype=jnp.int32)
            source = jnp.where(used, block * tile.rows + place, hidden.shape[0])

            def product(part: Any) -> tuple[jax.Array, ...]:
                start, matrix = part * (depth // parts), first[0] + expert
                return tiles.products(
                    hidden,
                    source,
                    (tuple(weights),),
                    matrix,
                    strip * tile.columns,
                    tile,
                    (down.group_rows,),
                    start,
                    depth // parts,
                )

            (total,) = product(part) if apart else tiles.added(product, parts)
            target = pl.ds(block * blocks.kept, tile.rows)
            pltriton.store(refs[-1].at[part, target, columns], total, mask=jnp.broadcast_to(used[:, None], total.shape))

    out: jax.Array = pl.pallas_call(
        kernel,
        grid=(width // tile.columns, blocks.count, shared),
        out_shape=jax.ShapeDtypeStruct((shared, blocks.count * blocks.kept, width), jnp.float32),
        compiler_params=tile.compiler,
        interpret=interpret,
        name="experts_down",
    )(down.first.reshape(1), *blocks.arrays, hidden, *down.arrays)
    return out


def _sum(results: jax.Array, gates: jax.Array, place: jax.Array, interpret: bool) -> jax.Array:
    """[M, D] float32: a row's results, each the sum of all parts, times their gates.

    Products are selected before they are added: else the compiler may round both at once, in one kernel and not in another.
    """
    (rows, selected), (parts, _, width) = place.shape, results.shape
    step = _step(width)

    def kernel(place: Any, gates: Any, results: Any, out: Any) -> None:
        row, columns = pl.program_id(0), pl.ds(pl.program_id(1) * step, step)

        def result(i: int) -> jax.Array:
            at = place[row, i]
            found = functools.reduce(jnp.add, [results[part, jnp.maximum(at, 0), columns] for part in range(parts)])
            return jnp.where(at >= 0, found * gates[row, i], 0.0)

        out[row, columns] = functools.reduce(jnp.add, [result(i) for i in range(selected)])

    out: jax.Array = pl.pallas_call(
        kernel,
        grid=(rows, width // step),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=FEW.compiler,
        interpret=interpret,
        name="experts_sum",
    )(place, gates, results)
    return out
