"""What is computed row by row: norms and the router. A program takes one row, so that no other row has a part in its bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from workers.kernels.weights import Weight, layered
from workers.kernels.xla import portable

_COMPILER = pltriton.CompilerParams(num_warps=8, num_stages=1)


def norm(
    x: jax.Array,
    valid: jax.Array,
    scale: Weight,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    interpret: bool = False,
) -> jax.Array:
    """As `portable.norm`."""
    del valid
    rows, width = x.shape
    block = pl.next_power_of_2(width)
    more = () if residual is None else (residual,)
    scales, layer = _stacked(scale)

    def kernel(layer: Any, x: Any, scales: Any, *refs: Any) -> None:
        row, column = pl.program_id(0), pl.ds(0, block)
        inside = jnp.arange(block) < width
        wide = pltriton.load(x.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.sum(wide * wide) / width + epsilon)
        normed = wide * factor * pltriton.load(scales.at[layer[0], column], mask=inside, other=0.0)
        if more:
            normed = pltriton.load(refs[0].at[row, column], mask=inside, other=0.0) + normed
        pltriton.store(refs[-1].at[row, column], normed, mask=inside)

    out: jax.Array = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="norm",
    )(layer, x, scales, *more)
    return out


def fits_router(width: int, experts: int) -> bool:
    """Whether `route` takes a matrix of this shape itself."""
    return not experts & (experts - 1) and width % 128 == 0


def route(
    x: jax.Array, valid: jax.Array, weight: Weight, selected: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `portable.route`."""
    rows, width = x.shape
    count = weight.shape[1]
    if not fits_router(width, count):
        return portable.route(x, valid, weight, selected)
    step = next(size for size in (2048, 1024, 512, 256, 128) if width % size == 0)

    matrices, layer = _stacked(weight)

    def kernel(layer: Any, x: Any, matrices: Any, gates: Any, experts: Any, probabilities: Any) -> None:
        row, expert = pl.program_id(0), jnp.arange(count)

        def turn(i: Any, total: jax.Array) -> jax.Array:
            span = pl.ds(i * step, step)
            tile = matrices[layer[0], span, :].astype(jnp.float32)
            return total + jnp.sum(x[row, span].astype(jnp.float32)[:, None] * tile, axis=0)

        logits = jax.lax.fori_loop(0, width // step, turn, jnp.zeros(count, jnp.float32))
        powers = jnp.exp(logits - jnp.max(logits))
        found = powers / jnp.sum(powers)
        probabilities[row, :] = found
        for i in range(selected):
            gates[row, i] = jnp.max(found)
            best = jnp.argmax(found).astype(jnp.int32)
            experts[row, i] = best
            found = jnp.where(expert == best, -1.0, found)

    made: tuple[jax.Array, jax.Array, jax.Array] = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=(
            jax.ShapeDtypeStruct((rows, selected), jnp.float32),
            jax.ShapeDtypeStruct((rows, selected), jnp.int32),
            jax.ShapeDtypeStruct((rows, count), jnp.float32),
        ),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="route",
    )(layer, x, matrices)
    return made


def _stacked(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """A weight that is an array among those of all layers, [L, ...], and its layer [1]."""
    own = layered(weight)
    assert isinstance(own.stacked, jax.Array)
    return own.stacked, own.layer.reshape(1)
