"""Products of blocks of rows with 8-bit weights on TPUs: weights cross from memory as they are stored, and are widened on the
way to the matrix unit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from workers.kernels.weights import LayerWeight, QuantizedWeight, Weight, layered
from workers.kernels.xla import portable

#: Rows of a weight's tile at most, and its columns: what is widened of it at a time must fit beside the next tile.
_DEPTH, _COLUMNS = 2048, (512, 256, 128)
#: Fewest and most rows of x that share one reading of a tile; 16 rows of bfloat16 are the least that fill a register.
FEWEST, MOST = 16, 256
#: So many rows' sums cost less to scale than a group's values.
_SCALED_LATER = 64
#: Rows of a register of 32-bit words.
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels are made for.

    Attributes:
      widens: whether the chip widens what lies in bytes at the speed of memory. Else words of 32 bits are shifted: on v4 that
        takes 0.4 of the time.
      interpret: whether they are interpreted, without a TPU.
    """

    widens: bool = True
    interpret: bool = False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which matrix of a layer each block of rows is multiplied with.

    Attributes:
      owner: [B] int32, the matrix.
      active: [] int32, at least 1: only so many of the first blocks are computed.
      rows: of a block.
    """

    owner: jax.Array
    active: jax.Array
    rows: int


def rows_of_block(rows: int) -> int:
    """The least number of rows that a block may have to take so many."""
    return -(-rows // FEWEST) * FEWEST


def multiply(
    x: jax.Array,
    weights: tuple[LayerWeight, ...],
    blocks: Blocks,
    finish: Callable[..., jax.Array],
    dtype: jnp.dtype | type,
    factors: jax.Array | None = None,
    *,
    target: Target,
) -> jax.Array:
    """`finish` of the products of each block of rows with its matrices: one of each weight.

    Args:
      x: [B * rows, K], or [rows, K] of which all blocks take all.
      weights: [G, K, N] each, of one layer and one shape, `QuantizedWeight`s with scales of one shape.
      blocks: see `Blocks`.
      finish: of as many float32 [rows, n] as there are weights.
      dtype: of the result.
      factors: [B, rows, 1] float32: all blocks' results, each times its factors, are added up. Where a factor is 0 the result
        does not count.

    Returns:
      [B * rows, N], anything in blocks that are not active; or [rows, N] with `factors`.
    """
    stacks = [cast(QuantizedWeight, weight.stacked) for weight in weights]
    tile = _Tile.of(stacks[0], target)
    _, groups, _, columns = stacks[0].shape
    shared, count = x.shape[0] == blocks.rows, blocks.owner.shape[0]
    in_specs = [pl.BlockSpec((blocks.rows, tile.depth), lambda _n, b, k, *_: (0 if shared else b, k))]
    operands = [tile.ordered(x)]
    for own in stacks:
        in_specs += tile.specs(groups)
        operands += tile.operands(own, target.interpret)
    if factors is not None:
        in_specs.append(pl.BlockSpec((1, blocks.rows, 1), lambda _n, b, _k, *_: (b, 0, 0)))
        operands.append(factors)
    strip = (blocks.rows, tile.columns)
    out_rows = blocks.rows * (1 if factors is not None else count)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(columns // tile.columns, blocks.active, tile.turns),
        in_specs=in_specs,
        out_specs=pl.BlockSpec(strip, lambda n, b, _k, *_: (b if factors is None else 0, n)),
        scratch_shapes=[pltpu.VMEM(strip, jnp.float32) for _ in stacks],
    )
    call = pl.pallas_call(
        functools.partial(_kernel, tile=tile, products=len(stacks), finish=finish, added=factors is not None),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((out_rows, columns), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=target.interpret,
    )
    result: jax.Array = call(weights[0].layer * groups + blocks.owner, *operands)
    return result


@dataclasses.dataclass(frozen=True)
class _Tile:
    """How a stack of matrices [L, G, K, N] is cut.

    Attributes:
      depth, columns: of a tile.
      turns: tiles of a matrix's depth.
      groups: groups of rows with a scale of their own in a tile; one where a group has several tiles.
      tiles_a_scale: tiles that have the same scales.
      whole: whether a tile's scales are all of the matrix, or whole registers of them. Single ones must be a dimension of
        their own, which XLA copies.
      parts: values of a word, which are rows of a matrix, where words are shifted; else one.
    """

    depth: int
    columns: int
    turns: int
    groups: int
    tiles_a_scale: int
    whole: bool
    parts: int

    @classmethod
    def of(cls, weight: QuantizedWeight, target: Target) -> _Tile:
        _, _, depth, columns = weight.shape
        scale_groups = weight.scales.shape[-2]
        group_rows = depth // scale_groups
        rows = _divisor(depth, group_rows)
        turns, groups = depth // rows, max(1, rows // group_rows)
        parts = 4 if weight.weight.dtype == jnp.int8 else 8
        return cls(
            rows,
            next((size for size in _COLUMNS if columns % size == 0), columns),
            turns,
            groups,
            turns * groups // scale_groups,
            groups == scale_groups or groups % FEWEST == 0,
            1 if target.widens or rows // groups % (parts * _SUBLANES) else parts,
        )

    def specs(self, matrices: int) -> list[pl.BlockSpec]:
        """Of values and scales, whose matrices are counted over all layers, `matrices` in each."""
        single = () if self.whole else (1,)

        def values_at(n: Any, b: Any, k: Any, owner: Any) -> Any:
            return owner[b], k, n

        def scales_at(n: Any, b: Any, k: Any, owner: Any) -> Any:
            return owner[b] // matrices, owner[b] % matrices, k // self.tiles_a_scale, *(0 for _ in single), n

        return [
            pl.BlockSpec((1, self.depth, self.columns), values_at),
            pl.BlockSpec((1, 1, self.groups, *single, self.columns), scales_at),
        ]

    def operands(self, weight: QuantizedWeight, interpret: bool) -> list[jax.Array]:
        """Values [L * G, K, N], and scales in their own shape: in another they would lie otherwise in memory, and XLA would lay
        out those of all layers anew in every layer."""
        values = weight.weight.reshape(-1, *weight.shape[2:])
        if not interpret:  # else XLA fetches the small stacks of all layers to the chip in every layer
            values = pltpu.with_memory_space_constraint(values, pltpu.MemorySpace.HBM)
        return [values, weight.scales if self.whole else weight.scales[..., None, :]]

    def ordered(self, x: jax.Array) -> jax.Array:
        """x [M, K], its columns in the order of the rows that `_values` gives."""
        if self.parts == 1:
            return x
        apart = x.reshape(len(x), -1, self.depth // self.groups // self.parts, self.parts)
        return apart.swapaxes(2, 3).reshape(x.shape)

    def add_product(self, total: Any, x: Any, values: Any, scales: Any) -> None:
        """Adds x [rows, depth] times a tile to `total`.

        Each group of rows is a product of its own: what comes of a reshape is packed once more, a third of all instructions.
        Values of 4 bits are none of xAI's, so nothing asks for their rounding: a few rows' sums are scaled instead of them.
        """
        factors = scales[0, 0].reshape(self.groups, self.columns).astype(jnp.float32)
        size = self.depth // self.groups
        later = values.dtype == jnp.int4 and x.shape[0] <= _SCALED_LATER
        for group in range(self.groups):
            rows = slice(group * size, (group + 1) * size)
            matrix = self._values(values[0, rows])
            if not later:
                matrix *= factors[group]
            # Scaled values are rounded to bfloat16 as in `dequantize`: that is part of the model.
            matrix = matrix.astype(jnp.bfloat16).astype(x.dtype)
            product = jnp.dot(x[:, rows], matrix, preferred_element_type=jnp.float32)
            total[...] += product * factors[group] if later else product

    def _values(self, stored: Any) -> Any:
        """Values [K, N] in float32. Where words are shifted: first each word's first value, then each's second."""
        if self.parts == 1:
            return stored.astype(jnp.float32)
        words, bits = pltpu.bitcast(stored, jnp.int32), 32 // self.parts
        parts = [(words << (32 - bits - bits * i)) >> (32 - bits) for i in range(self.parts)]
        return jnp.concatenate([part.astype(jnp.float32) for part in parts])


def _kernel(
    _owner: Any, x: Any, *refs: Any, tile: _Tile, products: int, finish: Callable[..., jax.Array], added: bool
) -> None:
    """Adds one tile's products to their totals, and finishes them after the last tile of the depth."""
    weights, (*factors, out), totals = refs[: 2 * products], refs[2 * products : -products], refs[-products:]
    b, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)

    for i, total in enumerate(totals):
        tile.add_product(total, x, *weights[2 * i : 2 * i + 2])

    def clear() -> None:
        out[...] = jnp.zeros_like(out)

    if added:
        pl.when((b == 0) & (k == 0))(clear)

    @pl.when(k == tile.turns - 1)
    def _() -> None:
        result = finish(*(total[...] for total in totals))
        if added:
            (factor,) = factors
            out[...] += jnp.where(factor[0] != 0.0, result * factor[0], 0.0)
        else:
            out[...] = result.astype(out.dtype)


def project(x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...], *, target: Target) -> tuple[jax.Array, ...]:
    """As `workers.kernels.xla.portable.project`."""
    return tuple(_product(x, valid, weight, target) for weight in weights)


def _product(x: jax.Array, valid: jax.Array, weight: Weight, target: Target) -> jax.Array:
    own, rows = layered(weight), x.shape[0]
    if not isinstance(own.stacked, QuantizedWeight):
        return portable.project(x, valid, (weight,))[0]
    block = min(rows_of_block(rows), MOST)
    count = -(-rows // block)
    blocks = Blocks(jnp.zeros(count, jnp.int32), jnp.int32(count), block)
    padded = jnp.pad(x, ((0, count * block - rows), (0, 0)))
    group = LayerWeight(jax.tree.map(lambda leaf: leaf[:, None], own.stacked), own.layer)
    return multiply(padded, (group,), blocks, same, jnp.float32, target=target)[:rows]


def same(total: jax.Array) -> jax.Array:
    """A product as it is, for `multiply`."""
    return total


def _divisor(depth: int, group_rows: int) -> int:
    """The most rows of a tile: whole registers wide, a part of `depth`, and whole groups of rows or a part of one."""
    fitting = [
        rows
        for rows in range(128, min(depth, _DEPTH) + 1, 128)
        if depth % rows == 0 and (rows % group_rows == 0 or group_rows % rows == 0)
    ]
    return max(fitting, default=group_rows)
