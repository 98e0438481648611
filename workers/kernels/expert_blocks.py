"""Rows sorted by the experts that they chose, in blocks of one expert each."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ExpertBlocks:
    """As many blocks for each expert as its rows fill; those with rows come first.

    Attributes:
      count: blocks at most: each expert may leave one partly empty.
      owner: [count] int32, the expert of each; any one's where none has rows left.
      used: [] int32, blocks that have rows.
      place: [M, S] int32, where a row lies for a selected expert, of [count * block]; -1 for padding.
    """

    count: int
    owner: jax.Array
    used: jax.Array
    place: jax.Array


def sort_rows(experts: jax.Array, valid: jax.Array, count: int, block: int) -> ExpertBlocks:
    """The rows [M], of which `valid` are no padding, that chose `experts` [M, S] of `count`, in blocks of `block` rows."""
    rows, selected = experts.shape
    flat = jnp.where(jnp.repeat(valid, selected), experts.reshape(-1), count)  # [M * S]
    ours = flat[:, None] == jnp.arange(count)  # [M * S, E]
    so_far = jnp.cumsum(ours, axis=0, dtype=jnp.int32)  # [M * S, E]
    filled = -(-so_far[-1] // block)  # [E]
    last = jnp.cumsum(filled)  # [E]
    place = jnp.sum(jnp.where(ours, (last - filled) * block + so_far, 0), axis=1) - 1
    blocks = -(-rows * selected // block) + count - 1
    owner = jnp.searchsorted(last, jnp.arange(blocks), side="right", method="compare_all")  # others would loop
    owner = jnp.minimum(owner, count - 1).astype(jnp.int32)
    return ExpertBlocks(blocks, owner, last[-1].astype(jnp.int32), place.astype(jnp.int32).reshape(rows, selected))
