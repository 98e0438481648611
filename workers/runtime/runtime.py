"""One host's part of the mesh: carries plans out, in order, and reads sampled tokens back."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from workers.checkpoint.loader import Params
from workers.engine.plan import ALTERNATIVES, EngineShape, Plan, Sampling, StepTokens, Token
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.cache import allocate_pages
from workers.runtime.programs import Pages, Programs
from workers.runtime.slots import SlotTable

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A plan that was dispatched, whose samples the devices may still be computing."""

    plan: Plan
    prefills: tuple[jax.Array, ...]
    decode: jax.Array | None
    expert_counts: tuple[jax.Array, ...]


class Runtime:
    """Owns the device state: parameters, pages, last tokens, biases. Every host of the mesh has one, fed the same plans."""

    def __init__(
        self,
        config: GrokConfig,
        shape: EngineShape,
        partition: Partition,
        params: Params,
        dtype: jnp.dtype | type = jnp.float32,
    ) -> None:
        self.config = config
        self.shape = shape
        self._partition = partition
        self._params = params
        self._pages: Pages = allocate_pages(config, shape, partition, dtype)
        whole = partition.sharding(())
        dims = (shape.slots, config.vocab_size)
        self._tokens: jax.Array = jax.jit(lambda: jnp.zeros(dims[:1], jnp.int32), out_shardings=whole)()
        self._bias: jax.Array = jax.jit(lambda: jnp.zeros(dims, jnp.float32), out_shardings=whole)()
        self._biased: set[int] = set()
        self._slots = SlotTable(shape)
        programs = Programs(config, shape, partition, dtype)
        state = (params, self._pages, self._tokens, self._bias)
        no_chunk, no_slot = self._slots.prefill(()), self._slots.decode(())
        self._prefill = programs.prefill.lower(*state, no_chunk).compile()
        self._decode = programs.decode.lower(*state, no_slot).compile()
        self._set_bias = programs.set_bias.lower(self._bias, np.int32(0), self._bias_row(Sampling())).compile()
        self._score = programs.score
        self._group_starts = [group.start for group in config.layer_groups()]
        mesh = partition.mesh
        assert mesh is not None
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._ones = jax.jit(lambda: jnp.ones(mesh.size, jnp.int32), out_shardings=everywhere)()
        self._all_reduce = jax.jit(jnp.sum, out_shardings=whole).lower(self._ones).compile()

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes that this host's devices hold, by what they are for."""
        state = {"parameters": self._params, "kv_pages": self._pages, "sampling": (self._tokens, self._bias)}
        return {name: _local_bytes(arrays) for name, arrays in state.items()}

    def probe(self) -> float:
        """Seconds of the smallest all-reduce over all devices, waiting for the slowest host included. All hosts must call
        this between the same plans, each when its devices are idle."""
        began = time.perf_counter()
        jax.block_until_ready(self._all_reduce(self._ones))
        return time.perf_counter() - began

    def warm_up(self) -> None:
        """Runs every program once without effect. All hosts must have compiled before any calls this."""
        self.read(self.execute(Plan(0, (), ((),), ())))
        self._pages, self._tokens, packed, _ = self._decode(
            self._params, self._pages, self._tokens, self._bias, self._slots.decode(())
        )
        self.probe()
        self._bias = self._set_bias(self._bias, np.int32(0), self._bias_row(Sampling()))
        jax.block_until_ready((packed, self._bias))

    def execute(self, plan: Plan) -> Pending:
        """Dispatches a plan. Returns before the devices are done, unless the platform computes synchronously."""
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._apply_bias(admission.slot, admission.sampling)
        prefills, counts = [], []
        for chunks in plan.prefills:
            self._pages, self._tokens, packed, count = self._prefill(
                self._params, self._pages, self._tokens, self._bias, self._slots.prefill(chunks)
            )
            prefills.append(packed)
            counts.append(count)
        decoded = None
        if plan.decode:
            self._pages, self._tokens, decoded, count = self._decode(
                self._params, self._pages, self._tokens, self._bias, self._slots.decode(plan.decode)
            )
            counts.append(count)
        return Pending(plan, tuple(prefills), decoded, tuple(counts))

    def read(self, pending: Pending) -> StepTokens:
        """Waits for a plan's samples and copies them to the host."""
        plan = pending.plan
        prefilled = []
        for chunks, packed in zip(plan.prefills, pending.prefills, strict=True):
            rows = np.asarray(packed.addressable_data(0))
            prefilled += [_token(rows[self.shape.group_of(c.slot)]) for c in chunks if c.last]
        decoded: tuple[Token, ...] = ()
        if pending.decode is not None:
            rows = np.asarray(pending.decode.addressable_data(0))
            decoded = tuple(_token(rows[slot]) for slot in plan.decode)
        return StepTokens(plan.number, tuple(prefilled), decoded, self._expert_tokens(pending))

    def wait(self, pending: Pending) -> None:
        """Waits until the devices have finished a plan."""
        jax.block_until_ready((pending.prefills, pending.decode))

    def _expert_tokens(self, pending: Pending) -> tuple[tuple[int, ...], ...]:
        counts = [np.asarray(count.addressable_data(0)) for count in pending.expert_counts]  # [L, E] each
        by_group = np.add.reduceat(np.sum(counts, axis=0), self._group_starts, axis=0)
        return tuple(map(tuple, by_group.tolist()))

    def score(self, plan: Plan) -> tuple[Array, Array]:
        """Carries out the single chunk of a plan; logits [chunk, V] of its positions and router gaps [chunk].

        See `Programs._score`. It is compiled on first use: serving never calls it.
        """
        for admission in plan.admissions:
            self._slots.admit(admission)
        ((chunk,),) = plan.prefills
        self._pages, logits, gaps = self._score(self._params, self._pages, self._slots.prefill((chunk,)))
        group, length = self.shape.group_of(chunk.slot), len(chunk.tokens)
        first = [np.asarray(a.addressable_data(0))[group, :length] for a in (logits, gaps)]
        return first[0], first[1]

    def _apply_bias(self, slot: int, sampling: Sampling) -> None:
        wanted = bool(sampling.logit_bias or sampling.allowed_tokens)
        if wanted or slot in self._biased:
            self._bias = self._set_bias(self._bias, np.int32(slot), self._bias_row(sampling))
            (self._biased.add if wanted else self._biased.discard)(slot)

    def _bias_row(self, sampling: Sampling) -> Array:
        row = np.zeros(self.config.vocab_size, np.float32)
        if sampling.allowed_tokens:
            row[:] = -np.inf
            row[list(sampling.allowed_tokens)] = 0.0
        for token, value in sampling.logit_bias:
            row[token] += value
        return row


def _local_bytes(arrays: Any) -> int:
    return sum(shard.data.nbytes for array in jax.tree.leaves(arrays) for shard in array.addressable_shards)


def _token(row: Array) -> Token:
    """Unpacks a row of `programs._pack`."""
    floats = row.view(np.float32)
    ids = row[2 : 2 + ALTERNATIVES].tolist()
    return Token(int(row[0]), float(floats[1]), tuple(zip(ids, floats[2 + ALTERNATIVES :].tolist(), strict=True)))
