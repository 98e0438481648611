"""What is drawn follows the distribution that was asked for, and depends on seed and position alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.sampling import (
    BIASED,
    CANDIDATES,
    IN_PROMPT,
    MASKED,
    PENALIZED,
    TOP_IDS,
    TOP_LOGPROBS,
    SamplingRows,
    SamplingState,
    sample,
    sample_in_turns,
)

pytestmark = pytest.mark.slow

VOCAB = 100


class Sampled(NamedTuple):
    """Unpacked samples of B rows."""

    token: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def _unpacked(sampler: Any) -> Callable[..., Sampled]:
    @jax.jit
    def sampled(*arguments: Any) -> Sampled:
        packed = sampler(*arguments)
        floats = jax.lax.bitcast_convert_type(packed, jnp.float32)
        return Sampled(packed[:, 0], floats[:, 1], packed[:, TOP_IDS:TOP_LOGPROBS], floats[:, TOP_LOGPROBS:])

    return sampled


SAMPLERS = {"portable": _unpacked(sample), "native": _unpacked(native_kernels().sample)}

both = pytest.mark.parametrize("sampler", SAMPLERS)


def _rows(count: int, **values: float) -> SamplingRows:
    dtypes = {
        "slot": jnp.int32, "active": jnp.bool, "flags": jnp.int32, "seed_low": jnp.uint32, "seed_high": jnp.uint32,
        "position": jnp.int32, "temperature": jnp.float32, "top_p": jnp.float32, "min_p": jnp.float32,
        "top_k": jnp.int32, "repetition": jnp.float32, "presence": jnp.float32, "frequency": jnp.float32,
    }  # fmt: skip
    defaults = dict.fromkeys(dtypes, 0.0) | {"active": 1, "temperature": 1.0, "top_p": 1.0, "repetition": 1.0}
    return SamplingRows(**{name: jnp.full(count, (defaults | values)[name], dtype) for name, dtype in dtypes.items()})


def _state(bias: np.ndarray | None = None, counts: np.ndarray | None = None, vocab: int = VOCAB) -> SamplingState:
    """Of one slot, with every third token masked."""
    mask = np.zeros((1, -(-vocab // 32)), np.uint32)
    for token in range(0, vocab, 3):
        mask[0, token // 32] |= np.uint32(1 << token % 32)
    return SamplingState(
        jnp.asarray(np.zeros(vocab) if bias is None else bias, jnp.float32)[None],
        jnp.asarray(np.zeros(vocab) if counts is None else counts, jnp.int32)[None],
        jnp.asarray(mask.view(np.int32)),
    )


def _logits(seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * 2


def _draw_many(
    sampler: str, logits: np.ndarray, count: int = 4000, state: SamplingState | None = None, **values: float
) -> np.ndarray:
    rows = dataclasses.replace(_rows(count, **values), position=jnp.arange(count, dtype=jnp.int32))
    drawn = SAMPLERS[sampler](jnp.tile(logits, (count, 1)), state or _state(vocab=logits.size), rows)
    return np.bincount(np.asarray(drawn.token), minlength=logits.size) / count


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def _expected(logits: np.ndarray, temperature: float, top_p: float, top_k: int, min_p: float) -> np.ndarray:
    """The distribution by definition, over the sorted vocabulary."""
    order = np.argsort(-logits, kind="stable")
    p = _softmax(logits.astype(np.float64) / temperature)[order]
    if top_k:
        p[top_k:] = 0
        p /= p.sum()
    p[(np.cumsum(p) - p >= top_p) | (p < min_p * p[0])] = 0
    result = np.zeros(logits.size)
    result[order] = p / p.sum()
    return result


@both
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.5, 1.0, 0, 0.0),
        (2.0, 0.8, 0, 0.0),
        (1.0, 1.0, 3, 0.0),
        (1.5, 0.6, 10, 0.0),
        (1.0, 1.0, 0, 0.2),
    ],
)
def test_frequencies_are_those_of_the_distribution(
    sampler: str, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits = _logits()
    got = _draw_many(sampler, logits, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    want = _expected(logits, temperature, top_p, top_k, min_p)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want))
    # Five standard deviations of a frequency over 4000 draws.
    assert (np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all()


@both
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_the_kept_set_is_exact_whether_or_not_the_likeliest_candidates_hold_it(sampler: str, spread: float) -> None:
    """A flat distribution's nucleus is far larger than the bounded set of candidates, a steep one's is within it."""
    vocab = 800
    logits = np.random.default_rng(5).standard_normal(vocab).astype(np.float32) * spread
    want = _expected(logits, 1.0, 0.9, 0, 0.0)
    kept = np.flatnonzero(want)
    assert (kept.size > CANDIDATES) == (spread < 5)
    got = _draw_many(sampler, logits, count=8000, top_p=0.9)
    assert set(np.flatnonzero(got)) <= set(kept)
    edge = kept[np.argsort(logits[kept])]
    least = edge[: kept.size // 4]  # that the unlikely end is drawn too shows that nothing of the set is missing
    assert abs(got[least].sum() - want[least].sum()) < 5 * np.sqrt(want[least].sum() / 8000)


@both
def test_more_than_the_candidates_can_be_asked_for(sampler: str) -> None:
    logits = np.zeros(300, np.float32)
    got = _draw_many(sampler, logits, count=8000, top_k=CANDIDATES + 40)
    assert np.count_nonzero(got) == CANDIDATES + 40  # of equals the first
    assert not got[CANDIDATES + 40 :].any()


@settings(max_examples=60, deadline=None)
@example(3, 1.0, CANDIDATES + 16, 0.0, 3.0)
@example(3, 0.99, 0, 0.0, 3.0)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(0, VOCAB), st.floats(0.0, 0.5), st.floats(0.1, 3.0))
def test_both_samplers_draw_the_same(seed: int, top_p: float, top_k: int, min_p: float, temperature: float) -> None:
    """They round differently, so that in a great many draws one may fall on the other side of a border."""
    logits = jnp.tile(_logits(seed), (200, 1))
    rows = _rows(200, top_p=top_p, top_k=top_k, min_p=min_p, temperature=temperature, seed_low=seed)
    rows = dataclasses.replace(rows, position=jnp.arange(200, dtype=jnp.int32))
    one, other = (sampler(logits, _state(), rows) for sampler in SAMPLERS.values())
    assert np.count_nonzero(np.asarray(one.token) != np.asarray(other.token)) <= 1
    np.testing.assert_array_equal(one.top_ids, other.top_ids)
    np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, rtol=1e-5, atol=1e-5)


@both
def test_temperature_0_takes_the_most_likely_token_the_first_of_equals(sampler: str) -> None:
    assert _draw_many(sampler, _logits(), temperature=0.0)[_logits().argmax()] == 1.0
    assert _draw_many(sampler, np.zeros(VOCAB, np.float32), temperature=0.0)[0] == 1.0


@both
def test_a_temperature_next_to_0_is_next_to_greedy(sampler: str) -> None:
    assert _draw_many(sampler, _logits(), temperature=2e-38)[_logits().argmax()] == 1.0


@both
def test_a_row_is_not_touched_by_the_others(sampler: str) -> None:
    logits = jnp.tile(_logits(), (3, 1))
    alone = SAMPLERS[sampler](logits, _state(), _rows(3, top_p=0.9))
    rows = dataclasses.replace(
        _rows(3),
        top_p=jnp.array([0.9, 0.1, 0.9999]),
        temperature=jnp.array([1.0, 0.0, 50.0]),
        flags=jnp.array([0, 4, 0]),
    )
    assert alone.token[0] == SAMPLERS[sampler](logits, _state(), rows).token[0]


@pytest.mark.parametrize("sampler", [*SAMPLERS, "in turns"])
@pytest.mark.parametrize("vocab", [VOCAB, 131072])
def test_a_row_has_the_same_bits_in_batches_of_any_size(sampler: str, vocab: int) -> None:
    count = 70
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((count, vocab)), jnp.float32) * 2
    rows = dataclasses.replace(
        _rows(count, top_p=0.9),
        position=jnp.arange(count, dtype=jnp.int32),
        top_k=jnp.arange(count, dtype=jnp.int32) % 3 * 30,
        temperature=jnp.arange(count) % 4 / 2,
    )
    state = _state(vocab=vocab)
    draw = SAMPLERS.get(sampler) or _unpacked(sample_in_turns)  # which takes all 70 at once
    every = draw(logits, state, rows)
    for some in (1, 8, 64):
        got = draw(logits[:some], state, jax.tree.map(lambda row, some=some: row[:some], rows))
        for own, all_own in zip(got, every, strict=True):
            np.testing.assert_array_equal(own, all_own[:some])


def _token(sampler: str, **values: float) -> int:
    drawn = SAMPLERS[sampler](jnp.zeros((1, 4096)), _state(vocab=4096), _rows(1, **values))
    return int(drawn.token[0])


@both
def test_a_draw_depends_on_all_of_the_seed_and_on_the_position(sampler: str) -> None:
    assert _token(sampler, seed_low=1, position=5) == _token(sampler, seed_low=1, position=5)
    seeds = [{"seed_low": 1}, {"seed_low": 2}, {"seed_high": 1}, {"seed_low": 1, "position": 1}]
    assert len({_token(sampler, **seed) for seed in seeds}) == 4


@both
def test_logprobs_are_the_models_own_whatever_is_filtered_or_biased(sampler: str) -> None:
    logits = _logits()
    bias = np.full(VOCAB, -np.inf, np.float32)
    bias[7] = 0.0
    rows = _rows(1, temperature=0.3, top_p=0.1, top_k=2, flags=BIASED)
    drawn = SAMPLERS[sampler](logits[None], _state(bias), rows)
    logprobs = np.log(_softmax(logits))
    assert drawn.token[0] == 7
    np.testing.assert_allclose(drawn.logprob[0], logprobs[7], rtol=1e-5)
    best = np.argsort(-logits)[:8]
    np.testing.assert_array_equal(drawn.top_ids[0], best)
    np.testing.assert_allclose(drawn.top_logprobs[0], logprobs[best], rtol=1e-5)


@both
def test_bias_moves_and_mask_forbids(sampler: str) -> None:
    logits = _logits()
    bias = np.zeros(VOCAB, np.float32)
    bias[3] = 2.0
    got = _draw_many(sampler, logits, state=_state(bias), flags=BIASED | MASKED)
    want = _softmax(np.where(np.arange(VOCAB) % 3 == 0, logits + bias, -np.inf))
    assert not got[np.arange(VOCAB) % 3 != 0].any()
    assert abs(got[3] - want[3]) < 5 * np.sqrt(want[3] * (1 - want[3]) / 4000)


@both
def test_penalties_hold_down_what_was_seen(sampler: str) -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0] + [-20.0] * (VOCAB - 4), np.float32)
    counts = np.zeros(VOCAB, np.int32)
    counts[0], counts[1], counts[3] = IN_PROMPT, 2, IN_PROMPT | 1
    got = _draw_many(
        sampler, logits, state=_state(None, counts), flags=PENALIZED, repetition=2.0, presence=0.5, frequency=0.25
    )
    adjusted = logits.copy()
    adjusted[0], adjusted[1], adjusted[3] = 1.5, 1.45 - 0.5 - 2 * 0.25, -2.0 - 0.5 - 0.25
    want = _softmax(adjusted)
    assert (np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all()
    unmoved = _draw_many(sampler, logits, state=_state(None, counts), repetition=2.0)  # not flagged
    assert unmoved[0] > got[0]


def test_rounded_sums_never_draw_what_is_not_kept() -> None:
    """Over many zero weights a sum in float32 may rise by its last bit."""
    vocab = 131072
    rng = np.random.default_rng(0)
    logits = np.full(vocab, -np.inf, np.float32)
    allowed = rng.choice(vocab, 1000, replace=False)
    logits[allowed] = rng.standard_normal(1000).astype(np.float32)
    rows = dataclasses.replace(_rows(4096, seed_low=1), position=jnp.arange(4096, dtype=jnp.int32))
    draw = jax.jit(lambda logits, rows: sample(jnp.broadcast_to(logits, (64, vocab)), _state(vocab=vocab), rows)[:, 0])
    for top_k in (0, 900):
        for start in range(0, 4096, 64):
            some = jax.tree.map(lambda values, start=start: values[start : start + 64], rows)
            some = dataclasses.replace(some, top_k=jnp.full(64, top_k, jnp.int32))
            assert set(np.asarray(draw(logits, some)).tolist()) <= set(allowed.tolist())
