"""The compiled programs: prefill, with and without scores of the prompt's tokens, decode, and verification of drafts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from workers.checkpoint.loader import Params
from workers.kernels.interface import Site
from workers.kernels.sampling import PACKED_WIDTH, PENALIZED, SamplingRows, SamplingState
from workers.messages.plan import MAX_DRAFT, SCORED_ROWS, EngineShape
from workers.model.config import GrokConfig
from workers.model.grok import Logits, Output, Read, all_logits, forward
from workers.model.partition import Partition
from workers.runtime.kv_cache import Cache, paged_attend
from workers.runtime.slots import DRAWS, FORCED, LENGTH, PAGES, POSITION, SLOT, positions, sampling_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a device keeps between calls; donated to each. All but the pages lies whole on every device.

    Attributes:
      pages: see `page_shapes`.
      tokens: [slots] int32, the last token of each slot.
      sampling: of all slots.
    """

    pages: Cache
    tokens: jax.Array
    sampling: SamplingState


Step = tuple[State, jax.Array, jax.Array]


class Programs:
    """The functions of a model on a mesh, jitted with donated state. See each one for its arrays."""

    def __init__(self, config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type) -> None:
        assert partition.mesh is not None
        self._config = config
        self._shape = shape
        self._partition = partition
        self._dtype = dtype
        self._whole = NamedSharding(partition.mesh, PartitionSpec())
        self.decode = jax.jit(self._decode, donate_argnums=(1,))
        self.verify = jax.jit(self._verify, donate_argnums=(1,))
        self.prefill = jax.jit(self._prefill, donate_argnums=(1,))
        self.score = jax.jit(self._score, donate_argnums=(1,))
        self.logits = jax.jit(self._logits, donate_argnums=(1,))
        self.set_row = jax.jit(self._set_row, donate_argnums=(0,))

    def _decode(self, params: Params, state: State, packed: jax.Array) -> Step:
        """One token for each active slot.

        Args:
          params: of the model.
          state: of the device.
          packed: [slots, PAGES + N], see `SlotTable.decode`.

        Returns:
          the state, the packed samples [slots, PACKED_WIDTH] int32 (see `kernels.sampling`), and how many tokens each expert
          computed, [L, E] int32.
        """
        packed = self._replicate(packed)
        output = self._forward(params, state.pages, state.tokens[:, None], packed, _read_first)
        rows = sampling_rows(packed, packed[:, POSITION] + 1, packed[:, DRAWS] == 1)
        samples = self._replicate(_force(self._sample(output.read, state.sampling, rows), packed))
        tokens = jnp.where(rows.active, samples[:, 0], state.tokens)
        return self._next(state, output.cache, tokens, rows, samples[:, 0]), samples, self._count(output, packed, 1)

    def _verify(self, params: Params, state: State, packed: jax.Array) -> Step:
        """One token for each row, and for a draft as many more as it guessed right.

        As `_decode`, but packed is [R, PAGES + N + 1 + MAX_DRAFT], see `SlotTable.verify`, and the samples are
        [R, 1 + MAX_DRAFT, ...]: as if each guess before had been drawn.
        """
        packed = self._replicate(packed)
        length = 1 + MAX_DRAFT
        given = packed[:, -length:]
        given = given.at[:, 0].set(jnp.where(given[:, 0] < 0, state.tokens[packed[:, SLOT]], given[:, 0]))
        output = self._forward(params, state.pages, given, packed, all_logits)
        where = positions(packed, length)
        flat = jnp.repeat(packed, length, axis=0)
        rows = sampling_rows(flat, where.reshape(-1) + 1, (where >= 0).reshape(-1) & (flat[:, DRAWS] == 1))
        samples = self._sample(output.read.reshape(flat.shape[0], -1), state.sampling, rows)
        samples = self._replicate(samples.reshape(packed.shape[0], length, -1))
        drawn = samples[:, :, 0]
        # The guess at place i + 1 is right if place i drew it, and so were all before.
        right = (drawn[:, :-1] == given[:, 1:]) & (where[:, 1:] >= 0)
        taken = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
        last = jnp.take_along_axis(drawn, taken[:, None], axis=1)[:, 0]
        first = sampling_rows(packed, packed[:, POSITION] + 1, packed[:, DRAWS] == 1)
        tokens = self._set_tokens(state, first, last)
        return self._next(state, output.cache, tokens, first, drawn[:, 0]), samples, self._count(output, packed, length)

    def _prefill(self, params: Params, state: State, packed: jax.Array) -> Step:
        """A chunk of one prompt a group; rows that draw leave their first token in the state.

        As `_decode`, but packed is [groups, PAGES + N + chunk], and so are the samples [groups, ...].
        """
        packed = self._replicate(packed)
        output = self._forward(params, state.pages, self._chunk(packed), packed, self._read_last(packed))
        return self._first_tokens(state, output, output.read, packed)

    def _score(self, params: Params, state: State, packed: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """A chunk as in `_prefill`, and what the model makes of tokens behind its positions.

        As `_prefill`, but packed is [groups, PAGES + N + 2 * chunk], see `SlotTable.score`; last come packed scores
        [groups, chunk, PACKED_WIDTH] int32.
        """
        packed = self._replicate(packed)
        chunk = self._shape.chunk
        scored = packed[:, packed.shape[1] - chunk :]
        # Some at a time, so that no device ever holds the logits of a long chunk.
        rows = math.gcd(chunk, SCORED_ROWS)

        def read(hidden: jax.Array, valid: jax.Array, logits: Logits) -> tuple[jax.Array, jax.Array]:
            def score(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
                hidden, valid, tokens = part
                packed: jax.Array = lax.cond(
                    jnp.any(tokens >= 0),
                    lambda: self._scores(logits(hidden, valid), tokens),
                    lambda: self._replicate(jnp.zeros((*tokens.shape, PACKED_WIDTH), jnp.int32)),
                )
                return packed

            def split(x: jax.Array) -> jax.Array:
                """[groups, chunk, ...] -> [chunk / rows, groups, rows, ...]."""
                return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)

            scores = lax.map(score, (split(hidden), split(valid), split(scored)))
            joined = jnp.moveaxis(scores, 0, 1).reshape(*scored.shape, PACKED_WIDTH)
            # What crosses between devices for the last position comes after all that does for scores. Ranks are not below 0,
            # which the compiler does not know.
            after = jnp.minimum(jnp.min(joined[..., 0]), 0)
            return self._read_last(packed, after)(hidden, valid, logits), self._replicate(joined)

        output = self._forward(params, state.pages, self._chunk(packed), packed, read)
        logits, scores = output.read
        return *self._first_tokens(state, output, logits, packed), scores

    def _first_tokens(self, state: State, output: Output, logits: jax.Array, packed: jax.Array) -> Step:
        """What a prefill call returns, which drew from `logits` [groups, V]."""
        rows = sampling_rows(packed, packed[:, POSITION] + packed[:, LENGTH], packed[:, DRAWS] == 1)
        samples = self._replicate(_force(self._sample(logits, state.sampling, rows), packed))
        tokens = self._set_tokens(state, rows, samples[:, 0])
        count = self._count(output, packed, self._shape.chunk)
        return self._next(state, output.cache, tokens, rows, samples[:, 0]), samples, count

    def _set_tokens(self, state: State, rows: SamplingRows, drawn: jax.Array) -> jax.Array:
        """The last tokens [slots], of which active rows have `drawn` theirs [B]."""
        target = jnp.where(rows.active, rows.slot, self._shape.slots)
        tokens: jax.Array = state.tokens.at[target].set(drawn, mode="drop")
        return tokens

    def _logits(self, params: Params, state: State, packed: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        """A chunk as in `_prefill`, with the logits of all its positions.

        Returns:
          the state, logits [groups, chunk, V] float32, and what the routers made of the positions: probabilities
          [groups, chunk, L, E] float32.
        """
        packed = self._replicate(packed)
        output = self._forward(params, state.pages, self._chunk(packed), packed, all_logits)
        probabilities = jnp.moveaxis(output.routed.probabilities, 0, 2)
        return (
            dataclasses.replace(state, pages=output.cache),
            self._replicate(output.read),
            self._replicate(probabilities),
        )

    def _set_row(self, array: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
        """`array` [slots, ...] with `row` [...] at `slot`."""
        return array.at[slot].set(row)

    def _chunk(self, packed: jax.Array) -> jax.Array:
        first = PAGES + self._shape.table_width
        return packed[:, first : first + self._shape.chunk]

    def _read_last(self, packed: jax.Array, after: jax.Array | int = 0) -> Read:
        """Reads the last position of each packed row, once the zero `after` is known."""
        length = self._replicate(packed[:, LENGTH] + after)
        last = jnp.maximum(length - 1, 0)[:, None, None]

        def read(hidden: jax.Array, _: jax.Array, logits: Logits) -> jax.Array:
            return logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0], length > 0)

        return read

    def _forward(self, params: Params, pages: Cache, tokens: jax.Array, packed: jax.Array, read: Read) -> Output:
        where = self._replicate(positions(packed, tokens.shape[1]))
        table = packed[:, PAGES : PAGES + self._shape.table_width]
        attend = paged_attend(self._config, self._partition, table, where)
        model: Any = hk.without_apply_rng(
            hk.transform(functools.partial(forward, self._config, self._partition, dtype=self._dtype, read=read))
        )
        output: Output = model.apply(params, tokens, where, attend, pages)
        return output

    def _sample(self, logits: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
        """Packed samples [B, ...]."""
        kernel = self._partition.kernels.sample
        return self._on_rows(lambda logits, rows, state: kernel(logits, state, rows), logits, rows, state)

    def _scores(self, logits: jax.Array, tokens: jax.Array) -> jax.Array:
        """Packed scores [groups, rows, ...] of tokens [groups, rows]."""
        kernel = self._partition.kernels.score
        flat = logits.reshape(-1, logits.shape[-1])
        scores = self._on_rows(lambda logits, tokens, _: kernel(logits, tokens), flat, tokens.reshape(-1), ())
        return scores.reshape(*tokens.shape, PACKED_WIDTH)

    def _on_rows(self, kernel: Callable[..., jax.Array], logits: jax.Array, rows: Any, whole: Any) -> jax.Array:
        """A kernel's packed rows [B, PACKED_WIDTH]; each device computes a part of the rows, filled up to as many for each.

        Args:
          kernel: of some rows' logits, `rows` and of `whole`.
          logits: [B, V] float32.
          rows: arrays [B].
          whole: arrays of which each device has all.
        """
        partition, mesh, count = self._partition, self._partition.mesh, logits.shape[0]
        assert mesh is not None
        axes, vocab = mesh.axis_names if mesh.size > 1 else (), partition.axes("vocab")
        each = -(-count // mesh.size)

        def local(logits: jax.Array, rows: Any, whole: Any) -> jax.Array:
            def own(values: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(values, lax.axis_index(axes) * each, each) if axes else values

            def padded(values: jax.Array) -> jax.Array:
                return jnp.pad(values, [(0, each * mesh.size - count)] + [(0, 0)] * (values.ndim - 1))

            logits, rows = jax.tree.map(padded, (logits, rows))
            # Logits lie split by vocabulary, sampling wants whole rows; so no device ever holds [B, V].
            logits = partition.exchange(logits, vocab, Site.LOGITS) if vocab else own(logits)
            return partition.gather(kernel(logits, jax.tree.map(own, rows), whole), axes, Site.SAMPLES)[:count]

        lying = partition.spec((None, "vocab"))
        rest = PartitionSpec()
        packed: jax.Array = partition.on_parts(local, (lying, rest, rest), rest)(logits, rows, whole)
        return packed

    def _next(self, state: State, pages: Cache, tokens: jax.Array, rows: SamplingRows, drawn: jax.Array) -> State:
        """The state after a call. Drawn tokens count where penalties will ask for them."""
        # On every device for itself, or the compiler adds up tables of counts over devices.
        whole = PartitionSpec()
        local = _scatter if self._partition.kernels.scatters else _count_one_by_one
        count = self._partition.on_parts(local, (whole,) * 4, whole)
        counted = rows.active & (rows.flags & PENALIZED != 0)
        sampling = dataclasses.replace(state.sampling, counts=count(state.sampling.counts, counted, rows.slot, drawn))
        return State(pages, self._replicate(tokens), sampling)

    def _count(self, output: Output, packed: jax.Array, length: int) -> jax.Array:
        """[L, E] int32: how many of the positions that are no padding each expert was chosen for."""
        chosen = jax.nn.one_hot(output.routed.experts, self._config.num_experts, dtype=jnp.int32)  # [L, B, T, S, E]
        valid = positions(packed, length) >= 0
        return self._replicate(jnp.sum(chosen * valid[:, :, None, None], axis=(1, 2, 3)))

    def _replicate(self, x: jax.Array) -> jax.Array:
        whole: jax.Array = lax.with_sharding_constraint(x, self._whole)
        return whole


def _read_first(hidden: jax.Array, valid: jax.Array, logits: Logits) -> jax.Array:
    """Reads the first position of each row."""
    return logits(hidden[:, 0], valid[:, 0])


def _force(samples: jax.Array, packed: jax.Array) -> jax.Array:
    """Packed samples [B, ...] with the tokens that packed rows [B, ...] force."""
    forced = packed[:, FORCED]
    return samples.at[:, 0].set(jnp.where(forced > 0, forced - 1, samples[:, 0]))


def _scatter(counts: jax.Array, counted: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """`counts` [slots, V] with one more at each (slot, token) that is `counted` [B]."""
    return counts.at[jnp.where(counted, slots, counts.shape[0]), tokens].add(1, mode="drop")


def _count_one_by_one(counts: jax.Array, counted: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """The same, only where penalties ask for it."""

    def add(i: jax.Array, counts: jax.Array) -> jax.Array:
        at = (slots[i], tokens[i])
        one = lax.dynamic_slice(counts, at, (1, 1)) + counted[i].astype(jnp.int32)
        return lax.dynamic_update_slice(counts, one, at)

    rows = jnp.where(jnp.any(counted), slots.shape[0], 0)
    updated: jax.Array = lax.fori_loop(0, rows, add, counts)
    return updated
