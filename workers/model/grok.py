"""The whole model: embedding, decoder layers, final norm and tied output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from workers.kernels.interface import PORTABLE, Kernels
from workers.kernels.weights import LayerWeight, Table
from workers.kernels.xla.rotary import rotate
from workers.model.attention import Attend, MultiHeadAttention, causal_attention
from workers.model.config import GrokConfig
from workers.model.linear import RMSNorm
from workers.model.moe import Experts, Router
from workers.model.partition import Partition

#: The name of the layers whose parameters lie stacked.
STACKED_LAYERS = "decoder_layers"


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
      logits: [..., V] float32 of the positions that were read.
      routed: what the routers decided.
    """

    logits: jax.Array
    routed: Routed


class DecoderLayer(hk.Module):
    """x += norm(attention(norm(x))); x += norm(experts(norm(x))): four norms a layer."""

    def __init__(self, config: GrokConfig, partition: Partition, layer: int, name: str) -> None:
        """`layer` is what `attend` is told."""
        super().__init__(name=name)
        self._config = config
        self._partition = partition
        self._layer = layer

    def __call__(
        self, x: jax.Array, positions: jax.Array, attend: Attend, dtype: jnp.dtype | type
    ) -> tuple[jax.Array, Routed]:
        """[B, T, D], [B, T] -> [B, T, D] and what the router decided."""
        config, partition = self._config, self._partition
        batch, length, width = x.shape
        residual_axes = ("batch", None, None)
        attention = MultiHeadAttention(config, partition)
        valid = positions >= 0
        normed = RMSNorm(partition, "rms_norm")(x, valid).astype(dtype)
        attended = attention(normed, positions, self._layer, attend)
        x = partition.constrain(RMSNorm(partition, "rms_norm_1")(attended, valid, x), residual_axes)

        rows = RMSNorm(partition, "rms_norm_2")(x, valid).reshape(batch * length, width)
        flat = valid.reshape(-1)
        gates, experts, probabilities = Router(config, partition)(rows, flat)
        moe = Experts(config, partition)
        mixed = moe(rows.astype(dtype), gates, experts, flat).reshape(x.shape)
        x = partition.constrain(RMSNorm(partition, "rms_norm_3")(mixed, valid, x), residual_axes)
        return x, Routed(probabilities.reshape(batch, length, -1), experts.reshape(batch, length, -1))


class Transformer(hk.Module):
    """All decoder layers."""

    def __init__(self, config: GrokConfig, partition: Partition) -> None:
        super().__init__(name="transformer")
        self._config = config
        self._partition = partition

    def __call__(
        self, x: jax.Array, positions: jax.Array, attend: Attend, dtype: jnp.dtype | type
    ) -> tuple[jax.Array, Routed]:
        """[B, T, D], [B, T] -> [B, T, D] and what the routers decided."""
        if self._partition.kernels.scan_layers:
            return self._rolled(x, positions, attend, dtype)
        routed = []
        for i in range(self._config.num_layers):
            layer = DecoderLayer(self._config, self._partition, i, f"decoder_layer_{i}")
            x, decided = layer(x, positions, attend, dtype)
            routed.append(decided)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *routed)

    @hk.transparent
    def _rolled(
        self, x: jax.Array, positions: jax.Array, attend: Any, dtype: jnp.dtype | type
    ) -> tuple[jax.Array, Routed]:
        """The same as one loop over stacked parameters. `attend` has the stacked pages as an attribute."""
        module = DecoderLayer(self._config, self._partition, 0, STACKED_LAYERS)

        def compute(carry: tuple[jax.Array, Any], layer: jax.Array) -> tuple[tuple[jax.Array, Any], Routed]:
            def take(next_getter: Callable[[Any], Any], value: Any, context: hk.GetterContext) -> Any:
                own = LayerWeight(value, layer)
                read_in_place = len(context.original_shape) > 1 and not context.full_name.endswith("router/w")
                return next_getter(own if read_in_place else own.taken())

            x, attend.pages = carry
            with hk.custom_getter(take):
                x, routed = module(x, positions, functools.partial(_at, attend, layer), dtype)
            return (x, attend.pages), routed

        (x, attend.pages), routed = lax.scan(compute, (x, attend.pages), jnp.arange(self._config.num_layers))
        return x, routed


def _at(attend: Any, layer: jax.Array, _: object, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    mixed: jax.Array = attend(layer, query, key, value)
    return mixed


class Embedding(hk.Module):
    """The table that embeds tokens and, transposed, gives their logits."""

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "in_out_embed") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def _table(self) -> Table:
        c = self._config
        init = hk.initializers.TruncatedNormal(1.0 / c.embedding_multiplier_scale)
        return cast(Table, hk.get_parameter("embeddings", [c.vocab_size, c.emb_size], jnp.float32, init=init))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, D] float32, times the embedding multiplier."""
        rows = self._partition.lookup(self._table(), tokens).astype(jnp.float32)
        return rows * self._config.embedding_multiplier_scale

    def logits(self, hidden: jax.Array, valid: jax.Array) -> jax.Array:
        """[..., D], [...] -> [..., V] float32, times the output multiplier."""
        logits = self._partition.tied_logits(hidden, valid, self._table())
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
        read: Callable[[jax.Array], jax.Array],
        dtype: jnp.dtype | type,
    ) -> Output:
        """One pass.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, counted from 0 in each sequence; -1 marks padding, whose outputs mean nothing.
          attend: keeps keys and values, and attends to them.
          read: picks the positions whose logits are wanted, [B, T, D] -> [..., D].
          dtype: in which products are taken and keys and values are kept. What is added up from layer to layer is
            float32 all the same; with bfloat16 that keeps the error at that of xAI's code.
        """
        embedding = Embedding(self._config, self._partition)
        x = self._partition.constrain(embedding(tokens), ("batch", None, None))
        x, routed = self._transformer(x, positions, attend, dtype)
        valid = positions >= 0
        hidden = read(RMSNorm(self._partition, "rms_norm")(x, valid).astype(dtype))
        valid = read(valid[..., None])[..., 0]
        return Output(embedding.logits(hidden, valid), routed)


def forward(
    config: GrokConfig,
    partition: Partition,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    read: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
    dtype: jnp.dtype | type = jnp.float32,
) -> Output:
    """`LanguageModel` applied, for use inside `hk.transform`. Its parameters are those of `parameter_table(config)`."""
    return LanguageModel(config, partition, Transformer(config, partition))(tokens, positions, attend, read, dtype)


def causal_forward(config: GrokConfig, tokens: jax.Array, *, kernels: Kernels = PORTABLE) -> Output:
    """Logits [B, T, V] of whole sequences [B, T] on one device, nothing cached: for training and as an oracle."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(_: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query, key = rotate(query, positions), rotate(key, positions)
        return causal_attention(query, key, value, config.attn_output_multiplier)

    return forward(config, Partition.create(config, kernels=kernels), tokens, positions, attend)
