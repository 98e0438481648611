"""Rotary position embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) in rotate-half form.

    Args:
      x: [B, T, heads, C], C even; dimension i is turned together with i + C/2.
      positions: [B, T] int32.
      base: dimension i turns by position * base^(-2 i / C).
    """
    size = x.shape[-1]
    frequencies = 1.0 / (base ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))  # [C/2]
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, C/2]
    angles = jnp.tile(angles, 2)[:, :, None, :]  # [B, T, 1, C]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * jnp.cos(angles) + turned * jnp.sin(angles)).astype(x.dtype)
