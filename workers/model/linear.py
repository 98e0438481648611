"""The smallest layers: products with weights without bias, and root-mean-square norms."""

from __future__ import annotations

from typing import cast

import haiku as hk
import jax
from jax.sharding import PartitionSpec

from workers.kernels.interface import Site
from workers.kernels.weights import Weight
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition


class LinearWeight(hk.Module):
    """Holds one weight `w` under the module name that xAI's tree gives it."""

    def __call__(self, shape: tuple[int, ...]) -> Weight:
        """The weight, [..., K, N]."""
        return cast(Weight, hk.get_parameter("w", list(shape)))


def project(
    partition: Partition, x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...], axes: tuple[Axes, ...]
) -> tuple[jax.Array, ...]:
    """`x` [B, T, K] times weights [K, N_i] with logical `axes`: [B, T, N_i] float32, N split as the weight's.

    Each device multiplies its part; a split K ends in one sum over its mesh axes. Rows stay split as the batch is,
    unless a weight is split over the same mesh axes. `valid` [B, T] is false for padding.
    """
    depth = axes[0][0]
    taken = {axis for pair in axes for name in pair for axis in partition.axes(name)}
    rows = None if taken & {*partition.axes("batch")} else "batch"

    def local(x: jax.Array, valid: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
        flat = x.reshape(-1, x.shape[-1])
        products = partition.kernels.project(flat, valid.reshape(-1), weights)
        over = partition.axes(depth)
        return tuple(
            partition.sum(product.reshape(*x.shape[:-1], -1), over, Site.ATTENTION, x.dtype) for product in products
        )

    specs = (
        partition.spec((rows, None, depth)),
        partition.spec((rows, None)),
        *(partition.weight_spec(weight, pair) for weight, pair in zip(weights, axes, strict=True)),
    )
    outs = tuple(partition.spec((rows, None, pair[1])) for pair in axes)
    results: tuple[jax.Array, ...] = partition.on_parts(local, specs, outs)(x, valid, *weights)
    return results


class RMSNorm(hk.Module):
    """Root-mean-square norm over the last dimension, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "rms_norm") -> None:
        super().__init__(name=name)
        self._epsilon = config.norm_epsilon
        self._partition = partition

    def __call__(self, x: jax.Array, valid: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """[B, T, D], [B, T] (false for padding) -> [B, T, D] float32, added to `residual` if there is one."""
        scale, partition = hk.get_parameter("scale", [x.shape[-1]]), self._partition
        more = () if residual is None else (residual,)

        def local(x: jax.Array, valid: jax.Array, scale: jax.Array, *residual: jax.Array) -> jax.Array:
            flat = [array.reshape(-1, x.shape[-1]) for array in (x, *residual)]
            normed = partition.kernels.norm(flat[0], valid.reshape(-1), scale, *flat[1:], epsilon=self._epsilon)
            return normed.reshape(x.shape)

        rows = partition.spec(("batch", None, None))
        specs = (rows, partition.spec(("batch", None)), PartitionSpec(), *(rows for _ in more))
        normed: jax.Array = partition.on_parts(local, specs, rows)(x, valid, scale, *more)
        return normed
