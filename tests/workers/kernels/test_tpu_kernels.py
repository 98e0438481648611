"""The kernels for TPUs, interpreted, against plain JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh

from tests.support.lowering import layer_loop
from workers.kernels.kv_pages import Pages, QuantizedPages
from workers.kernels.tpu import attention, matmul
from workers.kernels.tpu.kernels import TPU
from workers.kernels.weights import LayerWeight, QuantizedWeight
from workers.kernels.xla import portable
from workers.kernels.xla.grouped_matmul import grouped_matmul
from workers.runtime.mesh import AXES, TYPES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "scale_groups", "sizes"),
    [
        (16, 256, 256, 1, [3, 0, 5, 2]),
        (64, 4096, 384, 2, [10, 0, 0, 30, 1, 3, 0, 4]),  # two tiles of rows for each group of scales
        (64, 1024, 128, 8, [0, 64]),  # a tile has eight groups
        (600, 128, 128, 1, [599, 1]),  # more rows than a block
        (6, 96, 160, 3, [6, 0, 0]),  # nothing divides
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_grouped_products_are_those_of_plain_jax(
    rows: int, depth: int, columns: int, scale_groups: int, sizes: list[int], bits: int
) -> None:
    rng = np.random.default_rng(0)
    most = 2 ** (bits - 1) - 1
    values = rng.integers(-most, most + 1, (len(sizes), depth, columns))
    scales = rng.uniform(0.001, 0.002, (len(sizes), scale_groups, columns))
    weight = QuantizedWeight(
        jnp.asarray(values, jnp.int8 if bits == 8 else jnp.int4), jnp.asarray(scales, jnp.bfloat16)
    )
    x, group_sizes = jnp.asarray(rng.standard_normal((rows, depth)), jnp.float32), jnp.asarray(sizes, jnp.int32)
    got = matmul.grouped_matmul(x, weight, group_sizes, interpret=True)
    want = grouped_matmul(x, weight, group_sizes)
    np.testing.assert_allclose(got[: sum(sizes)], want[: sum(sizes)], rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_a_layer_reads_its_own_of_all_layers_weights() -> None:
    rng = np.random.default_rng(2)
    values = jnp.asarray(rng.integers(-127, 128, (3, 4, 256, 128)), jnp.int8)
    every = QuantizedWeight(values, jnp.asarray(rng.uniform(0.001, 0.002, (3, 4, 2, 128)), jnp.bfloat16))
    x, sizes = jnp.asarray(rng.standard_normal((9, 256)), jnp.float32), jnp.array([2, 0, 4, 3], jnp.int32)
    multiply = jax.jit(functools.partial(matmul.grouped_matmul, interpret=True))
    for layer in range(3):
        one = LayerWeight(every, jnp.int32(layer))
        want = grouped_matmul(x, one, sizes)
        np.testing.assert_allclose(multiply(x, one, sizes), want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("program", "loops"), [("decode", 1), ("prefill", 2)])
def test_grok_1_lowers_for_tpus(program: str, loops: int) -> None:
    """Only attention of a chunk loops within a layer."""
    device = AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = AbstractMesh((2, 8), AXES, axis_types=TYPES, abstract_device=device)
    layer = layer_loop(TPU, mesh, "tpu", program, jnp.bfloat16)
    assert layer.count("tpu_custom_call") >= 7
    assert layer.count("stablehlo.while") == loops


def test_rows_of_no_group_read_nothing_and_break_nothing() -> None:
    weight = QuantizedWeight(jnp.ones((2, 128, 128), jnp.int8), jnp.ones((2, 1, 128), jnp.bfloat16))
    got = matmul.grouped_matmul(jnp.ones((4, 128)), weight, jnp.zeros(2, jnp.int32), interpret=True)
    assert got.shape == (4, 128)


BATCH, HEADS, GROUPED, SIZE, PAGE, WIDTH = 3, 2, 3, 128, 16, 8


@pytest.mark.parametrize(
    ("length", "quantized", "tolerance"),
    [
        (1, False, 0.02),  # the kernel multiplies as a TPU does, in bfloat16
        (5, False, 1e-5),
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
    with pltpu.force_tpu_interpret_mode():
        got, *_ = attention.attend(
            query, key, value, *heads_first, table, positions, scale=0.0884, cap=25.0, rope_base=500.0
        )
    np.testing.assert_allclose(got, want, atol=tolerance)
