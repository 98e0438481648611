"""The compiled programs: prefill, decode, and the scoring of whole prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from workers.checkpoint.loader import Params
from workers.engine.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.grok import Output, forward
from workers.model.partition import Partition
from workers.runtime.cache import LayerPages, PagedAttend
from workers.runtime.sampling import Sampled, sample
from workers.runtime.slots import DRAWS, LENGTH, PAGES, SLOT, positions, sampling_rows

Pages = tuple[LayerPages, ...]


class Programs:
    """The functions of a model on a mesh, jitted with donated state. See each one for its arrays.

    Everything that is not a parameter or a page lies whole on every device.
    """

    def __init__(self, config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type) -> None:
        assert partition.mesh is not None
        self._config = config
        self._shape = shape
        self._partition = partition
        self._dtype = dtype
        self._whole = NamedSharding(partition.mesh, PartitionSpec())
        self.decode = jax.jit(self._decode, donate_argnums=(1, 2))
        self.prefill = jax.jit(self._prefill, donate_argnums=(1, 2))
        self.score = jax.jit(self._score, donate_argnums=(1,))
        self.set_bias = jax.jit(self._set_bias, donate_argnums=(0,))

    def _decode(
        self, params: Params, pages: Pages, tokens: jax.Array, bias: jax.Array, packed: jax.Array
    ) -> tuple[Pages, jax.Array, jax.Array, jax.Array]:
        """One token for each active slot.

        Args:
          params: of the model.
          pages: see `allocate_pages`.
          tokens: [slots] int32, the last token of each slot.
          bias: [slots, V] float32.
          packed: [slots, PAGES + N], see `SlotTable.decode`.

        Returns:
          pages, tokens with the new ones, the packed samples [slots, 2 + 2 * ALTERNATIVES] int32, and how many tokens
          each expert computed, [L, E] int32.
        """
        packed = self._replicate(packed)
        output, pages = self._forward(params, pages, tokens[:, None], packed, lambda hidden: hidden[:, 0])
        drawn, samples = self._sample(output.logits, bias, packed)
        tokens = jnp.where(packed[:, DRAWS] == 1, drawn, tokens)
        return pages, self._replicate(tokens), samples, self._count(output, packed, 1)

    def _prefill(
        self, params: Params, pages: Pages, tokens: jax.Array, bias: jax.Array, packed: jax.Array
    ) -> tuple[Pages, jax.Array, jax.Array, jax.Array]:
        """A chunk of one prompt a group; rows that draw leave their first token in `tokens`.

        As `_decode`, but packed is [groups, PAGES + N + chunk], and so are the samples [groups, ...].
        """
        packed = self._replicate(packed)
        last = jnp.maximum(packed[:, LENGTH] - 1, 0)

        def read(hidden: jax.Array) -> jax.Array:
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

        output, pages = self._forward(params, pages, self._chunk(packed), packed, read)
        slot = packed[:, SLOT]
        drawn, samples = self._sample(output.logits, bias[slot], packed)
        target = jnp.where(packed[:, DRAWS] == 1, slot, self._shape.slots)
        tokens = tokens.at[target].set(drawn, mode="drop")
        return pages, self._replicate(tokens), samples, self._count(output, packed, self._shape.chunk)

    def _score(self, params: Params, pages: Pages, packed: jax.Array) -> tuple[Pages, jax.Array, jax.Array]:
        """A chunk as in `_prefill`, with the logits of all its positions.

        Returns:
          pages, logits [groups, chunk, V] float32, and for each position [groups, chunk] the smallest gap, over the
          layers, between the router logits of the last chosen and the first rejected expert.
        """
        packed = self._replicate(packed)
        output, pages = self._forward(params, pages, self._chunk(packed), packed, lambda hidden: hidden)
        chosen = self._config.num_selected_experts
        if chosen < self._config.num_experts:
            top, _ = lax.top_k(output.routed.probabilities, chosen + 1)  # [L, B, T, S + 1]
            gap = jnp.min(jnp.log(top[..., chosen - 1] / top[..., chosen]), axis=0)
        else:
            gap = jnp.full(output.routed.probabilities.shape[1:3], jnp.inf)
        return pages, self._replicate(output.logits), self._replicate(gap)

    def _set_bias(self, bias: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
        """`bias` [slots, V] with `row` [V] at `slot`."""
        return bias.at[slot].set(row)

    def _chunk(self, packed: jax.Array) -> jax.Array:
        return packed[:, packed.shape[1] - self._shape.chunk :]

    def _forward(
        self, params: Params, pages: Pages, tokens: jax.Array, packed: jax.Array, read: Callable[[jax.Array], jax.Array]
    ) -> tuple[Output, Pages]:
        where = positions(packed, tokens.shape[1])
        table = packed[:, PAGES : PAGES + self._shape.table_width]
        attend = PagedAttend(list(pages), table, where, self._config.attn_output_multiplier, self._partition)
        model: Any = hk.without_apply_rng(
            hk.transform(functools.partial(forward, self._config, self._partition, dtype=self._dtype, read=read))
        )
        output: Output = model.apply(params, tokens, where, attend)
        return output, tuple(attend.pages)

    def _sample(self, logits: jax.Array, bias: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [B] and packed samples; each device samples a part of the rows where they divide over the devices."""
        mesh = self._partition.mesh
        assert mesh is not None
        rows = PartitionSpec(mesh.axis_names if logits.shape[0] % mesh.size == 0 else None)

        def local(logits: jax.Array, bias: jax.Array, packed: jax.Array) -> jax.Array:
            return _pack(sample(logits, bias, sampling_rows(packed)))

        samples = self._replicate(
            jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(logits, bias, packed)
        )
        return samples[:, 0], samples

    def _count(self, output: Output, packed: jax.Array, length: int) -> jax.Array:
        """[L, E] int32: how many of the positions that are no padding each expert was chosen for."""
        chosen = jax.nn.one_hot(output.routed.experts, self._config.num_experts, dtype=jnp.int32)  # [L, B, T, S, E]
        valid = positions(packed, length) >= 0
        return self._replicate(jnp.sum(chosen * valid[:, :, None, None], axis=(1, 2, 3)))

    def _replicate(self, x: jax.Array) -> jax.Array:
        whole: jax.Array = lax.with_sharding_constraint(x, self._whole)
        return whole


def _pack(sampled: Sampled) -> jax.Array:
    """One int32 row a sample: token, logprob bits, alternatives, their logprob bits."""
    return jnp.concatenate(
        [
            sampled.token[:, None],
            lax.bitcast_convert_type(sampled.logprob, jnp.int32)[:, None],
            sampled.top_ids,
            lax.bitcast_convert_type(sampled.top_logprobs, jnp.int32),
        ],
        axis=1,
    )
