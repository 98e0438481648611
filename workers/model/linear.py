"""The smallest layers: weights without bias, and root-mean-square norms."""

from __future__ import annotations

from typing import cast

import haiku as hk
import jax
import jax.numpy as jnp

from workers.kernels.weights import Weight
from workers.model.partition import Partition


class LinearWeight(hk.Module):
    """Holds one weight `w` under the module name that xAI's tree gives it."""

    def __call__(self, shape: tuple[int, ...]) -> Weight:
        """The weight, [..., K, N]. Fresh ones are drawn with standard deviation 1/sqrt(K)."""
        init = hk.initializers.TruncatedNormal(1.0 / shape[-2] ** 0.5)
        return cast(Weight, hk.get_parameter("w", list(shape), jnp.float32, init=init))


class RMSNorm(hk.Module):
    """Root-mean-square norm over the last dimension, in float32; see `workers.kernels.xla.portable.norm`."""

    def __init__(self, partition: Partition, name: str = "rms_norm") -> None:
        super().__init__(name=name)
        self._partition = partition

    def __call__(self, x: jax.Array, valid: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """[B, T, D], [B, T] (false for padding) -> [B, T, D] float32, added to `residual` if there is one."""
        scale = hk.get_parameter("scale", [x.shape[-1]], jnp.float32, init=jnp.ones)
        return self._partition.norm(x, valid, scale, residual)
