"""Each kernel of this platform beside plain JAX, on the devices themselves: `python -m tools.selftest.kernels`."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.slice import kernels_of
from tools.selftest.findings import Finding, Outcome
from workers.kernels.cpu.bindings import NativeKernelsError
from workers.kernels.int4 import INT4_ROWS, pack_int4, pair
from workers.kernels.interface import Kernels
from workers.kernels.kv_pages import QuantizedPages
from workers.kernels.packed import PackedTable, PackedWeight
from workers.kernels.packing import pack, pack_table
from workers.kernels.weights import LayerWeight, PairedWeight, QuantizedWeight
from workers.kernels.xla import portable

#: Sizes that all tiles fit: of a layer's parts, and of attention.
LAYERS, EXPERTS, DEPTH, WIDTH, VOCABULARY, GROUPS = 3, 8, 512, 1024, 1024, 2
BATCH, HEADS, GROUPED, SIZE, PAGE, TABLE = 3, 2, 6, 128, 64, 12
#: Rows of one small tile, the most of it, those of two, and more.
ROWS = (1, 64, 100, 150)
#: Of the largest value. Kernels of accelerators multiply in bfloat16, those of CPUs in integers of 16 bits a block.
CLOSE, ROUNDED = 2e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a kernel computes and what plain JAX does; `tolerance` is a share of the largest value."""

    name: str
    got: Any
    want: Any
    tolerance: float

    @functools.cached_property
    def error(self) -> float:
        """The largest difference, as a share of the largest value of its array; infinite if something is no number."""
        errors = [
            float(np.abs(got - want).max() / np.abs(want).max())
            for got, want in zip(*map(_arrays, (self.got, self.want)), strict=True)
        ]
        return max(errors) if np.isfinite(errors).all() else float("inf")


def _arrays(value: Any) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(value)]


def compare(kernels: Kernels) -> Iterator[Comparison]:
    """All that a layer does, at few rows and at many."""
    dtype = jnp.bfloat16 if kernels.accelerator else jnp.float32
    yield from (part for rows in ROWS for part in _layer_parts(kernels, rows, dtype))
    for length in (1, 40):
        yield _attention(kernels, length, quantized=False)
        if not kernels.packed:
            yield _attention(kernels, length, quantized=True)


def _layer_parts(kernels: Kernels, rows: int, dtype: Any) -> Iterator[Comparison]:
    rng = np.random.default_rng(rows)
    x, valid = jnp.asarray(rng.standard_normal((rows, DEPTH)), dtype), jnp.ones(rows, bool)
    wide = x.astype(jnp.float32)
    scale = LayerWeight(jnp.asarray(rng.uniform(0.5, 1.5, (LAYERS, DEPTH)), jnp.float32), jnp.int32(2))
    of = f"{rows} rows"
    norm = functools.partial(kernels.norm, epsilon=1e-5)
    yield Comparison(
        f"norm, {of}", jax.jit(norm)(wide, valid, scale), portable.norm(wide, valid, scale, epsilon=1e-5), CLOSE
    )
    router = LayerWeight(jnp.asarray(rng.standard_normal((LAYERS, DEPTH, EXPERTS)), dtype), jnp.int32(1))
    routes = [jax.jit(one, static_argnums=3)(x, valid, router, 2) for one in (kernels.route, portable.route)]
    yield Comparison(f"router, {of}", routes[0], routes[1], CLOSE)
    gates, experts = (jnp.asarray(array) for array in _routed(rng, rows))
    experts_of = [functools.partial(one, reduce=None) for one in (kernels.experts, portable.experts)]
    shapes = ((EXPERTS, DEPTH, WIDTH), (EXPERTS, DEPTH, WIDTH), (EXPERTS, WIDTH, DEPTH))
    for make, weights in ((_weight, "8 bits"), (_weight_in_4_bits, "4 bits")):
        pairs = [make(kernels, rng, DEPTH, width) for width in (768, 128, 128)]
        own, plain = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        projected = jax.jit(kernels.project)(x, valid, own), portable.project(x, valid, plain)
        yield Comparison(f"projections, {weights}, {of}", *projected, CLOSE)
        pairs = [make(kernels, rng, *shape) for shape in shapes]
        own, plain = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        yield Comparison(
            f"experts, {weights}, {of}",
            jax.jit(experts_of[0])(x, gates, experts, valid, *own),
            experts_of[1](x, gates, experts, valid, *plain),
            ROUNDED,
        )
    table = rng.standard_normal((VOCABULARY, DEPTH)).astype(np.float32)
    plain_table = jnp.asarray(table, dtype)
    own_table: Any = plain_table
    if kernels.packed:
        values, scales = pack_table(table)
        own_table = PackedTable(jnp.asarray(values), jnp.asarray(scales), DEPTH)
    yield Comparison(
        f"logits, {of}", jax.jit(kernels.logits)(x, valid, own_table), portable.logits(x, valid, plain_table), CLOSE
    )
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, rows), jnp.int32)
    yield Comparison(f"embedding, {of}", jax.jit(kernels.lookup)(own_table, tokens), plain_table[tokens], CLOSE)


def _weight(kernels: Kernels, rng: np.random.Generator, *shape: int) -> tuple[LayerWeight, LayerWeight]:
    """One of the layers' 8-bit weights, as the kernels read it, and as plain JAX does."""
    values = rng.integers(-127, 128, (LAYERS, *shape), np.int8)
    scales = jnp.asarray(rng.uniform(5e-4, 1e-3, (LAYERS, *shape[:-2], GROUPS, shape[-1])), jnp.bfloat16)
    plain = LayerWeight(QuantizedWeight(jnp.asarray(values), scales), jnp.int32(1))
    if not kernels.packed:
        return plain, plain
    packed = PackedWeight(jnp.asarray(pack(values, GROUPS)), scales, shape[-2], "rounded")
    return LayerWeight(packed, jnp.int32(1)), plain


def _weight_in_4_bits(kernels: Kernels, rng: np.random.Generator, *shape: int) -> tuple[LayerWeight, LayerWeight]:
    """The same in 4 bits, with scales that are powers of two, so that no product is rounded."""
    *lead, rows, columns = LAYERS, *shape
    values = rng.integers(-7, 8, (*lead, rows, columns))
    values[..., ::INT4_ROWS, :] = 7  # so that quantizing gives them back
    scales = 2.0 ** rng.integers(-9, -6, (*lead, rows // INT4_ROWS, columns))
    own: PackedWeight | PairedWeight | QuantizedWeight
    plain = QuantizedWeight(jnp.asarray(values, jnp.int4), jnp.asarray(scales, jnp.bfloat16))
    if kernels.packed:
        packed, kept = pack_int4((values * np.repeat(scales, INT4_ROWS, axis=-2)).astype(np.float32))
        own = PackedWeight(jnp.asarray(packed), jnp.asarray(kept), rows, "int4")
    elif kernels.paired:
        own = PairedWeight(jnp.asarray(pair(values, INT4_ROWS)), plain.scales)
    else:
        own = plain
    return LayerWeight(own, jnp.int32(1)), LayerWeight(plain, jnp.int32(1))


def _routed(rng: np.random.Generator, rows: int) -> tuple[Any, Any]:
    """Gates of two experts a row, and these."""
    experts = np.array([rng.permutation(EXPERTS)[:2] for _ in range(rows)], np.int32)
    return rng.uniform(0.1, 0.9, (rows, 2)).astype(np.float32), experts


def _attention(kernels: Kernels, length: int, *, quantized: bool) -> Comparison:
    """Sequences of different length, one of them new."""
    rng = np.random.default_rng(length)
    count = 1 + BATCH * TABLE
    table = jnp.arange(1, count, dtype=jnp.int32).reshape(BATCH, TABLE)
    starts = jnp.array([[4 * PAGE + PAGE // 2], [0], [9 * PAGE + PAGE // 3]], jnp.int32)
    positions = starts + jnp.arange(length, dtype=jnp.int32)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query, key = random(BATCH, length, HEADS * GROUPED, SIZE), random(BATCH, length, HEADS, SIZE)
    value, pages = random(BATCH, length, HEADS, SIZE), random(HEADS, count, PAGE, SIZE)
    own: tuple[Any, Any]
    plain: tuple[Any, Any]
    if quantized:
        whole, scales = jnp.asarray(rng.integers(-127, 128, pages.shape), jnp.int8), jnp.full(pages.shape[:3], 0.02)
        turned = scales.swapaxes(0, 1)
        plain = QuantizedPages(whole.transpose(1, 0, 3, 2), turned), QuantizedPages(whole.swapaxes(0, 1), turned)
        own = (QuantizedPages(whole, scales),) * 2
    else:
        held = pages.astype(jnp.bfloat16 if kernels.accelerator else jnp.float32)
        plain = held.transpose(1, 0, 3, 2), held.swapaxes(0, 1)
        own = (held,) * 2
    own = own if kernels.heads_first else plain
    settings = {"scale": SIZE**-0.5, "cap": 30.0, "rope_base": 1e4}
    want = portable.attend(query, key, value, plain[0], plain[1], table, positions, **settings)[0]
    got = jax.jit(functools.partial(kernels.attend, **settings))(query, key, value, *own, table, positions)[0]
    kind, what = "int8" if quantized else "float", "decode" if length == 1 else "prefill"
    return Comparison(f"attention, {what}, {kind} pages", got, want, ROUNDED)


def main() -> int:
    """Takes no arguments."""
    try:
        kernels = kernels_of(jax.local_devices()[0])
    except NativeKernelsError as error:
        Finding("kernels", "set", Outcome.SKIPPED, str(error)).say()
        return 0
    Finding("kernels", "set", Outcome.OK, kernels.name).say()
    comparisons = compare(kernels)
    while True:
        began = time.perf_counter()
        one = next(comparisons, None)
        if one is None:
            return 0
        outcome = Outcome.OK if one.error <= one.tolerance else Outcome.FAILED
        text = f"largest error {one.error:.1e} of the largest value, at most {one.tolerance:.0e}"
        Finding("kernels", one.name, outcome, text, {"error": one.error, "seconds": time.perf_counter() - began}).say()


if __name__ == "__main__":
    sys.exit(main())
