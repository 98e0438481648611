"""From logits to tokens: counter-based, so that a token depends on its request's seed and its position alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from workers.engine.plan import ALTERNATIVES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """How each row of a batch is to be sampled; all arrays are [B].

    Attributes:
      seed_low, seed_high: uint32 halves of the request's seed.
      position: int32, of the token to draw, counted from the start of the sequence.
      temperature: float32; 0 takes the most likely token.
      top_p: float32 in (0, 1]; 1 keeps all.
      top_k: int32; 0 keeps all.
    """

    seed_low: jax.Array
    seed_high: jax.Array
    position: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What was drawn.

    Attributes:
      token: [B] int32.
      logprob: [B] float32, the token's logarithmic probability under the model itself: before temperature, bias, mask
        and filters.
      top_ids: [B, 8] int32, the most likely tokens under the model itself.
      top_logprobs: [B, 8] float32, of `top_ids`.
    """

    token: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, bias: jax.Array, rows: SamplingRows) -> Sampled:
    """Draws one token a row from softmax((logits + bias) / temperature), filtered by top_k, then by top_p.

    The draw is the Gumbel-max trick (https://arxiv.org/abs/1411.0030) with noise keyed by (seed, position).

    Args:
      logits, bias: [B, V] float32; a bias of -inf forbids a token.
      rows: the rows' parameters.
    """
    logprobs = jax.nn.log_softmax(logits)
    top_logprobs, top_ids = lax.top_k(logprobs, ALTERNATIVES)
    adjusted = logits + bias
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        # Relative to the largest, so that no temperature, however small, makes more than one infinite.
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        scaled = (adjusted - jnp.max(adjusted, axis=-1, keepdims=True)) / temperature
        filtered = (rows.top_p < 1) | (rows.top_k > 0)
        kept = lax.cond(jnp.any(filtered), lambda: filter_logits(scaled, rows.top_p, rows.top_k), lambda: scaled)
        kept = jnp.where(filtered[:, None], kept, scaled)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[-1],)))(_keys(rows))
        return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)

    drawn = lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
    token = jnp.where(rows.temperature > 0, drawn, greedy)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    return Sampled(token, logprob, top_ids.astype(jnp.int32), top_logprobs)


def filter_logits(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets logits outside of the nucleus to -inf.

    Kept are the `top_k` largest and of these, renormalised, the smallest set of largest probabilities that sums to
    `top_p` (https://arxiv.org/abs/1904.09751). Equal logits at the threshold are kept together.

    Args:
      logits: [B, V].
      top_p: [B] in (0, 1].
      top_k: [B] int32, 0 for no limit.
    """
    ordered = -jnp.sort(-logits, axis=-1)  # [B, V], largest first
    rank = jnp.arange(logits.shape[-1])
    among_k = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    probabilities = jax.nn.softmax(jnp.where(among_k, ordered, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = among_k & ((before < top_p[:, None]) | (rank == 0))
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _keys(rows: SamplingRows) -> jax.Array:
    halves = jnp.stack([rows.seed_high, rows.seed_low], axis=-1)  # [B, 2]
    keys = jax.random.wrap_key_data(halves, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, rows.position)
