"""What the GPU kernels share: tiles of weights that are widened on their way to the tensor cores.

Every kernel multiplies by one instruction, along the depth in one order, and adds what it split in one order. So a row's bits
do not depend on how many rows stand beside it, nor on the program that computes it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels.weights import PairedWeight, QuantizedWeight, Weight, layered

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program multiplies at a time.

    Attributes:
      rows: of x, that share one reading of the weights: whole heights of Hopper's matrix instruction.
      columns: of a weight.
      warps, stages: of the program, and of its loads ahead. More stages leave a multiprocessor room for fewer programs.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def compiler(self) -> pltriton.CompilerParams:
        return pltriton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


#: Measured on an H100, where both give the same bits: each row is multiplied by the same instructions in the same order.
FEW = Tile(64, 64, 4, 3)
MANY = Tile(128, 64, 8, 3)
#: Rows of a weight that a program takes at a time, the most that fit.
_DEPTHS = (128, 64, 32)
#: Fewest programs that keep all multiprocessors reading.
PROGRAMS = 256


def tile_of(rows: int) -> Tile:
    """That for so many rows of x. Up to two small tiles: experts share the rows out, and few get more than one block."""
    return FEW if rows <= 2 * FEW.rows else MANY


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices [G, K, N] of which a kernel reads some, where they lie.

    Attributes:
      values: [G, K, N]; of 4-bit values [G, K / 2, N], see `PairedWeight`.
      scales: [G, S, N] of 8- and 4-bit values, else none.
      first: the first matrix that is meant.
      paired: whether values have 4 bits.
    """

    values: jax.Array
    scales: jax.Array | None
    first: jax.Array
    paired: bool = False

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)

    @property
    def group_rows(self) -> int:
        """Rows that share a scale; all where there are no scales."""
        depth: int = self.values.shape[1] * (1 + self.paired)
        return depth if self.scales is None else depth // self.scales.shape[1]

    @property
    def least(self) -> int:
        """Fewest rows of a tile: a whole group of 4-bit values, whose halves share bytes."""
        return _DEPTHS[0] if self.paired else _DEPTHS[-1]


def stack(weight: Weight) -> Stack:
    """A weight [K, N] or [G, K, N], perhaps one layer's of many, as a stack."""
    own = layered(weight)
    every = own.stacked
    values, scales = (None if a is None else a.reshape(-1, *a.shape[-2:]) for a in arrays_of(every))
    assert values is not None
    return Stack(values, scales, own.layer * math.prod(own.shape[:-2]), isinstance(every, PairedWeight))


def arrays_of(weight: Any) -> tuple[Any, Any | None]:
    """Values, and scales if it has some."""
    if isinstance(weight, PairedWeight):
        return weight.pairs, weight.scales
    return (weight.weight, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)


def addressable(array: jax.Array) -> bool:
    """Whether Pallas computes an array's addresses right: it takes 32-bit offsets up to 4 GiB, and from 2 Gi elements on their
    sign makes them negative."""
    right = array.size < 2**31 or array.size * array.dtype.itemsize > 2**32
    if not right:
        _LOG.warning(
            "plain XLA, which is slower, reads an array of %.1f GiB of bytes: 2 to 4 GiB are too many",
            array.size / 2**30,
        )
    return right


def fits(weight: Any) -> bool:
    """Whether the kernels can read a weight [..., K, N] that lies so: 4 bits, bytes or bfloat16, in whole tiles."""
    values, scales = arrays_of(weight)
    depth, columns = weight.shape[-2:]
    group_rows = depth if scales is None else depth // scales.shape[-2]
    kinds = (jnp.bfloat16,) if scales is None else (jnp.int8,)
    whole = columns % 128 == 0 and depth % 32 == 0 and group_rows % 32 == 0
    if isinstance(weight, PairedWeight):
        whole = whole and group_rows == _DEPTHS[0]
    return values.dtype in kinds and whole and addressable(values)


def splits(depth: int, programs: int, stacks: Sequence[Stack]) -> int:
    """In how many parts a product's depth is added up, so that enough programs run. Never depends on the rows of x."""
    parts = 1
    while programs * parts < PROGRAMS and parts < 8 and depth % (2 * parts) == 0:
        if any(tile_depth(depth // (2 * parts), stack.group_rows) < stack.least for stack in stacks):
            break
        parts *= 2
    return parts


def tile_depth(depth: int, group_rows: int) -> int:
    """Rows of a tile, whole in a part of `depth` and in a group of scales; 0 if there are none."""
    return next((rows for rows in _DEPTHS if depth % rows == 0 and group_rows % rows == 0), 0)


def widen(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """A tile in bfloat16; 8-bit values times scales are rounded to it, as in `dequantize`: that is part of the model."""
    if scales is None:
        return values.astype(jnp.bfloat16)
    if scales.dtype == jnp.bfloat16:  # one rounding of the exact product, and no detour
        return values.astype(jnp.bfloat16) * scales
    return (values.astype(jnp.float32) * scales.astype(jnp.float32)).astype(jnp.bfloat16)


def _halves(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values of a `PairedWeight`'s bytes in bfloat16, which has them exactly: fewer instructions than shifts of bytes."""
    low = (pairs & 15).astype(jnp.bfloat16)
    return low - 8, (pairs.astype(jnp.bfloat16) - low) * 0.0625


def products(
    x: Any,
    row: jax.Array,
    stacks: tuple[tuple[Any, ...], ...],
    matrix: Any,
    column: Any,
    tile: Tile,
    group_rows: tuple[int, ...],
    start: Any,
    depth: int,
) -> tuple[jax.Array, ...]:
    """Within a kernel: rows of x times the same columns of some matrices, summed from `start` over `depth`.

    Args:
      x: reference [M, K].
      row: [tile.rows] int32, which rows; those beyond M are zeros.
      stacks: references to each one's values and, perhaps, scales.
      matrix: which of each stack.
      column: the first of tile.columns.
      group_rows: of each stack.

    Returns:
      [tile.rows, tile.columns] float32 each.
    """
    step = min(tile_depth(depth, rows) for rows in group_rows)
    columns = pl.ds(column, tile.columns)
    paired = stacks[0][0].shape[1] < x.shape[1]
    height = step // 2 if paired else step
    valid = jnp.broadcast_to((row < x.shape[0])[:, None], (tile.rows, height))

    def turn(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = start + i * step
        taken = []
        for begin in range(0, step, height):
            place = (row[:, None], (at + begin + jnp.arange(height))[None, :])
            taken.append(pltriton.load(x.at[place], mask=valid, other=0.0).astype(jnp.bfloat16))
        added = []
        for total, refs, rows in zip(sums, stacks, group_rows, strict=True):
            scales = refs[1][matrix, at // rows, columns][None, :] if len(refs) > 1 else None
            tile = refs[0][matrix, pl.ds(at * height // step, height), columns]
            for some, values in zip(taken, _halves(tile) if paired else (tile,), strict=True):
                total = total + pltriton.dot(some, widen(values, scales))
            added.append(total)
        return tuple(added)

    zero = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    found: tuple[jax.Array, ...] = lax.fori_loop(0, depth // step, turn, (zero,) * len(stacks))
    return found


def added(product: Callable[[Any], tuple[jax.Array, ...]], parts: int) -> tuple[jax.Array, ...]:
    """Within a kernel: the sums of all parts' products, added as `functools.reduce` does."""

    def add(i: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(total + more for total, more in zip(totals, product(i), strict=True))

    totals: tuple[jax.Array, ...] = lax.fori_loop(1, parts, add, product(0))
    return totals
