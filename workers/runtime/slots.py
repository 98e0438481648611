"""Each host's mirror of the slots, kept by applying plans, and the packed rows that the compiled programs read.

All of a row's numbers travel to the device in one int32 array, floats as their bits: one transfer a call.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from workers.kernels.sampling import BIASED, MASKED, PENALIZED, SamplingRows
from workers.messages.plan import (
    MAX_DRAFT,
    MAX_VERIFIED,
    Chunk,
    DecodeRow,
    Draft,
    EngineShape,
    Forced,
    PageGrant,
    SlotStart,
)

IntArray = np.ndarray[Any, np.dtype[np.int32]]

#: Columns of a packed row. The pages follow, and after them the tokens of a chunk or a draft.
SLOT, POSITION, LENGTH, DRAWS, FLAGS, TOP_K, SEED_LOW, SEED_HIGH = range(8)
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, FORCED, PAGES = range(8, 16)


class SlotTable:
    """The state of all slots of an engine as plans have made it. The same on every host after the same plans."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._rows: IntArray = np.zeros((shape.slots, PAGES + shape.table_width), np.int32)
        self._rows[:, SLOT] = np.arange(shape.slots)

    def start(self, start: SlotStart) -> None:
        """Fills a slot's row: sampling parameters and pages."""
        row, s = self._rows[start.slot], start.sampling
        row[POSITION:] = 0
        row[FLAGS] = BIASED * s.biased | PENALIZED * s.penalized | MASKED * s.masked
        row[TOP_K] = s.top_k
        row[SEED_LOW : SEED_HIGH + 1].view(np.uint32)[:] = (s.seed & 0xFFFFFFFF, s.seed >> 32)
        floats = (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        row[TEMPERATURE:FORCED].view(np.float32)[:] = floats
        row[PAGES : PAGES + len(start.pages)] = start.pages

    def grant(self, grant: PageGrant) -> None:
        """Adds pages to a slot's row."""
        first = PAGES + grant.first
        self._rows[grant.slot, first : first + len(grant.pages)] = grant.pages

    def force(self, forced: tuple[Forced, ...]) -> None:
        """Notes the tokens that slots draw next, for the calls of one plan: one more than the token, 0 for a free choice."""
        self._rows[:, FORCED] = 0
        for one in forced:
            self._rows[one.slot, FORCED] = one.token + 1

    def prefill(self, chunks: tuple[Chunk, ...]) -> IntArray:
        """The packed rows [groups, PAGES + N + chunk] of one prefill call."""
        shape = self._shape
        width = self._rows.shape[1]
        packed = np.zeros((shape.groups, width + shape.chunk), np.int32)
        for chunk in chunks:
            target = packed[shape.group_of(chunk.slot)]
            target[:width] = self._rows[chunk.slot]
            target[POSITION] = chunk.start
            target[LENGTH] = len(chunk.tokens)
            target[DRAWS] = chunk.last
            target[width : width + len(chunk.tokens)] = chunk.tokens
        return packed

    def score(self, chunks: tuple[Chunk, ...]) -> IntArray:
        """The packed rows [groups, PAGES + N + 2 * chunk] of one prefill call that scores tokens: these, or -1, come last."""
        shape = self._shape
        scored = np.full((shape.groups, shape.chunk), -1, np.int32)
        for chunk in chunks:
            scored[shape.group_of(chunk.slot), : len(chunk.scored)] = chunk.scored
        return np.concatenate([self.prefill(chunks), scored], axis=1)

    def decode(self, rows: tuple[DecodeRow, ...], step: int = 0) -> IntArray:
        """The packed rows [slots, PAGES + N] of a decode call, `step` steps after the one that `rows` say the positions of."""
        packed = self._rows.copy()
        slots, positions = np.array(rows, np.int32).reshape(-1, 2).T
        packed[slots, POSITION] = positions + step
        packed[slots, LENGTH] = 1
        packed[slots, DRAWS] = 1
        return packed

    def verify(self, rows: tuple[DecodeRow, ...], drafts: tuple[Draft, ...]) -> IntArray:
        """The packed rows [groups * MAX_VERIFIED, PAGES + N + 1 + MAX_DRAFT] of a call that decodes `rows` and verifies
        `drafts`, see `verified`. A token of -1 stands for the slot's last one, which the device knows."""
        width = self._rows.shape[1]
        packed = np.zeros((self._shape.groups * MAX_VERIFIED, width + 1 + MAX_DRAFT), np.int32)
        asked = (*(Draft(slot, position, (-1,)) for slot, position in rows), *drafts)
        for place, draft in zip(verified(self._shape, rows, drafts), asked, strict=True):
            row = packed[place]
            row[:width] = self._rows[draft.slot]
            row[POSITION], row[LENGTH], row[DRAWS] = draft.position, len(draft.tokens), 1
            row[width : width + len(draft.tokens)] = draft.tokens
        return packed


def verified(shape: EngineShape, rows: tuple[DecodeRow, ...], drafts: tuple[Draft, ...]) -> list[int]:
    """Where a verifying call has each of `rows`, then each of `drafts`: MAX_VERIFIED rows are a group's."""
    slots = [row.slot for row in rows] + [draft.slot for draft in drafts]
    groups = list(map(shape.group_of, slots))
    assert len(groups) <= MAX_VERIFIED, "a row of another group's"
    return [group * MAX_VERIFIED + groups[:i].count(group) for i, group in enumerate(groups)]


def positions(packed: jax.Array, length: int) -> jax.Array:
    """The positions [B, length] of the tokens of packed rows, -1 where a row has fewer."""
    offset = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(offset < packed[:, LENGTH, None], packed[:, POSITION, None] + offset, -1)


def sampling_rows(packed: jax.Array, position: jax.Array, active: jax.Array) -> SamplingRows:
    """The sampling parameters of packed rows [B, ...], whose tokens to draw stand at `position` [B]."""

    def bits(column: int, dtype: jnp.dtype | type) -> jax.Array:
        return lax.bitcast_convert_type(packed[:, column], dtype)

    return SamplingRows(
        slot=packed[:, SLOT],
        active=active,
        flags=packed[:, FLAGS],
        seed_low=bits(SEED_LOW, jnp.uint32),
        seed_high=bits(SEED_HIGH, jnp.uint32),
        position=position,
        temperature=bits(TEMPERATURE, jnp.float32),
        top_p=bits(TOP_P, jnp.float32),
        min_p=bits(MIN_P, jnp.float32),
        top_k=packed[:, TOP_K],
        repetition=bits(REPETITION, jnp.float32),
        presence=bits(PRESENCE, jnp.float32),
        frequency=bits(FREQUENCY, jnp.float32),
    )
