"""From logits to tokens: counter-based, so that a token depends on its request's seed and its position alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from workers.messages.plan import ALTERNATIVES

#: The most likely tokens among which filtered draws are looked for before all are searched.
CANDIDATES = 64

#: What of the state a row's draw depends on: bits of `SamplingRows.flags`.
BIASED, PENALIZED, MASKED = 1, 2, 4

#: Numbers that one operation adds up.
_ADDED = 64

#: Rows that `sample_in_turns` takes at a time: what fills a register of TPUs.
_AT_A_TIME = 8

#: In `SamplingState.counts`: set for tokens of the prompt; the bits below count how often a token was generated.
IN_PROMPT = 1 << 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """How each row of a batch is to be sampled; all arrays are [B].

    Attributes:
      slot: int32, whose row of the state it is.
      active: bool; what other rows sample is not used.
      flags: int32, of BIASED, PENALIZED and MASKED.
      seed_low, seed_high: uint32 halves of the request's seed.
      position: int32, of the token to draw, counted from the start of the sequence.
      temperature: float32; 0 takes the most likely token.
      top_p: float32 in (0, 1]; 1 keeps all.
      min_p: float32 in [0, 1]; a token must be this part of the most likely one's probability; 0 keeps all.
      top_k: int32; 0 keeps all.
      repetition: float32 > 0; logits of tokens seen in prompt or completion are divided by it (or multiplied, below zero).
      presence, frequency: float32; subtracted from the logits of generated tokens, once and for each time.
    """

    slot: jax.Array
    active: jax.Array
    flags: jax.Array
    seed_low: jax.Array
    seed_high: jax.Array
    position: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What the device keeps for each slot.

    Attributes:
      bias: [slots, V] float32, added to the logits.
      counts: [slots, V] int32, see IN_PROMPT.
      mask: [slots, ceil(V / 32)] int32, a bit for each token that may be drawn.
    """

    bias: jax.Array
    counts: jax.Array
    mask: jax.Array


#: Numbers of a packed sample, all int32: the token; the bits of its logarithmic probability (float32) under the model itself,
#: before temperature, bias, mask, penalties and filters; the most likely tokens under the model itself; the bits of theirs.
PACKED_WIDTH = 2 + 2 * ALTERNATIVES
#: Where the alternatives and their probabilities lie in it.
TOP_IDS, TOP_LOGPROBS = 2, 2 + ALTERNATIVES


def uniforms(rows: SamplingRows) -> jax.Array:
    """A number in [0, 1) a row, [B] float32, from its seed and position alone."""
    halves = jnp.stack([rows.seed_high, rows.seed_low], axis=-1)  # [B, 2]
    keys = jax.random.wrap_key_data(halves, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, rows.position)
    return jax.vmap(jax.random.uniform)(keys)


def sample(logits: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    """Draws one token a row from softmax(adjusted logits / temperature), filtered by top_k, then top_p, then min_p.

    The draw inverts the distribution function at one uniform number: over the tokens in their order where nothing is
    filtered, over those that are kept from the most likely on where something is and the CANDIDATES hold them all. Logits
    are adjusted by penalties, bias and mask, in this order.

    Args:
      logits: [B, V] float32.
      state: of all slots.
      rows: the rows' parameters.

    Returns:
      packed samples, [B, PACKED_WIDTH] int32.
    """
    logprobs = _log_softmax(logits)
    adjusted = lax.cond(jnp.any(rows.flags != 0), lambda: _adjust(logits, state, rows), lambda: logits)
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        # Relative to the largest, so that no temperature, however small, makes more than one infinite.
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        weights = jnp.exp((adjusted - jnp.max(adjusted, axis=-1, keepdims=True)) / temperature)
        uniform = uniforms(rows)
        filtered = (rows.top_p < 1) | (rows.top_k > 0) | (rows.min_p > 0)
        sums = jnp.cumsum(weights, axis=-1)
        total = jnp.max(sums, axis=-1)  # the last; TPUs would turn the whole round to take it
        plain = _first(sums > (uniform * total)[:, None], weights > 0, greedy)
        kept = lax.cond(
            jnp.any(filtered & rows.active), lambda: _draw_filtered(weights, total, uniform, rows), lambda: plain
        )
        return jnp.where(filtered, kept, plain)

    drawn = lax.cond(jnp.any((rows.temperature > 0) & rows.active), draw, lambda: greedy)
    token = jnp.where(rows.temperature > 0, drawn, greedy)
    return _packed(token, _taken(logprobs, token), logprobs)


def sample_in_turns(logits: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    """As `sample`, of many rows some at a time: what is made on the way is as large as the logits, many times over. For TPUs:
    GPUs take as long for some rows as for many."""
    batch = logits.shape[0]
    if batch <= _AT_A_TIME or batch % _AT_A_TIME:
        return sample(logits, state, rows)
    parts = jax.tree.map(lambda array: array.reshape(-1, _AT_A_TIME, *array.shape[1:]), (logits, rows))
    packed: jax.Array = lax.map(lambda part: sample(part[0], state, part[1]), parts)  # [B / rows, rows, PACKED_WIDTH]
    return packed.reshape(batch, -1)


def score(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """What the model makes of one token a row.

    Args:
      logits: [B, V] float32.
      tokens: [B] int32; rows with -1 are not used.

    Returns:
      as `sample`, [B, PACKED_WIDTH] int32, with the token's place among all in its stead: 1 for the most likely one.
    """
    logprobs = _log_softmax(logits)
    own = _taken(logprobs, tokens)
    return _packed(1 + jnp.sum(logprobs > own[:, None], axis=-1, dtype=jnp.int32), own, logprobs)


def _sum(values: jax.Array) -> jax.Array:
    """The sums [B] of rows [B, n]. TPUs, which promise no row the same bits in any company, would take many times the memory to
    add them in order."""
    total: jax.Array = lax.platform_dependent(values, tpu=lambda rows: jnp.sum(rows, axis=-1), default=_sum_in_order)
    return total


def _sum_in_order(values: jax.Array) -> jax.Array:
    """Added in an order that depends on n alone; that of XLA's reductions depends on B too."""
    columns = -(-values.shape[-1] // _ADDED)
    filled = jnp.pad(values, ((0, 0), (0, columns * _ADDED - values.shape[-1])))
    parts = filled.reshape(-1, _ADDED, columns)
    added: jax.Array = functools.reduce(jnp.add, [parts[:, i] for i in range(_ADDED)])
    return added[:, 0] if columns == 1 else _sum_in_order(added)


def _log_softmax(logits: jax.Array) -> jax.Array:
    """[B, V]."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted - jnp.log(_sum(jnp.exp(shifted)))[:, None]


def _taken(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each row of `values` [B, V] the one of its token [B]. A sum of one: TPUs look things up in a layout that is many times
    larger."""
    return jnp.sum(jnp.where(jnp.arange(values.shape[-1]) == tokens[:, None], values, 0.0), axis=-1)


def _packed(first: jax.Array, own: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Rows of PACKED_WIDTH: `first` [B], the logarithmic probabilities `own` [B], and the most likely of all [B, V]."""
    top_logprobs, top_ids = lax.top_k(logprobs, ALTERNATIVES)
    bits = [lax.bitcast_convert_type(values, jnp.int32) for values in (own[:, None], top_logprobs)]
    return jnp.concatenate([first[:, None], bits[0], top_ids.astype(jnp.int32), bits[1]], axis=1)


def _rows_of(table: jax.Array, slots: jax.Array) -> jax.Array:
    """`table[slots]`, a row at a time: to gather rows, TPUs turn the whole table round."""
    taken: jax.Array = lax.map(lambda slot: lax.dynamic_index_in_dim(table, slot, keepdims=False), slots)
    return taken


def _adjust(logits: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    def flagged(flag: int) -> jax.Array:
        return (rows.flags & flag != 0)[:, None]

    counts = jnp.where(flagged(PENALIZED), _rows_of(state.counts, rows.slot), 0)
    repetition = rows.repetition[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(counts != 0, penalized, logits)
    drawn = counts & (IN_PROMPT - 1)
    penalty = rows.presence[:, None] + rows.frequency[:, None] * drawn
    adjusted = jnp.where(drawn > 0, adjusted - penalty, adjusted)
    adjusted = jnp.where(flagged(BIASED), adjusted + _rows_of(state.bias, rows.slot), adjusted)
    allowed = (_rows_of(state.mask, rows.slot)[:, :, None] >> jnp.arange(32)) & 1  # [B, V / 32, 32]
    allowed = allowed.reshape(logits.shape[0], -1)[:, : logits.shape[-1]]
    return jnp.where(flagged(MASKED) & (allowed == 0), -jnp.inf, adjusted)


def _draw_filtered(weights: jax.Array, total: jax.Array, uniform: jax.Array, rows: SamplingRows) -> jax.Array:
    """Among the CANDIDATES most likely tokens where these hold all that is kept, else among all, sorted."""
    few, few_ids = lax.top_k(weights, min(CANDIDATES, weights.shape[-1]))
    token, complete = _draw_sorted(few, few_ids, total, uniform, rows, weights.shape[-1])
    complete = complete | ~rows.active

    # A row's token must not depend on the others: the first answer stands where it is complete.
    everything = lax.cond(jnp.all(complete), lambda: token, lambda: _draw_among_all(weights, total, uniform, rows))
    return jnp.where(complete, token, everything)


def _draw_among_all(weights: jax.Array, total: jax.Array, uniform: jax.Array, rows: SamplingRows) -> jax.Array:
    """Tokens [B] drawn in the order of the vocabulary from all that are kept, which are found without sorting."""
    limit = jnp.where(rows.top_k > 0, rows.top_k, weights.shape[-1])
    kept = _largest(weights, jnp.ones_like(weights), limit.astype(jnp.float32))
    among = jnp.where(rows.top_k > 0, _sum(jnp.where(kept, weights, 0.0)), total)
    kept = kept & _largest(weights, jnp.where(kept, weights, 0.0), rows.top_p * among)
    most = jnp.arange(weights.shape[-1]) == jnp.argmax(weights, axis=-1)[:, None]
    kept = (kept & (weights >= rows.min_p[:, None]) & (weights > 0)) | most
    sums = jnp.cumsum(jnp.where(kept, weights, 0.0), axis=-1)
    reached = sums > (uniform * jnp.max(sums, axis=-1))[:, None]
    return _first(reached, kept, jnp.argmax(weights, axis=-1).astype(jnp.int32))


def _first(reached: jax.Array, kept: jax.Array, otherwise: jax.Array) -> jax.Array:
    """The first token of each row [B, V] that is reached and kept, `otherwise` [B] if there is none. Sums are rounded, and may
    rise where nothing is added."""
    both = reached & kept
    return jnp.where(jnp.any(both, axis=-1), jnp.argmax(both, axis=-1).astype(jnp.int32), otherwise)


def _largest(weights: jax.Array, amounts: jax.Array, wanted: jax.Array) -> jax.Array:
    """Which of the weights [B, V] >= 0, from the largest on and of equal ones the first, are taken until their `amounts` [B, V]
    have reached `wanted` [B].

    The least weight that is taken is found bit by bit: floats that are not negative are in the order of their bits.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32)

    def refine(i: jax.Array, least: jax.Array) -> jax.Array:
        tried = least | (1 << (30 - i))
        reached = _sum(jnp.where(bits >= tried[:, None], amounts, 0)) >= wanted
        return jnp.where(reached, tried, least)

    least = lax.fori_loop(0, 31, refine, jnp.zeros(weights.shape[0], jnp.int32))[:, None]
    before = _sum(jnp.where(bits > least, amounts, 0))[:, None]
    equal = jnp.where(bits == least, amounts, 0)
    taken: jax.Array = (bits > least) | (
        (bits == least) & (before + jnp.cumsum(equal, axis=-1) - equal < wanted[:, None])
    )
    return taken


def _draw_sorted(
    ordered: jax.Array, ids: jax.Array, total: jax.Array, uniform: jax.Array, rows: SamplingRows, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] drawn from sorted weights [B, n], and whether no token beyond the n could have been kept."""
    rank = jnp.arange(ordered.shape[-1])
    limit = jnp.where(rows.top_k > 0, rows.top_k, vocab_size)[:, None]
    among_k = jnp.where(rank < limit, ordered, 0.0)
    among = jnp.where(limit < vocab_size, _sum(among_k)[:, None], total[:, None])
    before = jnp.cumsum(among_k, axis=-1) - among_k
    kept = (rank < limit) & (before < rows.top_p[:, None] * among) & (ordered >= rows.min_p[:, None]) & (ordered > 0)
    kept = kept | (rank == 0)
    sums = jnp.cumsum(jnp.where(kept, ordered, 0.0), axis=-1)
    at = jnp.argmax(sums > uniform[:, None] * sums[:, -1:], axis=-1)[:, None]
    complete = (limit[:, 0] <= ordered.shape[-1]) | ((limit[:, 0] == vocab_size) & ~kept[:, -1])
    return jnp.take_along_axis(ids, at, axis=-1)[:, 0].astype(jnp.int32), complete
