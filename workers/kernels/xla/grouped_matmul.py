"""Matrix products of rows sorted by group, one weight matrix a group: the heart of a mixture of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from workers.kernels.weights import Weight, dequantize, group_of


def grouped_matmul(x: jax.Array, weight: Weight, group_sizes: jax.Array) -> jax.Array:
    """Multiplies the first `group_sizes[0]` rows of x with weight[0], the next `group_sizes[1]` with weight[1], and so on.

    Only groups that have rows are computed: a loop over blocks of rows reads one group's matrix a block, and an 8-bit
    matrix is widened only for its own block. A row's result does not depend on the other rows.

    Args:
      x: [M, K], float.
      weight: [G, K, N].
      group_sizes: [G] int32, of sum at most M.

    Returns:
      [M, N] float32. Rows beyond the sum of `group_sizes` hold no meaningful values.
    """
    rows, depth = x.shape
    block = block_rows(rows)
    blocks = -(-group_sizes // block)  # [G]
    last_block = jnp.cumsum(blocks)  # [G]
    first_row = jnp.cumsum(group_sizes) - group_sizes  # [G]
    padded = jnp.pad(x, ((0, block), (0, 0)))  # [M + block, K]

    def multiply(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(last_block, i, side="right", method="compare_all")
        row = first_row[group] + (i - (last_block[group] - blocks[group])) * block
        tile = lax.dynamic_slice(padded, (row, 0), (block, depth))
        matrix = group_of(weight, group)
        product = jnp.matmul(tile, dequantize(matrix, x.dtype), preferred_element_type=jnp.float32)  # [block, N]
        # A block's surplus rows belong to the next group, whose own block, written later, corrects them.
        return lax.dynamic_update_slice(out, product, (row, 0))

    start = jnp.zeros((rows + block, weight.shape[-1]), jnp.float32)
    out: jax.Array = lax.fori_loop(0, last_block[-1], multiply, start)
    return out[:rows]


def block_rows(rows: int) -> int:
    """Rows that share one read of a group's matrix; more waste work on small groups, fewer read matrices again."""
    return 8 if rows <= 128 else 32
