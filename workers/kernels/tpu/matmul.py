"""Grouped matrix products with 8-bit weights on TPUs: weights cross from memory as they are stored, and are widened on the way
to the matrix unit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from workers.kernels.weights import LayerWeight, QuantizedWeight, Weight, dequantize, layered

#: Rows of a weight's tile at most, and its columns: what is widened of it at a time must fit beside the next tile.
_DEPTH, _COLUMNS = 2048, (512, 256, 128)
#: Fewest and most rows of x that share one reading of a tile; 16 rows of bfloat16 are the least that fill a register.
_FEWEST, _MOST = 16, 256


def grouped_matmul(x: jax.Array, weight: Weight, group_sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As `workers.kernels.xla.grouped_matmul.grouped_matmul`: only matrices of groups that have rows are read.

    Args:
      x: [M, K], float; its dtype is that of the products.
      weight: [G, K, N].
      group_sizes: [G] int32, of sum at most M.
      interpret: computes without a TPU.

    Returns:
      [M, N] float32.
    """
    own = layered(weight)
    stacked, layer = own.stacked, own.layer
    if not isinstance(stacked, QuantizedWeight):
        product: jax.Array = lax.ragged_dot(
            x, dequantize(weight, x.dtype), group_sizes, preferred_element_type=jnp.float32
        )
        return product
    rows, groups = x.shape[0], group_sizes.shape[0]
    block = min(max(_FEWEST, pl.next_power_of_2(-(-2 * rows // groups))), _MOST)
    count = -(-rows // block) + groups - 1  # blocks at most: each group may leave one half empty
    blocks = -(-group_sizes // block)  # [G]
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(group_sizes)  # [G]
    first_block, first_row = last_block - blocks, last_row - group_sizes
    active = last_block[-1:]
    # Blocks without rows stay at the last one's matrix, so that none is fetched for them.
    wanted = jnp.minimum(jnp.arange(count), active[0] - 1)
    owner = jnp.searchsorted(last_block, wanted, side="right", method="compare_all")  # others would loop
    owner = jnp.minimum(owner, groups - 1).astype(jnp.int32)  # [blocks]
    start = first_row[owner] + (jnp.arange(count) - first_block[owner]) * block
    source = (start[:, None] + jnp.arange(block)).reshape(-1)
    padded = jnp.take(x, source, axis=0, mode="clip")  # [blocks * block, K]
    out = _multiply(padded, stacked, layer * groups + owner, active.astype(jnp.int32), block, interpret)
    row = jnp.arange(rows)
    group = jnp.minimum(jnp.searchsorted(last_row, row, side="right", method="compare_all"), groups - 1)
    return jnp.take(out, first_block[group] * block + row - first_row[group], axis=0, mode="clip")


def _multiply(
    x: jax.Array, weight: QuantizedWeight, owner: jax.Array, active: jax.Array, block: int, interpret: bool
) -> jax.Array:
    """Each block of rows of x [blocks * block, K] times the matrix that owns it: [blocks * block, N] float32.

    The weight is [L, G, K, N], its matrices are counted over all layers. Its scales keep their shape: [L * G, S, N] would lie
    otherwise in memory, and XLA would lay out those of all layers anew in every layer.
    """
    _, groups, depth, columns = weight.shape
    scale_groups = weight.scales.shape[-2]
    group_rows = depth // scale_groups
    tile_columns = next((size for size in _COLUMNS if columns % size == 0), columns)
    tile_depth = _divisor(depth, group_rows)
    turns, tile_groups = depth // tile_depth, max(1, tile_depth // group_rows)
    tiles_a_scale = turns * tile_groups // scale_groups
    # Mosaic takes all rows of an array, or whole tiles of them; single ones must be a dimension of their own, which XLA copies.
    whole = tile_groups == scale_groups or tile_groups % _FEWEST == 0
    scales_of_tiles = weight.scales if whole else weight.scales[..., None, :]

    def turn(b: Any, k: Any, active: Any) -> Any:
        return jnp.where(b < active[0], k, turns - 1)

    def rows_at(_n: Any, b: Any, k: Any, _owner: Any, active: Any) -> Any:
        return b, turn(b, k, active)

    def values_at(n: Any, b: Any, k: Any, owner: Any, active: Any) -> Any:
        return owner[b], turn(b, k, active), n

    def scales_at(n: Any, b: Any, k: Any, owner: Any, active: Any) -> Any:
        at = turn(b, k, active) // tiles_a_scale
        return owner[b] // groups, owner[b] % groups, at, *(() if whole else (0,)), n

    def out_at(n: Any, b: Any, *_: Any) -> Any:
        return b, n

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(columns // tile_columns, owner.shape[0], turns),
        in_specs=[
            pl.BlockSpec((block, tile_depth), rows_at),
            pl.BlockSpec((1, tile_depth, tile_columns), values_at),
            pl.BlockSpec((1, 1, tile_groups, *(() if whole else (1,)), tile_columns), scales_at),
        ],
        out_specs=pl.BlockSpec((block, tile_columns), out_at),
        scratch_shapes=[pltpu.VMEM((block, tile_columns), jnp.float32)],
    )
    call = pl.pallas_call(
        functools.partial(_multiply_tile, tile_groups=tile_groups, turns=turns),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )
    values = weight.weight.reshape(-1, depth, columns)
    if not interpret:  # else XLA fetches the small stacks of all layers to the chip in every layer
        values = pltpu.with_memory_space_constraint(values, pltpu.MemorySpace.HBM)
    product: jax.Array = call(owner, active, x, values, scales_of_tiles)
    return product


def _multiply_tile(
    owner: Any, active: Any, x: Any, values: Any, scales: Any, out: Any, total: Any, *, tile_groups: int, turns: int
) -> None:
    """Adds one tile's product to `total`, and writes that after the last of `turns` tiles of the depth."""
    del owner
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(pl.program_id(1) < active[0])
    def _() -> None:
        _, tile_depth, tile_columns = values.shape
        grouped = values[0].reshape(tile_groups, tile_depth // tile_groups, tile_columns).astype(jnp.float32)
        # Rounded to bfloat16 as in `dequantize`: that is part of the model.
        factors = scales[0, 0].reshape(tile_groups, 1, tile_columns).astype(jnp.float32)
        wide = (grouped * factors).astype(jnp.bfloat16)
        matrix = wide.reshape(tile_depth, tile_columns).astype(x.dtype)
        total[...] += jnp.dot(x[...], matrix, preferred_element_type=jnp.float32)

    @pl.when(k == turns - 1)
    def _() -> None:
        out[...] = total[...]


def project(
    x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...], *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """As `workers.kernels.xla.portable.project`."""
    del valid
    rows = jnp.full(1, x.shape[0], jnp.int32)
    multiply = functools.partial(grouped_matmul, interpret=interpret)
    return tuple(multiply(x, _as_group(weight), rows) for weight in weights)


def _as_group(weight: Weight) -> Weight:
    """[K, N] as [1, K, N]."""
    if isinstance(weight, LayerWeight):
        return LayerWeight(jax.tree.map(lambda leaf: leaf[:, None], weight.stacked), weight.layer)
    one: Weight = jax.tree.map(lambda leaf: leaf[None], weight)
    return one


def _divisor(depth: int, group_rows: int) -> int:
    """The most rows of a tile: whole registers wide, a part of `depth`, and whole groups of rows or a part of one."""
    fitting = [
        rows
        for rows in range(128, min(depth, _DEPTH) + 1, 128)
        if depth % rows == 0 and (rows % group_rows == 0 or group_rows % rows == 0)
    ]
    return max(fitting, default=group_rows)
