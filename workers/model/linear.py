"""The smallest layers: linear maps without bias, and root-mean-square norms."""

from __future__ import annotations

from typing import cast

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from workers.model.parameters import Axes
from workers.model.partition import Partition
from workers.model.quantized import Weight

NORM_EPSILON = 1e-5


def weight_parameter(shape: tuple[int, ...]) -> Weight:
    """The parameter `w` of the current module, an array or an 8-bit weight of `shape` [..., K, N].

    Fresh ones are drawn with standard deviation 1/sqrt(K).
    """
    init = hk.initializers.TruncatedNormal(1.0 / shape[-2] ** 0.5)
    return cast(Weight, hk.get_parameter("w", list(shape), jnp.float32, init=init))


class Linear(hk.Module):
    """x [B, T, K] -> x @ w [B, T, N]; `axes` are the logical axes of w."""

    def __init__(self, output_size: int, axes: Axes, partition: Partition, name: str) -> None:
        super().__init__(name=name)
        self._output_size = output_size
        self._axes = axes
        self._partition = partition

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, K] -> [B, T, N] float32."""
        weight = weight_parameter((x.shape[-1], self._output_size))
        return self._partition.matmul(x, weight, self._axes)


class RMSNorm(hk.Module):
    """x / sqrt(mean(x^2) + 1e-5) * scale over the last dimension, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __call__(self, x: jax.Array, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
        """[..., D] -> [..., D] of `dtype`."""
        scale = hk.get_parameter("scale", [x.shape[-1]], jnp.float32, init=jnp.ones)
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPSILON)
        return (normed * scale).astype(dtype)
