"""The hot operations against plain arithmetic, and their promise that rows do not disturb each other."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kernels.kv_pages import Pages
from workers.kernels.weights import QuantizedWeight, Weight, dequantize
from workers.kernels.xla import portable
from workers.kernels.xla.grouped_matmul import grouped_matmul
from workers.kernels.xla.paged_attention import paged_attention
from workers.model.attention import causal_attention

GROUPS, DEPTH, WIDTH, ROWS = 4, 32, 48, 40
_multiply = jax.jit(grouped_matmul)


@jax.jit
def _attend(
    queries: jax.Array, key_pages: Pages, value_pages: Pages, table: jax.Array, positions: jax.Array
) -> jax.Array:
    read = portable.read_pages(key_pages, value_pages)
    return paged_attention(queries, read, KV_HEADS, PAGE, table, positions, SCALE, CAP)


def _weight(quantized: bool) -> Weight:
    rng = np.random.default_rng(0)
    if not quantized:
        return jnp.asarray(rng.standard_normal((GROUPS, DEPTH, WIDTH), np.float32))
    return QuantizedWeight(
        jnp.asarray(rng.integers(-127, 128, (GROUPS, DEPTH, WIDTH), np.int8)),
        jnp.asarray(rng.uniform(0.01, 0.1, (GROUPS, 8, WIDTH))).astype(jnp.bfloat16),
    )


@pytest.mark.parametrize("quantized", [False, True])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 10), min_size=GROUPS, max_size=GROUPS))
def test_each_row_meets_the_matrix_of_its_group(quantized: bool, sizes: list[int]) -> None:
    weight = _weight(quantized)
    x = np.random.default_rng(1).standard_normal((ROWS, DEPTH)).astype(np.float32)
    got = np.asarray(_multiply(x, weight, jnp.array(sizes, jnp.int32)))
    matrices = np.asarray(dequantize(weight), np.float64)
    bounds = [0, *itertools.accumulate(sizes)]
    for group, (first, last) in enumerate(itertools.pairwise(bounds)):
        np.testing.assert_allclose(got[first:last], x[first:last] @ matrices[group], rtol=1e-4, atol=1e-4)


def test_a_row_gives_the_same_bits_wherever_and_beside_whomever_it_stands() -> None:
    weight, rng = _weight(True), np.random.default_rng(2)
    row = rng.standard_normal(DEPTH).astype(np.float32)
    seen = set()
    for _ in range(30):
        sizes = rng.multinomial(rng.integers(GROUPS, ROWS), [1 / GROUPS] * GROUPS)
        group = int(rng.choice(np.flatnonzero(sizes)))
        at = int(sizes[:group].sum() + rng.integers(sizes[group]))
        x = rng.standard_normal((ROWS, DEPTH)).astype(np.float32)
        x[at] = row
        # Put the row's group first in the weights, so that it always meets the same matrix.
        turned = jax.tree.map(lambda leaf, by=-group: jnp.roll(leaf, -by, axis=0), weight)
        seen.add(np.asarray(_multiply(x, turned, jnp.asarray(sizes, jnp.int32)))[at].tobytes())
    assert len(seen) == 1


PAGE, HEADS, KV_HEADS, SIZE, PAGES, SCALE, CAP = 4, 4, 2, 8, 200, 0.7, 25.0


def _paged(
    rng: np.random.Generator, lengths: list[int], sequences: list[np.ndarray], queries: np.ndarray
) -> np.ndarray:
    """Attention of the last `queries.shape[1]` positions of sequences, laid out on random pages."""
    key_pages = rng.standard_normal((PAGES, KV_HEADS, SIZE, PAGE)).astype(np.float32)
    value_pages = rng.standard_normal((PAGES, KV_HEADS, PAGE, SIZE)).astype(np.float32)
    width = 40
    free = iter(rng.permutation(np.arange(1, PAGES)).tolist())
    table = np.zeros((len(lengths), width), np.int32)
    for row, (length, kv) in enumerate(zip(lengths, sequences, strict=True)):
        for position in range(length):
            if position % PAGE == 0:
                table[row, position // PAGE] = next(free)
            page = table[row, position // PAGE]
            key_pages[page, :, :, position % PAGE] = kv[0, position]
            value_pages[page, :, position % PAGE] = kv[1, position]
    count = queries.shape[1]
    positions = np.array([range(length - count, length) for length in lengths], np.int32)
    return np.asarray(_attend(queries, key_pages, value_pages, table, positions))


def test_paged_attention_is_causal_attention() -> None:
    rng = np.random.default_rng(3)
    lengths = [5, 31, 140]
    sequences = [rng.standard_normal((2, n, KV_HEADS, SIZE)).astype(np.float32) * 3 for n in lengths]
    queries = rng.standard_normal((3, 5, HEADS, SIZE)).astype(np.float32) * 3
    got = _paged(rng, lengths, sequences, queries)
    for row, (n, kv) in enumerate(zip(lengths, sequences, strict=True)):
        full = np.zeros((1, n, HEADS, SIZE), np.float32)
        full[0, -5:] = queries[row]
        want = causal_attention(jnp.asarray(full), jnp.asarray(kv[:1]), jnp.asarray(kv[1:]), SCALE, CAP)
        np.testing.assert_allclose(got[row], np.asarray(want)[0, -5:], rtol=2e-5, atol=2e-5)


def test_attention_gives_the_same_bits_beside_a_longer_sequence_and_on_other_pages() -> None:
    rng = np.random.default_rng(4)
    mine = rng.standard_normal((2, 17, KV_HEADS, SIZE)).astype(np.float32)
    query = rng.standard_normal((1, 1, HEADS, SIZE)).astype(np.float32)
    seen = set()
    for other_length in (1, 30, 150):
        other = rng.standard_normal((2, other_length, KV_HEADS, SIZE)).astype(np.float32)
        queries = np.concatenate([query, rng.standard_normal((1, 1, HEADS, SIZE)).astype(np.float32)])
        seen.add(_paged(rng, [17, other_length], [mine, other], queries)[0].tobytes())
    assert len(seen) == 1


def test_padding_attends_to_nothing() -> None:
    keys, values = jnp.ones((3, KV_HEADS, SIZE, PAGE)), jnp.ones((3, KV_HEADS, PAGE, SIZE))
    positions = jnp.full((1, 2), -1, jnp.int32)
    got = _attend(jnp.ones((1, 2, HEADS, SIZE)), keys, values, jnp.zeros((1, 4), jnp.int32), positions)
    np.testing.assert_array_equal(np.asarray(got), 0)
