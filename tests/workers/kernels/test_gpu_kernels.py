"""The kernels for NVIDIA GPUs, interpreted, against plain JAX; and lowered for GPUs at Grok-1's own sizes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.lowering import layer_loop
from workers.kernels.gpu import tiles
from workers.kernels.gpu.kernels import GPU, gpu_kernels
from workers.kernels.interface import ACCELERATOR
from workers.kernels.kv_pages import QuantizedPages
from workers.kernels.weights import LayerWeight, PairedWeight, QuantizedWeight
from workers.kernels.xla import portable
from workers.runtime.mesh import abstract_mesh

pytestmark = pytest.mark.slow

KERNELS = gpu_kernels(interpret=True)
LAYERS, EXPERTS, DEPTH, WIDTH = 3, 4, 256, 512
#: Rows of one small tile, the most of it, those of two, and more.
ROWS = (1, 64, 100, 150)


def weight(*shape: int, groups: int = 2, scale_dtype: Any = jnp.bfloat16) -> LayerWeight:
    """One of the layers' 8-bit weights."""
    rng = np.random.default_rng(len(shape))
    values = jnp.asarray(rng.integers(-127, 128, (LAYERS, *shape)), jnp.int8)
    scales = rng.uniform(0.0005, 0.001, (LAYERS, *shape[:-2], groups, shape[-1]))
    return LayerWeight(QuantizedWeight(values, jnp.asarray(scales, scale_dtype)), jnp.int32(1))


def paired_weight(*shape: int) -> LayerWeight:
    """One of the layers' 4-bit weights, in groups of 128 rows."""
    rng = np.random.default_rng(len(shape))
    *lead, depth, width = shape
    pairs = jnp.asarray(rng.integers(-128, 128, (LAYERS, *lead, depth // 2, width)), jnp.int8)
    scales = jnp.asarray(rng.uniform(0.005, 0.01, (LAYERS, *lead, depth // 128, width)), jnp.bfloat16)
    return LayerWeight(PairedWeight(pairs, scales), jnp.int32(1))


def activations(rows: int, width: int = DEPTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).standard_normal((rows, width)), jnp.bfloat16)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Equal to so much of the largest value."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
def test_projections_are_those_of_plain_jax(rows: int, scale_dtype: Any) -> None:
    x, valid = activations(rows), jnp.ones(rows, bool)
    weights = tuple(weight(DEPTH, width, scale_dtype=scale_dtype) for width in (384, 128, 128))
    for got, want in zip(KERNELS.project(x, valid, weights), portable.project(x, valid, weights), strict=True):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_weights_of_4_bits_are_multiplied_as_by_plain_jax(rows: int) -> None:
    x, valid, (gates, experts) = activations(rows), jnp.ones(rows, bool), routed(rows)
    weights = tuple(paired_weight(DEPTH, width) for width in (384, 128))
    for got, want in zip(KERNELS.project(x, valid, weights), portable.project(x, valid, weights), strict=True):
        assert_close(got, want, 1e-6)
    stacks = (*(paired_weight(EXPERTS, DEPTH, WIDTH),) * 2, paired_weight(EXPERTS, WIDTH, DEPTH))
    got = KERNELS.experts(x, gates, experts, valid, *stacks, None)
    assert_close(got, portable.experts(x, gates, experts, valid, *stacks, None), 1e-3)


@pytest.mark.parametrize("rows", ROWS)
def test_plain_weights_and_logits_are_those_of_plain_jax(rows: int) -> None:
    x, valid = activations(rows), jnp.ones(rows, bool)
    plain = activations(DEPTH, 128)
    assert_close(KERNELS.project(x, valid, (plain,))[0], portable.project(x, valid, (plain,))[0], 1e-6)
    table = activations(192)
    assert_close(KERNELS.logits(x, valid, table), portable.logits(x, valid, table), 1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_norms_and_routes_are_those_of_plain_jax(rows: int) -> None:
    x, valid = activations(rows).astype(jnp.float32), jnp.ones(rows, bool)
    scale = LayerWeight(activations(LAYERS).astype(jnp.float32), jnp.int32(2))
    for more in ((), (x + 1,)):
        got = KERNELS.norm(x, valid, scale, *more, epsilon=1e-5)
        assert_close(got, portable.norm(x, valid, scale, *more, epsilon=1e-5), 1e-6)
    router = LayerWeight(activations(LAYERS * DEPTH, EXPERTS).reshape(LAYERS, DEPTH, EXPERTS), jnp.int32(1))
    for one, other in zip(KERNELS.route(x, valid, router, 2), portable.route(x, valid, router, 2), strict=True):
        assert_close(one, other, 1e-5)


def routed(rows: int) -> tuple[jax.Array, jax.Array]:
    """Two experts a row, and their gates."""
    rng = np.random.default_rng(rows)
    experts = np.array([rng.permutation(EXPERTS)[:2] for _ in range(rows)], np.int32)
    return jnp.asarray(rng.uniform(0.1, 0.9, (rows, 2)), jnp.float32), jnp.asarray(experts)


@pytest.mark.parametrize("rows", ROWS)
def test_experts_are_those_of_plain_jax(rows: int) -> None:
    x, (gates, experts) = activations(rows), routed(rows)
    valid = jnp.arange(rows) != 2
    weights = (weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, WIDTH, DEPTH))
    got = KERNELS.experts(x, gates, experts, valid, *weights, None)
    want = portable.experts(x, gates, experts, valid, *weights, None)
    assert_close(got, want, 1e-3)  # a sum that is near the middle of two bfloat16 numbers may be rounded to either
    np.testing.assert_array_equal(np.asarray(got)[~np.asarray(valid)], 0)


def test_a_row_is_the_same_beside_few_and_many_others() -> None:
    """Tiles, and which programs share a product, depend on how many there are."""
    many = 150
    x, valid, (gates, experts) = activations(many), jnp.ones(many, bool), routed(many)
    flat = tuple(weight(DEPTH, width) for width in (384, 128))
    stacks = (weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, WIDTH, DEPTH))
    table, router = (
        activations(192),
        LayerWeight(activations(LAYERS * DEPTH, EXPERTS).reshape(LAYERS, DEPTH, -1), jnp.int32(1)),
    )

    @jax.jit
    def computed(x: jax.Array, gates: jax.Array, experts: jax.Array, valid: jax.Array) -> Any:
        return (
            KERNELS.project(x, valid, flat),
            KERNELS.experts(x, gates, experts, valid, *stacks, None),
            KERNELS.logits(x, valid, table),
            KERNELS.route(x, valid, router, 2),
        )

    every = jax.tree.leaves(computed(x, gates, experts, valid))
    for rows in (1, 64, 65, 129):
        some = jax.tree.leaves(computed(x[:rows], gates[:rows], experts[:rows], valid[:rows]))
        for got, want in zip(some, every, strict=True):
            np.testing.assert_array_equal(got, want[:rows])


def test_a_row_of_experts_is_the_same_beside_any_others() -> None:
    weights = (weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, DEPTH, WIDTH), weight(EXPERTS, WIDTH, DEPTH))
    operation = jax.jit(functools.partial(KERNELS.experts, reduce=None))
    x, (gates, experts) = activations(24), routed(24)
    seen = set()
    for place in (0, 7, 23):
        order = np.roll(np.arange(24), place)
        moved = operation(x[order], gates[order], experts[order], jnp.asarray(order % 5 != 1), *weights)
        seen.add(np.asarray(moved)[place].tobytes())
    assert len(seen) == 1


def test_what_tiles_do_not_fit_is_computed_plainly() -> None:
    x, valid = activations(3, 96), jnp.ones(3, bool)
    narrow = weight(96, 160, groups=3)
    np.testing.assert_array_equal(KERNELS.project(x, valid, (narrow,))[0], portable.project(x, valid, (narrow,))[0])


@pytest.mark.parametrize(("layers", "fits"), [(8, True), (16, False), (64, True)])
def test_stacks_whose_addresses_would_wrap_are_refused(layers: int, fits: bool) -> None:
    """From 2 to 4 Gi elements of one byte, Pallas takes 32-bit offsets whose sign is wrong."""
    values: Any = jax.ShapeDtypeStruct((layers * 8, 6144, 4096), jnp.int8)
    scales: Any = jax.ShapeDtypeStruct((layers * 8, 8, 4096), jnp.bfloat16)
    assert tiles.fits(QuantizedWeight(values, scales)) == fits


BATCH, HEADS, GROUPED, TABLE = 3, 2, 3, 12


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("length", "size", "page"), [(1, 128, 64), (5, 128, 64), (40, 128, 64), (1, 48, 60), (5, 128, 8)]
)
def test_attention_is_that_of_plain_jax(length: int, size: int, page: int, quantized: bool) -> None:
    rng = np.random.default_rng(length)
    count = 1 + BATCH * TABLE
    table = jnp.arange(1, count, dtype=jnp.int32).reshape(BATCH, TABLE)
    positions = jnp.array([[4 * page + page // 2], [0], [9 * page + page // 3]], jnp.int32) + jnp.arange(
        length, dtype=jnp.int32
    )
    positions = positions.at[1, 3:].set(-1)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query, key, value = random(BATCH, length, HEADS * GROUPED, size), *(random(BATCH, length, HEADS, size),) * 2
    pages: Any = random(HEADS, count, page, size).astype(jnp.bfloat16)
    keys: Any = pages.transpose(1, 0, 3, 2)
    values: Any = pages.swapaxes(0, 1)
    if quantized:
        whole = jnp.asarray(rng.integers(-127, 128, pages.shape), jnp.int8)
        scales = jnp.full(pages.shape[:3], 0.02)
        pages, turned = QuantizedPages(whole, scales), scales.swapaxes(0, 1)
        keys, values = (QuantizedPages(whole.transpose(axes), turned) for axes in ((1, 0, 3, 2), (1, 0, 2, 3)))
    settings = {"scale": 0.0884, "cap": 30.0, "rope_base": 1e4}
    want, new_keys, _ = portable.attend(query, key, value, keys, values, table, positions, **settings)
    got, key_pages, _ = jax.jit(functools.partial(KERNELS.attend, **settings))(
        query, key, value, pages, pages, table, positions
    )
    assert_close(got, want, 0.01)  # products are taken in bfloat16
    written, expected = (np.asarray(jax.tree.leaves(kind)[0], np.float32) for kind in (key_pages, new_keys))
    # Page 0 is nobody's: there plain JAX puts padding, which these kernels drop.
    assert_close(written[:, 1:], expected.transpose(1, 0, 3, 2)[:, 1:], 0.01)


def test_attention_has_the_same_bits_wherever_a_sequence_is_cut() -> None:
    total, page, settings = 540, 16, {"scale": 0.0884, "cap": 30.0, "rope_base": 1e4}  # three parts
    rng = np.random.default_rng(0)
    rows = [
        jnp.asarray(rng.standard_normal((1, total, heads, 128)), jnp.float32)
        for heads in (HEADS * GROUPED, HEADS, HEADS)
    ]
    table = jnp.arange(1, 2 + total // page, dtype=jnp.int32)[None]
    attend = jax.jit(functools.partial(KERNELS.attend, **settings))

    def attended(*cuts: int) -> Any:
        keys = values = jnp.zeros((HEADS, 2 + total // page, page, 128), jnp.bfloat16)
        mixed = []
        for begin, end in itertools.pairwise((0, *cuts, total)):
            positions = jnp.arange(begin, end, dtype=jnp.int32)[None]
            some, keys, values = attend(*(row[:, begin:end] for row in rows), keys, values, table, positions)
            mixed.append(some)
        return jnp.concatenate(mixed, axis=1)

    whole = attended()
    for cuts in ((255, 256, 257), (7, 300, 511), (537, 538, 539)):
        np.testing.assert_array_equal(attended(*cuts), whole)


@pytest.mark.parametrize("program", ["decode", "prefill", "verify"])
@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.int8])
def test_grok_1_lowers_for_gpus_without_a_loop_in_a_layer(program: str, kv_dtype: Any) -> None:
    mesh = abstract_mesh(1, 8)
    layer = layer_loop(GPU, mesh, "cuda", program, kv_dtype)
    assert layer.count("@__gpu$xla.gpu.triton") >= 10
    assert layer.count("stablehlo.while") == 1  # that over the layers; the host would drive any other
    if kv_dtype == jnp.bfloat16 and program != "verify":
        assert layer_loop(ACCELERATOR, mesh, "cuda", program, kv_dtype).count("stablehlo.while") > 1
