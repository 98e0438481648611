"""The experts' networks on TPUs: gate, up and their product in one kernel, down in another."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from workers.kernels.expert_blocks import sort_rows
from workers.kernels.tpu.matmul import FEWEST, MOST, Blocks, Target, multiply, rows_of_block, same
from workers.kernels.weights import LayerWeight, QuantizedWeight, Weight, dequantize, layered
from workers.kernels.xla import portable

#: So many rows every chosen expert takes as they are: sorting them would cost more than the products that nobody asked for.
_FEW = 64


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
    target: Target,
) -> jax.Array:
    """As `portable.experts`: only matrices of experts that rows chose are read."""
    own = (layered(gate), layered(up), layered(down))
    if not all(isinstance(weight.stacked, QuantizedWeight) for weight in own):
        return portable.experts(x, gates, experts, valid, gate, up, down, reduce, multiply=_ragged)
    if reduce is not None:
        return portable.experts(x, gates, experts, valid, gate, up, down, reduce)
    networks = functools.partial(_networks, *own, target=target)
    compute = _shared if x.shape[0] <= _FEW else _sorted
    return compute(x, gates, experts, valid, gate.shape[0], networks)


def _shared(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    valid: jax.Array,
    count: int,
    networks: Callable[..., jax.Array],
) -> jax.Array:
    """A block of all rows for each of `count` experts that a row chose."""
    rows = x.shape[0]
    block = rows_of_block(rows)
    chosen = (experts[..., None] == jnp.arange(count)) & valid[:, None, None]  # [M, S, E]
    used = jnp.any(chosen, axis=(0, 1))  # [E]
    turn = jnp.cumsum(used) - 1  # [E]
    blocks = used & (turn == jnp.arange(count)[:, None])  # [B, E]
    owner = jnp.sum(blocks * jnp.arange(count), axis=1).astype(jnp.int32)
    weights = jnp.sum(jnp.where(chosen, gates[..., None], 0.0), axis=1)  # [M, E]
    factors = jnp.pad(weights.T[owner], ((0, 0), (0, block - rows)))[..., None]  # [B, rows, 1]
    plan = Blocks(owner, jnp.maximum(jnp.sum(used), 1).astype(jnp.int32), block)
    padded = jnp.pad(x, ((0, block - rows), (0, 0)))
    return networks(padded, plan, jnp.float32, factors)[:rows]


def _sorted(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    valid: jax.Array,
    count: int,
    networks: Callable[..., jax.Array],
) -> jax.Array:
    """As many blocks for each of `count` experts as its rows fill."""
    rows, selected = experts.shape
    block = min(max(FEWEST, pl.next_power_of_2(-(-2 * rows * selected // count))), MOST)
    blocks = sort_rows(experts, valid, count, block)
    plan = Blocks(blocks.owner, jnp.maximum(blocks.used, 1), block)
    # Comparing all with all is faster than a scatter, which TPUs do one by one.
    taken = blocks.place.reshape(-1) == jnp.arange(blocks.count * block)[:, None]
    source = jnp.sum(jnp.where(taken, jnp.arange(rows * selected) // selected, 0), axis=1)
    # Results are many: float32 would be twice the bytes.
    results = networks(jnp.take(x, source, axis=0, mode="clip"), plan, x.dtype)  # [B * rows, D]
    mixed = jnp.zeros((rows, results.shape[1]), jnp.float32)
    for i in range(selected):
        place = blocks.place[:, i]
        result = jnp.take(results, place, axis=0, mode="clip").astype(jnp.float32) * gates[:, i, None]
        mixed += jnp.where(place[:, None] >= 0, result, 0.0)
    return mixed


def _networks(
    gate: LayerWeight,
    up: LayerWeight,
    down: LayerWeight,
    x: jax.Array,
    blocks: Blocks,
    dtype: jnp.dtype | type,
    factors: jax.Array | None = None,
    *,
    target: Target,
) -> jax.Array:
    """down(gelu(gate(x)) * up(x)) of each block; `x`, `dtype`, `factors` and the result are those of `multiply`."""
    hidden = multiply(x, (gate, up), blocks, _activated, x.dtype, target=target)
    return multiply(hidden, (down,), blocks, same, dtype, factors, target=target)


def _ragged(x: jax.Array, weight: Weight, group_sizes: jax.Array) -> jax.Array:
    """As `workers.kernels.xla.grouped_matmul.grouped_matmul`, of plain arrays."""
    product: jax.Array = lax.ragged_dot(x, dequantize(weight, x.dtype), group_sizes, preferred_element_type=jnp.float32)
    return product


def _activated(gated: jax.Array, lifted: jax.Array) -> jax.Array:
    return jax.nn.gelu(gated, approximate=True) * lifted
