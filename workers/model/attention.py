"""Multi-head attention with grouped keys, rotary positions and capped logits."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from workers.kernels.paged_attention import LOGIT_CAP
from workers.model.config import GrokConfig
from workers.model.linear import Linear
from workers.model.partition import Partition

#: (layer, query [B, T, H, C], key [B, T, K, C], value [B, T, K, C]) -> [B, T, H, C]. Whoever calls the model decides
#: where keys and values are kept.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of base 10,000 in rotate-half form.

    Args:
      x: [B, T, heads, C], C even; dimension i is turned together with i + C/2.
      positions: [B, T] int32.
    """
    size = x.shape[-1]
    frequencies = 1.0 / (10_000 ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))  # [C/2]
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, C/2]
    angles = jnp.tile(angles, 2)[:, :, None, :]  # [B, T, 1, C]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * jnp.cos(angles) + turned * jnp.sin(angles)).astype(x.dtype)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """Attention within whole sequences that start at position 0, nothing cached.

    Args:
      query: [B, T, H, C].
      key, value: [B, T, K, C].
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

        def project(name: str, heads: int, axis: str) -> jax.Array:
            flat = Linear(heads * c.key_size, ("embed", axis), partition, name=name)(x)
            return flat.reshape(batch, length, heads, c.key_size)

        query = rotate(project("query", c.num_q_heads, "q_heads"), positions)  # [B, T, H, C]
        key = rotate(project("key", c.num_kv_heads, "kv_heads"), positions)  # [B, T, K, C]
        value = project("value", c.num_kv_heads, "kv_heads")  # [B, T, K, C]
        mixed = attend(layer, query, key, value).astype(x.dtype)  # [B, T, H, C]
        flat = mixed.reshape(batch, length, c.num_q_heads * c.key_size)
        return Linear(c.emb_size, ("q_heads", "embed"), partition, name="linear")(flat)
