"""Multi-head attention with grouped keys and capped logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from workers.model.config import GrokConfig
from workers.model.linear import LinearWeight, project
from workers.model.parameters import Axes
from workers.model.partition import Partition

#: Where keys and values of all layers are kept: any tree of arrays.
Cache = Any
#: (cache, layer [], query [B, T, H, C], key [B, T, K, C], value [B, T, K, C]) -> [B, T, H, C] and the cache with the new keys
#: and values. Queries and keys come before their rotation: the model's caller decides where and in which form they are kept.
Attend = Callable[[Cache, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Cache]]


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float, cap: float) -> jax.Array:
    """Attention within whole sequences that start at position 0, nothing cached.

    Args:
      query: [B, T, H, C], rotated.
      key, value: [B, T, K, C], the key rotated.
      scale, cap: factor of the logits, and what bounds them then.

    Returns:
      [B, T, H, C] float32.
    """
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size).astype(jnp.float32)  # [B, T, K, H/K, C]
    logits = jnp.einsum("btkgc,bskc->bkgts", grouped, key.astype(jnp.float32)) * scale
    logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(jnp.tri(length, dtype=bool), logits, -1e30)
    mixed = jnp.einsum("bkgts,bskc->btkgc", jax.nn.softmax(logits), value.astype(jnp.float32))
    return mixed.reshape(batch, length, heads, size)


class MultiHeadAttention(hk.Module):
    """Projections to queries, keys and values, attention by the caller's `attend`, projection back.

    Shapes: B sequences, T positions, D emb_size, H query heads, K key heads, C key_size.
    """

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "multi_head_attention") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def __call__(
        self, x: jax.Array, positions: jax.Array, layer: jax.Array, attend: Attend, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """[B, T, D], [B, T] -> [B, T, D] float32 and the cache. Products are taken in x's dtype."""
        c, partition = self._config, self._partition
        batch, length, _ = x.shape
        valid = positions >= 0
        sizes = {"query": c.num_q_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        weights = tuple(LinearWeight(name)((c.emb_size, heads * c.key_size)) for name, heads in sizes.items())
        axes: tuple[Axes, ...] = (("embed", "q_heads"), ("embed", "kv_heads"), ("embed", "kv_heads"))
        projected = project(partition, x, valid, weights, axes)
        query, key, value = (
            flat.reshape(batch, length, heads, c.key_size)
            for flat, heads in zip(projected, sizes.values(), strict=True)
        )
        mixed, cache = attend(cache, layer, query, key, value)  # [B, T, H, C]
        flat = mixed.astype(x.dtype).reshape(batch, length, c.num_q_heads * c.key_size)
        back = LinearWeight("linear")((c.num_q_heads * c.key_size, c.emb_size))
        (result,) = project(partition, flat, valid, (back,), (("q_heads", "embed"),))
        return result, cache
