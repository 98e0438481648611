"""Multi-head attention with grouped keys and capped logits."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from workers.kernels.xla.paged_attention import LOGIT_CAP
from workers.model.config import GrokConfig
from workers.model.linear import LinearWeight
from workers.model.parameters import Axes
from workers.model.partition import Partition

#: (layer, query [B, T, H, C], key [B, T, K, C], value [B, T, K, C]) -> [B, T, H, C]. Queries and keys come before their
#: rotation: whoever calls the model decides where keys and values are kept, and in which form.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """Attention within whole sequences that start at position 0, nothing cached.

    Args:
      query: [B, T, H, C], rotated.
      key, value: [B, T, K, C], the key rotated.
      scale: factor of the logits, applied before the cap.

    Returns:
      [B, T, H, C] float32.
    """
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size).astype(jnp.float32)  # [B, T, K, H/K, C]
    logits = jnp.einsum("btkgc,bskc->bkgts", grouped, key.astype(jnp.float32)) * scale
    logits = LOGIT_CAP * jnp.tanh(logits / LOGIT_CAP)
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

    def __call__(self, x: jax.Array, positions: jax.Array, layer: int, attend: Attend) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D] float32. Products are taken in x's dtype."""
        c, partition = self._config, self._partition
        batch, length, _ = x.shape
        valid = positions >= 0
        sizes = {"query": c.num_q_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        weights = tuple(LinearWeight(name)((c.emb_size, heads * c.key_size)) for name, heads in sizes.items())
        axes: tuple[Axes, ...] = (("embed", "q_heads"), ("embed", "kv_heads"), ("embed", "kv_heads"))
        projected = partition.project(x, valid, weights, axes)
        query, key, value = (
            flat.reshape(batch, length, heads, c.key_size)
            for flat, heads in zip(projected, sizes.values(), strict=True)
        )
        mixed = attend(layer, query, key, value).astype(x.dtype)  # [B, T, H, C]
        flat = mixed.reshape(batch, length, c.num_q_heads * c.key_size)
        back = LinearWeight("linear")((c.num_q_heads * c.key_size, c.emb_size))
        (result,) = partition.project(flat, valid, (back,), (("q_heads", "embed"),))
        return result
