"""The kernels for TPUs, interpreted, against plain JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh

from tests.support.lowering import layer_loop
from workers.kernels.kv_pages import Pages, QuantizedPages
from workers.kernels.tpu import attention, experts, matmul
from workers.kernels.tpu.kernels import TPU
from workers.kernels.tpu.matmul import Target
from workers.kernels.weights import LayerWeight, QuantizedWeight, dequantize
from workers.kernels.xla import portable
from workers.runtime.mesh import AXES, TYPES

pytestmark = pytest.mark.slow

TARGETS = pytest.mark.parametrize(
    "target", [Target(interpret=True), Target(widens=False, interpret=True)], ids=["", "v4"]
)


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], scale_groups: int, bits: int) -> QuantizedWeight:
    most = 2 ** (bits - 1) - 1
    values = jnp.asarray(rng.integers(-most, most + 1, shape), jnp.int8 if bits == 8 else jnp.int4)
    scales = rng.uniform(0.001, 0.002, (*shape[:-2], scale_groups, shape[-1]))
    return QuantizedWeight(values, jnp.asarray(scales, jnp.bfloat16))


def unrounded(weight: QuantizedWeight) -> jax.Array:
    """Its values in float32."""
    scales = jnp.repeat(weight.scales, weight.shape[-2] // weight.scales.shape[-2], axis=-2)
    return weight.weight.astype(jnp.float32) * scales.astype(jnp.float32)


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "scale_groups"),
    [
        (1, 256, 256, 1),
        (64, 4096, 384, 2),  # two tiles of rows for each group of scales
        (64, 1024, 128, 8),  # a tile has eight groups
        (600, 128, 128, 1),  # more rows than a block
        (6, 96, 160, 3),  # nothing divides
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
@TARGETS
def test_products_are_those_of_plain_jax(
    rows: int, depth: int, columns: int, scale_groups: int, bits: int, target: Target
) -> None:
    rng = np.random.default_rng(0)
    every = random_weight(rng, (3, depth, columns), scale_groups, bits)
    x, valid = jnp.asarray(rng.standard_normal((rows, depth)), jnp.float32), jnp.ones(rows, bool)
    project = jax.jit(functools.partial(matmul.project, target=target))
    # The sums of a few rows are scaled, if values have 4 bits, and so their scaled values are not rounded.
    wanted = unrounded(every) if bits == 4 and rows <= 64 else every
    for layer in range(3):
        own = (LayerWeight(every, jnp.int32(layer)),)
        (got,), (want,) = project(x, valid, own), portable.project(x, valid, (LayerWeight(wanted, jnp.int32(layer)),))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


# Each expert takes all of up to 64 rows, blocks of more. Weights without bits are plain arrays.
@pytest.mark.parametrize(("rows", "bits"), [(1, 8), (5, 4), (64, 8), (65, 4), (300, 8), (300, 4), (9, None)])
@TARGETS
def test_experts_are_those_of_plain_jax(rows: int, bits: int | None, target: Target) -> None:
    rng = np.random.default_rng(rows)
    count, selected, depth, width = 8, 2, 256, 384
    sizes = ((depth, width, 2), (depth, width, 2), (width, depth, 1))
    every = [random_weight(rng, (2, count, *size), groups, bits or 8) for *size, groups in sizes]
    gate, up, down = (LayerWeight(weight if bits else dequantize(weight), jnp.int32(1)) for weight in every)
    rounded = bits != 4 or rows > 128  # so many lie in blocks of up to 64
    wanted = tuple(LayerWeight(dequantize(weight) if rounded else unrounded(weight), jnp.int32(1)) for weight in every)
    x = jnp.asarray(rng.standard_normal((rows, depth)), jnp.float32)
    gates = jnp.asarray(rng.uniform(0.1, 1.0, (rows, selected)), jnp.float32)
    # The last expert is never chosen.
    order = rng.permuted(np.tile(np.arange(count - 1), (rows, 1)), axis=1)
    chosen = jnp.asarray(order[:, :selected], jnp.int32)
    compute = jax.jit(functools.partial(experts.experts, reduce=None, target=target))
    for valid in (np.ones(rows, bool), rng.random(rows) < 0.5, np.zeros(rows, bool)):
        got = compute(x, gates, chosen, jnp.asarray(valid), gate, up, down)
        want = portable.experts(x, gates, chosen, jnp.asarray(valid), wanted[0], wanted[1], wanted[2], None)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[valid], want[valid], rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_grok_1_lowers_for_tpus(program: str) -> None:
    """Nothing loops within a layer."""
    device = AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = AbstractMesh((2, 8), AXES, axis_types=TYPES, abstract_device=device)
    layer = layer_loop(TPU, mesh, "tpu", program, jnp.bfloat16)
    assert layer.count("tpu_custom_call") >= 7
    assert layer.count("stablehlo.while") == 1


BATCH, HEADS, GROUPED, SIZE, PAGE, WIDTH = 3, 2, 3, 128, 16, 16


@pytest.mark.parametrize(
    ("length", "quantized", "tolerance"),
    [
        (1, False, 0.02),  # the kernel multiplies as a TPU does, in bfloat16
        (5, False, 1e-5),
        (150, False, 1e-5),  # two blocks, of many pages
        (1, True, 1e-5),
    ],
)
def test_attention_is_that_of_plain_jax(length: int, quantized: bool, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    count = 1 + BATCH * WIDTH
    table = jnp.arange(1, count, dtype=jnp.int32).reshape(BATCH, WIDTH)
    positions = jnp.array([[37], [0], [90]], jnp.int32) + jnp.arange(length, dtype=jnp.int32)
    positions = positions.at[1, 3:].set(-1)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query, key, value = random(BATCH, length, HEADS * GROUPED, SIZE), *(random(BATCH, length, HEADS, SIZE),) * 2
    one, other = random(count, HEADS, SIZE, PAGE), random(count, HEADS, PAGE, SIZE)
    keys: Pages = one
    values: Pages = other
    heads_first: tuple[Pages, Pages] = (one.transpose(1, 0, 3, 2), other.transpose(1, 0, 2, 3))
    if quantized:
        scales = jnp.full((count, HEADS, PAGE), 0.02)
        whole = jnp.asarray(rng.integers(-127, 128, other.shape), jnp.int8)
        keys, values = QuantizedPages(whole.swapaxes(2, 3), scales), QuantizedPages(whole, scales)
        pages = QuantizedPages(whole.swapaxes(0, 1), scales.swapaxes(0, 1))
        heads_first = (pages, pages)
    want, *_ = portable.attend(
        query, key, value, keys, values, table, positions, scale=0.0884, cap=25.0, rope_base=500.0
    )
    got, *_ = attention.attend(
        query, key, value, *heads_first, table, positions, scale=0.0884, cap=25.0, rope_base=500.0, interpret=True
    )
    np.testing.assert_allclose(got, want, atol=tolerance)
