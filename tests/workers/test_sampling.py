"""What is drawn follows the distribution that was asked for, and depends on seed and position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.runtime.sampling import Sampled, SamplingRows, filter_logits, sample

VOCAB = 32
_sample = jax.jit(sample)
_filter = jax.jit(filter_logits)


def _rows(count: int, **values: float) -> SamplingRows:
    defaults = {"seed_low": 0, "seed_high": 0, "position": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    dtypes = {
        "seed_low": jnp.uint32, "seed_high": jnp.uint32, "position": jnp.int32,
        "temperature": jnp.float32, "top_p": jnp.float32, "top_k": jnp.int32,
    }  # fmt: skip
    merged = {**defaults, **values}
    return SamplingRows(**{name: jnp.full(count, merged[name], dtypes[name]) for name in defaults})


def _logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 2


def _draw_many(logits: np.ndarray, count: int = 4000, bias: np.ndarray | None = None, **values: float) -> np.ndarray:
    rows = _rows(count, **values)
    rows = SamplingRows(**{**vars(rows), "position": jnp.arange(count, dtype=jnp.int32)})
    biases = np.zeros(VOCAB, np.float32) if bias is None else bias
    drawn = _sample(jnp.tile(logits, (count, 1)), jnp.tile(biases, (count, 1)), rows)
    return np.bincount(np.asarray(drawn.token), minlength=VOCAB) / count


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def _expected(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The distribution by definition, over the sorted vocabulary."""
    order = np.argsort(-logits)
    p = _softmax(logits / temperature)[order]
    if top_k:
        p[top_k:] = 0
        p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0
    result = np.zeros(VOCAB)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 0.8, 0), (1.0, 1.0, 3), (1.5, 0.6, 10)]
)
def test_frequencies_are_those_of_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = _logits()
    got = _draw_many(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    want = _expected(logits, temperature, top_p, top_k)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want))
    # Five standard deviations of a frequency over 4000 draws.
    assert (np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.integers(0, VOCAB))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, top_p: float, top_k: int) -> None:
    logits = _logits(seed)
    kept = np.isfinite(np.asarray(_filter(logits[None], jnp.array([top_p]), jnp.array([top_k], jnp.int32)))[0])
    p = _softmax(np.where(np.isin(np.arange(VOCAB), np.argsort(-logits)[: top_k or VOCAB]), logits, -np.inf))
    assert p[kept].sum() >= top_p - 1e-5
    assert p[kept].sum() - p[kept].min() < top_p + 1e-5
    assert p[kept].min() >= p[~kept].max(initial=0.0)


def test_temperature_0_takes_the_most_likely_token() -> None:
    assert _draw_many(_logits(), temperature=0.0)[_logits().argmax()] == 1.0


def test_a_temperature_next_to_0_is_next_to_greedy() -> None:
    assert _draw_many(_logits(), temperature=2e-38)[_logits().argmax()] == 1.0


def test_a_row_without_filters_is_not_touched_by_those_of_another() -> None:
    logits = jnp.tile(_logits(), (2, 1))
    rows = _rows(2)
    alone = _sample(logits, jnp.zeros((2, VOCAB)), rows)
    rows = SamplingRows(**{**vars(rows), "top_p": jnp.array([1.0, 0.1]), "temperature": jnp.array([1.0, 0.0])})
    beside = _sample(logits, jnp.zeros((2, VOCAB)), rows)
    assert alone.token[0] == beside.token[0]


def _token(**values: float) -> int:
    drawn: Sampled = _sample(jnp.zeros((1, 4096)), jnp.zeros((1, 4096)), _rows(1, **values))
    return int(drawn.token[0])


def test_a_draw_depends_on_all_of_the_seed_and_on_the_position() -> None:
    assert _token(seed_low=1, position=5) == _token(seed_low=1, position=5)
    draws = [_token(seed_low=1), _token(seed_low=2), _token(seed_high=1), _token(seed_low=1, position=1)]
    assert len(set(draws)) == 4


def test_logprobs_are_the_models_own_whatever_is_filtered_or_biased() -> None:
    logits = _logits()
    bias = np.full(VOCAB, -np.inf, np.float32)
    bias[7] = 0.0
    drawn = _sample(logits[None], bias[None], _rows(1, temperature=0.3, top_p=0.1, top_k=2))
    logprobs = np.log(_softmax(logits))
    assert drawn.token[0] == 7
    np.testing.assert_allclose(drawn.logprob[0], logprobs[7], rtol=1e-5)
    best = np.argsort(-logits)[:8]
    np.testing.assert_array_equal(drawn.top_ids[0], best)
    np.testing.assert_allclose(drawn.top_logprobs[0], logprobs[best], rtol=1e-5)


def test_bias_moves_and_mask_forbids() -> None:
    logits = _logits()
    bias = np.zeros(VOCAB, np.float32)
    bias[3], bias[int(logits.argmax())] = 2.0, -np.inf
    got = _draw_many(logits, bias=bias)
    want = _softmax(logits + bias)
    assert got[logits.argmax()] == 0
    assert abs(got[3] - want[3]) < 5 * np.sqrt(want[3] * (1 - want[3]) / 4000)
