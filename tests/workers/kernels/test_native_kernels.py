"""The C++ kernels against plain arithmetic, on every instruction set of this machine; and each row by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from workers.kernels.cpu.kernels import native_kernels, use_instruction_set
from workers.kernels.int4 import INT4_ROWS, pack_int4
from workers.kernels.kv_pages import Pages
from workers.kernels.packed import PackedTable, PackedWeight, rows_of
from workers.kernels.packing import pack, pack_table
from workers.kernels.weights import LayerWeight, QuantizedWeight, dequantize
from workers.kernels.xla import portable

Array = np.ndarray[Any, np.dtype[Any]]
BEST = native_kernels().name
KERNELS = native_kernels()
assert KERNELS.packing is not None
PACKING = KERNELS.packing


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512-vnni"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if not use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert use_instruction_set(BEST)


def _quantized(rng: np.random.Generator, *shape: int, groups: int) -> QuantizedWeight:
    scales = rng.uniform(0.01, 0.1, (*shape[:-2], groups, shape[-1]))
    return QuantizedWeight(
        jnp.asarray(rng.integers(-128, 128, shape, np.int8)), jnp.asarray(scales.astype(ml_dtypes.bfloat16))
    )


def _packed(weight: QuantizedWeight, rounded: bool = True) -> PackedWeight:
    values = pack(np.asarray(weight.weight), weight.scales.shape[-2])
    return PackedWeight(jnp.asarray(values), weight.scales, weight.shape[-2], "rounded" if rounded else "unrounded")


def _in_4_bits(rng: np.random.Generator, *shape: int) -> tuple[PackedWeight, jax.Array]:
    """A weight that 4 bits hold as it is, packed and plain."""
    *lead, rows, columns = shape
    values, powers = rng.integers(-7, 8, shape), rng.integers(-8, -3, (*lead, -(-rows // INT4_ROWS), columns))
    values[..., ::INT4_ROWS, :] = 7
    weight = (values * 2.0 ** np.repeat(powers, INT4_ROWS, axis=-2)[..., :rows, :]).astype(np.float32)
    packed, scales = pack_int4(weight)
    return PackedWeight(jnp.asarray(packed), jnp.asarray(scales), rows, "int4"), jnp.asarray(weight)


def _close(got: jax.Array, want: Array, products: int = 1) -> None:
    """Activations of 16 bits a block are off by some 1e-5 of a typical value."""
    np.testing.assert_allclose(np.asarray(got), want, atol=4e-4 * products * want.std(), rtol=0)


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "groups"),
    [(1, 64, 4, 1), (7, 90, 33, 5), (3, 2304, 18, 1), (9, 16, 8, 8), (14, 2100, 10, 2)],
)
@pytest.mark.parametrize("rounded", [True, False])
def test_products_are_those_of_the_rounded_weights(
    rows: int, depth: int, columns: int, groups: int, rounded: bool
) -> None:
    rng = np.random.default_rng(depth)
    weights = [_quantized(rng, depth, n, groups=groups) for n in (columns, columns + 3)]
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    valid = np.arange(rows) != 1
    results = jax.jit(KERNELS.project)(x, valid, tuple(_packed(w, rounded) for w in weights))
    for result, weight in zip(results, weights, strict=True):
        exact = np.asarray(dequantize(weight), np.float64)
        if not rounded:
            scales = np.repeat(np.asarray(weight.scales, np.float64), depth // groups, axis=0)
            exact = np.asarray(weight.weight, np.float64) * scales
        _close(result, np.where(valid[:, None], x @ exact, 0.0))


@pytest.mark.parametrize(("depth", "columns"), [(128, 4), (90, 33), (2304, 18), (1100, 10)])
def test_products_of_4_bit_weights_are_those_of_their_values(depth: int, columns: int) -> None:
    rng = np.random.default_rng(depth)
    pairs = [_in_4_bits(rng, depth, n) for n in (columns, columns + 3)]
    for rows in range(1, 11):
        x, valid = rng.standard_normal((rows, depth)).astype(np.float32), np.arange(rows) != 4
        results = jax.jit(KERNELS.project)(x, valid, tuple(packed for packed, _ in pairs))
        for result, (_, plain) in zip(results, pairs, strict=True):
            _close(result, np.where(valid[:, None], x @ np.asarray(plain), 0.0))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 256])  # of different code
def test_every_weight_is_rounded_as_bfloat16_is(rows: int) -> None:
    """All integers times all mantissas of a scale, of several sizes."""
    weight = np.repeat(np.arange(-128, 128, dtype=np.int8)[:, None], 128, axis=1)
    one = np.eye(256, dtype=np.float32)  # a row reads a weight
    for power in (-60, -7, 3):
        scales = ((128 + np.arange(128)) * 2.0**power).astype(ml_dtypes.bfloat16)
        packed = PackedWeight(jnp.asarray(pack(weight, 1)), jnp.asarray(scales[None]), 256, "rounded")
        parts = [one[at : at + rows] for at in range(0, 256, rows)]
        got = [KERNELS.project(jnp.asarray(part), jnp.ones(len(part), bool), (packed,))[0] for part in parts]
        want = (weight.astype(np.float32) * scales.astype(np.float32)).astype(ml_dtypes.bfloat16)
        np.testing.assert_allclose(np.concatenate(got), want.astype(np.float32), rtol=1e-6)


def test_the_rounding_of_weights_is_seen(instruction_set: str) -> None:
    """All weights of a column round the same way here, so that without the rounding sums would be far off."""
    weight = QuantizedWeight(jnp.full((256, 4), 111, jnp.int8), jnp.full((1, 4), 1.0078125, jnp.bfloat16))
    (got,) = KERNELS.project(jnp.ones((1, 256)), jnp.ones(1, bool), (_packed(weight),))
    assert float(dequantize(weight)[0, 0]) == 112.0  # 111.867
    np.testing.assert_allclose(np.asarray(got), 256 * 112.0, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_experts_are_those_of_plain_jax(rows: int) -> None:
    rng = np.random.default_rng(rows)
    size, hidden, count = 72, 100, 5
    gate, up = (_quantized(rng, count, size, hidden, groups=1) for _ in range(2))
    down = _quantized(rng, count, hidden, size, groups=4)
    x = rng.standard_normal((rows, size)).astype(np.float32) * 0.1
    gates = rng.random((rows, 2)).astype(np.float32)
    chosen = np.stack([rng.permutation(count)[:2] for _ in range(rows)]).astype(np.int32)
    valid = rng.random(rows) < 0.8
    given = [jnp.asarray(array) for array in (x, gates, chosen, valid)]
    want = portable.experts(given[0], given[1], given[2], given[3], gate, up, down, None)
    got = jax.jit(functools.partial(KERNELS.experts, reduce=None))(
        x, gates, chosen, valid, _packed(gate), _packed(up), _packed(down)
    )
    _close(got, np.asarray(want), products=3)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_experts_of_4_bits_are_those_of_plain_jax(rows: int) -> None:
    rng = np.random.default_rng(rows)
    size, hidden, count = 136, 300, 5
    pairs = [_in_4_bits(rng, count, *shape) for shape in ((size, hidden), (size, hidden), (hidden, size))]
    x, gates = rng.standard_normal((rows, size)).astype(np.float32) * 0.1, rng.random((rows, 2)).astype(np.float32)
    chosen = np.stack([rng.permutation(count)[:2] for _ in range(rows)]).astype(np.int32)
    given = [jnp.asarray(array) for array in (x, gates, chosen, np.ones(rows, bool))]
    (gate, up, down), plain = ([pair[i] for pair in pairs] for i in (0, 1))
    want = portable.experts(given[0], given[1], given[2], given[3], plain[0], plain[1], plain[2], None)
    _close(KERNELS.experts(*given, gate, up, down, None), np.asarray(want), products=3)


def test_a_layers_weights_are_read_among_those_of_all() -> None:
    rng = np.random.default_rng(7)
    layers, count, size, hidden = 3, 2, 72, 100
    x = rng.standard_normal((5, size)).astype(np.float32)
    gates, chosen, valid = (
        np.full((5, 2), 0.5, np.float32),
        np.tile(np.array([[0, 1]], np.int32), (5, 1)),
        np.ones(5, bool),
    )
    gate, up = (_packed(_quantized(rng, layers, count, size, hidden, groups=1)) for _ in range(2))
    down = _packed(_quantized(rng, layers, count, hidden, size, groups=4))
    projected = _packed(_quantized(rng, layers, size, 12, groups=1))
    for layer in range(layers):
        among = [LayerWeight(weight, jnp.int32(layer)) for weight in (gate, up, down, projected)]
        alone = [weight.taken() for weight in among]
        for weights in zip(among, alone, strict=True):
            assert weights[0].shape == weights[1].shape
        mixed = [KERNELS.experts(x, gates, chosen, valid, *weights[:3], None) for weights in (among, alone)]
        products = [KERNELS.project(jnp.asarray(x), jnp.asarray(valid), (weights[3],)) for weights in (among, alone)]
        np.testing.assert_array_equal(mixed[0], mixed[1])
        np.testing.assert_array_equal(products[0][0], products[1][0])


@pytest.mark.parametrize("width", [90, 1100])
def test_a_table_gives_its_rows_and_its_logits(width: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((41, width)).astype(np.float32)
    table[3] = 0.0
    values, scales = pack_table(table)
    packed = PackedTable(jnp.asarray(values), jnp.asarray(scales), width)
    tokens = jnp.array([[0, 3, 40], [17, 2, 2]])
    np.testing.assert_allclose(np.asarray(rows_of(packed, tokens)), table[np.asarray(tokens)], atol=1e-4)
    hidden = rng.standard_normal((5, width)).astype(np.float32)
    _close(jax.jit(KERNELS.logits)(hidden, np.ones(5, bool), packed), hidden @ table.T)


def test_norms_and_routes_are_those_of_plain_jax() -> None:
    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, 20, 70)).astype(np.float32) * 3
    scale, valid = rng.random(70).astype(np.float32), np.ones(20, bool)
    np.testing.assert_allclose(
        np.asarray(KERNELS.norm(x, valid, scale, residual, epsilon=0.1)),
        np.asarray(portable.norm(*map(jnp.asarray, (x, valid, scale, residual)), epsilon=0.1)),
        rtol=1e-5,
        atol=1e-5,
    )
    for experts in (8, 5):
        weight = rng.standard_normal((70, experts)).astype(np.float32)
        arrays = (jnp.asarray(x), jnp.asarray(valid), jnp.asarray(weight))
        for got, want in zip(
            KERNELS.route(*arrays, 2), portable.route(arrays[0], arrays[1], arrays[2], 2), strict=True
        ):
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-6)


PAGE, HEADS, KV_HEADS, SIZE = 16, 6, 2, 32


def _attention(
    kernels: Any, rng: np.random.Generator, starts: list[int], length: int, dtype: Any, pages: tuple[Array, Array]
) -> tuple[Array, ...]:
    """`length` new positions of each sequence after `starts` positions that lie on pages."""
    batch, width = len(starts), 100
    table = 1 + np.arange(batch * width, dtype=np.int32).reshape(batch, width)
    query, key, value = (
        rng.standard_normal((batch, length, heads, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    positions = (np.array(starts)[:, None] + np.arange(length)).astype(np.int32)
    positions[-1, -1] = -1  # padding
    arrays = [jnp.asarray(p).astype(dtype) for p in pages]
    attend = jax.jit(functools.partial(kernels, scale=0.3, cap=25.0, rope_base=2e4))
    return tuple(np.asarray(a, np.float32) for a in attend(query, key, value, *arrays, table, positions))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("starts", "length"), [([0, 5], 1), ([1500, 31, 1023], 1), ([16, 0], 40)])
def test_attention_is_that_of_plain_jax(dtype: Any, starts: list[int], length: int) -> None:
    pages = 1 + len(starts) * 100
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((pages, KV_HEADS, SIZE, PAGE)).astype(np.float32)
    values = rng.standard_normal((pages, KV_HEADS, PAGE, SIZE)).astype(np.float32)
    got, want = (
        _attention(kernels, np.random.default_rng(1), starts, length, dtype, (keys, values))
        for kernels in (KERNELS.attend, portable.attend)
    )
    tolerance = (
        1e-4 if dtype == jnp.float32 else 1e-2
    )  # a rounding of bfloat16 where the rotation differs in the last bit
    np.testing.assert_allclose(got[0], want[0], atol=tolerance)
    for mine, other in zip(got[1:], want[1:], strict=True):  # page 0 takes the writes of padding, if there are any
        np.testing.assert_allclose(mine[1:], other[1:], atol=tolerance)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_gives_the_same_bits_in_any_company(bits: int) -> None:
    rng = np.random.default_rng(3)
    size, hidden = 1100, 130
    if bits == 8:
        gate, up = (_packed(_quantized(rng, 4, size, hidden, groups=1)) for _ in range(2))
        down = _packed(_quantized(rng, 4, hidden, size, groups=2))
    else:
        shapes = ((size, hidden), (size, hidden), (hidden, size))
        gate, up, down = (_in_4_bits(rng, 4, *shape)[0] for shape in shapes)
    values, scales = pack_table(rng.standard_normal((50, size)).astype(np.float32))
    table = PackedTable(jnp.asarray(values), jnp.asarray(scales), size)
    mine = rng.standard_normal(size).astype(np.float32)
    seen = set()
    for rows in (1, 2, 3, 4, 5, 8, 16, 33):
        x = rng.standard_normal((rows, size)).astype(np.float32)
        chosen = rng.integers(0, 4, (rows, 2)).astype(np.int32)
        gates = rng.random((rows, 2)).astype(np.float32)
        at = int(rng.integers(rows))
        x[at], chosen[at], gates[at] = mine, (2, 1), (0.5, 0.25)
        valid = rng.random(rows) < 0.8
        valid[at] = True
        mixed = KERNELS.experts(x, gates, chosen, valid, gate, up, down, None)
        logits = KERNELS.logits(jnp.asarray(x), jnp.asarray(valid), table)
        seen.add(np.asarray(mixed)[at].tobytes() + np.asarray(logits)[at].tobytes())
    assert len(seen) == 1


def test_attention_gives_the_same_bits_one_position_at_a_time_and_all_at_once() -> None:
    rng = np.random.default_rng(4)
    length, start = 37, 1010  # over the end of a segment
    pages = tuple(
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((100, KV_HEADS, SIZE, PAGE), (100, KV_HEADS, PAGE, SIZE))
    )
    table = np.arange(1, 91, dtype=np.int32)[None]
    query, key, value = (
        rng.standard_normal((1, length, h, SIZE)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    positions = (start + np.arange(length, dtype=np.int32))[None]
    attend = functools.partial(KERNELS.attend, scale=0.3, cap=30.0, rope_base=1e4)
    together, _, _ = attend(query, key, value, *map(jnp.asarray, pages), table, positions)
    keys: Pages = jnp.asarray(pages[0])
    values: Pages = jnp.asarray(pages[1])
    for i in range(length):
        one = slice(i, i + 1)
        alone, keys, values = attend(query[:, one], key[:, one], value[:, one], keys, values, table, positions[:, one])
        np.testing.assert_array_equal(np.asarray(alone)[0, 0], np.asarray(together)[0, i])


def test_what_is_no_number_stays_none() -> None:
    rng = np.random.default_rng(0)
    for weight in (_packed(_quantized(rng, 64, 8, groups=1)), _in_4_bits(rng, 64, 8)[0]):
        for poison in (np.nan, np.inf):
            x = np.ones((2, 64), np.float32)
            x[1, 5] = poison
            (got,) = KERNELS.project(jnp.asarray(x), jnp.ones(2, bool), (weight,))
            assert np.isfinite(np.asarray(got)[0]).all()
            assert not np.isfinite(np.asarray(got)[1]).any()


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 130, 37), 1), ((3, 256, 64), 8), ((1024, 48), 1), ((2, 4096, 1000), 8), ((72, 3), 3)],
)
def test_weights_are_packed_as_numpy_packs_them(shape: tuple[int, ...], groups: int) -> None:
    weight = np.random.default_rng(0).integers(-128, 128, shape, np.int8)
    packed = pack(weight, groups)
    got = np.ones_like(packed)
    PACKING.weight(weight, groups, got)
    np.testing.assert_array_equal(got, packed)
    with pytest.raises(ValueError, match="must be"):
        PACKING.weight(weight, groups, got[..., :-1])


@pytest.mark.parametrize(("shape", "groups"), [((2, 130, 37), 1), ((3, 256, 64), 8), ((2, 1400, 1000), 7)])
def test_weights_are_quantized_and_packed_in_4_bits_as_numpy_does_it(shape: tuple[int, ...], groups: int) -> None:
    rng = np.random.default_rng(0)
    *lead, rows, columns = shape
    weight = rng.integers(-128, 128, shape, np.int8)
    factors = rng.uniform(1e-3, 2e-3, (*lead, groups, columns)).astype(ml_dtypes.bfloat16)
    factors[0, 0, 3], factors[0, 0, 5] = 0, np.nan
    of_row = np.arange(rows) // (rows // groups)
    products = weight.astype(np.float32) * factors[..., of_row, :].astype(np.float32)
    values, scales = pack_int4(products.astype(ml_dtypes.bfloat16).astype(np.float32))
    got = np.ones_like(values), np.ones_like(scales)
    PACKING.int4(weight, factors, of_row, *got)
    np.testing.assert_array_equal(got[1].astype(np.float32), scales.astype(np.float32))
    np.testing.assert_array_equal(got[0][1:], values[1:])  # of a scale that is no number, values say nothing
    with pytest.raises(ValueError, match="must be"):
        PACKING.int4(weight, factors, of_row, got[0], got[1][..., :-1])


@pytest.mark.parametrize("shape", [(50, 32), (1001, 96), (7, 2100)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_a_table_is_packed_as_numpy_packs_it(shape: tuple[int, int], dtype: type) -> None:
    table: Array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    table[3] = 0
    values, scales = pack_table(table)
    got = np.ones_like(values), np.ones_like(scales)
    PACKING.table(table, *got)
    np.testing.assert_array_equal(got[0], values)
    np.testing.assert_array_equal(got[1], scales)
