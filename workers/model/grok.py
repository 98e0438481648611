"""The whole model: embedding, decoder layers, final norm and tied output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from workers.kernels.interface import PORTABLE, Kernels, Site
from workers.kernels.weights import LayerWeight, Table
from workers.kernels.xla.rotary import rotate
from workers.model.attention import Attend, Cache, MultiHeadAttention, causal_attention
from workers.model.config import GrokConfig
from workers.model.linear import RMSNorm
from workers.model.moe import Experts, Router
from workers.model.parameters import LAYERS, Axes
from workers.model.partition import Partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a router decides; of all layers, with a leading L.

    Attributes:
      probabilities: [B, T, E] float32.
      experts: [B, T, S] int32, the chosen ones.
    """

    probabilities: jax.Array
    experts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a pass over the layers gives.

    Attributes:
      read: what the caller's `read` made of it.
      routed: what the routers decided.
      cache: with the keys and values of the pass.
    """

    read: Any
    routed: Routed
    cache: Cache


#: From the hidden states of positions, [..., D], and whether they are no padding, [...], to logits [..., V] float32.
Logits = Callable[[jax.Array, jax.Array], jax.Array]
#: What is wanted of a pass: made from the hidden states of all positions, [B, T, D], [B, T], by means of the function.
Read = Callable[[jax.Array, jax.Array, Logits], Any]


def all_logits(hidden: jax.Array, valid: jax.Array, logits: Logits) -> jax.Array:
    """Reads all positions: [B, T, V] float32."""
    return logits(hidden, valid)


class DecoderLayer(hk.Module):
    """x += norm(attention(norm(x))); x += norm(experts(norm(x))): four norms a layer."""

    def __init__(self, config: GrokConfig, partition: Partition) -> None:
        super().__init__(name=LAYERS)
        self._config = config
        self._partition = partition

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        layer: jax.Array,
        attend: Attend,
        cache: Cache,
        dtype: jnp.dtype | type,
    ) -> tuple[jax.Array, Cache, Routed]:
        """[B, T, D], [B, T] -> [B, T, D], the cache, and what the router decided."""
        config, partition = self._config, self._partition
        batch, length, width = x.shape
        residual_axes = ("batch", None, None)
        attention = MultiHeadAttention(config, partition)
        positions = partition.everywhere(positions)
        valid = partition.everywhere(positions >= 0)
        normed = RMSNorm(config, partition, "rms_norm")(x, valid).astype(dtype)
        attended, cache = attention(normed, positions, layer, attend, cache)
        x = partition.constrain(RMSNorm(config, partition, "rms_norm_1")(attended, valid, x), residual_axes)

        rows = RMSNorm(config, partition, "rms_norm_2")(x, valid).reshape(batch * length, width)
        flat, apart = valid.reshape(-1), partition.keeps_apart(rows)
        if not partition.axes("embed") and not apart:
            rows = partition.whole(rows, Site.ROWS)
        gates, experts, probabilities = Router(config, partition)(rows, flat, apart)
        rows = rows.astype(dtype)
        if apart:  # half as much crosses as of what routers want
            rows, gates, experts = (partition.whole(array, Site.ROWS) for array in (rows, gates, experts))
        mixed = Experts(config, partition)(rows, gates, experts, flat, apart).reshape(x.shape)
        x = partition.constrain(RMSNorm(config, partition, "rms_norm_3")(mixed, valid, x), residual_axes)
        return x, cache, Routed(probabilities.reshape(batch, length, -1), experts.reshape(batch, length, -1))


class Transformer(hk.Module):
    """All decoder layers: one loop over parameters that lie stacked, [L, ...], so that one layer is compiled for all."""

    def __init__(self, config: GrokConfig, partition: Partition) -> None:
        super().__init__(name="transformer")
        self._config = config
        self._partition = partition

    def __call__(
        self, x: jax.Array, positions: jax.Array, attend: Attend, cache: Cache, dtype: jnp.dtype | type
    ) -> tuple[jax.Array, Cache, Routed]:
        """[B, T, D], [B, T] -> [B, T, D], the cache, and what the routers decided."""
        module = DecoderLayer(self._config, self._partition)

        def compute(carry: tuple[jax.Array, Cache], layer: jax.Array) -> tuple[tuple[jax.Array, Cache], Routed]:
            def take(next_getter: Callable[[Any], Any], value: Any, _: hk.GetterContext) -> Any:
                return next_getter(LayerWeight(value, layer))  # kernels read weights where they lie

            with hk.custom_getter(take):
                x, cache, routed = module(carry[0], positions, layer, attend, carry[1], dtype)
            return (x, cache), routed

        (x, cache), routed = lax.scan(compute, (x, cache), jnp.arange(self._config.num_layers))
        return x, cache, routed


class Embedding(hk.Module):
    """The table that embeds tokens and, transposed, gives their logits."""

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "in_out_embed") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def _table(self) -> Table:
        return cast(Table, hk.get_parameter("embeddings", [self._config.vocab_size, self._config.emb_size]))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, D] float32, times the embedding multiplier."""
        partition, table = self._partition, self._table()

        def local(table: Table, tokens: jax.Array) -> jax.Array:
            over = partition.axes("vocab")
            size = table.shape[0]
            first = lax.axis_index(over) * size if over else 0
            ours = (tokens >= first) & (tokens < first + size)
            rows = jnp.where(ours[..., None], partition.kernels.lookup(table, tokens - first), 0)
            rows = partition.sum(rows, over, Site.EMBEDDING)
            columns = partition.axes("table_embed")
            return lax.all_gather(rows, columns, axis=2, tiled=True) if columns else rows

        specs = (partition.table_spec(table), partition.spec((None, None)))
        rows = partition.on_parts(local, specs, partition.spec((None, None, None)))(table, tokens)
        embedded: jax.Array = rows.astype(jnp.float32) * self._config.embedding_multiplier_scale
        return embedded

    def logits(self, hidden: jax.Array, valid: jax.Array) -> jax.Array:
        """[..., D], [...] -> [..., V] float32, times the output multiplier; V is split as the table's."""
        partition, table = self._partition, self._table()
        if not partition.axes("table_embed"):
            hidden = partition.whole(hidden, Site.HIDDEN)
        lead: Axes = (None,) * (hidden.ndim - 1)
        valid = partition.everywhere(valid)

        def local(hidden: jax.Array, valid: jax.Array, table: Table) -> jax.Array:
            flat = hidden.reshape(-1, hidden.shape[-1])
            product = partition.kernels.logits(flat, valid.reshape(-1), table).reshape(*hidden.shape[:-1], -1)
            return partition.sum(product, partition.axes("table_embed"), Site.LOGITS)

        specs = (partition.spec((*lead, "table_embed")), partition.spec(lead), partition.table_spec(table))
        logits: jax.Array = partition.on_parts(local, specs, partition.spec((*lead, "vocab")))(hidden, valid, table)
        return logits * self._config.output_multiplier_scale


class LanguageModel(hk.Module):
    """Grok-1. Make one inside `hk.transform`; see `GrokConfig` for the glossary of shapes."""

    def __init__(self, config: GrokConfig, partition: Partition, transformer: Transformer) -> None:
        super().__init__(name="language_model")
        self._config = config
        self._partition = partition
        self._transformer = transformer

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Cache,
        read: Read,
        dtype: jnp.dtype | type,
    ) -> Output:
        """One pass.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, counted from 0 in each sequence; -1 marks padding, whose outputs mean nothing.
          attend: keeps keys and values in the cache, and attends to them.
          cache: of all layers.
          read: what is wanted.
          dtype: in which products are taken and keys and values are kept. What is added up from layer to layer is
            float32 all the same; with bfloat16 that keeps the error at that of xAI's code.
        """
        embedding = Embedding(self._config, self._partition)
        x = self._partition.constrain(embedding(tokens), ("batch", None, None))
        x, cache, routed = self._transformer(x, positions, attend, cache, dtype)
        valid = self._partition.everywhere(positions >= 0)
        hidden = RMSNorm(self._config, self._partition, "rms_norm")(x, valid).astype(dtype)
        return Output(read(hidden, valid, embedding.logits), routed, cache)


def forward(
    config: GrokConfig,
    partition: Partition,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Cache = None,
    *,
    read: Read = all_logits,
    dtype: jnp.dtype | type = jnp.float32,
) -> Output:
    """`LanguageModel` applied, for use inside `hk.transform`. Its parameters are those of `parameter_table(config)`."""
    model = LanguageModel(config, partition, Transformer(config, partition))
    return model(tokens, positions, attend, cache, read, dtype)


def causal_forward(config: GrokConfig, tokens: jax.Array, *, kernels: Kernels = PORTABLE) -> Output:
    """Logits [B, T, V] of whole sequences [B, T] on one device, nothing cached: for training and as an oracle."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(
        cache: Cache, _: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, Cache]:
        query, key = (rotate(x, positions, config.rope_base) for x in (query, key))
        return causal_attention(query, key, value, config.attn_output_multiplier, config.attn_logit_cap), cache

    return forward(config, Partition.create(config, kernels=kernels), tokens, positions, attend)
